"""Reading what a run wrote: the segments themselves, each checked against the index that joins them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gradfn.errors import InputError, LostFileError, StorageError
from gradfn.store.arrays import ArraySpec, decoded
from gradfn.store.columns import Column, column_of
from gradfn.store.compare import differing
from gradfn.store.directory import files_of, index_path, segment_name, segments_of
from gradfn.store.file import OPEN, Header, Span, get_header, place_of, read_header, reading
from gradfn.store.guard import refuse_links

Opened = dict[Path, dict[str, Column]]
"""The arrays of files by name."""


def steps(rows: int, step: int) -> Iterator[Span]:
    """Yield `(start, stop)` of `step` rows each, the last of what is left.

    >>> list(steps(5, 2))
    [(0, 2), (2, 4), (4, 5)]
    """
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


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
    def request(self) -> dict[str, Any]:
        """What was asked for, as given to `open_writer`."""
        return self.header.request

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.header.rows

    @property
    def span(self) -> Span:
        """The first row that is here, and the row after the last: all rows, or those of a part."""
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
        return {name: decoded(array) for name, array in arrays.items()}

    def chunks(
        self, names: Sequence[str], rows_per_chunk: int
    ) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """Yield `(start, stop, {name: rows start to stop})` from the first row to the last."""
        if rows_per_chunk < 1:
            raise InputError(f"rows_per_chunk must be at least 1, got {rows_per_chunk}")
        opened: Opened = {}
        for start, stop in steps(self.rows, rows_per_chunk):
            arrays = _joined(self._parts(names, start, stop, opened))
            yield start, stop, {name: decoded(array) for name, array in arrays.items()}

    def parts(self, names: Sequence[str], most: int) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
        """Yield as `chunks` at most so many rows, which lie in one file. Numbers are not copied."""
        opened: Opened = {}
        for _, first, last in self._pieces(*self.span):
            for start, stop in steps(last - first, most):
                (arrays,) = self._parts(names, first + start, first + stop, opened)
                yield first + start, first + stop, {name: decoded(array) for name, array in arrays.items()}

    def index_array(self, name: str) -> np.ndarray:
        """Return an array of the index, without a row dimension; strings come as objects of `str`."""
        spec = self._look_up(name, self.header.index_arrays)
        with reading(self.path) as file:
            column = column_of(file, self.path, self.header, name, spec)
        rows = column.rows(0, (spec.shape or (1,))[0])
        return decoded(np.array(rows).reshape(spec.shape))

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
                yield self.path.parent / segment_name(self.header.kind, first, last), first, last

    @contextmanager
    def _piece(self, path: Path, start: int, stop: int) -> Iterator[tuple[h5py.File, Header]]:
        if path != self.path:
            refuse_links(path.parent, path)
        with reading(path) as file:
            there = get_header(file)
            span = (there.kind, there.start, there.stop)
            known = there.rows in (self.rows, OPEN) and span == (self.header.kind, start, stop)
            if not known or differing(there.settings, self.settings):
                raise LostFileError(
                    f"{path} is not the file that {self.path} joins: run the command that made it again", path
                )
            yield file, there

    def _stored(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """Return rows as they lie in the files, copied; each file is opened once for all names."""
        specs = {name: self._look_up(name, self.header.arrays) for name in names}
        nothing = {name: np.empty((0, *spec.shape), spec.stored_dtype) for name, spec in specs.items()}
        return _joined([nothing, *self._parts(names, start, stop, {})])

    def _parts(
        self, names: Sequence[str], start: int, stop: int, opened: Opened
    ) -> list[dict[str, np.ndarray]]:
        """Return what each file has of some rows.

        Args:
            opened: the file that was read last.
        """
        if start < stop and not self.span[0] <= start < stop <= self.span[1]:
            raise InputError(f"{self.path} is a part, without rows {start} to {stop}: join the parts first")
        parts = []
        for path, first, last in self._pieces(start, stop):
            if path not in opened:
                opened.clear()
                opened[path] = self._columns(names, path, first, last)
            begin, end = max(start, first) - first, min(stop, last) - first
            parts.append({name: column.rows(begin, end) for name, column in opened[path].items()})
        return parts

    def _columns(self, names: Sequence[str], path: Path, first: int, last: int) -> dict[str, Column]:
        """Return the arrays of one file."""
        specs, columns = {name: self._look_up(name, self.header.arrays) for name in names}, {}
        with self._piece(path, first, last) as (file, there):
            for name, spec in specs.items():
                own = there.arrays[name]
                if own.wider(spec) != spec:
                    raise ValueError(f"{name} is {own} there")
                whole = ArraySpec(own.dtype, (last - first, *own.shape))
                columns[name] = column_of(file, path, there, name, whole)
        return columns


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of several files one after the other: texts as wide as the widest, numbers as they are."""
    dtypes = {name: None if array.dtype.kind == "S" else array.dtype for name, array in parts[0].items()}
    return {name: np.concatenate([part[name] for part in parts], dtype=to) for name, to in dtypes.items()}


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
        raise LostFileError(_why_absent(run, kind), path)
    if run.is_file() and not h5py.is_hdf5(run):
        raise InputError(f"{run} is no HDF5 file: give the directory of a run, or its {kind}.h5")
    if run.is_dir():
        refuse_links(path)
    path = path.resolve()  # segments lie beside the file itself, not beside a link to it
    store = Store(path, read_header(path))
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
    >>> from gradfn.store import open_writer
    >>> run = tempfile.mkdtemp()
    >>> with open_writer(run, "store", {}, rows=10, part=(4, 6)) as writer:
    ...     writer.write(4, 6, {"loss": np.array([0.5, 0.25])})
    ...     _ = writer.finish()
    >>> open_part(run, "store").read("loss", 5, 6)
    array([0.25])
    """
    run, path = Path(run), Path(run) / f"{kind}.h5"
    if not path.exists():
        raise LostFileError(_why_absent(run, kind), path)
    refuse_links(path)
    path = path.resolve()
    store = Store(path, read_header(path))
    store.verify()
    return store


def requests_of(run: str | Path) -> dict[str, dict[str, Any]]:
    """The requests that the files of a run record, complete or not, by the kind of what they hold.

    Args:
        run: the run directory, or an .h5 file.

    Raises:
        InputError: there is no such run, or a file is damaged.

    >>> import tempfile
    >>> from gradfn.store import open_writer
    >>> run = tempfile.mkdtemp()
    >>> with open_writer(run, "store", {}, rows=2, request={"command": "build"}) as writer:
    ...     writer.write(0, 1, {"loss": np.array([0.5])})
    >>> requests_of(run)
    {'store': {'command': 'build'}}
    """
    run = Path(run)
    if not run.exists():
        raise InputError(f"{run} does not exist: give the directory of a run, or an .h5 file in it")
    paths = [run] if run.is_file() else files_of(run)
    refuse_links(*(path for path in (run / "segments", *paths) if path != run))
    headers = [read_header(path) for path in paths]
    return {header.kind: header.request for header in headers if header.request}


def request_beside(path: Path) -> dict[str, Any]:
    """The request that a file records which other files of its kind lie beside, as far as they can be read.

    Args:
        path: of a file that is missing or damaged.
    """
    run, kind = place_of(path)
    for other in files_of(run):
        with suppress(InputError, StorageError):
            if place_of(other)[1] == kind and (request := read_header(other).request):
                return request
    return {}


def _whole_run(path: Path) -> Path:
    """The run directory that a segment, or the index of a part, belongs to."""
    own = path.parent.parent if path.parent.name == "segments" else path.parent
    return own.parent.parent if own.parent.name == "shards" else own


def _why_absent(run: Path, kind: str) -> str:
    if not run.exists():
        return f"{run} does not exist: give the directory of a run, or its {kind}.h5"
    parts = (kind, "sums") if kind == "hessian" else (kind,)
    if any(any(run.glob(f"shards/*/{part}.h5")) for part in parts):
        return f"the {kind} of {run} lies in shards: join them with `merge_run`"
    if segments_of(run, kind):
        return f"the {kind} of {run} is unfinished: run the command that made it again, which resumes"
    return f"{run} has no {kind}.h5: give the directory of a run that wrote one"
