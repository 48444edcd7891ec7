"""How much of what a method finds a baseline finds too."""

import pytest
import torch

from gradfn.errors import InputError
from gradfn.report.baselines import Baseline, baseline_facts
from gradfn.report.rows import Ranked
from gradfn.scores import extremes


def test_the_overlap_is_that_of_sets():
    generator = torch.Generator().manual_seed(0)
    values, other = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator).round()
    ranked, baseline = Ranked(*extremes([values], 6)), Baseline("bm25", other)
    shares = []
    for query in range(4):
        mine = sorted(range(30), key=lambda row, q=query: -values[row, q])[:6]
        theirs = sorted(range(30), key=lambda row, q=query: (-other[row, q], row))
        assert [baseline.rank(row, query) for row in theirs] == list(range(1, 31))
        shares.append(len({*mine} & {*theirs[:6]}) / 6)
    assert baseline.overlap(ranked, 6) == pytest.approx(sum(shares) / 4)
    ((_, told),) = baseline_facts([baseline], ranked, 6)
    assert (
        told
        == f"finds {sum(shares) / 4:.0%} of the first 6 proponents among its own first 6 (20.0% by chance)"
    )


def test_queries_are_once_for_all_dampings():
    values = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    baseline = Baseline("bm25", values[:, :2])
    assert baseline.rank(3, 2) == baseline.rank(3, 0)
    assert 0 <= baseline.overlap(Ranked(*extremes([values], 5)), 5) <= 1
    with pytest.raises(InputError, match="a baseline of 2 queries is beside scores of 3"):
        baseline.overlap(Ranked(*extremes([values[:, :3]], 5)), 5)
