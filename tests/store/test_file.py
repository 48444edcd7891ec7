"""One file: its checksums, its format, and disks that are full or fail."""

import errno
import io
import os
import random
import shutil

import h5py
import numpy as np
import pytest
from stored import (
    ROWS,
    SETTINGS,
    TEXTS,
    assert_holds_rows,
    damage,
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

from gradfn.errors import InputError, StorageError
from gradfn.store import columns as columns_module
from gradfn.store import file as file_module
from gradfn.store import open_store, open_writer
from gradfn.store import writer as writer_module


def test_a_row_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(file_module, "CHUNK_BYTES", 64)
    monkeypatch.setattr(writer_module, "COPY_BYTES", 256)
    values = np.random.default_rng(0).normal(size=(5, 3, 50))
    with open_writer(tmp_path, "scores", {}, 5) as writer:
        writer.write(0, 5, {"x": values})
        writer.finish()
    assert np.array_equal(open_store(tmp_path, "scores").read("x"), values)


def test_texts_are_checksummed_chunks_and_numbers_lie_in_one_piece(tmp_path):
    write(tmp_path)
    with h5py.File(segment(tmp_path, 0, 5)) as file:
        for name in rows_of(0, 1):
            texts = name == "rows/id"
            assert file[name].fletcher32 == texts
            assert file[name].chunks == (file[name].shape if texts else None)


@pytest.mark.parametrize("block", [16, 40, 1 << 18])
def test_every_byte_of_numbers_has_a_checksum(tmp_path, monkeypatch, block):
    """Of whatever rows are read, and of no others."""
    for module in (file_module, columns_module):
        monkeypatch.setattr(module, "BLOCK", block)
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    with open_writer(tmp_path, "store", {}, 7) as writer:
        writer.write(0, 7, {"x": values})
        writer.finish()
    path, store, whole = segment(tmp_path, 0, 7), open_store(tmp_path), segment(tmp_path, 0, 7).read_bytes()
    spans = [(0, 7), (0, 1), (2, 5), (6, 7)]
    for begin, end in spans:
        assert np.array_equal(store.read("x", begin, end), values[begin:end])
        (first, last, part), *_ = store.parts(["x"], 3)
        assert (first, last) == (0, 3)
        assert np.array_equal(part["x"], values[:3])
    offset = whole.index(values.tobytes())
    for place in range(values.nbytes):
        at = offset + place
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        for begin, end in spans:
            if begin * 20 // block <= place // block <= (end * 20 - 1) // block:
                with pytest.raises(InputError, match="a checksum does not match"):
                    store.read("x", begin, end)
            else:
                assert np.array_equal(store.read("x", begin, end), values[begin:end])
        path.write_bytes(whole)


def test_what_is_read_can_be_changed_and_the_file_stays(tmp_path):
    write(tmp_path)
    store, name = open_store(tmp_path), "gradients/layers.0.mlp"
    for _, _, part in store.parts([name], 2):
        part[name] += 1
    assert_holds_rows(store)


def test_the_place_of_numbers_behind_the_end_of_a_file_is_no_crash(tmp_path):
    write(tmp_path)
    path, store = segment(tmp_path, 0, 5), open_store(tmp_path)
    parts = store.parts(["gradients/layers.0"], 1)
    next(parts)
    damage(path, lambda content: content[: len(content) // 2])
    with pytest.raises(InputError) as error:
        list(parts)
    one_sentence(error, path, "it was cut short")


def test_settings_far_over_64_kilobytes(tmp_path):
    settings = {f"module {i}": list(range(100)) for i in range(300)}
    write(tmp_path, settings=settings)
    assert open_store(tmp_path).settings == settings


def test_a_store_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(file_module, "FORMAT", 5)
    write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError) as error:
        open_store(tmp_path)
    one_sentence(error, "format 5", "reads 1, 2, 3, 4")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_segment_is_named(tmp_path, keep):
    write(tmp_path)
    path = segment(tmp_path, 5, 10)
    damage(path, lambda content: content[:keep])
    for opened in (open_store, write):
        with pytest.raises(InputError) as error:
            opened(tmp_path)
        one_sentence(error, path, "damaged", "delete it and run the command that made it again")
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
    write(tmp_path, slices(12), index_arrays={"queries/text": TEXTS})
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
    number = getattr(errno, code)
    with open_writer(tmp_path, "scores", SETTINGS, ROWS) as writer:
        writer.write(0, ROWS, rows_of(0, ROWS))

        def fail(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(file_module.os, call, fail)
        if call == "fsync":
            monkeypatch.setattr(file_module, "sync_directory", lambda path: None)
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

    monkeypatch.setattr(file_module.os, "open", refuse)
    with pytest.raises(StorageError) as error, open_writer(tmp_path, "store", {}, 1):
        pass
    one_sentence(error, "Permission denied", "make the place writable")


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(StorageError) as error:
        open_store(tmp_path)
    assert "delete" not in one_sentence(error, "Permission denied")


def test_a_write_that_the_system_cuts_short_is_gone_on_with(tmp_path):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(bytes(data[:3]))

    class Sink(file_module._Sink, Short):
        pass

    with Sink(tmp_path / "file", "w") as sink:
        assert sink.write(b"0123456789") == 10
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_in_the_place_of_a_file_is_refused(tmp_path, make):
    write(tmp_path)
    for path in (tmp_path / "store.h5", segment(tmp_path, 5, 10)):
        path.unlink()
        make(path)
        with pytest.raises(InputError) as error:
            open_store(tmp_path)
        one_sentence(error, f"{path} is a folder or a device, and no file")
        (path.rmdir if path.is_dir() else path.unlink)()
        write(tmp_path)
