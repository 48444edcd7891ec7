"""A curvature that was fitted over data: one spectrum a block."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from gradfn.errors import InputError
from gradfn.linalg.spectrum import Spectrum, eigh
from gradfn.statistics.fold import coarser
from gradfn.transforms.precondition import digest_of
from gradfn.watch import watched


@dataclass(frozen=True, eq=False, repr=False)
class Curvature(Mapping[str, Spectrum]):
    """`H` of every block, `{block: Spectrum}`, and how it was fitted.

    Args:
        kind: "second_moment", "kfac", "ekfac", "shampoo", "eshampoo" or "tkfac".
        spectra: the eigenbasis and eigenvalues of every block.
        rows: the number of examples that it was fitted over.
    """

    kind: str
    spectra: dict[str, Spectrum]
    rows: int

    def __getitem__(self, name: str) -> Spectrum:
        return self.spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.spectra)

    def __len__(self) -> int:
        return len(self.spectra)

    def __repr__(self) -> str:
        return f"Curvature(kind={self.kind!r}, blocks={len(self)}, rows={self.rows}, digest={self.digest!r})"

    @cached_property
    def digest(self) -> str:
        """A hash of the eigenvalues and eigenvectors."""
        return digest_of(self.spectra)


def mix(a: Curvature, b: Curvature, coefficient: float) -> Curvature:
    """Mix two curvatures of the same blocks, `H = coefficient * H_a + (1 - coefficient) * H_b`.

    Curvatures with Kronecker factors mix factor by factor. With weights in proportion to their rows, all
    with equally many positions, the result is the fit over both data sets.

    Args:
        a, b: curvatures of one kind (second_moment, kfac).
        coefficient: the weight of `a`, between 0 and 1.

    Raises:
        InputError: different blocks or kinds, or curvatures that have a basis of their own (ekfac).

    >>> H = Curvature("second_moment", {"mlp": Spectrum(None, torch.eye(1), torch.ones(1, 1))}, 5)
    >>> mix(H, H, 0.25)["mlp"].values
    tensor([[1.]], dtype=torch.float64)

    Source: TrackStar, arXiv:2410.17413, appendix A.1.3.
    """
    if not 0 <= coefficient <= 1:
        raise InputError(f"a mixing coefficient must be between 0 and 1, not {coefficient}")
    if (a.kind, list(a)) != (b.kind, list(b)):
        raise InputError(
            f"{a.kind} of {len(a)} blocks and {b.kind} of {len(b)} blocks do not mix: fit both alike"
        )
    if a.kind not in ("second_moment", "kfac"):
        raise InputError(
            f"two {a.kind} curvatures have two eigenbases and do not mix: fit one over both data sets"
        )
    names = watched("decompositions of the mix", a, "blocks", timed=False)
    spectra = {name: _mixed(a[name], b[name], coefficient) for name in names}
    return Curvature(a.kind, spectra, a.rows + b.rows)


def _mixed(a: Spectrum, b: Spectrum, weight: float) -> Spectrum:
    if a.right.shape != b.right.shape:
        raise InputError("curvatures of different shapes do not mix: fit both with the same projection")
    dtype = coarser(a.right.dtype, b.right.dtype)
    if a.left is None or b.left is None or a.sides is None or b.sides is None:
        return dense_spectrum(weight * a.dense() + (1 - weight) * b.dense(), dtype)
    left = weight * _side(a.left, a.sides[0]) + (1 - weight) * _side(b.left, b.sides[0])
    right = weight * _side(a.right, a.sides[1]) + (1 - weight) * _side(b.right, b.sides[1])
    return product_spectrum(left, right, dtype=dtype)


def _side(basis: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (basis.double() * values) @ basis.double().mT


def decomposed(name: str, spectrum: Callable[..., Spectrum], *sums: Any) -> Spectrum:
    """The spectrum of one block, `spectrum(*sums)`.

    Raises:
        InputError: its eigenvalues do not converge; the block is named.

    >>> decomposed("mlp", dense_spectrum, torch.eye(1)).values
    tensor([[1.]], dtype=torch.float64)
    """
    try:
        return spectrum(*sums)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise InputError(
            f"the eigenvalues of the curvature of {name} do not converge: exclude that layer from the view, "
            "compute in float64, or project the gradients to fewer numbers"
        ) from error


def dense_spectrum(matrix: torch.Tensor, dtype: torch.dtype | None = None) -> Spectrum:
    """The spectrum of a matrix on the flattened block.

    Args:
        dtype: see `eigh`.

    >>> dense_spectrum(torch.eye(2)).values
    tensor([[1., 1.]], dtype=torch.float64)
    """
    values, vectors = eigh(matrix, dtype)
    return Spectrum(None, vectors, values[None])


def product_spectrum(
    left: torch.Tensor,
    right: torch.Tensor,
    exponent: float = 1.0,
    *,
    scales: tuple[float | torch.Tensor, float | torch.Tensor] = (1.0, 1.0),
    solve: Callable[..., Any] = eigh,
    dtype: torch.dtype | None = None,
) -> Spectrum:
    """The spectrum of `(c_l left)^exponent ⊗ (c_r right)^exponent`.

    Args:
        scales: `c_l` and `c_r`; eigenvalues are scaled rather than matrices, of which no copy is made.
        solve: the function that gives the spectrum of the right one, like `eigh`.
        dtype: see `eigh`.

    >>> product_spectrum(2 * torch.eye(1), 3 * torch.eye(2), scales=(0.5, 1.0)).values
    tensor([[3., 3.]], dtype=torch.float64)
    """
    (s, Q_l), (a, Q_r) = eigh(left, dtype), solve(right, dtype)
    s, a = (s * scales[0]).pow(exponent), (a * scales[1]).pow(exponent)
    return Spectrum(Q_l, Q_r, s[:, None] * a, (s, a))


def mixing_coefficient(query: Curvature, train: Curvature, components: int = 1000) -> float:
    """TrackStar's weight of the query's curvature: `s_train[k] / (s_query[k] + s_train[k])`.

    `s` are the eigenvalues of all blocks, largest first. k is the number of directions that are common to the
    queries and should count less.

    Args:
        query, train: curvatures of the same blocks.
        components: k; with fewer eigenvalues than k, the last one is used.

    Returns:
        A number between 0 and 1. It is 1 if only the k-th eigenvalue of the queries is 0 (they have fewer
        directions than k, and all of these should count less), and 0.5 if that of the rows is 0 too.

    >>> one = Curvature("second_moment", {"mlp": Spectrum(None, torch.eye(1), torch.ones(1, 1))}, 5)
    >>> mixing_coefficient(one, one)
    0.5

    Source: TrackStar, arXiv:2410.17413, appendix A.1.3.
    """
    if components < 1:
        raise InputError(f"`components` must be 1 or more, not {components}")
    if list(query) != list(train):
        raise InputError(
            "curvatures of different blocks have no common mixing coefficient: fit both over the same layers"
        )
    s_query, s_train = (
        torch.cat([spectrum.values.flatten() for spectrum in side.values()]).sort(descending=True).values
        for side in (query, train)
    )
    at = min(components, len(s_query), len(s_train)) - 1
    q, t = float(s_query[at]), float(s_train[at])
    return t / (q + t) if q + t > 0 else 0.5
