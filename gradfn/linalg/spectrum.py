"""Symmetric positive semidefinite curvatures in their eigenbasis: powers, damping, filters.

A curvature is eigendecomposed once, `H = Q diag(lambda) Qᵀ`; every power and every damping is then an
elementwise function of `lambda`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError

DampingKind = Literal["relative", "absolute", "truncated", "tikhonov", "factored"]


@dataclass(frozen=True)
class Damping:
    """How the inverse of small eigenvalues is bounded, with `m = mean(lambda)` over the block:

    * relative: `1 / (lambda + c m)`, the default with c = 0.1;
    * absolute: `1 / (lambda + c)`;
    * truncated: `1 / lambda` where `lambda > c m`, else 0, the pseudo-inverse;
    * tikhonov: `lambda / (lambda² + (c m)²)`;
    * factored: `1 / ((a + pi sqrt(c m)) (s + sqrt(c m) / pi))` with `pi² = mean(a) / mean(s)`, for
      curvatures whose eigenvalues are products `lambda = s a`.

    Other powers than -1 are powers of these.

    >>> str(Damping(0.1)), str(Damping(1e-6, "truncated"))
    ('0.1', 'truncated:1e-06')

    Source: factored: Martens and Grosse, arXiv:1503.05671, section 6.3.
    """

    value: float = 0.1
    kind: DampingKind = "relative"

    def __post_init__(self):
        if self.kind not in get_args(DampingKind):
            raise InputError(f"no damping {self.kind!r}: choose {', '.join(get_args(DampingKind))}")
        if not (isfinite(self.value) and self.value >= 0):
            raise InputError(f"a damping must be a number of 0 or more, not {self.value}")
        if 0 < self.value < 1e-30:
            raise InputError(f"a damping of {self.value:g} is lost in float32: give 0, or 1e-30 or more")

    def __str__(self) -> str:
        return f"{self.value:g}" if self.kind == "relative" else f"{self.kind}:{self.value:g}"


def parse_dampings(text: str) -> tuple[Damping, ...]:
    """Read dampings from text: `0.1`, `absolute:1e-3`, or several with commas.

    Raises:
        InputError: not a number, no such kind, or the same damping twice.

    >>> parse_dampings("0.01, truncated:1e-6")
    (Damping(value=0.01, kind='relative'), Damping(value=1e-06, kind='truncated'))
    """
    dampings = tuple(_parse_one(part.strip()) for part in text.split(","))
    if len(set(dampings)) < len(dampings):
        raise InputError(f"{text!r} has the same damping twice: give each once")
    return dampings


def _parse_one(text: str) -> Damping:
    kind, colon, value = text.rpartition(":")
    kinds = get_args(DampingKind)
    if colon and kind not in kinds:
        raise InputError(f"no damping {kind!r}: choose {', '.join(kinds)}")
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"{text!r} is not a damping: give one like 0.1 or absolute:1e-3") from None
    return Damping(number, kind if colon else "relative")  # pyright: ignore[reportArgumentType]


def eigh(
    matrix: Float[Tensor, "n n"], dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
    """Eigenvalues (float64, rounding set to 0) and eigenvectors of a symmetric positive semidefinite matrix.

    The lower triangle is decomposed in float64. Eigenvalues that are rounding errors are set to 0, for their
    inverses would be arbitrary: below `n` epsilon of the largest they are errors of the decomposition, below
    epsilon of their sum (in the dtype of the terms of the matrix) they are errors of the matrix itself.

    Args:
        dtype: the dtype of the terms, if the matrix is their sum in a wider one; the vectors are returned in
            it. None is the dtype of the matrix.

    >>> eigh(torch.diag(torch.tensor([2.0, 1.0])))[0]
    tensor([1., 2.], dtype=torch.float64)
    >>> eigh(torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64)), torch.float32)[0]
    tensor([0., 1.], dtype=torch.float64)
    """
    dtype = dtype or matrix.dtype
    values, vectors = eigh_float64(matrix)
    return without_rounding(values, dtype), vectors.to(dtype).contiguous()


def without_rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues with those that are rounding set to 0, see `eigh`.

    >>> without_rounding(torch.tensor([1e-9, 1.0], dtype=torch.float64), torch.float32)
    tensor([0., 1.], dtype=torch.float64)
    """
    solved = len(values) * torch.finfo(values.dtype).eps * values.amax()
    # Not n epsilon of the largest: for wide layers in float32 that is more than the mean and its damping.
    summed = torch.finfo(dtype).eps * values.sum()
    return torch.where(values > torch.maximum(solved, summed), values, 0.0)


