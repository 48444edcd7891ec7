"""Multiplication by a power of a curvature, `H^-1 g` and `H^-1/2 g`."""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.transforms.chain import Blockwise, Kronecker, Transform
from gradfn.types import BlockSpec

if TYPE_CHECKING:
    from collections.abc import Mapping


def spectrum_of(spectra: "Mapping[str, Spectrum]", name: str, shape: tuple[int, int]) -> Spectrum:
    """The spectrum of one block, or why there is none.

    Raises:
        InputError: no such block, or a block of another shape.
    """
    if name not in spectra:
        raise InputError(
            f"no curvature for {name}: it was fitted for {', '.join(sorted(spectra)[:6])}; fit it on all "
            "layers that are scored"
        )
    spectrum = spectra[name]
    width, size = spectrum.values.shape[-1], shape[0] * shape[1]
    fits = width == size if spectrum.left is None else (len(spectrum.left), width) == shape
    if not fits:
        there = str(width) if spectrum.left is None else f"{len(spectrum.left)} x {width}"
        raise InputError(
            f"the curvature of {name} is for {there} numbers, its gradient has {shape[0]} x {shape[1]}: "
            "fit it on the same model with the same projection"
        )
    return spectrum


def digest_of(spectra: "Mapping[str, Spectrum]") -> str:
    """What tells two curvatures apart: a hash of the eigenvalues and eigenvectors."""
    known = getattr(spectra, "digest", None)
    if isinstance(known, str):
        return known
    hash_ = sha256()
    for name, one in spectra.items():
        hash_.update(name.encode())
        for part in (one.left, one.right, one.values):
            if part is not None:
                hash_.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hash_.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Rotate(Kronecker):
    """`G -> Q_lᵀ G Q_r` for blocks with Kronecker structure; others stay. `back` undoes it."""

    spectra: "Mapping[str, Spectrum]" = field(repr=False)
    back: bool = False

    def kron(self, spec: BlockSpec) -> Kron:
        """The two rotations of one block."""
        spectrum = spectrum_of(self.spectra, spec.name, spec.shape)
        if spectrum.left is None:
            return Kron()
        sides = [Q.to(spec.device, spec.dtype) for Q in (spectrum.left, spectrum.right)]
        return Kron(*(sides if self.back else [Q.mT for Q in sides]))


@dataclass(frozen=True, eq=False)
class RotateFlat(Blockwise):
    """`vec(G) -> Qᵀ vec(G)`, `[rows, 1, out in]`, for blocks without Kronecker structure; others stay."""

    spectra: "Mapping[str, Spectrum]" = field(repr=False)
    linear = True

    def block(self, name: str, G: Tensor) -> Tensor:
        """Rotate one block, if its curvature is dense."""
        spectrum = spectrum_of(self.spectra, name, (G.shape[-2], G.shape[-1]))
        return spectrum.into(G) if spectrum.left is None else G


@dataclass(frozen=True, eq=False)
class _Weigh(Blockwise):
    """Between the rotations: multiply by the filtered eigenvalues; dense blocks go there and back at once."""

    whole: "Precondition"
    linear = True

    def block(self, name: str, G: Tensor) -> Tensor:
        spectrum = self.whole.spectra[name]
        return self.whole.block(name, G) if spectrum.left is None else G * self.whole.weights[name].to(G)


@dataclass(frozen=True, eq=False, repr=False)
class Precondition(Blockwise):
    """`g -> H^power g` in every block; see `precondition`."""

    spectra: "Mapping[str, Spectrum]" = field(repr=False)
    exponent: float = -1.0
    damping: Damping | None = field(default_factory=Damping)
    linear = True

    def __repr__(self) -> str:
        damping = "no damping" if self.damping is None else f"damping {self.damping}"
        return f"H^{self.exponent:g} ({damping})"

    def settings(self) -> dict[str, object]:
        """The curvature by its digest, the power and the damping."""
        damping = None if self.damping is None else str(self.damping)
        return {"transform": "Precondition", "curvature": digest_of(self.spectra), "power": self.exponent,
                "damping": damping}  # fmt: skip

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The filtered eigenvalues of every block."""
        return {name: one.power(self.exponent, self.damping) for name, one in self.spectra.items()}

    def block(self, name: str, G: Float[Tensor, "rows out in"]) -> Float[Tensor, "rows out in"]:
        """Into the eigenbasis, times the filtered eigenvalues, and back."""
        return spectrum_of(self.spectra, name, (G.shape[-2], G.shape[-1])).apply(G, self.weights[name])

    def stages(self) -> tuple[Transform, ...]:
        """The same in three stages, of which the first acts on factors."""
        return Rotate(self.spectra), _Weigh(self), Rotate(self.spectra, back=True)


def precondition(
    spectra: "Mapping[str, Spectrum]", power: float = -1.0, damping: Damping | float | None = 0.1
) -> Precondition:
    """Multiply by a power of the curvature, `vec(G) -> H^power vec(G)`, block by block.

    An inner product wants `H^-1` on the query alone; a cosine wants `H^-1/2` on both sides.

    Args:
        spectra: a fitted curvature's spectra, `{block: Spectrum}`.
        power: -1 or -1/2.
        damping: a number c adds `c mean(lambda)`; see `Damping` for the other kinds; None is the
            pseudo-inverse.

    Raises:
        InputError: when applied, for a block without a curvature or of another shape.

    >>> import torch
    >>> H = {"mlp": Spectrum(None, torch.eye(2), torch.tensor([[1.0, 4.0]], dtype=torch.float64))}
    >>> precondition(H, -0.5, None)({"mlp": torch.ones(1, 1, 2)})["mlp"]
    tensor([[[1.0000, 0.5000]]])

    Source: Koh and Liang, arXiv:1703.04730, section 2.
    """
    if isinstance(damping, int | float):
        damping = Damping(float(damping))
    return Precondition(spectra, power, damping)
