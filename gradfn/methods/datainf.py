"""DataInf: the mean of inverses in place of the inverse of a mean."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradfn.errors import InputError
from gradfn.statistics.fold import Additive, FoldState, refuse_empty
from gradfn.statistics.moments import square_sum
from gradfn.transforms import Transform
from gradfn.transforms.row_sum import RowSum
from gradfn.types import Blocks


@dataclass(frozen=True)
class MeanSquares(Additive[dict[str, float]]):
    """The mean square of each block's entries."""

    def stage(self) -> Transform:
        return RowSum(square_sum)

    def finalize(self, state: FoldState) -> dict[str, float]:
        refuse_empty(state)
        return {name: float(total.mean()) / state.count for name, total in state.blocks.items()}


@dataclass(frozen=True, eq=False)
class _Solved(Additive[Blocks]):
    """The queries, multiplied; `dampings` is lambda of each block."""

    queries: Blocks = field(repr=False)
    dampings: dict[str, float]

    def stage(self) -> Transform:
        return RowSum(self._removed)

    def _removed(self, name: str, G: Tensor) -> Tensor:
        """`sum_b <g_b, q> / (lambda + |g_b|²) g_b` for every query q."""
        rows, queries = G.flatten(1), self.queries[name].flatten(1).to(G)
        scale = self.dampings[name] + rows.square().sum(1)
        shares = (queries @ rows.mT) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        return shares @ rows

    def finalize(self, state: FoldState) -> Blocks:
        refuse_empty(state)
        solved = {}
        for name, removed in state.blocks.items():
            q, scale = self.queries[name], self.dampings[name]
            rest = q.flatten(1) - (removed / state.count).to(q)
            solved[name] = (rest / scale if scale > 0 else torch.zeros_like(rest)).view_as(q)
        return solved


@dataclass(frozen=True, eq=False)
class DataInf:
    """`H^-1 q ~ 1/N sum_b 1/lambda (q - <g_b, q> / (lambda + |g_b|²) g_b)`, in two passes.

    `lambda` is `damping` times the mean square of the block's entries, as in the paper. A block without
    gradients gives 0.

    `|g_b|²` is a sum over the block's d entries, about d times their mean square. A damping far below d is
    therefore lost beside it: the bracket is `q` without its part along `g_b`, and the damping only divides
    all scores, whose order stays. Far above d, the bracket is `q`, and the score is
    `sum_blocks <g, q> / lambda`.

    Args:
        queries: the queries' gradients, transformed as the rows are.
        damping: relative to the mean square.

    Raises:
        InputError: a damping that is not above 0.

    >>> DataInf({}, 0.1).damping
    0.1

    Source: Kwon et al., arXiv:2310.00902, section 3.
    """

    queries: Blocks = field(repr=False)
    damping: float = 0.1
    first: MeanSquares = field(default_factory=MeanSquares)

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"DataInf needs a damping above 0, not {self.damping}: give 0.1, say")

    def then(self, fitted: dict[str, float]) -> _Solved:
        """The second pass."""
        return _Solved(self.queries, {name: self.damping * mean for name, mean in fitted.items()})
