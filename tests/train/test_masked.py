"""Models trained at weights of their rows: masks, and real numbers."""

from dataclasses import replace

import pytest
import torch
from train_problems import OPTIMIZERS, ROWS, SETTINGS, classification, make_mlp, problem

from gradfn.errors import InputError
from gradfn.model.params import params_of
from gradfn.train import make_trainer, train
from gradfn.train.course import Course

ALL = torch.ones(3, ROWS, dtype=torch.bool)


def weights():
    """Of three models: real ones, a mask, and a mask that empties the first batch of seed 4."""
    real = torch.linspace(-0.5, 2.0, ROWS).double()
    course = Course(lambda p, e: p["w"], [{"x": torch.ones(())}] * ROWS, SETTINGS["sgd"], seed=4)
    first = torch.ones(ROWS).double()
    first[next(course.batches())[1]] = 0
    return torch.stack([real, (torch.arange(ROWS) % 3 > 0).double(), first])


@OPTIMIZERS
def test_models_at_weights_are_courses_at_these_weights(training):
    """And at weights of 1 the plain training, to the bit."""
    make, loss, _, data = problem("mlp")
    start, seeds = params_of(make()), [4, 5, 4]
    trainer = make_trainer(start, loss, data, training)
    trained = trainer.train(ALL, seeds, weights=weights())
    for model, (own, seed) in enumerate(zip(weights(), seeds, strict=True)):
        course = Course(loss, data, training, seed=seed, weights=own)
        *_, last = course.steps(course.start(start))
        for name, value in last.state.params.items():
            torch.testing.assert_close(trained.params[name][model], value, rtol=1e-12, atol=1e-13)
    plain, ones = (trainer.train(ALL, seeds, weights=own) for own in (None, torch.ones(3, ROWS).double()))
    for name, value in plain.params.items():
        assert torch.equal(value, ones.params[name])
    assert torch.equal(plain.losses, ones.losses)


def test_subsets_of_unequal_sizes_have_weights_too():
    make, loss, _, data = problem("mlp")
    subsets = ALL.clone()
    subsets[1, 6:] = False
    trained = train(make, loss, data, subsets, [0, 1, 2], SETTINGS["adam"], weights=weights())
    for model in range(3):
        one = slice(model, model + 1)
        alone = train(make, loss, data, subsets[one], [model], SETTINGS["adam"], weights=weights()[one])
        for name, value in alone.params.items():
            torch.testing.assert_close(trained.params[name][one], value)
        torch.testing.assert_close(trained.losses[one], alone.losses)


def test_masks_in_chunks_are_those_of_all_at_once():
    make, loss, _, data = problem("mlp")
    done = []
    whole, parts = (
        train(make, loss, data, ALL, [0, 1, 2], SETTINGS["clipped"], weights=weights(), chunk=chunk,
              progress=done.append)
        for chunk in (3, 2)
    )  # fmt: skip
    for name, value in whole.params.items():
        torch.testing.assert_close(parts.params[name], value)
    assert sum(done) == 2 * 3 * ROWS * 2


def test_an_empty_step_is_taken_by_momentum_and_decay():
    """All rows of the second epoch have weight 0, as if steps with gradient 0 followed."""
    data = [{"x": torch.ones(()).double()}] * 2
    training = replace(SETTINGS["decayed"], batch_size=2)
    moved = train({"w": torch.zeros(()).double()}, lambda p, e: p["w"] * e["x"], data,
                  torch.ones(1, 2, dtype=torch.bool), [0], training,
                  weights=torch.zeros(1, 2).double()).params["w"]  # fmt: skip
    assert moved.item() == 0
    moved = train({"w": torch.ones(()).double()}, lambda p, e: p["w"] * e["x"], data,
                  torch.ones(1, 2, dtype=torch.bool), [0], training,
                  weights=torch.zeros(1, 2).double()).params["w"]  # fmt: skip
    first = 0.1 * 1.0  # decay times the weight
    w = 1.0 - 0.1 * first
    assert moved.item() == pytest.approx(w - 0.1 * (0.5 * first + 0.1 * w))


def test_the_loss_of_rows_of_weight_0_is_in_no_mean():
    net = make_mlp()
    _, _, _, data = problem("mlp")
    own = (torch.arange(ROWS) < 4).double()[None]
    training = replace(SETTINGS["sgd"], epochs=1, learning_rate=1e-12)
    trained = train(params_of(net), classification(net), data, ALL[:1], [0], training, weights=own)
    course = Course(classification(net), data, training)
    wanted = course.row_losses(params_of(net), data)[:4].mean()
    torch.testing.assert_close(trained.losses[0], wanted)


@pytest.mark.parametrize(("weights", "says"), [
    (torch.ones(2, ROWS), r"\[3, 11\] finite numbers, one for each row of each model, got \[2, 11\]"),
    (torch.full((3, ROWS), torch.nan), "finite numbers"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(weights, says):
    make, loss, _, data = problem("mlp")
    with pytest.raises(InputError, match=says):
        make_trainer(make, loss, data, SETTINGS["sgd"]).check(ALL, [0, 1, 2], weights)
