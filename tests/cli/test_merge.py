import re
import shlex
import shutil

import h5py
import numpy as np
import pytest
from stored import flip
from tiny import mostly_slow

import gradfn as gf

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")


@pytest.fixture
def base(model, corpus):
    return "--model", model, "--dataset", corpus


def in_shards(ok, count, *arguments):
    return [ok(*arguments, "--shard", f"{number}/{count}") for number in range(1, count + 1)]


def arrays_of(run, kind):
    with gf.open_store(run, kind) as store:
        return {name: store.read(name) for name in store.names()}, store.settings


def same(a, b, kind, **tolerance):
    (mine, made), (theirs, wanted) = arrays_of(a, kind), arrays_of(b, kind)
    assert made == wanted
    assert mine.keys() == theirs.keys()
    for name, values in mine.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(values, theirs[name], **tolerance)
        else:
            np.testing.assert_array_equal(values, theirs[name])


@pytest.mark.parametrize("by", mostly_slow(["example", "head", "token"], "token"))
def test_build_in_shards(ok, base, tmp_path, by):
    ok("build", tmp_path / "whole", *base, "--by", by)
    said = in_shards(ok, 5, "build", tmp_path / "run", *base, "--by", by)
    first = " ".join(said[0].split())
    assert re.search(r"shard 1/5: rows 0 to \d \(\d rows, \d+ tokens\)", first)
    assert f"when all 5 are there: gradfn merge {tmp_path}" in first
    out = ok("merge", tmp_path / "run")
    assert "store.h5" in out
    assert "[5 shards]" in " ".join(out.split())
    same(tmp_path / "run", tmp_path / "whole", "store", rtol=1e-4, atol=1e-5)
    assert ok("merge", tmp_path / "run") == out
    assert "proponent 1" in ok("query", tmp_path / "run", *ASK, "--by", by)


def test_the_whole_pipeline_in_shards(ok, base, queries, tmp_path):
    """Cache, precondition, score: each step in shards, and each merged."""
    ok("build", tmp_path / "whole", *base)
    ok("hessian", tmp_path / "whole", *base)
    ok("score", tmp_path / "whole", *base, "--query", queries, "--hessian-path", tmp_path / "whole")
    run = tmp_path / "run"
    for step in (["build", run, *base], ["hessian", run, *base]):
        in_shards(ok, 3, *step)
        ok("merge", run)
    asked = ("--query", queries, "--hessian-path", run)
    said = in_shards(ok, 3, "score", run, *base, *asked)
    assert "proponent" not in said[0]
    assert "gradfn merge" in said[0]
    ok("merge", run)
    shown = ok("score", run, *base, *asked)
    assert "from 12 rows that were there already" in shown
    assert shown.count("proponent 1") == 3
    with h5py.File(run / "scores.h5") as a, h5py.File(tmp_path / "whole" / "scores.h5") as b:
        np.testing.assert_allclose(a["scores"][()], b["scores"][()], rtol=1e-3, atol=1e-3)
    same(run, tmp_path / "whole", "store", rtol=1e-4, atol=1e-5)
    out = ok("info", run)
    for kind in ("store", "sums", "scores"):
        assert f"{kind}, of 3: 1, 2 and 3 complete" in out


