"""Scores on the fly equal inner products of rows at hand; cosines are cosines; top-k is a sort."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from matrices import score

from gradfn.engine.stream import collect
from gradfn.methods import grad_cosine, grad_dot
from gradfn.methods.scoring import dots
from gradfn.scores import top_k
from gradfn.testing import assert_blocks_close, chains, naive_blocks, problems, seeds
from gradfn.testing.strategies import shapes_of
from gradfn.transforms import dot, unit_normalize

methods = st.sampled_from([grad_dot, grad_cosine])


def flat(blocks):
    return torch.cat([G.flatten(1) for G in blocks.values()], 1)


@given(st.data(), problems(min_rows=2), methods, st.integers(1, 40))
def test_scores_on_the_fly_are_dots_of_collected_rows(data, problem, method, budget):
    dense = naive_blocks(problem.reference, problem.model, problem.rows)
    made = method(data.draw(chains(shapes_of(dense), max_stages=2)))
    at = data.draw(st.integers(1, len(problem.rows) - 1))
    common = {"loss": problem.loss, "token_batch_size": budget}
    scores = score(problem.model, problem.rows[at:], problem.rows[:at], method=made, **common)
    rows = collect(problem.model, problem.rows[at:], made.row_transform, **common)
    queries = collect(problem.model, problem.rows[:at], made.query_transform, **common)
    assert_blocks_close(scores, dots(rows, queries))
    expected = flat(made.row_transform(dense))[at:] @ flat(made.query_transform(dense))[:at].T
    assert_blocks_close(scores, expected)


@given(problems())
def test_cosines_lie_in_the_unit_interval_and_are_1_with_oneself(problem):
    cosines = score(problem.model, problem.rows, problem.rows, method=grad_cosine(), loss=problem.loss)
    assert bool((cosines.abs() <= 1 + 1e-12).all())
    dense = flat(naive_blocks(problem.reference, problem.model, problem.rows))
    zero = (dense == 0).all(1)
    assert_blocks_close(cosines.diagonal(), (~zero).double(), 1e-9)
    assert not bool(cosines[zero].any())
    assert not bool(cosines[:, zero].any())
    assert_blocks_close(cosines, cosines.T)


@given(seeds(), st.integers(1, 5), st.integers(1, 4), st.floats(1e-6, 1e6))
def test_unit_rows_have_norm_1_whatever_their_scale(seed, rows, zero_row, scale):
    generator = torch.Generator().manual_seed(seed)
    blocks = {n: scale * torch.randn(rows, 3, 2, generator=generator, dtype=torch.float64) for n in "ab"}
    for G in blocks.values():
        G[zero_row % rows] = 0
    norms = flat(unit_normalize()(blocks)).norm(dim=1)
    expected = torch.ones(rows, dtype=torch.float64)
    expected[zero_row % rows] = 0
    assert_blocks_close(norms, expected, 1e-12)


@given(seeds(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_dot_is_the_product_of_flattened_rows_and_linear_in_the_queries(seed, rows, queries, size):
    generator = torch.Generator().manual_seed(seed)
    z, q, other = (
        {"a": torch.randn(n, size, 2, generator=generator, dtype=torch.float64),
         "b": torch.randn(n, 3, generator=generator, dtype=torch.float64)}
        for n in (rows, queries, queries)
    )  # fmt: skip
    assert_blocks_close(dot(q)(z), flat(z) @ flat(q).T)
    both = {name: q[name] - 2 * other[name] for name in q}
    assert_blocks_close(dot(both)(z), dot(q)(z) - 2 * dot(other)(z))


@given(st.data(), seeds(), st.integers(1, 12), st.integers(1, 3), st.integers(1, 14), st.booleans())
def test_streamed_top_k_is_the_stable_sort(data, seed, rows, queries, k, largest):
    # few distinct values: ties are the rule
    scores = torch.randint(0, 3, (rows, queries), generator=torch.Generator().manual_seed(seed)).double()
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=4)))
    chunks = [scores[a:b] for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
    best = top_k(iter(chunks), k, largest=largest)
    order = np.argsort((-scores if largest else scores).T.numpy(), axis=1, kind="stable")[:, :k]
    assert best.rows.tolist() == order.tolist()
    assert torch.equal(best.scores, scores.T.gather(1, torch.from_numpy(order)))


@given(problems(("mlp",)), seeds())
def test_a_step_on_a_proponent_lowers_the_querys_loss(problem, seed):
    """The sign: a step of `-eta grad z` changes the query's loss by `-eta score(z, q)`, to first order."""
    model, query, eta = problem.model, problem.rows[0], 1e-6
    layers = dict(model.named_modules())
    scores = score(model, problem.rows, [query], method=grad_dot(), loss=problem.loss)[:, 0]
    row = seed % len(problem.rows)
    dense = naive_blocks(problem.reference, model, [problem.rows[row]])
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = problem.loss(params, query)
    for name, G in dense.items():
        wide = layers[name].in_features
        params[f"{name}.weight"] -= eta * G[0, :, :wide]
        if G.shape[-1] > wide:
            params[f"{name}.bias"] -= eta * G[0, :, wide]
    change = problem.loss(params, query) - before
    scale = 1e-9 + eta * float(flat(dense).norm()) ** 2
    assert abs(float(change + eta * scores[row])) <= 1e-2 * scale
