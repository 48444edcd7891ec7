"""Rows that are kept: the same as sorting by hand, within every group."""

import math

import pytest
import torch

from gradfn.errors import InputError
from gradfn.selection import select_rows


def values_of(rows=23, queries=3, ties=True):
    values = torch.randn(rows, queries, generator=torch.Generator().manual_seed(0))
    return values.mul(2).round() / 2 if ties else values


def ranked_by_hand(rows, score, lowest=False):
    return sorted(rows, key=lambda row: (score[row] if lowest else -score[row], row))


@pytest.mark.parametrize("best", ["highest", "lowest"])
@pytest.mark.parametrize("over", ["mean", "max"])
@pytest.mark.parametrize("by", [None, [row % 3 for row in range(23)]])
@pytest.mark.parametrize("rule", [{"keep": 0.3}, {"keep": 1.0}, {"drop_worst": 4}])
def test_the_best_of_every_group_are_kept(rule, by, over, best):
    values, groups = values_of(), by or [0] * 23
    score = [sum(row) / 3 if over == "mean" else max(row) for row in values.double().tolist()]
    expected = {}
    for group in set(groups):
        order = ranked_by_hand([row for row in range(23) if groups[row] == group], score, best == "lowest")
        count = math.ceil(rule["keep"] * len(order) - 1e-9) if "keep" in rule else len(order) - 4
        expected |= {row: rank for rank, row in enumerate(order[:count], 1)}
    found = select_rows(values, **rule, by=by, over=over, best=best)
    assert found.rows.tolist() == sorted(expected)
    assert found.ranks.tolist() == [expected[row] for row in sorted(expected)]
    assert found.scores.tolist() == pytest.approx([score[row] for row in sorted(expected)])
    assert found.queries is None


@pytest.mark.parametrize("by", [None, ["ab"[row > 9] for row in range(23)]])
def test_each_query_has_its_best_rows(by):
    values, groups = values_of(), by or [0] * 23
    expected = {}
    for query in range(3):
        for group in set(groups):
            own = [row for row in range(23) if groups[row] == group]
            for rank, row in enumerate(ranked_by_hand(own, values[:, query].tolist())[:4], 1):
                expected[row] = min(expected.get(row, (rank, query)), (rank, query))
    found = select_rows(values, top_per_query=4, by=by)
    assert found.rows.tolist() == sorted(expected)
    assert list(zip(found.ranks.tolist(), found.queries.tolist(), strict=True)) == [
        expected[row] for row in sorted(expected)
    ]
    for row, query, score in zip(found.rows, found.queries, found.scores, strict=True):
        assert score == values[row, query]


def test_equal_scores_are_ranked_by_row_number():
    same = torch.zeros(40, 1)
    assert select_rows(same, keep=0.5).rows.tolist() == list(range(20))
    assert select_rows(same, drop_worst=30, best="lowest").rows.tolist() == list(range(10))


def test_a_share_is_exact_as_it_is_written():
    assert len(select_rows(torch.zeros(50, 1), keep=0.14).rows) == 7  # 0.14 * 50 is 7.000000000000001
    assert len(select_rows(torch.zeros(3, 1), keep=0.01).rows) == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "give one of `keep`"),
        ({"keep": 0.5, "drop_worst": 1}, "and only one"),
        ({"keep": 0.0}, "a share of the rows, above 0 and up to 1, not 0.0"),
        ({"keep": 80.0}, "a share of the rows"),
        ({"keep": math.nan}, "a share of the rows"),
        ({"drop_worst": 0}, "`drop_worst` must be 1 or more"),
        ({"drop_worst": 5}, "there are 5 rows, of which `drop_worst=5` would leave none"),
        ({"top_per_query": 6}, "there are 5 rows, of which `top_per_query=6` would take more"),
        ({"drop_worst": 2, "by": "aaabb"}, "group 'b' has 2 rows, of which"),
        ({"keep": 0.5, "by": "ab"}, "2 groups for 5 rows"),
    ],
)
def test_what_leaves_nothing_is_refused(how, words):
    with pytest.raises(InputError, match=words):
        select_rows(torch.zeros(5, 2), **how)


def test_scores_that_rank_nowhere_are_refused():
    with pytest.raises(InputError, match="no finite numbers"):
        select_rows(torch.tensor([[1.0], [math.nan]]), keep=0.5)
