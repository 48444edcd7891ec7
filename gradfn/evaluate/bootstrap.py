"""Means over queries with their bootstrap intervals."""

from math import nan
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.correlation import DTYPE, Correlation, correlation, resampled_correlation

DRAWS = 1000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over queries, and the ends of its 95 % interval; NaN where they are not defined."""

    value: float
    low: float
    high: float


def counts_of_draws(rows: int, draws: int, generator: torch.Generator) -> Float[Tensor, "rows draws"]:
    """How often each of `rows` rows is in each draw of `rows` rows with replacement.

    >>> counts_of_draws(5, 2, torch.Generator().manual_seed(0)).sum(0)
    tensor([5., 5.])
    """
    drawn = torch.randint(rows, (rows, draws), generator=generator)
    return torch.zeros(rows, draws).scatter_add_(0, drawn, torch.ones(rows, draws))


def mean_estimate(values: Float[Tensor, " queries"], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean over queries, with its interval over draws of queries.

    Args:
        values: a number a query; a single one has no interval.
        draws: how many draws.
        seed: of the draws.

    Raises:
        InputError: no queries.

    >>> mean_estimate(torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    Estimate(value=0.6, low=0.2, high=1.0)
    """
    values = values.double()
    if not len(values):
        raise InputError("there are no queries, so no mean over them: give one or more")
    if len(values) == 1:
        return Estimate(float(values), nan, nan)
    counts = counts_of_draws(len(values), draws, torch.Generator().manual_seed(seed)).double()
    return Estimate(float(values.mean()), *middle(values @ counts / len(values)))


def grid_estimate(values: Float[Tensor, "rows queries"], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """The mean of a table, with its interval over draws of its rows and its columns.

    A draw takes rows and columns with replacement, since noise that queries share does not average out.

    Args:
        values: a number a row and query; a single query has no interval.
        draws: how many draws.
        seed: of the draws.

    >>> grid_estimate(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    Estimate(value=0.5, low=0.0, high=1.0)

    Source: Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007), section 3.
    """
    values = values.double()
    rows, queries = values.shape
    if queries == 1:
        return Estimate(float(values.mean()), nan, nan)
    generator = torch.Generator().manual_seed(seed)
    columns = counts_of_draws(queries, draws, generator).double() / queries
    lines = counts_of_draws(rows, draws, generator).double() / rows
    return Estimate(float(values.mean()), *middle(((values @ columns) * lines).sum(0)))


def correlation_estimate(
    a: Float[Tensor, "subsets queries"],
    b: Float[Tensor, "subsets queries"],
    kind: Correlation = "spearman",
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The mean over queries of the correlation over subsets, with its interval over draws of both.

    A draw takes subsets and queries anew, both with replacement, since both are samples; ranks are those
    within the draw. For the ends see `estimate_of`.

    Args:
        a, b: values `[subsets, queries]`.
        kind: "spearman" or "pearson".
        draws: how many draws.
        seed: of the draws.

    >>> a = torch.arange(12.0).reshape(6, 2)
    >>> correlation_estimate(a, a, draws=100).value
    1.0

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
    """
    generator = torch.Generator().manual_seed(seed)
    subsets = counts_of_draws(len(a), draws, generator).to(DTYPE[kind])
    queries = counts_of_draws(a.shape[1], draws, generator).double() / a.shape[1]
    mean = torch.zeros(draws, dtype=torch.float64)
    for column in range(a.shape[1]):
        each = resampled_correlation(a[:, column], b[:, column], subsets, kind)
        mean += each * queries[column]
    return estimate_of(correlation(a, b, kind).mean(), mean)


def estimate_of(value: Tensor, draws: Float[Tensor, " draws"]) -> Estimate:
    """A correlation with the ends of the middle 95 % of its draws, moved by `value - mean(draws)`.

    Draws hold rows twice, so their ranks have more ties and their correlations are nearer to 0 than those of
    all rows.

    >>> draws = torch.arange(641.0) / 1024
    >>> estimate_of(torch.tensor(0.5), draws)
    Estimate(value=0.5, low=0.203125, high=0.796875)
    """
    moved = (draws.double() + value - draws.double().mean()).clamp(-1, 1)
    return Estimate(float(value), *middle(moved))


def middle(draws: Float[Tensor, " draws"]) -> tuple[float, float]:
    """The ends of the middle 95 % of draws.

    >>> middle(torch.tensor([0.0] * 50 + [1.0] * 50))
    (0.0, 1.0)
    """
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = draws.double().quantile(ends).tolist()
    return low, high
