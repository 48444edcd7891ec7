"""Which of several scores predict retraining best, from a few retrained models, and how sure that is."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import Estimate, counts_of_draws, middle
from gradfn.evaluate.comparison import Compared, ceiling_of, compare
from gradfn.evaluate.correlation import resampled_correlation
from gradfn.evaluate.lds import predicted
from gradfn.evaluate.truth import Truth
from gradfn.scores import Scores

DRAWS = 500
"""Of subsets and queries, for differences."""


class Recommendation(NamedTuple):
    """Runs by their LDS, the best first, and how far each is behind the best.

    Args:
        ranked: each run at its damping; see `compare`.
        behind: how much lower the LDS of each is than that of the first, with its 95 % interval.
        ceiling: what a perfect prediction would reach; None where no subset has two models.
        queries: how many queries they are reported on.
    """

    ranked: list[Compared]
    behind: list[Estimate]
    ceiling: Estimate | None
    queries: int

    @property
    def level(self) -> list[Compared]:
        """The runs that cannot be told from the best: the interval of the difference reaches 0."""
        pairs = zip(self.ranked, self.behind, strict=True)
        return [one for place, (one, by) in enumerate(pairs) if not place or by.low <= 0]

    @property
    def predicts(self) -> bool:
        """Whether the best predicts anything: its interval is above 0."""
        return self.ranked[0].lds.low > 0


def recommend(runs: Sequence[Scores], truth: Truth, *, seed: int = 0) -> Recommendation:
    """Rank runs by the LDS against retrained models.

    Dampings are chosen on half of the queries, and everything is reported on the other half, as in `compare`.
    The difference of two runs is over the same draws of subsets and queries, so noise that both share does
    not count; its middle 95 % are moved to the difference itself, as those of an LDS are.

    Args:
        runs: of the same rows and queries.
        truth: the retrained models.
        seed: of the halves and of the draws.

    Raises:
        InputError: no runs; see also `compare`.

    >>> subsets = torch.rand(30, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    >>> scores = torch.arange(12.0).reshape(6, 2)
    >>> losses = -predicted(scores, subsets)
    >>> truth = Truth(subsets, torch.arange(30), torch.zeros(30).long(), losses, torch.zeros(30).double(),
    ...     torch.zeros(30).bool(), [*"abcdef"], ["p", "q"], {})
    >>> right, wrong = (Scores(one[None], truth.row_ids, truth.query_ids, name=name)
    ...     for name, one in (("right", scores), ("wrong", -scores)))
    >>> found = recommend([wrong, right], truth)
    >>> [one.name for one in found.ranked], [one.name for one in found.level], found.predicts
    (['right', 'wrong'], ['right'], True)
    """
    if not runs:
        raise InputError("no scores to choose from: give one run or more")
    subsets, losses = truth.targets()
    compared = compare(runs, subsets, losses, seed=seed)
    order = sorted(range(len(runs)), key=lambda place: -compared.runs[place].lds.value)
    ranked = [compared.runs[place] for place in order]
    said = [
        predicted(runs[place].of_damping(compared.runs[place].damping).matrix[:, compared.queries], subsets)
        for place in order
    ]
    draws = _drawn(said, -losses[:, compared.queries], seed)
    behind = []
    for one, own in zip(ranked, draws, strict=True):
        apart, value = draws[0] - own, ranked[0].lds.value - one.lds.value
        behind.append(Estimate(value, *middle(apart - apart.mean() + value)))
    return Recommendation(ranked, behind, ceiling_of(truth, compared.queries, seed), len(compared.queries))


def _drawn(said: Sequence[Tensor], truth: Tensor, seed: int) -> list[Tensor]:
    """The LDS of each in the same draws of subsets and queries."""
    generator = torch.Generator().manual_seed(seed)
    subsets = counts_of_draws(len(truth), DRAWS, generator).float()
    queries = counts_of_draws(truth.shape[1], DRAWS, generator).double() / truth.shape[1]
    return [
        torch.stack([
            resampled_correlation(one[:, column], truth[:, column], subsets, "spearman") * queries[column]
            for column in range(truth.shape[1])
        ]).sum(0)
        for one in said
    ]  # fmt: skip


def joined_truth(parts: Sequence[Truth]) -> Truth:
    """Retrained models of several rounds as one: subsets of one data set, each in one round.

    Args:
        parts: of the same rows, queries and training, with seeds alike.

    Raises:
        InputError: nothing to join, or other rows or queries.
    """
    if not parts:
        raise InputError("no retrained models to join: give one round or more")
    first = parts[0]
    if any((one.row_ids, one.query_ids) != (first.row_ids, first.query_ids) for one in parts):
        raise InputError("the rounds are of different rows or queries: give rounds of one command")
    numbers, count = [], 0
    for one in parts:
        numbers.append(one.numbers + count)
        count += int(one.numbers.max()) + 1
    margins = [one.margins for one in parts if one.margins is not None]
    weights = [one.weights for one in parts if one.weights is not None]
    return replace(
        first, subsets=torch.cat([one.subsets for one in parts]), numbers=torch.cat(numbers),
        seeds=torch.cat([one.seeds for one in parts]), losses=torch.cat([one.losses for one in parts]),
        train_losses=torch.cat([one.train_losses for one in parts]),
        diverged=torch.cat([one.diverged for one in parts]),
        margins=torch.cat(margins) if margins else None, weights=torch.cat(weights) if weights else None,
    )  # fmt: skip