def test_a_fit_in_two_passes_says_what_comes_next(ok, command, base, tmp_path):
    ok("hessian", tmp_path / "whole", *base, "--method", "ekfac")
    fit = ("hessian", tmp_path / "run", *base, "--method", "ekfac")
    first = in_shards(ok, 2, *fit)
    assert "pass 1 of 2" in first[0]
    assert "then every shard again" in " ".join(first[0].split())
    said = " ".join(ok("merge", tmp_path / "run").split())
    assert "that was the first of two passes: run every shard of gradfn hessian again, then merge" in said
    assert "first pass kfac" in " ".join(ok("info", tmp_path / "run").split())
    assert "pass 2 of 2" in ok(*fit, "--shard", "1/2")
    result = command("merge", tmp_path / "run")
    assert result.status == 2
    assert "shard 2 of 2 of the second sums" in result.err
    ok(*fit, "--shard", "2/2")
    assert "hessian.h5" in ok("merge", tmp_path / "run")
    found, expected = (gf.runs.load_curvature(tmp_path / name) for name in ("run", "whole"))
    for name, one in found.items():
        want = expected[name].dense().numpy()
        np.testing.assert_allclose(one.dense().numpy(), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("more", [("--method", "less"), ("--checkpoints", "{model},{model}")])
def test_joined_scores_in_shards(ok, base, model, queries, tmp_path, more):
    more = [part.format(model=model) for part in more]
    ask = (*base, "--query", queries, *more)
    ok("score", tmp_path / "whole", *ask)
    in_shards(ok, 4, "score", tmp_path / "run", *ask)
    said = "".join(ok("merge", tmp_path / "run").split())  # a path may be cut anywhere
    assert "checkpoint-1/scores.h5[4shards]" in said
    same(tmp_path / "run", tmp_path / "whole", "scores", rtol=1e-3, atol=1e-3)
    checkpoints = len([*(tmp_path / "run").glob("checkpoint-*")])
    assert f"from {12 * checkpoints} rows that were there already" in ok("score", tmp_path / "run", *ask)


def test_a_curvature_that_is_still_in_shards(command, ok, base, queries, tmp_path):
    in_shards(ok, 2, "hessian", tmp_path / "run", *base)
    result = command("score", tmp_path / "s", *base, "--query", queries, "--hessian-path", tmp_path / "run")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"the hessian of {tmp_path / 'run'} lies in shards: join them with gradfn merge" in result.err


@pytest.mark.parametrize("more", [("--self",), (*ASK, "--by", "token"), (*ASK, "--by", "module")])
def test_scores_of_other_kinds_in_shards(ok, base, tmp_path, more):
    ok("score", tmp_path / "whole", *base, *more)
    in_shards(ok, 3, "score", tmp_path / "run", *base, *more)
    ok("merge", tmp_path / "run")
    same(tmp_path / "run", tmp_path / "whole", "scores", rtol=1e-3, atol=1e-3)


def test_the_shards_that_are_there(ok, base, tmp_path):
    ok("build", tmp_path / "run", *base, "--shard", "2/4")
    ok("build", tmp_path / "run", *base, "--shard", "4/4")
    assert "store, of 4: 2 and 4 complete; 1 and 3 missing" in ok("info", tmp_path / "run")


BAD = {
    "no fraction": (
        ["build", "{run}", "--shard", "3"],
        "a shard is I/N, the I-th of N parts, not '3': give 2/8, say",
    ),
    "beyond": (["build", "{run}", "--shard", "3/2"], "a shard is I/N with I from 1 to N, not 3/2: give 1/2"),
    "too many": (
        ["build", "{run}", "--shard", "1/13"],
        "12 rows do not go into 13 shards: give --shard I/12",
    ),
    "hessian too": (["hessian", "{run}", "--shard", "1/13"], "12 rows do not go into 13 shards"),
    "score too": (["score", "{run}", *ASK, "--shard", "1/13"], "12 rows do not go into 13 shards"),
    "nowhere": (["score", *ASK, "--shard", "1/2"], "--shard writes its part to a run directory: give RUN"),
    "a table": (
        ["score", "{run}", *ASK, "--shard", "1/2", "--csv", "t.csv"],
        "a shard shows no table: leave out --csv",
    ),
    "a fit": (
        ["score", "{run}", *ASK, "--shard", "1/2", "--method", "ekfac"],
        "ekfac fits over all training rows, which a shard does not see: fit its curvature with gradfn "
        "hessian --shard and gradfn merge, and give it with --hessian-path",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_shards_cannot_do_is_refused(command, base, tmp_path, name):
    arguments, words = BAD[name]
    result = command(*(part.format(run=tmp_path / "run") for part in arguments), *base)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert words in result.err
    assert not (tmp_path / "run").exists()


def test_merge_of_nothing(command, ok, base, tmp_path):
    result = command("merge", tmp_path)
    assert (result.status, result.out) == (2, "")
    assert "has no shards: write them with --shard I/N of build, score, hessian or retrain" in result.err
    ok("build", tmp_path / "run", *base, "--shard", "1/2")
    assert "lies in shards: join them with gradfn merge" in command("query", tmp_path / "run", *ASK).err


def test_merge_replaces_only_when_told(command, ok, base, tmp_path):
    ok("build", tmp_path / "run", *base, "--projection-dim", 2)
    in_shards(ok, 2, "build", tmp_path / "run", *base, "--projection-dim", 3)
    result = command("merge", tmp_path / "run")
    assert result.status == 2
    assert "add --overwrite to replace it" in result.err
    ok("merge", tmp_path / "run", "--overwrite")
    with gf.open_store(tmp_path / "run") as store:
        assert all(store.shape(name) == (12, 3, 3) for name in store.names("gradients"))


@pytest.mark.parametrize("kind", mostly_slow(["build", "score", "hessian"], "hessian"))
def test_a_damaged_shard_is_named_before_it_is_taken_and_made_again(command, ok, base, tmp_path, kind):
    run, more = tmp_path / "run", ASK if kind == "score" else ()
    store = {"build": "store", "score": "scores", "hessian": "hessian"}[kind]
    ok(kind, tmp_path / "whole", *base, *more)
    in_shards(ok, 2, kind, run, *base, *more)
    (path,) = (run / "shards/2-of-2/segments").iterdir()
    flip(path)
    for _ in range(2):
        refused = command("merge", run)
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert f"{path} is damaged" in refused.err
        assert f"delete it and run gradfn {kind} {run} " in refused.err
        assert "--shard 2/2 again, which recomputes only it, then merge" in refused.err
    path.unlink()
    ok(kind, run, *base, *more, "--shard", "2/2")
    ok("merge", run)
    same(run, tmp_path / "whole", store, rtol=1e-4, atol=1e-5)


def test_damage_after_a_merge_leads_out_in_two_steps(command, ok, base, tmp_path):
    run = tmp_path / "run"
    in_shards(ok, 2, "build", run, *base)
    ok("merge", run)
    (shard,) = (run / "shards/2-of-2/segments").iterdir()
    flip(shard)  # and its second name in the run
    joined = run / "segments" / shard.name
    said = command("query", run, *ASK).err
    assert f"{joined} is damaged" in said
    assert "delete it and join the shards again with gradfn merge" in said
    joined.unlink()
    assert f"{shard} is damaged" in command("merge", run).err
    shard.unlink()
    ok("build", run, *base, "--shard", "2/2")
    ok("merge", run)
    assert "proponent 1" in ok("query", run, *ASK)


def test_a_shard_that_is_a_link_is_not_written_through(command, ok, base, tmp_path):
    run, theirs = tmp_path / "run", tmp_path / "theirs/shards/1-of-2"
    ok("build", tmp_path / "theirs", *base, "--shard", "1/2")
    (run / "shards").mkdir(parents=True)
    (run / "shards/1-of-2").symlink_to(theirs)
    before = sorted(path.name for path in theirs.rglob("*"))
    for arguments in (("build", run, *base, "--shard", "1/2", "--overwrite"), ("merge", run)):
        assert "is a symbolic link" in command(*arguments).err
    assert sorted(path.name for path in theirs.rglob("*")) == before
    shutil.rmtree(run)
    ok("build", run, *base)
    for name in ("shards", "hessian-2", "checkpoint-1"):
        (run / name).symlink_to(tmp_path / "theirs")
        assert f"{run / name} is a symbolic link" in command("verify", run).err
        (run / name).unlink()


def test_a_shard_that_is_missing_is_told_with_its_command(command, ok, base, tmp_path):
    ok("build", tmp_path / "run", *base, "--shard", "1/2")
    refused = command("merge", tmp_path / "run")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    again = refused.err.split("is missing: run gradfn ")[1].split(", then merge")[0]
    ok(*shlex.split(again))
    ok("merge", tmp_path / "run")
