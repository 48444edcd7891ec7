"""The noise ceiling: how well retrained models predict each other, and so what a score could reach."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import DRAWS, Estimate, counts_of_draws, estimate_of
from gradfn.evaluate.correlation import Correlation, check_finite, correlation, resampled_correlation
from gradfn.evaluate.subsets import FEWEST

SPLITS = 100
DRAWN_SPLITS = 4
"""Splits in every draw of the interval; with more, it changes by less than 0.01."""


def noise_ceiling(
    losses: Float[Tensor, "models queries"],
    numbers: Int[Tensor, " models"],
    *,
    seeds: Int[Tensor, " models"] | None = None,
    correlate: Correlation = "spearman",
    splits: int = SPLITS,
    seed: int = 0,
) -> float:
    """The correlation that a perfect prediction would have with the mean over seeds.

    The models of a subset differ in their seed. They are split in halves at random, `r` is the correlation
    over subsets between the means of the halves, averaged over splits and queries, and

        reliability = m r / (1 + (m - 1) r),   ceiling = sqrt(reliability)

    with `m` the ratio of all seeds to those of a half: 2, and so `2r / (1 + r)`, for an even number; of an
    odd number one is left out of each split. A prediction correlates with a noisy mean by at most the root of
    the reliability, which is the mean's correlation with its own expectation. Queries are averaged before the
    root: it is concave, so over few subsets the mean of the queries' own roots is too low.

    Models of `retrain` with shared seeds: a loss is `f(subset) + g(seed) + noise`, and `g`, the same for all
    subsets, is no noise of their mean. With `seeds`, one split of the seeds serves all subsets, and so `g` is
    none of the halves' either. Without, subsets are split each on its own, as models that share nothing are.

    Args:
        losses: of every query, of every model that did not diverge.
        numbers: which subset each model was trained on.
        seeds: of the models, each once in every subset, see `Truth.averaged`; None: no two models share
            theirs.
        correlate: "spearman" or "pearson", as the score that is compared with it.
        splits: how many random splits.
        seed: of the splits.

    Returns:
        From 0 to 1; 0 where the halves do not agree at all.

    Raises:
        InputError: fewer than three subsets have two seeds or more; losses that are not finite; `seeds` that
            are not the same in every subset.

    >>> losses = torch.tensor([[1.0], [1.1], [2.0], [2.1], [3.0], [3.1]])
    >>> noise_ceiling(losses, torch.tensor([0, 0, 1, 1, 2, 2]))
    1.0
    >>> by_seed = torch.tensor([0.0, 9.0]).repeat(3)[:, None]
    >>> noise_ceiling(losses + by_seed, torch.tensor([0, 0, 1, 1, 2, 2]), seeds=torch.tensor([0, 1] * 3))
    1.0

    Source: Spearman and Brown's formula, both 1910; the attenuation by noise, Spearman (1904).
    """
    groups = _Groups(losses, numbers, seeds)
    generator = torch.Generator().manual_seed(seed)
    r = sum(correlation(*groups.halves(generator), correlate).mean() for _ in range(splits)) / splits
    return float(_ceiling(torch.as_tensor(r), groups.lengthening))


def noise_ceiling_estimate(
    losses: Float[Tensor, "models queries"],
    numbers: Int[Tensor, " models"],
    *,
    seeds: Int[Tensor, " models"] | None = None,
    correlate: Correlation = "spearman",
    splits: int = SPLITS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The noise ceiling with its 95 % bootstrap interval over subsets and queries, which is within 0 and 1.

    Args:
        losses, numbers, seeds, correlate, splits, seed: see `noise_ceiling`.
        draws: of the bootstrap, see `correlation_estimate`.

    >>> losses = torch.tensor([[1.0], [1.1], [2.0], [2.1], [3.0], [3.1]])
    >>> noise_ceiling_estimate(losses, torch.tensor([0, 0, 1, 1, 2, 2]), draws=10).value
    1.0
    """
    value = noise_ceiling(losses, numbers, seeds=seeds, correlate=correlate, splits=splits, seed=seed)
    groups, generator = _Groups(losses, numbers, seeds), torch.Generator().manual_seed(seed)
    subsets = counts_of_draws(groups.subsets, draws, generator)
    queries = counts_of_draws(losses.shape[1], draws, generator).double() / losses.shape[1]
    halves = [groups.halves(generator) for _ in range(DRAWN_SPLITS)]
    r = torch.zeros(draws, dtype=torch.float64)
    for q in range(losses.shape[1]):
        rs = [resampled_correlation(a[:, q], b[:, q], subsets, correlate) for a, b in halves]
        r += torch.stack(rs).mean(0) * queries[q]
    one = estimate_of(torch.tensor(value, dtype=torch.float64), _ceiling(r, groups.lengthening))
    return one._replace(low=max(one.low, 0.0), high=max(one.high, 0.0))


