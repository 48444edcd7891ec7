"""`gradfn train --record`: rows for `gradfn query`, of a training that stays the same."""

import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

import gradfn as gf
from gradfn.train.run import open_training

SMALL = ("--epochs", 2, "--batch-size", 5, "--save-every", 4, "--learning-rate", 0.01, "--max-grad-norm", 2.0)
ROWS = ("--projection-dim", 4, "--exclude", "*.mlp.*")


def files(run, suffix=""):
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.name.endswith(suffix)
            and p.is_file() and p.suffix != ".lock"}  # fmt: skip


@pytest.fixture(scope="module")
def base(model, corpus):
    return ("--model", model, "--dataset", corpus)


@pytest.fixture(scope="module")
def told(ok, base, folder):
    """What the command printed, for a run and the rows beside it."""
    return ok("train", folder / "run", *base, *SMALL, "--record", folder / "rows", *ROWS)


def test_rows_are_a_store_and_the_training_is_the_same(ok, base, folder, told, queries):
    (line,) = (line for line in told.splitlines() if line.startswith("record"))
    assert f"{folder / 'rows'}, rademacher:4x4" in line
    ok("train", folder / "plain", *base, *SMALL)
    for name in ("checkpoint-4", "checkpoint-6"):
        one, other = files(folder / "run" / name), files(folder / "plain" / name)
        assert one == other
    done = open_training(folder / "run")
    with gf.open_store(folder / "rows") as store:
        assert store.rows == 24
        assert not any("mlp" in name for name in store.names())
        np.testing.assert_array_equal(np.unique(store.read("visits/step")), np.arange(6))
        steps = store.read("visits/step")
        np.testing.assert_array_equal(store.read("visits/factor"), done.steps["clip"][steps])
        assert max(np.prod(spec.shape) for name, spec in store.header.arrays.items()
                   if name.startswith("gradients/")) <= 16  # fmt: skip
    shown = " ".join(ok("info", folder / "rows").split())
    assert "rows 24, " in shown
    assert "proponent" in ok(
        "query", folder / "rows", "--query", queries, "--model", folder / "run/checkpoint-6"
    )
    assert "gradfn train" in ok("info", folder / "rows", "--command")


def test_the_same_command_again_changes_nothing(ok, base, folder, told):
    before = files(folder / "rows", ".h5")
    again = ok("train", folder / "run", *base, *SMALL, "--record", folder / "rows", *ROWS)
    assert "all steps were there already" in again
    assert files(folder / "rows", ".h5") == before


def test_queries_of_divided_rows_take_a_state(ok, command, base, queries, tmp_path):
    rows, state = tmp_path / "rows", tmp_path / "run/checkpoint-6"
    ok("train", tmp_path / "run", *base, *SMALL, "--record", rows, *ROWS, "--record-normalize", "after")
    asked = ("query", rows, "--query", queries, "--model", state)
    refused = command(*asked)
    assert refused.status == 2
    assert "give --optimizer-state of a checkpoint" in refused.err
    assert "proponent" in ok(*asked, "--optimizer-state", state)
    ok("build", tmp_path / "built", *base, "--projection-dim", 4)
    plain = command("query", tmp_path / "built", "--query", queries, "--optimizer-state", state)
    assert plain.status == 2
    assert "leave out --optimizer-state" in plain.err


REFUSED = [
    (("--record", "RUN"), "is the run of the training itself"),
    (("--record", "BUILT"), "has a store that no training recorded"),
    (("--projection-dim", 4), "--projection-dim is of the rows that are recorded: say where"),
    (("--include", "*"), "--include is of the rows that are recorded"),
    (("--record", "NEW", "--record-normalize", "before", "--optimizer", "sgd"), "sgd has no second moments"),
    (("--record", "NEW", "--include", "nothing"), "nothing matches no layer"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence_before_any_work(ok, command, base, tmp_path, more, words):
    places = {"RUN": tmp_path / "run", "BUILT": tmp_path / "built", "NEW": tmp_path / "new"}
    if "BUILT" in more:
        ok("build", places["BUILT"], *base)
    more = [places.get(word, word) for word in more]
    result = command("train", tmp_path / "run", *base, *SMALL, *more)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert words in result.err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "new").exists()


def test_a_command_that_writes_to_two_runs_is_not_rerun(command, folder, told):
    for run in ("run", "rows"):
        result = command("rerun", folder / run)
        assert result.status == 2
        assert "writes to two runs" in result.err


def arrays(run):
    """The bytes of all arrays of a store; its files name the command, and so the directory."""
    found = {}
    for path in sorted(run.glob("segments/*.h5")):
        with h5py.File(path) as file:
            file.visititems(lambda name, item, at=path.name: found.update(
                {(at, name): item[()].tobytes()} if isinstance(item, h5py.Dataset) else {}
            ))  # fmt: skip
    assert found
    return found


@pytest.mark.slow
def test_killed_for_real_rows_end_with_the_same_bytes(model, corpus, tmp_path):
    def start(name):
        words = ["train", tmp_path / name, "--model", model, "--dataset", corpus, "--epochs", 12,
                 "--batch-size", 1, "--save-every", 7, "--record", tmp_path / f"{name}-rows"]  # fmt: skip
        return subprocess.Popen([sys.executable, "-m", "gradfn", *map(str, words)], stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    killed, seen = 0, 0
    while True:
        process = start("killed")
        while process.poll() is None:
            found = len([*(tmp_path / "killed").glob("checkpoint-*")])
            if killed < 3 and found > seen + 2 + killed:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed, seen = killed + 1, found
                break
            time.sleep(0.005)
        else:
            break
    assert process.returncode == 0
    assert killed == 3
    assert arrays(tmp_path / "whole-rows") == arrays(tmp_path / "killed-rows")
    names = [name for name in os.listdir(tmp_path / "whole") if name.startswith("checkpoint")]
    assert len(names) > 10
    for name in names:
        assert files(tmp_path / "whole" / name) == files(tmp_path / "killed" / name)
