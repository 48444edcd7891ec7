"""ekfac_cg and astra against dense solves with the Gauss-Newton matrix, made of explicit Jacobians."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.func import functional_call, hessian, jacrev

import gradfn as gf
from gradfn.exact import SplitLoss
from gradfn.methods import RECIPES, Problem
from gradfn.methods.exact_solve import PRECONDITIONED, Solver
from gradfn.methods.inner_product import damping_names

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
LOSS = SplitLoss(
    lambda params, e: functional_call(NET, params, e["x"]), lambda z, e: F.cross_entropy(z, e["y"])
)
ROWS = [{"x": torch.randn(3).double(), "y": torch.randint(3, ())} for _ in range(12)]
SOLVERS = {
    "ekfac_cg": Solver(iterations=60, tolerance=1e-12),
    "astra": Solver(iterations=150, tolerance=1e-11),
}
CLASSIFIER = Problem(gf.Subject(NET, LOSS), ROWS[:9], ROWS[9:], damping=(gf.Damping(0.3),))


def causal():
    """A tiny decoder, two of whose layers are attributed, and rows of different lengths."""
    model = language_model("gpt_neox").double()
    loss = gf.causal_lm_loss(model)
    rows = [{"input_ids": torch.randint(1, 11, (n,))} for n in (5, 3, 6, 4)]
    subject = gf.Subject(model, loss, view=gf.View(include=["*dense_4h_to_h"]))
    logits = lambda p, e: model_logits(model, p, e)  # noqa: E731

    def of_logits(z, e):
        return F.cross_entropy(z[:-1], e["input_ids"][1:])

    return Problem(subject, rows[:3], rows[3:], damping=(gf.Damping(10.0),)), logits, of_logits


def model_logits(model, params, example):
    return functional_call(model, params, (), {"input_ids": example["input_ids"][None]}).logits[0]


def dense_gauss_newton(params, outputs, output_loss, rows):
    """`1/N sum_b J_bᵀ H_b J_b`, with Jacobians and Hessians written out."""
    total = torch.zeros(())
    for row in rows:
        z = outputs(params, row)
        J = torch.cat([part.reshape(z.numel(), -1) for part in jacrev(outputs)(params, row).values()], 1)
        H = hessian(lambda z, row=row: output_loss(z, row))(z).reshape(z.numel(), z.numel())
        total = total + J.T @ H @ J / len(rows)
    return total


def dense_scores(problem, outputs, output_loss):
    """Scores of every damping, of dense matrices alone; a relative damping is of the Fisher's mean."""
    subject = problem.subject
    sites, every = gf.model.find_sites(subject.model, subject.view), gf.model.params_of(subject.model)
    params = {name: every[name] for site in sites for name in site.names}

    def gradients(rows):
        made = [torch.func.grad(lambda p, row=row: output_loss(outputs(p, row), row))(params) for row in rows]
        return torch.stack([torch.cat([part.flatten() for part in one.values()]) for one in made])

    g, q = gradients(problem.train), gradients(problem.query)
    G, mean, eye = (
        dense_gauss_newton(params, outputs, output_loss, problem.train),
        g.square().mean(),
        torch.eye,
    )
    return torch.stack([
        g @ torch.linalg.solve(
            G + damping.value * (mean if damping.kind == "relative" else 1.0) * eye(len(G)), q.T)
        for damping in problem.damping])  # fmt: skip


def scores(name, problem):
    method = RECIPES[name].method(replace(problem, solver=SOLVERS[name]))
    return gf.score(problem.subject, problem.train, problem.query, method=method)


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_a_classifier_has_the_scores_of_the_dense_gauss_newton_matrix(name):
    problem = replace(CLASSIFIER, damping=(gf.Damping(10.0), gf.Damping(2.0, "absolute")))
    got = scores(name, problem)
    assert got.dampings == ("10", "absolute:2")
    want = dense_scores(problem, LOSS.outputs, LOSS.output_loss)
    torch.testing.assert_close(got.values.double(), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PRECONDITIONED)
def test_a_decoder_has_the_scores_of_the_dense_gauss_newton_matrix(name):
    torch.manual_seed(1)
    problem, outputs, output_loss = causal()
    torch.testing.assert_close(
        scores(name, problem).values.double(),
        dense_scores(problem, outputs, output_loss),
        rtol=1e-8,
        atol=1e-8,
    )


