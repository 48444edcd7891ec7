"""Which rows to keep by their scores: a share of them, all but the worst, or the best of every query."""

from collections.abc import Hashable, Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Literal, NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradfn.errors import InputError

Over = Literal["mean", "max"]
"""What ranks a row that has scores for several queries: their mean, or the highest."""
Best = Literal["highest", "lowest"]
"""Which scores are best."""


class Rule(TypedDict, total=False):
    """How rows are chosen, as keywords; see `select_rows`."""

    keep: float | None
    drop_worst: int | None
    top_per_query: int | None
    over: Over
    best: Best
    by: Sequence[Hashable] | None


class Selection(NamedTuple):
    """Rows that are kept, in the order of the data.

    Args:
        rows: their numbers, ascending.
        scores: what each was ranked by.
        ranks: their places, 1 the best; where there are groups, in their group.
        queries: where each query has rows of its own, the query for which each row ranks best.
    """

    rows: Int64[Tensor, " kept"]
    scores: Float[Tensor, " kept"]
    ranks: Int64[Tensor, " kept"]
    queries: Int64[Tensor, " kept"] | None = None


def select_rows(
    values: Float[Tensor, "rows queries"],
    *,
    keep: float | None = None,
    drop_worst: int | None = None,
    top_per_query: int | None = None,
    over: Over = "mean",
    best: Best = "highest",
    by: Sequence[Hashable] | None = None,
) -> Selection:
    """The rows with the best scores, by one of three rules.

        keep: the best ceil(keep * n) of n rows;  drop_worst: the best n - drop_worst
        top_per_query: all rows that are among the best so many of any query

    Of equal scores the row that comes first in the data ranks first. Means are taken in float64.

    Args:
        values: scores.
        keep: a share of the rows, above 0 and up to 1; exact as it is written, so 0.8 of 10 rows are 8.
        drop_worst: how many rows to leave out.
        top_per_query: how many rows of each query.
        over: what the first two rules rank a row by, where there are several queries.
        best: "lowest" ranks the lowest scores first, as for self-influence, where the highest are outliers.
        by: the group of every row. Each rule then holds within every group, as if there were no others.

    Raises:
        InputError: not exactly one rule; a share or number that leaves no row or takes more than there are;
            groups that are not as many as the rows; scores that are not finite.

    >>> scores = torch.tensor([[0.5, 0.1], [0.2, 0.9], [0.5, 0.1], [-1.0, 0.3]])
    >>> select_rows(scores, keep=0.5).rows, select_rows(scores, drop_worst=1, by="aabb").rows
    (tensor([0, 1]), tensor([1, 2]))
    >>> each = select_rows(scores, top_per_query=1)
    >>> each.rows, each.scores, each.queries
    (tensor([0, 1]), tensor([0.5000, 0.9000]), tensor([0, 1]))
    """
    if sum(rule is not None for rule in (keep, drop_worst, top_per_query)) != 1:
        raise InputError("give one of `keep`, `drop_worst` and `top_per_query`, and only one")
    if by is not None and len(by) != len(values):
        raise InputError(f"{len(by)} groups for {len(values)} rows: give the group of every row")
    if not bool(values.isfinite().all()):
        raise InputError("some scores are no finite numbers, which rank nowhere: score again")
    groups = _groups(len(values), by)
    if top_per_query is None:
        values = (values.double().mean(1) if over == "mean" else values.amax(1))[:, None]
    chosen = dict[int, tuple[int, int]]()
    for name, rows in groups.items():
        count = _count(len(rows), name, keep, drop_worst, top_per_query)
        ranked = values[rows].argsort(dim=0, descending=best == "highest", stable=True)[:count]
        for query, places in enumerate(ranked.T.tolist()):
            for rank, place in enumerate(places, 1):
                row = int(rows[place])
                chosen[row] = min(chosen.get(row, (rank, query)), (rank, query))
    rows = torch.tensor(sorted(chosen))
    ranks, queries = torch.tensor([chosen[row] for row in rows.tolist()]).T.contiguous()
    return Selection(rows, values[rows, queries], ranks, None if top_per_query is None else queries)


def _groups(count: int, by: Sequence[Hashable] | None) -> Mapping[Hashable, Int64[Tensor, " group"]]:
    """The rows of every group, ascending."""
    if by is None:
        return {None: torch.arange(count)}
    found = dict[Hashable, list[int]]()
    for row, name in enumerate(by):
        found.setdefault(name, []).append(row)
    return {name: torch.tensor(rows) for name, rows in found.items()}


def _count(
    rows: int, group: Hashable, keep: float | None, drop_worst: int | None, top_per_query: int | None
) -> int:
    """How many of a group's rows are kept, of each query."""
    there = f"there are {rows:,} rows" if group is None else f"group {group!r} has {rows:,} rows"
    if keep is not None:
        share = Fraction(str(keep)) if 0 < keep <= 1 else None
        if share is None:
            raise InputError(f"`keep` is a share of the rows, above 0 and up to 1, not {keep}: give 0.8, say")
        return ceil(share * rows)
    number, name = (drop_worst, "drop_worst") if top_per_query is None else (top_per_query, "top_per_query")
    assert number is not None
    if number < 1:
        raise InputError(f"`{name}` must be 1 or more, not {number}")
    if number > rows or (drop_worst is not None and number == rows):
        left = "leave none" if drop_worst is not None else "take more"
        raise InputError(f"{there}, of which `{name}={number}` would {left}: give a smaller number")
    return rows - number if drop_worst is not None else number
