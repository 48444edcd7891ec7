"""How far the runs of a page agree, pair by pair and query by query."""

from collections.abc import Mapping, Sequence

import torch

from gradfn.evaluate.correlation import correlation
from gradfn.evaluate.overlap import top_overlap
from gradfn.report.page_runs import PageRun

PAIRED = 10_000_000
"""Scores that are compared at a time."""


def agreements_of(runs: Sequence[PageRun], queries: int, k: int) -> Mapping[str, Sequence[tuple[int, float]]]:
    """How many of the `k` highest rows of two runs are the same, and their rank correlation, for each query.

    The name of a pair has the places of both runs and their dampings: `0.0-1.2`. Dampings are paired as they
    are shown together, see `PageRun.damping`.

    Args:
        runs: of the same rows and queries.
        queries: the first ones, which are compared.
        k: from 1 to the number of rows.
    """
    pairs = {
        tuple(sorted([(one, at), (other, theirs.damping(name))]))
        for one, mine in enumerate(runs) for at, name in enumerate(mine.scores.dampings)
        for other, theirs in enumerate(runs) if one != other
    }  # fmt: skip
    found = {}
    for pair in sorted(pairs):
        values = [runs[run].scores.values[damping] for run, damping in pair]
        told = list[tuple[int, float]]()
        for part in torch.arange(queries).split(max(1, PAIRED // len(values[0]))):
            a, b = (one[:, part] for one in values)
            same, order = (k * top_overlap(a, b, k)).round().int(), correlation(a, b)
            told += zip(same.tolist(), [float(f"{one:.3g}") for one in order.tolist()], strict=True)
        found["-".join(f"{run}.{damping}" for run, damping in pair)] = told
    return found
