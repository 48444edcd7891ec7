"""What words or meaning alone find, beside what a method finds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.report.rows import Ranked

TOP = 5
"""Rows of each query that are compared, or as many as are shown."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """Similarities of rows and queries that no gradient went into.

    Args:
        name: what to call it.
        values: `[rows, queries]`, of the queries once for all dampings.

    >>> import torch
    >>> found = Baseline("bm25", torch.tensor([[0.5], [2.0], [0.5]]))
    >>> [found.rank(row, 0) for row in range(3)], found.top(1)
    ([2, 1, 3], [{1}])
    """

    name: str
    values: Float[Tensor, "rows queries"] = field(repr=False)

    def rank(self, row: int, query: int) -> int:
        """The place of a row, 1 the best; of equal ones the first row comes first."""
        values = self.values[:, query % self.values.shape[1]]
        own = values[row]
        return 1 + int((values > own).sum()) + int((values[:row] == own).sum())

    def score(self, row: int, query: int) -> float:
        """The similarity of a row and a query."""
        return float(self.values[row, query % self.values.shape[1]])

    def top(self, k: int) -> list[set[int]]:
        """The `k` first rows of every query."""
        order = self.values.argsort(dim=0, descending=True, stable=True)[:k]
        return [{*rows} for rows in order.T.tolist()]

    def overlap(self, ranked: Ranked, k: int) -> float:
        """The mean share of a query's `k` first proponents that are among the `k` first rows here.

        Raises:
            InputError: scores of other queries.
        """
        rows = ranked.proponents.rows[:, :k].tolist()
        mine = self.top(k)
        if len(rows) % len(mine):
            raise InputError(
                f"a baseline of {len(mine)} queries is beside scores of {len(rows)}: give one for each"
            )
        shares = [len({*one} & mine[query % len(mine)]) / len(one) for query, one in enumerate(rows)]
        return sum(shares) / len(shares)


def baseline_facts(baselines: Sequence[Baseline], ranked: Ranked, top: int) -> list[tuple[str, str]]:
    """How much of what a method finds each baseline finds too."""
    lines = []
    for one in baselines:
        k = min(max(top, TOP), ranked.proponents.rows.shape[1], len(one.values))
        share, chance = one.overlap(ranked, k), k / len(one.values)
        lines.append((one.name, f"finds {share:.0%} of the first {k} proponents among its own first {k} "
                                f"({chance:.1%} by chance)"))  # fmt: skip
    return lines
