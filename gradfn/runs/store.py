"""Arrays that share their rows, in HDF5: written slice by slice, resumable, read as one.

A run directory holds one *segment* a slice of rows, `segments/<kind>-<start>-<stop>.h5`, and an *index*
`<kind>.h5` that joins them, by virtual datasets, or by a copy for the kinds that are mailed around. A file
appears under its name complete or not at all, and never changes afterwards, so a run that is killed loses the
segment in flight and nothing else.
"""

import errno
import fcntl
import hashlib
import io
import json
import operator
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from gradfn.errors import InputError, StorageError

__all__ = [
    "MISSING", "Overwrite", "Store", "Writer", "differing", "index_path", "open_part", "open_store",
    "open_writer", "remove_kind",
]  # fmt: skip

FORMAT = 1
COPIED_KINDS = frozenset({"scores", "basis"})
CHUNK_BYTES = 1 << 20
COPY_BYTES = 1 << 26
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Version 1.10 of the format is the first with virtual datasets, and checksums its own metadata.
LIBVER = ("v110", "v110")

Values = np.ndarray | Sequence[str]
Span = tuple[int, int]
Overwrite = bool | Literal["unlike"]
"""Whether to replace what is there: always, never, or where it cannot be resumed."""


# --- settings


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def differing(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Return the leaves in which two nested settings differ, by dotted key.

    Args:
        a: settings as JSON has them: dicts, lists, strings, numbers, booleans, None.
        b: the settings to compare with.

    Returns:
        `{dotted key: (value in a, value in b)}`, with `MISSING` for what one side does not have.

    >>> differing({"project": {"dim": 16, "seed": 0}}, {"project": {"dim": 32, "seed": 0}, "loss": "sum"})
    {'project.dim': (16, 32), 'loss': (nothing, 'sum')}
    """
    if a == b or (a != a and b != b):  # NaN is the same setting as NaN
        return {}
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        pairs = {str(key): (a.get(key, MISSING), b.get(key, MISSING)) for key in {**a, **b}}
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        pairs = {str(i): pair for i, pair in enumerate(zip_longest(a, b, fillvalue=MISSING))}
    else:
        return {"": (a, b)}
    return {
        f"{key}.{inner}" if inner else key: values
        for key, pair in pairs.items()
        for inner, values in differing(*pair).items()
    }


def _canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as they come back from JSON (tuples are lists, keys are strings)."""
    try:
        return json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the settings of a store must be plain JSON values, got {settings!r}: {error}"
        ) from error


def _shown(value: Any, limit: int = 100) -> str:
    text = repr(value) if value is MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def _refuse_other_settings(path: Path, there: "Header", here: "Header") -> None:
    differences = differing(there.settings, here.settings)
    if there.rows != here.rows:
        differences["rows"] = (there.rows, here.rows)
    if not differences:
        return
    shown = [f"{key} is {_shown(a)} there and {_shown(b)} here" for key, (a, b) in differences.items()]
    more = f" and {len(shown) - 8} more settings differ" if len(shown) > 8 else ""
    raise InputError(
        f"{path} was made with other settings ({', '.join(shown[:8])}{more}): "
        "add --overwrite to replace it, or write to another directory"
    )


# --- arrays


@dataclass(frozen=True)
class ArraySpec:
    """What an array is made of: its numpy dtype (`|S<bytes>` for strings, as utf-8) and its shape.

    >>> ArraySpec("<f4", (16, 16)).stored_dtype
    dtype('float32')
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype in the file; strings have one width, because checksums do not cover any other kind."""
        dtype = np.dtype(self.dtype)
        return h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype

    def wider(self, other: "ArraySpec") -> "ArraySpec":
        """Return the spec that holds both, where they differ in the width of their strings only."""
        a, b = np.dtype(self.dtype), np.dtype(other.dtype)
        return other if a.kind == b.kind == "S" and a.itemsize < b.itemsize else self

    def fits(self, other: "ArraySpec") -> bool:
        """Say whether one array can hold the rows of both."""
        return self.shape == other.shape and self.wider(other) == other.wider(self)

    def __str__(self) -> str:
        dtype = np.dtype(self.dtype)
        return f"{'strings' if dtype.kind == 'S' else dtype} {list(self.shape)}"


