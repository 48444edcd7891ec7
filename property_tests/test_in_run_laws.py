"""Laws of values inside a run: they add up, are linear in the query, and know of no order."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vjp

from gradfn.train import InRunTotals, State, Training, reweight, select, step_direction, update

SHAPES = {"a": (2, 3), "b": (3,), "c": ()}


def tree(seed, scale=1.0, lead=()):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn((*lead, *shape), generator=generator, dtype=torch.float64)
            for name, shape in SHAPES.items()}  # fmt: skip


@st.composite
def cases(draw):
    """A training, a state in its midst, the gradients of a step's rows, and a query."""
    optimizer = draw(st.sampled_from(["sgd", "adam", "adamw"]))
    momentum = draw(st.sampled_from([0.0, 0.9])) if optimizer == "sgd" else 0.0
    training = Training(
        1, 1, 0.05, optimizer, momentum=momentum, nesterov=momentum > 0 and draw(st.booleans()),
        betas=(0.8, 0.9), eps=1e-3, weight_decay=draw(st.sampled_from([0.0, 0.1])),
        eps_root=draw(st.sampled_from([0.0, 1e-3])) if optimizer != "sgd" else 0.0,
        max_grad_norm=draw(st.sampled_from([None, 0.3, 3.0, 1000.0])),
    )  # fmt: skip
    seed = draw(st.integers(0, 10**6))
    second = {name: value.square() + 0.3 for name, value in tree(seed + 2).items()}
    moments = (tree(seed + 1), second) if optimizer != "sgd" else (tree(seed + 1),) if momentum else ()
    state = State(tree(seed), moments, torch.tensor(draw(st.integers(1, 9))), torch.tensor(20))
    return training, state, tree(seed + 3, draw(st.sampled_from([0.1, 1.0])), (5,)), tree(seed + 4)


def values(training, state, rows, query, **options):
    total = {name: g.sum(0) for name, g in rows.items()}
    u = step_direction(training, state, total, query, **options)
    return -sum((rows[name] * u[name]).reshape(5, -1).sum(1) for name in SHAPES)


@settings(max_examples=6)
@given(cases())
def test_shapley_values_add_up(case):
    training, state, rows, query = case
    full, empty = (
        update(training, state, {n: g.sum(0) * size for n, g in rows.items()}).params for size in (1, 0)
    )
    change = sum(((full[name] - empty[name]) * query[name]).sum() for name in SHAPES)
    found = values(training, state, rows, query)
    torch.testing.assert_close(found.sum(), -change, rtol=1e-3, atol=1e-5)


@settings(max_examples=6)
@given(cases())
def test_influence_is_the_vjp_of_the_whole_step(case):
    training, state, rows, query = case
    total = {name: g.sum(0) for name, g in rows.items()}
    (wanted,) = vjp(lambda g: update(training, state, g).params, total)[1](query)
    found = step_direction(training, state, total, query, kind="influence")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13)


@settings(max_examples=6)
@given(cases(), st.sampled_from(["influence", "shapley", "frozen", "before"]), st.permutations(range(5)))
def test_values_are_linear_in_the_query_and_follow_their_rows(case, kind, order):
    training, state, rows, query = case
    other = tree(77)
    both = {name: 2 * query[name] - 3 * other[name] for name in SHAPES}
    one, two, sum_ = (values(training, state, rows, q, kind=kind) for q in (query, other, both))
    torch.testing.assert_close(sum_, 2 * one - 3 * two, rtol=1e-9, atol=1e-12)
    moved = values(training, state, {n: g[order] for n, g in rows.items()}, query, kind=kind)
    torch.testing.assert_close(moved, one[order], rtol=1e-9, atol=1e-13)


@settings(max_examples=6)
@given(cases(), st.sampled_from(["influence", "shapley", "frozen"]))
def test_a_clip_that_is_never_reached_changes_nothing(case, kind):
    training, state, rows, query = case
    free, wide = (replace(training, max_grad_norm=limit) for limit in (None, 1e6))
    a, b = (values(one, state, rows, query, kind=kind, nodes=8) for one in (free, wide))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(-9, 9)), max_size=4), max_size=6), st.data()
)
def test_totals_merge_in_any_order(steps, data):
    fold = InRunTotals(["a", "b", "c", "d"], ["q"])

    def of(part):
        state = fold.init()
        for step in part:
            rows = torch.tensor([row for row, _ in step], dtype=torch.long)
            state = fold.update(state, rows, torch.tensor([[float(v)] for _, v in step]).reshape(-1, 1))
        return state

    cut = data.draw(st.integers(0, len(steps)))
    whole, parts = of(steps), (of(steps[cut:]), of(steps[:cut]))
    for merged in (fold.merge(*parts), fold.merge(*parts[::-1])):
        assert torch.equal(merged.values, whole.values)
        assert torch.equal(merged.visits, whole.visits)


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8), st.data())
def test_selection_without_interference_is_a_sort_and_weights_sum_to_one(numbers, data):
    scores = torch.tensor(numbers, dtype=torch.float64)
    k = data.draw(st.integers(1, len(numbers)))
    assert select(scores, k=k).tolist() == scores.argsort(descending=True, stable=True)[:k].tolist()
    torch.testing.assert_close(reweight(scores).sum(), torch.tensor(float(max(numbers) > 0)).double())
