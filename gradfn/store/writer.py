"""Writing the rows of one kind, slice by slice, and the index that joins them."""

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from gradfn.errors import InputError
from gradfn.store.arrays import ArraySpec, Values, as_array, check_array_names, joined_specs
from gradfn.store.compare import MISSING, canonical, differing, in_words, shown
from gradfn.store.directory import (
    check_place,
    opened,
    refuse_linked,
    remove_all,
    remove_leftovers,
    segment_name,
    segments_of,
    uncovered,
)
from gradfn.store.file import (
    RESUMED,
    Header,
    Span,
    Sums,
    create_file,
    disk_errors,
    link_or_copy,
    new_dataset,
    put_all,
    read_header,
)
from gradfn.store.guard import refuse_links
from gradfn.store.reader import Store, steps
from gradfn.store.verify import check_file

COPIED_KINDS = frozenset({"scores", "basis"})
COPY_BYTES = 1 << 26
NOUNS = {"truth": "models", "mask": "blocks", "training": "steps"}
"""What the rows of a kind are, where they are no rows of a dataset."""

Overwrite = bool | Literal["unlike"]
"""Whether to replace what is there: always, never, or where it cannot be resumed."""


class SettingsDiffer(InputError):
    """What is there was made with other settings.

    Args:
        path: what is there.
        there, here: the settings.
        differences: see `differing`.
        more: what else is known of them.
    """

    def __init__(self, path: Path, there: Any, here: Any, differences: Mapping[str, Any], more: str = ""):
        super().__init__(
            f"{path} was made with other settings ({in_words(differences)}{more}): give `overwrite=True` to "
            "replace it, or write to another directory"
        )
        self.path, self.there, self.here, self.differences = path, there, here, differences

    def saying(self, more: str) -> "SettingsDiffer":
        """The same with what else is known of the differences."""
        return SettingsDiffer(self.path, self.there, self.here, self.differences, more)


def _refuse_other_settings(path: Path, there: Header, here: Header) -> None:
    if there.format != here.format and there.format not in RESUMED:
        raise InputError(
            f"{path} was written by an older gradfn, in format {there.format}, which can be read but not "
            f"resumed in format {here.format}: give `overwrite=True` to make it again, or write to another "
            "directory"
        )
    differences = differing(there.settings, here.settings)
    if there.rows != here.rows:
        differences["rows"] = (there.rows, here.rows)
    if differences:
        raise SettingsDiffer(path, there.settings, here.settings, differences)


