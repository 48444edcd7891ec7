"""Rows of an array that lies in one piece: what is read is what was written, or one sentence."""

import numpy as np
import pytest
from stored import assert_holds_rows, damage, one_sentence, segment, write

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
