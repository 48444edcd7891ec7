import io
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from gradfn.errors import InputError, StorageError
from gradfn.runs import store as store_module
from gradfn.runs.store import MISSING, differing, open_store, open_writer

ROWS = 12
SETTINGS = {"transform": [{"project": {"dim": 3, "seed": 0}}], "model": "tiny", "damping": 0.1}
TEXTS = [
    "plain",
    "",
    "naïve café",
    "日本語",
    "🙂",
    "a\0b",
    "\ud83d",
    " spaces ",
    "line\nbreak",
    "x" * 300,
    "0",
    "é",
]


def rows_of(start, stop):
    """The arrays of some rows, a function of the row numbers alone."""
    rows = np.arange(start, stop)
    return {
        "gradients/layers.0.mlp": (rows[:, None, None] + np.arange(6).reshape(2, 3) / 10).astype(np.float32),
        "gradients/layers.0": -rows[:, None] * np.ones(4),
        "rows/length": rows * 7,
        "rows/id": [TEXTS[row % len(TEXTS)] for row in rows],
    }


def slices(step, rows=ROWS):
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def write(run, cuts=None, kind="store", settings=SETTINGS, rows=ROWS, fixed=None, **options):
    with open_writer(run, kind, settings, rows, **options) as writer:
        for start, stop in writer.missing(cuts or slices(5, rows)):
            writer.write(start, stop, rows_of(start, stop))
        return writer.finish(fixed)


def assert_holds_rows(store, rows=ROWS):
    expected = rows_of(0, rows)
    assert store.names() == list(expected)
    for name, values in expected.items():
        got = store.read(name)
        assert list(got) == values if isinstance(values, list) else np.array_equal(got, values)
        assert got.dtype == np.asarray(values, dtype=object if isinstance(values, list) else None).dtype


def one_sentence(error, *words):
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text
    return text


def files(run):
    return sorted(str(path.relative_to(run)) for path in Path(run).rglob("*") if path.is_file())


def segment(run, start, stop, kind="store"):
    return run / "segments" / f"{kind}-{start:010d}-{stop:010d}.h5"


# --- round trip


@pytest.mark.parametrize("kind", ["store", "scores"])
def test_round_trip(tmp_path, kind):
    index = write(tmp_path / "run", kind=kind)
    assert index == tmp_path / "run" / f"{kind}.h5"
    with open_store(tmp_path / "run", kind) as store:
        assert_holds_rows(store)
        assert (store.rows, store.settings) == (ROWS, SETTINGS)
        assert store.shape("gradients/layers.0.mlp") == (ROWS, 2, 3)
        assert store.shape("rows/id") == (ROWS,)
        assert store.names("gradients") == ["gradients/layers.0.mlp", "gradients/layers.0"]
        assert store.names("gradients/layers.0") == ["gradients/layers.0"]
    assert_holds_rows(open_store(index))


@pytest.mark.parametrize("kind", ["store", "scores"])
@pytest.mark.parametrize("step", [1, 4, 5, 100])
def test_chunks_and_parts_agree_with_the_whole(tmp_path, kind, step):
    write(tmp_path, kind=kind)
    store, expected = open_store(tmp_path, kind), rows_of(0, ROWS)
    chunks = list(store.chunks(list(expected), step))
    assert [(start, stop) for start, stop, _ in chunks] == slices(step)
    for start, stop, arrays in chunks:
        for name, values in expected.items():
            assert np.array_equal(arrays[name], np.asarray(values[start:stop]).astype(arrays[name].dtype))
            assert np.array_equal(store.read(name, start, stop), arrays[name])
    assert np.array_equal(store.read("rows/length", -3), expected["rows/length"][-3:])
    assert store.read("rows/length", 5, 3).shape == (0,)


