"""Metagradients are the derivatives of real trainings in the weights of rows, visits and tokens."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.func import functional_call
from train_problems import ROWS, SETTINGS, make_mlp, problem, vectors

import gradfn as gf
from gradfn.data import make_documents
from gradfn.engine.precision import multiplying
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss
from gradfn.model.params import params_of
from gradfn.random import normals
from gradfn.testing.strategies import randomize
from gradfn.train import Training, first_state
from gradfn.train.course import Course, Diverged
from gradfn.train.magic import Magic, metagradient
from gradfn.train.pull import Adjoint, pull, pull_update
from gradfn.train.replay import Replay, forward_steps

SMALL = Training(2, 2, 0.1, "sgd", momentum=0.5)


def normal(*shape, key="v"):
    return torch.from_numpy(normals(int(np.prod(shape)), "test", key)).reshape(shape)


def ends(course, start, queries, weights, query_loss=None):
    """The losses of queries after a training at other weights."""
    *_, last = replace(course, weights=weights).steps(course.start(start))
    return replace(course, loss=query_loss or course.loss).row_losses(last.state.params, queries)


def slope(course, start, queries, v, h=1e-5, at=1.0):
    """Minus the central difference of the queries' losses along v in the weights."""
    up, down = (ends(course, start, queries, at + sign * h * v) for sign in (1, -1))
    return -(up - down) / (2 * h)


