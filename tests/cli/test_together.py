"""Commands under torchrun: what one process makes, from two to four; errors told once; a process killed."""

import os
import signal
import time

import pytest
import torch
from started import on_nodes, start, torchrun
from tiny import DOCUMENTS, write_jsonl

from gradfn.cli.commands import HessianRequest
from gradfn.cli.request import make
from gradfn.cli.together import run_together
from gradfn.errors import InputError
from gradfn.evaluate.truth import open_truth
from gradfn.runs.curvatures import load_curvature
from gradfn.runs.merge import BASIS
from gradfn.runs.processes import Processes
from gradfn.scores import Scores
from gradfn.store import open_store


@pytest.fixture(scope="module")
def base(model, corpus):
    return "--model", model, "--dataset", corpus


def assert_same_rows(run, other, names):
    with open_store(run) as one, open_store(other) as two:
        assert one.settings == two.settings
        for name in names:
            both = [torch.tensor(run.read(name)).double() for run in (one, two)]
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_a_store_is_that_of_one_process(ok, folder, base, store):
    status, out, said = torchrun(2, "build", folder / "two", *base)
    assert (status, out.count("[2 shards]")) == (0, 1), said
    assert "when all" not in out
    with open_store(store) as one:
        names = one.names("gradients/")
    assert_same_rows(folder / "two", store, [*names, "rows/loss"])
    assert not (folder / "two/shards").exists()
    ok("verify", folder / "two")
    assert "shard" not in ok("info", folder / "two").split("command")[1].splitlines()[0]
    again = torchrun(3, "build", folder / "two", *base)  # all there: the first process finds it, alone
    assert (again[0], "resumed" in again[1], "shard" in again[1]) == (0, True, False), again


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ekfac", "grad_cosine", "trackstar"])
def test_scores_with_a_curvature_fitted_by_all(ok, base, queries, method, tmp_path):
    asked = (*base, "--query", queries, "--method", method, "--jsonl", tmp_path / "table.jsonl")
    status, out, said = torchrun(3, "score", tmp_path / "three", *asked)
    assert status == 0, said
    ok("score", tmp_path / "one", *asked, "--overwrite")
    one, three = (Scores.load(tmp_path / name) for name in ("one", "three"))
    torch.testing.assert_close(three.matrix, one.matrix, rtol=1e-4, atol=1e-5 * float(one.matrix.abs().max()))
    assert out.count("proponent 1") == len(one.query_ids)
    assert "resumed" in ok("score", tmp_path / "three", *asked, "--overwrite")


