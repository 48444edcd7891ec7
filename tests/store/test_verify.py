"""Damage of any kind is one sentence that names the file: never a hang, a crash or a wrong number."""

import shutil
from pathlib import Path

import h5py
import pytest
from stored import (
    ROWS,
    TEXTS,
    assert_holds_rows,
    damage,
    finished,
    one_sentence,
    place_of,
    rows_of,
    segment,
    start,
    write,
)

from gradfn.errors import InputError
from gradfn.store import open_store
from gradfn.store.verify import check_files

DATA = Path(__file__).parent / "data"
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


@pytest.mark.parametrize("old", ["v2", "v3", None])
def test_no_zeroed_sector_hangs_or_changes_what_is_read(tmp_path, old):
    """Files of format 2 have no digests, so that what zeros have overwritten there may go unnoticed."""
    if old:
        shutil.copytree(DATA / old, tmp_path, dirs_exist_ok=True)
    else:
        for kind in ("store", "scores"):
            write(tmp_path, [(0, ROWS)], kind=kind, index_arrays={"queries/text": TEXTS})
    read, opened = "assert_holds_rows(open_store(run, kind))", "open_store(run, kind)"
    code = ZEROED.replace("CHECKED", str(old != "v2"))
    finished(start(code.replace(read, opened) if old == "v2" else code, tmp_path))


@pytest.mark.parametrize("kind", ["store", "scores"])
@pytest.mark.parametrize("name", [*rows_of(0, 1)])
def test_a_chunk_that_zeros_have_overwritten_is_found(tmp_path, kind, name):
    write(tmp_path, kind=kind)
    path = segment(tmp_path, 5, 10) if kind == "store" else tmp_path / "scores.h5"
    with h5py.File(path) as file:
        begin, size = place_of(file[name])
    damage(path, lambda content: content[:begin] + bytes(size) + content[begin + size :])
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


@pytest.mark.parametrize("finished", [True, False])
def test_a_whole_file_in_the_place_of_another_is_found(tmp_path, finished):
    write(tmp_path)
    if not finished:
        (tmp_path / "store.h5").unlink()
    shutil.copy(segment(tmp_path, 5, 10), segment(tmp_path, 0, 5))
    found = [one for one in check_files(tmp_path) if one.wrong]
    assert found[0].path == found[0].lost == segment(tmp_path, 0, 5)
    assert "holds what belongs to store-0000000005-0000000010.h5: delete it and run" in found[0].wrong
    assert [one.path for one in check_files(segment(tmp_path, 0, 5)) if one.wrong] == []
    segment(tmp_path, 0, 5).unlink()
    write(tmp_path, kind="scores")
    (tmp_path / "scores.h5").replace(tmp_path / "store.h5")
    assert "holds what belongs to scores.h5" in [*check_files(tmp_path)][-1].wrong


@pytest.mark.parametrize("old", ["v2", "v3"])
def test_files_of_formats_before_are_read_and_resumed(tmp_path, old):
    run = Path(shutil.copytree(DATA / old, tmp_path / "run"))
    for kind in ("store", "scores"):
        assert_holds_rows(open_store(run, kind))
        assert open_store(run, kind).index_array("queries/text").tolist() == ["a", "b"]
        (run / f"{kind}.h5").unlink()
        segment(run, 5, 10, kind).unlink()
        write(run, kind=kind)
        assert_holds_rows(open_store(run, kind))
    assert wrong_files(run) == []
