"""Rows of a training run on disk: one for each visit of an example, in the order of the visits.

| array | of each visit |
|---|---|
| `gradients/...`, `rows/id`, `rows/text`, `rows/length`, `rows/loss`, `rows/zero` | as `build` writes them |
| `visits/row` | the number of the row in the data |
| `visits/epoch`, `visits/step`, `visits/microstep` | when, from 0; at the parameters before the step |
| `visits/factor` | what clipping multiplied the gradient of the step by; rows are not multiplied |
| `visits/skipped` | whether the step was not taken, or the gradient is not finite; the gradient is then 0 |
| `visits/duplicate` | whether the row came earlier in the same epoch |
| `visits/scaled` | whether the gradient was divided by the optimizer's second moment |
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradfn.errors import InputError
from gradfn.runs.provenance import RECORDED, Provenance
from gradfn.runs.rows import SEGMENT_BYTES
from gradfn.runs.shards import present_shards, refuse_unlike, whole_request
from gradfn.store import Store, Values, open_writer
from gradfn.store.growing import GrowingWriter

SEGMENT_STEPS = 64
STEP, MICROSTEP, EPOCH = "visits/step", "visits/microstep", "visits/epoch"
ROW, DUPLICATE = "visits/row", "visits/duplicate"
END = "visits/end"
"""An array of the index that says how the training ended."""

Visits = Mapping[str, Values]
"""The arrays of some visits."""
Seen = tuple[int, frozenset[int]]
"""An epoch, and the rows that were visited in it."""


@dataclass(eq=False)
class VisitLog:
    """Appends visits to a run directory, a segment at a time.

    A segment ends after 64 steps or 256 MiB, and where `flush` is called, such as before a checkpoint. This
    depends on no clock, so that a run that was killed and resumed writes the files that one run would have
    written.
    """

    writer: GrowingWriter
    pending: list[Visits] = field(default_factory=list)
    _seen: Seen = (-1, frozenset())

    def resume(self, step: int, *, again: bool = False) -> None:
        """Remove the visits of step `step` and later ones, which are made again.

        Args:
            step: from 0.
            again: whether visits may be there where the step is 0.

        Raises:
            InputError: the step before is not there, or there are visits and the training is new.
        """
        there = self.writer.rows
        steps = self.writer.written().read(STEP) if there else np.zeros(0, np.int64)
        last = int(steps[-1]) + 1 if there else 0
        if there and not (step or again):
            raise InputError(
                f"{self.writer.run} has the rows of {last} steps, and this training begins at step 0: give "
                "`overwrite=True` to replace them, resume from a checkpoint, or write to another directory"
            )
        if step > last:
            raise InputError(
                f"{self.writer.run} has the rows of the steps before {last}, and this training resumes at "
                f"step {step}: resume from a checkpoint of step {last} or before"
            )
        kept = int(np.searchsorted(steps, step))
        if kept < there:
            self.writer.cut(kept)
        if kept:
            store = self.writer.written()
            epochs, rows = store.read(EPOCH), store.read(ROW)
            epoch = int(epochs[-1])
            self._seen = epoch, frozenset(rows[epochs == epoch].tolist())

    def add(self, visits: Visits) -> None:
        """Take the visits of one step, and write what waits if it is enough for a segment."""
        again, self._seen = duplicates(visits, self._seen)
        self.pending.append({**visits, DUPLICATE: again})
        held = sum(a.nbytes for part in self.pending for a in part.values() if isinstance(a, np.ndarray))
        if len(self.pending) >= SEGMENT_STEPS or held >= SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits, so that it is on disk when this returns."""
        if self.pending:
            self.writer.append(joined(self.pending))
            self.pending = []

    def finish(self, end: str) -> Path | None:
        """Write what waits, and the index, which says how the training ended; None without rows."""
        self.flush()
        return self.writer.finish({END: [end]}) if self.writer.rows else None