@pytest.mark.parametrize("kind", ["store", "scores"])
def test_fixed_arrays_have_no_rows(tmp_path, kind):
    fixed = {"queries/text": TEXTS, "queries/norm": np.arange(3.0), "mean": np.array(2.5), "none": []}
    write(tmp_path, kind=kind, fixed=fixed)
    store = open_store(tmp_path, kind)
    assert list(store.fixed("queries/text")) == TEXTS
    assert np.array_equal(store.fixed("queries/norm"), fixed["queries/norm"])
    assert store.fixed("mean").shape == ()
    assert store.fixed("mean") == 2.5
    assert store.fixed("none").shape == (0,)
    assert "queries/text" not in store.names()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i4", "u8", "?", "c8", ">f4"])
@pytest.mark.parametrize("tail", [(), (0,), (2, 3)])
@pytest.mark.parametrize("kind", ["store", "scores"])
def test_every_dtype_and_shape(tmp_path, dtype, tail, kind):
    values = (np.arange(4 * int(np.prod(tail))) % 3).reshape(4, *tail).astype(dtype)
    with open_writer(tmp_path, kind, {}, 4) as writer:
        writer.write(0, 1, {"x": values[:1]})
        writer.write(1, 4, {"x": values[1:]})
        writer.finish()
    got = open_store(tmp_path, kind).read("x")
    assert got.dtype == values.dtype
    assert np.array_equal(got, values)


def test_a_row_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(store_module, "COPY_BYTES", 256)
    values = np.random.default_rng(0).normal(size=(5, 3, 50))
    with open_writer(tmp_path, "scores", {}, 5) as writer:
        writer.write(0, 5, {"x": values})
        writer.finish()
    assert np.array_equal(open_store(tmp_path, "scores").read("x"), values)


# --- the files, as other tools see them


def test_the_store_index_links_and_the_scores_index_copies(tmp_path, monkeypatch):
    for kind in ("store", "scores"):
        write(tmp_path / "there", kind=kind)
    moved = (tmp_path / "there").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for kind, virtual in (("store", True), ("scores", False)):
        with h5py.File(moved / f"{kind}.h5") as file:
            for name, values in rows_of(0, ROWS).items():
                assert file[name].is_virtual == virtual
                if name != "rows/id":
                    assert np.array_equal(file[name], values)
            assert file["rows/id"].asstr()[2:5].tolist() == TEXTS[2:5]
            assert json.loads(file.attrs["settings"]) == SETTINGS


def test_scores_can_be_mailed_alone_and_a_store_cannot(tmp_path):
    for kind in ("store", "scores"):
        write(tmp_path / "run", kind=kind)
        shutil.copy(tmp_path / "run" / f"{kind}.h5", tmp_path)
    assert_holds_rows(open_store(tmp_path / "scores.h5"))
    with pytest.raises(InputError) as error:
        open_store(tmp_path / "store.h5")
    one_sentence(error, "store-0000000000-0000000005.h5 is missing", "run the same command again")


def test_arrays_are_checksummed_and_chunked_by_rows(tmp_path):
    write(tmp_path)
    with h5py.File(segment(tmp_path, 0, 5)) as file:
        for name in rows_of(0, 1):
            assert file[name].fletcher32
            assert file[name].chunks == file[name].shape


def test_a_link_to_an_index_finds_its_segments(tmp_path):
    (tmp_path / "latest.h5").symlink_to(write(tmp_path / "run"))
    assert_holds_rows(open_store(tmp_path / "latest.h5"))


def test_a_store_survives_pickling(tmp_path):
    write(tmp_path)
    assert_holds_rows(pickle.loads(pickle.dumps(open_store(tmp_path))))


