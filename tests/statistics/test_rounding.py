"""Eigenvalues that are rounding are 0, and no others: in float32 as in float64, however they came about."""

import pytest
import torch
from matrices import score
from torch import nn
from torch.func import functional_call

import gradfn as gf
from gradfn.linalg.spectrum import Damping, Spectrum, eigh
from gradfn.runs import merge as merging
from gradfn.runs.curvatures import hessian, load_curvature
from gradfn.runs.merge import hessian_shard, merge_run
from gradfn.runs.shards import Shard
from gradfn.statistics import Curvature, ekfac, eshampoo, kfac, mix, second_moment, shampoo, tkfac
from gradfn.statistics.fold import FoldState, fit
from gradfn.statistics.kfac import Corrected
from gradfn.testing import assert_blocks_close

FOLDS = {
    "second_moment": second_moment, "kfac": kfac, "ekfac": ekfac, "shampoo": shampoo, "eshampoo": eshampoo,
    "tkfac": tkfac,
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


def drawn(count, seed, dtype):
    """Rows of numbers that float32 has, so that both dtypes are given the same ones."""
    g, sizes = torch.Generator().manual_seed(seed), {"x": 12, "y": 9}
    return [{n: torch.randn(k, generator=g).to(dtype) for n, k in sizes.items()} for _ in range(count)]


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9)).to(dtype)


def two_layers(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 9)).to(dtype)


def loss_of(net):
    return lambda params, e: (functional_call(net, params, e["x"]) - e["y"]).square().sum()


def factors(net, rows):
    """`g [rows, out]` and `x [rows, in + 1]` of a linear layer under squared error, by hand."""
    x, y = (torch.stack([e[name] for e in rows]) for name in "xy")
    weight, bias = net[0].weight.detach(), net[0].bias.detach()
    return 2 * (x @ weight.T + bias - y), torch.cat([x, torch.ones(len(x), 1).to(x)], 1)


def pinv(matrix):
    return torch.linalg.pinv(matrix, rtol=1e-10, hermitian=True)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def live_basis(v):
    """An orthonormal basis of the space that rows span."""
    return torch.linalg.svd(v, full_matrices=False).Vh[: torch.linalg.matrix_rank(v)].T


def inverse(kind, g, x):
    """The pseudo-inverse of a curvature on the flattened block, of rows with one position, by its formula."""
    n, G = len(g), torch.einsum("bo,bi->boi", g, x)
    g2, x2 = g.square().sum(1), x.square().sum(1)
    match kind:
        case "second_moment":
            return pinv(G.flatten(1).T @ G.flatten(1) / n)
        case "kfac":
            return torch.kron(pinv(g.T @ g / n), pinv(x.T @ x / n))
        case "tkfac":
            psi, phi = g.T @ (g * x2[:, None]) / n, x.T @ (x * g2[:, None]) / n
            return (g2 * x2).mean() * torch.kron(pinv(psi), pinv(phi))
        case "shampoo":
            left, right = g.T @ (g * x2[:, None]) / n, x.T @ (x * g2[:, None]) / n
            return torch.kron(root(pinv(left)), root(pinv(right)))
    if kind == "eshampoo":
        U, V = live_basis(g * x2.sqrt()[:, None]), live_basis(x * g2.sqrt()[:, None])
    else:
        U, V = live_basis(g), live_basis(x)
    basis = torch.kron(U, V)
    measured = torch.einsum("boi,op,iq->bpq", G, U, V).square().mean(0).flatten()
    return basis @ torch.diag(1 / measured) @ basis.T


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", FOLDS)
def test_undamped_scores_of_a_singular_curvature_are_those_of_its_pseudo_inverse(kind, dtype):
    """Of 6 rows; queries that are other rows have a part in the space where H is zero."""
    exact = network(torch.float32).double()
    (g, x), (gq, xq) = (factors(exact, drawn(n, seed, torch.float64)) for n, seed in ((6, 0), (3, 1)))
    G, Q = (torch.einsum("bo,bi->boi", *pair).flatten(1) for pair in ((g, x), (gq, xq)))
    want = G @ inverse(kind, g, x) @ Q.T
    net = network(torch.float32).to(dtype)
    data, queries = drawn(6, 0, dtype), drawn(3, 1, dtype)
    H = fit(FOLDS[kind](), net, data, loss=loss_of(net))
    dampings = None, Damping(0.0), Damping(0.0, "absolute"), Damping(1e-9, "truncated")
    method = gf.influence(H, damping=dampings)
    scores = score(net, data, queries, method=method, loss=loss_of(net))
    for part in scores.double().split(3, 1):
        assert (part - want).norm() <= TOLERANCE[dtype] * want.norm()


def zeros(H):
    return {name: int((one.values == 0).sum()) for name, one in H.items()}