def small(training=SMALL, count=5, **how):
    """Two layers of two units, and rows of which the third number is always 0: an input that is dead."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()

    def loss(params, example):
        return F.cross_entropy(functional_call(net, params, (example["x"][None],)), example["y"][None])

    rows = [{"x": x * torch.tensor([1, 1, 0]), "y": torch.tensor(place % 2)}
            for place, x in enumerate(normal(count, 3, key="x"))]  # fmt: skip
    return Course(loss, rows, training, **how), params_of(net)


# --- the definition


THRICE = {
    "decayed": replace(SETTINGS["decayed"], epochs=3),
    "nesterov": replace(SETTINGS["nesterov"], weight_decay=0.1),
    "adam": replace(SETTINGS["adam"], schedule="linear", warmup=2),
    "adamw": SETTINGS["adamw"],
    "muon": SETTINGS["muon"],
    "clipped": replace(SETTINGS["clipped"], max_grad_norm=0.1),
    "rooted": replace(SETTINGS["rooted"], max_grad_norm=0.1),
}


@pytest.mark.parametrize("training", THRICE.values(), ids=THRICE)
def test_values_are_central_differences_of_real_trainings(training):
    course, start = small(training, 7, seed=3)
    assert len({len(rows) for _, rows in course.batches()}) == 2  # a ragged last batch
    queries = course.data[:2]
    made = metagradient(course, start, queries, replay=Replay(slots=2))
    for key in "ab":
        v, h = normal(7, key=key), 1e-6 if training.optimizer == "muon" else 1e-5  # it bends most of all
        torch.testing.assert_close(v @ made.values, slope(course, start, queries, v, h), rtol=0, atol=1e-8)
    if training.max_grad_norm is not None:
        assert all(taken.clip < 1 for taken in course.steps(course.start(start)))
    assert made.values.abs().max() > 1e-3


def test_every_row_and_every_visit_by_itself():
    course, start = small(replace(SETTINGS["adamw"], batch_size=2), 3)
    queries = course.data[:2]
    rows, visits = (metagradient(course, start, queries, per=per).values for per in ("row", "visit"))
    torch.testing.assert_close(visits.sum(0), rows, rtol=1e-13, atol=1e-15)
    eye = torch.eye(6, dtype=torch.float64).reshape(6, 2, 3)
    found = torch.stack([slope(course, start, queries, v) for v in eye]).reshape(2, 3, 2)
    torch.testing.assert_close(visits, found, rtol=0, atol=1e-8)
    part = metagradient(course, start, queries, window=(1, 3), replay=Replay(slots=1)).values
    expected = torch.zeros_like(part)
    for step, (epoch, numbers) in enumerate(course.batches()):
        if 1 <= step < 3:
            expected[numbers] += visits[epoch, numbers]
    torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-15)


def test_at_other_weights_and_in_the_start():
    course, start = small(SETTINGS["adam"], 7)
    weights = 1 + 0.3 * normal(7)
    course = replace(course, weights=weights)
    made, v = metagradient(course, start, course.data[:2]), normal(7, key="a")
    torch.testing.assert_close(
        v @ made.values, slope(course, start, course.data[:2], v, at=weights), rtol=0, atol=1e-8
    )
    way = {name: normal(*value.shape, key=name) for name, value in start.items()}
    up, down = (
        ends(course, {name: p + h * way[name] for name, p in start.items()}, course.data[:2], weights)
        for h in (1e-6, -1e-6)
    )
    along = sum((made.start[name] * v).flatten(1).sum(1) for name, v in way.items())
    torch.testing.assert_close(along, (up - down) / 2e-6, rtol=0, atol=1e-8)


def test_a_row_of_weight_0_that_is_a_batch_by_itself():
    course, start = small(replace(SMALL, batch_size=1), 3)
    weights = torch.tensor([0.0, 1, 1]).double()
    made = metagradient(replace(course, weights=weights), start, course.data[:1]).values[0]
    base, up = (ends(course, start, course.data[:1], weights + v)
                for v in (torch.zeros(3).double(), torch.tensor([1e-7, 0, 0]).double()))  # fmt: skip
    torch.testing.assert_close(made, -(up - base) / 1e-7, rtol=0, atol=1e-6)


def test_linear_regression_has_a_closed_form():
    x, y = normal(6, 3, key="x"), normal(6, key="y")
    eta, steps = 0.1, 5
    course = Course(lambda p, e: (e["x"] @ p["w"] - e["y"]).square() / 2,
                    [{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
                    Training(steps, 6, eta, "sgd"))  # fmt: skip
    hessian, w = x.T @ x / 6, torch.zeros(3).double()
    moved = torch.zeros(6, 3).double()
    for _ in range(steps):
        residuals = x @ w - y
        moved = moved @ (torch.eye(3) - eta * hessian) - eta / 6 * residuals[:, None] * x
        w = w - eta / 6 * residuals @ x
    queries = [{"x": torch.eye(3).double()[0], "y": w[0] - 1.0}]  # of slope 1 in the first coefficient
    made = metagradient(course, {"w": torch.zeros(3).double()}, queries)
    torch.testing.assert_close(made.values[:, 0], -moved[:, 0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made.end.params["w"], w, rtol=1e-12, atol=1e-14)


# --- one step


def explicit(training, state, gradient, lam):
    """The adjoint of a step of one vector by the formulas, and that of the gradient; without `H u`."""
    rate = training.learning_rate
    p, decay, n = state.params["w"], training.weight_decay, gradient.norm()
    scale = training.max_grad_norm and training.max_grad_norm / (n + 1e-6)
    active = scale is not None and scale < 1
    g = gradient * scale if active else gradient
    if training.optimizer == "sgd":
        mu = training.momentum
        back = (lam[1] if mu else 0) - rate * (mu if training.nesterov else 1) * lam[0]
        u = back - (rate * lam[0] if training.nesterov else 0)
        made = [lam[0] + decay * u, *([mu * back] if mu else [])]
    else:
        (b1, b2), t = training.betas, int(state.taken) + 1
        g = g + decay * p if training.optimizer == "adam" else g
        m, v = (part["w"] for part in state.moments)
        mean, square = (b1 * m + (1 - b1) * g) / (1 - b1**t), (b2 * v + (1 - b2) * g**2) / (1 - b2**t)
        root = (square + training.eps_root).sqrt()
        below = root + training.eps
        back_m = lam[1] - rate / (1 - b1**t) * lam[0] / below
        back_v = lam[2] + rate * mean * lam[0] / (2 * below**2 * root * (1 - b2**t))
        u = (1 - b1) * back_m + 2 * (1 - b2) * g * back_v
        direct = lam[0] + decay * u if training.optimizer == "adam" else (1 - rate * decay) * lam[0]
        made = [direct, b1 * back_m, b2 * back_v]
    return made, scale * (u - gradient * (gradient @ u) / (n * (n + 1e-6))) if active else u


ONE = {
    "sgd": Training(1, 1, 0.3, "sgd"),
    "momentum": Training(1, 1, 0.3, "sgd", momentum=0.8, weight_decay=0.2),
    "nesterov": Training(1, 1, 0.3, "sgd", momentum=0.8, weight_decay=0.2, nesterov=True),
    "adam": Training(1, 1, 0.3, "adam", weight_decay=0.2, eps=1e-3),
    "adamw": Training(1, 1, 0.3, "adamw", weight_decay=0.2, eps_root=1e-2),
    "clipped": Training(1, 1, 0.3, "adam", weight_decay=0.2, max_grad_norm=0.5),
    "unclipped": Training(1, 1, 0.3, "sgd", momentum=0.8, max_grad_norm=50.0),
}


@pytest.mark.parametrize("training", ONE.values(), ids=ONE)
def test_the_adjoint_of_an_optimizer_is_that_of_the_formulas(training):
    state = first_state({"w": normal(4, key="p")}, training, torch.tensor(9))
    moments = tuple({"w": normal(4, key=n).abs()} for n, _ in enumerate(state.moments))
    state, gradient = state._replace(moments=moments, taken=torch.tensor(3)), normal(4, key="g")
    lam = [normal(4, key=("lam", n)) for n in range(1 + len(moments))]
    adjoint = Adjoint({"w": lam[0][None]}, tuple({"w": value[None]} for value in lam[1:]))
    before, u = pull_update(training, state, {"w": gradient}, adjoint)
    made, expected = explicit(training, state, gradient, lam)
    torch.testing.assert_close(u["w"][0], expected, rtol=1e-12, atol=1e-13)
    for part, value in zip((before.params, *before.moments), made, strict=True):
        torch.testing.assert_close(part["w"][0], value, rtol=1e-12, atol=1e-13)


def test_a_step_is_linear_in_the_adjoint_and_has_the_curvature_of_its_rows():
    course, start = small(ONE["momentum"], 4, token_batch_size=2)
    state, rows = course.start(start), np.array([2])

    def adjoint(key):
        params = {name: normal(3, *p.shape, key=(key, name)) for name, p in start.items()}
        return Adjoint(params, ({name: value.flip(0) for name, value in params.items()},))

    def of(adjoint, **how):
        return pull(course, state, 0, rows, adjoint, **how)

    a, b = adjoint("a"), adjoint("b")
    both = Adjoint(*({n: v + other[n] for n, v in own.items()} if isinstance(own, dict) else
                     tuple({n: v + o[n] for n, v in m.items()} for m, o in zip(own, other, strict=True))
                     for own, other in zip(a, b, strict=True)))  # fmt: skip
    (of_a, in_a), (of_b, in_b), (of_both, in_both) = of(a), of(b), of(both)
    torch.testing.assert_close(in_a + in_b, in_both, rtol=1e-12, atol=1e-14)
    for name, value in of_both.params.items():
        torch.testing.assert_close(of_a.params[name] + of_b.params[name], value, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(of(a, mapped=False), (of_a, in_a), rtol=1e-12, atol=1e-14)
    names = list(start)
    gradient = torch.autograd.functional.jacobian(
        lambda *p: course.loss(dict(zip(names, p, strict=True)), course.data[2]), tuple(start.values())
    )
    _, u = pull_update(course.training, state, dict(zip(names, gradient, strict=True)), a)
    expected = sum((u[name] * g).flatten(1).sum(1) for name, g in zip(names, gradient, strict=True))
    torch.testing.assert_close(in_a[0], expected, rtol=1e-12, atol=1e-14)


def test_queries_chunks_and_schedules_change_nothing(tmp_path):
    course, start = small(SETTINGS["rooted"], 7)
    queries, steps = course.data[:3], course.total
    whole = metagradient(course, start, queries)
    assert whole.steps == steps
    for slots in (1, 2, 3):
        folder = tmp_path if slots == 2 else None
        made = metagradient(course, start, queries, replay=Replay(slots, folder))
        assert made.steps == forward_steps(steps, slots) + 1
        for a, b in zip((made.values, made.start, made.end), (whole.values, whole.start, whole.end),
                        strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    parts = metagradient(course, start, queries, replay=Replay(query_chunk=2))
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(parts.start, whole.start, rtol=1e-11, atol=1e-15)
    alone = metagradient(course, start, queries[1:2]).values
    torch.testing.assert_close(alone, whole.values[:, 1:2], rtol=1e-11, atol=1e-15)
    cut = metagradient(replace(course, token_batch_size=1), start, queries).values
    torch.testing.assert_close(cut, whole.values, rtol=1e-10, atol=1e-14)


def test_the_loss_of_queries_is_ones_own_and_the_steps_are_told():
    course, start = small()
    done = []
    made = metagradient(course, start, course.data[:2], lambda p, e: 3 * course.loss(p, e),
                        progress=done.append)  # fmt: skip
    plain = metagradient(course, start, course.data[:2]).values
    torch.testing.assert_close(made.values, 3 * plain, rtol=1e-12, atol=1e-15)
    assert sum(done) == course.total


# --- models


class Twice(nn.Module):
    """A layer that is called twice, and a parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.inner, self.idle = nn.Linear(5, 5), nn.Parameter(torch.ones(2))
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def test_a_module_that_is_called_twice_and_a_parameter_without_use():
    torch.manual_seed(0)
    net = Twice().double()

    def loss(params, e):
        return F.cross_entropy(functional_call(net, params, (e["x"][None],)), e["y"][None])

    course, start, v = Course(loss, vectors(), SETTINGS["adamw"]), params_of(net), normal(ROWS)
    made = metagradient(course, start, course.data[:2])
    torch.testing.assert_close(v @ made.values, slope(course, start, course.data[:2], v), rtol=0, atol=1e-8)
    assert made.start["idle"].abs().max() == 0


