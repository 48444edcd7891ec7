"""Sums, means and elementwise second moments of rows of gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradfn.statistics.fold import Additive, FoldState, refuse_empty
from gradfn.transforms import Adafactor, Adam, Transform, adafactor, adam
from gradfn.transforms.row_sum import RowSum
from gradfn.types import Blocks


def _row_sum(name: str, G: Tensor) -> Tensor:
    return G.to(torch.promote_types(G.dtype, torch.float32)).sum(0)


@dataclass(frozen=True)
class Mean(Additive[Blocks]):
    """The mean (or sum) of the rows; see `mean` and `total`."""

    divide: bool = True

    def stage(self) -> Transform:
        """The plain sum."""
        return RowSum(_row_sum, linear=True)

    def finalize(self, state: FoldState) -> Blocks:
        """One row of float32 blocks, `{block: [1, ...]}`."""
        refuse_empty(state)
        scale = state.count if self.divide else 1
        return {name: (total / scale).float()[None].cpu() for name, total in state.blocks.items()}


def square_sum(name: str, G: Tensor) -> Tensor:
    """`sum_b G_b²`, elementwise, float32 or better."""
    return G.to(torch.promote_types(G.dtype, torch.float32)).square().sum(0)


def mean() -> Mean:
    """The mean of the rows, `{block: [1, ...]}`.

    >>> import torch
    >>> fold = mean()
    >>> fold.finalize(fold.update(fold.init(), {"a": torch.tensor([[1.0], [3.0]])}))
    {'a': tensor([[2.]])}
    """
    return Mean()


def total() -> Mean:
    """The sum of the rows, `{block: [1, ...]}`.

    >>> import torch
    >>> fold = total()
    >>> fold.finalize(fold.update(fold.init(), {"a": torch.tensor([[1.0], [3.0]])}))
    {'a': tensor([[4.]])}
    """
    return Mean(divide=False)


@dataclass(frozen=True)
class AdamMoments(Additive[Adam]):
    """The second moment of the rows, elementwise; see `adam_moments`."""

    eps: float = 1e-8

    def stage(self) -> Transform:
        """The sum of squares."""
        return RowSum(square_sum)

    def finalize(self, state: FoldState) -> Adam:
        """The transform that divides by its root."""
        refuse_empty(state)
        return adam(
            {name: (total / state.count).float().cpu() for name, total in state.blocks.items()}, self.eps
        )


def adam_moments(eps: float = 1e-8) -> AdamMoments:
    """Fit Adam's second moment over data, `v = mean_b G_b²`. The result is the transform `adam(v, eps)`.

    `adam(second_moment)` makes the same transform of tensors at hand.

    Args:
        eps: Adam's epsilon, in units of the gradient.

    >>> import torch
    >>> fold = adam_moments()
    >>> fold.finalize(fold.update(fold.init(), {"a": torch.tensor([[[1.0]], [[3.0]]])})).moments
    {'a': tensor([[5.]])}
    """
    return AdamMoments(eps)


def _side_sums(name: str, G: Tensor) -> Tensor:
    """The sums of `sum_b G_b²` along rows, `[out]`, and along columns, `[in]`, one after the other."""
    squares = square_sum(name, G)
    return torch.cat([squares.sum(1), squares.sum(0)])


@dataclass(frozen=True)
class AdafactorMoments(Additive[Adafactor]):
    """The row and column means of the second moment; see `adafactor_moments`."""

    eps: float = 1e-30

    def stage(self) -> Transform:
        """The sums of squares along rows and columns."""
        return RowSum(_side_sums)

    def finalize(self, state: FoldState) -> Adafactor:
        """The transform that divides by the root of their product."""
        refuse_empty(state)
        means = {}
        for name, sums in state.blocks.items():
            out, into = state.shapes[name][-2:]
            r, c = (sums / state.count).cpu().split([out, into])
            means[name] = r / into, c / out
        return adafactor(means, self.eps)


def adafactor_moments(eps: float = 1e-30) -> AdafactorMoments:
    """Fit Adafactor's moments over data, the row and column means of `v = mean_b G_b²`.

    The means of a block `[out, in]` are `out + in` numbers. The result is the transform
    `adafactor({block: (r, c)}, eps)`, which `adafactor(second_moment)` makes of tensors at hand.

    Args:
        eps: added to the second moment, in units of the squared gradient.

    >>> import torch
    >>> fold = adafactor_moments()
    >>> state = fold.update(fold.init(), {"a": torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])})
    >>> fold.finalize(state).rows["a"], fold.finalize(state).columns["a"]
    (tensor([7.5000], dtype=torch.float64), tensor([ 5., 10.], dtype=torch.float64))

    Source: Adafactor, arXiv:1804.04235, section 3.
    """
    return AdafactorMoments(eps)
