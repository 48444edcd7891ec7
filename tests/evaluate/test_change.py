"""Predicted and real changes of losses, also where the true answer is known in closed form."""

from math import isnan

import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.change import Changes, agreement, changes, step_weights
from gradfn.evaluate.lds import lds
from gradfn.evaluate.retraining import Retraining
from gradfn.evaluate.subsets import random_subsets
from gradfn.evaluate.truth import retrain
from gradfn.train import Training

RATE, EPOCHS, COUNT = 0.1, 30, 100
Y = torch.randn(COUNT, generator=torch.Generator().manual_seed(0)).double() + 1
ASKED = torch.tensor([0.0, 2.0, 5.0]).double()


def loss(params, example):
    return (params["w"] - example["y"]).square() / 2


def ends(weights):
    """Where gradient descent on all rows at once ends: `mean_w(y) (1 - (1 - rate W)^T)`, `W = mean(w)`."""
    mean = weights.mean(-1)
    return (weights @ Y) / COUNT / mean * (1 - (1 - RATE * mean) ** EPOCHS)


def true_scores():
    """Minus the derivatives of `(end - q)²/2` in every weight, at weights of 1."""
    left = 1 - RATE
    slope = (Y - Y.mean()) / COUNT * (1 - left**EPOCHS) + Y.mean() * EPOCHS * left ** (
        EPOCHS - 1
    ) * RATE / COUNT
    return -(ends(torch.ones(COUNT).double()) - ASKED) * slope[:, None]


def truth_of(folder, subsets, weights=None):
    retraining = Retraining({"w": torch.zeros(()).double()}, loss, Training(EPOCHS, COUNT, RATE, "sgd"),
                            subsets, removal="mask", weights=weights)  # fmt: skip
    return retrain(folder, retraining, [{"y": y} for y in Y], [{"y": q} for q in ASKED])


def test_steps_agree_with_the_derivative_the_better_the_smaller_they_are(tmp_path):
    scores = true_scores()
    weights = step_weights(scores, [0.01, 0.02, 0.04])
    truth = truth_of(tmp_path, torch.ones_like(weights, dtype=torch.bool), weights)
    torch.testing.assert_close(truth.losses, (ends(truth.weighed())[:, None] - ASKED).square() / 2)
    found = changes(scores, truth.weighed(), truth.losses)
    assert (found.of_all, found.size.tolist()) == (True, [0.01, 0.02, 0.04] * 3)
    torch.testing.assert_close(found.real, truth.losses[1:] - truth.losses[0])
    slopes = [agreement(found.of_size(size)).slope.value for size in (0.01, 0.02, 0.04)]
    errors = [abs(slope - 1) for slope in slopes]
    assert errors[2] < 0.1
    assert errors[0] / errors[2] == pytest.approx(1 / 4, rel=0.1)  # the next term of the series
    assert agreement(found.of_size(0.01)).correlation.value > 0.9999


def test_masks_of_few_rows_are_as_linear_and_masks_of_many_are_not(tmp_path):
    scores = true_scores()
    few, many = (random_subsets(COUNT, 12, fraction=1 - f) for f in (0.02, 0.8))
    truth = truth_of(tmp_path, torch.cat([torch.ones(1, COUNT).bool(), few, many]))
    subsets, losses = truth.targets()
    found = changes(scores, truth.weighed(), losses)
    told = [agreement(found.of_size(size)) for size in sorted(found.size.unique().tolist())]
    assert told[0].slope.value == pytest.approx(1, abs=0.02)
    assert told[0].correlation.value > 0.999 > told[1].correlation.value
    assert lds(scores, subsets[1:13], losses[1:13]).mean() > 0.99


def test_without_a_model_of_all_rows_changes_are_from_the_mean_of_one_size():
    scores = torch.tensor([[1.0], [2.0], [4.0]])
    weights = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1]]).double()
    losses = torch.tensor([[4.0], [1.0], [10.0], [20.0]])
    found = changes(scores, weights, losses)
    assert not found.of_all
    assert found.predicted[:, 0].tolist() == pytest.approx([1.5, -1.5, 1.5, -1.5])
    assert found.real[:, 0].tolist() == [1.5, -1.5, -5, 5]
    assert found.size.tolist() == pytest.approx([(1 / 3) ** 0.5] * 2 + [(2 / 3) ** 0.5] * 2, abs=1e-6)


def test_figures_are_those_of_a_loop_and_their_intervals_hold_them():
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(6, 5, generator=generator).double()
    r = 2 * p + torch.randn(6, 5, generator=generator).double()
    told = agreement(Changes(torch.ones(6).double(), p, r, True))
    assert told.slope.value == pytest.approx(((p * r).sum() / (p * p).sum()).item())
    both = torch.stack([p.flatten(), r.flatten()])
    assert told.correlation.value == pytest.approx(torch.corrcoef(both)[0, 1].item())
    for one in told:
        assert one.low < one.value < one.high
    again = agreement(Changes(torch.ones(6).double(), p, r, True), seed=1)
    assert again.slope.value == told.slope.value
    assert again.slope.low != told.slope.low


def test_of_one_model_the_interval_is_over_queries():
    p = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double()
    told = agreement(Changes(torch.ones(1).double(), p, p + p.square() / 8, True))
    assert told.slope.low < told.slope.value < told.slope.high


def test_nothing_predicted_has_no_figures():
    zero = torch.zeros(2, 3).double()
    told = agreement(Changes(torch.ones(2).double(), zero, torch.ones(2, 3).double(), True))
    assert all(isnan(value) for one in told for value in one)


def test_a_direction_of_all_queries_is_that_of_the_sum_of_their_scores():
    scores = torch.tensor([[1.0, 2.0], [1.0, -2.0], [0.0, 0.0]])
    weights = step_weights(scores, [0.1, -0.2], together=True)
    u = torch.tensor([3.0, -1.0, 0.0]).double()
    u = u / u.square().mean().sqrt()
    torch.testing.assert_close(weights, torch.stack([torch.ones(3), 1 - 0.1 * u, 1 + 0.2 * u]).double())


@pytest.mark.parametrize(("scores", "steps", "says"), [
    (torch.ones(3, 2), [], "must be finite and not 0, each once"), 
    (torch.ones(3, 2), [0.1, 0.1], "each once"),
    (torch.ones(3, 2), [0.0], "not 0"), (torch.ones(3, 2), [float("nan")], "must be finite"),
    (torch.tensor([[1.0, 0.0], [1.0, 0.0]]), [0.1], "query 1 has a score of 0 for all rows"),
    (torch.full((3, 2), torch.inf), [0.1], "hold NaN or infinity"),
])  # fmt: skip
def test_steps_without_a_direction_are_refused(scores, steps, says):
    with pytest.raises(InputError, match=says):
        step_weights(scores, steps)


def test_what_has_no_changes_is_refused():
    with pytest.raises(InputError, match="so nothing changes: retrain at other weights"):
        changes(torch.ones(3, 2), torch.ones(4, 3).double(), torch.ones(4, 2))
