"""A Kron is the matrix `L ⊗ R`, cheaply: applied, composed, inverted and raised to powers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradfn.linalg.kron import Kron
from gradfn.testing import assert_blocks_close, seeds

dims = st.integers(1, 5)
kinds = st.sampled_from(["identity", "diagonal", "matrix"])


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def sides(draw, dim):
    """A side for vectors of length `dim`, and the length that comes out."""
    match draw(kinds):
        case "identity":
            return None, dim
        case "diagonal":
            return random(draw(seeds()), dim), dim
    out = draw(dims)
    return random(draw(seeds()), out, dim), out


@st.composite
def positive_sides(draw, dim):
    match draw(kinds):
        case "identity":
            return None
        case "diagonal":
            return random(draw(seeds()), dim).abs() + 0.2
    root = random(draw(seeds()), dim, dim)
    return root @ root.T + 0.2 * torch.eye(dim, dtype=torch.float64)


@st.composite
def positive_krons(draw):
    """A symmetric positive definite Kron and blocks for it."""
    shape = draw(dims), draw(dims)
    return Kron(draw(positive_sides(shape[0])), draw(positive_sides(shape[1]))), random(
        draw(seeds()), 3, *shape
    )


@st.composite
def krons(draw, count):
    """Krons that fit one behind the other, and blocks for the first."""
    shape = draw(dims), draw(dims)
    G, made = random(draw(seeds()), 3, *shape), []
    for _ in range(count):
        (left, out), (right, into) = draw(sides(shape[0])), draw(sides(shape[1]))
        made.append((Kron(left, right), shape))
        shape = (out, into)
    return made, G


@given(krons(1))
def test_applying_is_multiplying_by_the_dense_kronecker_product(drawn):
    ((kron, shape),), G = drawn
    assert_blocks_close(kron(G).flatten(1), G.flatten(1) @ kron.dense(shape).double().T)


@given(krons(1))
def test_a_kron_acts_on_the_two_factors_of_an_outer_product(drawn):
    ((kron, _),), G = drawn
    g, x = G[:, :, 0], G[:, 0, :]
    left, right = Kron(right=kron.left), Kron(right=kron.right)  # the last axis of a single row
    outer = left(g[:, None])[:, 0, :, None] * right(x[:, None])
    assert_blocks_close(kron(g[:, :, None] * x[:, None]), outer)


@given(krons(2))
def test_adjacent_krons_fuse_into_one(drawn):
    ((first, shape), (second, between)), G = drawn
    fused = second @ first
    assert_blocks_close(fused(G), second(first(G)))
    assert_blocks_close(
        fused.dense(shape).double(), second.dense(between).double() @ first.dense(shape).double()
    )


@given(krons(3))
def test_fusing_is_associative(drawn):
    ((a, shape), (b, _), (c, _)), _ = drawn
    assert_blocks_close(((c @ b) @ a).dense(shape), (c @ (b @ a)).dense(shape))


@given(krons(1))
def test_the_empty_kron_is_the_identity(drawn):
    ((kron, shape),), G = drawn
    assert torch.equal(Kron()(G), G)
    for fused in (kron @ Kron(), Kron() @ kron):
        assert torch.equal(fused.dense(shape), kron.dense(shape))


@given(positive_krons())
def test_the_inverse_undoes_the_map(drawn):
    kron, G = drawn
    assert_blocks_close(kron.inverse()(kron(G)), G)
    assert_blocks_close(kron(kron.inverse()(G)), G)


@given(positive_krons(), st.sampled_from([-1.0, 1.0, 2.0]))
def test_half_a_power_twice_is_the_power(drawn, exponent):
    kron, G = drawn
    half = kron.power(exponent / 2)
    assert_blocks_close(half(half(G)), kron.power(exponent)(G))


@given(positive_krons(), st.sampled_from([-1.0, -0.5, 0.5]))
def test_a_power_is_the_matrix_power_of_the_dense_map(drawn, exponent):
    kron, G = drawn
    shape = tuple(G.shape[1:])
    values, vectors = torch.linalg.eigh(kron.dense(shape).double())
    assert_blocks_close(kron.power(exponent).dense(shape), (vectors * values**exponent) @ vectors.T)


@given(krons(1), seeds(), st.floats(-3, 3))
def test_a_kron_is_linear(drawn, seed, scale):
    ((kron, _),), G = drawn
    H = random(seed, *G.shape)
    assert_blocks_close(kron(G + scale * H), kron(G) + scale * kron(H))