def _joined_specs(
    known: Mapping[str, ArraySpec], new: Mapping[str, ArraySpec], where: Path
) -> dict[str, ArraySpec]:
    """Return the specs (of a row) that hold the arrays of both; refuse segments that do not fit together."""
    for name in [*known, *new]:
        before, now = known.get(name), new.get(name)
        if before is None or now is None or not before.fits(now):
            raise InputError(
                f"{where} does not fit the segments before it, where {name!r} is {before or 'absent'} a row "
                f"and not {now or 'absent'}: give every slice of rows the same arrays"
            )
    return {name: spec.wider(new[name]) for name, spec in known.items()}


def _as_array(name: str, values: Values) -> np.ndarray:
    """Return what HDF5 can hold with a checksum: numbers as they are, strings as utf-8 of one width."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "biufc":
        return values
    texts = np.array(values, dtype=object)
    if wrong := {type(text).__name__ for text in texts.ravel() if not isinstance(text, str)}:
        raise InputError(
            f"{name!r} holds {min(wrong)}: a store takes numpy arrays of numbers, or lists of str"
        )
    # Lone surrogates come out of real JSON files and have no strict utf-8.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts.ravel()]
    if any(text.endswith(b"\0") for text in encoded):
        raise InputError(f"{name!r} has a string that ends in NUL, which HDF5 strings cannot hold: strip it")
    width = max(map(len, encoded), default=0)
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(width, 1))).reshape(texts.shape)


def _decoded(array: np.ndarray) -> np.ndarray:
    """Undo `_as_array`: strings come back as Python strings in an object array."""
    if array.dtype.kind != "S":
        return array
    texts = [text.decode("utf-8", "surrogatepass") for text in array.ravel()]
    return np.array(texts, dtype=object).reshape(array.shape)


def _check_names(names: Iterable[str]) -> None:
    """Refuse names that are no HDF5 path, or that are at once an array and a group of arrays."""
    names = list(names)
    groups = {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}
    for name in names:
        if not name or {"", "."} & set(name.split("/")) or name in groups or names.count(name) > 1:
            raise InputError(
                f"{name!r} cannot name an array of a store: give each a path of its own, like 'rows/id'"
            )


# --- one file: a header of attributes, and arrays


@dataclass(frozen=True)
class Header:
    """What one file holds. `segments` is empty for a file that holds its rows itself."""

    kind: str
    rows: int
    start: int
    stop: int
    settings: dict[str, Any]
    arrays: dict[str, ArraySpec]
    fixed: dict[str, ArraySpec] = field(default_factory=dict)
    segments: tuple[Span, ...] = ()


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _put_header(file: h5py.File, header: Header) -> None:
    manifest = {"format": FORMAT, **vars(header)}
    settings = json.dumps(manifest.pop("settings"))
    text = json.dumps(manifest, default=vars)
    # HDF5 checksums its metadata and our arrays, but not the heap where long attributes lie.
    file.attrs.update(settings=settings, manifest=text, checksum=_digest(settings, text))


def _get_header(file: h5py.File) -> Header:
    if "manifest" not in file.attrs:
        raise InputError(f"{file.filename} was not written by gradfn: give the run directory or its .h5 file")
    settings, text = (str(file.attrs[name]) for name in ("settings", "manifest"))
    if file.attrs["checksum"] != _digest(settings, text):
        raise ValueError("checksum of the settings")
    manifest = json.loads(text)
    if (made := manifest.pop("format")) != FORMAT:
        raise InputError(
            f"{file.filename} has format {made} and this gradfn reads {FORMAT}: use the gradfn that made it"
        )
    for group in ("arrays", "fixed"):
        manifest[group] = {
            name: ArraySpec(spec["dtype"], tuple(spec["shape"])) for name, spec in manifest[group].items()
        }
    manifest["segments"] = tuple((start, stop) for start, stop in manifest["segments"])
    return Header(settings=json.loads(settings), **manifest)


def _chunks(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the shape of a chunk of about `CHUNK_BYTES`: whole rows, or parts of a row that is larger."""
    budget, chunk = max(1, CHUNK_BYTES // itemsize), []
    for size in reversed(shape):
        chunk.append(max(1, min(size, budget)))
        budget //= chunk[-1]
    return tuple(reversed(chunk))


def _new_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    if 0 in shape:
        return file.create_dataset(name, shape, dtype)
    # Strings of one width are mostly padding, which compression takes back.
    gzip = 1 if dtype.kind == "S" else None
    chunks = _chunks(shape, dtype.itemsize)
    return file.create_dataset(name, shape, dtype, chunks=chunks, compression=gzip, fletcher32=True)


def _put(file: h5py.File, name: str, array: np.ndarray) -> None:
    # A scalar is stored as one element, because HDF5 does not checksum scalars.
    array = np.atleast_1d(array)
    dataset = _new_dataset(file, name, array.shape, array.dtype)
    if array.size:
        dataset[...] = array


def _put_all(file: h5py.File, header: Header, arrays: Mapping[str, np.ndarray]) -> None:
    _put_header(file, header)
    for name, array in arrays.items():
        _put(file, name, array)


class _Sink(io.FileIO):
    """A file that notes a failed write instead of raising it.

    HDF5 cannot close a file that it failed to write: it keeps the file open and crashes the process at exit.
    """

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data)
        try:
            while self.error is None and len(rest):
                rest = rest[super().write(rest) :]
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
    with _Sink(path, "w+") as sink:
        try:
            with h5py.File(sink, "w", libver=LIBVER) as file:
                fill(file)
        finally:
            if sink.error is not None:
                raise sink.error
        os.fsync(sink.fileno())


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing `path` into one sentence."""
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


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot, and order their renames by themselves
            os.fsync(handle)
    finally:
        os.close(handle)


def _create(path: Path, fill: Callable[[h5py.File], None]) -> None:
    """Make a file that appears as `path` complete and on disk, or not at all."""
    partial = path.with_name(f".{path.name}.tmp")
    try:
        # Ctrl-C inside a write of HDF5 would end like a failed one; only the main thread is ever interrupted.
        with _disk_errors(path), ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(_write_file, partial, fill).result()
            os.replace(partial, path)
            _sync_directory(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


DAMAGE = {
    "truncated file": "it was cut short",
    "checksum": "a checksum does not match",
    "filter returned failure": "a checksum does not match",
    "signature not found": "it is not an HDF5 file",
}


def _unreadable(path: Path, error: Exception) -> Exception:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} is missing: run the same command again, which recomputes only it")
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(
            f"cannot read {path} ({os.strerror(error.errno)}): make it readable and try again"
        )
    text = str(error).lower()
    reason = next((words for sign, words in DAMAGE.items() if sign in text), "its content makes no sense")
    return InputError(
        f"{path} is damaged ({reason}): delete it and run the same command again, which recomputes only it"
    )


@contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    """Yield a complete file to read from; whatever HDF5 says about it becomes one sentence."""
    try:
        # Complete files do not change, and HDF5's own locks fail on some network file systems.
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except (InputError, StorageError):
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_header(path: Path) -> Header:
    with _reading(path) as file:
        return _get_header(file)


# --- a run directory


def _segment_name(kind: str, start: int, stop: int) -> str:
    return f"segments/{kind}-{start:010d}-{stop:010d}.h5"


def _segments(run: Path, kind: str) -> list[Path]:
    pattern = re.compile(rf"{kind}-\d{{10,}}-\d{{10,}}\.h5")
    return sorted(path for path in (run / "segments").glob("*.h5") if pattern.fullmatch(path.name))


def _uncovered(start: int, stop: int, done: Iterable[Span]) -> Iterator[Span]:
    """Yield the parts of rows `start` to `stop` that `done` (sorted, disjoint) leaves open."""
    for first, last in done:
        if first >= stop:
            break
        if first > start:
            yield start, first
        start = max(start, last)
    if start < stop:
        yield start, stop


def _remove_leftovers(run: Path, kind: str) -> None:
    for path in [*(run / "segments").glob(f".{kind}-*.h5.tmp"), run / f".{kind}.h5.tmp"]:
        path.unlink(missing_ok=True)


def _remove_all(run: Path, kind: str) -> None:
    """Remove what a run of this kind wrote; the index first, so that it never joins what is gone."""
    for path in [run / f"{kind}.h5", *_segments(run, kind)]:
        path.unlink(missing_ok=True)


def remove_kind(run: str | Path, kind: str) -> None:
    """Remove all that a run directory has of one kind, if it has any.

    Raises:
        InputError: it is being written.
        StorageError: the disk failed.

    >>> import tempfile
    >>> run = tempfile.mkdtemp()
    >>> with open_writer(run, "store", {}, rows=1) as writer:
    ...     writer.write(0, 1, {"loss": np.zeros(1)})
    >>> remove_kind(run, "store")
    >>> [path.name for path in Path(run).iterdir()], [*Path(run, "segments").iterdir()]
    (['segments'], [])
    """
    run, lock = Path(run), Path(run) / f".{kind}.lock"
    if not (lock.exists() or (run / f"{kind}.h5").exists() or _segments(run, kind)):
        return
    with _locked(run, kind), _disk_errors(run):
        _remove_leftovers(run, kind)
        _remove_all(run, kind)
        lock.unlink()


@contextmanager
def _locked(run: Path, kind: str) -> Iterator[None]:
    """Hold the only right to write this kind; the system takes it back when the process dies."""
    with _disk_errors(run):
        handle = os.open(run / f".{kind}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"another run is writing the {kind} of {run}: wait for it to end, or write to another directory"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{run} cannot be locked ({error.strerror}): write to it from one process only", stacklevel=4
        )
    try:
        yield
    finally:
        os.close(handle)


# --- writing


class Writer:
    """Writes the rows of one kind to a run directory, slice by slice in any order; see `open_writer`.

    Attributes:
        done: the `(start, stop)` of the rows that are complete, sorted.
        complete: whether the index is there and joins all rows, so that nothing is left to do.
    """

    def __init__(self, run: Path, kind: str, settings: dict[str, Any], rows: int, part: Span | None = None):
        self.run = run
        self.index = run / f"{kind}.h5"
        self._span = (0, rows) if part is None else part
        self._joins = part is None
        self._header = Header(kind, rows, *self._span, settings, arrays={})
        self.done: list[Span] = []
        for path in _segments(run, kind):
            self._adopt(path)
        self.complete = self._is_complete()
        if self.complete:
            self.done = [self._span]

    def _adopt(self, path: Path) -> None:
        """Take a segment of an earlier run for done, if it is one of this run."""
        there = _read_header(path)
        _refuse_other_settings(self.run, there, self._header)
        if path != self.run / _segment_name(there.kind, there.start, there.stop):
            raise InputError(
                f"{path} holds rows {there.start} to {there.stop}: name it after them, or delete it"
            )
        if not self._span[0] <= there.start < there.stop <= self._span[1]:
            raise InputError(
                f"{path} is not of rows {self._span[0]} to {self._span[1]}, which are this part's: add "
                "--overwrite to write them anew"
            )
        if not self._is_open(there.start, there.stop):
            raise InputError(f"{path} overlaps the segment before it: delete one of them and run again")
        self._add(path, there)

    def _add(self, path: Path, header: Header) -> None:
        self._header = replace(self._header, arrays=self._join(path, header.arrays))
        self.done = sorted([*self.done, (header.start, header.stop)])

    def _join(self, path: Path, arrays: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
        return _joined_specs(self._header.arrays, arrays, path) if self.done else arrays

    def _is_complete(self) -> bool:
        if not self.index.exists():
            return False
        there = _read_header(self.index)
        _refuse_other_settings(self.run, there, self._header)
        if (there.start, there.stop) != self._span:
            raise InputError(
                f"{self.index} is of rows {there.start} to {there.stop}, not {self._span[0]} to "
                f"{self._span[1]}: add --overwrite to replace it"
            )
        return set(there.segments) <= set(self.done)

    def _is_open(self, start: int, stop: int) -> bool:
        return self.missing([(start, stop)]) == [(start, stop)]

    def _check_span(self, start: int, stop: int) -> None:
        first, last = self._span
        if not first <= start < stop <= last:
            these = f"the {last} rows" if self._joins else f"rows {first} to {last}"
            raise InputError(f"rows {start} to {stop} are no slice of {these} of {self.run}")
        if not self._is_open(start, stop):
            raise InputError(
                f"rows {start} to {stop} overlap rows that {self.run} has: write only what missing() returns"
            )

    def check_names(self, names: Mapping[str, Sequence[str]]) -> None:
        """Refuse rows (or what else has names) that are there under other names; see `open_writer`."""
        if not self.done:
            return
        whole = _read_header(self.index) if self.complete else self._header
        there = Store(self.index, whole if self.complete else replace(whole, segments=tuple(self.done)))
        for name, wanted in names.items():
            if name in whole.arrays:
                for start, stop in self.done:
                    self._refuse_others(name, there.read(name, start, stop), wanted[start:stop], start)
            elif name in whole.fixed:
                self._refuse_others(name, there.fixed(name), wanted)

    def _refuse_others(self, name: str, found: Iterable[str], wanted: Sequence[str], first: int = 0) -> None:
        for row, (a, b) in enumerate(zip_longest(found, wanted, fillvalue=MISSING), first):
            if a != b:
                raise InputError(
                    f"{self.run} was made with other names ({name} {row} is {_shown(a)} there and "
                    f"{_shown(b)} here): add --overwrite to replace it, or write to another directory"
                )

    def missing(self, slices: Iterable[Span]) -> list[Span]:
        """Return the parts of the slices of rows that no complete segment covers.

        >>> import tempfile
        >>> with open_writer(tempfile.mkdtemp(), "store", {}, rows=10) as writer:
        ...     writer.write(2, 5, {"scores": np.zeros(3)})
        ...     writer.missing([(0, 4), (4, 8), (8, 10)])
        [(0, 2), (5, 8), (8, 10)]
        """
        return [gap for start, stop in slices for gap in _uncovered(start, stop, self.done)]

    def write(self, start: int, stop: int, arrays: Mapping[str, Values]) -> None:
        """Write rows `start` to `stop` as one segment, which is on disk when this returns.

        Args:
            start: the first row.
            stop: the row after the last.
            arrays: by name, `[stop - start, ...]` numbers, or as many strings.

        Raises:
            InputError: the rows were written before, or the arrays do not fit them or the other segments.
            StorageError: the disk is full or failed; the segments before are kept.
        """
        self._check_span(start, stop)
        _check_names(arrays)
        stored = {name: _as_array(name, values) for name, values in arrays.items()}
        for name, array in stored.items():
            if array.shape[:1] != (stop - start,):
                shape = list(array.shape)
                raise InputError(
                    f"{name!r} has shape {shape}, expected {stop - start} rows ({start} to {stop})"
                )
        specs = {name: ArraySpec(array.dtype.str, array.shape[1:]) for name, array in stored.items()}
        path = self.run / _segment_name(self._header.kind, start, stop)
        self._join(path, specs)
        header = replace(self._header, start=start, stop=stop, arrays=specs)
        _create(path, lambda file: _put_all(file, header, stored))
        self._add(path, header)

    def take(self, path: Path) -> None:
        """Take over a complete segment that lies elsewhere: by a hard link, or a copy where there is none.

        Raises:
            InputError: it was made with other settings, overlaps rows that are there, or is damaged.
            StorageError: the disk is full or failed; the segments before are kept.
        """
        there = _read_header(path)
        _refuse_other_settings(path, there, self._header)
        self._check_span(there.start, there.stop)
        arrays = self._join(path, there.arrays)
        _link_or_copy(path, self.run / _segment_name(there.kind, there.start, there.stop))
        self._header = replace(self._header, arrays=arrays)
        self.done = sorted([*self.done, (there.start, there.stop)])

    def finish(self, fixed: Mapping[str, Values] | None = None) -> Path:
        """Write the index, which joins all rows, and return its path; of a part, what says it is complete.

        Args:
            fixed: arrays without a row dimension, such as the texts of the queries.

        Raises:
            InputError: rows are missing, or a segment is damaged.
            StorageError: the disk is full or failed; the segments are kept.
        """
        if self.complete:
            return self.index
        self._check_all_done()
        stored = {name: _as_array(name, values) for name, values in (fixed or {}).items()}
        _check_names([*self._header.arrays, *stored])
        specs = {name: ArraySpec(array.dtype.str, array.shape) for name, array in stored.items()}
        header = replace(self._header, fixed=specs, segments=tuple(self.done))
        join = (_copied if header.kind in COPIED_KINDS else _linked) if self._joins else _told
        _create(self.index, lambda file: join(file, Store(self.index, header), stored))
        self.complete = True
        return self.index

    def _check_all_done(self) -> None:
        gaps = self.missing([self._span])
        if gaps:
            lacking = sum(stop - start for start, stop in gaps)
            raise InputError(
                f"{self.run} lacks {lacking} of its {self._span[1] - self._span[0]} rows, the first of them "
                f"row {gaps[0][0]}: write them before the index"
            )


def _link_or_copy(path: Path, target: Path) -> None:
    """Make a complete file appear under another name too; where no hard link can be, as a copy."""
    partial = target.with_name(f".{target.name}.tmp")
    try:
        with _disk_errors(target):
            partial.unlink(missing_ok=True)
            try:
                os.link(path, partial)
            except OSError:
                shutil.copyfile(path, partial)
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(partial, target)
            _sync_directory(target.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _told(file: h5py.File, joined: "Store", fixed: Mapping[str, np.ndarray]) -> None:
    """Write what says that a part is complete, and which segments hold it."""
    _put_all(file, joined.header, fixed)


def _linked(file: h5py.File, joined: "Store", fixed: Mapping[str, np.ndarray]) -> None:
    """Join the segments by virtual datasets, so that any HDF5 tool reads the index as one file."""
    header = joined.header
    _put_all(file, header, fixed)
    for name, spec in header.arrays.items():
        shape, dtype = joined.shape(name), spec.stored_dtype
        if 0 in shape:
            _new_dataset(file, name, shape, dtype)
            continue
        layout = h5py.VirtualLayout(shape, dtype)
        for start, stop in header.segments:
            source = _segment_name(header.kind, start, stop)
            layout[start:stop] = h5py.VirtualSource(source, name, (stop - start, *spec.shape), dtype)
        file.create_virtual_dataset(name, layout, fillvalue=np.nan if dtype.kind == "f" else None)


def _copied(file: h5py.File, joined: "Store", fixed: Mapping[str, np.ndarray]) -> None:
    """Copy the segments, a bounded part at a time, so that the index can go where they do not."""
    _put_all(file, replace(joined.header, segments=()), fixed)
    for name, spec in joined.header.arrays.items():
        dataset = _new_dataset(file, name, joined.shape(name), spec.stored_dtype)
        row_bytes = max(1, spec.stored_dtype.itemsize * int(np.prod(spec.shape)))
        whole = dataset.chunks[0] if dataset.chunks else 1
        step = whole * max(1, COPY_BYTES // (row_bytes * whole))
        for start, stop in _steps(joined.rows, step):
            dataset[start:stop] = joined._stored([name], start, stop)[name]


def _steps(rows: int, step: int) -> Iterator[Span]:
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def _checked_target(run: Path, kind: str, rows: int) -> None:
    if not re.fullmatch("[a-z_]+", kind):
        raise InputError(f"a kind of store is a lower-case word, got {kind!r}")
    if rows < 1:
        raise InputError(f"a store needs at least one row, got {rows}: the dataset is empty")
    if run.exists() and not run.is_dir():
        raise InputError(f"{run} is a file, expected the directory of a run: give another path")


@contextmanager
def open_writer(
    run: str | Path,
    kind: str,
    settings: Mapping[str, Any],
    rows: int,
    overwrite: Overwrite = False,
    *,
    part: Span | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Writer]:
    """Open a run directory to write `rows` rows of one kind, or to resume doing so.

    The segments that are there count as done if their settings and rows are the same. One process at a time.

    Args:
        run: the directory, made if absent.
        kind: "store" (the index links to the segments), "scores" (it holds a copy), or another word (links).
        settings: all that the rows depend on, as plain JSON values; stored in every file.
        rows: how many rows there will be.
        overwrite: remove the segments and the index of this kind first, and nothing else; "unlike": only
            where they cannot be resumed.
        part: `(start, stop)` of the rows that this directory holds, for `open_part`; None: all of them.
        names: arrays of strings that no setting tells, of all rows or without a row dimension: those that are
            there must be the same.

    Raises:
        InputError: what is there was made with other settings or names, is damaged, or is being written.
        StorageError: the directory cannot be written.

    >>> import tempfile
    >>> run = tempfile.mkdtemp()
    >>> with open_writer(run, "store", {"dim": 2}, rows=3) as writer:
    ...     for start, stop in writer.missing([(0, 2), (2, 3)]):
    ...         writer.write(start, stop, {"gradients/layer": np.ones((stop - start, 2))})
    ...     writer.finish().name
    'store.h5'
    >>> with open_store(run) as store:
    ...     store.read("gradients/layer").shape
    (3, 2)
    """
    run, rows = Path(run), operator.index(rows)
    settings = _canonical(settings)
    _checked_target(run, kind, rows)
    with _disk_errors(run):
        (run / "segments").mkdir(parents=True, exist_ok=True)
        _sync_directory(run)
    with _locked(run, kind):
        with _disk_errors(run):
            _remove_leftovers(run, kind)
            if overwrite is True:
                _remove_all(run, kind)
        try:
            writer = Writer(run, kind, settings, rows, part)
            writer.check_names(names or {})
        except InputError:
            if overwrite != "unlike":
                raise
            with _disk_errors(run):
                _remove_all(run, kind)
            writer = Writer(run, kind, settings, rows, part)
        yield writer


# --- reading


@dataclass(frozen=True)
class Store:
    """Reads what a run wrote; see `open_store`.

    It keeps no file open, so it can be pickled and used after a fork. It reads the segments themselves: a
    virtual dataset silently gives fill values for a segment that it cannot open.
    """

    path: Path
    header: Header = field(repr=False)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def settings(self) -> dict[str, Any]:
        """What the rows depend on, as given to `open_writer`."""
        return self.header.settings

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.header.rows

    @property
    def span(self) -> Span:
        """The first of the rows that are here and the one after the last: all of them, or a part's."""
        return self.header.start, self.header.stop

    def files(self) -> list[Path]:
        """Return the files that hold the rows."""
        return [path for path, _, _ in self._pieces(*self.span)]

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the arrays of rows, in the order written, below a prefix like "gradients"."""
        group = prefix.rstrip("/") + "/"
        return [name for name in self.header.arrays if not prefix or name == prefix or name.startswith(group)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of an array, rows first."""
        return (self.rows, *self._look_up(name, self.header.arrays).shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows `start` to `stop` of an array; strings come as an object array of `str`.

        Raises:
            InputError: there is no such array, or a segment is damaged or gone.
        """
        return self.read_all([name], start, stop)[name]

    def read_all(
        self, names: Sequence[str], start: int = 0, stop: int | None = None
    ) -> dict[str, np.ndarray]:
        """Return rows `start` to `stop` of several arrays by name; see `read`. Each file is opened once."""
        first, last, _ = slice(start, stop).indices(self.rows)
        arrays = self._stored(names, first, max(first, last))
        return {name: _decoded(array) for name, array in arrays.items()}

    def chunks(
        self, names: Sequence[str], rows_per_chunk: int
    ) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """Yield `(start, stop, {name: rows start to stop})` from the first row to the last."""
        if rows_per_chunk < 1:
            raise InputError(f"rows_per_chunk must be at least 1, got {rows_per_chunk}")
        for start, stop in _steps(self.rows, rows_per_chunk):
            arrays = self._stored(names, start, stop)
            yield start, stop, {name: _decoded(array) for name, array in arrays.items()}

    def fixed(self, name: str) -> np.ndarray:
        """Return an array without a row dimension; strings come as an object array of `str`."""
        spec = self._look_up(name, self.header.fixed)
        with _reading(self.path) as file:
            return _decoded(_dataset(file, name)[...].reshape(spec.shape))

    def verify(self) -> None:
        """Refuse a store of which a segment is gone, unreadable or another run's."""
        for piece in self._pieces(*self.span):
            with self._piece(*piece):
                pass

    def _look_up(self, name: str, specs: Mapping[str, ArraySpec]) -> ArraySpec:
        if name not in specs:
            held = ", ".join([*specs][:8]) + (f" and {len(specs) - 8} more" if len(specs) > 8 else "")
            raise InputError(f"{self.path} has no array {name!r}: choose from {held or 'none'}")
        return specs[name]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Path, int, int]]:
        """Yield the files that hold rows `start` to `stop`, with the first and last row of each."""
        if not self.header.segments:
            yield self.path, 0, self.rows
        for first, last in self.header.segments:
            if first < stop and start < last:
                yield self.path.parent / _segment_name(self.header.kind, first, last), first, last

    @contextmanager
    def _piece(self, path: Path, start: int, stop: int) -> Iterator[h5py.File]:
        with _reading(path) as file:
            there = _get_header(file)
            span = (there.kind, there.rows, there.start, there.stop)
            if span != (self.header.kind, self.rows, start, stop) or differing(there.settings, self.settings):
                raise InputError(f"{path} is not the file that {self.path} joins: run their command again")
            yield file

    def _stored(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Return rows as they lie in the files, opening each file once for all names."""
        if start < stop and not self.span[0] <= start < stop <= self.span[1]:
            raise InputError(f"{self.path} is a part, without rows {start} to {stop}: join the parts first")
        specs = {name: self._look_up(name, self.header.arrays) for name in names}
        out = {name: np.empty((stop - start, *spec.shape), spec.stored_dtype) for name, spec in specs.items()}
        for path, first, last in self._pieces(start, stop):
            begin, end = max(start, first), min(stop, last)
            with self._piece(path, first, last) as file:
                for name, rows in out.items():
                    dataset = _dataset(file, name, (last - first, *rows.shape[1:]))
                    rows[begin - start : end - start] = dataset[begin - first : end - first]
        return out


def _dataset(file: h5py.File, name: str, shape: tuple[int, ...] | None = None) -> h5py.Dataset:
    dataset = file[name]
    # Slicing past the end would silently give fewer rows.
    if not isinstance(dataset, h5py.Dataset) or shape not in (None, dataset.shape):
        raise ValueError(f"{name} is not what the header says")
    return dataset


def index_path(run: str | Path, kind: str = "store") -> Path:
    """Where the index of a run lies, given its directory or the .h5 file itself.

    >>> index_path("runs/facts.h5").as_posix()
    'runs/facts.h5'
    """
    return Path(run) / f"{kind}.h5" if Path(run).is_dir() else Path(run)


def open_store(run: str | Path, kind: str = "store") -> Store:
    """Open what a run wrote, after checking that every segment is there and readable.

    Args:
        run: the run directory, or the .h5 file of an index.
        kind: which index of the directory.

    Raises:
        InputError: the run is absent or unfinished, or a segment is missing or damaged.
    """
    run, path = Path(run), index_path(run, kind)
    if not path.exists():
        raise InputError(_why_absent(run, kind))
    if run.is_file() and not h5py.is_hdf5(run):
        raise InputError(f"{run} is no HDF5 file: give the directory of a run, or its {kind}.h5")
    path = path.resolve()  # segments lie beside the file itself, not beside a link to it
    store = Store(path, _read_header(path))
    if store.span != (0, store.rows):
        what = "part" if store.header.segments else "segment"
        raise InputError(f"{path} is one {what} of a run: open the run directory, {_whole_run(path)}")
    store.verify()
    return store


def open_part(run: str | Path, kind: str) -> Store:
    """Open what a run wrote that has a part of the rows; `read` takes the numbers they have among all rows.

    Raises:
        InputError: the run is absent or unfinished, or a segment is missing or damaged.

    >>> import tempfile
    >>> run = tempfile.mkdtemp()
    >>> with open_writer(run, "store", {}, rows=10, part=(4, 6)) as writer:
    ...     writer.write(4, 6, {"loss": np.array([0.5, 0.25])})
    ...     _ = writer.finish()
    >>> open_part(run, "store").read("loss", 5, 6)
    array([0.25])
    """
    run = Path(run)
    path = (run / f"{kind}.h5").resolve()
    if not path.exists():
        raise InputError(_why_absent(run, kind))
    store = Store(path, _read_header(path))
    store.verify()
    return store


def _whole_run(path: Path) -> Path:
    """The run directory that a segment, or the index of a part, belongs to."""
    own = path.parent.parent if path.parent.name == "segments" else path.parent
    return own.parent.parent if own.parent.name == "shards" else own


def _why_absent(run: Path, kind: str) -> str:
    if not run.exists():
        return f"{run} does not exist: give the directory of a run, or its {kind}.h5"
    parts = (kind, "sums") if kind == "hessian" else (kind,)
    if any(any(run.glob(f"shards/*/{part}.h5")) for part in parts):
        return f"the {kind} of {run} lies in shards: join them with gradfn merge {run}"
    if _segments(run, kind):
        return f"the {kind} of {run} is unfinished: run the command that makes it again, which resumes"
    return f"{run} has no {kind}.h5: give the directory of a run that wrote one"
