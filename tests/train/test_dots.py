"""Values inside a training step of the caller's own: those of the definition, and the step unchanged."""

import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import gradfn as gf
from gradfn.data import collate
from gradfn.engine.reference import naive_grads
from gradfn.model.losses import causal_lm_loss
from gradfn.model.params import params_of
from gradfn.testing.layers import BatchedOutput, CalledTwice, WeightedOutput
from gradfn.testing.models import randomize
from gradfn.train import State, Training, in_run, optimizer_state, step_direction, update, values

ROWS = 5
TRAINING = Training(1, ROWS, 0.1, "adamw", eps=1e-4, max_grad_norm=0.05)
GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


class Tied(nn.Module):
    """Two layers of one weight, and an embedding that is also the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.b.weight, self.head.weight = self.a.weight, self.embed.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.embed((x.abs() * 7).long() % 6)).tanh()))


class Looked(nn.Module):
    """An embedding with a padding token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 3, padding_idx=0)

    def forward(self, x):
        return self.embed((x.abs() * 7).long() % 6)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)), "linear of tokens": (lambda: nn.Linear(4, 3), (6, 4)),
    "Conv1D": (lambda: Conv1D(3, 4), (2, 4)), "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False), (4, 4, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), (2, 5)), "layer norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4)), "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "embedding": (Looked, (5,)), "tied": (Tied, (5,)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True), (3, 4)),
}  # fmt: skip


def layered(name, twice):
    """A module, its loss and its rows."""
    make, shape = LAYERS[name]
    module = randomize(CalledTwice(make()) if twice else make(), 0)
    return module, BatchedOutput(module), [{"x": random(*shape)} for _ in range(ROWS)]


def sentences(family):
    """A language model, its loss and rows of several lengths, some of whose tokens are not supervised."""
    if family == "mixtral":
        config = MixtralConfig(
            vocab_size=11, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=3, max_position_embeddings=8, pad_token_id=None,
        )  # fmt: skip
        model = randomize(MixtralForCausalLM(config), 0)
        model.set_experts_implementation("eager")  # grouped products have no float64
    else:
        model = language_model(family)
    rows = []
    for number in range(ROWS):
        ids = torch.randint(11, (4 + number % 3,), generator=GENERATOR)
        labels = ids.clone()
        labels[: number % 2 + 1] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return model, causal_lm_loss(model).with_whole_logits(), rows


def case(name, twice=False):
    return layered(name, twice) if name in LAYERS else sentences(name)


def precision(name):
    """The RMSNorm of a Llama computes in float32, whose rounding depends on the batch."""
    return 2e-6 if name in ("llama", "mixtral") else 1e-10


def drawn_state(model):
    """As after some steps."""
    params = params_of(model)
    first = {name: 0.1 * torch.randn_like(p) for name, p in params.items()}
    second = {name: 0.01 * torch.rand_like(p) + 1e-3 for name, p in params.items()}
    return State(params, (first, second), torch.tensor(7), torch.tensor(20))


def explicit(rows, directions):
    """`[rows, queries]` inner products of explicit gradients."""
    return sum(rows[name].flatten(1) @ d.flatten(1).T for name, d in directions.items())


ALL = [*((name, False) for name in (*LAYERS, "gpt2", "gpt_neox", "llama", "mixtral")),
       *((name, True) for name in LAYERS)]  # fmt: skip


