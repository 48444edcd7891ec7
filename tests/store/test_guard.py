"""A run directory from somebody else: nothing outside it is read, and nothing of another run is touched."""

import shutil

import h5py
import numpy as np
import pytest
from stored import ROWS, assert_holds_rows, one_sentence, refusal, rows_of, segment, write

from gradfn.errors import InputError
from gradfn.store import open_store, open_writer
from gradfn.store.file import _put_header, get_header
from gradfn.store.verify import check_files


def wrong_files(run):
    return [one.path for one in check_files(run) if one.wrong]


@pytest.fixture
def secret(tmp_path):
    """A file that is no business of a run."""
    path = tmp_path / "secret"
    path.write_bytes(b"the key is 12345".ljust(64))
    return path


def replaced(run, place):
    """A run whose segment has another array in the place of one of its own."""
    write(run, [(0, ROWS)])
    with h5py.File(segment(run, 0, ROWS), "r+") as file:
        del file["rows/length"]
        place(file)
    return run


FOREIGN = {
    "external storage": lambda file, secret: file.create_dataset(
        "rows/length", (ROWS,), "i8", external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
    ),
    "a link": lambda file, secret: file.update({"rows/length": h5py.ExternalLink(str(secret), "x")}),
    "a soft link": lambda file, _: file.update({"rows/length": h5py.SoftLink("/rows/id")}),
    "a virtual source": lambda file, secret: file.create_virtual_dataset(
        "rows/length", virtual_of(str(secret))
    ),
    "another dtype": lambda file, _: file.create_dataset("rows/length", data=np.arange(ROWS) / 3),
    "a group": lambda file, _: file.create_group("rows/length"),
    "texts": lambda file, _: file.create_dataset("rows/length", data=["x"] * ROWS),
    "another shape": lambda file, _: file.create_dataset("rows/length", data=np.arange(ROWS + 1)),
}


def virtual_of(path):
    layout = h5py.VirtualLayout((ROWS,), "i8")
    layout[:] = h5py.VirtualSource(path, "x", (ROWS,), "i8")
    return layout


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_in_the_file_itself_is_not_read(tmp_path, secret, what):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.arange(ROWS)
    source = tmp_path / "other.h5" if what in ("a link", "a virtual source") else secret
    run = replaced(tmp_path / "run", lambda file: FOREIGN[what](file, source))
    with pytest.raises(InputError) as error:
        open_store(run).read("rows/length")
    one_sentence(error, segment(run, 0, ROWS), "damaged")
    assert wrong_files(run) == [segment(run, 0, ROWS)]
    with pytest.raises(InputError), open_writer(tmp_path / "mine", "store", {}, ROWS) as writer:
        writer.take(segment(run, 0, ROWS))


def test_a_group_that_is_a_link_is_not_followed(tmp_path, secret):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["length"] = np.arange(ROWS)
    write(tmp_path / "run", [(0, ROWS)])
    with h5py.File(segment(tmp_path / "run", 0, ROWS), "r+") as file:
        del file["rows"]
        file["rows"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/")
    assert "damaged" in refusal(lambda: open_store(tmp_path / "run").read("rows/length"))


def test_an_index_that_leads_elsewhere_is_found_and_not_followed(tmp_path, secret):
    write(tmp_path / "run")
    with h5py.File(tmp_path / "run/store.h5", "r+") as file:
        del file["rows/length"]
        file["rows/length"] = h5py.ExternalLink(str(secret), "/")
    assert_holds_rows(open_store(tmp_path / "run"))
    (found,) = (one for one in check_files(tmp_path / "run") if one.wrong)
    assert found.path == tmp_path / "run/store.h5"
    assert "it takes data from another file" in found.wrong


@pytest.mark.parametrize("name", [
    "segments", "segments/store-0000000000-0000000005.h5", "store.h5", ".store.lock",
])  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_links_to_what_is_anothers_are_refused(tmp_path, name, overwrite):
    write(tmp_path / "theirs")
    write(tmp_path / "run")
    place = tmp_path / "run" / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(tmp_path / "theirs" / name)
    with pytest.raises(InputError) as error:
        write(tmp_path / "run", overwrite=overwrite)
    one_sentence(error, f"{place} is a symbolic link")
    if name != ".store.lock":
        with pytest.raises(InputError, match="is a symbolic link"):
            open_store(tmp_path / "run").read("rows/length")
        assert any("is a symbolic link" in one.wrong for one in check_files(tmp_path / "run"))
    assert_holds_rows(open_store(tmp_path / "theirs"))


def test_a_link_in_the_place_of_a_temporary_file_is_not_written_through(tmp_path, secret):
    run = tmp_path / "run"
    with open_writer(run, "store", {}, ROWS) as writer:
        (run / "segments" / ".store-0000000000-0000000012.h5.tmp").symlink_to(secret)
        writer.write(0, ROWS, rows_of(0, ROWS))
        (run / ".store.h5.tmp").symlink_to(secret)
        writer.finish()
    assert secret.read_bytes().startswith(b"the key")
    assert_holds_rows(open_store(run))


@pytest.mark.parametrize("name", ["arrays", "digests", "segments", "start"])
def test_a_header_of_other_kinds_of_values_is_damage(tmp_path, name):
    """The checksum of a header is no signature: who writes a file can make one that fits."""
    write(tmp_path, [(0, ROWS)])
    path = segment(tmp_path, 0, ROWS)
    with h5py.File(path, "r+") as file:
        header = get_header(file)
        vars(header)[name] = ["x"]
        for attribute in list(file.attrs):
            del file.attrs[attribute]
        _put_header(file, header)
    with pytest.raises(InputError) as error:
        open_store(tmp_path).read("rows/length")
    one_sentence(error, path, "is damaged")
    assert path in wrong_files(tmp_path)
