import re
from collections import Counter
from dataclasses import dataclass
from math import inf

import numpy as np
import pytest
import torch
import transformers as hf
from tiny import make_model
from torch import nn
from torch.func import functional_call

import gradfn as gf
from gradfn.engine.check import Covered, advice, coverage, equality, noise, row_difference
from gradfn.engine.engine import probe_engine
from gradfn.testing.strategies import randomize
from gradfn.transforms import chain, dot, project

SIZES = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 16, "pad_token_id": 0}  # fmt: skip
ROWS = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3, 4, 5], [6, 7, 8])]


def llama(tied=False):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=tied))


def mixtral():
    model = hf.MixtralForCausalLM(
        hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_experts_per_tok=2, num_local_experts=3)
    )
    model.set_experts_implementation("eager")
    return model


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "mixtral": mixtral,
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=17, n_embd=8, n_layer=2, n_head=2)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    ),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
}
VIEWS = {
    "default": gf.View(),
    "everything": gf.View(include=["*"]),
    "some": gf.View(exclude=["*1*"]),
}


def counted_by_hand(model):
    """Parameters by path, numbers as `*`, read off their names alone."""
    sizes = Counter()
    for name, parameter in model.named_parameters():
        path = re.sub(r"\.?(weight|bias)$", "", name)
        sizes[re.sub(r"(?<![^.])\d+(?![^.])", "*", path)] += parameter.numel()
    return sizes


# --- coverage


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", MODELS)
def test_all_parameters_are_in_the_rows_once(name, view):
    model = MODELS[name]()
    sizes = Counter()
    for row in coverage(model, VIEWS[view]):
        sizes[row.pattern] += row.parameters
        assert (row.engine is None) == bool(row.reason)
    assert sizes == counted_by_hand(model)
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_attributed_is_what_uncovered_says(name):
    model = MODELS[name]()
    rows = coverage(model)
    left = sum(row.parameters for row in rows if row.engine is None)
    assert left == sum(gf.model.uncovered(model, gf.model.find_sites(model)).values())


def test_repeated_layers_are_one_row():
    rows = {row.pattern: row for row in coverage(llama())}
    assert rows["model.layers.*.self_attn.q_proj"] == Covered(
        "model.layers.*.self_attn.q_proj", "linear", 2, 2 * 8 * 8, "probe", ""
    )
    assert rows["model.norm"] == Covered("model.norm", "norm", 1, 8, None, "left out by default")
    assert rows["lm_head"].kind == "LM head"


def test_a_tied_weight_counts_once():
    rows = {row.pattern: row for row in coverage(llama(tied=True))}
    assert "lm_head" not in rows
    assert rows["model.embed_tokens"] == Covered(
        "model.embed_tokens", "embedding, LM head", 1, 17 * 8, None, "left out by default"
    )


def test_reasons():
    excluded = coverage(llama(), gf.View(exclude=["*.mlp.*"]))
    assert {row.reason for row in excluded if ".mlp." in row.pattern} == {"excluded"}
    assert {row.reason for row in excluded if "norm" in row.pattern} == {"left out by default"}
    included = coverage(llama(), gf.View(include=["*.mlp.*"]))
    assert {row.reason for row in included if "self_attn" in row.pattern} == {"not included"}


@pytest.mark.filterwarnings("ignore:.*(vmap|performance drop).*")
def test_weights_that_no_probe_sees_are_found_by_a_run():
    model = randomize(mixtral(), 0)
    view = gf.View(include=["*"])
    engine = probe_engine(model, gf.causal_lm_loss(model), project(2), view=view)
    errors = equality(engine, ROWS)
    assert errors[0].error < 1e-6
    by_engine = {row.pattern: row.engine for row in coverage(model, view, sites=engine.sites)}
    assert by_engine["model.layers.*.mlp.gate"] == "vmap(grad)"
    assert Counter(by_engine.values())["vmap(grad)"] == 1


# --- equality


@pytest.mark.parametrize("transform", [chain(), project(2)])
@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_the_engine_equals_the_definition(kind, transform):
    model = randomize(make_model(kind), 0)
    engine = probe_engine(model, gf.causal_lm_loss(model), transform)
    errors = equality(engine, ROWS)
    assert sorted(error.block for error in errors) == sorted({site.block for site in engine.sites})
    assert max(error.error for error in errors) < 1e-9
    assert min(error.cosine for error in errors) == pytest.approx(1)


