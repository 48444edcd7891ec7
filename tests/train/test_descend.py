"""Descent on data follows metagradients, holds the sum of the weights, and goes on from any step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.func import functional_call

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss
from gradfn.model.params import params_of
from gradfn.train import Training, descend, metagradient
from gradfn.train.course import Course


def classes(count, flipped=0.0):
    """Points around three means, a part of which have a wrong class: `(rows, which are wrong)`."""
    generator = torch.Generator().manual_seed(count)
    means = torch.eye(3, 4).double()
    y = torch.randint(3, (count,), generator=generator)
    wrong = torch.rand(count, generator=generator) < flipped
    x = means[y] + 0.3 * torch.randn(count, 4, generator=generator).double()
    return [{"x": a, "y": b} for a, b in zip(x, torch.where(wrong, (y + 1) % 3, y), strict=True)], wrong


def problem(flipped=0.0, **how):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def loss(params, example):
        return F.cross_entropy(functional_call(net, params, example["x"]), example["y"])

    data, wrong = classes(40, flipped)
    return Course(loss, data, Training(2, 20, 0.5, "sgd", momentum=0.5), **how), params_of(net), wrong


def test_a_step_follows_the_metagradient_of_the_mean_loss():
    course, start, _ = problem()
    validation, _ = classes(7)
    first, second = descend(course, start, validation, steps=1, rate=0.01, rule="gradient")
    made = metagradient(course, start, validation)
    values = made.values.mean(1)
    v = values - values.mean()
    assert torch.allclose(second.weights, 1 + 0.01 * v / v.abs().mean(), atol=1e-12)
    assert first.loss == pytest.approx(course.mean_loss(made.end.params, validation), abs=1e-12)
    assert second.loss < first.loss
    assert all(torch.equal(first.params[name], made.end.params[name]) for name in start)


def test_wrong_rows_lose_their_weight_and_the_sum_is_held():
    course, start, wrong = problem(flipped=0.25)
    made = [*descend(course, start, classes(30)[0], steps=4, rate=0.4)]
    assert [one.step for one in made] == [*range(5)]
    assert all(
        one.weights.sum().item() == pytest.approx(40) and bool((one.weights >= 0).all()) for one in made
    )
    last = made[-1].weights
    assert last[wrong].mean() < 0.5 < 1 < last[~wrong].mean()
    assert made[-1].loss < 0.9 * made[0].loss


def test_descent_goes_on_from_the_weights_of_a_step():
    course, start, _ = problem()
    validation, _ = classes(5)
    whole = [*descend(course, start, validation, steps=2)]
    *_, half = descend(course, start, validation, steps=1)
    *_, end = descend(replace(course, weights=half.weights), start, validation, steps=1)
    assert torch.equal(end.weights, whole[-1].weights)
    assert end.loss == whole[-1].loss


def test_rows_of_a_source_have_one_weight():
    course, start, _ = problem()
    groups = torch.arange(40) % 3
    *_, last = descend(course, start, classes(5)[0], steps=2, groups=groups)
    assert all(len(last.weights[groups == group].unique()) == 1 for group in range(3))
    assert len(last.weights.unique()) > 1
    assert last.weights.sum().item() == pytest.approx(40)


def test_language_models_have_validation_rows_of_unequal_length():
    model, data = (
        language_model("gpt2"),
        make_documents([[1, 2, 3], [4, 5, 6, 7], [2, 2, 3], [7, 1, 5, 2, 3]]),
    )
    course = Course(causal_lm_loss(model), data, Training(1, 2, 0.05, "sgd"), normalize="tokens")
    start = params_of(model)
    first, second = descend(course, start, data, steps=1, rate=0.5)
    assert first.loss == pytest.approx(course.mean_loss(first.params, data), rel=1e-6)
    assert second.loss < first.loss


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"validation": []}, "no validation rows"),
        ({"rate": 0.0}, "`rate` of 0.0"),
        ({"groups": torch.zeros(3).long()}, "`groups` of 40"),
    ],
)
def test_bad_input_is_refused_before_a_training(how, said):
    course, start, _ = problem()
    with pytest.raises(InputError, match=said):
        descend(course, start, how.pop("validation", classes(2)[0]), steps=1, **how)


def test_weights_of_visits_are_refused():
    course, start, _ = problem(weights=torch.ones(2, 40).double())
    with pytest.raises(InputError, match="visits or of tokens"):
        descend(course, start, classes(2)[0], steps=1)