def test_more_segments_than_open_files_are_allowed(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        write(tmp_path, slices(1, 80), rows=80)
        assert np.array_equal(open_store(tmp_path).read("rows/length"), np.arange(80) * 7)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- resuming


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


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    write(tmp_path)
    mine = [tmp_path / "segments" / ".store-0000000000-0000000001.h5.tmp", tmp_path / ".store.h5.tmp"]
    other = tmp_path / "segments" / ".scores-0000000000-0000000001.h5.tmp"
    for path in [*mine, other]:
        path.write_bytes(b"half")
    write(tmp_path)
    assert not any(path.exists() for path in mine)
    assert other.exists()


def test_unfinished_runs_cannot_be_read_or_finished(tmp_path):
    with open_writer(tmp_path, "store", SETTINGS, ROWS) as writer:
        writer.write(0, 5, rows_of(0, 5))
        with pytest.raises(InputError) as error:
            writer.finish()
        one_sentence(error, "lacks 7 of its 12 rows", "row 5")
    with pytest.raises(InputError) as error:
        open_store(tmp_path)
    one_sentence(error, "unfinished", "run the command that makes it again")


def test_rows_are_written_once(tmp_path):
    with open_writer(tmp_path, "store", SETTINGS, ROWS) as writer:
        writer.write(3, 6, rows_of(3, 6))
        for start, stop in [(3, 6), (0, 4), (5, 7), (0, 12)]:
            with pytest.raises(InputError, match="overlap"):
                writer.write(start, stop, rows_of(start, stop))
        for start, stop in [(-1, 2), (6, 6), (8, 13)]:
            with pytest.raises(InputError, match="no slice of the 12 rows"):
                writer.write(start, stop, rows_of(start, stop))


# --- settings


def test_differing_names_leaves_by_dotted_key():
    a = {"x": {"y": [1, {"z": 2}], "same": None}, "nan": float("nan"), "only_a": {}}
    b = {"x": {"y": [1, {"z": 3}, 4], "same": None}, "nan": float("nan"), "only_b": None}
    assert differing(a, b) == {
        "x.y.1.z": (2, 3),
        "x.y.2": (MISSING, 4),
        "only_a": ({}, MISSING),
        "only_b": (MISSING, None),
    }
    assert differing(a, a) == {}


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
        "--overwrite",
    )
    assert "seed" not in str(error.value)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_long_settings_keep_the_message_short(tmp_path):
    write(tmp_path, settings={str(i): "a" * 10_000 for i in range(50)})
    with (
        pytest.raises(InputError) as error,
        open_writer(tmp_path, "store", {str(i): "b" for i in range(50)}, ROWS),
    ):
        pass
    assert len(one_sentence(error, "and 42 more settings differ")) < 2000


def test_settings_far_over_64_kilobytes(tmp_path):
    settings = {f"module {i}": list(range(100)) for i in range(300)}
    write(tmp_path, settings=settings)
    assert open_store(tmp_path).settings == settings


def test_tuples_and_lists_are_the_same_settings(tmp_path):
    write(tmp_path, settings={"shape": (1, 2)})
    with open_writer(tmp_path, "store", {"shape": [1, 2]}, ROWS) as writer:
        assert writer.complete


def test_overwrite_touches_only_its_own_files(tmp_path):
    write(tmp_path, kind="store")
    write(tmp_path, kind="scores")
    others = ["notes.txt", "hessian.h5", "segments/notes.h5", "segments/store-1-2.h5", "scores.h5"]
    for name in others[:-1]:
        (tmp_path / name).write_text("mine")
    before = [(tmp_path / name).read_bytes() for name in others]
    write(tmp_path, slices(12), settings={"other": 1}, overwrite=True)
    assert [(tmp_path / name).read_bytes() for name in others] == before
    assert open_store(tmp_path).settings == {"other": 1}
    assert_holds_rows(open_store(tmp_path, "scores"))
    assert not segment(tmp_path, 0, 5).exists()
    assert segment(tmp_path, 0, 5, "scores").exists()


# --- refusals before the first effect


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


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((3, 2))}, ["'x' has shape [3, 2]", "expected 2 rows"]),
        ({"x": np.array(1.0)}, ["expected 2 rows"]),
        ({"x": np.array(["a", None], dtype=object)}, ["'x' holds NoneType"]),
        ({"x": np.array(["2020-01-01"] * 2, "M8[D]")}, ["'x' holds"]),
        ({"x": ["a", "b\0"]}, ["ends in NUL"]),
        ({"x": np.zeros(2), "x/y": np.zeros(2)}, ["'x' cannot name"]),
        ({"": np.zeros(2)}, ["cannot name"]),
        ({"/x": np.zeros(2)}, ["cannot name"]),
        ({"x/./y": np.zeros(2)}, ["cannot name"]),
    ],
)
def test_arrays_that_cannot_be_stored(tmp_path, arrays, words):
    with open_writer(tmp_path, "store", {}, 4) as writer:
        with pytest.raises(InputError) as error:
            writer.write(0, 2, arrays)
        one_sentence(error, *words)
        assert writer.done == []
    assert not list((tmp_path / "segments").iterdir())


