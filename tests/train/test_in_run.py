"""Values of rows inside a run: against finite differences, all subsets and the formulas of optimizers."""

from copy import deepcopy
from functools import cache
from itertools import combinations
from math import comb

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vjp, vmap
from train_problems import ELEMENTWISE, SETTINGS

import gradfn as gf
from gradfn.model.params import params_of
from gradfn.testing.strategies import randomize
from gradfn.train import InRunTotals, Training, first_state, in_run, make_step, step_direction, update
from gradfn.train.course import Course, Valuing

NET = randomize(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), 0)
ROWS, WEIGHT = 6, torch.full((6,), 1 / 6, dtype=torch.float64)
ADAMS = pytest.mark.parametrize("name", ["adam", "adamw", "rooted"])


def loss(params, example):
    return F.cross_entropy(functional_call(NET, params, (example["x"],)), example["y"])


def draw(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(2, (rows,), generator=generator)}


BATCH, QUERIES = draw(ROWS, 100), draw(3, 101)


@cache
def after_steps(training, steps=5):
    """The state after a few steps on other batches."""
    state, step = first_state(params_of(NET), training, torch.tensor(20)), make_step(loss, training)
    for number in range(steps):
        state = step(state, draw(ROWS, number), WEIGHT)
    return state


def batch_grads(params, weights=WEIGHT, batch=BATCH):
    return grad(lambda p: (vmap(loss, (None, 0))(p, batch) * weights).sum())(params)


def row_grads(params, batch=BATCH):
    return vmap(grad(loss), (None, 0))(params, batch)


def inner(a, b):
    """`[rows, queries]`."""
    return sum(a[name].flatten(1) @ b[name].flatten(1).T for name in a)


def adjoint(training, state, g, w):
    """The formulas of each optimizer's adjoint, of one step, as the papers have them."""
    lr = training.learning_rate
    t = int(state.taken) + 1
    if training.schedule != "constant":
        lr = float(gf.train.learning_rate(training, state.taken, state.total))
    norm = torch.cat([value.flatten() for value in g.values()]).norm()
    limit = training.max_grad_norm
    s = 1.0 if limit is None else min(1.0, limit / (float(norm) + 1e-6))
    pulled = {}
    for name, p in state.params.items():
        if training.optimizer == "sgd":
            back = 1 + training.momentum if training.nesterov else 1.0
            pulled[name] = -lr * back * w[name]
            continue
        (b1, b2), gt = training.betas, s * g[name]
        gt = gt + training.weight_decay * p if training.optimizer == "adam" else gt
        m, v = (moment[name] for moment in state.moments)
        mh = (b1 * m + (1 - b1) * gt) / (1 - b1**t)
        root = ((b2 * v + (1 - b2) * gt**2) / (1 - b2**t) + training.eps_root).sqrt()
        below = root + training.eps
        of_m = -lr / (1 - b1**t) * w[name] / below
        of_v = lr * mh * w[name] / (2 * below**2 * root * (1 - b2**t))
        pulled[name] = (1 - b1) * of_m + 2 * (1 - b2) * gt * of_v
    if s == 1:
        return pulled
    along = sum((pulled[name] * g[name]).sum() for name in g) / (norm * (norm + 1e-6))
    return {name: s * (pulled[name] - along * g[name]) for name in g}


def clipped_tightly(training):
    return gf.train.Training(**{**training.__dict__, "max_grad_norm": 0.05})


@ELEMENTWISE
@pytest.mark.parametrize("tight", [False, True])
def test_influence_is_the_adjoint_of_a_step(training, tight):
    training = clipped_tightly(training) if tight else training
    state = after_steps(training)
    g, w = batch_grads(state.params), batch_grads(state.params, batch=draw(ROWS, 7))
    made = step_direction(training, state, g, w, kind="influence")
    for name, value in adjoint(training, state, g, w).items():
        torch.testing.assert_close(made[name], value, rtol=1e-12, atol=1e-15)


