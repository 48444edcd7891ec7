import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.overlap import jaccard, top_overlap


def test_overlap_counts_the_rows_in_both():
    a, b = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(0))
    b = a + b
    for k in (1, 5, 30):
        for query in range(6):
            first, second = (
                set(sorted(range(30), key=lambda row: -scores[row, query])[:k]) for scores in (a, b)
            )
            assert top_overlap(a, b, k)[query].item() == pytest.approx(len(first & second) / k)
            assert jaccard(a, b, k)[query].item() == pytest.approx(len(first & second) / len(first | second))
    assert 0 < top_overlap(a, b, 5).mean() < 1


def test_equal_scores_stand_in_the_order_of_their_rows():
    a = torch.zeros(4, 1)
    assert top_overlap(a, torch.tensor([[2.0], [1.0], [0.0], [0.0]]), 2).tolist() == [1.0]


@pytest.mark.parametrize("k", [0, 5])
def test_more_rows_than_there_are_is_refused(k):
    with pytest.raises(InputError, match=rf"the number of rows, 4, not {k}"):
        top_overlap(torch.zeros(4, 1), torch.zeros(4, 1), k)


def test_scores_that_are_not_finite_have_no_top():
    a, bad = torch.tensor([[2.0], [1.0]]), torch.tensor([[float("nan")], [1.0]])
    for pair in ((a, bad), (bad, a)):
        with pytest.raises(InputError, match=r"^1 of the scores are not finite numbers: leave"):
            top_overlap(*pair, 1)
