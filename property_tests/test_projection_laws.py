"""Random projections: linear, a function of their key alone, unbiased, orthonormal where they say so."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gradfn.errors import InputError
from gradfn.linalg.maps import DENSE, Map, Select, random_map, random_matrix, walsh_hadamard
from gradfn.testing import assert_blocks_close, seeds
from gradfn.testing.strategies import KINDS
from gradfn.transforms import Compress, Project, chain, compress, project
from gradfn.transforms.joint import joint

dims = st.integers(1, 9)
kinds = st.sampled_from(KINDS)
dense_kinds = st.sampled_from(DENSE)
names = st.text("ab.0", min_size=1, max_size=6)


def applied(side, v):
    return side(v) if isinstance(side, Map) else v @ side.T


def dense(side):
    return side.dense(torch.float64) if isinstance(side, Map) else side


@given(seeds(), names, kinds, dims, dims, dims, dims)
def test_projecting_is_linear(seed, name, kind, p, q, out, into):
    G, H = torch.randn(2, 4, out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for transform, shape in (
        (Project((p, q), kind, seed), (min(p, out), min(q, into))),
        (Compress(p, kind, seed), (1, p) if p < out * into else (out, into)),
    ):
        together = transform({name: 2.0 * G - H})[name]
        assert together.shape == (4, *shape)
        assert_blocks_close(together, 2.0 * transform({name: G})[name] - transform({name: H})[name])


@given(seeds(), names, kinds, st.integers(1, 4), st.integers(0, 40), st.integers(1, 3))
def test_a_map_is_its_matrix(seed, name, kind, nonzeros, extra, rows):
    p = nonzeros * 3
    side = random_map(kind, seed, name, "left", (p, p + 1 + extra), nonzeros if kind == "sjlt" else 1)
    M = dense(side)
    assert M.shape == (p, p + 1 + extra)
    v = torch.randn(
        2, rows, p + 1 + extra, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert_blocks_close(applied(side, v), v @ M.T, 1e-12)
    assert applied(side, v[:, :0]).shape == (2, 0, p)
    if isinstance(side, Map):
        shorter = v[..., :-1]
        ones = torch.cat([shorter, torch.ones(2, rows, 1, dtype=torch.float64)], -1)
        assert_blocks_close(side.with_one(shorter), ones @ M.T, 1e-12)


@given(seeds(), names, st.sampled_from(["left", "right", "flat"]), kinds, dims, dims)
def test_a_map_is_a_function_of_its_key(seed, name, side, kind, p, more):
    first = dense(random_map(kind, seed, name, side, (p, p + more)))
    torch.manual_seed(1)
    assert torch.equal(first, dense(random_map(kind, seed, name, side, (p, p + more))))
    assert first.dtype == torch.float64


@given(seeds(), seeds(), names, names, kinds)
def test_different_keys_give_different_maps(seed, other, name, another, kind):
    assume(seed != other and name != another)
    shape = (30, 64)
    keys = [(seed, name, "left"), (other, name, "left"), (seed, another, "left"), (seed, name, "right")]
    drawn = [dense(random_map(kind, *key, shape)) for key in keys]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@given(seeds(), names, dims, dims)
def test_orthonormal_rows_or_an_isometry(seed, name, p, dim):
    M = random_matrix(seed, name, "left", (p, dim), "orthonormal")
    if p <= dim:
        assert_blocks_close(M @ M.T, torch.eye(p, dtype=torch.float64) * dim / p, 1e-12)
    else:
        assert_blocks_close(M.T @ M, torch.eye(dim, dtype=torch.float64), 1e-12)


@given(seeds(), names, dims, dims)
def test_rademacher_entries_are_signs_over_root_p(seed, name, p, dim):
    M = random_matrix(seed, name, "left", (p, dim), "rademacher")
    assert_blocks_close(M.square(), torch.full((p, dim), 1 / p, dtype=torch.float64), 1e-12)


@given(seeds(), dims, st.integers(1, 30))
def test_a_mask_takes_different_coordinates(seed, p, more):
    chosen = random_map("mask", seed, "a", "left", (p, p + more))
    assert isinstance(chosen, Select)
    assert chosen.index.unique().tolist() == chosen.index.tolist()
    assert chosen.scale**2 == pytest.approx((p + more) / p)


@given(seeds(), st.integers(1, 4), st.integers(2, 6), st.integers(1, 40))
def test_an_sjlt_has_s_nonzeros_a_column_one_in_each_part(seed, nonzeros, m, more):
    p = nonzeros * m
    M = random_map("sjlt", seed, "a", "flat", (p, p + more), nonzeros)
    parts = dense(M).view(nonzeros, m, -1)
    assert bool(((parts != 0).sum(1) == 1).all())
    assert_blocks_close(
        parts.abs().sum(1), torch.full((nonzeros, p + more), nonzeros**-0.5, dtype=torch.float64)
    )


@given(seeds(), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40))
def test_runs_of_an_sjlt_add_up_alike_whichever_way(seed, rows, p, more):
    v = torch.randn(rows, p + more, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    side = random_map("sjlt", seed, "a", "flat", (p, p + more))
    found = []
    for size, short, gathered in ((0, 0, 1), (0, 1 << 16, 1), (1 << 13, 0, 1), (1 << 13, 0, 1 << 20)):
        with mock.patch.multiple("gradfn.linalg.maps", SMALL_RUN=size, SHORT_RUN=short, GATHERED=gathered):
            found.append(applied(side, v))
    for other in found[1:]:
        assert_blocks_close(found[0], other, 1e-12)


@given(seeds(), st.sampled_from(["mask", "sjlt", "fjlt"]), st.integers(1, 5), st.integers(1, 30))
def test_a_map_is_written_out_in_strips(seed, kind, p, more):
    side = random_map(kind, seed, "a", "left", (p, p + more))
    with mock.patch("gradfn.linalg.maps.STRIP", 3):
        strips = dense(side)
    assert torch.equal(strips, side(torch.eye(p + more, dtype=torch.float64)).T)


@given(seeds(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 30))
def test_an_fjlt_of_many_rows_is_that_of_each(seed, rows, p, more):
    v = torch.randn(rows, p + more, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    side = random_map("fjlt", seed, "a", "flat", (p, p + more))
    with mock.patch("gradfn.linalg.maps.CACHED", 8):
        assert_blocks_close(applied(side, v), v @ dense(side).T, 1e-12)


def test_a_matrix_that_does_not_fit_is_refused():
    with (
        mock.patch("gradfn.linalg.maps.free_memory", return_value=1 << 20),
        pytest.raises(InputError, match="gaussian:512 for mlp takes 2 MiB and 1 are free: take sjlt"),
    ):
        random_map("gaussian", 0, "mlp", "flat", (512, 1024), dtype=torch.float32)


@given(seeds(), st.integers(0, 13))
def test_the_walsh_hadamard_transform_is_its_matrix_and_undoes_itself(seed, log):
    v = torch.randn(2, 1 << log, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(min(log, 8)):
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    if log <= 8:
        assert_blocks_close(walsh_hadamard(v), v @ H, 1e-11)
    assert_blocks_close(walsh_hadamard(walsh_hadamard(v)) / (1 << log), v, 1e-11)


PINNED_SIGNS = [-1, 1, 1, -1, 1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 1, 1]
PINNED_NORMAL = [-0.6527911839218347, -0.4470827476926928, 1.4682364592169654]
PINNED_MASK = [353, 434, 641, 671]
PINNED_SKETCH = [[0, 0, 1, 0, -1, 0, -1, 0], [-1, 0, 0, 0, 0, 1, 0, 1], [0, 1, 0, -1, 0, 0, 0, 0]]

DRAWS, LIMIT = 800, 4.5
"""Draws, and how many standard errors a mean may be off; the seeds are fixed, so none is off by chance."""


def assert_mean(samples, expected):
    """The mean over draws lies within 4.5 standard errors of what is expected."""
    error = samples.std(0) / len(samples) ** 0.5
    deviation = (samples.mean(0) - expected).abs()
    assert bool((deviation <= LIMIT * error + 1e-12).all()), f"{(deviation / (error + 1e-12)).max()} errors"


@pytest.mark.parametrize("shape", [(2, 5), (5, 3)])
@pytest.mark.parametrize("kind", DENSE)
def test_matrices_are_unbiased(kind, shape):
    drawn = torch.stack([random_matrix(s, "block", "left", shape, kind) for s in range(DRAWS)])
    assert_mean(drawn.mT @ drawn, torch.eye(shape[1], dtype=torch.float64))
    assert_mean(drawn, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "nonzeros"), [*((kind, 1) for kind in KINDS), ("sjlt", 2), ("sjlt", 4)])
def test_maps_are_unbiased(kind, nonzeros):
    drawn = torch.stack(
        [dense(random_map(kind, s, "block", "flat", (4, 11), nonzeros)) for s in range(DRAWS)]
    )
    assert_mean(drawn.mT @ drawn, torch.eye(11, dtype=torch.float64))


@pytest.mark.parametrize(
    "make",
    [
        *(lambda s, kind=kind: project(3, kind, s) for kind in KINDS),
        *(lambda s, kind=kind: compress(9, kind, s) for kind in KINDS),
        lambda s: compress(8, "sjlt", s, 2),
        lambda s: chain(project((4, 4), "mask", s), compress(6, "sjlt", s)),
        lambda s: chain(joint(), compress(20, "mask", s), compress(7, "sjlt", s)),
    ],
)
def test_inner_products_of_projected_blocks_are_unbiased(make):
    G, H = torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = H + 0.5 * G
    both = {"w": torch.cat([G, H])}
    pairs = [next(iter(make(seed)(both).values())) for seed in range(800)]
    samples = torch.stack([(pair[0] * pair[1]).sum() for pair in pairs])
    assert_mean(samples, (G * H).sum())
    error = float(samples.std() / len(samples) ** 0.5)
    assert error < 0.25 * float((G * H).sum().abs()), "a test with no power"


def test_the_variance_of_an_sjlt_is_that_of_independent_hashing():
    """`Var <Sx, Sy> = 1/m sum_{i != j} (x_i² y_j² + x_i y_i x_j y_j)` at most, over keys."""
    x, y = torch.randn(2, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m, squares = 4, x.square().sum() * y.square().sum() + (x * y).sum() ** 2 - 2 * (x * y).square().sum()
    found = [random_map("sjlt", s, "a", "flat", (m, 24))(torch.stack([x, y])) for s in range(6000)]
    variance = torch.stack([pair[0] @ pair[1] for pair in found]).var()
    assert 0.75 * squares / m < variance < 1.03 * squares / m


@pytest.mark.parametrize("kind", DENSE)
def test_left_and_right_are_independent(kind):
    left = torch.stack([random_matrix(s, "w", "left", (2, 4), kind) for s in range(DRAWS)])
    right = torch.stack([random_matrix(s, "w", "right", (2, 4), kind) for s in range(DRAWS)])
    assert_mean(left * right, torch.zeros(2, 4, dtype=torch.float64))


def test_gaussian_entries_have_the_moments_of_a_normal_variable():
    z = random_matrix(3, "w", "left", (40, 501), "gaussian").flatten() * 40**0.5
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert_mean(z[:, None] ** power, torch.tensor([moment], dtype=torch.float64))


def test_the_numbers_never_change():
    """Stores hold no matrices: what was projected once must be projected alike for ever."""
    signs = random_matrix(7, "transformer.h.0.attn", "left", (1, 16)).sign().int().flatten().tolist()
    normal = random_matrix(7, "mlp", "right", (1, 3), "gaussian").flatten()
    assert signs == PINNED_SIGNS
    torch.testing.assert_close(normal, torch.tensor(PINNED_NORMAL, dtype=torch.float64), rtol=1e-12, atol=0)
    mask = random_map("mask", 7, "mlp", "flat", (4, 1000))
    assert mask.index.tolist() == PINNED_MASK
    sketch = random_map("sjlt", 7, "mlp", "flat", (3, 8))
    assert dense(sketch).int().tolist() == PINNED_SKETCH