@ELEMENTWISE
def test_influence_is_what_autograd_pulls_back_where_some_numbers_never_moved(training):
    state = deepcopy(after_steps(training))
    g, w = batch_grads(state.params), batch_grads(state.params, batch=draw(ROWS, 7))
    for value in (*g.values(), *(v for moment in state.moments for v in moment.values())):
        value[0] = 0.0
    _, pull = vjp(lambda grads: update(training, state, grads).params, g)
    made = step_direction(training, state, g, w, kind="influence")
    for name, value in pull(w)[0].items():
        assert bool(value.isfinite().all())
        torch.testing.assert_close(made[name], value, rtol=1e-12, atol=1e-15)


@ELEMENTWISE
@pytest.mark.parametrize("tight", [False, True])
def test_influence_is_the_derivative_of_the_loss_after_the_step(training, tight):
    training = clipped_tightly(training) if tight else training
    state = after_steps(training)

    def lost(weights):
        moved = update(training, state, batch_grads(state.params, weights)).params
        return vmap(loss, (None, 0))(moved, QUERIES)

    moved = update(training, state, batch_grads(state.params)).params
    w = row_grads(moved, QUERIES)  # at the parameters after the step
    u = step_direction(training, state, batch_grads(state.params), w, kind="influence")
    h = 1e-5
    steps = h * torch.eye(ROWS, dtype=torch.float64)
    slopes = torch.stack([(lost(WEIGHT + step) - lost(WEIGHT - step)) / (2 * h) for step in steps])
    torch.testing.assert_close(inner(row_grads(state.params), u), slopes, rtol=1e-6, atol=1e-9)


@ELEMENTWISE
@pytest.mark.parametrize("tight", [False, True])
def test_shapley_values_add_up_to_what_the_batch_did_beside_an_empty_step(training, tight):
    training = clipped_tightly(training) if tight else training
    state = after_steps(training)
    g = batch_grads(state.params)
    none = {name: torch.zeros_like(value) for name, value in g.items()}
    full, empty = (update(training, state, value).params for value in (g, none))
    w = row_grads(state.params, QUERIES)
    change = {name: (full[name] - empty[name])[None] for name in full}
    values = in_run(loss, training, state, BATCH, WEIGHT, QUERIES).values
    torch.testing.assert_close(values.sum(0), -inner(change, w)[0], rtol=1e-7, atol=1e-10)


def shapley(training, state, linear=False):
    """Exact values of the rows for the first query, by all subsets; `linear`: to first order of its loss."""
    query = {key: value[0] for key, value in QUERIES.items()}
    w = grad(loss)(state.params, query)

    def utility(rows):
        weights = torch.zeros(ROWS, dtype=torch.float64).index_fill(0, torch.tensor(rows).long(), 1 / 6)
        moved = update(training, state, batch_grads(state.params, weights)).params
        if linear:
            return float(sum((moved[name] * w[name]).sum() for name in w))
        return float(loss(moved, query))

    known = {rows: utility(rows) for size in range(ROWS + 1) for rows in combinations(range(ROWS), size)}
    values = torch.zeros(ROWS, dtype=torch.float64)
    for row in range(ROWS):
        for rows, value in known.items():
            if row not in rows:
                more = known[tuple(sorted((*rows, row)))]
                values[row] -= (more - value) / (ROWS * comb(ROWS - 1, len(rows)))
    return values


@ADAMS
def test_aumann_shapley_values_are_those_of_all_subsets(name):
    training = SETTINGS[name]
    state = after_steps(training)
    exact, linear = shapley(training, state), shapley(training, state, linear=True)
    found = {kind: in_run(loss, training, state, BATCH, WEIGHT, QUERIES, kind=kind).values[:, 0]
             for kind in ("shapley", "influence", "frozen", "before")}  # fmt: skip
    corr = {kind: float(torch.corrcoef(torch.stack([v, linear]))[0, 1]) for kind, v in found.items()}
    assert corr["shapley"] >= 0.999
    assert corr["shapley"] >= max(corr.values())
    assert torch.corrcoef(torch.stack([found["shapley"], exact]))[0, 1] >= 0.99


