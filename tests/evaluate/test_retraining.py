from dataclasses import replace

import pytest
import torch
from tiny import language_model

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.evaluate.retraining import Retraining, model_seed
from gradfn.evaluate.subsets import random_subsets
from gradfn.evaluate.truth import open_truth, retrain
from gradfn.model.losses import causal_lm_loss
from gradfn.model.params import params_of
from gradfn.train import Training
from gradfn.train.course import Course

X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)).double()
ROWS = [{"x": x, "y": x.sum().sin()} for x in X]
START = {"w": torch.zeros(2).double()}
SUBSETS = random_subsets(12, 3)


def loss(params, example):
    return (params["w"] @ example["x"] - example["y"]).square()


def asked(**changes):
    training = Training(epochs=2, batch_size=3, learning_rate=0.05, optimizer="adam")
    subsets = changes.pop("subsets", SUBSETS)
    return Retraining(START, loss, training, subsets, **{"seeds": 2, "seed": 5, "removal": "mask", **changes})


def test_masked_models_are_those_of_a_course_at_these_weights(tmp_path):
    """The k-th seed is that of a course of the seed + k, and a removed row keeps its place."""
    for number, weights in enumerate((None, torch.linspace(-1, 2, 36).double().reshape(3, 12))):
        one = asked(weights=weights)
        result = retrain(tmp_path / str(number), one, ROWS, ROWS[:5])
        assert (result.removal, result.seeds.tolist()) == ("mask", [5, 6] * 3)
        own = SUBSETS.double() if weights is None else weights * SUBSETS
        assert torch.equal(result.weighed(), own)
        assert torch.equal(open_truth(tmp_path / str(number)).weighed(), own)
        for model in range(6):
            course = Course(loss, ROWS, one.training, seed=5 + model % 2, weights=own[model // 2])
            *_, last = course.steps(course.start(START))
            torch.testing.assert_close(result.losses[model], course.row_losses(last.state.params, ROWS[:5]))


def test_weights_of_tokens_are_those_of_a_course_and_are_kept(tmp_path):
    """The row that a subset leaves out has no weight, whatever those of its tokens."""
    model, rows = language_model("llama"), make_documents([[1, 2, 3, 4], [5, 6, 7], [8, 9, 1, 2]])
    subsets, weights = torch.tensor([[True] * 3, [True, False, True]]), torch.rand(2, 3, 4).double() + 0.5
    given = Retraining(params_of(model), causal_lm_loss(model), Training(1, 2, 0.01), subsets, seeds=2,
                       removal="mask", weights=weights)  # fmt: skip
    result = retrain(tmp_path, given, rows, rows)
    own = weights * subsets[..., None]
    assert torch.equal(open_truth(tmp_path).weighed(), own)
    for model in range(4):
        course = Course(given.loss, rows, given.training, seed=model % 2, weights=own[model // 2])
        *_, last = course.steps(course.start(given.start))
        torch.testing.assert_close(result.losses[model], course.row_losses(last.state.params, rows))
    with pytest.raises(InputError, match=r"subsets\.digest"):
        retrain(tmp_path, replace(given, weights=weights.flip(0)), rows, rows)
    with pytest.raises(InputError, match="not told apart by token"):
        retrain(tmp_path / "mean", asked(weights=torch.ones(3, 12, 2).double()), ROWS, ROWS)
    assert not (tmp_path / "mean").exists()


def test_a_mask_may_leave_fewer_rows_than_a_batch(tmp_path):
    few = random_subsets(12, 3, fraction=0.2)
    assert retrain(tmp_path / "mask", asked(subsets=few), ROWS, ROWS).losses.isfinite().all()
    with pytest.raises(InputError, match="larger than the smallest subset, of 2"):
        retrain(tmp_path / "drop", asked(subsets=few, removal="drop"), ROWS, ROWS)


def test_the_removal_is_recorded_and_another_is_refused_in_one_run(tmp_path):
    dropped = retrain(tmp_path, asked(removal="drop"), ROWS, ROWS)
    assert (dropped.removal, "removal" in dropped.settings) == ("drop", False)
    assert dropped.seeds[:2].tolist() == [model_seed(5, 0), model_seed(5, 1)]
    with pytest.raises(InputError, match="removal"):
        retrain(tmp_path, asked(), ROWS, ROWS)
    with pytest.raises(InputError, match=r"subsets\.digest"):
        retrain(tmp_path, asked(removal="drop", subsets=~SUBSETS), ROWS, ROWS)


def test_masked_models_may_have_seeds_of_their_own():
    assert len(asked(seeding="independent").models().seeds.unique()) == 6


@pytest.mark.parametrize(("weights", "how", "says"), [
    (torch.ones(3, 12), {"removal": "drop"}, "rows that are dropped have no `weights`: give `removal="),
    (torch.full((3, 12), torch.nan), {}, "`weights` hold NaN or infinity"),
    (torch.ones(2, 12), {}, r"one weight a row of each of the 3 subsets, \[3, 12\], or one a token"),
    (torch.ones(2, 12, 5), {}, r"and got \[2, 12, 5\]"),
    (torch.ones(3, 12, 5, 1), {}, r"and got \[3, 12, 5, 1\]"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(weights, how, says):
    with pytest.raises(InputError, match=says):
        asked(weights=weights.double(), **how)