@dataclass
class Wrong:
    """A loss whose batched form is three times the loss."""

    model: nn.Module

    def __call__(self, params, example):
        return functional_call(self.model, params, example["x"]).square().sum()

    def batched(self, batch):
        return self.model(batch["x"]).square().sum(1) * 3


def test_an_engine_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setattr("gradfn.engine.verify.tolerance", lambda weights: (inf, inf))  # it does not look
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    rows = [{"x": torch.tensor(x, dtype=torch.float64)} for x in ([1.0, 2.0, 3.0], [-1.0, 0.5, 2.0])]
    for error in equality(probe_engine(model, Wrong(model)), rows):
        assert error.error == pytest.approx(2)  # 3 g - g
        assert error.cosine == pytest.approx(1)


def test_the_worst_block_comes_first(monkeypatch):
    model = randomize(llama(), 0)
    engine = probe_engine(model, gf.causal_lm_loss(model))
    run = type(engine).__call__

    def spoilt(self, batch):
        rows = run(self, batch)
        values = {n: -v if n.endswith("1.mlp.up_proj") else v for n, v in rows.values.items()}
        return rows._replace(values=values)

    monkeypatch.setattr(type(engine), "__call__", spoilt)
    worst, second, *_ = equality(engine, ROWS)
    assert worst.block == "model.layers.1.mlp.up_proj"
    assert (worst.error, worst.cosine) == (pytest.approx(2), pytest.approx(-1))
    assert second.error < 1e-9


