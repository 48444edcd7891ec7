"""Compressed files, and folders of processes that were killed."""

import bz2
import errno
import gzip
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pytest

from gradfn.errors import InputError, StorageError
from gradfn.hf import load_rows
from gradfn.hf import unpack as unpack_file
from gradfn.hf.unpack import temporary_folder

LINES = b'{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n'


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", PACK)
def test_compressed_rows_are_read(tmp_path, ending):
    for name, data in ((f"a.jsonl{ending}", LINES), (f"a.csv{ending}", b"id,text\n1,a\n2,b\n")):
        (tmp_path / name).write_bytes(PACK[ending](data))
        assert load_rows(tmp_path / name).to_dict() == {"id": ["1", "2"], "text": ["a", "b"]}


@pytest.mark.parametrize("ending", PACK)
def test_a_damaged_file_is_refused(tmp_path, ending):
    for name, data in (("cut", PACK[ending](LINES)[:-9]), ("plain", LINES)):
        (tmp_path / f"{name}.jsonl{ending}").write_bytes(data)
        with pytest.raises(InputError, match="cannot be read"):
            load_rows(tmp_path / f"{name}.jsonl{ending}")


def test_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os\nfrom gradfn.hf.unpack import temporary_folder as t\nwith t(): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    (left,) = tmp_path.iterdir()
    with temporary_folder() as mine:
        assert left.exists()  # its process may be about to lock it
        os.utime(left / "in-use", (0, time.time() - 100))
        os.utime(f"{mine}/in-use", (0, time.time() - 100))
        with temporary_folder():
            assert not left.exists()
            assert os.path.exists(mine)  # in use
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_no_fault_of_the_dataset(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(LINES)

    def full(*args, **options):
        raise RuntimeError("An error occurred") from OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.load_dataset", full)
    with pytest.raises(StorageError, match=r"this machine failed \(.*No space left on device\): free space"):
        load_rows(tmp_path / "a.jsonl")
    assert unpack_file.PACKED.keys() == PACK.keys()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_has_temporary_folders_all_the_same(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("gradfn.hf.unpack.fcntl.flock", fail)
    with temporary_folder() as folder:
        os.utime(Path(folder) / "in-use", (0, 0))
        with temporary_folder():
            assert Path(folder).is_dir()
    assert [*tmp_path.iterdir()] == []