def test_a_start_of_some_parameters_trains_these_alone():
    course, start = small(SETTINGS["adamw"], 7)
    some, v = {name: start[name] for name in ("2.weight", "2.bias")}, normal(7)
    made = metagradient(course, some, course.data[:2])
    torch.testing.assert_close(v @ made.values, slope(course, some, course.data[:2], v), rtol=0, atol=1e-8)
    assert list(made.start) == list(some)


def documents(masked=False):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(11, (length,), generator=generator).tolist() for length in (3, 5, 4)]
    labels = [[-100 if masked and place in (1, 2) else token for place, token in enumerate(own)]
              for own in ids]  # fmt: skip
    return make_documents(ids, labels)


@pytest.mark.parametrize("normalize", ["rows", "tokens"])
def test_a_language_model_with_tied_embeddings(normalize):
    model, data = randomize(language_model("gpt2"), 0), documents()
    training = Training(1, 2, 0.01, "adamw", eps=1e-2, weight_decay=0.1)
    course = Course(causal_lm_loss(model), data, training, normalize=normalize)
    start, v, queries = params_of(model), normal(3), documents(masked=True)
    assert "lm_head.weight" not in start
    made = metagradient(course, start, queries).values
    torch.testing.assert_close(v @ made, slope(course, start, queries, v), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        metagradient(course, start, [queries[1]]).values, made[:, 1:2], rtol=1e-9, atol=1e-13
    )