@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"x": np.zeros((2, 4))}, ["float64 [3]", "float64 [4]"]),
        ({"x": np.zeros((2, 3), np.float32)}, ["float64 [3]", "float32 [3]"]),
        ({"y": np.zeros((2, 3))}, ["absent"]),
        ({"x": np.zeros((2, 3)), "y": np.zeros(2)}, ["'y'", "absent"]),
    ],
)
def test_slices_need_the_same_arrays(tmp_path, second, words, resumed):
    with open_writer(tmp_path, "store", {}, 4) as writer:
        writer.write(0, 2, {"x": np.zeros((2, 3))})
        if not resumed:
            with pytest.raises(InputError) as error:
                writer.write(2, 4, second)
    if resumed:
        with open_writer(tmp_path, "store", {}, 4) as writer, pytest.raises(InputError) as error:
            writer.write(2, 4, second)
    one_sentence(error, *words, "same arrays")


def test_fixed_names_do_not_hide_rows(tmp_path):
    with open_writer(tmp_path, "store", {}, 1) as writer:
        writer.write(0, 1, {"x": np.zeros(1)})
        with pytest.raises(InputError, match="'x' cannot name"):
            writer.finish({"x": np.zeros(1)})


def test_what_is_not_a_store(tmp_path):
    write(tmp_path / "run")
    (tmp_path / "data.csv").write_text("a,b")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 1
    (tmp_path / "empty").mkdir()
    for name, words in {
        "data.csv": ["is no HDF5 file"],
        "foreign.h5": ["was not written by gradfn"],
        "absent": ["does not exist"],
        "empty": ["has no store.h5"],
        "run/segments/store-0000000000-0000000005.h5": ["is one segment", tmp_path / "run"],
    }.items():
        with pytest.raises(InputError) as error:
            open_store(tmp_path / name)
        assert "delete" not in one_sentence(error, *words)
    with pytest.raises(InputError) as error, open_writer(tmp_path / "data.csv", "store", {}, 1):
        pass
    one_sentence(error, "is a file")


def test_names_that_are_not_there(tmp_path):
    write(tmp_path)
    store = open_store(tmp_path)
    for call in (store.read, store.shape, store.fixed):
        with pytest.raises(InputError) as error:
            call("gradients/nope")
        one_sentence(error, "no array 'gradients/nope'", "choose from")
    with pytest.raises(InputError, match="at least 1"):
        next(store.chunks(["rows/id"], 0))


def test_a_store_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "FORMAT", 2)
    write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError) as error:
        open_store(tmp_path)
    one_sentence(error, "format 2", "reads 1")


# --- two writers


def test_a_second_writer_is_refused(tmp_path):
    with open_writer(tmp_path, "store", SETTINGS, ROWS):
        with pytest.raises(InputError) as error, open_writer(tmp_path, "store", {}, 1, overwrite=True):
            pass
        one_sentence(error, "another run is writing", tmp_path)
        with open_writer(tmp_path, "scores", SETTINGS, ROWS):
            pass
    with open_writer(tmp_path, "store", SETTINGS, ROWS):
        pass


def test_a_writer_in_another_process_is_refused_until_it_dies(tmp_path):
    child = start("with open_writer(run, 'store', {}, 1):\n    ready()\n    time.sleep(60)", tmp_path)
    with pytest.raises(InputError, match="another run is writing"), open_writer(tmp_path, "store", {}, 1):
        pass
    child.kill()
    child.communicate()
    with open_writer(tmp_path, "store", {}, 1):
        pass


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(store_module.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        write(tmp_path)
    assert_holds_rows(open_store(tmp_path))


# --- killed


def start(code, run):
    """Run `code` in a process of its own, up to where it says ready()."""
    setup = """
        import os, sys, time
        sys.path[:0] = sys.argv[2:]
        from pathlib import Path
        import numpy as np
        from gradfn.runs.store import open_writer
        import test_store
        run = Path(sys.argv[1])
        def ready():
            print("ready", flush=True)
    """
    here = Path(__file__).resolve().parent
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code), run, here, here.parent],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    if select.select([child.stdout], [], [], 60)[0] and child.stdout.readline() == "ready\n":
        return child
    child.kill()
    pytest.fail(child.communicate()[1])


