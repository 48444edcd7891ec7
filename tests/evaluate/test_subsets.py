import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.subsets import check_subsets, leave_one_out, random_subsets, without_top


def test_random_subsets_have_their_size_and_do_not_depend_on_how_many_there_are():
    few, many = random_subsets(20, 3, 0.3), random_subsets(20, 9, 0.3)
    assert torch.equal(few, many[:3])
    assert many.sum(1).tolist() == [6] * 9
    assert len({tuple(mask.tolist()) for mask in many}) == 9
    assert not torch.equal(few, random_subsets(20, 3, 0.3, seed=1))


def test_random_subsets_take_every_row_alike():
    taken = random_subsets(10, 2000, leave_out=3).double().mean(0)
    torch.testing.assert_close(taken, torch.full((10,), 0.7, dtype=torch.float64), atol=0.05, rtol=0)


def test_without_top_leaves_out_the_best_proponents_of_each_query():
    scores = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-3.0, 0.0], [1.0, 5.0]])
    masks = without_top(scores, [1, 2])
    left_out = [(~mask).nonzero()[:, 0].tolist() for mask in masks]
    assert left_out == [[1], [1, 3], [3], [1, 3]]


def test_leave_one_out_leaves_each_row_out_once():
    masks = leave_one_out(5)
    assert [(~mask).nonzero().flatten().tolist() for mask in masks] == [[row] for row in range(5)]


@pytest.mark.parametrize(("make", "says"), [
    (lambda: random_subsets(10, 2), "at least 3 subsets, not 2"),
    (lambda: random_subsets(10, 3, 0.01), "keeps 0 of 10 rows"),
    (lambda: random_subsets(10, 3, 0.99), "keeps 10 of 10 rows"),
    *((lambda share=share: random_subsets(10, 3, share), f"above 0 and below 1, not {share}")
      for share in (float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -0.5, 1.5)),
    (lambda: random_subsets(10, 3, leave_out=10), "leaving out 10 keeps 0"),
    (lambda: leave_one_out(2), "at least 3 rows, not 2"),
    (lambda: without_top(torch.zeros(4, 1), [4]), "fewer than the 4 there are"),
    (lambda: without_top(torch.zeros(4, 1), []), "at least 1"),
    (lambda: without_top(torch.tensor([[0.0], [torch.nan]]), [1]), "NaN"),
    (lambda: check_subsets(torch.tensor([[True], [False]])), "subset 1 has no rows"),
    (lambda: check_subsets(torch.tensor([[True, True, False]]), [0, 1, 2]), 
     "subset 0 leaves class 2 out.*: give the class more"),
    (lambda: check_subsets(torch.tensor([[True, False, False]]), [0, 1, 1]),
     r"class 1 out.*: leave out fewer rows \(a smaller K, a larger fraction\), or give the class more rows"),
    (lambda: check_subsets(torch.tensor([[True, True, False]]), [0, 1]), r"\[2\] came for subsets of 3 rows"),
])  # fmt: skip
def test_subsets_that_say_nothing_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_subsets_of_all_classes_pass():
    check_subsets(torch.tensor([[True, True, False], [False, True, True]]), torch.tensor([0, 1, 0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("subsets", "labels"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_labels_may_be_on_another_device(subsets, labels):
    masks, classes = torch.tensor([[True, True, False]]), torch.tensor([0, 1, 2])
    with pytest.raises(InputError, match="subset 0 leaves class 2 out"):
        check_subsets(masks.to(subsets), classes.to(labels))
