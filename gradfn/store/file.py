"""One HDF5 file: a header of attributes, and arrays. It appears under its name complete, or not at all."""

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from xxhash import xxh3_64

from gradfn.errors import InputError, LostFileError, StorageError
from gradfn.store.arrays import ArraySpec
from gradfn.store.guard import text_of

FORMAT = 4
"""What is written. Scores of format 1 have no axis of dampings; before 3, texts of the header have no fixed
length, and arrays no digests; in 3, these are SHA-256, and numbers lie in chunks that HDF5 checks."""
DIGESTED = 3
"""The first format with digests."""
READABLE = (1, 2, 3, 4)
RESUMED = (2, 3, 4)
"""Formats of which segments may lie beside each other."""
OPEN = 1 << 62
"""The number of rows in a segment that was written before it was known how many there would be."""
CHUNK_BYTES = 1 << 20
"""Of texts in a chunk, and of what is written at a time."""
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FEW_FILES = frozenset({errno.EMFILE, errno.ENFILE})
# Version 1.10 of the format is the first with virtual datasets, and checksums its own metadata.
LIBVER = ("v110", "v110")

ALIGNED = 512, 64
"""Arrays of so many bytes begin at a multiple of so many, so that numbers can be used where they lie."""
BLOCK, DIGITS = 1 << 18, 16
"""Bytes that have a checksum, and the hex digits of one."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Header:
    """What one file holds.

    Args:
        kind: "store", "scores", or another word.
        rows: how many rows the run has; `start` and `stop` say which of them this file has.
        settings: all that the rows depend on, as plain JSON values.
        arrays: of rows, each as one row of it is.
        index_arrays: arrays without a row dimension.
        segments: the rows of the files that an index joins; empty for a file that holds its rows itself.
        request: what was asked for, such as a command and its options: recorded, and never compared.
        digests: of the bytes of every array that lies in the file itself, see `Sums`.
        format: the version of the layout.
    """

    kind: str
    rows: int
    start: int
    stop: int
    settings: dict[str, Any]
    arrays: dict[str, ArraySpec]
    index_arrays: dict[str, ArraySpec] = field(default_factory=dict)
    segments: tuple[Span, ...] = ()
    request: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    format: int = field(default_factory=lambda: FORMAT)


def _digest(*texts: str) -> str:
    return sha256("\0".join(texts).encode()).hexdigest()


def _put_header(file: h5py.File, header: Header) -> None:
    manifest = dict(vars(header))
    settings = json.dumps(manifest.pop("settings"))
    text = json.dumps(manifest, default=vars)
    # HDF5 has no checksum of the heap where texts without a fixed length lie, and loops in a damaged one.
    for name, value in {"settings": settings, "manifest": text, "checksum": _digest(settings, text)}.items():
        content = value.encode()
        file.attrs.create(name, np.array(content, h5py.string_dtype("utf-8", len(content))))


def get_header(file: h5py.File) -> Header:
    """The header of an open file, after its checksum was compared."""
    if "manifest" not in file.attrs:
        raise InputError(f"{file.filename} was not written by gradfn: give the run directory or its .h5 file")
    settings, text = text_of(file, "settings"), text_of(file, "manifest")
    if text_of(file, "checksum") != _digest(settings, text):
        raise ValueError("checksum of the settings")
    manifest = json.loads(text)
    if manifest["format"] not in READABLE:
        raise InputError(
            f"{file.filename} has format {manifest['format']} and this gradfn reads "
            f"{', '.join(map(str, READABLE))}: use the gradfn that made it"
        )
    if manifest["format"] == 1:
        manifest["index_arrays"] = manifest.pop("fixed")
    for group in ("arrays", "index_arrays"):
        manifest[group] = {
            name: ArraySpec(spec["dtype"], tuple(spec["shape"])) for name, spec in manifest[group].items()
        }
    manifest["segments"] = tuple((start, stop) for start, stop in manifest["segments"])
    header = Header(settings=json.loads(settings), **manifest)
    _check_plain(header)
    return header


def _check_plain(header: Header) -> None:
    """Refuse a header that no gradfn writes: what it says names files, and says what is read from them."""
    ends = [header.start, *(row for span in header.segments for row in span), header.stop]
    tiles = all(a == b for a, b in zip(ends[::2], ends[1::2], strict=True)) or not header.segments
    specs = [*header.arrays.values(), *header.index_arrays.values()]
    numbers = all(np.dtype(spec.dtype).kind in "biufcS" for spec in specs)
    if not (re.fullmatch("[a-z_]+", header.kind) and tiles and numbers):
        raise ValueError("no header of gradfn")


def _chunks(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the shape of a chunk of about `CHUNK_BYTES`: whole rows, or parts of a row that is larger."""
    budget, chunk = max(1, CHUNK_BYTES // itemsize), []
    for size in reversed(shape):
        chunk.append(max(1, min(size, budget)))
        budget //= chunk[-1]
    return tuple(reversed(chunk))


class Sums:
    """Checksums (XXH3) of bytes that come in parts: 16 hex digits for each 256 KiB, one after the other.

    >>> sums = Sums()
    >>> sums.update(np.zeros(BLOCK + 1, np.uint8))
    >>> len(sums.hexdigest())
    32
    """

    def __init__(self) -> None:
        self._done: list[str] = []
        self._open, self._room = xxh3_64(), BLOCK

    def update(self, array: np.ndarray) -> None:
        """Take further bytes."""
        rest = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while len(rest):
            part, rest = rest[: self._room], rest[self._room :]
            self._open.update(part)
            self._room -= len(part)
            if not self._room:
                self._done.append(self._open.hexdigest())
                self._open, self._room = xxh3_64(), BLOCK

    def hexdigest(self) -> str:
        """Those of all bytes so far."""
        return "".join([*self._done, *([self._open.hexdigest()] if self._room < BLOCK else [])])


def sums_of(parts: Iterable[np.ndarray]) -> str:
    """The checksums of arrays one after the other, see `Sums`."""
    sums = Sums()
    for part in parts:
        sums.update(part)
    return sums.hexdigest()


def new_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """Make a dataset: of numbers in one piece, of texts compressed and checksummed, in chunks of rows."""
    if 0 in shape or dtype.kind != "S":
        return file.create_dataset(name, shape, dtype)
    # Strings of one width are mostly padding, which compression takes back.
    return file.create_dataset(
        name, shape, dtype, chunks=_chunks(shape, dtype.itemsize), compression="gzip", compression_opts=1,
        fletcher32=True,
    )  # fmt: skip


def put_all(file: h5py.File, header: Header, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a header and arrays into an open file, with the digests of these beside those it has."""
    # A scalar is stored as one element, so that it has bytes with a checksum.
    whole = {name: np.ascontiguousarray(np.atleast_1d(array)) for name, array in arrays.items()}
    digests = {name: sums_of([array]) for name, array in whole.items()}
    _put_header(file, replace(header, digests={**header.digests, **digests}))
    for name, array in whole.items():
        dataset = new_dataset(file, name, array.shape, array.dtype)
        if array.size:
            dataset[...] = array


class _Sink(io.FileIO):
    """A file that remembers a failed write instead of raising it.

    HDF5 cannot close a file that it failed to write: it keeps the file open and crashes the process at exit.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data)
        try:
            while self.error is None and len(rest):
                # Linux takes a third of the time for several of these that it may take for one large one.
                rest = rest[super().write(rest[:CHUNK_BYTES]) :]
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = error
            return 0


def _write_file(path: Path, fill: Callable[[h5py.File], None]) -> None:
    with _Sink(path, "x+") as sink:
        try:
            size, place = ALIGNED
            with h5py.File(
                sink, "w", libver=LIBVER, alignment_threshold=size, alignment_interval=place
            ) as file:
                fill(file)
        finally:
            if sink.error is not None:
                raise sink.error
        os.fsync(sink.fileno())


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system while writing `path` into a `StorageError` of one sentence."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        remedy = "free some space" if error.errno in DISK_FULL else "make the place writable"
        raise StorageError(
            f"cannot write {path} ({os.strerror(error.errno)}): {remedy} and run the same command again, "
            "which keeps the rows that are complete"
        ) from error


def system_error(error: BaseException) -> OSError | None:
    """The error of the operating system that another one came of; Rust tells its number in words alone.

    >>> system_error(RuntimeError("io error: No space left on device (os error 28)"))
    OSError(28, 'No space left on device')
    >>> system_error(RuntimeError("no tensor"))
    """
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, OSError) and one.errno is not None:
            return one
        for number in DISK_FULL:
            if os.strerror(number) in str(one) or f"os error {number})" in str(one):
                return OSError(number, os.strerror(number))
        one = one.__cause__ or one.__context__
    return None


