"""Runs beside each other: their LDS against one ground truth, at a damping chosen on other queries."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradfn.evaluate.bootstrap import Estimate
from gradfn.evaluate.ceiling import noise_ceiling_estimate
from gradfn.evaluate.lds import lds, lds_estimate
from gradfn.evaluate.selection import chosen, halves
from gradfn.evaluate.subsets import FEWEST
from gradfn.evaluate.truth import Truth
from gradfn.scores import Scores


class Compared(NamedTuple):
    """The damping that a run is reported at, its LDS, and the Pearson correlation beside it."""

    name: str
    damping: str
    lds: Estimate
    pearson: Estimate
    constant: int
    """How many queries have one score for all rows; these count as 0."""


class Comparison(NamedTuple):
    """Runs in the order given, and the numbers of the queries that they are reported on."""

    runs: list[Compared]
    queries: Tensor


def compare(
    runs: Sequence[Scores],
    subsets: Bool[Tensor, "subsets rows"],
    losses: Float[Tensor, "subsets queries"],
    *,
    seed: int = 0,
) -> Comparison:
    """Compare runs with retrained models.

    Where any run has several dampings, dampings are chosen on half of the queries, drawn with the seed: each
    run takes the damping with the highest LDS there, and all runs are reported on the other half alone.

    Args:
        runs: of the same rows and queries, see `refuse_other_data`.
        subsets, losses: see `lds`.
        seed: of the halves, and of the bootstrap.

    Raises:
        InputError: fewer than three subsets; several dampings, and fewer than two queries.

    >>> subsets = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    >>> scores = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    >>> one = Scores(scores[None], ["a", "b", "c", "d"], ["q"])
    >>> compare([one], subsets, -(subsets.float() @ scores)).runs[0].lds.value
    1.0
    """
    several = any(len(run.dampings) > 1 for run in runs)
    choose, report = halves(losses.shape[1], seed=seed) if several else (None, torch.arange(losses.shape[1]))
    compared = []
    for run in runs:
        best = _best(run, subsets, losses, choose)
        scores, truth = run.values[best][:, report], losses[:, report]
        compared.append(
            Compared(
                run.name, run.dampings[best], lds_estimate(scores, subsets, truth, seed=seed),
                lds_estimate(scores, subsets, truth, correlate="pearson", seed=seed),
                int((scores.amax(0) == scores.amin(0)).sum()),
            )
        )  # fmt: skip
    return Comparison(compared, report)


def damping_curve(
    run: Scores,
    subsets: Bool[Tensor, "subsets rows"],
    losses: Float[Tensor, "subsets queries"],
    queries: Int[Tensor, " part"],
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The LDS of a run at each of its dampings, on some queries.

    Args:
        run, subsets, losses, seed: see `compare`.
        queries: their numbers.

    >>> subsets = torch.rand(9, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    >>> scores = torch.tensor([[1.0], [2.0]])
    >>> run = Scores(torch.stack([scores, -scores]), ["a", "b"], ["q"], ("1", "0.1"))
    >>> curve = damping_curve(run, subsets, -(subsets.float() @ scores), torch.tensor([0]))
    >>> {name: one.value for name, one in curve.items()}
    {'1': 1.0, '0.1': -1.0}
    """
    return {
        name: lds_estimate(scores[:, queries], subsets, losses[:, queries], seed=seed)
        for name, scores in zip(run.dampings, run.values, strict=True)
    }


def _best(run: Scores, subsets: Tensor, losses: Tensor, choose: Tensor | None) -> int:
    if choose is None or len(run.dampings) == 1:
        return 0
    each = [lds(scores[:, choose], subsets, losses[:, choose]) for scores in run.values]
    return chosen(torch.stack(each), torch.arange(len(choose)))


def ceiling_of(truth: Truth, queries: Tensor, seed: int) -> Estimate | None:
    """The noise ceiling of some queries; None where fewer than three subsets have two models left."""
    kept = truth.of_models(truth.averaged())
    if int((kept.numbers.unique(return_counts=True)[1] > 1).sum()) < FEWEST:
        return None
    seeds = kept.seeds if truth.seeding == "shared" else None
    return noise_ceiling_estimate(kept.losses[:, queries], kept.numbers, seeds=seeds, seed=seed)
