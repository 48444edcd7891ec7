"""Detection of wrong rows by a score, such as self-influence: AUROC, average precision, precision at k."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.correlation import check_finite, ranks
from gradfn.shown import brief


def auroc(scores: Float[Tensor, " rows"], wrong: Shaped[Tensor, " rows"]) -> float:
    """The probability that a wrong row has a higher score than a right one; a tie counts as a half.

    `(R - P (P + 1) / 2) / (P N)` with R the sum of the ranks of the P wrong rows, and N right ones.

    Args:
        scores: of every row, higher for rows that are more suspect.
        wrong: which rows are wrong, True or 1.

    Raises:
        InputError: all rows are wrong, or none; marks that are not one a row; scores that are not finite.

    >>> auroc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
    1.0

    Source: Hanley and McNeil, Radiology 143 (1982).
    """
    positives = _positives(scores, wrong)
    above = ranks(scores[:, None])[wrong.bool()].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(wrong) - positives)))


def average_precision(scores: Float[Tensor, " rows"], wrong: Shaped[Tensor, " rows"]) -> float:
    """The area below precision against recall: `sum_t (recall_t - recall_{t-1}) precision_t`.

    The thresholds t are the distinct scores, from the highest, so that rows with equal scores count
    together. For random scores it is the share of wrong rows.

    Args:
        scores, wrong: see `auroc`.

    Raises:
        InputError: all rows are wrong, or none; scores that are not finite.

    >>> average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))
    0.8333333333333333
    """
    positives = _positives(scores, wrong)
    values, group = torch.unique(-scores.double(), return_inverse=True)
    found, rows = (
        torch.zeros(len(values), dtype=torch.float64).index_add_(0, group, weight)
        for weight in (wrong.bool().double(), torch.ones(len(wrong), dtype=torch.float64))
    )
    return float((found / positives * found.cumsum(0) / rows.cumsum(0)).sum())


def precision_at(scores: Float[Tensor, " rows"], wrong: Shaped[Tensor, " rows"], k: int) -> float:
    """The share of wrong rows among the k with the highest scores; right rows come first among equals.

    Args:
        scores, wrong: see `auroc`.
        k: how many rows to count.

    Raises:
        InputError: all rows are wrong, or none; scores that are not finite; k is not from 1 to the
            number of rows.

    >>> precision_at(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]), 2)
    0.5
    """
    _positives(scores, wrong)
    check_k(k, len(wrong))
    right_first = wrong.bool().long().argsort(stable=True)
    top = right_first[scores[right_first].argsort(descending=True, stable=True)][:k]
    return float(wrong[top].bool().double().mean())


def check_k(k: int, rows: int) -> None:
    """Refuse a number of best rows that is not from 1 to the number of rows.

    >>> check_k(3, rows=3)
    """
    if not 1 <= k <= rows:
        raise InputError(f"k must be between 1 and the number of rows, {rows:,}, not {k:,}")


def _positives(scores: Tensor, wrong: Tensor) -> int:
    check_finite("scores", scores)
    if wrong.shape != scores.shape:
        raise InputError(
            f"expected one mark (wrong or right) for each score, got marks of shape {list(wrong.shape)} for "
            f"scores of {list(scores.shape)}"
        )
    positives = int(wrong.bool().sum())
    if positives in (0, len(wrong)):
        raise InputError(
            f"{positives:,} of {len(wrong):,} rows are wrong, but detection needs wrong and "
            "right ones: give some of both"
        )
    return positives


def marked(values: Iterable[object], column: str) -> Bool[Tensor, " rows"]:
    """Which rows are wrong, by the values of a column: 1 for a wrong row, 0 for a right one.

    Raises:
        InputError: any other value.

    >>> marked([0, True], "is_wrong")
    tensor([False,  True])
    """
    found = list(values)
    for number, value in enumerate(found):
        if value not in (0, 1):
            raise InputError(
                f"row {number} has {brief(value)} in column {column!r}, expected 1 for a wrong row and 0 for "
                "a right one: mend it, or name another `label_column`"
            )
    return torch.tensor([bool(value) for value in found])
