"""In half precision the engine is as right as a loop is; its losses and statistics are float32."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.model.params import params_of
from gradfn.model.sites import View, find_sites
from gradfn.testing import assert_blocks_close, naive_blocks, problems
from gradfn.transforms import chain, dot, project, unit_normalize

MODELS = ("lm", "weighted_lm", "encoder")
"""Problems with a loss of this library's; the others have a user's, of whatever dtype it is."""
KINDS = ("mlp", "conv", *MODELS)
HALVES = (torch.bfloat16, torch.float16)
few = settings(max_examples=max(5, settings.default.max_examples // 2))
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def cast(rows, dtype):
    """Rows whose inputs have the model's dtype; weights of rows are the loss's."""
    inputs = ("x", "y")
    return [{key: v.to(dtype) if key in inputs else v for key, v in row.items()} for row in rows]


@st.composite
def rounded(draw, kinds, min_rows=1):
    """A model in half precision with its loss and rows, and the same three, rounded alike, in float64."""
    problem, dtype = draw(problems(kinds, min_rows=min_rows)), draw(st.sampled_from(HALVES))
    rows = cast(problem.rows, dtype)
    problem.model.to(dtype)
    memo = {}
    exact = deepcopy(problem.model, memo).double()
    return problem.model, problem.loss, rows, (exact, deepcopy(problem.loss, memo), cast(rows, torch.float64))


def parts(values):
    """The blocks, or the scores."""
    return list(values.values()) if isinstance(values, dict) else [values]


def whole(values):
    """Rows of all blocks (or scores), one after the other, in float64."""
    return torch.cat([v.double().flatten(1) for v in parts(values)], 1)


def assert_as_right(got, loop, exact, eps):
    """`|got - loop| <= 4 (|loop - exact| + eps |exact|)` of every row: no farther than rounding explains.

    How far the loop is from float64 says how much a rounding of the numbers inside grows on its way.
    """
    apart, rounding = (got - loop).norm(dim=1), (loop - exact).norm(dim=1)
    allowed = 4 * (rounding + eps * exact.norm(dim=1))
    assert bool((apart <= allowed).all()), (
        f"{(apart / allowed).nan_to_num(torch.inf).max():.3g} times what is allowed"
    )


@pytest.mark.parametrize("kind", KINDS)
@few
@given(st.data())
def test_rows_in_batches_are_those_of_a_loop_in_the_same_precision(kind, data):
    model, loss, rows, (exact, exact_loss, exact_rows) = data.draw(rounded((kind,)))
    eps = torch.finfo(next(model.parameters()).dtype).eps
    got = probe_engine(model, loss)(collate(rows))
    loop, want = naive_blocks(loss, model, rows, View()), naive_blocks(exact_loss, exact, exact_rows, View())
    assert list(got.values) == list(loop)
    assert_as_right(whole(got.values), whole(loop), whole(want), eps)
    losses = torch.stack([loss(params_of(model), row) for row in rows]).double()
    truth = torch.stack([exact_loss(params_of(exact), row) for row in exact_rows])
    allowed = 4 * ((losses - truth).abs() + eps * (1 + truth.abs()))
    assert bool(((got.losses.double() - losses).abs() <= allowed).all())


def float32_products(model, loss, row):
    """`sum_t g_t x_tᵀ` in float64, of the factors in half precision that one run of one row has."""
    blocks, handles = {}, []

    def note(site):
        def hook(module, args, y):
            x = args[0].detach().double().reshape(-1, site.layer.in_features)
            x = torch.cat([x, x.new_ones(len(x), 1)], 1) if site.layer.bias else x

            def add(g):
                G = g.double().reshape(-1, site.layer.out_features).mT @ x
                blocks[site.block] = blocks.get(site.block, 0) + G[None]

            y.register_hook(add)

        return hook

    for site in find_sites(model):
        handles.append(site.module.register_forward_hook(note(site)))
    losses = loss.batched(collate([row]))
    losses.sum().backward()
    for handle in handles:
        handle.remove()
    return {site.block: blocks[site.block] for site in find_sites(model)}, losses


@pytest.mark.parametrize("kind", MODELS)
@few
@given(st.data())
def test_statistics_are_float32_products_of_the_factors_and_so_are_transforms_and_losses(kind, data):
    model, loss, rows, _ = data.draw(rounded((kind,)))
    row = max(rows, key=lambda row: int((row["labels"] != -100).sum()))
    dense, losses = float32_products(model, loss, row)
    queries = {name: G.float() for name, G in dense.items()}
    ends = (chain(), project(3), dot(queries), chain(unit_normalize(), dot(queries)))
    for transform in (*ends, chain(project(3), unit_normalize())):
        got, want = probe_engine(model, loss, transform)(collate([row])), transform(dense)
        assert {part.dtype for part in parts(got.values)} == {torch.float32} == {got.losses.dtype}
        # 1e-4: far above the rounding of float32, far below that of the factors.
        apart = (whole(got.values) - whole(want)).norm()
        assert float(apart) <= 1e-4 * float(whole(want).norm())
        assert_blocks_close(got.losses, losses.detach().double(), 1e-6)


@few
@given(rounded(KINDS, min_rows=2))
def test_scores_in_half_precision_are_float32(drawn):
    model, loss, rows, (exact, exact_loss, exact_rows) = drawn
    eps = torch.finfo(next(model.parameters()).dtype).eps
    want = naive_blocks(exact_loss, exact, exact_rows, View())
    loop = naive_blocks(loss, model, rows, View())
    queries = {name: G[:2].float() for name, G in want.items()}
    scores = probe_engine(model, loss, dot(queries))(collate(rows)).values
    assert scores.dtype == torch.float32
    apart = (scores.double() - whole(loop) @ whole(queries).mT).abs()
    rounding = (whole(loop) - whole(want)).norm(dim=1) + eps * whole(want).norm(dim=1)
    assert bool((apart <= 4 * rounding[:, None] * whole(queries).norm(dim=1)).all())
