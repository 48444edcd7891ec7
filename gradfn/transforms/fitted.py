"""Projections that were fitted to data: onto leading eigenvectors, and onto chosen coordinates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron, Side
from gradfn.linalg.maps import Select
from gradfn.transforms.chain import BlockFn, Blockwise, Kronecker, digest
from gradfn.transforms.precondition import digest_of, spectrum_of
from gradfn.transforms.projection import quoted
from gradfn.types import BlockSpec

if TYPE_CHECKING:
    from gradfn.linalg.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class Principal(Kronecker):
    """`G -> L G Rᵀ`, L and R the leading eigenvectors of a curvature's factors; see `principal`."""

    spectra: "Mapping[str, Spectrum]" = field(repr=False)
    dims: tuple[int, int]
    path: str = ""

    def __str__(self) -> str:
        return f"pca:{self.dims[0]}x{self.dims[1]}:{quoted(self.path) or digest_of(self.spectra)}"

    strict: ClassVar[bool] = True

    def settings(self) -> dict[str, object]:
        """The projection as it is spelled, and the curvature by its digest."""
        return {"transform": "Principal", "projection": str(self), "curvature": digest_of(self.spectra)}

    def kron(self, spec: BlockSpec) -> Kron:
        """The eigenvectors of one block, strongest first; a side that is short already stays."""
        spectrum = spectrum_of(self.spectra, spec.name, spec.shape)
        if spectrum.left is None:
            raise InputError(
                f"the curvature of {spec.name} has no Kronecker factors: give one that kfac or ekfac fitted"
            )
        sides = []
        for basis, axis in ((spectrum.left, 0), (spectrum.right, 1)):
            strength = spectrum.values.sum(1 - axis)
            first = strength.argsort(descending=True, stable=True)[: self.dims[axis]]
            short = spec.shape[axis] <= self.dims[axis]
            sides.append(None if short else basis[:, first].mT.to(spec.device, spec.dtype))
        return Kron(*sides)


def principal(spectra: "Mapping[str, Spectrum]", dims: tuple[int, int], path: str = "") -> Principal:
    """Project both sides of every block onto the leading eigenvectors of a K-FAC curvature.

    `[out, in] -> [dims[0], dims[1]]`. It is not random and not unbiased: what lies outside the leading
    eigenvectors is lost, and inner products shrink by it. LogIX starts LoGra from it.

    Args:
        spectra: what `fit(kfac(), ...)` gave, for full gradients.
        dims: how many eigenvectors of the output gradients and of the inputs to keep.
        path: where the curvature was read from, for the record.

    Raises:
        InputError: dimensions below 1; when applied, a curvature of other blocks or without factors.

    >>> import torch
    >>> from gradfn.statistics.curvature import product_spectrum
    >>> H = {"mlp": product_spectrum(torch.eye(3), torch.diag(torch.tensor([1.0, 9.0])))}
    >>> principal(H, (3, 1))({"mlp": torch.tensor([[[1.0, 2.0]] * 3])})["mlp"].abs()
    tensor([[[2.],
             [2.],
             [2.]]])

    Source: LoGra, arXiv:2405.13954, section 3.1 (PCA initialisation).
    """
    if min(dims) < 1:
        raise InputError(f"a projection to {dims[0]} x {dims[1]} numbers: give 1 or more")
    return Principal(spectra, dims, path)


Chosen = Mapping[str, tuple[Tensor, ...]]
"""Coordinates by block: of the flattened block `(index,)`, or of both sides `(out, in)`."""


def _entry(chosen: Chosen, sizes: Mapping[str, tuple[int, ...]], spec: BlockSpec) -> tuple[Tensor, ...]:
    """The coordinates of one block, or why there are none."""
    if spec.name not in chosen:
        raise InputError(
            f"the mask has no block {spec.name}, it was fitted for {', '.join(sorted(chosen)[:6])}: fit it "
            "on the same layers of the same model"
        )
    if tuple(sizes[spec.name]) != tuple(spec.shape):
        there, here = (" x ".join(map(str, shape)) for shape in (sizes[spec.name], spec.shape))
        raise InputError(
            f"the mask of {spec.name} was fitted for a block of {there}, and this one has {here}: fit it on "
            "the same model"
        )
    return chosen[spec.name]


@dataclass(frozen=True, eq=False)
class _Selected:
    chosen: Chosen = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    path: str = ""

    def _digest(self) -> str:
        return digest(
            {f"{n}/{i}": index for n, parts in self.chosen.items() for i, index in enumerate(parts)}
        )

    def __str__(self) -> str:
        return f"selective:{quoted(self.path) or self._digest()}"

    def settings(self) -> dict[str, object]:
        """The projection as it is spelled, and the coordinates by their digest."""
        return {"transform": "Selected", "projection": str(self), "mask": self._digest()}


class SelectedSides(_Selected, Kronecker):
    """Chosen coordinates of both sides of every block; see `selected`."""

    def kron(self, spec: BlockSpec) -> Kron:
        """The selections of one block."""
        parts = _entry(self.chosen, self.shapes, spec)
        return Kron(*(_select(index, dim) for index, dim in zip(parts, spec.shape, strict=True)))


class SelectedFlat(_Selected, Blockwise):
    """Chosen coordinates of every flattened block, `[rows, 1, k]`; see `selected`."""

    linear: ClassVar[bool] = True

    def bind(self, spec: BlockSpec) -> BlockFn:
        """The selection of one block."""
        (index,) = _entry(self.chosen, self.shapes, spec)
        select = Select(index.to(spec.device), prod(spec.shape))
        return lambda G: select(G.flatten(1))[:, None]


def _select(index: Tensor, dim: int) -> Side:
    return None if len(index) == dim else Select(index, dim)


def selected(
    chosen: Chosen, shapes: Mapping[str, Sequence[int]], path: str = ""
) -> SelectedSides | SelectedFlat:
    """Keep chosen coordinates of every block, unscaled: `gradfn.fit_mask` chooses them.

    Args:
        chosen: `{block: (index,)}` for coordinates of flattened blocks, `{block: (out, in)}` for both sides.
        shapes: the blocks' shapes `(out, in)` that they were chosen for.
        path: where they were read from, for the record.

    Raises:
        InputError: when applied, blocks of other names or shapes.

    >>> import torch
    >>> keep = selected({"mlp": (torch.tensor([0]), torch.tensor([1, 2]))}, {"mlp": (2, 3)})
    >>> keep({"mlp": torch.arange(6.0).view(1, 2, 3)})["mlp"]
    tensor([[[1., 2.]]])

    Source: GraSS, arXiv:2505.18976, section 3.2 (selective mask).
    """
    of = {name: tuple(shape) for name, shape in shapes.items()}
    sides = any(len(parts) == 2 for parts in chosen.values())
    return SelectedSides(chosen, of, path) if sides else SelectedFlat(chosen, of, path)
