"""A run records the command that made it, which `gradfn info --command` prints and `gradfn rerun` runs."""

import shlex
import shutil

import h5py
import numpy as np
import pytest
from tiny import mostly_slow

import gradfn as gf
from gradfn.cli.commands import BuildRequest, ScoreRequest
from gradfn.cli.request import make
from gradfn.cli.values import found_method, found_projection
from gradfn.store import requests_of
from gradfn.store.writer import open_writer

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")


@pytest.fixture
def base(model, corpus):
    return ("--model", model, "--dataset", corpus)


def everything(run, kind):
    with gf.open_store(run, kind) as store:
        return {name: store.read(name) for name in store.names()}, store.settings


def same(a, b):
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


COMMANDS = {
    "build": ("store", ("build", "RUN", "--projection-dim", 4, "--include", "*mlp*", "--truncation")),
    "reduce": ("store", ("reduce", "RUN", "--aggregation", "sum")),
    "score": ("scores", ("score", "RUN", *ASK, "--top", 1)),
    "checkpoints": ("scores", ("score", "RUN", *ASK, "--checkpoints", "MODEL,MODEL")),
    "hessian": ("hessian", ("hessian", "RUN", "--seed", 3)),
    "mask": ("mask", ("mask", "fit", "RUN", "--query", "QUERIES", "--keep", "4x4", "--rows", 4,
                      "--include", "*0.mlp.up_proj")),
    "retrain": ("truth", ("retrain", "RUN", "--query", "QUERIES", "--epochs", 1, "--subsets", 3, "--seeds", 1,
                          "--batch-size", 2)),
    "train": ("training", ("train", "RUN", "--epochs", 1, "--batch-size", 6, "--betas", "0.8,0.9",
                           "--save-every", "epoch", "--validation", "QUERIES")),
}  # fmt: skip


@pytest.mark.parametrize("name", mostly_slow(COMMANDS, "build", "checkpoints", "retrain"))
def test_a_run_is_made_again_from_its_record(ok, base, model, queries, tmp_path, monkeypatch, name):
    kind, words = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    shutil.copy(queries, "q.jsonl")
    names = {"RUN": "made", "MODEL": str(model), "QUERIES": "q.jsonl", "MODEL,MODEL": f"{model},{model}"}
    words = [names.get(word, word) for word in words]
    first = ok(*words, *base)
    line = ok("info", "made", "--command")
    assert line.count("\n") == 1
    assert shlex.split(line)[: 1 + len(words[: words.index("made")])] == [
        "gradfn",
        *words[: words.index("made")],
    ]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    told = ok("rerun", "../made", "--into", "again")
    assert told.splitlines()[0].startswith("command  gradfn ")
    (a, made), (b, again) = everything(tmp_path / "made", kind), everything("again", kind)
    a.pop("steps/seconds", None), b.pop("steps/seconds", None)
    np.testing.assert_equal(a, b)  # as NaN is NaN
    assert made == again
    assert "request" not in made
    assert f"again/{kind}.h5" in " ".join(told.split()) or name == "checkpoints"
    assert "made/" in first
    ok(*shlex.split(line)[1:])  # and by hand, which resumes


RECIPE = """
from pathlib import Path

import gradfn as gf

Path(__file__).with_suffix(".ran").touch()


def mine(problem):
    return gf.methods.grad_dot(problem.stage)
"""


def test_a_record_runs_no_code_that_was_not_given_again(command, ok, base, tmp_path):
    recipe, run = tmp_path / "mine.py", tmp_path / "run"
    recipe.write_text(RECIPE)
    ok("score", run, *base, *ASK, "--method", f"{recipe}:mine", "--trust-remote-code")
    recipe.with_suffix(".ran").unlink()
    for given, words in (
        ((), "runs code that comes with its model: read that, and give --trust-remote-code again"),
        (("--trust-remote-code",), f"read it, and give --method {recipe}:mine again"),
        (("--trust-remote-code", "--method", "other.py:mine"), f"give --method {recipe}:mine again"),
    ):
        result = command("rerun", run, *given)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err
        assert result.out.splitlines()[0].split()[:3] == ["command", "gradfn", "score"]
        assert not recipe.with_suffix(".ran").exists()
    ok("rerun", run, "--trust-remote-code", "--method", f"{recipe}:mine")
    assert recipe.with_suffix(".ran").exists()


def test_a_record_writes_to_no_other_run(command, ok, base, tmp_path):
    ok("build", tmp_path / "run", *base)
    (tmp_path / "run").rename(tmp_path / "moved")
    result = command("rerun", tmp_path / "moved")
    assert result.status == 2
    assert f"writes to {tmp_path / 'run'}: give the run to write, --into {tmp_path / 'moved'}" in result.err
    assert not (tmp_path / "run").exists()
    assert "complete" in ok("rerun", tmp_path / "moved", "--into", tmp_path / "moved")


def test_rerun_of_a_complete_run_says_so_and_of_an_unfinished_one_resumes(ok, base, tmp_path):
    run = tmp_path / "run"
    ok("build", run, *base, "--token-batch-size", 1)
    segments = sorted((run / "segments").glob("*.h5"))
    before = everything(run, "store")[0]
    assert "complete  this run has all its rows" in ok("rerun", run)
    (run / "store.h5").unlink()
    segments[0].unlink()
    told = ok("rerun", run)
    assert "has all its rows" not in told
    assert "rows that were there already" in told
    assert same(everything(run, "store")[0], before)


