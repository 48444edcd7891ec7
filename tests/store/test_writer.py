"""Writing, resuming and joining, in processes that are killed too."""

import json
import os
import random
import shutil
import signal
import sys
import time

import h5py
import numpy as np
import pytest
from stored import (
    ROWS,
    SETTINGS,
    assert_holds_rows,
    files,
    finished,
    one_sentence,
    refusal,
    rows_of,
    segment,
    slices,
    start,
    write,
)

from gradfn.errors import InputError
from gradfn.store import open_store, open_writer


@pytest.mark.parametrize("kind", ["store", "scores"])
@pytest.mark.parametrize(("first", "then"), [(5, 5), (5, 4), (3, 7), (1, 12)])
def test_resume_with_other_slices(tmp_path, kind, first, then):
    with open_writer(tmp_path, kind, SETTINGS, ROWS) as writer:
        for start, stop in slices(first)[::2]:
            writer.write(start, stop, rows_of(start, stop))
        kept = writer.done
    with open_writer(tmp_path, kind, SETTINGS, ROWS) as writer:
        assert writer.done == kept
        missing = writer.missing(slices(then))
        covered = sorted(row for span in kept + missing for row in range(*span))
        assert covered == list(range(ROWS))
        for start, stop in reversed(missing):
            writer.write(start, stop, rows_of(start, stop))
        writer.finish()
    assert_holds_rows(open_store(tmp_path, kind))


@pytest.mark.parametrize("kind", ["store", "scores"])
def test_a_complete_run_has_nothing_to_do(tmp_path, kind):
    index = write(tmp_path, kind=kind)
    before = index.stat()
    with open_writer(tmp_path, kind, SETTINGS, ROWS) as writer:
        assert writer.complete
        assert writer.missing(slices(2)) == []
        assert writer.finish() == index
    assert index.stat().st_ino == before.st_ino


def test_complete_scores_need_no_segments(tmp_path):
    write(tmp_path, kind="scores")
    shutil.rmtree(tmp_path / "segments")
    with open_writer(tmp_path, "scores", SETTINGS, ROWS) as writer:
        assert writer.complete
        assert writer.missing([(0, ROWS)]) == []


def test_a_deleted_segment_is_the_only_one_recomputed(tmp_path):
    write(tmp_path)
    segment(tmp_path, 5, 10).unlink()
    with pytest.raises(InputError) as error:
        open_store(tmp_path)
    one_sentence(error, segment(tmp_path, 5, 10), "is missing", "recomputes only it")
    with open_writer(tmp_path, "store", SETTINGS, ROWS) as writer:
        assert not writer.complete
        assert writer.missing([(0, ROWS)]) == [(5, 10)]
    write(tmp_path, slices(2))
    assert_holds_rows(open_store(tmp_path))


def test_rows_are_written_once(tmp_path):
    with open_writer(tmp_path, "store", SETTINGS, ROWS) as writer:
        writer.write(3, 6, rows_of(3, 6))
        for start, stop in [(3, 6), (0, 4), (5, 7), (0, 12)]:
            with pytest.raises(InputError, match="overlap"):
                writer.write(start, stop, rows_of(start, stop))
        for start, stop in [(-1, 2), (6, 6), (8, 13)]:
            with pytest.raises(InputError, match="no slice of the 12 rows"):
                writer.write(start, stop, rows_of(start, stop))


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_both_values(tmp_path, finished):
    if finished:
        write(tmp_path, kind="scores")
        shutil.rmtree(tmp_path / "segments")
    else:
        with open_writer(tmp_path, "scores", SETTINGS, ROWS) as writer:
            writer.write(0, 1, rows_of(0, 1))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    other = {"transform": [{"project": {"dim": 32, "seed": 0}}], "model": "tiny", "damping": 0.1, "new": True}
    with pytest.raises(InputError) as error, open_writer(tmp_path, "scores", other, ROWS + 1):
        pass
    one_sentence(
        error,
        "transform.0.project.dim is 3 there and 32 here",
        "new is nothing there and true here",
        "rows is 12 there and 13 here",
        "give `overwrite=True`",
    )
    assert "seed" not in str(error.value)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_tuples_and_lists_are_the_same_settings(tmp_path):
    write(tmp_path, settings={"shape": (1, 2)})
    with open_writer(tmp_path, "store", {"shape": [1, 2]}, ROWS) as writer:
        assert writer.complete


