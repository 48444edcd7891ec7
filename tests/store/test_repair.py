"""Either all damaged files are removed, or none, and no healthy one."""

import os

import pytest
from stored import SETTINGS, assert_holds_rows, files, flip, one_sentence, segment, write

from gradfn.errors import InputError
from gradfn.store import open_store
from gradfn.store.repair import repair
from gradfn.store.verify import check_files

REQUEST = {"command": "build", "given": {}}


def mend(run):
    return repair(run, [*check_files(run)])


@pytest.mark.parametrize("kind", ["store", "scores"])
def test_what_is_damaged_is_removed_and_written_again(tmp_path, kind):
    write(tmp_path, kind=kind, request=REQUEST)
    before = files(tmp_path)
    damaged = segment(tmp_path, 5, 10, kind)
    flip(damaged)
    assert mend(tmp_path) == [damaged]
    assert set(before) - set(files(tmp_path)) == {str(damaged.relative_to(tmp_path))}
    assert mend(tmp_path) == []
    write(tmp_path, kind=kind, request=REQUEST)
    assert_holds_rows(open_store(tmp_path, kind))


def test_a_file_that_is_named_twice_is_removed_once(tmp_path, monkeypatch):
    write(tmp_path / "run", request=REQUEST)
    damaged = segment(tmp_path / "run", 5, 10)
    damaged.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert sum(bool(one.wrong) for one in check_files("run")) == 2
    assert [os.path.abspath(path) for path in mend("run")] == [str(damaged)]


def test_all_or_none(tmp_path):
    write(tmp_path, request=REQUEST)
    write(tmp_path, kind="scores")
    flip(segment(tmp_path, 5, 10))
    flip(segment(tmp_path, 0, 5, "scores"))
    before = files(tmp_path)
    with pytest.raises(InputError) as error:
        mend(tmp_path)
    one_sentence(error, segment(tmp_path, 0, 5, "scores"), "says what made it", "nothing was removed")
    assert files(tmp_path) == before


def test_what_is_not_damage_is_not_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("gradfn.store.file.FORMAT", 5)
    write(tmp_path, settings=SETTINGS, request=REQUEST)
    monkeypatch.undo()
    before = files(tmp_path)
    with pytest.raises(InputError) as error:
        mend(tmp_path)
    one_sentence(error, "cannot be repaired, and nothing was removed", "has format 5")
    assert files(tmp_path) == before
