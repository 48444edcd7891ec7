"""Rows of an array that lies in one piece: what is read is what was written, or one sentence."""

import resource

import h5py
import numpy as np
import pytest
from stored import SETTINGS, assert_holds_rows, damage, one_sentence, segment, write

from gradfn.errors import InputError
from gradfn.store import columns as columns_module
from gradfn.store import file as file_module
from gradfn.store import open_store, open_writer


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


def test_more_arrays_than_open_files_are_allowed_at_once(tmp_path):
    names = [f"gradients/{number}" for number in range(80)]
    with open_writer(tmp_path, "store", SETTINGS, 6) as writer:
        writer.write(0, 6, {name: np.full((6, 9), place) for place, name in enumerate(names)})
        writer.finish()
    store, (soft, hard) = open_store(tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        kept = [*store.parts(names, 2), *store.chunks(names, 2), (0, 6, store.read_all(names))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all((rows[name] == place).all() for _, _, rows in kept for place, name in enumerate(names))


@pytest.mark.parametrize("numbers", [9, 1 << 17], ids=["copied", "mapped"])
def test_rows_that_lie_at_odd_places_are_read(tmp_path, numbers):
    """Other tools do not align numbers; no row ends where a checksum does."""
    rows = np.arange(3.0 * (numbers + 1)).reshape(3, -1)
    with open_writer(tmp_path, "store", SETTINGS, 3) as writer:
        writer.write(0, 3, {"x": rows})
        writer.finish()
    path = segment(tmp_path, 0, 3)
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
    with h5py.File(path, "w", libver=("v110", "v110"), userblock_size=512) as file:
        for name, value in attributes.items():
            file.attrs.create(name, np.array(value, h5py.string_dtype("utf-8", len(value))))
        file["pad"], file["x"] = np.zeros(3, "u1"), rows
        assert file["x"].id.get_offset() % 8
    store = open_store(tmp_path)
    for start, stop in ((0, 3), (0, 1), (1, 2), (2, 3), (1, 1)):
        assert np.array_equal(store.read("x", start, stop), rows[start:stop])
    assert [part["x"].shape for _, _, part in store.parts(["x"], 2)] == [(2, numbers + 1), (1, numbers + 1)]
