"""Reading what was written, by gradfn and by other tools."""

import json
import pickle
import resource
import shutil

import h5py
import numpy as np
import pytest
from stored import (
    ROWS,
    SETTINGS,
    TEXTS,
    assert_holds_rows,
    one_sentence,
    rows_of,
    segment,
    slices,
    write,
)

from gradfn.errors import InputError
from gradfn.store import open_store, open_writer


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
    write(tmp_path, kind=kind, index_arrays=fixed)
    store = open_store(tmp_path, kind)
    assert list(store.index_array("queries/text")) == TEXTS
    assert np.array_equal(store.index_array("queries/norm"), fixed["queries/norm"])
    assert store.index_array("mean").shape == ()
    assert store.index_array("mean") == 2.5
    assert store.index_array("none").shape == (0,)
    assert "queries/text" not in store.names()


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
    one_sentence(error, "store-0000000000-0000000005.h5 is missing", "run the command that made it again")


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


def test_unfinished_runs_cannot_be_read_or_finished(tmp_path):
    with open_writer(tmp_path, "store", SETTINGS, ROWS) as writer:
        writer.write(0, 5, rows_of(0, 5))
        with pytest.raises(InputError) as error:
            writer.finish()
        one_sentence(error, "lacks 7 of its 12 rows", "row 5")
    with pytest.raises(InputError) as error:
        open_store(tmp_path)
    one_sentence(error, "unfinished", "run the command that made it again")


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
    one_sentence(error, "is no folder")


def test_names_that_are_not_there(tmp_path):
    write(tmp_path)
    store = open_store(tmp_path)
    for call in (store.read, store.shape, store.index_array):
        with pytest.raises(InputError) as error:
            call("gradients/nope")
        one_sentence(error, "no array 'gradients/nope'", "choose from")
    with pytest.raises(InputError, match="at least 1"):
        next(store.chunks(["rows/id"], 0))


def test_a_segment_of_another_run_is_refused(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", settings={**SETTINGS, "damping": 0.2})
    store = open_store(tmp_path / "a")
    shutil.copy(segment(tmp_path / "b", 0, 5), segment(tmp_path / "a", 0, 5))
    for opened in (lambda: open_store(tmp_path / "a"), lambda: store.read("rows/length")):
        with pytest.raises(InputError) as error:
            opened()
        one_sentence(error, segment(tmp_path / "a", 0, 5), "is not the file")