@pytest.mark.parametrize("training", [
    Training(1, 6, 0.02, "sgd"), Training(1, 6, 0.02, "sgd", momentum=0.5, nesterov=True, weight_decay=0.1),
])  # fmt: skip
def test_the_second_order_comes_nearer_to_all_subsets_of_sgd(training):
    state = after_steps(training, steps=3)
    exact = shapley(training, state)
    errors = [
        float((in_run(loss, training, state, BATCH, WEIGHT, QUERIES, order=order).values[:, 0] - exact).norm()
              / exact.norm())
        for order in (1, 2)
    ]  # fmt: skip
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 10


def test_the_second_order_of_plain_sgd_is_the_formula_of_in_run_shapley():
    training = Training(1, 6, 0.3, "sgd")
    state = first_state(params_of(NET), training, torch.tensor(1))
    g, rows = batch_grads(state.params), row_grads(state.params)
    first, second = (
        in_run(loss, training, state, BATCH, WEIGHT, QUERIES, order=order).values for order in (1, 2)
    )
    for q in range(3):
        query = {key: value[q] for key, value in QUERIES.items()}
        (bent,) = vjp(lambda p, query=query: grad(loss)(p, query), state.params)[1](g)
        share = inner(rows, {name: h[None] for name, h in bent.items()})[:, 0] / 6
        torch.testing.assert_close(second[:, q], first[:, q] - 0.3**2 / 2 * share, rtol=1e-10, atol=1e-14)


@ELEMENTWISE
def test_rows_that_are_alike_have_one_value_and_a_row_without_a_gradient_has_none(training):
    state = after_steps(training)
    batch = {key: value.clone() for key, value in BATCH.items()}
    for key in batch:
        batch[key][4] = batch[key][1]
    weights = WEIGHT.clone()
    weights[2] = 0
    for kind in ("influence", "shapley", "frozen", "before"):
        values = in_run(loss, training, state, batch, weights, QUERIES, kind=kind).values
        torch.testing.assert_close(values[1], values[4])
        assert torch.equal(values[2], torch.zeros(3, dtype=torch.float64))


@ELEMENTWISE
def test_the_step_is_the_one_without_values_to_the_bit(training):
    state = after_steps(training)
    made = in_run(loss, training, state, BATCH, WEIGHT, QUERIES)
    leaves = torch.utils._pytree.tree_leaves
    plain = leaves(make_step(loss, training)(state, BATCH, WEIGHT))
    assert all(torch.equal(a, b) for a, b in zip(leaves(made.state), plain, strict=True))
    torch.testing.assert_close(made.losses, vmap(loss, (None, 0))(state.params, BATCH))


@pytest.mark.parametrize("kind", ["influence", "shapley", "frozen", "before"])
@pytest.mark.parametrize("name", ["nesterov", "adam", "clipped"])
def test_many_queries_at_once_are_one_at_a_time_and_models_may_be_stacked(name, kind):
    training = SETTINGS[name]
    states = [after_steps(training, steps) for steps in (2, 5)]
    g, w = ([make(s.params) for s in states] for make in (batch_grads, lambda p: row_grads(p, QUERIES)))
    each = []
    for state, own, queries in zip(states, g, w, strict=True):
        made = step_direction(training, state, own, queries, kind=kind)
        each.append(made)
        for q in range(3):
            one = step_direction(training, state, own, {n: v[q] for n, v in queries.items()}, kind=kind)
            assert all(torch.allclose(made[n][q], v, rtol=1e-12, atol=1e-16) for n, v in one.items())
    stack = lambda *values: torch.utils._pytree.tree_map(lambda *v: torch.stack(v), *values)  # noqa: E731
    found = vmap(lambda *a: step_direction(training, *a, kind=kind))(stack(*states), stack(*g), stack(*w))
    for name, value in stack(*each).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-15)


def test_all_kinds_are_one_for_sgd_without_clipping():
    training = SETTINGS["nesterov"]
    state = after_steps(training)
    found = [in_run(loss, training, state, BATCH, WEIGHT, QUERIES, kind=kind).values
             for kind in ("influence", "shapley", "frozen", "before")]  # fmt: skip
    for values in found[1:]:
        torch.testing.assert_close(values, found[0])


