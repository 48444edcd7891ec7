"""K-FAC, its trace-restricted variant, and EK-FAC: curvatures from the factors of gradients."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gradfn.errors import InputError
from gradfn.linalg.spectrum import Solved, Spectrum
from gradfn.statistics.curvature import Curvature, decomposed, product_spectrum
from gradfn.statistics.fold import Additive, FoldState, refuse_empty
from gradfn.statistics.moments import square_sum
from gradfn.transforms import Transform, chain
from gradfn.transforms.precondition import Rotate
from gradfn.transforms.row_sum import FactorSum, RowSum
from gradfn.watch import watched


def _weighted_covariance(v: Tensor, weights: Tensor) -> Tensor:
    """`sum_bt w_bt v_bt v_btᵀ` of `v [rows, tokens, dim]`; positions of weight 0 are left out."""
    counted = weights > 0
    flat, w = v[counted], weights[counted]
    return flat.mT @ (flat if bool((w == 1).all()) else flat * w[:, None])


def _covariances(x: Tensor, g: Tensor, counts: Tensor) -> Tensor:
    """The sums of `g gᵀ` and `x xᵀ`, and the number of positions, one after the other."""
    parts = _weighted_covariance(g, counts), _weighted_covariance(x, counts), counts.sum()
    return torch.cat([part.flatten() for part in parts])


def _traced_covariances(x: Tensor, g: Tensor, counts: Tensor) -> Tensor:
    """The sums over examples of `tr(A_b)/T_b S_b`, `tr(S_b)/T_b A_b`, `tr(A_b) tr(S_b) / T_b` and `T_b`."""
    tokens = counts.sum(1).clamp_min(1)
    a, s = ((v.square().sum(-1) * counts).sum(1) for v in (x, g))
    left = _weighted_covariance(g, counts * (a / tokens)[:, None])
    right = _weighted_covariance(x, counts * (s / tokens)[:, None])
    numbers = (a * s / tokens).sum(), counts.sum()
    return torch.cat([left.flatten(), right.flatten(), torch.stack(numbers)])


def _parts(sums: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The left sums `[out, out]`, the right ones `[in, in]`, and the number after them."""
    out, into = shape[-2:]
    left, right, rest = sums.split([out * out, into * into, len(sums) - out * out - into * into])
    return left.view(out, out), right.view(into, into), rest[0]