def _ceiling(r: Tensor, lengthening: float) -> Tensor:
    """From the correlation of halves to that of the mean over all seeds with its expectation."""
    r = r.clamp(0, 1)
    return (lengthening * r / (1 + (lengthening - 1) * r)).sqrt()


class _Groups:
    """Models by the subset that they were trained on, and their random halves."""

    def __init__(self, losses: Tensor, numbers: Tensor, seeds: Tensor | None):
        check_finite("losses", losses)
        counts = torch.unique(numbers, return_counts=True)[1]
        if int((counts > 1).sum()) < FEWEST:
            raise InputError(
                f"a noise ceiling needs {FEWEST} subsets or more with two seeds or more, and "
                f"{int((counts > 1).sum())} have them: retrain with more seeds"
            )
        self.shared = seeds is not None
        if seeds is not None:
            order = _by_seed(numbers, seeds)
            losses, numbers = losses[order], numbers[order]
        subset = torch.unique(numbers, return_inverse=True)[1]
        repeated = (counts > 1)[subset]
        self.losses = losses[repeated].double()
        self.subset = torch.unique(subset[repeated], return_inverse=True)[1]
        self.subsets = int((counts > 1).sum())
        self.half = int(counts[counts > 1].min()) // 2
        # The variance of a mean is proportional to 1 / seeds, hence the harmonic mean.
        self.lengthening = float(len(counts) / (1 / counts.double()).sum()) / self.half

    def halves(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Means over two disjoint random halves of the seeds of every subset, both `[subsets, queries]`."""
        models = self._shuffled(generator)
        a, b = (self.losses[part].mean(1) for part in models.split(self.half, 1))
        return a, b

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        """Models of each subset in a random order, as many as two halves, `[subsets, 2 * half]`."""
        if self.shared:
            seeds = len(self.subset) // self.subsets
            order = torch.randperm(seeds, generator=generator)[: 2 * self.half]
            return torch.arange(self.subsets)[:, None] * seeds + order
        shuffled = torch.randperm(len(self.subset), generator=generator)
        order = shuffled[self.subset[shuffled].argsort(stable=True)]
        first = torch.searchsorted(self.subset[order], torch.arange(self.subsets))
        return order[first[:, None] + torch.arange(2 * self.half)]


def _by_seed(numbers: Tensor, seeds: Tensor) -> Tensor:
    """The order of models by subset and, in each, by seed; refuses subsets of other seeds."""
    subset, each = (torch.unique(of, return_inverse=True)[1] for of in (numbers, seeds))
    place = subset * (int(each.max()) + 1) + each
    if not torch.equal(place.sort().values, torch.arange((int(subset.max()) + 1) * (int(each.max()) + 1))):
        raise InputError(
            "the seeds are not the same in every subset, each once: leave out the models that "
            "`Truth.averaged` leaves out, or give no seeds where subsets share none"
        )
    return place.argsort()