def check_disk(path: Path, size: int, what: str) -> None:
    """Refuse to begin what the disk of `path` has no room for.

    Raises:
        StorageError: `size` bytes are more than are free.
    """
    free = shutil.disk_usage(path).free
    if size > free:
        raise StorageError(
            f"{what} take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free at {path}: free some "
            "space, write to another disk, or project to fewer numbers"
        )


def sync_directory(path: Path) -> None:
    """Bring the names of the files in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot, and order their renames by themselves
            os.fsync(handle)
    finally:
        os.close(handle)


def create_file(path: Path, fill: Callable[[h5py.File], None]) -> None:
    """Make a file that appears as `path` complete and on disk, or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        # Ctrl-C inside a write of HDF5 would end like a failed one; only the main thread is ever interrupted.
        with disk_errors(path), ThreadPoolExecutor(max_workers=1) as thread:
            partial.unlink(missing_ok=True)
            thread.submit(_write_file, partial, fill).result()
            os.replace(partial, path)
            sync_directory(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def link_or_copy(path: Path, target: Path) -> None:
    """Make a complete file appear under another name too: by a hard link, or else by a copy."""
    partial = target.with_name(f".{target.name}.tmp")
    try:
        with disk_errors(target):
            partial.unlink(missing_ok=True)
            try:
                os.link(path, partial)
            except OSError:
                shutil.copyfile(path, partial)
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(partial, target)
            sync_directory(target.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


UNREADABLE = (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What comes of a file that is damaged, or that holds something else than gradfn writes."""
DAMAGE = {
    "truncated file": "it was cut short",
    "checksum": "a checksum does not match",
    "filter returned failure": "a checksum does not match",
    "digest": "its data is not what was written",
    "elsewhere": "it takes data from another file",
    "signature not found": "it is not an HDF5 file",
}


def place_of(path: Path) -> tuple[Path, str]:
    """The run directory that a file lies in, and the kind of what it holds, as its name says.

    >>> place_of(Path("run/segments/store-0000000000-0000000005.h5"))
    (PosixPath('run'), 'store')
    """
    folder = path.parent
    return folder.parent if folder.name == "segments" else folder, re.split(r"[-.]", path.name)[0]


def foreign(path: Path) -> InputError:
    """The error of a file that no run has, of which nobody may be told that it can be deleted."""
    return InputError(f"{path} is no file of gradfn: give the directory of a run, or an .h5 file in it")


def _unreadable(path: Path, error: Exception) -> Exception:
    again = "run the command that made it again, which recomputes only it"
    run, _ = place_of(path)
    if shard := re.fullmatch(r"(\d+)-of-(\d+)", run.name):
        again = f"{again} (`shard=Shard({shard[1]}, {shard[2]})`), then merge"
    elif (run / "shards").exists():
        again = "join the shards again with `merge_run`"
    if isinstance(error, FileNotFoundError):
        return LostFileError(f"{path} is missing: {again}", path)
    if isinstance(error, OSError) and error.errno is not None:
        remedy = "allow more open files (`ulimit -n`)" if error.errno in FEW_FILES else "make it readable"
        return StorageError(f"cannot read {path} ({os.strerror(error.errno)}): {remedy} and try again")
    if path.suffix != ".h5":
        return foreign(path)
    text = str(error).lower()
    reason = next((words for sign, words in DAMAGE.items() if sign in text), "its content makes no sense")
    return LostFileError(f"{path} is damaged ({reason}): delete it and {again}", path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong while reading a complete file into an `InputError` of one sentence."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """Open a complete file to read from; see `explained`."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise InputError(f"{path} is a folder or a device, and no file: give the directory of a run")
    # Complete files do not change, and HDF5's own locks fail on some network file systems.
    with explained(path), h5py.File(path, "r", locking=False) as file:
        yield file


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        InputError: the file is missing, damaged, or was not written by gradfn.
        StorageError: the system does not let it be read.
    """
    with reading(path) as file:
        return get_header(file)
