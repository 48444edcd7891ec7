"""Compressed files, and temporary folders that do not outlive their process."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Endings of compressed files, and how pyarrow calls the compression."""
_PREFIX, _LOCK = "gradfn-", "in-use"
_OLD_S = 60.0
"""Seconds after which a folder without a lock is no longer about to be locked."""


def kind_of(file: Path) -> str:
    """The ending of a file, in lower case, without that of its compression.

    >>> kind_of(Path("rows.jsonl.gz")), kind_of(Path("rows.CSV"))
    ('.jsonl', '.csv')
    """
    return Path(file.stem if file.suffix.lower() in PACKED else file).suffix.lower()


def read_bytes(file: Path) -> bytes:
    """What a file holds, decompressed."""
    import pyarrow

    packed = PACKED.get(file.suffix.lower())
    with pyarrow.input_stream(str(file), compression=packed) as stream:
        return stream.read()


@contextlib.contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder that is removed at the end; those of processes that were killed are removed first."""
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        _remove_unlocked(old)
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as folder, open(Path(folder) / _LOCK, "w") as lock:
        with contextlib.suppress(OSError):  # where there are no locks, no other process takes one for free
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _remove_unlocked(lock: Path) -> None:
    with contextlib.suppress(OSError):  # another user's, or in use, or gone by now
        if time.time() - os.stat(lock).st_mtime > _OLD_S:
            with open(lock, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