@pytest.mark.parametrize(("name", "twice"), ALL)
def test_values_and_dots_are_those_of_explicit_gradients(name, twice):
    (model, loss, rows), weights = case(name, twice), random(ROWS).abs()
    model.requires_grad_()
    state, batch, some = drawn_state(model), collate(rows), collate(rows[:3])
    view = gf.View(include=["*"], exclude=["*.gate.weight"]) if name == "mixtral" else None
    with values(model, view=view) as v:
        queries = v.query_grads(lambda: loss.batched(some).mean(), lambda: loss.batched(batch)[3:].sum())
        queries = {n: q for n, q in queries.items() if "gate.weight" not in n}
        (loss.batched(batch) * weights).sum().backward()
        dots = v.dots(queries, keep=True)
        gram = v.gram(keep=True)
        phi = v.step(TRAINING, state, queries, kind="influence")
    plain = naive_grads(loss, model, rows)
    grads = {n: g * weights.reshape(-1, *[1] * (g.ndim - 1)) for n, g in plain.items()}
    sets = {n: torch.stack([g[:3].mean(0), g[3:].sum(0)]) for n, g in plain.items() if n in queries}
    tolerance = {"rtol": precision(name), "atol": precision(name)}
    torch.testing.assert_close(dots, explicit(grads, sets), **tolerance)
    torch.testing.assert_close(gram, explicit(grads, {n: grads[n] for n in sets}), **tolerance)
    u = step_direction(TRAINING, state, {n: g.sum(0) for n, g in grads.items()}, sets, kind="influence")
    torch.testing.assert_close(phi, -explicit(grads, u), **tolerance)
    assert phi.abs().max() > 1e-8


@pytest.mark.parametrize(("name", "kind"), [
    *(("tied", kind) for kind in ("influence", "shapley", "frozen", "before")),
    ("gpt2", "shapley"), ("llama", "influence"),
])  # fmt: skip
def test_the_two_paths_agree(name, kind):
    model, loss, rows = case(name)
    if name in LAYERS:
        loss = WeightedOutput(model)
    model.requires_grad_()
    state, batch, weights = drawn_state(model), collate(rows), random(ROWS)

    def asked(params):
        return torch.stack([sum(loss(params, row) for row in rows[:2]), loss(params, rows[3])])

    oracle = in_run(loss, TRAINING, state, batch, weights, asked, kind=kind).values
    with values(model) as v:
        queries = v.query_grads(*(lambda q=q: asked(dict(model.named_parameters()))[q] for q in range(2)))
        made = loss.batched(batch) if hasattr(loss, "batched") else BatchedOutput(model).batched(batch)
        (made * weights).sum().backward()
        phi = v.step(TRAINING, state, queries, kind=kind)
    torch.testing.assert_close(phi, oracle, rtol=precision(name), atol=precision(name))


