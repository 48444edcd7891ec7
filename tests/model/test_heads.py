from types import SimpleNamespace

import pytest
import torch
from tiny import language_model
from torch import nn
from transformers import BertConfig, CLIPConfig, CLIPModel, EncoderDecoderConfig, EncoderDecoderModel

from gradfn.engine.reference import naive_grads
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.model.heads import Heads, heads_of
from gradfn.model.losses import causal_lm_loss
from gradfn.model.sites import View, find_sites
from gradfn.testing import assert_blocks_close, naive_blocks, naive_causal_lm_loss
from gradfn.testing.strategies import SquaredError, randomize
from gradfn.transforms import chain, dot, project, unit_normalize

ROWS = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3, 4], [5, 6, 7])]


# Layer, and the block of each head cut out of the whole by hand.
BY_HAND = {
    "gpt2": {
        "transformer.h.0.attn.c_attn": {
            str(h): lambda G, h=h: torch.cat([G[:, at + h * 4 : at + h * 4 + 4] for at in (0, 8, 16)], 1)
            for h in range(2)
        },
        "transformer.h.0.attn.c_proj": {
            **{str(h): lambda G, h=h: G[:, :, h * 4 : h * 4 + 4] for h in range(2)},
            "bias": lambda G: G[:, :, -1:],
        },
    },
    "gpt_neox": {
        "gpt_neox.layers.0.attention.query_key_value": {
            str(h): lambda G, h=h: G[:, h * 6 : h * 6 + 6] for h in range(4)
        },
        "gpt_neox.layers.0.attention.dense": {
            **{str(h): lambda G, h=h: G[:, :, h * 2 : h * 2 + 2] for h in range(4)},
            "bias": lambda G: G[:, :, -1:],
        },
    },
    "llama": {
        "model.layers.0.self_attn.q_proj": {str(h): lambda G, h=h: G[:, 2 * h : 2 * h + 2] for h in range(4)},
        "model.layers.0.self_attn.k_proj": {str(h): lambda G, h=h: G[:, 2 * h : 2 * h + 2] for h in range(2)},
        "model.layers.0.self_attn.v_proj": {str(h): lambda G, h=h: G[:, 2 * h : 2 * h + 2] for h in range(2)},
        "model.layers.0.self_attn.o_proj": {
            str(h): lambda G, h=h: G[:, :, 2 * h : 2 * h + 2] for h in range(4)
        },
    },
    "phi3": {
        "model.layers.0.self_attn.qkv_proj": {
            name: lambda G, s=start: G[:, s : s + 2]
            for name, start in {
                "0.0": 0, "0.1": 2, "0.2": 4, "0.3": 6, "1.0": 8, "1.1": 10, "2.0": 12, "2.1": 14,
            }.items()
        },
        "model.layers.0.self_attn.o_proj": {
            str(h): lambda G, h=h: G[:, :, 2 * h : 2 * h + 2] for h in range(4)
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("family", BY_HAND)
def test_heads_are_the_rows_and_columns_that_the_architecture_gives_them(family):
    model = language_model(family)
    whole = naive_blocks(naive_causal_lm_loss(model), model, ROWS)
    heads = collect(model, ROWS, view=View(heads=True))
    expected = {
        f"{path}[{name}]": cut(whole[path])
        for path, parts in BY_HAND[family].items()
        for name, cut in parts.items()
    }
    expected |= {path: G for path, G in whole.items() if path not in BY_HAND[family]}
    assert_blocks_close(heads, {name: expected[name] for name in heads})
    assert heads.keys() == expected.keys()


@pytest.mark.parametrize("family", BY_HAND)
@pytest.mark.parametrize("unit", [False, True])
def test_the_scores_of_heads_sum_to_the_score_of_the_whole(family, unit):
    model, loss = language_model(family), None
    norm = [unit_normalize()] if unit else []

    def scores(view, by_block):
        queries = collect(model, ROWS, view=view, loss=loss)
        return collect(model, ROWS, chain(*norm, dot(queries, by_block=by_block)), view=view)

    parts = scores(View(heads=True), by_block=True)
    assert_blocks_close(sum(parts.values()), scores(View(), by_block=False))


@pytest.mark.parametrize("family", BY_HAND)
def test_heads_compose_with_projection(family):
    model, view = language_model(family), View(heads=True)
    transform = chain(project(2), unit_normalize())
    assert_blocks_close(
        collect(model, ROWS, transform, view=view),
        transform(naive_blocks(naive_causal_lm_loss(model), model, ROWS, view)),
    )


def test_heads_can_be_declared():
    net = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2)).double()
    view = View(heads={"0": Heads("rows", "(h d)", h=3), "1": Heads("columns", "(h d)", d=3)})
    assert [site.block for site in find_sites(net, view)] == [
        "0[0]", "0[1]", "0[2]", "1[0]", "1[1]", "1[bias]",
    ]  # fmt: skip


@pytest.mark.parametrize(("heads", "message"), [
    (True, "no attention heads were found: declare them"),
    ({"none": Heads("rows", "(h d)", h=3)}, "no attention heads were found"),
    ({"0": Heads("rows", "(h d)", h=4)}, r"0 has 6 rows, which do not split as '\(h d\)' with {'h': 4}"),
    ({"0": Heads("rows", "(h1 d) + (h2 d)", h1=1, h2=1, d=2)}, "cover 4 of its 6 rows"),
    ({"1": Heads("rows", "(h d)", h=1)}, "1 is not a linear layer"),
])  # fmt: skip
def test_heads_that_do_not_fit_are_refused(heads, message):
    net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6))
    with pytest.raises(InputError, match=message):
        find_sites(net, View(include=["*"], heads=heads))