def test_one_step_of_astra_is_ekfac():
    """From 0 with a step of 1: EK-FAC with the same damping."""
    damping = (gf.Damping(0.2, "absolute"),)
    problem = replace(CLASSIFIER, damping=damping, solver=Solver(iterations=1, scale=1.0))
    made = RECIPES["astra"].method(problem)
    with pytest.warns(UserWarning, match="astra stopped after 1 iterations"):
        got = gf.score(problem.subject, problem.train, problem.query, method=made)
    fitted = RECIPES["ekfac"].method(replace(CLASSIFIER, damping=damping))
    want = gf.score(problem.subject, problem.train, problem.query, method=fitted)
    torch.testing.assert_close(got.matrix, want.matrix)


def test_minibatches_are_drawn_and_recorded():
    def made(seed):
        return RECIPES["astra"].method(
            replace(CLASSIFIER, seed=seed, solver=Solver(iterations=9, minibatches=3))
        )

    queries = gf.collect(CLASSIFIER.subject, CLASSIFIER.query)
    one, same, other = (made(seed).solve.solutions(queries)[0].x["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    settings = made(1).settings()["solve"]
    assert (settings["minibatches"], settings["seed"], settings["product"]) == (3, 1, "gauss_newton")
    assert len(settings["preconditioner"]) == 16
    many = replace(CLASSIFIER, train=ROWS * 50)
    assert RECIPES["astra"].method(many).settings()["solve"]["minibatches"] == 2  # of about 256 rows


def test_what_a_solve_took_is_told():
    said, told = [], []
    problem = replace(
        CLASSIFIER, report=said.append, tell=told.append, solver=Solver(iterations=1, tolerance=1e-9)
    )
    method = RECIPES["ekfac_cg"].method(problem)
    gf.score(problem.subject, problem.train, problem.query, method=method)
    (found,) = method.solve.solutions(gf.collect(problem.subject, problem.query))
    numbers = ", ".join(f"{value:.2g}" for value in found.residual.tolist())
    assert said == [f"3 queries in 1, 1, 1 iterations, residuals {numbers}"]
    assert told[0].startswith("ekfac_cg stopped after 1 iterations with a residual of ")
    assert "and 3 of 3 above the tolerance 1e-09: give more iterations, or more damping" in told[0]


def test_steps_that_are_too_large_are_refused():
    problem = replace(CLASSIFIER, solver=Solver(iterations=200, scale=0.05))
    with pytest.raises(gf.InputError, match=r"diverges .* give a larger scale than 0.05, or more damping"):
        gf.score(problem.subject, problem.train, problem.query, method=RECIPES["astra"].method(problem))


@pytest.mark.parametrize(("changes", "words"), [
    ({"projection": gf.project(2)}, "solves for whole gradients in one go: leave out the projection"),
    ({"damping": (gf.Damping(0.1, "truncated"),)}, "dampings that are relative or absolute"),
    ({"damping": (gf.Damping(0.0),)}, "give a --damping above 0"),
    ({"subject": gf.Subject(NET, LOSS, view=gf.View(heads=True))}, "whole weights, which heads are parts of"),
])  # fmt: skip
def test_what_they_do_not_go_with(changes, words):
    for name in PRECONDITIONED:
        with pytest.raises(gf.InputError, match=words):
            RECIPES[name].method(replace(CLASSIFIER, **changes))


def test_a_loss_of_unknown_outputs_takes_another_product():
    def whole(params, e):
        return LOSS(params, e)

    problem = replace(CLASSIFIER, subject=gf.Subject(NET, whole))
    method = RECIPES["ekfac_cg"].method(problem)
    with pytest.raises(gf.InputError, match="a loss that is a function of a model's outputs"):
        gf.score(problem.subject, problem.train, problem.query, method=method)
    fisher = replace(problem, solver=Solver(product="fisher"))
    made = gf.score(problem.subject, problem.train, problem.query, method=RECIPES["ekfac_cg"].method(fisher))
    plain = gf.score(problem.subject, problem.train, problem.query, method=RECIPES["cg"].method(fisher))
    torch.testing.assert_close(
        made.matrix, plain.matrix, rtol=1e-2, atol=1e-2 * float(plain.matrix.abs().max())
    )
    assert damping_names(method) == ("",)
