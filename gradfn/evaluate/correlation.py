"""Correlations of columns, Pearson's and Spearman's, also of resampled rows."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError

Correlation = Literal["spearman", "pearson"]

DTYPE = {"spearman": torch.float32, "pearson": torch.float64}
"""Of resampled rows: ranks of up to 2^23 rows are exact in float32, which takes half the time."""

_ROUNDING = 1e-12
"""Deviations below this share of the largest number are rounding, and their column is constant."""


def check_finite(name: str, values: Tensor) -> None:
    """Refuse NaN and infinity, to which sorting would give a rank.

    >>> check_finite("scores", torch.zeros(3))
    """
    if wrong := int((~values.isfinite()).sum()):
        raise InputError(f"{wrong:,} of the {name} are not finite numbers: leave these models or rows out")


def ranks(values: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Rank every column from 1, equal values having the mean of their ranks.

    >>> ranks(torch.tensor([[3.0], [1.0], [3.0]])).T
    tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    columns = values.double().T.contiguous()
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    return ((below + up_to + 1).double() / 2).T


def correlation(
    a: Float[Tensor, "rows columns"], b: Float[Tensor, "rows columns"], kind: Correlation = "spearman"
) -> Float[Tensor, " columns"]:
    """Correlate each column of `a` with that of `b`, over the rows.

    `sum_i a_i b_i / sqrt(sum_i a_i^2 sum_i b_i^2)` of the centred values, Spearman's of their ranks. A column
    that is constant on either side says nothing, and its correlation is 0.

    Args:
        a, b: values `[rows, columns]`, finite.
        kind: "spearman" or "pearson".

    Returns:
        float64 `[columns]`, from -1 to 1.

    >>> up = torch.tensor([[1.0], [2.0], [3.0]])
    >>> correlation(up, up.exp()), correlation(up, -up, "pearson")
    (tensor([1.], dtype=torch.float64), tensor([-1.], dtype=torch.float64))
    """
    if kind == "spearman":
        a, b = ranks(a), ranks(b)
    ones = torch.ones(len(a), 1, dtype=torch.float64)
    return _cosine(_centred(a.double(), ones), _centred(b.double(), ones), ones)


def resampled_correlation(
    a: Float[Tensor, " rows"],
    b: Float[Tensor, " rows"],
    counts: Float[Tensor, "rows draws"],
    kind: Correlation = "spearman",
) -> Float[Tensor, " draws"]:
    """Correlate two columns in every draw of their rows, ranked anew in each.

    Args:
        a, b: values `[rows]`.
        counts: how often each draw has each row, `[rows, draws]`; the columns sum to one number.
        kind: "spearman" or "pearson".

    Returns:
        float64 `[draws]`; see `correlation`.

    >>> a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])
    >>> resampled_correlation(a, b, torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 2.0]]))
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    counts = counts.to(DTYPE[kind])
    if kind == "spearman":
        return _cosine(_drawn_ranks(a, counts), _drawn_ranks(b, counts), counts).double()
    first, second = (_centred(side.double()[:, None], counts) for side in (a, b))
    return _cosine(first, second, counts)


def _drawn_ranks(values: Tensor, counts: Tensor) -> Tensor:
    """Twice the centred mid-ranks in every draw: copies below, less copies above.

    One sort serves all draws, for a draw changes how often a value is there and not where it stands.
    """
    values = values.contiguous()
    ordered, order = values.sort()
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    copies = torch.cat([torch.zeros_like(counts[:1]), counts.index_select(0, order).cumsum(0)])
    return copies.index_select(0, below) + copies.index_select(0, up_to) - copies[-1]


def _cosine(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """The weighted correlation of centred values over the first dimension; 0 where a side is constant."""
    both, first, second = ((weights * x * y).sum(0) for x, y in ((a, b), (a, a), (b, b)))
    flat = (first == 0) | (second == 0)
    ratio = both / torch.where(flat, 1.0, (first * second).sqrt())
    return torch.where(flat, 0.0, ratio).clamp(-1, 1)


def _centred(values: Tensor, weights: Tensor) -> Tensor:
    centred = values - (values * weights).sum(0) / weights.sum(0)
    return torch.where(centred.abs() <= _ROUNDING * values.abs().amax(0), 0.0, centred)
