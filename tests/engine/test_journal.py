"""What vmap cannot map over, or could crash on, goes through plain autograd; each row equals a naive loop."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import gradfn as gf
from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import collect, gather
from gradfn.errors import InputError
from gradfn.model.losses import model_loss
from gradfn.model.params import call
from gradfn.model.sites import View, blocks_of, find_sites
from gradfn.testing import assert_blocks_close
from gradfn.testing.strategies import randomize

EVERYTHING = View(include=["*"])
SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def naive(model, loss_of, rows, view=None):
    """One unpadded row after the other, at the model's own parameters."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    grads = [
        torch.autograd.grad(
            loss_of(row), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        for row in rows
    ]
    stacked = {
        name: torch.stack(parts) for name, parts in zip(parameters, zip(*grads, strict=True), strict=True)
    }
    return blocks_of(find_sites(model, view), stacked)


def error(got, want):
    """How far two gradients are from each other, relative to their norm."""
    a, b = (torch.cat([blocks[name].flatten() for name in want]) for blocks in (got, want))
    return float((a - b).norm() / b.norm())


def tokens(length, seed):
    return torch.randint(3, 31, (length,), generator=torch.Generator().manual_seed(seed))


def next_tokens(model):
    return lambda row: F.cross_entropy(
        model(input_ids=row["input_ids"][None], use_cache=False).logits[0, :-1], row["input_ids"][1:]
    )


ROWS = [{"input_ids": tokens(length, length)} for length in (5, 8, 13)]


@pytest.mark.parametrize(("kind", "capacity"), [("switch", 2), ("nllb", 64)])
def test_a_router_that_rebinds_a_module_does_not_crash_the_process(kind, capacity):
    if kind == "switch":
        model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(
            vocab_size=31, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_decoder_layers=2, num_heads=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=3, expert_capacity=capacity,
            decoder_start_token_id=0, pad_token_id=0,
        ))  # fmt: skip
    else:
        model = NllbMoeForConditionalGeneration(NllbMoeConfig(
            vocab_size=31, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=20,
            decoder_ffn_dim=20, encoder_attention_heads=2, decoder_attention_heads=2, num_experts=3,
            expert_capacity=capacity, encoder_sparse_step=2, decoder_sparse_step=2,
            decoder_start_token_id=2, pad_token_id=1,
        ))  # fmt: skip
    model = randomize(model, 0)
    rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"]), "labels": tokens(4, i)}
            for i, row in enumerate(ROWS)]  # fmt: skip

    def loss_of(row):
        logits = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).logits[0]
        return F.cross_entropy(logits, row["labels"])

    want = naive(model, loss_of, rows, EVERYTHING)
    engine = probe_engine(model, model_loss(model, "seq2seq_lm"), view=EVERYTHING)
    assert error(gather(engine, rows).values, want) < 4e-6  # its router computes in float32


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT itself
def test_adapters_on_the_parameters_of_experts():
    base = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)).eval()
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    )
    randomize(model, 0).float()
    names = [name for name, _ in model.named_parameters()]
    got = collect(model, ROWS)
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert error(got, naive(model, next_tokens(model), ROWS)) < 1e-5  # of float32, which experts need


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT itself
def test_functions_without_setup_context():
    recurrent = RecurrentGemmaConfig(
        **SIZES, lru_width=16, head_dim=8, attention_window_size=8, block_types=("recurrent", "attention")
    )
    model = randomize(RecurrentGemmaForCausalLM(recurrent), 0)
    want = naive(model, next_tokens(model), ROWS, EVERYTHING)
    assert error(collect(model, ROWS, view=EVERYTHING), want) < 1e-6
    llama = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = peft.get_peft_model(llama, peft.LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]))
    randomize(model, 0)
    want = naive(model, next_tokens(model), ROWS, EVERYTHING)
    assert_blocks_close(collect(model, ROWS, view=EVERYTHING), want)


