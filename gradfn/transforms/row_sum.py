"""Sums over rows as the last stage of a chain: what a statistic that is fitted over data needs of a batch."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gradfn.transforms.chain import Rowwise
from gradfn.types import Blocks


@dataclass(frozen=True, eq=False)
class RowSum(Rowwise):
    """`{block: sum_b f(G_b)}`, summed in the backward while one layer's gradients are alive.

    Args:
        of: `f(block, G [rows, ...]) -> [...]`, the sum over the rows given; of no rows it is zeros.
        linear: whether `f` is linear, so that the sum of the rows may be given it as one row.

    >>> import torch
    >>> squares = RowSum(lambda name, G: G.square().sum(0))
    >>> squares({"a": torch.tensor([[1.0], [2.0]])})
    {'a': tensor([5.])}
    """

    of: Callable[[str, Tensor], Tensor]
    linear: bool = False

    def __call__(self, blocks: Blocks) -> Blocks:
        return {name: self.of(name, G) for name, G in blocks.items()}


@dataclass(frozen=True, eq=False)
class FactorSum(Rowwise):
    """`{block: sum_b f(x_b, g_b)}` of the factors themselves, which blocks no longer have: engines only.

    Args:
        of: `f(x [rows, tokens, in], g [rows, tokens, out], counts [rows, tokens]) -> [...]`, the sum over the
            rows; `counts` is 1 at the positions that count and 0 elsewhere. The bias column is in `x`.
        noun: what is fitted, for messages.
    """

    of: Callable[[Tensor, Tensor, Tensor], Tensor]
    noun: str

    def __call__(self, blocks: Blocks) -> Blocks:
        raise TypeError(f"{self.noun} is fitted from the factors of gradients, not from their blocks")
