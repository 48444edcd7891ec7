"""Shampoo's curvature, from the rows and columns of every example's gradient, and EShampoo's."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gradfn.statistics.curvature import Curvature, decomposed, product_spectrum
from gradfn.statistics.fold import Additive, FoldState, refuse_empty
from gradfn.statistics.kfac import Corrected
from gradfn.transforms import Transform
from gradfn.transforms.row_sum import RowSum
from gradfn.watch import watched


def _grams(name: str, G: Tensor) -> Tensor:
    """`sum_b G_b G_bᵀ` and `sum_b G_bᵀ G_b`, one after the other in one vector."""
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    across, down = G.movedim(0, 1).flatten(1), G.flatten(0, 1)
    return torch.cat([(across @ across.mT).flatten(), (down.mT @ down).flatten()])


@dataclass(frozen=True)
class Shampoo(Additive[Curvature]):
    """`H ~ E_b[G_b G_bᵀ]^1/2 ⊗ E_b[G_bᵀ G_b]^1/2`; see `shampoo`."""

    gives_curvature = True

    def stage(self) -> Transform:
        """Both Gram matrices of the rows."""
        return RowSum(_grams)

    def finalize(self, state: FoldState) -> Curvature:
        """Divide and decompose, block by block."""
        refuse_empty(state)
        spectra = {}
        for name in watched("decompositions", state.blocks, "blocks", timed=False):
            out, into = state.shapes[name][-2:]
            left, right = state.blocks[name].split([out * out, into * into])
            scales = 1 / state.count, 1 / state.count
            whole = partial(product_spectrum, exponent=0.5, scales=scales, dtype=state.dtype)
            spectra[name] = decomposed(name, whole, left.view(out, out), right.view(into, into))
        return Curvature("shampoo", spectra, state.count)


def shampoo() -> Shampoo:
    """Fit Shampoo's curvature, `H ~ E_b[G_b G_bᵀ]^1/2 ⊗ E_b[G_bᵀ G_b]^1/2`, of every example's own gradient.

    >>> fold = shampoo()
    >>> fold.finalize(fold.update(fold.init(), {"mlp": torch.tensor([[[3.0]]])}))["mlp"].values.round()
    tensor([[9.]], dtype=torch.float64)

    Source: Gupta et al., arXiv:1802.09568, section 3.
    """
    return Shampoo()


@dataclass(frozen=True)
class EShampoo:
    """Shampoo's eigenbasis, then the eigenvalues of the gradients in it: two passes; see `eshampoo`."""

    first: Shampoo = field(default_factory=shampoo)
    gives_curvature: ClassVar[bool] = True

    def then(self, fitted: Curvature) -> Corrected:
        """The second pass."""
        return Corrected(fitted, "eshampoo")


def eshampoo() -> EShampoo:
    """Fit eigenvalue-corrected Shampoo: `Q diag(lambda) Qᵀ`, `lambda = E_b[(Q_lᵀ G_b Q_r)²]`.

    `Q_l` and `Q_r` are the eigenvectors of `E_b[G_b G_bᵀ]` and of `E_b[G_bᵀ G_b]`, and the eigenvalues come
    from a second pass, as EK-FAC's do. The trace is that of `F = E_b[vec(G_b) vec(G_b)ᵀ]`, and no matrix with
    these eigenvectors is nearer to F.

    >>> eshampoo().first
    Shampoo()

    Source: SOAP: Vyas et al., arXiv:2409.11321, section 4; Eschenhagen et al., arXiv:2506.03595.
    """
    return EShampoo()
