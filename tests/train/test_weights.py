"""Trainings at weights of tokens: those of a loss that weighs its own, and the derivatives in them."""

import re
from dataclasses import replace

import pytest
import torch
from tiny import language_model
from train_problems import SETTINGS, classification, make_mlp, vectors

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss
from gradfn.model.params import params_of
from gradfn.testing.strategies import randomize
from gradfn.train import Training, make_trainer, metagradient, metasmoothness, train
from gradfn.train.course import Course, Valuing
from gradfn.train.stacked import looped
from gradfn.train.step import losses_of
from gradfn.train.watched import fast_values

LENGTHS = (3, 6, 4, 5, 6)
MODEL = randomize(language_model("gpt2"), 0)
LOSS, START = causal_lm_loss(MODEL), params_of(MODEL)
SETTING = Training(2, 2, 0.02, "adamw", eps=1e-2, weight_decay=0.1, max_grad_norm=0.3)


def documents(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(11, (length,), generator=generator).tolist() for length in LENGTHS]
    masked = [[-100 if place == 2 else token for place, token in enumerate(own)] for own in ids]
    return make_documents(ids, masked)


QUERIES = [documents(3)[row] for row in (0, 1)]


def some_weights(models=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 1 + 0.4 * torch.randn(models, 5, 6, generator=generator).double()


class Weighing:
    """A loss of rows that hold the weights of their tokens."""

    def __init__(self, loss):
        self.loss, self.model = loss, loss.model

    def __call__(self, params, example):
        raise AssertionError("a batch at a time")

    def batched(self, batch):
        plain = {key: value for key, value in batch.items() if key != "u"}
        return (self.loss.by_token(plain) * batch["u"]).sum(1)


def end(course):
    *_, last = course.steps(course.start(START))
    return last


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1000, 6])
def test_a_course_at_weights_of_tokens_is_that_of_a_loss_that_weighs_them(size):
    weights = some_weights()[0]
    course = Course(LOSS, documents(), SETTING, seed=2, token_batch_size=size)
    own = [{**row, "u": weights[n, : LENGTHS[n]]} for n, row in enumerate(documents())]
    expected, last = (
        end(replace(course, loss=Weighing(LOSS), data=own)),
        end(replace(course, weights=weights)),
    )
    assert_same(last.state.params, expected.state.params)
    assert last.loss == pytest.approx(expected.loss, rel=1e-10)
    plain = [taken.losses for taken in course.steps(course.start(START))]
    first = next(replace(course, weights=weights).steps(course.start(START)))
    torch.testing.assert_close(first.losses, plain[0])


def test_tokens_of_one_weight_are_a_row_of_that_weight():
    course = Course(LOSS, documents(), replace(SETTING, epochs=3), normalize="tokens")
    rows, visits = some_weights()[0, :, 0], some_weights(3)[:, :, :1]
    for given, of_tokens in (
        (rows, rows[:, None].expand(5, 6)),
        (visits[:, :, 0], visits.expand(3, 5, 6)),
        (visits, visits.expand(3, 5, 6)),
    ):
        found, expected = (end(replace(course, weights=own)).state.params for own in (of_tokens, given))
        assert_same(found, expected)


def test_models_at_weights_of_tokens_are_courses_at_these_weights():
    """Also where models do not stack, and where rows stand alone."""
    weights, everywhere = some_weights(3), torch.ones(3, 5, dtype=torch.bool)
    weights[1, 0] = 0
    trainer = make_trainer(START, LOSS, documents(), SETTING)
    alone = replace(trainer.table, alone=[documents()[row] for row in range(5)])
    one_by_one = replace(trainer, looped="a reason", losses=looped(losses_of(LOSS)))
    for one in (trainer, one_by_one, replace(trainer, table=alone)):
        trained = one.train(everywhere, [2, 2, 3], weights=weights)
        for model, seed in enumerate((2, 2, 3)):
            course = Course(LOSS, documents(), SETTING, seed=seed, weights=weights[model])
            assert_same({n: p[model] for n, p in trained.params.items()}, end(course).state.params)
    steps = [taken for taken in course.steps(course.start(START)) if taken.epoch == 1]
    mean = sum(taken.losses.sum() for taken in steps) / 5
    assert trained.losses[2].item() == pytest.approx(mean, rel=1e-9)


def extrapolated(losses, weights, moves):
    """Minus the derivatives of losses along moves of the weights, without the error of the second order."""
    one, two = (-(losses(weights + h * moves) - losses(weights - h * moves)) / (2 * h) for h in (1e-4, 2e-4))
    return (4 * one - two) / 3


