import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.mislabel import _positives, auroc, average_precision, precision_at


def case(seed, tied):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, generator=generator)
    wrong = torch.rand(40, generator=generator) < 0.3
    scores = scores + wrong
    return (scores.round() if tied else scores), wrong


def naive_auroc(scores, wrong):
    pairs = [(s > t) + 0.5 * (s == t) for s in scores[wrong] for t in scores[~wrong]]
    return sum(map(float, pairs)) / len(pairs)


def naive_average_precision(scores, wrong):
    """Step by step through the thresholds."""
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = (wrong & taken).sum().item() / wrong.sum().item()
        area += (recall - before) * (wrong & taken).sum().item() / taken.sum().item()
        before = recall
    return area


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_they_are_what_their_definitions_say(seed, tied):
    scores, wrong = case(seed, tied)
    assert auroc(scores, wrong) == pytest.approx(naive_auroc(scores, wrong))
    assert average_precision(scores, wrong) == pytest.approx(naive_average_precision(scores, wrong))


def test_scores_that_say_nothing_are_at_chance():
    wrong = torch.arange(10) < 3
    assert auroc(torch.zeros(10), wrong) == 0.5
    assert average_precision(torch.zeros(10), wrong) == pytest.approx(0.3)


def test_the_best_and_the_worst_order():
    wrong = torch.arange(10) < 3
    assert (auroc(wrong.float(), wrong), average_precision(wrong.float(), wrong)) == (1.0, 1.0)
    assert auroc(-wrong.float(), wrong) == 0.0
    assert [precision_at(wrong.float(), wrong, k) for k in (1, 3, 6)] == [1.0, 1.0, 0.5]


def test_precision_counts_the_wrong_rows_among_the_highest():
    scores, wrong = case(1, tied=False)
    for k in (1, 7, 40):
        top = sorted(range(40), key=lambda row: -scores[row])[:k]
        assert precision_at(scores, wrong, k) == pytest.approx(sum(wrong[row].item() for row in top) / k)


def test_equal_scores_do_not_help():
    wrong = torch.tensor([True, True, False, False])
    assert [precision_at(torch.zeros(4), wrong, k) for k in (1, 2, 4)] == [0.0, 0.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_marks_may_be_numbers(dtype):
    scores, wrong = case(2, tied=True)
    for call in (auroc, average_precision, lambda s, w: precision_at(s, w, 9)):
        assert call(scores, wrong.to(dtype)) == call(scores, wrong)


def test_marks_of_other_rows_are_refused():
    with pytest.raises(InputError, match=r"got marks of shape \[2\] for scores of \[3\]"):
        _positives(torch.zeros(3), torch.tensor([True, False]))


@pytest.mark.parametrize("wrong", [torch.zeros(4).bool(), torch.ones(4).bool()])
def test_one_kind_of_rows_alone_is_refused(wrong):
    for call in (auroc, average_precision, lambda s, w: precision_at(s, w, 1)):
        with pytest.raises(
            InputError, match=r"of 4 rows are wrong, but detection needs wrong and right ones: give"
        ):
            call(torch.zeros(4), wrong)


@pytest.mark.parametrize("k", [0, 5])
def test_more_rows_than_there_are_is_refused(k):
    with pytest.raises(InputError, match=rf"k must be between 1 and the number of rows, 4, not {k}"):
        precision_at(torch.zeros(4), torch.tensor([True, False, False, False]), k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_have_no_rank(bad):
    scores, wrong = torch.tensor([bad, 1.0, 2.0]), torch.tensor([True, False, False])
    for call in (lambda: auroc(scores, wrong), lambda: average_precision(scores, wrong),
                 lambda: precision_at(scores, wrong, 1)):  # fmt: skip
        with pytest.raises(InputError, match=r"^1 of the scores are not finite numbers: leave"):
            call()