class Flipped(torch.autograd.Function):
    """The identity, whose gradient is reversed."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return -grads[0]


class Reversal(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.b(Flipped.apply(torch.tanh(self.a(x))) * self.scale)


class Growing(nn.Module):
    """Scales by the longest input so far, as rope does whose frequencies grow with the sequence."""

    def __init__(self):
        super().__init__()
        self.inner, self.longest = nn.Linear(3, 2), 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if x.shape[-2] > self.longest:
            self.longest = x.shape[-2]
            self.register_buffer("seen", torch.full((1,), float(self.longest)))
        return self.inner(x) * self.seen.to(x.dtype)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def forward(self, x):
        return self.b(checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=self.reentrant))


class Rebinding(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, x):
        self.a = self.a.to(torch.float64)
        return self.a(x) * self.scale


class Squares:
    """`sum f(x)²` of an example, and of a batch if the loss has this form."""

    def __init__(self, model):
        self.model = model

    def __call__(self, params, example):
        return call(self.model, params, example["x"][None]).square().sum()


class Batched(Squares):
    def batched(self, batch):
        return self.model(batch["x"]).square().flatten(1).sum(1)


@pytest.mark.parametrize("loss", [Squares, Batched])
@pytest.mark.parametrize(
    "make", [Reversal, Rebinding, lambda: Checkpointed(True), lambda: Checkpointed(False)],
    ids=["reversal", "rebinding", "reentrant", "checkpointed"],
)  # fmt: skip
def test_modules_that_vmap_cannot_run(make, loss):
    model = randomize(make(), 0)
    rows = [{"x": torch.randn(5, 3, dtype=torch.float64)} for _ in range(3)]
    plain = make().double()
    plain.load_state_dict(model.state_dict())
    plain.reentrant = False  # the other kind has no `autograd.grad`
    want = naive(plain, lambda row: plain(row["x"][None]).square().sum(), rows, EVERYTHING)
    assert_blocks_close(collect(model, rows, loss=loss(model), view=EVERYTHING), want)


@pytest.mark.parametrize("loss", [Squares, Batched])
def test_a_row_does_not_depend_on_the_rows_before_it(loss):
    model = randomize(Growing(), 0)
    long, short = ({"x": torch.randn(size, 3, dtype=torch.float64)} for size in (9, 4))
    want = collect(model, [short], loss=loss(model))
    engine = probe_engine(model, loss(model))
    engine(collate([long]))
    assert_blocks_close(engine(collate([short])).values, want)
    assert model.longest == 0
    assert float(model.seen) == 0


class Capacity(nn.Module):
    """A layer whose expert takes the first eight tokens of a batch and drops the others."""

    def __init__(self):
        super().__init__()
        self.expert, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        flat = x.flatten(0, 1)
        taken = (torch.arange(len(flat)) < 8).to(x)[:, None]
        return (self.expert(flat) * taken * self.scale).view_as(x)


def test_where_a_batch_drops_tokens_rows_are_computed_alone():
    model = randomize(Capacity(), 0)
    rows = [{"x": torch.randn(3, 3, dtype=torch.float64)} for _ in range(6)]
    want = naive(model, lambda row: model(row["x"][None]).square().sum(), rows, EVERYTHING)
    engine = probe_engine(model, Batched(model), view=EVERYTHING)
    got, losses = gather(engine, rows)
    assert_blocks_close(got, want)
    torch.testing.assert_close(
        losses, torch.stack([model(r["x"][None]).square().sum() for r in rows]).detach()
    )
    assert all(site.probed for site in engine.sites if site.path == "expert")


class InBatches:
    """A loss whose batched form gives something else than a number for each example."""

    def __init__(self, model, form):
        self.model, self.form = model, form

    def __call__(self, params, example):
        return functional_call(self.model, params, example["x"]).sum()

    def batched(self, batch):
        return self.form(self.model(batch["x"]))


@pytest.mark.parametrize(("form", "says"), [
    (lambda z: z, r"a loss must be one number an example, not of shape \[2\]: reduce it, \.mean\(\) say"),
    (lambda z: z[:1], r"not of shape \[1\]"), (lambda z: (z.sum(), z), "a tensor, and not a tuple"),
    (lambda z: z.sum() * 1j, "and not complex"), (lambda z: 1.0, "a tensor, and not a float"),
])  # fmt: skip
def test_a_loss_that_is_no_number_is_refused(form, says):
    model, rows = nn.Linear(3, 2), [{"x": torch.ones(3)}] * 2

    def loss(params, example):
        return form(functional_call(model, params, example["x"]))

    for fold in (gf.mean(), gf.kfac(), gf.second_moment()):
        with pytest.raises(InputError, match=says):
            gf.fit(fold, model, rows, loss=loss)
    for view in (None, EVERYTHING):
        with pytest.raises(InputError, match=says):
            collect(model, rows, loss=loss, view=view)
    batch = {"x": torch.ones(2, 3)}
    with pytest.raises(InputError, match=says):
        gf.per_example_grads(loss, dict(model.named_parameters()), batch)


@pytest.mark.parametrize("form", [lambda z: z, lambda z: z.sum()])
def test_a_batched_loss_that_is_not_one_number_an_example_is_refused(form):
    model = nn.Linear(3, 2)
    with pytest.raises(
        InputError, match=r"`loss.batched` must be one number for each of 2 examples, not of shape"
    ):
        collect(model, [{"x": torch.ones(3)}] * 2, loss=InBatches(model, form))


def test_a_loss_that_ignores_its_parameters_is_refused():
    model = nn.Linear(3, 2)

    def loss(params, example):
        return model(example["x"]).square().sum()

    def half(params, example):
        return functional_call(model, params, example["x"]).square().sum() + model(example["x"]).sum()

    for wrong in (loss, half):
        for view in (None, EVERYTHING):
            with pytest.raises(InputError, match="functional_call"):
                collect(model, [{"x": torch.ones(3)}] * 2, loss=wrong, view=view)


class Patches(nn.Module):
    """A batch norm whose gradient is transposed, as where patches of images become tokens."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 2, bias=False), nn.BatchNorm2d(6)
        self.tokens, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.tokens(self.norm(self.conv(x)).flatten(2).transpose(1, 2))).tanh().mean(1)


