"""Kronecker-factored linear maps of a gradient block, `G -> L G Rᵀ`.

In vector form, with rows of `G` laid one after the other, the map is `L ⊗ R`. It acts on the factors of
`G = sum_t g_t x_tᵀ` before they meet: `g -> L g`, `x -> R x`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.linalg.maps import Map, Steps

Side = Tensor | Map | None
"""One side of a Kron: None is the identity, a vector is a diagonal, a matrix or a map is itself."""


def apply_side(side: Side, v: Float[Tensor, "*rest dim"]) -> Float[Tensor, "*rest out"]:
    """Apply one side to the last dimension of `v`.

    >>> apply_side(torch.tensor([2.0, 3.0]), torch.ones(1, 2))
    tensor([[2., 3.]])
    """
    if side is None:
        return v
    if isinstance(side, Map):
        return side(v)
    return v * side if side.ndim == 1 else v @ side.T


def compose_sides(after: Side, before: Side) -> Side:
    """Multiply two sides: `after` applied to the result of `before`.

    >>> compose_sides(None, torch.ones(2))
    tensor([1., 1.])
    """
    if after is None or before is None:
        return after if before is None else before
    if isinstance(after, Map) or isinstance(before, Map):
        return Steps((*_steps(before), *_steps(after)))
    if after.ndim == 1:
        return after * before if before.ndim == 1 else after[:, None] * before
    return after * before if before.ndim == 1 else after @ before


def _steps(side: Tensor | Map) -> tuple[Tensor | Map, ...]:
    return side.steps if isinstance(side, Steps) else (side,)


def dense_side(side: Side, dim: int) -> Float[Tensor, "out dim"]:
    """Write a side out as a matrix acting on vectors of length `dim`.

    >>> dense_side(None, 2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    if side is None:
        return torch.eye(dim)
    if isinstance(side, Map):
        return side.dense()
    return torch.diag(side) if side.ndim == 1 else side


def _power_side(side: Side, exponent: float) -> Side:
    if side is None:
        return None
    if isinstance(side, Map):
        raise TypeError("a map that makes vectors smaller has no powers")
    if side.ndim == 1:
        return side.double().pow(exponent).to(side.dtype)
    values, vectors = torch.linalg.eigh(side.double())
    return ((vectors * values.pow(exponent)) @ vectors.T).to(side.dtype)


@dataclass(frozen=True, eq=False)
class Kron:
    """The map `G -> L G Rᵀ` of blocks `[..., out, in]`.

    Args:
        left: `L`, None, `[out]` (a diagonal) or `[p, out]`.
        right: `R`, None, `[in]` (a diagonal) or `[q, in]`.

    >>> G = torch.arange(4.0).reshape(1, 2, 2)
    >>> Kron(torch.tensor([1.0, 10.0]), None)(G)
    tensor([[[ 0.,  1.],
             [20., 30.]]])
    """

    left: Side = None
    right: Side = None

    def __call__(self, G: Float[Tensor, "*rows out in"]) -> Float[Tensor, "*rows p q"]:
        right = apply_side(self.right, G)
        return apply_side(self.left, right.mT).mT if self.left is not None else right

    def __matmul__(self, before: "Kron") -> "Kron":
        """Fuse two maps into one: `(self @ before)(G) = self(before(G))`."""
        return Kron(compose_sides(self.left, before.left), compose_sides(self.right, before.right))

    def power(self, exponent: float) -> "Kron":
        """Raise to a power, `(L ⊗ R)^a = L^a ⊗ R^a`, for diagonal or symmetric positive definite sides.

        >>> Kron(torch.tensor([4.0]), None).power(-0.5).left
        tensor([0.5000])
        """
        return Kron(_power_side(self.left, exponent), _power_side(self.right, exponent))

    def inverse(self) -> "Kron":
        """Undo the map; both sides must be diagonal or symmetric positive definite.

        >>> Kron(torch.tensor([4.0]), None).inverse().left
        tensor([0.2500])
        """
        return self.power(-1.0)

    def with_matrices(self, dtype: torch.dtype, device: torch.device) -> "Kron":
        """The same map, with sides that are maps written out as matrices."""
        sides = (
            side.dense(dtype, device) if isinstance(side, Map) else side for side in (self.left, self.right)
        )
        return Kron(*sides)

    def dense(self, shape: tuple[int, int]) -> Float[Tensor, "pq outin"]:
        """Write the map out as the matrix `L ⊗ R` that acts on the flattened block of that shape.

        >>> Kron().dense((1, 2))
        tensor([[1., 0.],
                [0., 1.]])
        """
        return torch.kron(dense_side(self.left, shape[0]), dense_side(self.right, shape[1]))