@pytest.mark.parametrize("tight", [False, True])
@ADAMS
def test_frozen_denominators_are_those_of_the_batch_or_of_the_step_before(name, tight):
    training = clipped_tightly(SETTINGS[name]) if tight else SETTINGS[name]
    state = after_steps(training)
    g, w = batch_grads(state.params), row_grads(state.params, QUERIES)
    lr = float(gf.train.learning_rate(training, state.taken, state.total))
    (b1, b2), after = training.betas, update(training, state, g)
    norm = float(torch.cat([value.flatten() for value in g.values()]).norm())
    s = min(1.0, training.max_grad_norm / (norm + 1e-6)) if training.max_grad_norm else 1.0
    for kind, moments, age, scale in (("frozen", after, 6, s), ("before", state, 5, 1.0)):
        made = step_direction(training, state, None if kind == "before" else g, w, kind=kind)
        for n, v in moments.moments[1].items():
            below = (v / (1 - b2**age) + training.eps_root).sqrt() + training.eps
            want = -lr * scale * (1 - b1) / (1 - b1**6) * w[n] / below
            torch.testing.assert_close(made[n], want, rtol=1e-12, atol=1e-16)


def test_the_first_step_of_adam_is_cold():
    for training in (Training(1, 6, 0.1, "sgd"), Training(1, 6, 0.1)):
        state = first_state(params_of(NET), training, torch.tensor(9))
        made = in_run(loss, training, state, BATCH, WEIGHT, QUERIES, kind="before")
        assert bool(made.cold) == (training.optimizer != "sgd") == (not made.values.any())
        assert not in_run(loss, training, made.state, BATCH, WEIGHT, QUERIES).cold


@pytest.mark.parametrize("call", [
    lambda state, g: step_direction(Training(1, 6, 0.1), state, None, g),
    lambda state, g: in_run(loss, Training(1, 6, 0.1), state, BATCH, WEIGHT, QUERIES, order=2),
    lambda state, g: in_run(loss, Training(1, 6, 0.1, "sgd", max_grad_norm=1.0), state, BATCH, WEIGHT,
                            QUERIES, order=2),
])  # fmt: skip
def test_values_that_do_not_exist_are_refused(call):
    state = first_state(params_of(NET), Training(1, 6, 0.1), torch.tensor(1))
    with pytest.raises(gf.InputError, match=r"needs `grads`|no values of order 2"):
        call(state, batch_grads(state.params))


def test_totals_are_sums_by_row_whatever_the_parts(tmp_path):
    generator = torch.Generator().manual_seed(0)
    fold = InRunTotals([f"row{i}" for i in range(5)], ["a", "b"], {"method": "inrun"})
    steps = [(torch.randint(5, (4,), generator=generator), torch.randn(4, 2, generator=generator))
             for _ in range(6)]  # fmt: skip
    want, visits = torch.zeros(5, 2).double(), torch.zeros(5)
    for rows, values in steps:
        for row, value in zip(rows.tolist(), values, strict=True):
            want[row] += value
            visits[row] += 1
    parts = []
    for part in (steps[:2], steps[2:3], steps[3:]):
        state = fold.init()
        for rows, values in part:
            state = fold.update(state, rows, values)
        parts.append(state)
    total = fold.merge(parts[2], fold.merge(parts[0], parts[1]))
    assert torch.equal(total.visits.float(), visits)
    torch.testing.assert_close(total.values, want, rtol=1e-12, atol=1e-14)
    fold.finalize(total).save(tmp_path)
    scores = gf.Scores.load(tmp_path)
    assert (scores.row_ids, scores.query_ids) == (fold.row_ids, fold.query_ids)
    torch.testing.assert_close(scores.matrix, want.float())


def test_muon_has_no_values():
    training = SETTINGS["muon"]
    with pytest.raises(gf.errors.InputError, match="values know no muon"):
        step_direction(training, first_state({"w": torch.ones(2, 2)}, training, torch.tensor(1)), None, {})
    with pytest.raises(gf.errors.InputError, match="values know no muon"):
        Course(loss, [{}] * ROWS, training, valuing=Valuing([{}], loss))