def finished(child):
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 0, stderr
    return stdout


def refusal(call, *args):
    try:
        call(*args)
    except InputError as error:
        return str(error)
    return ""


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
        cuts, until = slices(dice.randint(1, 3), 60), time.monotonic() + dice.uniform(0, 0.1)
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
    child = start(f"ready()\ntest_store.kill_at_random(run, {int(sent)})", tmp_path)
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
    child = start(f"ready()\ntest_store.kill_at_each_step(run, {kind!r})", tmp_path)
    codes = [int(code) for code in finished(child).split()]
    assert codes == 2 * ([-signal.SIGKILL] * 5 + [0]) + 2 * ([-signal.SIGKILL] * 2 + [0] * 4)
    for run in tmp_path.iterdir():
        refused = refusal(open_store, run, kind)
        assert not refused or "unfinished" in refused or "has no" in refused
        write(run, slices(7), kind)
        assert_holds_rows(open_store(run, kind))
        assert not [name for name in files(run) if name.endswith(".tmp")]


# --- damage


def damage(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_segment_is_named(tmp_path, keep):
    write(tmp_path)
    path = segment(tmp_path, 5, 10)
    damage(path, lambda content: content[:keep])
    for opened in (open_store, write):
        with pytest.raises(InputError) as error:
            opened(tmp_path)
        one_sentence(error, path, "damaged", "delete it and run the same command again")
    path.unlink()
    write(tmp_path)
    assert_holds_rows(open_store(tmp_path))


@pytest.mark.parametrize("kind", ["store", "scores"])
def test_a_flipped_byte_in_the_data_is_named(tmp_path, kind):
    write(tmp_path, kind=kind)
    path = segment(tmp_path, 5, 10) if kind == "store" else tmp_path / "scores.h5"
    place = path.read_bytes().index(rows_of(5, 10)["gradients/layers.0.mlp"].tobytes())

    def flip(content):
        content[place + 3] ^= 1
        return content

    damage(path, flip)
    store = open_store(tmp_path, kind)
    with pytest.raises(InputError) as error:
        store.read("gradients/layers.0.mlp")
    one_sentence(error, path, "a checksum does not match", "delete it")
    assert np.array_equal(store.read("rows/length"), rows_of(0, ROWS)["rows/length"])


def test_scores_are_not_copied_from_a_damaged_segment(tmp_path):
    with open_writer(tmp_path, "scores", SETTINGS, ROWS) as writer:
        writer.write(0, ROWS, rows_of(0, ROWS))
        path = segment(tmp_path, 0, ROWS, "scores")
        place = path.read_bytes().index(rows_of(0, ROWS)["rows/length"].tobytes())
        damage(path, lambda content: content[:place] + b"\xff" + content[place + 1 :])
        with pytest.raises(InputError) as error:
            writer.finish()
    one_sentence(error, path, "checksum", "delete it")
    assert not (tmp_path / "scores.h5").exists()


def test_no_flipped_byte_anywhere_changes_what_is_read(tmp_path):
    write(tmp_path, slices(12), fixed={"queries/text": TEXTS})
    path, places = segment(tmp_path, 0, 12), random.Random(0)
    whole = path.read_bytes()
    refusals = []
    for _ in range(120):
        content = bytearray(whole)
        content[places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(content)
        refusals.append(refusal(lambda: assert_holds_rows(open_store(tmp_path))))
    assert all(str(path) in refused for refused in refusals if refused)
    assert sum(map(bool, refusals)) > 30


def test_a_segment_of_another_run_is_refused(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", settings={**SETTINGS, "damping": 0.2})
    store = open_store(tmp_path / "a")
    shutil.copy(segment(tmp_path / "b", 0, 5), segment(tmp_path / "a", 0, 5))
    for opened in (lambda: open_store(tmp_path / "a"), lambda: store.read("rows/length")):
        with pytest.raises(InputError) as error:
            opened()
        one_sentence(error, segment(tmp_path / "a", 0, 5), "is not the file")


def test_misplaced_segments_are_refused(tmp_path):
    write(tmp_path)
    shutil.copy(segment(tmp_path, 0, 5), segment(tmp_path, 0, 4))
    with pytest.raises(InputError) as error:
        write(tmp_path)
    one_sentence(error, segment(tmp_path, 0, 4), "holds rows 0 to 5")


def test_overlapping_segments_are_refused(tmp_path):
    write(tmp_path / "a", slices(5))
    write(tmp_path / "b", slices(4))
    shutil.copy(segment(tmp_path / "b", 0, 4), tmp_path / "a" / "segments")
    with pytest.raises(InputError) as error:
        write(tmp_path / "a")
    one_sentence(error, "overlaps", "delete one of them")


# --- full and failing disks


def test_a_full_disk_is_one_sentence_and_keeps_what_is_complete(tmp_path):
    """A limit on the size of files stands in for a full disk: both fail in the middle of a write."""
    code = """
        import resource
        from gradfn.errors import StorageError
        ready()
        big = np.random.default_rng(0).normal(size=(6, 20_000))
        with open_writer(run, "store", {}, 12) as writer:
            writer.write(0, 2, {"x": big[:2]})
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
            for attempt in range(2):
                try:
                    writer.write(2, 8, {"x": big})
                except StorageError as error:
                    print(error)
            writer.write(8, 10, {"x": big[:2]})
            print(writer.done)
    """
    child = start(code, tmp_path)
    *messages, done = finished(child).splitlines()  # HDF5 left to itself crashes at exit
    assert len(messages) == 2
    for message in messages:
        assert f"cannot write {segment(tmp_path, 2, 8)} (File too large): free some space" in message
    assert done == "[(0, 2), (8, 10)]"
    assert [name for name in files(tmp_path) if ".h5" in name] == [
        "segments/store-0000000000-0000000002.h5",
        "segments/store-0000000008-0000000010.h5",
    ]


@pytest.mark.parametrize(("code", "remedy"), [("ENOSPC", "free"), ("EDQUOT", "free"), ("EIO", "writable")])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_while_joining(tmp_path, monkeypatch, code, remedy, call):
    number = getattr(store_module.errno, code)
    with open_writer(tmp_path, "scores", SETTINGS, ROWS) as writer:
        writer.write(0, ROWS, rows_of(0, ROWS))

        def fail(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(store_module.os, call, fail)
        if call == "fsync":
            monkeypatch.setattr(store_module, "_sync_directory", lambda path: None)
        with pytest.raises(StorageError) as error:
            writer.finish()
        monkeypatch.undo()
        one_sentence(error, tmp_path / "scores.h5", os.strerror(number), remedy, "run the same command again")
        assert [name for name in files(tmp_path) if name.endswith(".h5")] == [
            "segments/scores-0000000000-0000000012.h5"
        ]
        writer.finish()
    assert_holds_rows(open_store(tmp_path, "scores"))


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store_module.os, "open", refuse)
    with pytest.raises(StorageError) as error, open_writer(tmp_path, "store", {}, 1):
        pass
    one_sentence(error, "Permission denied", "make the place writable")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store_module.h5py, "File", refuse)
    with pytest.raises(StorageError) as error:
        open_store(tmp_path)
    assert "delete" not in one_sentence(error, "Permission denied")


def test_a_write_that_the_system_cuts_short_is_gone_on_with(tmp_path):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(bytes(data[:3]))

    class Sink(store_module._Sink, Short):
        pass

    with Sink(tmp_path / "file", "w") as sink:
        assert sink.write(b"0123456789") == 10
    assert (tmp_path / "file").read_bytes() == b"0123456789"