class Solved:
    """`eigh` that remembers the last matrix: an equal one is not decomposed again.

    Layers with the same input (queries, keys and values; gate and up) have the same covariance of inputs.

    >>> solve = Solved()
    >>> solve(torch.eye(2))[1] is solve(torch.eye(2))[1]
    True
    """

    def __init__(self):
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __call__(
        self, matrix: Float[Tensor, "n n"], dtype: torch.dtype | None = None
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n n"]]:
        if self._last is None or not torch.equal(self._last[0], matrix):
            self._last = None  # frees a large matrix
            self._last = matrix, eigh(matrix, dtype)
        return self._last[1]


def eigh_float64(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[n]` as they come, ascending, and eigenvectors `[n, n]`, both float64.

    Rows and columns of zeros, with which LAPACK may fail, are left out of the decomposition.

    >>> eigh_float64(torch.diag(torch.tensor([2.0, 0.0])))[0]
    tensor([0., 2.], dtype=torch.float64)
    """
    live = matrix.any(0)
    if bool(live.all()):
        return _lapack(matrix)
    dead = int((~live).sum())
    values, vectors = (
        matrix.new_zeros(*size, dtype=torch.float64) for size in (matrix.shape[:1], matrix.shape)
    )
    vectors[(~live).nonzero().squeeze(1), torch.arange(dead, device=live.device)] = 1.0
    if dead < len(matrix):
        values[dead:], part = _lapack(matrix[live][:, live])
        vectors[live, dead:] = part
    return values, vectors


def _lapack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` in float64, with one copy of the matrix, in whose memory the vectors are returned.

    LAPACK reads by columns and overwrites its input, so a transposed view of the copy saves a second one.
    """
    own = matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format).mT
    return torch.linalg.eigh(own, "U", out=(own.new_empty(0), own))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """One block's curvature in its eigenbasis, acting on `G [out, in]` as `Q_l ((Q_lᵀ G Q_r) * lambda) Q_rᵀ`.

    A curvature without Kronecker structure acts on the flattened block: `left` is None, `right` is
    `[out in, out in]` and the values are `[1, out in]`.

    Args:
        left: `Q_l [out, out]`, or None.
        right: `Q_r [in, in]`.
        values: the eigenvalues, `[out, in]`, float64.
        sides: the eigenvalues of both Kronecker factors, `s [out]` and `a [in]`, where the values are their
            products `s aᵀ`; None where they were corrected or are not products.
    """

    left: Tensor | None
    right: Tensor
    values: Tensor
    sides: tuple[Tensor, Tensor] | None = None

    def power(self, exponent: float, damping: Damping | None = None) -> Float[Tensor, "out in"]:
        """A power of the damped eigenvalues. An eigenvalue that is still 0 gives 0, as in a pseudo-inverse.

        Args:
            exponent: such as -1 or -1/2.
            damping: None is no damping, which for negative powers is a pseudo-inverse.

        Raises:
            InputError: factored damping of eigenvalues that are not products.

        >>> spectrum = Spectrum(None, torch.eye(2), torch.tensor([[4.0, 0.0]], dtype=torch.float64))
        >>> spectrum.power(-0.5)
        tensor([[0.5000, 0.0000]], dtype=torch.float64)
        """
        inverse = _pseudo_inverse(self.values) if damping is None else self._damped_inverse(damping)
        return torch.where(inverse > 0, inverse.clamp_min(1e-300).pow(-exponent), 0.0)

    def _damped_inverse(self, damping: Damping) -> Tensor:
        values, c = self.values, damping.value
        scaled = c * values.mean()
        match damping.kind:
            case "relative":
                return _pseudo_inverse(values + scaled)
            case "absolute":
                return _pseudo_inverse(values + c)
            case "truncated":
                return torch.where(values > scaled, _pseudo_inverse(values), 0.0)
            case "tikhonov":
                return values * _pseudo_inverse(values.square() + scaled.square())
        if self.sides is None:
            raise InputError(
                "factored damping needs a curvature that is a product of two factors (kfac, tkfac, shampoo): "
                "choose relative damping"
            )
        s, a = self.sides
        ratio = (a.mean() * _pseudo_inverse(s.mean())).sqrt()
        shares = ratio * scaled.sqrt(), scaled.sqrt() * _pseudo_inverse(ratio)
        return _pseudo_inverse((s + shares[1])[:, None] * (a + shares[0]))

    def filtered(self, function: Callable[[Tensor], Tensor]) -> "Spectrum":
        """A function of the curvature, `f(H) = Q f(lambda) Qᵀ`, in the same eigenbasis.

        Args:
            function: of the eigenvalues, elementwise.

        >>> spectrum = Spectrum(None, torch.eye(2), torch.tensor([[0.0, 2.0]], dtype=torch.float64))
        >>> spectrum.filtered(lambda x: torch.exp(-x)).dense()
        tensor([[1.0000, 0.0000],
                [0.0000, 0.1353]], dtype=torch.float64)
        """
        return replace(self, values=function(self.values), sides=None)

    def into(self, G: Float[Tensor, "rows out in"]) -> Float[Tensor, "rows _ _"]:
        """Coordinates in the eigenbasis, `Q_lᵀ G Q_r` (`[rows, 1, out in]` without Kronecker structure)."""
        if self.left is None:
            return G.flatten(1)[:, None] @ self.right.to(G)
        return self.left.to(G).mT @ G @ self.right.to(G)

    def apply(self, G: Float[Tensor, "rows out in"], weights: Tensor) -> Float[Tensor, "rows out in"]:
        """Multiply the coordinates in the eigenbasis by weights, and rotate back.

        >>> spectrum = Spectrum(None, torch.eye(2), torch.ones(1, 2, dtype=torch.float64))
        >>> spectrum.apply(torch.ones(1, 1, 2), torch.tensor([[2.0, 3.0]]))
        tensor([[[2., 3.]]])
        """
        return self.back(self.into(G) * weights.to(G), (G.shape[-2], G.shape[-1]))

    def back(
        self, coordinates: Float[Tensor, "rows _ _"], shape: tuple[int, int]
    ) -> Float[Tensor, "rows out in"]:
        """Undo `into`.

        Args:
            coordinates: in the eigenbasis.
            shape: of the block.
        """
        back = coordinates @ self.right.to(coordinates).mT
        back = back if self.left is None else self.left.to(coordinates) @ back
        return back.view(len(back), *shape)

    def dense(self) -> Float[Tensor, "n n"]:
        """The curvature as a matrix on the flattened block, float64.

        >>> Spectrum(None, torch.eye(1), torch.ones(1, 1)).dense()
        tensor([[1.]], dtype=torch.float64)
        """
        right = self.right.double()
        basis = (
            right if self.left is None else torch.kron(self.left.double().contiguous(), right.contiguous())
        )
        return (basis * self.values.double().flatten()) @ basis.mT


def _pseudo_inverse(values: Tensor) -> Tensor:
    """`1 / values`, and 0 for 0, for all eigenvalues of zero."""
    return torch.where(values > 0, values.clamp_min(torch.finfo(values.dtype).tiny).reciprocal(), 0.0)
