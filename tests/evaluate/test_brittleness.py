import math

import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.brittleness import (
    Removal,
    brittleness,
    brittleness_subsets,
    flips,
    removals,
)
from gradfn.evaluate.lds import predicted

ROWS, QUERIES = 9, 4


@pytest.fixture
def influence():
    return torch.randn(ROWS, QUERIES, generator=torch.Generator().manual_seed(0)).double()


def test_subsets_have_all_rows_then_no_best_then_no_random_ones(influence):
    subsets = brittleness_subsets(influence, [2, 3], controls=4)
    assert (~subsets).sum(1).tolist() == [0] + [2, 3] * QUERIES + [2] * 4 + [3] * 4
    for query in range(QUERIES):
        order = sorted(range(ROWS), key=lambda row: -influence[row, query])
        for place, k in enumerate((2, 3)):
            assert {*(~subsets[1 + 2 * query + place]).nonzero()[:, 0].tolist()} == {*order[:k]}


def test_in_a_linear_world_the_rise_is_the_sum_of_the_influences_removed(influence):
    subsets = brittleness_subsets(influence, [2, 3], controls=4)
    full, parts = removals(subsets, 5 - predicted(influence, subsets))
    for part, k, first in zip(parts, (2, 3), (9, 13), strict=True):
        told = brittleness(full, part)
        best = influence.sort(dim=0, descending=True).values[:k].sum(0)
        chance = torch.stack([influence[~mask].sum(0) for mask in subsets[first : first + 4]])
        assert part.k == k
        assert told.rise.value == pytest.approx(best.mean().item())
        assert told.by_chance.value == pytest.approx(chance.mean().item())
        assert told.above_chance.value == pytest.approx((best > chance).double().mean().item())
        assert told.rise.low <= told.rise.value <= told.rise.high
        assert (told.lost, told.lost_by_chance) == (None, None)


def test_rows_may_be_removed_for_all_queries_together(influence):
    """In a linear world the rise is exact, and the error is that of one more random removal."""
    subsets = brittleness_subsets(influence, [2, 3], controls=4, together=True)
    assert (~subsets).sum(1).tolist() == [0, 2, 3] + [2] * 4 + [3] * 4
    losses = 5 - predicted(influence, subsets)
    full, parts = removals(subsets, losses, together=True)
    for part, k, first in zip(parts, (2, 3), (3, 7), strict=True):
        told, best = brittleness(full, part), influence.sum(1).sort(descending=True).indices[:k]
        chance = torch.stack([influence[~mask].sum(0) for mask in subsets[first : first + 4]])
        assert told.rise.value == pytest.approx(influence[best].sum(0).mean().item())
        more = told.rise.value - chance.mean().item()
        assert told.more.value == pytest.approx(more)
        error = chance.mean(1).std().item() * (1 + 1 / 4) ** 0.5
        assert told.in_errors.value == pytest.approx(more / error)
        assert told.in_errors.low == pytest.approx(told.more.low / error)
    with pytest.raises(InputError, match="are not those of a test of brittleness"):
        removals(subsets, losses)


def test_random_removals_that_do_nothing_have_no_standard_error():
    told = brittleness(torch.zeros(2), Removal(1, torch.ones(2), torch.zeros(3, 2)))
    assert math.isnan(told.in_errors.value)


def test_an_answer_is_lost_where_its_probability_falls_below_a_half():
    full, top = (-torch.tensor(p).log() for p in ([0.9, 0.6, 0.5, 0.45], [0.4, 0.7, 0.1, 0.1]))
    random = -torch.tensor([[0.9, 0.4, 0.6, 0.1], [0.9, 0.9, 0.6, 0.9]]).log()
    told = brittleness(full - 1e-6, Removal(1, top, random), probabilities=True)
    assert told.lost.value == pytest.approx(2 / 3)
    assert told.lost_by_chance.value == pytest.approx(0.5 / 3)
    unsure = brittleness(full + math.log(9), Removal(1, top, random), probabilities=True)
    assert unsure.lost is None


def test_predictions_flip_as_a_loop_counts_them(influence):
    subsets = brittleness_subsets(influence, [2, 3], controls=4)
    margins = torch.randn(len(subsets), QUERIES, generator=torch.Generator().manual_seed(3)).double()
    margins[0] = torch.tensor([2.0, -1.0, 0.1, 1.0])
    full, parts = removals(subsets, margins)
    for place, (part, first) in enumerate(zip(parts, (9, 13), strict=True)):
        told = flips(full, part)
        lost, chance = [], []
        for query in range(QUERIES):
            if margins[0, query] > 0:
                lost.append(margins[1 + 2 * query + place, query] <= 0)
                chance += [margins[control, query] <= 0 for control in range(first, first + 4)]
        assert 1 < told.right == len(lost) < QUERIES
        assert told.flipped.value == pytest.approx(sum(lost) / len(lost))
        assert told.flipped_by_chance.value == pytest.approx(sum(chance) / len(chance))


def test_a_tie_of_classes_is_no_right_prediction():
    tied = flips(torch.tensor([0.0, 1.0]), Removal(1, torch.tensor([-1.0, 0.0]), torch.ones(3, 2)))
    assert (tied.right, tied.flipped.value) == (1, 1.0)
    assert flips(torch.zeros(2), Removal(1, torch.ones(2), torch.ones(3, 2))) == (0, None, None)


def test_other_subsets_are_refused(influence):
    subsets = brittleness_subsets(influence, [2, 3], controls=4)
    for wrong in (subsets[1:], subsets.flip(0), subsets[:7], torch.ones(3, ROWS).bool()):
        with pytest.raises(InputError, match=r"are not those of a test of brittleness"):
            removals(wrong, torch.zeros(len(wrong), QUERIES))


def test_what_cannot_be_compared_is_refused(influence):
    with pytest.raises(InputError, match="have one twice"):
        brittleness_subsets(influence, [2, 2])
    with pytest.raises(InputError, match=r"fewer than the 9 there are"):
        brittleness_subsets(influence, [9])
    with pytest.raises(InputError, match="no model was trained without 2 random rows"):
        brittleness(torch.zeros(2), Removal(2, torch.ones(2), torch.zeros(0, 2)))
    with pytest.raises(InputError, match="no model was trained without 2 random rows"):
        flips(torch.ones(2), Removal(2, torch.ones(2), torch.zeros(0, 2)))


def test_intervals_by_chance_are_over_the_random_removals_too():
    """Controls that differ in all queries alike: over queries alone there would be no interval."""
    shift = torch.tensor([[-1.0], [0.0], [0.0], [2.0]])
    removal = Removal(2, torch.full((6,), 0.5), shift.expand(4, 6))
    told = brittleness(torch.full((6,), 0.1), removal, probabilities=True)
    turned = flips(torch.ones(6), Removal(2, torch.ones(6), shift.expand(4, 6)))
    for one in (told.by_chance, told.above_chance, told.lost_by_chance, turned.flipped_by_chance):
        assert one.low < one.value < one.high
    assert told.rise.low == told.rise.high
