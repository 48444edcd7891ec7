"""The spectrum of fewer rows than numbers is that of their second moment."""

import pytest
import torch

from gradfn.linalg.rows import RowSpectrum
from gradfn.linalg.spectrum import Damping, parse_dampings
from gradfn.statistics.curvature import dense_spectrum

DAMPINGS = (None, *parse_dampings("0.1,1e-3,absolute:0.2,truncated:0.3,tikhonov:0.1"))


def rows_of(n, d, rank=None):
    """Rows of rank `rank` at most, one of them zero."""
    generator = torch.Generator().manual_seed(n)
    F = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if rank is not None:
        F = torch.randn(n, rank, generator=generator, dtype=torch.float64) @ F[:rank]
    F[n // 2] = 0
    return F


@pytest.mark.parametrize("damping", DAMPINGS, ids=str)
@pytest.mark.parametrize("power", [-1.0, -0.5])
@pytest.mark.parametrize(("n", "d", "rank"), [(7, 20, None), (9, 12, 4), (1, 3, None)])
def test_powers_are_those_of_the_dense_matrix(n, d, rank, power, damping):
    F = rows_of(n, d, rank)
    if n == 1:
        F[0] = torch.arange(1.0, d + 1)
    one, dense = RowSpectrum(F), dense_spectrum(F.T @ F / n)
    torch.testing.assert_close(one.values, dense.values, rtol=1e-9, atol=1e-12)
    G = torch.cat([torch.randn(3, d, dtype=torch.float64), F[:1]]).view(4, 1, d)
    got = one.apply(G, one.power(power, damping))
    torch.testing.assert_close(got, dense.apply(G, dense.power(power, damping)), rtol=1e-9, atol=1e-9)
    whole = one.back(one.into(G) * one.power(power, damping), (1, d))
    torch.testing.assert_close(whole, got, rtol=1e-9, atol=1e-9)


def test_eigenvectors_are_made_when_they_are_asked_for():
    F = rows_of(9, 30, 5)
    one = RowSpectrum(F)
    one.apply(F[:, None], one.power(-1.0, Damping()))
    assert "right" not in vars(one)
    torch.testing.assert_close(
        one.right.T @ one.right, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(one.dense(), F.T @ F / 9, rtol=1e-9, atol=1e-12)
    squared = one.filtered(torch.square)
    torch.testing.assert_close(squared.dense(), (F.T @ F / 9) @ (F.T @ F / 9), rtol=1e-9, atol=1e-10)


def test_rounding_is_that_of_the_rows():
    F = rows_of(6, 40, 3).float()
    one = RowSpectrum(F)
    assert int((one.values > 0).sum()) == 3
    assert one.right.dtype == torch.float32
    assert one.apply(F[:1, None], one.power(-1.0)).dtype == torch.float32


def test_no_row_has_a_gradient():
    one = RowSpectrum(torch.zeros(2, 5))
    assert not one.values.any()
    G = torch.ones(1, 1, 5)
    assert not one.apply(G, one.power(-1.0, Damping())).any()
    assert torch.equal(one.apply(G, one.power(-1.0, Damping(0.5, "absolute"))), 2 * G)
