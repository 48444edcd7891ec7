"""The rows that counterfactual models are trained on: masks, bool `[subsets, rows]`."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradfn.errors import InputError
from gradfn.random import choice, words

__all__ = ["check_fraction", "check_subsets", "leave_one_out", "random_subsets", "without_top"]

FEWEST = 3
"""The fewest subsets with a meaningful rank correlation."""


def random_subsets(
    rows: int, count: int, fraction: float = 0.5, *, leave_out: int | None = None, seed: int = 0
) -> Bool[Tensor, "count rows"]:
    """Subsets of one size. Each is a function of seed and number, so asking for more changes no earlier one.

    Args:
        rows: of the data.
        count: how many subsets.
        fraction: of the rows to keep, rounded to whole ones.
        leave_out: how many rows to leave out, instead of a fraction to keep.
        seed: of the draw.

    Raises:
        InputError: fewer than three subsets; a subset of no rows or of all; see `check_fraction`.

    >>> random_subsets(6, 4).sum(1)
    tensor([3, 3, 3, 3])
    >>> random_subsets(6, 3, leave_out=1).sum(1)
    tensor([5, 5, 5])
    """
    if count < FEWEST:
        raise InputError(
            f"correlations and spreads need at least {FEWEST} subsets, not {count}: ask for more"
        )
    if leave_out is None:
        check_fraction(fraction)
    kept = round(fraction * rows) if leave_out is None else rows - leave_out
    if not 0 < kept < rows:
        how = f"a fraction of {fraction}" if leave_out is None else f"leaving out {leave_out}"
        raise InputError(
            f"{how} keeps {kept} of {rows} rows, and a subset is some but not all: choose another size"
        )
    masks = torch.zeros(count, rows, dtype=torch.bool)
    for number in range(count):
        masks[number, torch.from_numpy(choice(kept, rows, "subset", seed, number).astype(np.int64))] = True
    return masks


def check_fraction(fraction: float) -> None:
    """Refuse a fraction of the rows that is not between 0 and 1.

    Raises:
        InputError: not above 0 and below 1.

    >>> check_fraction(0.5)
    """
    if not 0 < fraction < 1:
        raise InputError(
            f"a fraction of the rows must be above 0 and below 1, not {fraction}: give one like 0.5"
        )


def leave_one_out(rows: int, number: int | None = None, seed: int = 0) -> Bool[Tensor, "subsets rows"]:
    """One subset a row, without that row; or so many of these, drawn at random.

    Args:
        rows: how many rows there are.
        number: how many subsets, in an order that is drawn with `seed`; None: all, in the order of the rows.

    Raises:
        InputError: fewer than three rows, or subsets, or more subsets than rows.

    >>> leave_one_out(3).int()
    tensor([[0, 1, 1],
            [1, 0, 1],
            [1, 1, 0]], dtype=torch.int32)
    """
    if rows < FEWEST:
        raise InputError(f"leaving one out needs at least {FEWEST} rows, not {rows}: give more data")
    without = ~torch.eye(rows, dtype=torch.bool)
    if number is None:
        return without
    if not FEWEST <= number <= rows:
        raise InputError(
            f"leaving out one of {rows:,} rows makes {FEWEST} to {rows:,} subsets, not {number:,}: choose as "
            "many of these, or leave it out for all"
        )
    return without[torch.from_numpy(words(rows, "leave one out", seed).argsort(kind="stable"))[:number]]


def without_top(scores: Float[Tensor, "rows queries"], ks: Sequence[int]) -> Bool[Tensor, "subsets rows"]:
    """All rows but the k best proponents of a query, in the order of queries and, for each, of `ks`.

    Of equal scores the first row counts as the better.

    Raises:
        InputError: a k of no rows or of all; scores that are not finite.

    >>> without_top(torch.tensor([[3.0], [1.0], [2.0]]), [1, 2]).int()
    tensor([[0, 1, 1],
            [0, 1, 0]], dtype=torch.int32)
    """
    rows = len(scores)
    if not ks or not all(0 < k < rows for k in ks):
        raise InputError(
            f"the rows to remove are at least 1 and fewer than the {rows} there are, not {list(ks)}: "
            "give other numbers"
        )
    if not bool(scores.isfinite().all()):
        raise InputError("the scores by which to remove rows hold NaN or infinity: score again")
    ranks = (-scores).argsort(dim=0, stable=True).argsort(dim=0)
    return torch.stack([ranks[:, query] >= k for query in range(scores.shape[1]) for k in ks])


def check_subsets(
    subsets: Bool[Tensor, "subsets rows"], labels: Int[Tensor, " rows"] | Sequence[int] | None = None
) -> None:
    """Refuse subsets without any row, or without any row of a class.

    Args:
        subsets: to check.
        labels: the class of each row, where there are classes.

    Raises:
        InputError: there is such a subset; the first one is named. Or labels are not one a row.

    >>> check_subsets(torch.tensor([[True, False], [True, True]]), [0, 0])
    """
    for number in (~subsets.any(1)).nonzero()[:1, 0].tolist():
        raise InputError(f"subset {number} has no rows: give it at least one")
    if labels is None:
        return
    classes = torch.as_tensor(labels, device=subsets.device)
    if classes.shape != subsets.shape[1:]:
        raise InputError(
            f"labels are one a row, but {list(classes.shape)} came for subsets of {subsets.shape[1]} rows: "
            "give those of the same rows"
        )
    for label in classes.unique().tolist():
        for number in (~subsets[:, classes == label].any(1)).nonzero()[:1, 0].tolist():
            fewer = "leave out fewer rows (a smaller K, a larger fraction), or "
            raise InputError(
                f"subset {number} leaves class {label} out, so its model cannot know it: "
                f"{fewer if int((~subsets[number]).sum()) > 1 else ''}give the class more rows"
            )
