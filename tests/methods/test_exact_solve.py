"""cg and lissa by their names, against a dense solve."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import gradfn as gf
from gradfn.methods import RECIPES, Problem
from gradfn.methods.exact_solve import Solver


def loss(params, example):
    return (torch.func.functional_call(NET, params, example["x"]) - example["y"]).square().sum()


torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
ROWS = [{"x": torch.randn(3).double(), "y": torch.randn(2).double()} for _ in range(9)]
TRAIN, QUERY = ROWS[:7], ROWS[7:]
PROBLEM = Problem(gf.Subject(NET, loss), TRAIN, QUERY, damping=(gf.Damping(20.0),),
                  solver=Solver(iterations=60, tolerance=1e-6))  # fmt: skip


def dense(damping):
    """The scores of a dense solve; a relative damping is of the mean eigenvalue of the Fisher."""
    g, q = (torch.cat([G.flatten(1) for G in gf.collect(NET, side, loss=loss).values()], 1)
            for side in (TRAIN, QUERY))  # fmt: skip
    H = g.T @ g / len(g)
    added = damping.value * (H.trace() / len(H) if damping.kind == "relative" else 1.0)
    return g @ torch.linalg.solve(H + added * torch.eye(len(H)), q.T)


@pytest.mark.parametrize("damping", [gf.Damping(20.0), gf.Damping(30.0, "absolute")], ids=str)
@pytest.mark.parametrize("name", ["cg", "lissa"])
def test_scores_are_those_of_a_dense_solve(name, damping):
    method = RECIPES[name].method(replace(PROBLEM, damping=(damping,)))
    got = gf.score(NET, TRAIN, QUERY, method=method, loss=loss).matrix
    torch.testing.assert_close(got.double(), dense(damping), rtol=1e-4, atol=1e-4)


def test_minibatches_and_the_scale_are_those_that_are_asked_for():
    solver = Solver(iterations=2, minibatches=3, scale=40.0, tolerance=9.0)
    method = RECIPES["lissa"].method(replace(PROBLEM, solver=solver))
    queries = gf.collect(NET, QUERY, loss=loss)
    sites, params = gf.model.find_sites(NET), gf.model.params_of(NET)
    parts = [gf.exact.fisher_product(loss, params, TRAIN[n::3]) for n in range(3)]
    b = gf.exact.params_of_blocks(sites, queries)
    (damping,) = method.solve.damping
    x = gf.exact.lissa(parts, b, damping=damping, steps=2, scale=40.0, tolerance=9.0).x
    for name, block in gf.model.blocks_of(sites, x).items():
        torch.testing.assert_close(method.solve(queries)[name], block)
    assert method.settings()["solve"] == {
        "solver": "lissa", "product": "fisher", "damping": damping, "iterations": 2,
        "tolerance": 9.0, "scale": 40.0, "minibatches": 3,
    }  # fmt: skip


def test_a_residual_above_the_tolerance_is_told():
    method = RECIPES["cg"].method(replace(PROBLEM, solver=Solver(iterations=1, tolerance=1e-9)))
    with pytest.warns(UserWarning, match="cg stopped after 1 iterations with a residual of .* above the tol"):
        gf.score(NET, TRAIN, QUERY, method=method, loss=loss)


@pytest.mark.parametrize(("changes", "words"), [
    ({"projection": gf.project(2)}, "solves for whole gradients in one go: leave out the projection"),
    ({"partitions": 2}, "leave out .* `partitions`"),
    ({"damping": (gf.Damping(0.1, "truncated"),)}, "dampings that are relative or absolute"),
    ({"damping": (gf.Damping(0.1), None)}, "dampings that are relative or absolute"),
    ({"subject": gf.Subject(NET, loss, view=gf.View(heads=True))}, "whole weights, which heads are parts of"),
])  # fmt: skip
def test_what_it_does_not_go_with(changes, words):
    with pytest.raises(gf.InputError, match=words):
        RECIPES["cg"].method(replace(PROBLEM, **changes))


def test_several_dampings_are_those_of_each():
    dampings = gf.Damping(20.0), gf.Damping(30.0, "absolute")
    scores = gf.score(
        NET, TRAIN, QUERY, method=RECIPES["cg"].method(replace(PROBLEM, damping=dampings)), loss=loss
    )
    assert scores.dampings == ("20", "absolute:30")
    for got, damping in zip(scores.values, dampings, strict=True):
        torch.testing.assert_close(got.double(), dense(damping), rtol=1e-4, atol=1e-4)


def test_gauss_newton_is_of_outputs():
    method = RECIPES["cg"].method(replace(PROBLEM, solver=Solver(product="gauss_newton")))
    with pytest.raises(gf.InputError, match="or take another `product`"):
        gf.score(NET, TRAIN, QUERY, method=method, loss=loss)
    with pytest.raises(gf.InputError, match="`scale` must be a number above"):
        Solver(scale=-1.0)