def test_a_side_that_is_neither_rows_nor_columns_is_refused():
    with pytest.raises(InputError, match="not 'both'"):
        Heads("both", "(h d)")


def test_an_unknown_fused_layout_is_refused():
    model = language_model("gpt_neox")
    model.config.model_type = "unheard_of"
    with pytest.raises(InputError, match="is not known: declare it"):
        heads_of(model, "layers.0.attention.query_key_value")


class Part(nn.Module):
    """A module with a config, and perhaps one more of them inside it."""

    def __init__(self, inner=None, **config):
        super().__init__()
        self.config, self.inner = SimpleNamespace(**config), inner


@pytest.mark.parametrize(("model", "path", "expected"), [
    (Part(Part(num_heads=3), num_attention_heads=2), "inner.q_proj", Heads("rows", "(h d)", h=3)),
    (Part(num_attention_heads=2, decoder_attention_heads=4), "model.decoder.0.q_proj",
     Heads("rows", "(h d)", h=4)),
    (Part(model_type="phi3", num_attention_heads=4, num_key_value_heads=2, hidden_size=8, head_dim=3),
     "0.qkv_proj", Heads("rows", "(h1 d) + (h2 d) + (h3 d)", h1=4, h2=2, h3=2, d=3)),
])  # fmt: skip
def test_the_number_of_heads_is_that_of_the_innermost_config_and_its_own_part(model, path, expected):
    assert heads_of(model, path) == expected


def test_a_model_of_several_parts_has_the_heads_of_each():
    parts = [
        {
            "hidden_size": 24,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 6,
            "image_size": 8,
            "patch_size": 4,
        },
        {
            "hidden_size": 16,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 13,
        },
    ]
    clip = CLIPModel(CLIPConfig(vision_config=parts[0], text_config=parts[1]))
    path = "layers.0.self_attn.q_proj"
    for tower, count in (("vision_model", 6), ("text_model", 2)):
        prefix = next(
            name for name, _ in clip.named_modules() if name.startswith(tower) and name.endswith(path)
        )
        assert heads_of(clip, prefix) == Heads("rows", "(h d)", h=count)
    part = {"vocab_size": 13, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1}
    pair = EncoderDecoderModel(
        EncoderDecoderConfig.from_encoder_decoder_configs(
            BertConfig(**part, num_attention_heads=6),
            BertConfig(**part, num_attention_heads=4, is_decoder=True),
        )
    )
    names = [name for name, _ in pair.named_modules() if name.endswith("attention.self.query")]
    counts = {name.split(".")[0]: heads_of(pair, name) for name in names}
    assert counts == {"encoder": Heads("rows", "(h d)", h=6), "decoder": Heads("rows", "(h d)", h=4)}