class ByToken:
    """A language model's loss whose tokens have weights of their own."""

    def __init__(self, loss):
        self.loss, self.model = loss, loss.model

    def __call__(self, params, example):
        return self.loss(params, example)

    def batched(self, batch):
        plain = {key: value for key, value in batch.items() if key != "u"}
        return (self.loss.by_token(plain) * batch["u"]).sum(1)


def test_tokens_are_those_that_are_predicted_and_add_up_to_rows():
    loss, data = causal_lm_loss(randomize(language_model("gpt2"), 0)), documents(masked=True)
    course, start = Course(loss, data, SMALL), params_of(loss.model)
    queries = documents()
    tokens = metagradient(course, start, queries, per="token").values
    rows = metagradient(course, start, queries).values
    offsets = [0, 3, 8, 12]
    added = torch.stack([tokens[a:b].sum(0) for a, b in pairwise(offsets)])
    torch.testing.assert_close(added, rows, rtol=1e-10, atol=1e-14)
    first_and_masked = [place for start in offsets[:-1] for place in (start, start + 1, start + 2)]
    assert tokens[first_and_masked].abs().max() == 0
    assert (tokens[[6, 7, 11]].abs().amax(1) > 0).all()
    v = normal(12)

    def end(h):
        weighted = [{**data[row], "u": 1 + h * v[offsets[row] : offsets[row + 1]]} for row in range(3)]
        *_, last = replace(course, loss=ByToken(loss), data=weighted).steps(course.start(start))
        return course.row_losses(last.state.params, queries)

    torch.testing.assert_close(v @ tokens, -(end(1e-5) - end(-1e-5)) / 2e-5, rtol=0, atol=1e-7)


def test_tokens_of_a_loss_without_them_are_refused():
    course, start = small()
    with pytest.raises(InputError, match="not told apart by token"):
        metagradient(course, start, course.data[:1], per="token")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_of_zero_give_numbers(optimizer, clip):
    course = Course(lambda p, e: (p["w"] * e["x"]).sum() ** 2, [{"x": torch.zeros(2).double()}] * 2,
                    Training(2, 1, 0.1, optimizer, max_grad_norm=clip))  # fmt: skip
    queries = [{"x": torch.ones(2).double()}]
    made = metagradient(course, {"w": torch.ones(2).double()}, queries)
    assert made.values.abs().max() == 0
    assert made.start["w"].tolist() == [[4.0, 4.0]]
    tiny = [{"x": torch.full((2,), 1e-9).double()}, *course.data[:1]]
    assert (
        metagradient(replace(course, data=tiny), {"w": torch.ones(2).double()}, queries)
        .values.isfinite()
        .all()
    )


