"""Second moments of fewer rows than numbers, by the matrix of the rows' inner products."""

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.linalg.spectrum import Spectrum, eigh_float64, without_rounding
from gradfn.memory import check_memory


class RowSpectrum(Spectrum):
    """`H = 1/n Fᵀ F` of rows `F [n, d]` with `n < d`: the `Spectrum` of the same matrix, from the n x n one.

    With `1/n F Fᵀ = U diag(lambda) Uᵀ`, a function of H is

        f(H) = f(0) I + Fᵀ U diag((f(lambda) - f(0)) / (n lambda)) Uᵀ F

    over the eigenvalues that are not 0, so `apply` needs no eigenvector of H. These, and a basis of the space
    where H is zero, are made when `right` is first asked for.

    Args:
        rows: `F`, one flattened block of every row.

    >>> rows = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64)
    >>> H = RowSpectrum(rows)
    >>> H.values
    tensor([[0., 0., 9.]], dtype=torch.float64)
    >>> H.apply(rows[:, None], H.power(-1.0)) * 9
    tensor([[[1., 2., 2.]]], dtype=torch.float64)

    Source: Woodbury's identity; Golub and Van Loan, Matrix Computations, section 2.1.4.
    """

    def __init__(self, rows: Float[Tensor, "n d"]) -> None:
        n, d = rows.shape
        wide = rows.double()
        solved, U = eigh_float64(wide @ wide.mT / n)
        found = without_rounding(solved, rows.dtype)
        live = found > 0
        values = torch.cat([found.new_zeros(d - int(live.sum())), found[live]])
        self.__dict__.update(
            left=None, values=values[None], sides=None, rows=rows, combinations=U[:, live].contiguous()
        )

    rows: Tensor
    combinations: Tensor
    """The columns of U whose eigenvalues are not 0."""

    @cached_property
    def right(self) -> Float[Tensor, "d d"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The eigenvectors of H, and first an orthonormal basis of what is orthogonal to them."""
        d = self.rows.shape[1]
        check_memory(
            32 * d * d, f"the eigenvectors of {d:,} numbers", "project the gradients", self.rows.device
        )
        span = self.rows.double().mT @ self.combinations
        scaled = (span / span.norm(dim=0)).flip(1)  # the largest first, for theirs are the most accurate
        return torch.linalg.qr(scaled, mode="complete").Q.flip(1).to(self.rows.dtype).contiguous()

    def apply(self, G: Float[Tensor, "k out in"], weights: Tensor) -> Float[Tensor, "k out in"]:
        """See `Spectrum`; the weights of eigenvalues of 0 are equal, being a function of them."""
        flat, weights = G.flatten(1).double(), weights.flatten().to(G.device, torch.float64)
        F, U = self.rows.to(flat), self.combinations.to(flat)
        zero, live = weights[0], weights[len(weights) - U.shape[1] :]
        scales = (live - zero) / (len(F) * self.values[0, len(weights) - U.shape[1] :].to(live))
        return (zero * flat + ((flat @ F.mT @ U) * scales) @ U.mT @ F).to(G.dtype).view_as(G)

    def filtered(self, function: Callable[[Tensor], Tensor]) -> Spectrum:
        """See `Spectrum`."""
        return Spectrum(None, self.right, function(self.values))
