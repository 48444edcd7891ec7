"""A choice among scores by few retrained models, and rounds of these that are one ground truth."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from gradfn.errors import InputError
from gradfn.evaluate.comparison import compare
from gradfn.evaluate.lds import lds, predicted
from gradfn.evaluate.retraining import Retraining
from gradfn.evaluate.subsets import random_subsets
from gradfn.evaluate.truth import Truth, retrain
from gradfn.evaluate.tuning import joined_truth, recommend
from gradfn.scores import Scores
from gradfn.train import Training

ROWS, QUERIES = 12, 8


@pytest.fixture
def world():
    """What rows do, and models of 24 subsets, two each, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    influence = torch.randn(ROWS, QUERIES, generator=generator).double()
    subsets = random_subsets(ROWS, 24).repeat_interleave(2, 0)
    losses = -predicted(influence, subsets)
    losses += 0.3 * torch.randn(losses.shape, generator=generator).double()
    count, zeros = torch.arange(24).repeat_interleave(2), torch.zeros(48)
    truth = Truth(
        subsets, count, torch.tensor([0, 1] * 24), losses, zeros.double(), zeros.bool(),
        [*map(str, range(ROWS))], [*map(str, range(QUERIES))], {},
    )  # fmt: skip
    return influence, truth


def scored(name, *values, dampings=("",)):
    return Scores(
        torch.stack(values), [*map(str, range(ROWS))], [*map(str, range(QUERIES))], dampings, name=name
    )


def test_the_best_is_first_and_the_others_are_behind(world):
    influence, truth = world
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(ROWS, QUERIES, generator=generator).double()
    runs = [scored("wrong", -influence), scored("half", influence + noise), scored("right", influence),
            scored("twin", influence * 1.001)]  # fmt: skip
    found = recommend(runs, truth)
    subsets, losses = truth.targets()
    values = {run.name: float(lds(run.matrix, subsets, losses).mean()) for run in runs}
    assert [one.name for one in found.ranked][2:] == ["half", "wrong"]
    for one, by in zip(found.ranked, found.behind, strict=True):
        assert one.lds.value == pytest.approx(values[one.name])
        assert by.value == pytest.approx(values[found.ranked[0].name] - values[one.name])
        assert by.low <= by.value <= by.high
    assert {one.name for one in found.level} == {"right", "twin"}
    assert found.predicts
    assert found.ceiling is not None and found.ceiling.value > values["right"] - 0.1  # noqa: PT018


def test_dampings_are_chosen_as_in_a_comparison(world):
    influence, truth = world
    several = scored("sweep", -influence, influence, 0 * influence, dampings=("1", "0.1", "0.01"))
    found = recommend([several], truth)
    assert found.ranked[0] == compare([several], *truth.targets()).runs[0]
    assert (found.ranked[0].damping, found.queries) == ("0.1", 4)


def test_nothing_is_trusted_that_does_not_predict(world):
    influence, truth = world
    noise = torch.randn(ROWS, QUERIES, generator=torch.Generator().manual_seed(2)).double()
    found = recommend([scored("noise", noise - influence)], truth)
    assert not found.predicts
    with pytest.raises(InputError, match="no scores to choose from"):
        recommend([], truth)


def test_rounds_are_one_ground_truth(tmp_path):
    net = nn.Linear(3, 1).double()

    def loss(params, example):
        return (functional_call(net, params, (example["x"],)) - example["y"]).square().sum()

    data = [{"x": torch.randn(3, generator=torch.Generator().manual_seed(n)).double(),
             "y": torch.tensor([float(n % 2)]).double()} for n in range(10)]  # fmt: skip
    start = {name: value.detach().clone() for name, value in net.named_parameters()}
    training = Training(epochs=1, batch_size=5, learning_rate=0.1)

    def made(name, subsets):
        given = Retraining(start, loss, training, subsets, seeds=2, seed=5, removal="mask")
        return retrain(tmp_path / name, given, data, data[:3])

    parts = [made(f"round-{n}", random_subsets(10, 4 * n, seed=5)[-4:]) for n in (1, 2)]
    whole, joined = made("whole", random_subsets(10, 8, seed=5)), joined_truth(parts)
    for name in ("subsets", "numbers", "seeds", "diverged"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name
    torch.testing.assert_close(joined.losses, whole.losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(joined.targets(), whole.targets())
    with pytest.raises(InputError, match="different rows or queries"):
        joined_truth([parts[0], replace(parts[1], query_ids=["x", "y", "z"])])
    with pytest.raises(InputError, match="no retrained models to join"):
        joined_truth([])
