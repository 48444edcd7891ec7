"""The head in chunks has the losses and derivatives of the whole one, and holds a chunk of the logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch.func import grad, jvp, vjp, vmap

from gradfn.data import make_documents
from gradfn.exact.products import forward_mode
from gradfn.model import output
from gradfn.model.losses import causal_lm_loss
from gradfn.model.output import chunked_cross_entropy
from gradfn.model.params import params_of
from gradfn.random import normals
from gradfn.train import Training, metagradient
from gradfn.train.course import Course, Valuing

ROWS = [[1, 2, 3, 4], [4, 5, 6, 7, 8], [2, 2, 3], [7, 1, 5, 2, 3, 9]]


def normal(*shape, key):
    size = int(torch.tensor(shape).prod())
    return torch.from_numpy(normals(size, "test", key)).reshape(shape)


def whole(x, weight, bias, targets):
    return F.cross_entropy(F.linear(x, weight, bias), targets, reduction="none")


@pytest.mark.parametrize("biased", [True, False])
def test_derivatives_are_those_of_the_logits(biased, monkeypatch):
    monkeypatch.setattr(output, "CHUNK_BYTES", 3 * 7 * 8)  # three positions
    x, w, weights = normal(10, 4, key="x"), normal(7, 4, key="w"), normal(10, key="v")
    b = normal(7, key="b") if biased else None
    targets = torch.arange(10) % 7

    def of(losses):
        def total(x, w, weights):
            return (losses(x.tanh(), w, b, targets) * weights).sum()

        found, back = vjp(grad(total, argnums=(0, 1)), x, w, weights)
        u = normal(3, 10, 4, key="ux"), normal(3, 7, 4, key="uw")
        with forward_mode():
            along = jvp(total, (x, w, weights), (u[0][0], u[1][0], weights))[1]
        return [total(x, w, weights), *found, *vmap(lambda *u: back(u))(*u), along]

    for ours, theirs in zip(of(chunked_cross_entropy), of(whole), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_it_is_not_differentiated_a_third_time():
    x, w, targets = normal(2, 3, key="x"), normal(4, 3, key="w"), torch.tensor([1, 3])

    def total(x):
        return chunked_cross_entropy(x, w, None, targets).sum()

    def bend(x):
        return vjp(grad(total), x)[1](torch.ones_like(x))[0].sum()

    with pytest.raises(RuntimeError, match="third derivative"):
        grad(bend)(x)


@pytest.mark.parametrize(("family", "per"), [("gpt2", "token"), ("llama", "row"), ("gpt_neox", "row")])
def test_metagradients_do_not_depend_on_chunks(family, per, monkeypatch):
    model, data = language_model(family), make_documents(ROWS, labels=[[-100, *row[1:]] for row in ROWS])
    course = Course(causal_lm_loss(model), data, Training(1, 2, 0.05, "sgd", momentum=0.5))
    assert course.loss.fused_head
    first = metagradient(course, params_of(model), data, per=per).values
    monkeypatch.setattr(output, "CHUNK_BYTES", 2 * 11 * 8)
    torch.testing.assert_close(
        metagradient(course, params_of(model), data, per=per).values, first, atol=1e-12, rtol=1e-9
    )


def test_forward_mode_does_not_depend_on_chunks(monkeypatch):
    model, data = language_model("gpt2"), make_documents(ROWS)
    loss = causal_lm_loss(model)
    course = Course(loss, data, Training(1, 2, 0.05, "sgd"), valuing=Valuing(data, loss))
    first = [taken.values for taken in course.steps(course.start(params_of(model)))]
    monkeypatch.setattr(output, "CHUNK_BYTES", 2 * 11 * 8)
    again = replace(course)
    for ours, theirs in zip(again.steps(again.start(params_of(model))), first, strict=True):
        torch.testing.assert_close(ours.values, theirs, atol=1e-12, rtol=1e-9)
