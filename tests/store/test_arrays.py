"""What arrays a store takes."""

import numpy as np
import pytest
from stored import one_sentence

from gradfn.errors import InputError
from gradfn.store import open_store, open_writer


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