class Writer:
    """Writes the rows of one kind to a run directory, slice by slice in any order; see `open_writer`.

    Attributes:
        done: the `(start, stop)` of the rows that are complete, sorted.
        complete: whether the index is there and joins all rows, so that nothing is left to do.
    """

    def __init__(
        self,
        run: Path,
        kind: str,
        settings: dict[str, Any],
        rows: int,
        part: Span | None = None,
        request: dict[str, Any] | None = None,
    ):
        self.run = run
        self.index = run / f"{kind}.h5"
        self._span = (0, rows) if part is None else part
        self._joins = part is None
        self._header = Header(kind, rows, *self._span, settings, arrays={}, request=request or {})
        self.done: list[Span] = []
        refuse_linked(run, kind)
        self._adopted = segments_of(run, kind)
        for path in self._adopted:
            self._adopt(path)
        self.complete = self._is_complete()
        if self.complete:
            self.done = [self._span]

    def _adopt(self, path: Path) -> None:
        """Take a segment of an earlier run for done, if it is one of this run."""
        there = read_header(path)
        _refuse_other_settings(self.run, there, self._header)
        if path != self.run / segment_name(there.kind, there.start, there.stop):
            raise InputError(
                f"{path} holds rows {there.start} to {there.stop}: name it after them, or delete it"
            )
        if not self._span[0] <= there.start < there.stop <= self._span[1]:
            raise InputError(
                f"{path} is not of rows {self._span[0]} to {self._span[1]}, which are this part's: give "
                "`overwrite=True` to write them again"
            )
        if not self._is_open(there.start, there.stop):
            raise InputError(f"{path} overlaps the segment before it: delete one of them and run again")
        self._add(path, there)

    def _add(self, path: Path, header: Header) -> None:
        self._header = replace(self._header, arrays=self._join(path, header.arrays))
        self.done = sorted([*self.done, (header.start, header.stop)])

    def _join(self, path: Path, arrays: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
        return joined_specs(self._header.arrays, arrays, path) if self.done else arrays

    def _is_complete(self) -> bool:
        if not self.index.exists():
            return False
        there = read_header(self.index)
        _refuse_other_settings(self.run, there, self._header)
        if (there.start, there.stop) != self._span:
            raise InputError(
                f"{self.index} is of rows {there.start} to {there.stop}, not {self._span[0]} to "
                f"{self._span[1]}: give `overwrite=True` to replace it"
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
        whole = read_header(self.index) if self.complete else self._header
        there = Store(self.index, whole if self.complete else replace(whole, segments=tuple(self.done)))
        for name, wanted in names.items():
            if name in whole.arrays:
                for start, stop in self.done:
                    self._refuse_others(name, there.read(name, start, stop), wanted[start:stop], start)
            elif name in whole.index_arrays:
                self._refuse_others(name, there.index_array(name), wanted)

    def _refuse_others(self, name: str, found: Iterable[str], wanted: Sequence[str], first: int = 0) -> None:
        for row, (a, b) in enumerate(zip_longest(found, wanted, fillvalue=MISSING), first):
            if a != b:
                raise InputError(
                    f"{self.run} was made with other names ({name} {row} is {shown(a)} there and "
                    f"{shown(b)} here): give `overwrite=True` to replace it, or write to another "
                    "directory"
                )

    @property
    def stored(self) -> Store:
        """What is there so far, of which the rows that are `done` can be read."""
        return Store(self.index, replace(self._header, segments=tuple(self.done)))

    @property
    def kept(self) -> str:
        """What a run that is stopped now has, in a sentence."""
        count = sum(stop - start for start, stop in self.done)
        if not count:
            return f"nothing is complete in {self.run}: the same command begins again"
        noun, all_rows = NOUNS.get(self._header.kind, "rows"), self._span[1] - self._span[0]
        return f"{count:,} of {all_rows:,} {noun} are kept in {self.run}: the same command does the others"

    def missing(self, slices: Iterable[Span]) -> list[Span]:
        """Return the parts of the slices of rows that no complete segment covers.

        >>> import tempfile
        >>> with open_writer(tempfile.mkdtemp(), "store", {}, rows=10) as writer:
        ...     writer.write(2, 5, {"scores": np.zeros(3)})
        ...     writer.missing([(0, 4), (4, 8), (8, 10)])
        [(0, 2), (5, 8), (8, 10)]
        """
        return [gap for start, stop in slices for gap in uncovered(start, stop, self.done)]

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
        check_array_names(arrays)
        stored = {name: as_array(name, values) for name, values in arrays.items()}
        for name, array in stored.items():
            if array.shape[:1] != (stop - start,):
                shape = list(array.shape)
                raise InputError(
                    f"{name!r} has shape {shape}, expected {stop - start} rows ({start} to {stop})"
                )
        specs = {name: ArraySpec(array.dtype.str, array.shape[1:]) for name, array in stored.items()}
        path = self.run / segment_name(self._header.kind, start, stop)
        self._join(path, specs)
        header = replace(self._header, start=start, stop=stop, arrays=specs)
        create_file(path, lambda file: put_all(file, header, stored))
        self._add(path, header)

    def take(self, path: Path) -> None:
        """Take over a complete segment that lies elsewhere: by a hard link, or a copy where there is none.

        Raises:
            InputError: it was made with other settings, overlaps rows that are there, or is damaged.
            StorageError: the disk is full or failed; the segments before are kept.
        """
        there = check_file(path)
        _refuse_other_settings(path, there, self._header)
        self._check_span(there.start, there.stop)
        arrays = self._join(path, there.arrays)
        link_or_copy(path, self.run / segment_name(there.kind, there.start, there.stop))
        self._header = replace(self._header, arrays=arrays)
        self.done = sorted([*self.done, (there.start, there.stop)])

    def finish(self, index_arrays: Mapping[str, Values] | None = None) -> Path:
        """Write the index, which joins all rows, and return its path; of a part, what says it is complete.

        Args:
            index_arrays: arrays without a row dimension, such as the texts of the queries.

        Raises:
            InputError: rows are missing, or a segment is damaged.
            StorageError: the disk is full or failed; the segments are kept.
        """
        if self.complete:
            return self.index
        self._check_all_done()
        for path in self._adopted:
            check_file(path)
        stored = {name: as_array(name, values) for name, values in (index_arrays or {}).items()}
        check_array_names([*self._header.arrays, *stored])
        specs = {name: ArraySpec(array.dtype.str, array.shape) for name, array in stored.items()}
        header = replace(self._header, index_arrays=specs, segments=tuple(self.done))
        join = (
            (_copied_index if header.kind in COPIED_KINDS else _linked_index)
            if self._joins
            else _index_of_part
        )
        create_file(self.index, lambda file: join(file, Store(self.index, header), stored))
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


def _index_of_part(file: h5py.File, joined: "Store", index_arrays: Mapping[str, np.ndarray]) -> None:
    """Write the index of a part, which says that it is complete and which segments hold its rows."""
    put_all(file, joined.header, index_arrays)


def _linked_index(file: h5py.File, joined: "Store", index_arrays: Mapping[str, np.ndarray]) -> None:
    """Join the segments by virtual datasets, so that any HDF5 tool reads the index as one file."""
    header = joined.header
    put_all(file, header, index_arrays)
    for name, spec in header.arrays.items():
        shape, dtype = joined.shape(name), spec.stored_dtype
        if 0 in shape:
            new_dataset(file, name, shape, dtype)
            continue
        layout = h5py.VirtualLayout(shape, dtype)
        layout.dcpl.set_obj_track_times(False)  # the same rows are the same bytes
        for start, stop in header.segments:
            source = segment_name(header.kind, start, stop)
            layout[start:stop] = h5py.VirtualSource(source, name, (stop - start, *spec.shape), dtype)
        file.create_virtual_dataset(name, layout, fillvalue=np.nan if dtype.kind == "f" else None)


def _copied_index(file: h5py.File, joined: "Store", index_arrays: Mapping[str, np.ndarray]) -> None:
    """Copy the segments, a bounded part at a time, so that the index can be moved without them."""
    digests = {}
    for name, spec in joined.header.arrays.items():
        dataset, digest = new_dataset(file, name, joined.shape(name), spec.stored_dtype), Sums()
        row_bytes = max(1, spec.stored_dtype.itemsize * int(np.prod(spec.shape)))
        whole = dataset.chunks[0] if dataset.chunks else 1
        step = whole * max(1, COPY_BYTES // (row_bytes * whole))
        for start, stop in steps(joined.rows, step):
            rows = joined._stored([name], start, stop)[name]
            dataset[start:stop] = rows
            digest.update(rows)
        digests[name] = digest.hexdigest()
    put_all(file, replace(joined.header, segments=(), digests=digests), index_arrays)


def _checked_target(run: Path, kind: str, rows: int) -> None:
    if not re.fullmatch("[a-z_]+", kind):
        raise InputError(f"a kind of store is a lower-case word, got {kind!r}")
    if rows < 1:
        raise InputError(f"a store needs at least one row, got {rows}: the dataset is empty")
    check_place(run)


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
    request: Mapping[str, Any] | None = None,
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
        request: what was asked for, such as a command and its options, as plain JSON values: stored in every
            file, and never compared.

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
    >>> from gradfn.store import open_store
    >>> with open_store(run) as store:
    ...     store.read("gradients/layer").shape
    (3, 2)
    """
    run, rows = Path(run), operator.index(rows)
    settings, asked = canonical(settings), canonical(request or {})
    _checked_target(run, kind, rows)
    refuse_linked(run, kind)
    if part is not None:  # RUN/shards/I-of-N
        refuse_links(run.parent, run)
    with opened(run, kind):
        with disk_errors(run):
            remove_leftovers(run, kind)
            if overwrite is True:
                remove_all(run, kind)
        try:
            writer = Writer(run, kind, settings, rows, part, asked)
            writer.check_names(names or {})
        except InputError:
            if overwrite != "unlike":
                raise
            with disk_errors(run):
                remove_all(run, kind)
            writer = Writer(run, kind, settings, rows, part, asked)
        try:
            yield writer
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(writer.kept) from stop
