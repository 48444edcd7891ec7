"""A folder appears complete or not at all, and every damage of a file in it is named."""

import errno
import io
import json
import os
import random

import pytest
import torch

from gradfn.errors import InputError, StorageError
from gradfn.store import folder as module
from gradfn.store.folder import DIGESTS, check_folder, create_folder, sealed_files

FILES = {"config.json": b"{}", "weights": bytes(range(256)) * 40, "chat/template": b"a"}


def fill(folder):
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def made(tmp_path):
    create_folder(tmp_path / "checkpoint-2", fill)
    return tmp_path / "checkpoint-2"


def test_a_folder_holds_what_was_written_and_the_digests_of_it(made):
    assert names(made) == {*FILES, DIGESTS}
    assert [path.name for path in made.parent.iterdir()] == ["checkpoint-2"]
    assert {str(path.relative_to(made)) for path in sealed_files(made)} == {*FILES, DIGESTS}
    check_folder(made)
    (made / "note.txt").write_text("a file of the user")
    check_folder(made)


def test_one_that_is_there_is_replaced_and_a_folder_without_digests_is_not_checked(made):
    create_folder(made, lambda folder: (folder / "other").touch())
    assert names(made) == {"other", DIGESTS}
    (made / DIGESTS).unlink()
    assert [*sealed_files(made)] == []
    check_folder(made)


@pytest.mark.parametrize("name", [*FILES, DIGESTS])
def test_every_flipped_bit_and_every_cut_is_named(made, name):
    path, chance = made / name, random.Random(0)
    whole = path.read_bytes()
    bad = [whole[: chance.randrange(len(whole))] for _ in range(5)]
    for _ in range(20):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        bad.append(bytes(content))
    for content in bad:
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"{path} is damaged \("):
            check_folder(made)
    path.write_bytes(whole)
    check_folder(made)


@pytest.mark.parametrize("digests", [
    {"../secret": "0" * 64}, {"/etc/passwd": "0" * 64}, {"weights": 3}, {"": "x"}, [], None, {"weights": "0"},
])  # fmt: skip
def test_digests_from_somebody_else_name_no_other_files(made, tmp_path, digests):
    (tmp_path / "secret").write_text("12345")
    (made / DIGESTS).write_text(json.dumps(digests))
    with pytest.raises(InputError, match=r"digests.json is damaged \(it is no list of digests\)"):
        check_folder(made)
    if isinstance(digests, dict):
        (made / DIGESTS).write_text(json.dumps({**digests, "": module._digest_of(digests)}))
        with pytest.raises(InputError, match="is damaged"):
            check_folder(made)


def test_a_link_in_the_place_of_a_file_is_not_read(made, tmp_path):
    (made / "weights").rename(tmp_path / "weights")
    (made / "weights").symlink_to(tmp_path / "weights")
    with pytest.raises(InputError, match="weights is missing"):
        check_folder(made)


@pytest.mark.parametrize("error", [
    RuntimeError("Error: I/O error: No space left on device (os error 28)"), ValueError("io (os error 28)"),
    Exception("io error: Disk quota exceeded"), OSError(errno.ENOSPC, "No space left on device"),
])  # fmt: skip
def test_a_full_disk_is_one_sentence_whoever_writes(made, error):
    def full(folder):
        fill(folder)
        raise error

    with pytest.raises(StorageError, match=r"cannot write .*checkpoint-2 \(.*\): free some space"):
        create_folder(made, full)
    assert names(made) == {*FILES, DIGESTS}
    with pytest.raises(ZeroDivisionError):
        create_folder(made, lambda _: 1 / 0)
    check_folder(made)


def test_a_full_disk_is_told_through_torch(made):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match="No space left on device"):
        create_folder(made, lambda _: torch.save({"a": torch.ones(3)}, Full()))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_leaves_nothing_half_written(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.os, call, fail)
    monkeypatch.setattr(module, "sync_directory", lambda path: None)
    with pytest.raises(StorageError, match="Input/output error"):
        create_folder(tmp_path / "checkpoint-2", fill)
    assert [*tmp_path.iterdir()] == []
