"""Sums over rows as the last stage of a chain: a statistic over data is the sum of these over batches."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gradfn.transforms.chain import Rowwise, Transform, chain
from gradfn.types import Blocks


@dataclass(frozen=True, eq=False)
class RowSum(Rowwise):
    """`{block: sum_b f(G_b)}`, summed in the backward pass while one layer's gradients are in memory.

    Args:
        of: `f(block, G [rows, ...]) -> [...]`, the sum over the rows of `G`; zeros if there are none.
        linear: whether `f` is linear, so that it gives the same for the sum of the rows as one row.

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
    """`{block: sum_b f(x_b, g_b)}` of the factors. Only an engine has factors, so blocks are refused.

    Args:
        of: `f(x [rows, tokens, in], g [rows, tokens, out], counts [rows, tokens]) -> [...]`, the sum over the
            rows; `counts` is 1 at the positions that count and 0 elsewhere. The bias column is in `x`.
        noun: the name of the statistic, for messages.
    """

    of: Callable[[Tensor, Tensor, Tensor], Tensor]
    noun: str

    def __call__(self, blocks: Blocks) -> Blocks:
        raise TypeError(f"{self.noun} is fitted from the factors of gradients, not from their blocks")


def sums_rows(transform: Transform) -> bool:
    """Whether a transform ends in a sum over rows.

    >>> sums_rows(chain(RowSum(lambda name, G: G.sum(0)))), sums_rows(chain())
    (True, False)
    """
    stages = chain(transform).stages
    return bool(stages) and isinstance(stages[-1], RowSum | FactorSum)
