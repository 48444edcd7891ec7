"""Numbers where they lie in a file: copied or mapped, at any place."""

import resource

import h5py
import numpy as np
import pytest
from stored import SETTINGS, segment

from gradfn.store import open_store, open_writer


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