@pytest.mark.slow
def test_a_curvature_in_two_passes_and_models(ok, base, queries, tmp_path):
    status, out, said = torchrun(2, "hessian", tmp_path / "two", *base, "--method", "ekfac")
    assert (status, out.count("device"), out.count("[2 shards]")) == (0, 1, 1), said
    assert (tmp_path / f"two/{BASIS}.h5").exists()
    ok("hessian", tmp_path / "one", *base, "--method", "ekfac")
    one, two = (load_curvature(tmp_path / name) for name in ("one", "two"))
    block = next(iter(one))
    torch.testing.assert_close(two[block].values, one[block].values, rtol=1e-4, atol=1e-9)
    small = ("--query", queries, "--epochs", 1, "--subsets", 4, "--seeds", 1, "--batch-size", 4)
    status, out, said = torchrun(2, "retrain", tmp_path / "t2", *base, *small)
    assert status == 0, said
    ok("retrain", tmp_path / "t1", *base, *small)
    one, two = (open_truth(tmp_path / name) for name in ("t1", "t2"))
    assert torch.equal(one.subsets, two.subsets)
    torch.testing.assert_close(two.losses, one.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_more_processes_than_rows(ok, model, folder):
    few = write_jsonl(folder / "few.jsonl", DOCUMENTS[:2])
    status, out, said = torchrun(3, "hessian", folder / "few", "--model", model, "--dataset", few)
    assert (status, out.count("[2 shards]")) == (0, 1), said
    ok("hessian", folder / "alone", "--model", model, "--dataset", few)
    one, other = (load_curvature(folder / name) for name in ("alone", "few"))
    for block in one:
        torch.testing.assert_close(other[block].values, one[block].values, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--fsdp",)])
def test_a_process_that_is_killed_is_started_again_and_goes_on(folder, model, base, store, more):
    rows = write_jsonl(folder / "many.jsonl", [{"text": DOCUMENTS[n % 12]["text"]} for n in range(3000)])
    asked = ("--model", model, "--dataset", rows, "--token-batch-size", 64, *more)
    run = folder / f"killed{len(more)}"
    process, killed = start(2, "build", run, *asked, restarts=3), 0
    until = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < until:
        done = [*run.glob("shards/2-of-2/segments/*.h5")]
        if len(done) > killed and killed < 1:
            for child in children_of(process.pid):
                if "RANK=1" in environment_of(child).split("\0"):
                    os.kill(child, signal.SIGKILL)
                    killed += 1
                    break
        time.sleep(0.05)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, killed) == (0, 1), err
    assert "3,000 rows" in out or "[2 shards]" in out
    with open_store(run) as made:
        assert made.rows == 3000


@pytest.mark.slow
def test_four_processes_on_two_nodes(ok, base, queries, tmp_path):
    """Two agents of torchrun, which find each other by an address, make the scores of one process."""
    more = (*base, "--query", queries, "--method", "ekfac", "--damping", "0.1")
    found = on_nodes(2, 2, "score", tmp_path / "four", *more)
    assert [status for status, _, _ in found] == [0, 0], found
    assert [bool(out) for _, out, _ in found] == [True, False]  # one process speaks
    ok("score", tmp_path / "one", *more)
    with open_store(tmp_path / "four", "scores") as four, open_store(tmp_path / "one", "scores") as one:
        assert four.read("rows/id").tolist() == one.read("rows/id").tolist()
        mine, theirs = (torch.tensor(run.read("scores")).double() for run in (four, one))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def children_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(word) for word in file.read().split()]


def environment_of(pid):
    try:
        with open(f"/proc/{pid}/environ", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


@pytest.fixture
def one_of_two(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("info", "run"), "gradfn info is the work of one process: run it without torchrun"),
     (("build", "run", "--shard", "1/2"), "--shard is a part of one's own, and torchrun makes the parts"),
     (("score",), "processes write their parts to a run directory: give RUN"),
     (("score", "run", "--training", "STORE"), "scores of a --training go through its steps one by one"),
     (("score", "run", "--csv", "nowhere/t.csv"), "cannot write nowhere/t.csv")],
)  # fmt: skip
def test_what_several_processes_do_not_do(command, one_of_two, store, arguments, words):
    result = command(*(store if word == "STORE" else word for word in arguments))
    assert (result.status, result.err.count("\n"), result.out) == (2, 1, "")
    assert words in result.err


def test_parts_of_another_command_are_left_alone(ok, base, tmp_path, monkeypatch):
    ok("build", tmp_path, *base, "--shard", "1/3")
    monkeypatch.setattr("gradfn.runs.processes.Processes.wait", lambda self: None)
    made = make(HessianRequest, {"run": str(tmp_path), "model": str(base[1]), "dataset": str(base[3]),
                                 "overwrite": True})  # fmt: skip
    with pytest.raises(InputError, match="has parts of its store, of another command: join them"):
        run_together(made, lambda part: None, Processes(0, 2, 0))
    assert (tmp_path / "shards/1-of-3/store.h5").exists()


def test_parts_of_more_processes_are_refused(command, ok, folder, base, one_of_two, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delenv("LOCAL_RANK")  # not of torchrun, though another launcher sets the others
        ok("build", folder / "parts", *base, "--shard", "1/3")
    result = command("build", folder / "parts", *base)
    assert result.status == 2
    assert "has the parts of 3 processes: start as many, or add --overwrite to begin again" in result.err