def test_the_loss_that_knows_the_head_agrees():
    assert causal_lm_loss(language_model("llama")).fused_head


class Attentive(nn.Module):
    """nn.MultiheadAttention with one weight of q, k and v, or one each, and a linear layer."""

    def __init__(self, own, bias):
        super().__init__()
        sizes = {"kdim": 4, "vdim": 5} if own else {}
        self.attn = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True, **sizes)
        self.out, self.own = nn.Linear(6, 2), own

    def forward(self, x):
        key, value = (x[..., :4], x[..., :5]) if self.own else (x, x)
        return self.out(self.attn(x, key, value, need_weights=False)[0]).tanh().sum(-2)


ATTENTIVE = View(
    heads={"attn.in_proj*": Heads("rows", "(h d)", h=2), "attn.out_proj": Heads("columns", "(h d)", h=2)}
)


@pytest.fixture(params=[False, True], ids=["one weight", "three weights"])
def attentive(request):
    return request.param


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transform", [chain(), chain(project(2), unit_normalize())])
def test_declared_heads_of_torchs_own_attention_are_parts_of_the_naive_gradient(attentive, bias, transform):
    net = randomize(Attentive(attentive, bias), 0)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "x": torch.randn(3, 6, generator=generator, dtype=torch.float64),
            "y": torch.ones(2).double() * number,
        }
        for number in range(3)
    ]
    loss = SquaredError(net)
    whole = naive_grads(loss, net, rows)
    in_bias, out_weight = whole.get("attn.in_proj_bias"), whole["attn.out_proj.weight"]
    cut = {}
    for number, name in enumerate("qkv"):
        weight = whole[f"attn.{name}_proj_weight"] if attentive else whole["attn.in_proj_weight"]
        first = number * 6
        for head in range(2):
            at = slice(first + 3 * head, first + 3 * head + 3)
            own = weight[:, 3 * head : 3 * head + 3] if attentive else weight[:, at]
            parts = [own] if in_bias is None else [own, in_bias[:, at, None]]
            cut[f"attn.in_proj[{name}][{head}]"] = torch.cat(parts, -1)
    cut |= {f"attn.out_proj[{head}]": out_weight[:, :, 3 * head : 3 * head + 3] for head in range(2)}
    cut |= {"attn.out_proj[bias]": whole["attn.out_proj.bias"][..., None]} if bias else {}
    cut["out"] = torch.cat([whole["out.weight"], whole["out.bias"][..., None]], -1)
    for some_loss in (loss, squared_error_of_one(loss)):
        assert_blocks_close(collect(net, rows, transform, loss=some_loss, view=ATTENTIVE), transform(cut))


def squared_error_of_one(loss):
    """The loss without its batched form, which goes through vmap."""
    return lambda params, example: loss(params, example)


@pytest.mark.parametrize("unit", [False, True])
def test_heads_of_torchs_own_attention_sum_to_the_score_of_the_whole(attentive, unit):
    net = randomize(Attentive(attentive, bias=True), 1)
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(3, 6, generator=generator, dtype=torch.float64), "y": torch.zeros(2).double()}
        for _ in range(3)
    ]
    norm = [unit_normalize()] if unit else []

    def scores(view, by_block):
        queries = collect(net, rows, view=view, loss=SquaredError(net))
        ending = chain(*norm, dot(queries, by_block=by_block))
        return collect(net, rows, ending, view=view, loss=SquaredError(net))

    parts, blocks = scores(ATTENTIVE, True), scores(View(), True)
    for path in ("attn.in_proj[q]", "attn.in_proj[k]", "attn.in_proj[v]", "attn.out_proj"):
        assert_blocks_close(sum(v for name, v in parts.items() if name.startswith(path)), blocks[path])
    assert_blocks_close(sum(parts.values()), scores(View(), False))