def test_a_request_is_not_compared(ok, base, tmp_path):
    ok("score", tmp_path, *base, *ASK)
    assert "from 12 rows" in ok("score", tmp_path, *base, *ASK, "--top", 5, "--csv", tmp_path / "t.csv")
    request = requests_of(tmp_path)["scores"]
    assert request["command"] == "score"
    assert "top" not in request["given"]  # what is there was made by the first


def test_what_would_be_done_twice_is_left_out(ok, base, tmp_path):
    made = (*base, *ASK, "--csv", tmp_path / "t.csv", "--overwrite")
    ok("score", tmp_path / "run", *made)
    given = requests_of(tmp_path / "run")["scores"]["given"]
    assert given["csv"] == str(tmp_path / "t.csv")
    assert given["overwrite"] is True
    (tmp_path / "t.csv").write_text("mine")
    assert "from 12 rows" in ok("rerun", tmp_path / "run")
    assert (tmp_path / "t.csv").read_text() == "mine"


def test_joined_shards_record_the_command_without_the_shard(ok, base, tmp_path):
    for number in (1, 2):
        ok("build", tmp_path / "run", *base, "--shard", f"{number}/2")
    assert requests_of(tmp_path / "run/shards/1-of-2")["store"]["given"]["shard"] == "1/2"
    ok("merge", tmp_path / "run")
    assert "shard" not in requests_of(tmp_path / "run")["store"]["given"]
    ok("rerun", tmp_path / "run", "-o", tmp_path / "whole")
    parts, whole = (everything(tmp_path / run, "store")[0] for run in ("run", "whole"))
    assert parts.keys() == whole.keys()
    for name in (name for name in parts if parts[name].dtype.kind == "f"):
        # Batches of a part are others, whose products are rounded otherwise.
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-5)
    assert "rows that were there already" in ok("rerun", tmp_path / "run/shards/1-of-2")


def test_a_curvature_in_parts_too(ok, base, tmp_path):
    for _ in range(2):
        for number in (1, 2):
            ok("hessian", tmp_path / "run", *base, "--method", "ekfac", "--projection-dim", 4,
               "--shard", f"{number}/2")  # fmt: skip
        ok("merge", tmp_path / "run")
    line = ok("info", tmp_path / "run/hessian.h5", "--command")
    assert "--method ekfac" in line
    assert "--shard" not in line


def test_paths_are_absolute_and_texts_are_not(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data.jsonl", "recipe.py", "my>mask", "a", "The capital"):
        (tmp_path / name).touch()
    given = {
        "run": "new", "dataset": "data.jsonl", "model": "gpt2", "query": "a text", "method": "recipe.py:mine",
        "projection": 'selective:"my>mask" > sjlt:16', "checkpoints": "a, b", "csv": "t.csv", "top": 3,
    }  # fmt: skip
    here = str(tmp_path)
    assert make(ScoreRequest, given).record()["request"]["given"] == {
        **given, "run": f"{here}/new", "dataset": f"{here}/data.jsonl", "method": f"{here}/recipe.py:mine",
        "projection": f'selective:"{here}/my>mask" > sjlt:16', "checkpoints": f"{here}/a,b",
        "csv": f"{here}/t.csv",
    }  # fmt: skip
    assert make(BuildRequest, {"run": "r"}).record()["request"]["given"]["run"] == f"{here}/r"


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("gaussian:8x8 > sjlt:4", "gaussian:8x8 > sjlt:4"),
        ("pca:4x4:run > sjlt:4", "pca:4x4:HERE/run > sjlt:4"),
        ("selective:run", "selective:HERE/run"),
        ("selective:elsewhere", "selective:elsewhere"),
        ('selective:"run"', "selective:HERE/run"),
        ("joint > selective:run", "joint > selective:HERE/run"),
    ],
)
def test_projections_that_are_read_from_runs(tmp_path, monkeypatch, text, placed):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert found_projection(text) == placed.replace("HERE", str(tmp_path))
    assert found_method("relatif") == "relatif"


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda run: None, "does not exist: give the directory of a run"),
        (lambda run: gf.build, "does not record the command that made it"),
    ],
)
def test_runs_without_a_record(command, tmp_path, write, words):
    run = tmp_path / "run"
    if write(run) is not None:
        with open_writer(run, "store", {"model": 1}, rows=1) as writer:
            writer.write(0, 1, {"gradients/a": np.zeros((1, 2))})
            writer.finish()
    for arguments in (("rerun", run), ("info", run, "--command")):
        result = command(*arguments)
        assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
        assert words in result.err


def test_records_that_this_gradfn_does_not_know(command, tmp_path):
    def write(kind, request, run="run"):
        with open_writer(tmp_path / run, kind, {}, 1, overwrite=True, request=request) as writer:
            writer.write(0, 1, {"gradients/a": np.zeros((1, 2))})
            writer.finish()

    write("store", {"command": "dance", "given": {}})
    assert "was made by gradfn dance, which is no command" in command("rerun", tmp_path / "run").err
    assert "gradfn dance" in command("info", tmp_path / "run").out
    write("store", {"command": "build", "given": {"run": "r", "tempo": 3}})
    assert "has 'tempo', which is no option of gradfn build" in command("rerun", tmp_path / "run").err
    write("store", {"command": "build", "given": {"run": "r", "seed": "x"}})
    assert "--seed takes a whole number" in command("rerun", tmp_path / "run").err
    write("hessian", {"command": "hessian", "given": {"run": "r"}})
    result = command("rerun", tmp_path / "run")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "several commands wrote to" in result.err


def test_a_file_is_enough(ok, store):
    assert ok("info", store / "store.h5", "--command") == ok("info", store, "--command")
    with h5py.File(store / "store.h5") as file:
        assert b'"request"' in file.attrs["manifest"]
