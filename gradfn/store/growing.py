"""Writing rows of which it is known at the end alone how many there are, such as those of a training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from gradfn.errors import InputError
from gradfn.store.arrays import Values
from gradfn.store.compare import canonical
from gradfn.store.directory import (
    check_place,
    opened,
    refuse_linked,
    remove_all,
    remove_leftovers,
    segment_name,
    segments_of,
)
from gradfn.store.file import OPEN, disk_errors, read_header
from gradfn.store.reader import Store
from gradfn.store.writer import Writer


class GrowingWriter(Writer):
    """Appends rows to a run directory; see `open_growing`."""

    def __init__(self, run: Path, kind: str, settings: dict[str, Any], request: dict[str, Any]):
        super().__init__(run, kind, settings, OPEN, None, request)

    @property
    def rows(self) -> int:
        """How many rows are on disk."""
        return self.done[-1][1] if self.done else 0

    def _is_complete(self) -> bool:
        return False  # rows may always follow

    def append(self, arrays: Mapping[str, Values]) -> None:
        """Write the rows after the last as one segment, which is on disk when this returns; see `write`."""
        self.write(self.rows, self.rows + len(next(iter(arrays.values()))), arrays)

    def written(self) -> Store:
        """What is on disk so far, to be read."""
        count = self.rows
        return Store(self.index, replace(self._header, rows=count, stop=count, segments=tuple(self.done)))

    def cut(self, rows: int) -> None:
        """Remove the rows from `rows` on; of a segment that has some before it, these stay."""
        store = self.written()
        with disk_errors(self.run):
            self.index.unlink(missing_ok=True)  # it joins what is gone
        for start, stop in reversed(self.done[:]):
            if stop <= rows:
                break
            self.done.remove((start, stop))
            if start < rows:  # the shorter one first, so that a run that is killed here keeps it
                self.write(start, rows, store.read_all(store.names(), start, rows))
            with disk_errors(self.run):
                (self.run / segment_name(self._header.kind, start, stop)).unlink()
        self._adopted = segments_of(self.run, self._header.kind)

    def finish(self, index_arrays: Mapping[str, Values] | None = None) -> Path:
        """Write the index, which joins the rows so far; see `Writer.finish`. Rows may follow all the same."""
        if not self.done:
            raise InputError(f"{self.run} has no rows, so it has nothing to index: write some first")
        open_ended = self._header, self._span
        self._span = 0, self.rows
        self._header = replace(self._header, rows=self.rows, stop=self.rows)
        try:
            return super().finish(index_arrays)
        finally:
            (self._header, self._span), self.complete = open_ended, False


@contextmanager
def open_growing(
    run: str | Path,
    kind: str,
    settings: Mapping[str, Any],
    overwrite: bool = False,
    request: Mapping[str, Any] | None = None,
) -> Iterator[GrowingWriter]:
    """Open a run directory to append rows; those that are there stay. One process at a time.

    Args:
        run, kind, settings, overwrite, request: see `open_writer`.

    Raises:
        InputError: what is there was made with other settings, is damaged, or is being written.
        StorageError: the directory cannot be written.

    >>> import tempfile
    >>> import numpy as np
    >>> from gradfn.store import open_store
    >>> run = tempfile.mkdtemp()
    >>> with open_growing(run, "store", {}) as writer:
    ...     writer.append({"loss": np.array([3.0, 2.0])})
    ...     writer.append({"loss": np.array([1.0])})
    ...     writer.cut(1)
    ...     _ = writer.finish()
    >>> open_store(run).read("loss")
    array([3.])
    """
    run = Path(run)
    check_place(run)
    refuse_linked(run, kind)
    with opened(run, kind):
        with disk_errors(run):
            remove_leftovers(run, kind)
            if overwrite:
                remove_all(run, kind)
            _remove_longer(run, kind)
        yield GrowingWriter(run, kind, canonical(settings), canonical(request or {}))


def _remove_longer(run: Path, kind: str) -> None:
    """Remove a segment of which `cut` had kept the first rows when the run was killed."""
    paths = segments_of(run, kind)
    for short, long in pairwise(paths):
        a, b = read_header(short), read_header(long)
        if a.rows == OPEN and a.start == b.start:
            long.unlink()