@pytest.mark.parametrize(
    ("kind", "settings", "rows", "words"),
    [
        ("store", {}, 0, ["at least one row", "got 0", "empty"]),
        ("store", {"a": object()}, 3, ["plain JSON", "object"]),
        ("../x", {}, 3, ["lower-case word"]),
    ],
)
def test_bad_arguments_leave_no_trace(tmp_path, kind, settings, rows, words):
    with pytest.raises(InputError) as error, open_writer(tmp_path / "run", kind, settings, rows):
        pass
    one_sentence(error, *words)
    assert not (tmp_path / "run").exists()


def assert_only_whole_rows(run):
    for path in (run / "segments").glob("store-*.h5"):
        first, last = map(int, path.stem.split("-")[1:])
        with h5py.File(path) as file:
            assert np.array_equal(file["gradients/layers.0"], rows_of(first, last)["gradients/layers.0"])
    refused = refusal(open_store, run)
    assert (
        not refused or "unfinished" in refused or "has no store.h5" in refused or "does not exist" in refused
    )
    if not refused:
        assert_holds_rows(open_store(run), 60)


def kill_at_random(run, sent):
    """Fork a writer and end it, again and again, reading all the while; print how each ended."""
    dice, codes = random.Random(0), []
    while not (run / "store.h5").exists() and len(codes) < 15:
        cuts, until = (
            slices(dice.randint(1, 3), 60),
            time.monotonic() + dice.uniform(0, 0.02 * (1 + len(codes))),
        )
        child = os.fork()
        if not child:
            write(run, cuts, rows=60)
            sys.exit()
        while time.monotonic() < until:
            assert_only_whole_rows(run)
        os.kill(child, sent)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        assert_only_whole_rows(run)
    print(json.dumps(codes))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_runs_killed_at_random_resume_to_the_same_store(tmp_path, sent):
    child = start(f"ready()\ntest_writer.kill_at_random(run, {int(sent)})", tmp_path)
    # Interrupted, h5py may print a line of its own.
    codes = json.loads(finished(child).splitlines()[-1])
    assert -sent in codes
    assert set(codes) <= {-sent, 0}  # Ctrl-C in the middle of a write must not crash HDF5 either
    write(tmp_path, slices(7, 60), rows=60)
    assert_holds_rows(open_store(tmp_path), 60)


STEPS = [(call, when) for call in ("fsync", "replace") for when in ("before", "after")]


def kill_at_each_step(run, kind):
    """Fork a writer that kills itself at its n-th fsync or rename, for every n it comes to."""
    for call, when in STEPS:
        for nth in range(1, 7):
            child = os.fork()
            if not child:
                die_at(call, when, nth)
                write(run / f"{call}-{when}-{nth}", slices(12), kind)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def die_at(call, when, nth):
    real, calls = getattr(os, call), []

    def deadly(*args):
        calls.append(args)
        if when == "after":
            real(*args)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "before":
            real(*args)

    setattr(os, call, deadly)


@pytest.mark.parametrize("kind", ["store", "scores"])
def test_runs_killed_at_each_step_resume(tmp_path, kind):
    """A segment and an index: two renames and, with those of the directories, five fsyncs."""
    child = start(f"ready()\ntest_writer.kill_at_each_step(run, {kind!r})", tmp_path)
    codes = [int(code) for code in finished(child).split()]
    assert codes == 2 * ([-signal.SIGKILL] * 5 + [0]) + 2 * ([-signal.SIGKILL] * 2 + [0] * 4)
    for run in tmp_path.iterdir():
        refused = refusal(open_store, run, kind)
        assert not refused or "unfinished" in refused or "has no" in refused
        write(run, slices(7), kind)
        assert_holds_rows(open_store(run, kind))
        assert not [name for name in files(run) if name.endswith(".tmp")]
