"""Every layer, loss and view under every chain equals the naive loop; finer views sum to coarser ones."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradfn.data import collate, offsets_of
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import collect
from gradfn.model.sites import View, find_sites
from gradfn.testing import (
    assert_blocks_close,
    chains,
    naive_blocks,
    problems,
    recorded_shapes,
    seeds,
    views,
)
from gradfn.testing.strategies import randomize, shapes_of, squared_error
from gradfn.transforms import chain, dot, project, unit_normalize

KINDS = ("mlp", "conv", "lm", "weighted_lm", "encoder")
few = settings(max_examples=max(5, settings.default.max_examples // 2))
"""Of what takes long to draw, half as many as the profile says."""
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def tolerance_of(model):
    """Llama's norms compute in float32 whatever the model's dtype."""
    single = any(type(module).__name__ == "LlamaRMSNorm" for module in model.modules())
    return 1e-4 if single else 1e-8


@st.composite
def viewed(draw, kinds=KINDS, min_rows=1):
    """A problem, a view of it and its naive blocks."""
    problem = draw(problems(kinds, min_rows=min_rows))
    view = draw(views(problem.model))
    return problem, view, naive_blocks(problem.reference, problem.model, problem.rows, view)


def run(problem, view, transform, rows=None):
    batch = collate(problem.rows if rows is None else rows)
    return probe_engine(problem.model, problem.loss, transform, view=view)(batch).values


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=max(3, settings.default.max_examples // 4))
@given(st.data())
def test_every_layer_loss_and_view_under_every_chain_equals_the_naive_loop(kind, data):
    problem, view, dense = data.draw(viewed((kind,)))
    transform = data.draw(chains(shapes_of(dense), max_stages=3))
    assert_blocks_close(run(problem, view, transform), transform(dense), tolerance_of(problem.model))


@few
@given(viewed(min_rows=2), st.booleans(), st.booleans())
def test_scores_of_every_layer_loss_and_view_equal_dots_of_naive_rows(drawn, unit, by_block):
    problem, view, dense = drawn
    queries = {name: G[:2].clone() for name, G in dense.items()}
    transform = chain(*[unit_normalize()] * unit, dot(queries, by_block=by_block))
    tolerance = tolerance_of(problem.model)
    got, want = run(problem, view, transform), transform(dense)
    if by_block:  # relative to the whole: a share that is zero in exact arithmetic is rounding
        assert list(got) == list(want)
        got, want = (torch.stack(list(parts.values())) for parts in (got, want))
    assert_blocks_close(got, want, tolerance)


@few
@given(st.data(), viewed(min_rows=2))
def test_neither_the_order_nor_the_size_of_batches_matters(data, drawn):
    problem, view, _ = drawn
    order = data.draw(st.permutations(range(len(problem.rows))))
    budget = data.draw(st.integers(1, 20))
    together = run(problem, view, project(3))
    permuted = replace(problem, rows=[problem.rows[i] for i in order])
    tolerance = tolerance_of(problem.model)
    want = {name: G[list(order)] for name, G in together.items()}
    assert_blocks_close(run(permuted, view, project(3)), want, tolerance)
    got = collect(
        permuted.model, permuted.rows, project(3), loss=problem.loss, view=view, token_batch_size=budget
    )
    assert_blocks_close(got, want, tolerance)


@few
@given(problems(("encoder",), min_rows=2), seeds(), st.integers(0, 4))
def test_what_an_attention_mask_leaves_out_does_not_matter(problem, seed, more):
    batch = collate(problem.rows)
    batch = {
        key: nn.functional.pad(value, (0, more), value=-100 if key == "labels" else 0)
        if value.ndim > 1
        else value
        for key, value in batch.items()
    }
    noise = torch.randint(1, 13, batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], noise)
    got = probe_engine(problem.model, problem.loss)(batch).values
    assert_blocks_close(got, naive_blocks(problem.reference, problem.model, problem.rows, View()), 1e-8)


@few
@given(problems(("lm",)), st.booleans())
def test_tokens_sum_to_the_example(problem, heads):
    view = View(heads=heads)
    tokens = collect(problem.model, problem.rows, loss=problem.loss, view=replace(view, tokens=True))
    whole = collect(problem.model, problem.rows, loss=problem.loss, view=view)
    bounds = offsets_of(torch.tensor([len(row["input_ids"]) for row in problem.rows]).numpy())
    summed = {name: torch.stack([G[a:b].sum(0) for a, b in pairwise(bounds)]) for name, G in tokens.items()}
    assert_blocks_close(summed, whole, 1e-8)


@few
@given(problems(("lm",), min_rows=2))
def test_the_shares_of_heads_sum_to_the_score_of_the_whole(problem):
    def shares(view):
        queries = collect(problem.model, problem.rows[:1], loss=problem.loss, view=view)
        ending = chain(unit_normalize(), dot(queries, by_block=True))
        parts = collect(problem.model, problem.rows, ending, loss=problem.loss, view=view)
        return torch.stack(list(parts.values())).sum(0)

    assert_blocks_close(shares(View(heads=True)), shares(View()), 1e-8)


@few
@given(problems(("lm", "weighted_lm", "encoder")), st.booleans())
def test_rows_without_supervision_have_a_gradient_of_zero_and_score_zero(problem, unit):
    if problem.rows[0]["labels"].ndim == 0:
        return
    empty = {**problem.rows[0], "labels": torch.full_like(problem.rows[0]["labels"], -100)}
    rows = [empty, *problem.rows]
    values = run(problem, View(), unit_normalize() if unit else chain(), rows)
    assert all(not bool(G[0].any()) for G in values.values())
    queries = {name: G[1:2].clone() for name, G in run(problem, View(), chain(), rows).items()}
    scores = run(problem, View(), chain(*[unit_normalize()] * unit, dot(queries)), rows)
    assert float(scores[0]) == 0.0
    assert bool(scores.isfinite().all())


class TwoTowers(nn.Module):
    """One module for both halves of the input, a weight that two modules have, and biases of their own."""

    def __init__(self, own_bias):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        if not own_bias:
            self.second.bias = self.first.bias

    def forward(self, x):
        left, right = self.tower(x), self.tower(x.flip(-1)).tanh()
        return (self.first(left) * self.second(right))[..., :2]


@few
@given(st.data(), st.booleans(), seeds())
def test_tied_weights_and_shared_modules_get_one_whole_gradient(data, own_bias, seed):
    model = randomize(TwoTowers(own_bias), seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            key: torch.randn(size, generator=generator, dtype=torch.float64)
            for key, size in (("x", 3), ("y", 2))
        }
        for _ in range(3)
    ]
    view, loss = View(include=["*"]), squared_error(model)
    dense = naive_blocks(loss, model, rows, view)
    names = [name for name in dense if name.startswith(("first", "second"))]
    assert names == (["first", "first[bias]", "second[bias]"] if own_bias else ["first"])
    transform = data.draw(chains(shapes_of(dense), max_stages=3))
    queries = {name: G[:2].clone() for name, G in dense.items()}
    for made in (transform, chain(unit_normalize(), dot(queries))):
        assert_blocks_close(
            probe_engine(model, loss, made, view=view)(collate(rows)).values, made(dense), 1e-8
        )


@few
@given(problems(("conv",), min_rows=3))
def test_a_projected_convolution_never_holds_a_weight_gradient_of_each_row(problem):
    sites = find_sites(problem.model)
    batch = collate(problem.rows)
    with recorded_shapes() as shapes:
        probe_engine(problem.model, problem.loss, project(1))(batch)
    for site in sites:
        if min(site.spec.shape) > 1:
            assert (len(problem.rows), *site.spec.shape) not in shapes
