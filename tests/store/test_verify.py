"""Damage of any kind is one sentence that names the file: never a hang, a crash or a wrong number."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from stored import (
    ROWS,
    TEXTS,
    assert_holds_rows,
    damage,
    finished,
    one_sentence,
    refusal,
    rows_of,
    segment,
    start,
    write,
)

from gradfn.errors import InputError
from gradfn.store import open_store, open_writer
from gradfn.store.verify import check_files

OLD = Path(__file__).parent / "data" / "v2"
ZEROED = """
    from stored import assert_holds_rows, refusal
    from gradfn.store import open_store
    from gradfn.store.verify import check_files
    ready()
    for path in sorted(run.rglob("*.h5")):
        whole = path.read_bytes()
        for place in range(0, len(whole), 512):
            sector = whole[place : place + 512]
            if not any(sector):
                continue
            path.write_bytes(whole[:place] + bytes(len(sector)) + whole[place + 512 :])
            for kind in ("store", "scores"):
                refused = refusal(lambda: assert_holds_rows(open_store(run, kind)))
                assert not refused or str(path) in refused and "damaged" in refused, refused
            if CHECKED:
                named = {one.wrong.split(" is damaged")[0] for one in check_files(run) if one.wrong}
                assert named == {str(path)}, (path, place, named)
        path.write_bytes(whole)
"""


def wrong_files(run):
    return [one.path for one in check_files(run) if one.wrong]


@pytest.mark.parametrize("old", [False, True])
def test_no_zeroed_sector_hangs_or_changes_what_is_read(tmp_path, old):
    """Files of before have no digests, so that what zeros have overwritten there may go unnoticed."""
    if old:
        shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    else:
        for kind in ("store", "scores"):
            write(tmp_path, kind=kind, index_arrays={"queries/text": TEXTS})
    read, opened = "assert_holds_rows(open_store(run, kind))", "open_store(run, kind)"
    code = ZEROED.replace("CHECKED", str(not old))
    finished(start(code.replace(read, opened) if old else code, tmp_path))


@pytest.mark.parametrize("kind", ["store", "scores"])
@pytest.mark.parametrize("name", [*rows_of(0, 1)])
def test_a_chunk_that_zeros_have_overwritten_is_found(tmp_path, kind, name):
    write(tmp_path, kind=kind)
    path = segment(tmp_path, 5, 10) if kind == "store" else tmp_path / "scores.h5"
    with h5py.File(path) as file:
        chunk = file[name].id.get_chunk_info(0)
    end = chunk.byte_offset + chunk.size
    damage(path, lambda content: content[: chunk.byte_offset] + bytes(chunk.size) + content[end:])
    with pytest.raises(InputError) as error:
        open_store(tmp_path, kind).read(name)
    one_sentence(error, path, "damaged")
    assert wrong_files(tmp_path) == [path]


def test_data_that_is_right_for_hdf5_and_not_what_was_written_is_found(tmp_path):
    write(tmp_path)
    path = segment(tmp_path, 5, 10)
    with h5py.File(path, "r+") as file:
        file["rows/length"][2] += 1
    assert wrong_files(tmp_path) == [path]
    (tmp_path / "store.h5").unlink()
    with pytest.raises(InputError) as error:
        write(tmp_path)
    one_sentence(
        error, path, "its data is not what was written", "delete it and run the command that made it again"
    )
    path.unlink()
    assert_holds_rows(open_store(write(tmp_path)))
    assert wrong_files(tmp_path) == []


def test_a_segment_that_is_gone_and_an_index_of_other_segments_are_found(tmp_path):
    write(tmp_path)
    segment(tmp_path, 5, 10).unlink()
    (checked,) = (one for one in check_files(tmp_path) if one.wrong)
    assert checked.path == tmp_path / "store.h5"
    assert f"{segment(tmp_path, 5, 10)} is missing" in checked.wrong
    shutil.rmtree(tmp_path)
    write(tmp_path)
    with h5py.File(tmp_path / "store.h5", "r+") as file:
        del file["rows/length"]
        file.create_virtual_dataset("rows/length", h5py.VirtualLayout((ROWS,), "i8"))
    assert wrong_files(tmp_path) == [tmp_path / "store.h5"]


def test_files_of_the_format_before_are_read_and_resumed(tmp_path):
    run = Path(shutil.copytree(OLD, tmp_path / "run"))
    for kind in ("store", "scores"):
        assert_holds_rows(open_store(run, kind))
        assert open_store(run, kind).index_array("queries/text").tolist() == ["a", "b"]
        (run / f"{kind}.h5").unlink()
        segment(run, 5, 10, kind).unlink()
        write(run, kind=kind)
        assert_holds_rows(open_store(run, kind))
    assert wrong_files(run) == []


# --- a run directory from somebody else


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
