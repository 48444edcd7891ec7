"""A run directory: one writer, and files that are removed."""

import errno
import fcntl
import os

import pytest
from stored import ROWS, SETTINGS, assert_holds_rows, one_sentence, rows_of, segment, slices, start, write

from gradfn.errors import InputError, StorageError
from gradfn.store import open_store, open_writer
from gradfn.store.directory import locked
from gradfn.store.growing import open_growing


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    write(tmp_path)
    mine = [tmp_path / "segments" / ".store-0000000000-0000000001.h5.tmp", tmp_path / ".store.h5.tmp"]
    other = tmp_path / "segments" / ".scores-0000000000-0000000001.h5.tmp"
    for path in [*mine, other]:
        path.write_bytes(b"half")
    write(tmp_path)
    assert not any(path.exists() for path in mine)
    assert other.exists()


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


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_warns(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"):
        write(tmp_path)
    assert_holds_rows(open_store(tmp_path))


@pytest.mark.parametrize("opening", [
    lambda run: open_writer(run, "store", SETTINGS, ROWS), lambda run: open_growing(run, "store", SETTINGS),
])  # fmt: skip
@pytest.mark.parametrize("error", [InputError("no"), StorageError("full")])
def test_an_error_before_anything_is_written_leaves_nothing(tmp_path, opening, error):
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    for run in (there, tmp_path / "new" / "run"):
        with pytest.raises(type(error)), opening(run):
            raise error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "there"]


def test_an_error_keeps_what_is_written_and_what_is_of_another_kind(tmp_path):
    write(tmp_path, kind="scores")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError), open_writer(tmp_path, "store", SETTINGS, ROWS):
        raise InputError("no")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match="shape"), open_writer(tmp_path, "store", SETTINGS, ROWS) as writer:
        [writer.write(start, start + 5, rows_of(0, 5 - start // 5)) for start in (0, 5)]
    assert segment(tmp_path, 0, 5).exists()
    assert (tmp_path / ".store.lock").exists()


def test_a_lock_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    tmp_path.joinpath(".store.lock").touch()
    real = fcntl.flock

    def late(handle, how):
        (tmp_path / ".store.lock").unlink()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="another run is writing"), locked(tmp_path, "store"):
        pass