def kfac_factors(sums: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`S = E[g gᵀ]` and `A = E[x xᵀ]` over the supervised positions, from a block's sums."""
    S, A, positions = _parts(sums, shape)
    return S / positions, A / positions


def _kfac_spectrum(sums: Tensor, shape: tuple[int, ...], rows: int, solve: Solved) -> Spectrum:
    """`F ~ (positions / rows) S ⊗ A`: an example's gradient is a sum over its positions."""
    S, A, positions = _parts(sums, shape)
    return product_spectrum(S, A, scales=(1 / rows, 1 / positions), solve=solve)


def _tkfac_spectrum(sums: Tensor, shape: tuple[int, ...], rows: int, solve: Solved) -> Spectrum:
    left, right, both = _parts(sums, shape)
    scale = 1 / both if both > 0 else torch.zeros_like(both)
    return product_spectrum(left, right, scales=(scale / rows, 1.0), solve=solve)


def _refuse_idle(state: FoldState) -> None:
    """Refuse blocks without a supervised position."""
    idle = [name for name, sums in state.blocks.items() if not sums[-1] > 0]
    if len(idle) == len(state.blocks):
        raise InputError(f"no position of {idle[0]} is supervised: give examples with labels")
    if idle:
        raise InputError(
            f"{idle[0]} takes no part in the losses of these examples, so it has no curvature: exclude it "
            "from the view"
        )


def _corrected(basis: Spectrum, values: Tensor) -> Spectrum:
    """The basis with measured eigenvalues, 0 where these are rounding of the coordinates they are squares of.

    Where the basis has eigenvalues of 0 its vectors are rounding themselves, tilted towards the others. What
    is above a thousandth of the mean stays: of wide layers the largest is 100,000 times the mean.
    """
    eps, mean = torch.finfo(basis.right.dtype).eps, values.mean()
    squared, tilted = values.numel() * eps**2 * values.max(), values.numel() * eps * mean
    rounding = torch.where(basis.values > 0, squared, tilted).clamp_max(1e-3 * mean)
    return Spectrum(basis.left, basis.right, torch.where(values > rounding, values, 0.0))


@dataclass(frozen=True)
class Factored(Additive[Curvature]):
    """A curvature that is a product of two factors; see `kfac` and `tkfac`."""

    kind: str = "kfac"

    accumulator = torch.float32

    gives_curvature = True

    def stage(self) -> Transform:
        """The covariances of both factors."""
        return FactorSum(_covariances if self.kind == "kfac" else _traced_covariances, self.kind)

    def finalize(self, state: FoldState) -> Curvature:
        """Divide and decompose, block by block."""
        refuse_empty(state)
        spectrum, solve = (_kfac_spectrum if self.kind == "kfac" else _tkfac_spectrum), Solved()
        _refuse_idle(state)
        count, shapes, blocks = state.count, state.shapes, dict(state.blocks)
        del state  # so that each sum is freed after its spectrum is made
        spectra = {
            name: decomposed(name, spectrum, blocks.pop(name), shapes[name], count, solve)
            for name in watched("decompositions", list(blocks), "blocks", timed=False)
        }
        return Curvature(self.kind, spectra, count)


def kfac() -> Factored:
    """Fit K-FAC, `F ~ (T/N) S ⊗ A`, over the T supervised positions of N rows.

    `A = E[x xᵀ]` and `S = E[g gᵀ]`, where `x` is the layer's input (with a 1 for the bias) and `g` its output
    gradient. The pass holds `out² + in²` numbers for a block `[out, in]`.

    Raises:
        InputError: when fitted, for a layer that is neither linear nor convolutional, or after transforms
            other than projections.

    >>> fold = kfac()
    >>> x, g, counts = torch.ones(5, 1, 2), torch.ones(5, 1, 1), torch.ones(5, 1)
    >>> state = FoldState(5, {"mlp": fold.stage().of(x, g, counts)}, {"mlp": (1, 2)})
    >>> fold.finalize(state)["mlp"].dense().round()
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)

    Source: Martens and Grosse, arXiv:1503.05671, section 3; positions: the expand setting of Eschenhagen et
    al., arXiv:2311.00636, section 3.
    """
    return Factored("kfac")


def tkfac() -> Factored:
    """Fit trace-restricted K-FAC, `F ~ Psi ⊗ Phi / E[tr(A_b) tr(S_b) / T_b]`.

    Its trace is `E[tr(A_b) tr(S_b) / T_b]`, which is the Fisher matrix's where an example has one position.
    With `A_b = sum_t x xᵀ` and `S_b = sum_t g gᵀ` over the `T_b` supervised positions of an example:
    `Phi = E_b[tr(S_b) A_b / T_b]`, `Psi = E_b[tr(A_b) S_b / T_b]`.

    Raises:
        InputError: see `kfac`.

    >>> tkfac()
    Factored(kind='tkfac')

    Source: Gao et al., arXiv:2011.13609, section 3.
    """
    return Factored("tkfac")


@dataclass(frozen=True, eq=False)
class Corrected(Additive[Curvature]):
    """Eigenvalues measured in a given eigenbasis: `lambda = E_b[(Q_lᵀ G_b Q_r)²]`.

    Args:
        basis: whose eigenvectors are taken.
        kind: what to call the result.
    """

    basis: Curvature = field(repr=False)
    kind: str = "ekfac"

    def stage(self) -> Transform:
        """The squares of the rotated gradients."""
        return chain(Rotate(self.basis), RowSum(square_sum))

    def finalize(self, state: FoldState) -> Curvature:
        """The basis with the measured eigenvalues."""
        refuse_empty(state)
        spectra = {
            name: _corrected(one, (state.blocks[name] / state.count).to(one.values))
            for name, one in self.basis.items()
        }
        return Curvature(self.kind, spectra, state.count)


@dataclass(frozen=True)
class EKFAC:
    """K-FAC's eigenbasis, then the eigenvalues of the gradients in it: two passes; see `ekfac`."""

    first: Factored = field(default_factory=kfac)
    gives_curvature: ClassVar[bool] = True

    def then(self, fitted: Curvature) -> Corrected:
        """The second pass."""
        return Corrected(fitted)


def ekfac() -> EKFAC:
    """Fit EK-FAC: the eigenvectors of K-FAC, and `lambda = E_b[(Q_lᵀ G_b Q_r)²]` from a second pass.

    `G_b` is the example's whole gradient: the sum over its positions, then squared.

    Raises:
        InputError: see `kfac`.

    >>> ekfac().first
    Factored(kind='kfac')

    Source: George et al., arXiv:1806.03884, section 3; Grosse et al., arXiv:2308.03296, section 2.2.
    """
    return EKFAC()