class Squares:
    """The sum of the squared outputs of a network."""

    def __init__(self, net):
        self.net = net

    def __call__(self, params, row):
        return functional_call(self.net, params, row["x"][None]).square().sum()

    def batched(self, batch):
        return self.net(batch["x"]).square().sum(1)


@pytest.mark.parametrize("view", [None, EVERYTHING])
def test_a_batch_norm_is_right_for_one_row_too(view):
    net, generator = randomize(Patches(), 0), torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)} for _ in range(3)]
    together, alone = (
        collect(net, rows, loss=Squares(net), view=view, token_batch_size=size) for size in (3, 1)
    )
    assert_blocks_close(alone, together)
    batch, weight, step = collate(rows), net.conv.weight[0, 0, 0], 1e-6
    with torch.no_grad():
        weight[0] += step
        up = Squares(net).batched(batch)
        weight[0] -= 2 * step
        down = Squares(net).batched(batch)
    torch.testing.assert_close(alone["conv"][:, 0, 0], (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


class Remembers(nn.Module):
    """Keeps a tensor made of a parameter in a dict, as some models do in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.table, self.out, self.made = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 2), {}

    def forward(self, x):
        return self.out(x * self.made.setdefault("bias", self.table.exp().sum(0))).tanh()


def test_what_a_forward_pass_puts_into_a_dict_is_forgotten():
    net = randomize(Remembers(), 0)
    generator = torch.Generator().manual_seed(0)
    rows = [{"x": torch.randn(3, generator=generator, dtype=torch.float64)} for _ in range(3)]
    loss = Squares(net)

    def plain(row):
        net.made.clear()
        return loss(dict(net.named_parameters()), row)

    want = naive(net, plain, rows, EVERYTHING)
    net.made.clear()
    assert error(collect(net, rows, loss=loss, view=EVERYTHING), want) < 1e-12
    assert net.made == {}
