"""A tap inside an ordinary training step: the blocks are right, and the step is the same to the bit."""

import gc
from collections import Counter
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

import gradfn as gf
from gradfn.engine.tap import _ATTACHED, RepeatedCallError
from gradfn.model.sites import blocks_of, find_sites
from gradfn.testing import assert_blocks_close
from gradfn.testing.models import randomize
from gradfn.transforms import chain, dot, project, unit_normalize
from gradfn.transforms.row_sum import RowSum

EVERYTHING = gf.View(include=["*"])
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def mlp():
    layers = [nn.Linear(3, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Dropout(0.2)]
    return randomize(nn.Sequential(*layers, nn.Linear(4, 2)), 0).train()


def lm(family):
    model = language_model(family).train()
    model.set_attn_implementation("eager")  # attention with dropout in a function that a test can replace
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


def lm_loss(model, batch):
    """Next-token cross-entropy over the supervised tokens of a batch of 4, as a trainer has it."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 17


def mlp_loss(model, batch):
    """A mean over a batch of 4."""
    return (model(batch["x"]) - batch["y"]).square().sum() / 4


def case(name):
    """A model in train mode, its loss and a batch of four rows."""
    if name == "mlp":
        return mlp(), mlp_loss, {"x": random(4, 3), "y": random(4, 2)}
    if name == "encoder":
        model = randomize(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3, batch_first=True), 0).train()
        model.self_attn.dropout = 0.0  # it is drawn in a kernel
        return model, mlp_loss, {"x": random(4, 3, 4), "y": random(4, 3, 4)}
    ids = torch.randint(1, 11, (4, 6), generator=GENERATOR)
    labels = ids.clone()
    labels[1, :3] = labels[3, 4:] = -100
    return lm(name), lm_loss, {"input_ids": ids, "labels": labels}


MODELS = ("mlp", "encoder", "gpt2", "llama")


class Dropout:
    """`F.dropout` that records the masks of a batch, and replays those of one row."""

    def __init__(self):
        self.masks, self.row, self.at = [], None, 0

    def __call__(self, input, p=0.5, training=True, inplace=False):
        if not training or not p:
            return input
        if self.row is None:
            self.masks.append((torch.rand_like(input) > p).to(input.dtype) / (1 - p))
            return input * self.masks[-1]
        self.at += 1
        return input * self.masks[self.at - 1][self.row : self.row + 1]


def naive(model, loss, batch, view=None, dropout=None):
    """The blocks of each row's own part of the loss, by plain autograd, at the same masks."""
    params, grads = dict(model.named_parameters()), []
    for row in range(len(next(iter(batch.values())))):
        if dropout is not None:
            dropout.row, dropout.at = row, 0
        part = loss(model, {key: value[row : row + 1] for key, value in batch.items()})
        grads.append(torch.autograd.grad(part, list(params.values()), materialize_grads=True))
        assert dropout is None or dropout.at == len(dropout.masks)
    stacked = dict(zip(params, map(torch.stack, zip(*grads, strict=True)), strict=True))
    return blocks_of(find_sites(model, view), stacked)


def scores(dense):
    """Two queries, shaped like the blocks."""
    return dot({name: random(2, *G.shape[1:]) for name, G in dense.items()})


@pytest.mark.parametrize(("name", "heads"), [*((n, False) for n in MODELS), ("gpt2", True), ("llama", True)])
@pytest.mark.parametrize("end", ["blocks", "project", "unit", "dot", "project and dot", "cosine"])
def test_blocks_of_a_training_step_are_those_of_each_row_at_the_same_masks(name, heads, end, monkeypatch):
    (model, loss, batch), dropout, view = case(name), Dropout(), gf.View(heads=heads)
    shapes = {site.block: torch.zeros(1, *site.spec.shape) for site in find_sites(model, view)}
    transform = {
        "blocks": lambda: None,
        "project": lambda: project(2),
        "unit": unit_normalize,
        "dot": lambda: scores(shapes),
        "project and dot": lambda: chain(project(2), scores(project(2)(shapes))),
        "cosine": lambda: chain(unit_normalize(), scores(shapes)),
    }[end]()
    monkeypatch.setattr(F, "dropout", dropout)
    with gf.tap(model, transform, view=view) as tapped:
        loss(model, batch).backward()
    assert dropout.masks
    dense = naive(model, loss, batch, view, dropout)
    assert_blocks_close(tapped.blocks, dense if transform is None else transform(dense))


@pytest.mark.parametrize("name", ["mlp", "encoder", "gpt2"])
def test_blocks_of_every_kind_of_weight_add_up_to_the_gradient(name):
    model, loss, batch = case(name)
    with gf.tap(model, view=EVERYTHING) as tapped:
        loss(model, batch).backward()
    grads = {n: p.grad[None] for n, p in model.named_parameters()}
    want = blocks_of(find_sites(model, EVERYTHING), grads)
    assert_blocks_close({n: G.sum(0, keepdim=True) for n, G in tapped.blocks.items()}, want)


def trained(name, make, taps, steps=3):
    """What a few steps of training change: gradients, weights, buffers, moments and random numbers."""
    torch.manual_seed(0)
    GENERATOR.manual_seed(0)
    model, loss, batch = case(name)
    optimizer, seen = make(model.parameters()), []
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        if taps:
            with gf.tap(model, project(2), view=EVERYTHING) as tapped:
                value = loss(model, batch)
                value.backward()
            assert all(bool(G.any()) for G in tapped.blocks.values())
        else:
            value = loss(model, batch)
            value.backward()
        seen += [value.detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert model.training
    return [*seen, *model.parameters(), *model.buffers(), *moments, torch.get_rng_state()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [
    lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), lambda params: torch.optim.AdamW(params, 0.01),
])  # fmt: skip
def test_a_tap_changes_no_bit_of_training(name, make):
    plain, tapped = (trained(name, make, taps) for taps in (False, True))
    assert len(plain) == len(tapped)
    assert all(torch.equal(a, b) for a, b in zip(plain, tapped, strict=True))


def test_forward_passes_add_rows_and_pop_starts_anew():
    model, loss, batch = case("mlp")
    model.eval()
    dense = naive(model, loss, batch)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    with gf.tap(model) as tapped:
        for part in parts:
            loss(model, part).backward()
        assert_blocks_close(tapped.pop(), dense)
        sum(loss(model, part) for part in parts).backward()  # one backward pass through both
        with torch.no_grad():
            loss(model, batch)  # an evaluation counts for nothing
        assert_blocks_close(tapped.pop(), dense)
    summed = RowSum(lambda name, G: G.square().sum(0))
    with gf.tap(model, summed) as tapped:
        for part in parts:
            loss(model, part).backward()
    assert_blocks_close(tapped.blocks, {name: G.square().sum(0) for name, G in dense.items()})


class Twice(nn.Module):
    """A layer that is called two times, and one whose weight is another's."""

    def __init__(self):
        super().__init__()
        self.inner, self.tied, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.tied.weight, self.tied.bias = self.inner.weight, self.inner.bias

    def forward(self, x):
        return self.out(self.tied(self.inner(self.inner(x).tanh())).tanh())


@pytest.mark.parametrize("end", ["blocks", "project", "dot", "cosine"])
def test_uses_of_a_weight_are_added_up(end):
    model, batch = randomize(Twice(), 0).train(), {"x": random(4, 3), "y": random(4, 2)}
    dense = naive(model, mlp_loss, batch)
    queries = scores(dense)
    transform = {"blocks": chain(), "project": project(2), "dot": queries,
                 "cosine": chain(unit_normalize(), queries)}[end]  # fmt: skip
    with gf.tap(model, transform) as tapped:
        mlp_loss(model, batch).backward()
    assert_blocks_close(tapped.blocks, transform(dense))


def test_a_stage_that_is_not_linear_must_know_of_a_second_call():
    inner = nn.Linear(3, 3)
    model = randomize(nn.Sequential(inner, nn.Tanh(), inner, nn.Linear(3, 2)), 0).train()
    batch = {"x": random(4, 3), "y": random(4, 2)}
    dense = naive(model, mlp_loss, batch)
    cosine = chain(unit_normalize(), scores(dense))
    with pytest.raises(RepeatedCallError, match=r"give shared=\['0'\]"), gf.tap(model, cosine):
        mlp_loss(model, batch)
    with gf.tap(model, cosine, shared=["0"]) as tapped:
        mlp_loss(model, batch).backward()
    assert_blocks_close(tapped.blocks, cosine(dense))


class Checkpointed(nn.Module):
    """A model whose inner layers are computed again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 4))
        self.reentrant = reentrant

    def forward(self, x):
        y = self.first(x)
        y = (
            self.inner(y)
            if self.reentrant is None
            else checkpoint(self.inner, y, use_reentrant=self.reentrant)
        )
        return self.last(y)


@pytest.mark.parametrize("transform", [chain(), project(2), unit_normalize()])
def test_recomputation_is_no_second_call(transform):
    batch, made = {"x": random(4, 3), "y": random(4, 2)}, []
    for reentrant in (None, False):
        torch.manual_seed(0)
        model = randomize(Checkpointed(reentrant), 0).train()
        with gf.tap(model, transform) as tapped:
            for rows in (slice(0, 3), slice(3, 4)):
                mlp_loss(model, {key: value[rows] for key, value in batch.items()}).backward()
        made.append((tapped.blocks, [p.grad for p in model.parameters()]))
    assert_blocks_close(made[1][0], made[0][0], 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(made[0][1], made[1][1], strict=True))


def test_checkpoints_of_the_other_kind_are_refused():
    model, batch = randomize(Checkpointed(True), 0).train(), {"x": random(4, 3), "y": random(4, 2)}
    with pytest.raises(gf.InputError, match="use_reentrant=False"), gf.tap(model):
        mlp_loss(model, batch).backward()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_language_model_may_checkpoint_its_blocks(family):
    made = []
    model, loss, batch = case(family)
    for checkpoints in (False, True):
        if checkpoints:
            old = model.gradient_checkpointing_enable  # its former name
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        with gf.tap(model, project(2)) as tapped:
            loss(model, batch).backward()
        made.append(tapped.blocks)
    assert_blocks_close(made[1], made[0], 1e-12)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_rounds_the_model_but_not_the_statistics(inside):
    model, batch = mlp().float().eval(), {"x": random(4, 3).float(), "y": random(4, 2).float()}
    transform = project(2)
    want = transform(naive(model, mlp_loss, batch, EVERYTHING))
    with gf.tap(model, transform, view=EVERYTHING) as tapped:
        with torch.autocast("cpu", torch.bfloat16):
            loss = mlp_loss(model, batch)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    grads = {n: p.grad[None] for n, p in model.named_parameters()}
    whole = transform(blocks_of(find_sites(model, EVERYTHING), grads))
    for name, G in tapped.blocks.items():
        assert G.dtype == torch.float32
        assert torch.cosine_similarity(G.flatten(), want[name].flatten(), 0) > 0.999
        torch.testing.assert_close(G.sum(0), whole[name][0], rtol=0.02, atol=0.02 * float(G.abs().max()))


def hooks_of(model):
    return Counter({
        path: len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in module.__dict__)
        for path, module in model.named_modules()
    })  # fmt: skip


class Fails(nn.Module):
    def forward(self, x):
        if len(x) == 3:
            raise RuntimeError("not three")
        return x


def test_exceptions_leave_no_hooks_and_no_rows():
    model = randomize(nn.Sequential(nn.Linear(3, 4), Fails(), nn.Linear(4, 2)), 0).train()
    attention = nn.MultiheadAttention(4, 2)
    model.add_module("attention", attention)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    batch, before = {"x": random(4, 3), "y": random(4, 2)}, hooks_of(model)
    with gf.tap(model, view=EVERYTHING):
        assert hooks_of(model) != before
    with pytest.raises(RuntimeError, match="not three"), gf.tap(model, view=EVERYTHING):
        mlp_loss(model, {key: value[:3] for key, value in batch.items()})
    assert hooks_of(model) == before
    assert not _ATTACHED
    with gf.tap(model, view=gf.View(exclude=["attention*"])) as tapped:
        with pytest.raises(RuntimeError, match="not three"):
            mlp_loss(model, {key: value[:3] for key, value in batch.items()})
        mlp_loss(model, batch).backward()
    assert_blocks_close(tapped.blocks, naive(model, mlp_loss, batch, gf.View(exclude=["attention*"])))


def test_nothing_else_of_the_model_may_be_tapped_meanwhile():
    model, loss, batch = case("mlp")
    engine = gf.probe_engine(model, lambda params, e: torch.func.functional_call(model, params, e["x"]).sum())
    with gf.tap(model):
        with pytest.raises(gf.InputError, match="has probes already"), gf.tap(model):
            pass
        with pytest.raises(gf.InputError, match="has probes already"):
            engine({"x": batch["x"]})
    engine({"x": batch["x"]})
    with gf.tap(model) as tapped:
        loss(model, batch).backward()
    assert tapped.blocks


class Adds(nn.Linear):
    """A layer whose output the model writes to."""

    def forward(self, input):
        return super().forward(input)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = Adds(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.inner(x)
        y += 1
        return self.out(y)


def test_a_model_that_writes_to_outputs_needs_a_copy():
    batch = {"x": random(4, 3), "y": random(4, 2)}
    model = randomize(InPlace(), 0)
    with pytest.raises(gf.InputError, match="give copy=True"), gf.tap(model):
        mlp_loss(model, batch)
    activated = randomize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), 0)
    for net, copy in ((model, True), (activated, False)):
        with gf.tap(net, copy=copy) as tapped:
            mlp_loss(net, batch).backward()
        assert_blocks_close(tapped.blocks, naive(net, mlp_loss, batch))
    assert activated[1].inplace


def test_running_statistics_see_each_batch_once():
    layers = [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)]
    plain, tapped = (randomize(nn.Sequential(*layers), 0).train().requires_grad_(True) for _ in "ab")
    batch = {"x": random(4, 2, 4, 4), "y": random(4, 2)}
    before = {name: value.clone() for name, value in plain.named_buffers()}
    mlp_loss(plain, batch)
    want = {name: value.clone() for name, value in plain.named_buffers()}
    tapped.load_state_dict(before, strict=False)
    with gf.tap(tapped, view=EVERYTHING) as rows:
        mlp_loss(tapped, batch).backward()
    assert all(torch.equal(value, want[name]) for name, value in tapped.named_buffers())
    grads = {n: p.grad[None] for n, p in tapped.named_parameters()}
    sums = {n: G.sum(0, keepdim=True) for n, G in rows.blocks.items()}
    assert_blocks_close(sums, blocks_of(find_sites(tapped, EVERYTHING), grads))


def test_the_experts_of_a_mixture_have_blocks():
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3,
             "num_experts_per_tok": 2, "max_position_embeddings": 8}  # fmt: skip
    model = randomize(MixtralForCausalLM(MixtralConfig(**sizes)), 0)
    model.set_experts_implementation("eager")
    batch = case("gpt2")[-1]
    dense = naive(model, lm_loss, batch)
    with gf.tap(model, project(3)) as tapped:
        for rows in (slice(0, 3), slice(3, 4)):
            lm_loss(model, {key: value[rows] for key, value in batch.items()}).backward()
    assert any(name.endswith("gate_up_proj") for name in dense)
    assert_blocks_close(tapped.blocks, project(3)(dense))


def test_frozen_weights_have_blocks_and_no_gradient():
    model, loss, batch = case("mlp")
    model.eval()
    dense = naive(model, loss, batch)
    model.requires_grad_(False)
    with gf.tap(model) as tapped:
        loss(model, batch).backward()
    assert_blocks_close(tapped.blocks, dense)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_a_block_that_the_loss_does_not_reach_is_zero():
    model = randomize(nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}), 0)
    model.forward = lambda x: (model["unused"](x), model["used"](x))[1]
    batch = {"x": random(4, 3), "y": random(4, 2)}
    with gf.tap(model) as tapped:
        mlp_loss(model, batch).backward()
    assert tapped.blocks["used"].any()
    assert tapped.blocks["unused"].shape == (4, 2, 4)
    assert not tapped.blocks["unused"].any()


def test_backward_passes_through_one_forward_add_up_if_the_stages_are_linear():
    model, loss, batch = case("mlp")
    model.eval()
    dense = naive(model, loss, batch)
    with gf.tap(model) as tapped:
        value = loss(model, batch)
        value.backward(retain_graph=True)
        value.backward()
    assert_blocks_close(tapped.blocks, {name: 2 * G for name, G in dense.items()})
    with gf.tap(model, chain(unit_normalize(), scores(dense))):
        value = loss(model, batch)
        value.backward(retain_graph=True)
        with pytest.raises(gf.InputError, match="a second backward pass"):
            value.backward()


def test_parts_of_a_model_are_called_in_a_forward_of_their_own():
    model, loss, batch = case("mlp")
    model.eval()
    with gf.tap(model) as tapped:
        with pytest.raises(gf.InputError, match="outside of the tapped model's own forward"):
            model[0](batch["x"])
        with tapped.forward(4):
            y = model[1:](model[0](batch["x"]))
        ((y - batch["y"]).square().sum() / 4).backward()
    assert_blocks_close(tapped.blocks, naive(model, loss, batch))


def test_what_cannot_be_given_is_refused():
    model, loss, batch = case("mlp")
    with gf.tap(model) as tapped, pytest.raises(gf.InputError, match="no forward pass"):
        _ = tapped.blocks
    with gf.tap(model) as tapped:
        loss(model, batch)
    with pytest.raises(gf.InputError, match="pass 1 of 1 had no backward pass"):
        _ = tapped.blocks
    with pytest.raises(gf.InputError, match="not for each token"), gf.tap(model, view=gf.View(tokens=True)):
        pass
    model.register_parameter("bare", nn.Parameter(torch.ones(2)))
    with pytest.raises(gf.InputError, match="bare is not the weight"), gf.tap(model, view=EVERYTHING):
        pass
    with pytest.raises(gf.InputError, match=r"returns the shape \[4, 5\] for a batch of 3 examples"):  # noqa: SIM117
        with gf.tap(model, rows=3):
            model(batch["x"])


def test_blocks_that_were_taken_are_freed():
    model, loss, batch = case("mlp")
    with gf.tap(model) as tapped:
        loss(model, batch).backward()
        slot = ref(tapped._forwards[0].slots["0"])
        assert slot() is not None
        tapped.pop()
        gc.collect()
        assert slot() is None
