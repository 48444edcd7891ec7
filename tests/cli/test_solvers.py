"""Options of exact solves: recorded, and refused with other methods and where they make no sense."""

import pytest

import gradfn as gf


@pytest.fixture
def base(model, corpus, queries):
    return "--model", model, "--dataset", corpus, "--query", queries


def test_the_solver_is_recorded(command, ok, base, tmp_path):
    ask = ("score", tmp_path / "run", *base, "--method", "cg", "--iterations", 2, "--tolerance", 9)
    ok(*ask)
    made = gf.open_store(tmp_path / "run", "scores").settings["method"]["solve"]
    assert (made["solver"], made["iterations"], made["product"]) == ("cg", 2, "fisher")
    other = command(*ask, "--iterations", 3)
    assert other.status == 2
    assert "method.solve.iterations is 2 there and 3 here" in other.err


def test_ekfac_preconditions_from_the_run_or_from_another(command, ok, base, tmp_path):
    ask = (*base, "--include", "*down_proj", "--method", "ekfac-cg", "--damping", "1,10")
    out = ok("score", tmp_path / "run", *ask, "--show", 9)
    assert out.count("3 queries in ") == 2
    made = gf.open_store(tmp_path / "run", "scores").settings["method"]["solve"]
    assert made["product"] == "gauss_newton"
    assert len(made["damping"]) == 2
    again = ok("score", tmp_path / "again", *ask, "--hessian-path", tmp_path / "run")
    assert "curvature" not in again
    one, other = (gf.open_store(tmp_path / run, "scores").read("scores") for run in ("run", "again"))
    assert one.shape[1] == 2
    assert (one == other).all()
    ok("hessian", tmp_path / "kfac", *base[:4], "--include", "*down_proj", "--method", "kfac")
    refused = command("score", *ask, "--hessian-path", tmp_path / "kfac")
    assert "ekfac_cg takes a curvature of kind ekfac" in refused.err


def test_a_solve_that_stops_early_is_noted(ok, base):
    out = " ".join(ok("score", *base, "--method", "lissa", "--iterations", 2, "--scale", 1e4).split())
    assert "note lissa stopped after 2 iterations with a residual of" in out


@pytest.mark.parametrize(("method", "asked", "words"), [
    ("ekfac", ("--iterations", 3), "is of --method cg, lissa, ekfac_cg, astra, not of ekfac: leave it out"),
    ("grad-dot", ("--product", "hessian"), "--product is of --method cg, lissa, ekfac_cg, astra, not of"),
    ("cg", ("--minibatches", 3), "--minibatches is of --method lissa, astra, not of cg: leave it out"),
    ("cg", ("--iterations", 0), "--iterations must be 1 or more, not 0"),
    ("lissa", ("--scale", "-1"), "--scale must be a number above 0, not -1.0"),
    ("cg", ("--projection-dim", 4), "cg solves for whole gradients in one go: leave out --projection-dim"),
    ("lissa", ("--partitions", 2), "lissa solves for whole gradients in one go: leave out --partitions"),
    ("cg", ("--by", "head"), "cg solves for whole weights, which heads are parts of: use --by example"),
    ("cg", ("--damping", "truncated:0.1"), "exact solves take dampings that are relative or absolute"),
    ("ekfac-cg", ("--scale", 2), "--scale is of --method lissa, astra, not of ekfac_cg: leave it out"),
    ("ekfac-cg", ("--damping", "0.1,0"), "EK-FAC preconditions with its damped inverse: give a --damping ab"),
    ("astra", ("--projection", "none"), "astra solves for whole gradients in one go: leave out --projection"),
])  # fmt: skip
def test_what_is_refused_before_anything_is_loaded(command, base, method, asked, words):
    refused = command("score", *base, "--method", method, *asked)
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert words in refused.err