@pytest.mark.parametrize("kind", FOLDS)
def test_the_same_eigenvalues_are_zero_in_every_way_of_fitting(kind, tmp_path):
    net, exact = two_layers(torch.float32), two_layers(torch.float32).double()
    data, loss, fold = drawn(6, 0, torch.float32), loss_of(net), FOLDS[kind]()
    H = fit(fold, net, data, loss=loss)
    assert zeros(H) == zeros(fit(fold, exact, drawn(6, 0, torch.float64), loss=loss_of(exact)))
    assert all(count > 0 for count in zeros(H).values())
    ways = [fit(fold, net, data, loss=loss, **how) for how in ({"partitions": 2}, {"token_batch_size": 1})]
    hessian(tmp_path / "one", net, data, fold, loss=loss)
    for _ in range(2 if kind in ("ekfac", "eshampoo") else 1):
        for number in (1, 2):
            hessian_shard(tmp_path / "parts", net, data, fold, shard=Shard(number, 2), loss=loss)
        merge_run(tmp_path / "parts")
    for made in (*ways, load_curvature(tmp_path / "one"), load_curvature(tmp_path / "parts")):
        assert zeros(made) == zeros(H)
        assert {one.right.dtype for one in made.values()} == {torch.float32}
        assert_blocks_close(*({n: one.dense() for n, one in side.items()} for side in (made, H)), 1e-5)


def test_sums_of_shards_that_do_not_say_what_they_were_made_in_are_read(tmp_path, monkeypatch):
    """As float64's, which is how all were taken before they said it."""
    net, data, told = network(torch.float32), drawn(6, 0, torch.float32), merging._sum_arrays
    monkeypatch.setattr(
        merging, "_sum_arrays", lambda *a: {n: v for n, v in told(*a).items() if n != "rows/rounding"}
    )
    loss = loss_of(net)
    for number in (1, 2):
        hessian_shard(tmp_path, net, data, second_moment(), shard=Shard(number, 2), loss=loss)
    merge_run(tmp_path)
    (made,), (want,) = load_curvature(tmp_path).values(), fit(second_moment(), net, data, loss=loss).values()
    assert made.right.dtype == torch.float64
    torch.testing.assert_close(made.dense(), want.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["second_moment", "kfac"])
def test_what_is_mixed_has_the_zeros_of_both(kind):
    """Halves of one curvature's rows that span the same space, in which no new direction may appear."""
    net, data = network(torch.float32), drawn(6, 0, torch.float32)
    a, b = (fit(FOLDS[kind](), net, rows, loss=loss_of(net)) for rows in (data, data[::-1] + data[:3]))
    assert zeros(mix(a, b, 0.4)) == zeros(a) == zeros(b)
    assert {one.right.dtype for one in mix(a, b, 0.4).values()} == {torch.float32}


def test_true_eigenvalues_of_wide_layers_stay_in_float32():
    """One that is large, as layers of language models have, and all others at a hundredth of the mean."""
    values = torch.full((900,), 1e-5)
    values[-1] = 1.0
    assert values[0] < 900 * torch.finfo(torch.float32).eps  # what is usual for a rank would take them away
    for matrix in (torch.diag(values), torch.diag(values.double())):
        assert bool((eigh(matrix, torch.float32)[0] > 0).all())
    values[:-1] = 1e-8
    assert eigh(torch.diag(values))[0].count_nonzero() == 1


def test_what_the_decomposition_rounds_is_zero_in_float64():
    """LAPACK's eigenvalues are off by n epsilon of the largest at most, whatever their sum is."""
    values = torch.full((20,), 10 * torch.finfo(torch.float64).eps, dtype=torch.float64)
    values[-1] = 1.0
    assert eigh(torch.diag(values))[0].count_nonzero() == 1
    values[:-1] *= 4
    assert eigh(torch.diag(values))[0].count_nonzero() == 20


def measured(values, live=None):
    """The eigenvalues that EK-FAC keeps of those measured, in float32."""
    basis = Spectrum(torch.eye(len(values)), torch.eye(values.shape[1]), torch.ones_like(values))
    if live is not None:
        basis = Spectrum(basis.left, basis.right, live.to(values))
    H = Corrected(Curvature("kfac", {"a": basis}, 1)).finalize(FoldState(1, {"a": values}))
    return H["a"].values


def test_measured_eigenvalues_are_rounding_below_a_square():
    """A coordinate's rounding is epsilon of the largest one; where the basis is rounding it is more."""
    eps = torch.finfo(torch.float32).eps
    values = torch.tensor([[1.0, 1e-9], [5 * eps**2, 3 * eps**2]], dtype=torch.float64)
    assert measured(values).tolist() == [[1.0, 1e-9], [5 * eps**2, 0.0]]
    assert measured(values, torch.tensor([[1, 0], [1, 0]])).tolist() == [[1.0, 0.0], [5 * eps**2, 0.0]]
    wide = torch.full((1000, 1000), 5e-9, dtype=torch.float64)
    wide[0, 0] = 1.0  # a million squares of epsilon are 1.4e-8, above a thousandth of the mean
    assert torch.equal(measured(wide), wide)
    assert torch.equal(measured(wide, torch.zeros_like(wide)), wide)
