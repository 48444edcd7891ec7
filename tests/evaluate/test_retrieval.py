import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.retrieval import _check, recall_at, reciprocal_rank, source_name, source_ranks


def case(tied=False):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 8, generator=generator)
    sources = torch.rand(20, 8, generator=generator) < 0.15
    sources[3] = True
    return (scores.round() if tied else scores), sources


def naive_ranking(scores, sources, query):
    """Rows from the best; among equals those that are no sources come first."""
    return sorted(range(len(scores)), key=lambda row: (-scores[row, query], sources[row, query], row))


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_recall_and_reciprocal_rank(tied):
    scores, sources = case(tied)
    found, ranks = reciprocal_rank(scores, sources), source_ranks(scores, sources)
    for query in range(8):
        order = naive_ranking(scores, sources, query)
        places = [order.index(row) + 1 for row in range(20) if sources[row, query]]
        assert ranks[sources[:, query], query].tolist() == places
        assert found[query].item() == pytest.approx(1 / min(places))
        for k in (1, 5, 20):
            share = sum(place <= k for place in places) / len(places)
            assert recall_at(scores, sources, k)[query].item() == pytest.approx(share)
    assert sources.sum(0).max() > 1


def test_scores_that_say_nothing_find_nothing():
    sources = torch.zeros(10, 1, dtype=torch.bool)
    sources[0] = True
    assert recall_at(torch.zeros(10, 1), sources, 9).tolist() == [0.0]
    assert reciprocal_rank(torch.zeros(10, 1), sources).tolist() == pytest.approx([0.1])


def test_a_query_without_a_source_is_refused():
    sources = torch.tensor([[True, False], [False, False]])
    for call in (reciprocal_rank, lambda scores, known: recall_at(scores, known, 1)):
        with pytest.raises(InputError, match=r"1 queries have no source among the rows: leave them out"):
            call(torch.zeros(2, 2), sources)


def test_sources_of_other_queries_are_refused():
    with pytest.raises(InputError, match=r"like the scores, \[3, 2\], got \[3, 1\]: give those of the same"):
        _check(torch.zeros(3, 2), torch.ones(3, 1, dtype=torch.bool))


@pytest.mark.parametrize("k", [0, 3])
def test_more_rows_than_there_are_is_refused(k):
    with pytest.raises(InputError, match=rf"the number of rows, 2, not {k}"):
        recall_at(torch.zeros(2, 1), torch.tensor([[True], [False]]), k)


def test_scores_that_are_not_finite_find_nothing():
    scores, sources = torch.tensor([[float("nan")], [1.0]]), torch.tensor([[True], [False]])
    for call in (lambda: recall_at(scores, sources, 1), lambda: reciprocal_rank(scores, sources)):
        with pytest.raises(InputError, match=r"^1 of the scores are not finite numbers: leave"):
            call()


def test_a_source_is_named_as_its_row_whatever_the_table_made_of_it():
    given = ["a", "", None, float("nan"), 3, 3.0, 2.5, "3.0"]
    assert [source_name(value) for value in given] == ["a", None, None, None, "3", "3", "2.5", "3.0"]
