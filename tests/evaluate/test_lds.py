import math

import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.correlation import correlation
from gradfn.evaluate.lds import _check, lds, lds_estimate, predicted
from gradfn.evaluate.subsets import random_subsets


@pytest.fixture
def world():
    """A linear world: the loss of a query is minus the sum of the influences of the rows trained on."""
    generator = torch.Generator().manual_seed(0)
    subsets = torch.rand(40, 12, generator=generator) < 0.5
    influence = torch.randn(12, 6, generator=generator).double()
    losses = torch.stack([-influence[mask].sum(0) for mask in subsets]) + 3.0
    return influence, subsets, losses


def test_true_influences_reach_one_and_their_opposite_minus_one(world):
    influence, subsets, losses = world
    assert lds(influence, subsets, losses).tolist() == pytest.approx([1.0] * 6)
    assert lds(-influence, subsets, losses).tolist() == pytest.approx([-1.0] * 6)
    assert lds(influence, subsets, losses, correlate="pearson").tolist() == pytest.approx([1.0] * 6)


def test_a_prediction_sums_the_scores_of_the_rows_trained_on(world):
    influence, subsets, _ = world
    for mask, sums in zip(subsets, predicted(influence, subsets), strict=True):
        assert sums.tolist() == pytest.approx(influence[mask].sum(0).tolist())


def test_it_is_the_correlation_with_minus_the_loss(world):
    influence, subsets, losses = world
    noisy = influence + torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).double()
    for kind in ("spearman", "pearson"):
        expected = correlation(predicted(noisy, subsets), -losses, kind)
        assert lds(noisy, subsets, losses, correlate=kind).tolist() == pytest.approx(expected.tolist())
        one = lds_estimate(noisy, subsets, losses, correlate=kind, draws=200)
        assert one.value == pytest.approx(expected.mean().item())
        assert one.low < one.value < one.high < 1


def test_a_query_with_one_score_for_all_rows_counts_as_zero(world):
    """Where subsets have one size, as they do unless told otherwise."""
    influence, _, _ = world
    rows = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(n))[:6] for n in range(9)])
    subsets = torch.zeros(9, 12, dtype=torch.bool).scatter_(1, rows, True)
    losses = -predicted(influence, subsets)
    scores = influence.clone()
    scores[:, 2] = 0.1
    assert lds(scores, subsets, losses).tolist() == pytest.approx([1, 1, 0, 1, 1, 1])


def test_leaving_one_out_is_the_correlation_with_the_rise_of_the_loss():
    generator = torch.Generator().manual_seed(2)
    scores, rises = torch.randn(2, 15, 3, generator=generator).double()
    subsets = ~torch.eye(15, dtype=torch.bool)
    expected = correlation(scores, rises)
    assert lds(scores, subsets, 5.0 + rises).tolist() == pytest.approx(expected.tolist())


def test_float32_scores_of_wide_range_are_summed_in_float64():
    scores = torch.tensor([[1e8], [1.0], [2.0], [3.0]])
    subsets = ~torch.eye(4, dtype=torch.bool)
    losses = -predicted(scores, subsets)
    assert lds(scores, subsets, losses).item() == pytest.approx(1.0)


def test_subsets_of_equal_sums_tie_whatever_the_order_they_are_added_in():
    generator = torch.Generator().manual_seed(4)
    scores = torch.randint(3, (400, 2), generator=generator).double() * 0.1
    rises = scores + 0.1 * torch.randn(400, 2, generator=generator)
    told = lds(scores, ~torch.eye(400, dtype=torch.bool), rises)
    assert told.tolist() == pytest.approx(correlation(scores, rises).tolist(), abs=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-200, 1.0, 1e300])
def test_sums_are_rounded_once_at_any_size(size):
    generator = torch.Generator().manual_seed(5)
    scores = size * torch.randn(200, 2, generator=generator).double().exp()
    scores[0] *= 1e5
    subsets = torch.rand(9, 200, generator=generator) < 0.5
    exact = [[math.fsum(scores[mask, query].tolist()) for query in range(2)] for mask in subsets]
    assert predicted(scores, subsets).tolist() == exact


def test_fewer_than_three_subsets_are_refused(world):
    influence, subsets, losses = world
    for call in (lds, lds_estimate):
        with pytest.raises(InputError, match=r"a correlation needs 3 subsets or more, not 2: retrain"):
            call(influence, subsets[:2], losses[:2])


def test_numbers_of_other_rows_or_queries_are_refused(world):
    influence, subsets, losses = world
    for given in (
        (influence[:, :2], subsets, losses),
        (influence, subsets, losses[:, :1]),
        (influence[1:], subsets, losses),
        (influence, subsets[1:], losses),
        (influence[:, 0], subsets, losses),
    ):
        with pytest.raises(InputError, match=r"^expected scores \[rows, queries\], .*, got shapes"):
            _check(*given)


def test_numbers_that_are_not_finite_are_refused(world):
    influence, subsets, losses = world
    broken = losses.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(InputError, match="1 of the losses are not finite numbers"):
        lds(influence, subsets, broken)
    with pytest.raises(InputError, match="12 of the scores are not finite numbers"):
        lds(torch.where(torch.arange(6) == 2, torch.inf, influence), subsets, losses)


@pytest.mark.parametrize("correlate", ["spearman", "pearson"])
def test_one_score_for_all_rows_says_nothing(correlate):
    """Its sums over subsets of one size differ by their rounding, over others by their size."""
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(50, 2, generator=generator).double()
    for subsets in (random_subsets(590, 50), torch.rand(50, 590, generator=generator) < 0.5):
        scores = torch.full((590, 2), 0.1).double()
        assert lds(scores, subsets, losses, correlate=correlate).tolist() == [0.0, 0.0]
        assert lds_estimate(scores, subsets, losses, correlate=correlate, draws=20).value == 0.0