# --- as an attribution


def trained(course, model, start):
    *_, last = course.steps(course.start(start))
    model.load_state_dict(last.state.params, strict=False)
    return model


def test_scores_of_a_training():
    model = randomize(language_model("llama"), 0)
    loss, data = causal_lm_loss(model), documents()
    course = Course(loss, data, replace(SMALL, epochs=1))
    start = {n: p.clone() for n, p in params_of(model).items()}
    model, queries = trained(course, model, start), documents(masked=True)
    magic = Magic(course, start)
    scores = gf.score(model, data, queries, method=magic, loss=loss)
    made = metagradient(course, start, queries)
    torch.testing.assert_close(scores.matrix, made.values.float())
    torch.testing.assert_close(scores.losses, course.row_losses(made.end.params, data).float())
    by_token = gf.score(model, data, queries, method=magic, loss=loss, view=gf.View(tokens=True))
    assert by_token.documents.tolist() == [0] * 3 + [1] * 5 + [2] * 4
    torch.testing.assert_close(
        by_token.matrix, metagradient(course, start, queries, per="token").values.float()
    )
    some = magic.scorer(gf.Subject(model, loss), queries)(data, range(1, 3))
    torch.testing.assert_close(some.values, scores.matrix[1:3])
    with pytest.raises(InputError, match="no view but one of tokens"):
        gf.score(model, data, queries, method=magic, loss=loss, view=gf.View(heads=True))
    with pytest.raises(InputError, match="the rows are not those of the training"):
        gf.score(model, queries, queries, method=magic, loss=loss)
    with torch.no_grad():
        model.model.norm.weight.add_(1e-12)
    with pytest.raises(InputError, match=r"does not end with the model\.norm\.weight that was given"):
        gf.score(model, data, queries, method=magic, loss=loss)


# --- refusals


def test_what_is_random_is_refused():
    noise = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).double()

    def dropped(params, e):
        return F.cross_entropy(functional_call(noise, params, (e["x"][None],)), e["y"][None])

    course = Course(dropped, vectors(), SETTINGS["sgd"])
    with pytest.raises(InputError, match=r"the loss is random \(dropout\?\)"):
        metagradient(course, params_of(noise), vectors()[:1])


def test_layers_and_types_that_cannot_be_trained_are_refused():
    _, loss, _, data = problem("mlp")

    class Normed:
        model = nn.BatchNorm1d(5)

        def __call__(self, params, example):
            return example["x"].sum()

    for start, own, words in (
        ({n: p.half() for n, p in params_of(make_mlp()).items()}, loss, "round to nothing"),
        (params_of(nn.BatchNorm1d(5)), Normed(), "mixes the rows of a batch"),
    ):
        with pytest.raises(InputError, match=words):
            metagradient(Course(own, data, SETTINGS["sgd"]), start, data[:1])


def test_rounded_products_are_refused():
    course, start = small()
    rounded = multiplying("bf16", torch.device("cpu"))
    with rounded, pytest.raises(InputError, match="products of float32 are rounded to bf16"):
        metagradient(course, start, course.data[:1])


def test_a_replay_that_comes_to_another_state_is_refused():
    course, start = small()
    calls = []

    def restless(params, example):
        calls.append(None)
        return course.loss(params, example) * (1 + 1e-12 * (len(calls) > 12))

    with pytest.raises(InputError, match=r"step \d came to another state than before"):
        metagradient(replace(course, loss=restless), start, course.data[:1], replay=Replay(slots=1))


def test_a_number_that_is_not_finite_is_named():
    # The root of the query has no derivative at 0, where w stays.
    def loss(p, e):
        return (p["w"] * e["x"]).square() + p["v"] * e["x"]

    def query(p, e):
        return p["w"].abs().sqrt() + p["v"]

    course = Course(loss, [{"x": torch.ones(()).double()}], Training(1, 1, 0.1, "sgd"))
    start = {"v": torch.ones(()).double(), "w": torch.zeros(()).double()}
    with pytest.raises(Diverged, match="in the parameter w before step 1 is not finite"):
        metagradient(course, start, course.data, query)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"window": (3, 3)}, r"the `window` \(3, 3\) is none of a training of 6 steps"),
        ({"window": (0, 7)}, "is none of a training of 6 steps"),
        ({"queries": []}, "there are no queries"),
    ],
)
def test_refusals(how, words):
    course, start = small()
    with pytest.raises(InputError, match=words):
        metagradient(course, start, **{"queries": course.data[:1], **how})
