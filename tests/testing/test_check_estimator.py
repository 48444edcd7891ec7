"""Realistic mistakes in an estimator are found, each with a small problem to show it."""

import pytest
import torch

import gradfn as gf
from gradfn.data import collate
from gradfn.testing import BrokenLawError, check_estimator


def gradient_dot(model, loss, train, query):
    return gf.score(model, train, query, method=gf.grad_dot(), loss=loss).matrix


def gradient_cosine(model, loss, train, query):
    return gf.score(model, train, query, method=gf.grad_cosine(), loss=loss).matrix


def divided_by_the_batch(*asked):
    return gradient_dot(*asked) / len(asked[2])


def opponents_first(*asked):
    return -gradient_dot(*asked)


def transposed(*asked):
    return gradient_dot(*asked).T


def in_another_order(model, loss, train, query):
    ordered = sorted(train, key=lambda row: float(row["x"].sum()))
    return gradient_dot(model, loss, ordered, query)


def supervising_padding(model, loss, train, query):
    def grads(rows):
        batch = collate(rows)
        if "labels" in batch:
            batch["labels"] = batch["labels"].clamp_min(0)
        return gf.probe_engine(model, loss)(batch).values

    return gf.methods.dots(grads(train), grads(query))


def random_scores(model, loss, train, query):
    return gradient_dot(model, loss, train, query) * torch.rand(())


def steps_in_place(*asked):
    scores = gradient_dot(*asked)
    with torch.no_grad():
        for parameter in asked[0].parameters():
            parameter -= 0.1
    return scores


def masks_in_place(*asked):
    scores = gradient_dot(*asked)
    asked[3][0]["x"].zero_()
    return scores


def first_batch_again(*asked):
    scores = gradient_dot(*asked)
    scores[8:16] = scores[:8][: max(0, len(scores) - 8)]
    return scores


def last_batch_dropped(*asked):
    scores = gradient_dot(*asked)
    scores[len(scores) // 16 * 16 :] *= len(scores) < 16
    return scores


def as_numbers(*asked):
    return gradient_dot(*asked).tolist()


def fails(*_):
    raise ValueError("no such thing")


MISTAKES = [
    (divided_by_the_batch, "mlp", r"is [-\d.]+ instead of [-\d.]+\n"),
    (opponents_first, "mlp", "the score of train 0 for query 0"),
    (transposed, "mlp", r"scores have shape \[1, 2\], but rows and queries are \[2, 1\]"),
    (in_another_order, "mlp", "train 1: {x"),
    pytest.param(supervising_padding, "lm", "train 0: {input_ids", marks=pytest.mark.slow),
    (random_scores, "mlp", "the score of train|not a function of its inputs"),
    (steps_in_place, "mlp", "it changes the model's 0.weight: leave the model and the rows as they are"),
    (masks_in_place, "mlp", "it changes x of query 0: leave"),
    (first_batch_again, "mlp", "the score of train"),
    pytest.param(last_batch_dropped, "mlp", "the score of train", marks=pytest.mark.slow),
    (as_numbers, "mlp", r"scores are a list: give a tensor \[rows, queries\]"),
    (fails, "mlp", "ValueError: no such thing"),
]


@pytest.mark.parametrize(("scores", "kind", "message"), MISTAKES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_mistake_is_found_and_shown(scores, kind, message):
    with pytest.raises(BrokenLawError, match=message) as caught:
        check_estimator(scores, kinds=[kind], max_examples=100)
    assert "falsifying" not in str(caught.value).lower()


@pytest.mark.parametrize(("scores", "reference", "agreement"), [
    (gradient_dot, None, "exact"),
    (gradient_cosine, gf.grad_cosine(), "exact"),
    (gradient_cosine, gradient_cosine, "exact"),
    (divided_by_the_batch, None, "scale"),
    (divided_by_the_batch, None, "ranking"),
    (lambda *asked: gradient_dot(*asked).sigmoid() * 1e6, lambda *asked: gradient_dot(*asked).clamp(-9, 9),
     "ranking"),
])  # fmt: skip
def test_agreement(scores, reference, agreement):
    check_estimator(scores, reference, agreement=agreement, kinds=["mlp"], max_examples=15)


@pytest.mark.parametrize(("agreement", "message"), [
    ("scale", "-1 times what they should be"),
    ("ranking", "should rank above"),
])  # fmt: skip
def test_the_sign_counts_in_every_agreement(agreement, message):
    with pytest.raises(BrokenLawError, match=message):
        check_estimator(opponents_first, agreement=agreement, kinds=["mlp"])


def test_a_cosine_is_no_multiple_of_a_dot():
    with pytest.raises(BrokenLawError, match="up to a factor of"):
        check_estimator(gradient_cosine, agreement="scale", kinds=["mlp"])


def test_scores_that_are_rounding_have_no_factor():
    def nothing(model, loss, train, query):
        return torch.zeros(len(train), len(query))

    def noise(*asked):
        return nothing(*asked).double() + 1e-16

    check_estimator(nothing, noise, agreement="scale", kinds=["mlp"], max_examples=3)


@pytest.mark.parametrize("method", [gf.grad_dot(), gf.grad_cosine()], ids=["dot", "cosine"])
def test_convolutions_are_among_the_models(method):
    def scores(model, loss, train, query):
        return gf.score(model, train, query, method=method, loss=loss)

    check_estimator(scores, method, kinds=["conv"], max_examples=10)


def test_an_unknown_agreement_is_refused():
    with pytest.raises(gf.InputError, match="no agreement 'roughly': choose exact, scale, ranking"):
        check_estimator(gradient_dot, agreement="roughly")
