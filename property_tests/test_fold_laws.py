"""Folds: however the rows are chunked and the parts merged, the statistic is the same."""

from functools import reduce
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradfn.statistics import Curvature, second_moment, shampoo
from gradfn.statistics.fold import fit
from gradfn.statistics.moments import adafactor_moments, adam_moments, mean, total
from gradfn.testing import assert_blocks_close, naive_blocks, problems, seeds
from gradfn.transforms import Adafactor, Adam, project

folds = st.sampled_from(
    [mean(), total(), adam_moments(), adam_moments(0.5), adafactor_moments(), second_moment(), shampoo()]
)


def as_blocks(value):
    if isinstance(value, Curvature):
        return {name: one.dense() for name, one in value.items()}
    if isinstance(value, Adafactor):
        return {f"{side} {n}": v for side in ("rows", "columns") for n, v in getattr(value, side).items()}
    return value.moments if isinstance(value, Adam) else value


def result(fold, state):
    return as_blocks(fold.finalize(state))


def random_blocks(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (2, 3), "b": (4, 1)}
    return {n: torch.randn(rows, *s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def part(blocks, start, stop):
    return {name: G[start:stop] for name, G in blocks.items()}


@given(st.data(), folds, seeds(), st.integers(1, 8))
def test_any_chunking_in_any_order_agrees(data, fold, seed, rows):
    blocks = random_blocks(seed, rows)
    whole = result(fold, fold.update(fold.init(), blocks))
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=4))})
    chunks = list(pairwise(cuts))
    state = fold.init()
    for start, stop in data.draw(st.permutations(chunks)):
        state = fold.update(state, part(blocks, start, stop))
    assert_blocks_close(result(fold, state), whole, 1e-6)  # results are float32


@given(st.data(), folds, seeds(), st.integers(1, 8))
def test_any_tree_of_merges_agrees(data, fold, seed, rows):
    blocks = random_blocks(seed, rows)
    leaves = [fold.update(fold.init(), part(blocks, row, row + 1)) for row in range(rows)]
    leaves = data.draw(st.permutations([*leaves, fold.init()]))
    while len(leaves) > 1:
        at = data.draw(st.integers(0, len(leaves) - 2))
        leaves[at : at + 2] = [fold.merge(leaves[at], leaves[at + 1])]
    assert leaves[0].count == rows
    assert_blocks_close(result(fold, leaves[0]), result(fold, fold.update(fold.init(), blocks)), 1e-6)


@given(folds, seeds(), st.integers(1, 5), st.integers(1, 5))
def test_merging_commutes_and_changes_neither_side(fold, seed, m, n):
    a = fold.update(fold.init(), random_blocks(seed, m))
    b = fold.update(fold.init(), random_blocks(seed + 1, n))
    before = {name: value.clone() for name, value in a.blocks.items()}
    ab, ba = fold.merge(a, b), fold.merge(b, a)
    assert ab.count == ba.count == m + n
    assert_blocks_close(ab.blocks, ba.blocks, 1e-15)
    assert all(torch.equal(a.blocks[name], before[name]) for name in before)


@given(folds, seeds(), st.integers(1, 5))
def test_the_state_of_no_rows_is_neutral(fold, seed, rows):
    state = fold.update(fold.init(), random_blocks(seed, rows))
    for merged in (fold.merge(state, fold.init()), fold.merge(fold.init(), state)):
        assert merged.count == rows
        assert all(torch.equal(merged.blocks[name], state.blocks[name]) for name in state.blocks)


@given(seeds(), st.integers(1, 6))
def test_the_statistics_are_what_they_are_called(seed, rows):
    blocks = random_blocks(seed, rows)
    expected = {
        mean(): {name: G.mean(0, keepdim=True) for name, G in blocks.items()},
        total(): {name: G.sum(0, keepdim=True) for name, G in blocks.items()},
        adam_moments(): {name: (G**2).sum(0) / rows for name, G in blocks.items()},
        adafactor_moments(): {
            "rows a": (blocks["a"] ** 2).mean((0, 2)),
            "rows b": (blocks["b"] ** 2).mean((0, 2)),
            "columns a": (blocks["a"] ** 2).mean((0, 1)),
            "columns b": (blocks["b"] ** 2).mean((0, 1)),
        },
    }
    for fold, statistic in expected.items():
        assert_blocks_close(result(fold, fold.update(fold.init(), blocks)), statistic, 1e-6)


@given(st.integers(50, 400))
def test_accumulating_low_precision_rows_loses_nothing(rows):
    """A sum in bfloat16 would stop growing at 256, one in float32 at 2^24."""
    ones = {"a": torch.ones(rows, 1, 1, dtype=torch.bfloat16)}
    huge = {"a": torch.full((1, 1, 1), 2.0**24)}
    fold = total()
    states = [fold.update(fold.init(), blocks) for blocks in (huge, ones)]
    merged = reduce(fold.merge, states)
    assert float(merged.blocks["a"]) == 2**24 + rows


@given(problems(), folds, st.integers(1, 30))
def test_fitting_over_data_is_the_statistic_of_the_naive_rows(problem, fold, budget):
    transform = project(3, seed=1)
    fitted = fit(fold, problem.model, problem.rows, transform, loss=problem.loss, token_batch_size=budget)
    dense = transform(naive_blocks(problem.reference, problem.model, problem.rows))
    expected = result(fold, fold.update(fold.init(), dense))
    assert_blocks_close(as_blocks(fitted), expected, 1e-6)