def test_what_cannot_be_compared_is_refused():
    model = make_model()
    loss = gf.causal_lm_loss(model)
    with pytest.raises(gf.InputError, match="view the engine by example"):
        equality(probe_engine(model, loss, view=gf.View(tokens=True)), ROWS)
    queries = {site.block: torch.ones(1, *site.spec.shape) for site in gf.model.find_sites(model)}
    with pytest.raises(gf.InputError, match="does not end in dot"):
        equality(probe_engine(model, loss, dot(queries)), ROWS)
    model.register_parameter("packed", nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(gf.InputError, match="packed is quantised"):
        equality(probe_engine(model, loss), ROWS)


# --- noise


def test_row_difference_is_that_of_numpy():
    generator = torch.Generator().manual_seed(0)
    got, want = (
        {n: torch.randn(5, 2, k, generator=generator) for n, k in (("a", 3), ("b", 1))} for _ in "12"
    )
    a, b = (np.concatenate([v.double().numpy().reshape(5, -1) for v in x.values()], 1) for x in (got, want))
    cosines = [u @ v / np.sqrt(u @ u) / np.sqrt(v @ v) for u, v in zip(a, b, strict=True)]
    errors = [np.sqrt(((u - v) ** 2).sum() / (v @ v)) for u, v in zip(a, b, strict=True)]
    found = row_difference(got, want)
    assert found.cosine == pytest.approx(np.median(cosines))
    assert found.worst_cosine == pytest.approx(min(cosines))
    assert found.error == pytest.approx(np.median(errors))
    assert found.worst_error == pytest.approx(max(errors))
    assert found.row == np.argmin(cosines)


def test_two_zero_rows_are_equal_and_one_is_not():
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    assert row_difference({"a": zero}, {"a": zero}).worst_cosine == 1
    assert row_difference({"a": zero}, {"a": zero}).worst_error == 0
    assert row_difference({"a": one}, {"a": zero}).worst_cosine == 0
    assert row_difference({"a": one}, {"a": zero}).worst_error == float("inf")


class Uneven:
    """The squared output, a tenth more in a batch of several; in the second coordinate three times."""

    def __init__(self, model):
        self.model = model

    def __call__(self, params, example):
        return functional_call(self.model, params, example["x"]).square().sum()

    def batched(self, batch):
        factor = 1.0 if len(batch["x"]) == 1 else 1.1
        return factor * self.model(batch["x"]).square().sum(1)


def test_noise_of_batches_and_of_the_precision(monkeypatch):
    monkeypatch.setattr(
        "gradfn.engine.verify.tolerance", lambda weights: (inf, inf)
    )  # it is not noise so large
    model, other = (nn.Linear(2, 1, bias=False).double() for _ in range(2))
    model.weight.data, other.weight.data = (torch.tensor([w]).double() for w in ([1.0, 1.0], [2.0, 1.0]))
    rows = [{"x": torch.tensor(x).double()} for x in ([1.0, 1.0], [1.0, 3.0])]
    found = noise(model, rows, chain(), reference=gf.Subject(other, Uneven(other)), loss=Uneven(model))
    assert found.batching.worst_error == pytest.approx(0.1)
    assert found.batching.worst_cosine == pytest.approx(1)
    # Gradients are 2 (w x) x: w x is 2 and 4, with the reference 3 and 5.
    assert found.precision.worst_error == pytest.approx(1 / 3)
    assert found.precision.error == pytest.approx(1 / 5)
    assert noise(model, rows, loss=Uneven(model)).precision is None


def test_bf16_is_noisier_than_fp32():
    model, rough = make_model(), make_model().bfloat16()
    found = noise(rough, ROWS, reference=gf.Subject(model))
    assert 1e-3 < found.precision.worst_error < 0.5
    assert found.worst_cosine <= found.precision.worst_cosine < 1 - 1e-7
    assert noise(model, ROWS).worst_cosine > 1 - 1e-9


@pytest.mark.parametrize(
    ("here", "others", "words"),
    [
        (0.9995, None, "fine: .* 0.999500$"),
        (0.995, None, "fine for ranking: .* 0.995000$"),
        (0.9, {"eager attention": 0.995, "--precision fp32": 1.0}, "use eager attention: .*0.995000 there"),
        (0.9, {"eager attention": 0.91, "--precision fp32": 0.999}, "use --precision fp32"),
        (0.5, {"eager attention": 0.6, "--token-batch-size 1": 0.8}, "use --token-batch-size 1"),
        (0.9, {"eager attention": 0.9}, "none of the settings tried helps"),
        (0.9, None, "none of the settings tried helps"),
    ],
)
def test_advice_follows_its_rule(here, others, words):
    assert re.match(words, advice(here, others))


# --- adapters and quantised layers, where their libraries are installed


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_of_a_peft_model_the_adapters_alone_are_attributed_and_equal_the_definition():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = randomize(peft.get_peft_model(llama(), config), 0)
    engine = probe_engine(model, gf.causal_lm_loss(model))
    assert {site.path.split(".")[-2] for site in engine.sites} == {"lora_A", "lora_B"}
    assert equality(engine, ROWS)[0].error < 1e-9
    rows = coverage(model)
    assert {row.reason for row in rows if row.engine is None} == {"not an adapter"}
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_of_quantised_linears_are_those_of_the_weights_they_stand_for(bits):
    bnb = pytest.importorskip("bitsandbytes")
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    torch.manual_seed(0)
    layers = [kind(64, 64, has_fp16_weights=False) if bits == 8 else kind(64, 64) for _ in range(2)]
    model = gf.hf.multiply_exactly(nn.Sequential(layers[0], nn.Tanh(), layers[1]).to("cpu").eval())

    class Loss:
        def __call__(self, params, example):
            raise AssertionError("quantised weights have no definition by autograd")

        def batched(self, batch):
            return model(batch["x"]).square().sum(1)

    x = torch.randn(3, 64)
    got = probe_engine(model, Loss())({"x": x}).values
    seen = {}
    for name, layer in (("0", layers[0]), ("2", layers[1])):
        layer.register_forward_hook(lambda _, args, y, n=name: seen.update({n: (args[0].detach(), y)}))
    x = x.requires_grad_()
    loss = model(x).square().sum()
    for name, (inputs, y) in seen.items():
        g = torch.autograd.grad(loss, y, retain_graph=True)[0]
        want = torch.einsum("bo,bi->boi", g, torch.cat([inputs, torch.ones(3, 1)], 1))
        assert torch.allclose(got[name], want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    rows = coverage(model)
    assert {row.engine for row in rows} == {"probe"}
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
