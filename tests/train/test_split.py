"""Adjoints with the Gauss-Newton matrix, against the dense matrix, and what a loss must say for them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch.func import functional_call
from train_problems import SETTINGS, classification, make_mlp, vectors

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.model.params import params_of
from gradfn.random import normals
from gradfn.testing.strategies import randomize
from gradfn.train import Replay, SplitLoss, Training, metagradient
from gradfn.train.course import Course
from gradfn.train.pull import Adjoint, pull
from gradfn.train.split import split_of

SGD = Training(1, 4, 0.5, "sgd", momentum=0.5)
NET = make_mlp()


def split_mlp():
    return SplitLoss(
        lambda params, e: functional_call(NET, params, (e["x"][None],))[0],
        lambda z, e: F.cross_entropy(z[None], e["y"][None]),
    )


def mlp():
    """A loss that is split, its logits, its rows, and weights of rows."""
    rows = vectors()[:4]
    return Course(split_mlp(), rows, SGD, weights=torch.rand(4).double() + 0.5), params_of(NET)


def language(per="row"):
    documents = make_documents([[1, 2, 3, 4, 5], [6, 7, 8], [9, 1, 2, 3], [4, 5, 6]])
    model = randomize(language_model("gpt2"), 0)
    weights = torch.rand(4, 5).double() + 0.5 if per == "token" else None
    return Course(causal_lm_loss(model), documents, SGD, weights=weights, token_batch_size=10), params_of(
        model
    )


def logits(course, params, row):
    """Of one row."""
    example = course.data[row]
    if isinstance(course.loss, SplitLoss):
        return functional_call(NET, params, (example["x"][None],))
    ids = example["input_ids"][None]
    return functional_call(course.loss.model, params, kwargs={"input_ids": ids, "use_cache": False}).logits[0]


def parts(course, z, row):
    """The parts of its loss at its logits, written once more."""
    example = course.data[row]
    if isinstance(course.loss, SplitLoss):
        return F.cross_entropy(z, example["y"][None], reduction="none")
    ids = example["input_ids"]
    return torch.cat([z.new_zeros(1), F.cross_entropy(z[:-1], ids[1:], reduction="none") / (len(ids) - 1)])


def dense(course, params):
    """`sum_i c_i J_iᵀ Hess_i J_i` of a step on all rows, and the derivatives of the parts of their losses."""
    names, whole, slopes = list(params), 0.0, []
    for row, weights in enumerate(course.weights_of(0, np.arange(len(course.data)))):

        def outputs(*values, row=row):
            return logits(course, dict(zip(names, values, strict=True)), row)

        def total(z, row=row, weights=weights):
            made = parts(course, z, row)
            return (made * (weights[: len(made)] if weights.ndim else weights)).sum()

        z = logits(course, params, row).detach()
        blocks = torch.autograd.functional.jacobian(outputs, tuple(params.values()))
        J = torch.cat([block.reshape(z.numel(), -1) for block in blocks], 1)
        H = torch.autograd.functional.hessian(total, z).reshape(len(J), len(J))
        whole = whole + J.T @ H @ J
        slopes.append(
            torch.autograd.functional.jacobian(lambda z, r=row: parts(course, z, r), z).flatten(1) @ J
        )
    return whole, slopes


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("make", "per"), [(mlp, "row"), (language, "row"), (language, "token")])
def test_a_step_back_takes_the_dense_matrix_and_exact_derivatives(make, per, mapped):
    course, params = make(per) if make is language and per == "token" else make()
    state, rows = course.start(params), np.arange(4)
    lam = {n: torch.from_numpy(normals(2 * p.numel(), n)).reshape(2, *p.shape) for n, p in params.items()}
    adjoint = Adjoint(lam, ({n: v.flip(0) for n, v in lam.items()},))
    how = {"per": per, "mapped": mapped}
    (made, along), (exact, exactly) = (
        pull(course, state, 0, rows, adjoint, curvature=curvature, **how)
        for curvature in ("gauss_newton", "hessian")
    )
    torch.testing.assert_close(along, exactly, rtol=1e-11, atol=1e-14)
    H, slopes = dense(course, params)
    flat = {n: v.flatten(1) for n, v in lam.items()}
    u = torch.cat([flat[n].flip(0) - SGD.learning_rate * flat[n] for n in params], 1)
    expected = torch.cat([flat[n] for n in params], 1) + u @ H
    found = torch.cat([made.params[n].flatten(1) for n in params], 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for row, slope in enumerate(slopes):
        share = along[row, : len(slope)] if per == "token" else along[row][None]
        by_hand = slope @ u.T / 4
        torch.testing.assert_close(share, by_hand if per == "token" else by_hand.sum(0, keepdim=True))
    other = torch.cat([exact.params[n].flatten(1) for n in params], 1)
    assert (found - other).norm() > 0.05 * other.norm()


def test_a_linear_model_with_squared_loss_has_its_hessian():
    loss = SplitLoss(lambda p, e: p["w"] @ e["x"], lambda z, e: (z - e["y"]).square() / 2)
    course = Course(loss, vectors(), replace(SETTINGS["adamw"], max_grad_norm=0.5))
    start = {"w": torch.linspace(-1, 1, 5).double()}
    exact, other = (
        metagradient(course, start, course.data[:3], per="visit", replay=Replay(curvature=curvature))
        for curvature in ("hessian", "gauss_newton")
    )
    torch.testing.assert_close(other.values, exact.values, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(other.start["w"], exact.start["w"], rtol=1e-11, atol=1e-14)


def test_a_network_has_another_derivative_and_chunks_of_queries_change_nothing():
    course, start = mlp()
    exact, whole, parts = (
        metagradient(
            replace(course, training=replace(SGD, epochs=3)), start, course.data, replay=replay
        ).values
        for replay in (
            Replay(),
            Replay(curvature="gauss_newton"),
            Replay(1, None, 1, curvature="gauss_newton"),
        )
    )
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-15)
    assert 1e-3 < (whole - exact).norm() / exact.norm() < 1


@pytest.mark.parametrize("criterion", ["cross_entropy", "log_odds"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_two_parts_of_a_loss_are_the_loss(criterion, reduction):
    model = randomize(language_model("llama"), 0)
    loss, params = causal_lm_loss(model, reduction, criterion=criterion), params_of(model)
    batch = {"input_ids": torch.arange(10).reshape(2, 5), "weight": torch.tensor([0.5, -2.0])}
    for tokens, expected in ((False, loss.batched(batch)), (True, loss.by_token(batch))):
        split = split_of(loss, tokens=tokens)
        torch.testing.assert_close(split.losses(split.outputs(params, batch), batch), expected)


def test_losses_that_are_not_split_are_refused():
    course, start = mlp()
    model = language_model("gpt2")
    ask = {"replay": Replay(curvature="gauss_newton")}
    with pytest.raises(InputError, match="needs a loss that is a function of a model's outputs: give"):
        metagradient(replace(course, loss=classification(NET)), start, course.data[:1], **ask)
    with pytest.raises(InputError, match=r"not kl, or a `gradfn\.train\.SplitLoss`"):
        split_of(causal_lm_loss(model, criterion="kl", reference=model))
    with pytest.raises(InputError, match="not told apart by token and by outputs"):
        metagradient(course, start, course.data[:1], per="token", **ask)
    assert split_of(model_loss(model, "classification")).outputs is not None
