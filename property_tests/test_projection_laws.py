"""Random projections: linear, a function of their key alone, unbiased, orthonormal where they say so."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gradfn.testing import assert_blocks_close, seeds
from gradfn.testing.strategies import DISTRIBUTIONS
from gradfn.transforms import project
from gradfn.transforms.project import random_matrix

dims = st.integers(1, 9)
distributions = st.sampled_from(DISTRIBUTIONS)
names = st.text("ab.0", min_size=1, max_size=6)


@given(seeds(), names, distributions, dims, dims, dims)
def test_projecting_is_linear(seed, name, distribution, p, out, into):
    G, H = torch.randn(2, 4, out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    transform = project(p, distribution, seed)
    together = transform({name: 2.0 * G - H})[name]
    assert together.shape == (4, min(p, out), min(p, into))
    assert_blocks_close(together, 2.0 * transform({name: G})[name] - transform({name: H})[name])


@given(seeds(), names, st.sampled_from(["left", "right"]), distributions, dims, dims)
def test_the_matrix_is_a_function_of_its_key(seed, name, side, distribution, p, dim):
    first = random_matrix(seed, name, side, (p, dim), distribution)
    torch.manual_seed(1)
    assert torch.equal(first, random_matrix(seed, name, side, (p, dim), distribution))
    assert first.shape == (p, dim)
    assert first.dtype == torch.float64


@given(seeds(), seeds(), names, names, distributions)
def test_different_keys_give_different_matrices(seed, other, name, another, distribution):
    assume(seed != other and name != another)
    shape = (8, 9)
    keys = [(seed, name, "left"), (other, name, "left"), (seed, another, "left"), (seed, name, "right")]
    drawn = [random_matrix(*key, shape, distribution) for key in keys]
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


PINNED_SIGNS = [-1, 1, 1, -1, 1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 1, 1]
PINNED_NORMAL = [-0.6527911839218347, -0.4470827476926928, 1.4682364592169654]

DRAWS, LIMIT = 800, 4.5
"""Draws, and how many standard errors a mean may be off; the seeds are fixed, so none is off by chance."""


def assert_mean(samples, expected):
    """The mean over draws lies within 4.5 standard errors of what is expected."""
    error = samples.std(0) / len(samples) ** 0.5
    deviation = (samples.mean(0) - expected).abs()
    assert bool((deviation <= LIMIT * error + 1e-12).all()), f"{(deviation / (error + 1e-12)).max()} errors"


@pytest.mark.parametrize("shape", [(2, 5), (5, 3)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_matrices_are_unbiased(distribution, shape):
    drawn = torch.stack([random_matrix(s, "block", "left", shape, distribution) for s in range(DRAWS)])
    assert_mean(drawn.mT @ drawn, torch.eye(shape[1], dtype=torch.float64))
    assert_mean(drawn, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_inner_products_of_projected_blocks_are_unbiased(distribution):
    G, H = torch.randn(2, 1, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = H + 0.5 * G
    both = {"w": torch.cat([G, H])}
    pairs = [project(3, distribution, seed)(both)["w"] for seed in range(400)]
    samples = torch.stack([(pair[0] * pair[1]).sum() for pair in pairs])
    assert_mean(samples, (G * H).sum())
    assert float(samples.std() / len(samples) ** 0.5) < 0.25 * float((G * H).sum().abs()), (
        "a test with no power"
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_left_and_right_are_independent(distribution):
    left = torch.stack([random_matrix(s, "w", "left", (2, 4), distribution) for s in range(DRAWS)])
    right = torch.stack([random_matrix(s, "w", "right", (2, 4), distribution) for s in range(DRAWS)])
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