def network():
    layers = [nn.Linear(3, 5), nn.Dropout(0.4), nn.Tanh(), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2)]
    return randomize(nn.Sequential(*layers), 0).train().requires_grad_()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.9), 1e-4, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_with_values_is_the_training_without_them_to_the_bit(optimizer):
    ends, x, y = [], random(3, 2, 4, 3), random(3, 2, 4, 2)
    for on in (False, True):
        torch.manual_seed(0)
        model = network()
        made = OPTIMIZERS[optimizer](model.parameters())
        for inputs, wanted in zip(x, y, strict=True):
            made.zero_grad()

            def run(model=model, inputs=inputs, wanted=wanted):
                for part, aim in zip(inputs, wanted, strict=True):  # accumulation
                    (F.mse_loss(model(part), aim) / 2).backward()

            if on:
                with values(model) as v:
                    queries = v.query_grads(lambda m=model, i=inputs: m(i[0]).square().mean())
                    run()
                    phi = v.step(*optimizer_state(model, made), queries)
                assert phi.shape == (8, 1)
                assert phi.any()
            else:
                run()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            made.step()
        moments = [v for s in made.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        ends.append([*model.parameters(), *model.buffers(), *moments, torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_that_of_its_next_step(optimizer):
    model, x = network().eval(), random(4, 5, 3)
    made = OPTIMIZERS[optimizer](model.parameters())
    for number, batch in enumerate(x):
        made.param_groups[0]["lr"] = 0.1 * number  # a warmup, from 0
        made.zero_grad()
        model(batch).square().mean().backward()
        training, state = optimizer_state(model, made, max_grad_norm=0.3)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        moved = update(training, state, grads).params
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        made.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(moved[name], p.detach(), rtol=1e-12, atol=1e-14)


def test_micro_batches_are_one_batch_and_directions_known_before_keep_nothing():
    model, x = network().eval(), random(6, 3)
    made = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    found = []
    for parts in ([x], [x[:1], x[1:4], x[4:]]):
        made.zero_grad()
        with values(model) as v:
            queries = v.query_grads(lambda: model(x[:2]).sum(), lambda: model(x[3:]).cos().sum())
            for part in parts:
                (model(part).square().sum() / 6).backward()
            found.append(v.step(*optimizer_state(model, made), queries))
            training, state = optimizer_state(model, made)
            v.aim(step_direction(training, state, None, queries, kind="before"))
            for part in parts:
                (model(part).square().sum() / 6).backward()
            assert not v._held
            found.append(-v.dots())
            v.aim(None)
            (model(x).square().sum() / 6).backward()
            grads = {name: p.grad / 3 for name, p in model.named_parameters()}
            found.append(v.step(*optimizer_state(model, made), queries, grads))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-14)


def test_heads_split_a_weight_and_checkpointed_layers_are_seen():
    model, loss, rows = sentences("llama")
    model.requires_grad_()
    batch, found = collate(rows), []
    for view, checkpoints in ((None, False), (gf.View(include=["*"], heads=True), False), (None, True)):
        if checkpoints:
            model.train()
            old = model.gradient_checkpointing_enable  # its former name
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        with values(model, view=view) as v:
            queries = v.query_grads(lambda: loss.batched(batch)[:2].mean())
            loss.batched(batch).mean().backward()
            found.append(v.dots(queries))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=2e-6, atol=2e-6)


class Past(nn.Module):
    """A weight that is used past its module too."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x) + F.linear(x.cos(), self.inner.weight)


@pytest.mark.parametrize(("make", "spoil"), [
    (Past, lambda model: None),
    (lambda: nn.Linear(3, 3), lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)),
])  # fmt: skip
def test_rows_that_do_not_add_up_to_the_gradient_are_refused(make, spoil):
    model, x = randomize(make(), 0).requires_grad_(), random(4, 3)
    made = torch.optim.SGD(model.parameters(), 0.1)
    with values(model) as v:
        queries = v.query_grads(lambda: model(x).sum())
        model(x).square().sum().backward()
        spoil(model)
        with pytest.raises(gf.InputError, match="do not add up to the gradient of the step"):
            v.step(*optimizer_state(model, made), queries)


def test_directions_that_do_not_fit_are_refused():
    model, x = network().eval(), random(4, 3)
    with values(model, view=gf.View(include=["0"])) as v:
        queries = v.query_grads(lambda: model(x).sum())
        with pytest.raises(gf.InputError, match="no forward pass"):
            v.dots(queries)
        model(x).square().sum().backward()
        with pytest.raises(gf.InputError, match="has no parameter head"):
            v.dots({"head": torch.ones(1, 2)})
        with pytest.raises(gf.InputError, match="move no weight of the view"):
            v.dots({"4.weight": queries["4.weight"]})
        with pytest.raises(gf.InputError, match="give `directions` either"):
            v.dots()
        weight = v.dots({"0.weight": queries["0.weight"]}, keep=True)
        assert not torch.allclose(weight, v.dots(queries))


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.RMSprop(p), lambda p: torch.optim.AdamW(p, amsgrad=True),
    lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.3}], 0.1),
    lambda p: torch.optim.Adam([{"params": p[:1]}, {"params": p[1:], "weight_decay": 0.3}], 0.1),
])  # fmt: skip
def test_an_optimizer_that_has_no_values_is_refused(make):
    model = network()
    with pytest.raises(gf.InputError, match="values need SGD, Adam or AdamW"):
        optimizer_state(model, make([*model.parameters()]))
