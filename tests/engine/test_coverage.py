"""What is attributed by default in whole models, and that it equals a naive loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
)

from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import collect, gather
from gradfn.engine.tap import tap
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss
from gradfn.model.sites import View
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.testing.models import randomize

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
WIDTHS = {"intermediate_size": 20, "num_hidden_layers": 1, "num_key_value_heads": 1, "num_local_experts": 3}
MIXTURES = {
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, **WIDTHS, num_experts_per_tok=2)),
    "llama4": lambda: Llama4ForCausalLM(Llama4TextConfig(
        **SIZES, **WIDTHS, intermediate_size_mlp=20, num_experts_per_tok=1, interleave_moe_layer_step=1,
    )),
    "longcat": lambda: LongcatFlashForCausalLM(LongcatFlashConfig(
        **{**SIZES, "head_dim": 4}, num_layers=1, ffn_hidden_size=20, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, expert_ffn_hidden_size=12, n_routed_experts=3,
        zero_expert_num=2, moe_topk=2,
    )),
    "jetmoe": lambda: JetMoeForCausalLM(JetMoeConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_key_value_heads=1, kv_channels=8,
        intermediate_size=20, num_local_experts=3, num_experts_per_tok=2,
    )),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_have_probes(kind):
    model = randomize(MIXTURES[kind](), 0)
    if kind == "gpt_oss":
        model = model.float()  # its kernels have no float64
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 31, (n,), generator=generator)} for n in (5, 8, 13)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    engine = probe_engine(model, causal_lm_loss(model))
    got = gather(engine, rows).values
    experts = [site for site in engine.sites if site.layer.kind == "experts"]
    assert len(experts) == (4 if kind == "jetmoe" else 2)  # its attention has experts too
    assert all(site.probed for site in experts)
    want = naive_blocks(engine.loss, model, rows, View())
    assert_blocks_close(got, want, 1e-4 if kind == "gpt_oss" else 1e-9)


def test_experts_that_get_no_token_have_no_gradient():
    model = randomize(MIXTURES["longcat"](), 0)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias[3:] = 100.0  # all tokens go to the experts that do nothing
    rows = [{"input_ids": torch.tensor([5, 6, 7, 8])}]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]
    loss = causal_lm_loss(model)
    got = collect(model, rows, loss=loss)
    assert_blocks_close(got, naive_blocks(loss, model, rows, View()))
    assert not any(bool(block.any()) for name, block in got.items() if "mlp.experts" in name)


class Padding(nn.Conv2d):
    """A convolution that pads its input by itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised first, so that no probe sees it."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Activated(nn.Conv2d):
    """A convolution with its activation."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize(("kind", "probed"), [(Padding, True), (Standardised, False), (Activated, True)])
def test_subclasses_of_convolutions_are_attributed_by_default(kind, probed):
    net = randomize(
        nn.Sequential(
            kind(2, 3, 2),
            nn.Tanh(),
            kind(3, 2, 2),
            nn.Flatten(),
            nn.Linear(2 * (25 if kind is Padding else 9), 2),
        ),
        0,
    )
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(2, 5, 5, generator=generator, dtype=torch.float64)} for _ in range(3)]

    def loss(params, row):
        return functional_call(net, params, row["x"][None]).square().sum()

    engine = probe_engine(net, loss)
    assert_blocks_close(gather(engine, rows).values, naive_blocks(loss, net, rows, View()))
    assert [site.probed for site in engine.sites] == [probed, probed, True]


class Own(nn.Module):
    """A language model whose embedding is a module of one's own, and whose head has the same weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = Lookup(), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.embed(x))).mean(-2))


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 4))

    def forward(self, x):
        return self.weight[x] * 2


@pytest.mark.parametrize("view", [None, View(include=["*"])])
def test_a_weight_that_a_module_of_ones_own_uses_too_sums_both_uses(view):
    net = randomize(Own(), 0)
    rows = [{"x": torch.tensor([row, 2, 3])} for row in range(3)]

    def loss(params, row):
        return F.cross_entropy(functional_call(net, params, row["x"][None])[0], torch.tensor(1))

    got = collect(net, rows, loss=loss, view=view)
    assert set(got) == {"inner", "head"}
    assert_blocks_close(got, naive_blocks(loss, net, rows, view or View()))
    with pytest.raises(InputError, match="head"), tap(net):
        pass
