"""Losses in two: outputs, and the loss as a function of them."""

import pytest
import torch
from exact_problems import EXACT, TOKENS, WEIGHTED
from tiny import MeanOfTokens, classes_of, language_model

import gradfn as gf
from gradfn.exact import SplitLoss, gauss_newton_product, outputs_and_loss
from gradfn.testing.strategies import randomize


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("criterion", ["cross_entropy", "log_odds"])
@pytest.mark.parametrize("rows", [TOKENS, WEIGHTED], ids=["plain", "weighted"])
def test_the_two_parts_of_a_language_models_loss_are_the_loss(rows, criterion, reduction):
    model = language_model("gpt_neox")
    params = gf.model.params_of(model)
    loss = gf.causal_lm_loss(model, reduction, criterion=criterion)
    made, of_outputs = outputs_and_loss(loss)
    for row in rows:
        torch.testing.assert_close(of_outputs(made(params, row), row), loss(params, row), **EXACT)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_two_parts_of_a_classifiers_loss_are_the_loss(task):
    model, rows = randomize(MeanOfTokens(), 0), classes_of([5, 9])
    if task == "regression":
        rows = [{**row, "labels": torch.tensor([0.5, -1.0]).double()} for row in rows]
    params, loss = gf.model.params_of(model), gf.model_loss(model, task)
    made, of_outputs = outputs_and_loss(loss)
    for row in [*rows, {**rows[0], "weight": torch.tensor(3.0).double()}]:
        assert made(params, row).shape == (2,)
        torch.testing.assert_close(of_outputs(made(params, row), row), loss(params, row), **EXACT)


def test_the_gauss_newton_matrix_of_squared_errors_is_of_jacobians_alone():
    """Half of the second derivative of a mean of two squares is 1/2."""
    model, (row,) = randomize(MeanOfTokens(), 0), classes_of([4])
    row = {**row, "labels": torch.tensor([0.5, -1.0]).double()}
    params = {"out.weight": gf.model.params_of(model)["out.weight"]}
    made, of_outputs = outputs_and_loss(gf.model_loss(model, "regression"))
    v = {"out.weight": torch.randn(1, 2, 4, dtype=torch.float64)}
    J = torch.func.jacrev(made)(params, row)["out.weight"].reshape(2, 8)
    got = gauss_newton_product(made, of_outputs, params, [row])(v)["out.weight"]
    torch.testing.assert_close(got.flatten(), J.T @ J @ v["out.weight"].flatten(), **EXACT)


def test_what_does_not_split():
    model = language_model("llama")
    with pytest.raises(gf.InputError, match="two models' logits"):
        outputs_and_loss(gf.causal_lm_loss(model, criterion="kl", reference=language_model("llama")))
    with pytest.raises(gf.InputError, match=r"or a `gradfn\.exact\.SplitLoss`, or take another `product`"):
        outputs_and_loss(lambda params, example: torch.zeros(()))
    assert gf.train.SplitLoss is SplitLoss