def test_the_derivative_in_every_token_is_a_central_difference_of_trainings():
    """At weights that are not 1, by `train`, as retraining does it."""
    weights, count = some_weights()[0], sum(LENGTHS)
    inside = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    moves = torch.zeros(count, 5, 6).double()
    moves[torch.arange(count), *inside.nonzero().T] = 1.0
    course = Course(LOSS, documents(), SETTING, weights=weights)

    def losses(at):
        trained = train(
            START, LOSS, documents(), torch.ones(count, 5).bool(), [0] * count, SETTING, weights=at
        )
        ends = [{name: p[model] for name, p in trained.params.items()} for model in range(count)]
        return torch.stack([course.row_losses(params, QUERIES) for params in ends])

    made = metagradient(course, START, QUERIES, per="token").values
    found = extrapolated(losses, weights, moves)
    assert (made - found).norm() / found.norm() < 1e-7
    assert (
        int((made.abs().amax(1) > 1e-4 * made.abs().max()).sum()) == count - 2 * 5
    )  # not of first and masked


def test_the_derivative_of_a_mean_over_tokens_is_a_central_difference_of_trainings():
    weights, moves = some_weights(2)
    course = Course(LOSS, documents(), SETTING, normalize="tokens", weights=weights, token_batch_size=8)

    def losses(at):
        return course.row_losses(end(replace(course, weights=at)).state.params, QUERIES)

    made = metagradient(course, START, QUERIES, per="token").values
    found = extrapolated(losses, weights, moves)
    along = moves[torch.arange(6) < torch.tensor(LENGTHS)[:, None]] @ made
    assert (along - found).norm() / found.norm() < 1e-7


def test_values_in_the_run_are_of_the_weighed_parts():
    weights, asked = some_weights()[0], Valuing(QUERIES, LOSS)
    own = [{**row, "u": weights[n, : LENGTHS[n]]} for n, row in enumerate(documents())]
    course = Course(LOSS, documents(), SETTING, valuing=asked, weights=weights)

    def values(course):
        return torch.stack([torch.from_numpy(t.values) for t in course.steps(course.start(START))][:2])

    expected = values(replace(course, loss=Weighing(LOSS), data=own, weights=None))
    torch.testing.assert_close(values(course), expected, rtol=1e-8, atol=1e-12)
    for size in (1000, 6):
        with fast_values(replace(course, token_batch_size=size), MODEL) as ready:
            assert ready.valuing.probes is not None
            torch.testing.assert_close(values(ready), expected, rtol=1e-6, atol=1e-10)


def test_smoothness_is_asked_at_weights_of_tokens_too():
    course = Course(LOSS, documents(), replace(SETTING, epochs=1))
    plain, ones = (
        metasmoothness(replace(course, weights=own), START, QUERIES, directions=1)
        for own in (None, torch.ones(5, 6).double())
    )
    assert ones.curvature == pytest.approx(plain.curvature, rel=1e-6)


def test_other_weights_have_another_digest():
    course = Course(LOSS, documents(), replace(SETTING, epochs=6))
    visits, tokens = (replace(course, weights=torch.ones(shape).double()) for shape in ((6, 5), (5, 6)))
    assert visits.weights_digest != tokens.weights_digest
    assert (visits.by_token, tokens.by_token) == (False, True)


@pytest.mark.parametrize(("epochs", "weights", "words"), [
    (2, torch.ones(5, 5), "each of its visits, or [5, 6], one for each of its tokens, got [5, 5]"),
    (2, torch.ones(3, 5, 6), "got [3, 5, 6]"),
    (2, torch.full((5, 6), torch.nan), "finite numbers"),
    (5, None, "5 epochs and 5 rows, or of 5 rows and 5 tokens: give them as [5, 5, 1] or [1, 5, 5]"),
])  # fmt: skip
def test_shapes_that_are_no_weights_or_two_kinds_of_them_are_refused(epochs, weights, words):
    rows = documents() if weights is not None else make_documents([[1, 2, 3, 4, 5]] * 5)
    weights = (torch.ones(5, 5) if weights is None else weights).double()
    with pytest.raises(InputError, match=re.escape(words)):
        Course(LOSS, rows, replace(SETTING, epochs=epochs), weights=weights)
    Course(LOSS, make_documents([[1, 2, 3, 4, 5]] * 5), SETTING, weights=torch.ones(1, 5, 5).double())


def test_losses_that_are_not_told_apart_by_token_are_refused_before_any_work():
    class Sequences(list):
        lengths = torch.full((11,), 5).numpy()

    plain, rows, ones = classification(make_mlp()), Sequences(vectors()), torch.ones(11, 5).double()
    with pytest.raises(InputError, match="not told apart by token"):
        Course(plain, rows, SETTINGS["sgd"], weights=ones)
    with pytest.raises(InputError, match="not told apart by token"):
        train(make_mlp, plain, rows, torch.ones(1, 11).bool(), [0], SETTINGS["sgd"], weights=ones[None])
    with pytest.raises(InputError, match=re.escape("[1, 5, 6] finite numbers, one for each token of a row")):
        train(START, LOSS, documents(), torch.ones(1, 5).bool(), [0], SETTING, weights=torch.ones(1, 5, 4))
    course = Course(LOSS, documents(), SETTING, weights=torch.ones(5, 6).double())
    with pytest.raises(InputError, match="so derivatives are in these: give per='token'"):
        metagradient(course, START, QUERIES)
