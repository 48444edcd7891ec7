"""Optimizer normalisation of blocks, and the unit norm of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.transforms.chain import Blockwise, Kronecker, Rowwise
from gradfn.types import Blocks, BlockSpec

SQUARES = (1e-12, 1e16)
"""Between these a norm of float32 numbers is the root of a sum of squares."""


def _check_moment(moments: Blocks, name: str, found: Sequence[int], shape: tuple[int, ...]) -> None:
    """Refuse a block whose second moment is missing or has another shape."""
    if name not in moments:
        raise InputError(f"no second moment for {name}: it has {', '.join(sorted(moments)[:6])}")
    if tuple(found) != shape:
        raise InputError(
            f"the second moment of {name} has shape {tuple(found)}, its gradient {shape} "
            "(out, in and a bias column): fit it on the same model"
        )


@dataclass(frozen=True, eq=False)
class Adam(Blockwise):
    """`G -> G / (sqrt(v) + eps)`; see `adam`."""

    moments: Blocks = field(repr=False)
    eps: float = 1e-8

    linear = True

    def block(self, name: str, G: Float[Tensor, "rows out in"]) -> Float[Tensor, "rows out in"]:
        """Divide one block elementwise."""
        v = self.moments.get(name, G.new_empty(0))
        _check_moment(self.moments, name, v.shape, (G.shape[-2], G.shape[-1]))
        return G / (v.to(G).sqrt() + self.eps)


def adam(second_moment: Blocks, eps: float = 1e-8) -> Adam:
    """Scale gradients as Adam scales its steps, `G / (sqrt(v) + eps)` elementwise, by a given second moment.

    There are two ways to this transform: `adam(second_moment)` from tensors at hand (an optimizer's state,
    say), and `fit(adam_moments(), ...)`, which fits the second moment over data. Every example's gradient is
    scaled, before any projection and before any mean over examples.

    Args:
        second_moment: `v [out, in]` of every block, bias column included.
        eps: Adam's epsilon, in units of the gradient.

    Raises:
        InputError: when applied, for a block without a moment or of another shape.

    >>> adam({"mlp": torch.full((2, 3), 4.0)}, eps=0.0)({"mlp": torch.ones(1, 2, 3)})["mlp"][0, 0, 0]
    tensor(0.5000)

    Source: Adam, arXiv:1412.6980, algorithm 1.
    """
    return Adam(second_moment, eps)


@dataclass(frozen=True, eq=False)
class Adafactor(Kronecker):
    """`G -> G / sqrt(r cᵀ / mean(r))`; see `adafactor`."""

    rows: Blocks = field(repr=False)
    columns: Blocks = field(repr=False)
    eps: float = 1e-30

    def kron(self, spec: BlockSpec) -> Kron:
        """Diagonal sides, `(r / mean(r))^-1/2` and `c^-1/2`."""
        r, c = (
            sides.get(spec.name, torch.empty(0)).double() + self.eps for sides in (self.rows, self.columns)
        )
        _check_moment(self.rows, spec.name, (len(r), len(c)), spec.shape)
        left, right = (r / r.mean()).rsqrt(), c.rsqrt()
        return Kron(left.to(spec.dtype).to(spec.device), right.to(spec.dtype).to(spec.device))


def adafactor(second_moment: Mapping[str, Tensor | tuple[Tensor, Tensor]], eps: float = 1e-30) -> Adafactor:
    """Scale gradients by a rank-1 estimate of a given second moment, `G_ij / sqrt(r_i c_j / mean(r))`.

    `r` and `c` are the row and column means of `v`. The scaling is a Kron, so it needs no dense gradient. As
    with `adam`, there are two ways to this transform: `adafactor(second_moment)` from tensors at hand, and
    `fit(adafactor_moments(), ...)`, which fits the means over data. Every example's gradient is scaled,
    before any projection and before any mean over examples.

    Args:
        second_moment: `v [out, in]` of every block, bias column included; or only its row and column means
            `(r [out], c [in])`.
        eps: added to `v`, in units of the squared gradient.

    Raises:
        InputError: when applied, for a block without a moment or of another shape.

    >>> v = {"mlp": torch.tensor([[1.0, 4.0], [4.0, 16.0]])}
    >>> adafactor(v)({"mlp": torch.ones(1, 2, 2)})["mlp"]
    tensor([[[1.0000, 0.5000],
             [0.5000, 0.2500]]])

    Source: Adafactor, arXiv:1804.04235, section 3.
    """
    means = {
        name: (v.double().mean(1), v.double().mean(0)) if isinstance(v, Tensor) else v
        for name, v in second_moment.items()
    }
    rows, columns = ({name: pair[side] for name, pair in means.items()} for side in (0, 1))
    return Adafactor(rows, columns, eps)


def norms(v: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows"]:
    """Euclidean norm of every row, right also where the square of a number leaves float32's range.

    >>> norms(torch.tensor([[3.0, 4.0], [3e-30, 4e-30]]))
    tensor([5.0000e+00, 5.0000e-30])
    """
    found = torch.linalg.vector_norm(v, dim=-1)
    low, high = SQUARES
    far = (found < low) | ~(found < high)
    if v.dtype != torch.float32 or not bool(far.any()):
        return found
    found[far] = torch.linalg.vector_norm(v[far], dim=-1, dtype=torch.float64).to(v.dtype)
    return found


def inverse_norms(norms: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """`1 / norm`, and 0 for a norm of zero: the one policy for zero gradients (they stay zero).

    >>> inverse_norms(torch.tensor([2.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    return torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)


@dataclass(frozen=True)
class UnitNormalize(Rowwise):
    """Scale every row, all its blocks together, to norm 1; see `unit_normalize`."""

    def __call__(self, blocks: Blocks) -> Blocks:
        by_block = torch.stack([norms(G.flatten(1)) for G in blocks.values()], -1)
        scale = inverse_norms(norms(by_block))
        return {name: G * scale.view(-1, *[1] * (G.ndim - 1)) for name, G in blocks.items()}


def unit_normalize() -> UnitNormalize:
    """Divide every row by its Euclidean norm over all blocks; a zero row stays zero.

    >>> unit_normalize()({"a": torch.tensor([[3.0, 4.0], [0.0, 0.0]])})["a"]
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return UnitNormalize()
