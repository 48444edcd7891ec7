"""What a method says of a curvature of another kind, and where it is not quite what its paper has."""

import h5py
import numpy as np
import pytest
import torch

import gradfn as gf
from gradfn.methods import RECIPES
from gradfn.store import differing


def scores_of(run):
    with h5py.File(run / "scores.h5") as file:
        return file["scores"][()]


@pytest.fixture(scope="module")
def fitted(folder, ok, model, corpus):
    run = folder / "kinds"
    ok("hessian", run, "--model", model, "--dataset", corpus, "--method", "kfac", "--projection-dim", 4)
    return run


@pytest.fixture
def base(model, corpus, queries):
    return "--model", model, "--dataset", corpus, "--query", queries


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.fits])
def test_a_curvature_of_another_kind_is_refused(command, base, fitted, name):
    result = command("score", *base, "--method", name, "--hessian-path", fitted)
    if RECIPES[name].fits == "kfac":
        assert (result.status, result.err) == (0, "")
        return
    kind = RECIPES[name].fits
    assert result.status == 2
    assert (
        f"{name} takes a curvature of kind {kind}, and that in {fitted} is kfac: leave out --method"
        in result.err
    )


def test_a_curvature_of_any_kind_goes_without_a_method(ok, base, fitted):
    assert "proponent 1" in ok("score", *base, "--hessian-path", fitted)


def test_less_without_the_optimizer_is_told(ok, base):
    words = " ".join(ok("score", *base, "--method", "less").split())
    assert "note no --optimizer-state, so rows are not scaled by Adam's moments, as LESS has them" in words
    assert "optimizer-state" not in ok("score", *base, "--method", "grad-cosine")


def test_fewer_directions_than_trackstar_counts_less_are_told(ok, base):
    ask = (*base, "--method", "trackstar", "--projection-dim", 4)
    words = " ".join(ok("score", *ask).split())
    assert "note the gradients have 224 directions, fewer than the 1,000 of --target-downweight" in words
    assert "directions" not in ok("score", *ask, "--target-downweight-components", 224)


# --- the curvature that a method fits is kept


@pytest.mark.parametrize(("name", "by"), [("ekfac", "example"), ("logra", "token"), ("trackstar", "example")])
def test_a_run_keeps_the_curvature_that_its_method_fits(ok, base, tmp_path, monkeypatch, name, by):
    ask = ("score", tmp_path / "run", *base, "--method", name, "--by", by, "--projection-dim", 4)
    ok(*ask)
    kind = RECIPES[name].fits
    ok("hessian", tmp_path / "H", *base[:4], "--method", kind, "--projection-dim", 4)
    with (
        gf.open_store(tmp_path / "run", "hessian") as mine,
        gf.open_store(tmp_path / "H", "hessian") as theirs,
    ):
        unlike = differing(mine.settings, theirs.settings)
    before = scores_of(tmp_path / "run")
    assert unlike == {}
    kept, alone = (gf.runs.load_curvature(tmp_path / run) for run in ("run", "H"))
    assert list(kept) == list(alone)
    for block, one in alone.items():  # projected rows that are kept are rotated as blocks, not as factors
        torch.testing.assert_close(
            kept[block].dense(), one.dense(), rtol=1e-4, atol=1e-6 * float(one.values.max())
        )

    def never(*_, **__):
        raise AssertionError("it was fitted again")

    (tmp_path / "run" / "scores.h5").unlink()
    for path in (tmp_path / "run" / "segments").glob("scores-*"):
        path.unlink()
    monkeypatch.setattr("gradfn.runs.curvatures.fit", never)
    ok(*ask)
    np.testing.assert_array_equal(scores_of(tmp_path / "run"), before)


def test_a_curvature_that_was_made_otherwise_is_not_taken(command, ok, base, tmp_path):
    ok("hessian", tmp_path, *base[:4], "--method", "kfac", "--projection-dim", 4)
    ask = ("score", tmp_path, *base, "--method", "ekfac", "--projection-dim", 4)
    result = command(*ask)
    assert result.status == 2
    assert "was made with other settings (hessian.kind is" in result.err
    ok(*ask, "--overwrite")
    assert gf.runs.load_curvature(tmp_path).kind == "ekfac"


TWICE = """
import gradfn as gf


def mine(problem):
    problem.fit(gf.statistics.second_moment())
    return gf.methods.influence(problem.fit(gf.statistics.second_moment()), problem.stage)
"""


def test_a_further_curvature_is_not_written_through_a_link(command, base, tmp_path):
    (tmp_path / "mine.py").write_text(TWICE)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/hessian-2").symlink_to(tmp_path / "theirs")
    made = ("--method", f"{tmp_path}/mine.py:mine", "--projection-dim", 4)
    assert "run/hessian-2 is a symbolic link" in command("score", tmp_path / "run", *base, *made).err
    assert not any((tmp_path / "theirs").iterdir())


def test_every_checkpoint_keeps_its_own(ok, base, model, tmp_path):
    ok(
        "score",
        tmp_path,
        *base,
        "--method",
        "kfac",
        "--projection-dim",
        4,
        "--checkpoints",
        f"{model},{model}",
    )
    for number in (1, 2):
        assert gf.runs.load_curvature(tmp_path / f"checkpoint-{number}").kind == "kfac"
    assert not (tmp_path / "hessian.h5").exists()