def joined(parts: Sequence[Visits]) -> Visits:
    """Visits one after the other.

    >>> joined([{"rows/id": ["a"]}, {"rows/id": ["b"]}])
    {'rows/id': ['a', 'b']}
    """
    first = parts[0]
    return {
        name: np.concatenate([np.asarray(part[name]) for part in parts])
        if isinstance(values, np.ndarray)
        else [text for part in parts for text in part[name]]
        for name, values in first.items()
    }


def duplicates(visits: Visits, seen: Seen = (-1, frozenset())) -> tuple[np.ndarray, Seen]:
    """Which visits are of a row that was visited before in the same epoch, and what has been visited then.

    >>> duplicates({ROW: np.array([1, 2, 1, 1]), EPOCH: np.array([0, 0, 0, 1])})
    (array([False, False,  True, False]), (1, frozenset({1})))
    """
    (epoch, before), again = seen, []
    rows = set(before)
    for row, number in zip(map(int, visits[ROW]), map(int, visits[EPOCH]), strict=True):
        if number != epoch:
            epoch, rows = number, set()
        again.append(row in rows)
        rows.add(row)
    return np.array(again, bool), (epoch, frozenset(rows))


def is_recorded(made: Provenance | Store | Mapping[str, Any]) -> bool:
    """Whether rows are visits of a training run, each at the parameters of its own step.

    >>> is_recorded({"recorded": {"seed": 0}}), is_recorded({})
    (True, False)
    """
    return RECORDED in Provenance.of(made).further


# --- several processes


def recorded_shards(run: str | Path) -> list[Store]:
    """What the processes of one training wrote, in order; none where the shards are of another kind.

    Raises:
        InputError: some are missing, incomplete, or were made differently.
    """
    stores = present_shards(run, "store")
    if not is_recorded(stores[0]):
        return []
    refuse_unlike(run, "store", stores, rows=False)
    return stores


def join_recorded(run: str | Path, stores: Sequence[Store], *, overwrite: bool = False) -> Path:
    """Join the visits of all processes in the order of their steps, as `RUN/store.h5`; may be repeated.

    Raises:
        InputError: what is in the run was made otherwise, or of shards that have been made again since.
        StorageError: the disk is full or failed; what is joined so far is kept.
    """
    first, names = stores[0], ("rows/id", ROW, EPOCH, STEP, MICROSTEP)
    order = _in_order([store.read_all(names) for store in stores])
    again, _ = duplicates(order)
    with open_writer(
        run, "store", first.settings, len(again), overwrite, request=whole_request(first),
        names={"rows/id": order["rows/id"].tolist()},
    ) as writer:  # fmt: skip
        for start, spans in _windows(stores, [store.read(STEP) for store in stores]):
            parts = [s.read_all(s.names(), *span) for s, span in zip(stores, spans, strict=True)]
            visits = _in_order(parts)
            stop = start + len(visits[STEP])
            if writer.missing([(start, stop)]):
                writer.write(start, stop, {**visits, DUPLICATE: again[start:stop]})
        ends = sorted({str(store.index_array(END)[0]) for store in stores})
        return writer.finish({END: [", ".join(ends)]})


def _windows(
    stores: Sequence[Store], steps: Sequence[np.ndarray]
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Some steps at a time: the first row of them all, and the rows that each process has of them."""
    row_bytes = sum(
        int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize for spec in stores[0].header.arrays.values()
    )
    every = np.unique(np.concatenate(steps))
    per_step = row_bytes * sum(map(len, steps)) / len(every)
    size, start = max(1, int(SEGMENT_BYTES / max(per_step, 1))), 0
    for first in range(0, len(every), size):
        ends = every[first], every[min(first + size, len(every)) - 1] + 1
        bounds = [(int(np.searchsorted(s, ends[0])), int(np.searchsorted(s, ends[1]))) for s in steps]
        yield start, bounds
        start += sum(b - a for a, b in bounds)


def _in_order(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The visits of all processes by step and micro-step; of one micro-step, process after process."""
    every = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((every[MICROSTEP], every[STEP]))
    return {name: values[order] for name, values in every.items()}
