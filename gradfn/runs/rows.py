"""The rows of a run directory: which examples or tokens they are, what lies beside them, writing them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from gradfn.data import offsets_of
from gradfn.engine.engine import Engine
from gradfn.engine.stream import lengths_of
from gradfn.errors import InputError
from gradfn.methods.attribution import Scorer
from gradfn.methods.inner_product import EngineScorer
from gradfn.model.left_out import uncovered
from gradfn.model.sites import View, find_sites
from gradfn.runs.output import Output
from gradfn.runs.provenance import Provenance
from gradfn.runs.shards import shard_rows
from gradfn.store import Span, Values, Writer, check_disk, open_part, storable
from gradfn.types import Blocks, Data, Rows
from gradfn.watch import Resumed

SEGMENT_BATCHES = 64
SEGMENT_BYTES = 256 << 20
SEGMENT_SECONDS = 60.0
"""What a run that is killed may lose, but for a batch that takes longer."""
FIRST_TOKENS = 1024
"""After at least so many it is known how many tokens take as long."""


@dataclass(frozen=True)
class Summary:
    """What a run holds and what was noticed on the way.

    Args:
        path: the index file.
        rows: how many rows it holds (of a shard: its own); tokens, where the view is by token.
        unsupervised: rows with nothing to supervise; their gradient is zero.
        zero: rows whose result is zero altogether (the unsupervised ones among them).
        resumed: rows that were there already.
        unprobed: the layers that no probe could see, which went through `vmap(grad)`.
    """

    path: Path
    rows: int
    unsupervised: int
    zero: int
    resumed: int
    unprobed: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class RunRows:
    """The rows of one kind in a run directory: examples of data, or their tokens, all or those of a shard.

    Args:
        output: where and how they are written.
        kind: "store" or "scores".
        made: what the rows are made of.
        data: the examples.
        tokens: whether a row of the file is a token.
        index_arrays: arrays of the index, without a row dimension; those called `.../id` are compared.
    """

    output: Output
    kind: str
    made: Provenance
    data: Data
    tokens: bool
    index_arrays: Mapping[str, Values] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> Int[np.ndarray, " examples"]:
        """The tokens of every example."""
        return lengths_of(self.data)

    @cached_property
    def bounds(self) -> Int[np.ndarray, " bounds"]:
        """The row of the file with which every example begins, and the number of rows at the end."""
        return offsets_of(self.lengths if self.tokens else np.ones(len(self.data), np.int64))

    @cached_property
    def examples(self) -> range:
        """The examples to write.

        Raises:
            InputError: more shards than examples, or a shard without tokens.
        """
        shard = self.output.shard
        if shard is None:
            return range(len(self.data))
        own = shard_rows(self.lengths, shard)
        if self.bounds[own.start] == self.bounds[own.stop]:
            raise InputError(f"the rows of shard {shard} have no tokens: choose fewer shards")
        return own

    def span(self, examples: range) -> Span:
        """The rows of the file that examples are."""
        return int(self.bounds[examples.start]), int(self.bounds[examples.stop])

    def between(self, start: int, stop: int) -> range:
        """The examples that rows `start` to `stop` of the file are, without empty ones at the borders."""
        return range(
            int(np.searchsorted(self.bounds, start, "right")) - 1, int(np.searchsorted(self.bounds, stop))
        )

    def slices(self, row_bytes: int, token_batch_size: int) -> list[Span]:
        """The rows of the segments, each of whole examples; see `plan_slices`."""
        own = self.examples
        lengths, rows = (of_all[own.start : own.stop] for of_all in (self.lengths, np.diff(self.bounds)))
        plan = plan_slices(lengths, token_batch_size, row_bytes * rows)
        spans = [self.span(range(own.start + start, own.start + stop)) for start, stop in plan]
        return [(start, stop) for start, stop in spans if start < stop]

    def split(self, examples: range, tokens: int) -> tuple[range, range]:
        """The first examples that are at most so many tokens, one at least, and the others."""
        ends = np.cumsum(self.lengths[examples.start : examples.stop])
        count = max(1, int(np.searchsorted(ends, tokens, "right")))
        return examples[:count], examples[count:]

    @contextmanager
    def open(self) -> Iterator[Writer]:
        """Open the run directory to write the rows, or to resume; see `open_writer`."""
        every = {
            **self.index_arrays,
            **({"documents/id": self.ids(range(len(self.data)))} if self.tokens else {}),
        }
        names = {name: list(values) for name, values in every.items() if name.endswith("/id")}
        if not self.tokens:
            names["rows/id"] = self.ids(range(len(self.data)))
        beside: dict[str, Any] = {}
        if not self.tokens:
            texts: Sequence[str] = storable(getattr(self.data, "texts", ()))
            beside = {"rows/id": names["rows/id"], "rows/text": texts, "rows/length": self.lengths}
        part = None if self.output.shard is None else self.span(self.examples)
        with self.output.open(
            self.kind, self.made, int(self.bounds[-1]), part=part, names=names, beside=beside
        ) as writer:
            yield writer

    def finish(self, writer: Writer) -> Path:
        """Write the index, with the names of documents where rows are tokens."""
        if not self.tokens:
            return writer.finish(self.index_arrays)
        documents = {"tokens/offsets": self.bounds, "documents/id": self.ids(range(len(self.data)))}
        return writer.finish({**self.index_arrays, **documents})

    def ids(self, examples: range) -> list[str]:
        """The names of examples as a store holds them; their numbers, where they have none."""
        ids = getattr(self.data, "ids", None)
        return storable(str(ids[row]) if ids else str(row) for row in examples)

    def arrays(self, examples: range, result: Rows) -> dict[str, Values]:
        """What lies beside the gradients or scores of each row.

        Of an example these are its name, text, tokens and loss; of a token the number of its document, its
        position there and its id.
        """
        parts = list(result.values.values()) if isinstance(result.values, dict) else [result.values]
        zero = torch.stack([(part.flatten(1) == 0).all(1) for part in parts]).all(0).numpy()
        lengths = self.lengths[examples.start : examples.stop]
        if self.tokens:
            ids = [self.data[row]["input_ids"].numpy() for row in examples]
            return {
                "rows/document": np.repeat(np.arange(examples.start, examples.stop), lengths),
                "rows/position": np.concatenate([np.arange(length) for length in lengths]),
                "rows/token": np.concatenate(ids).astype(np.int32),
                "rows/zero": zero,
            }
        texts = getattr(self.data, "texts", None)
        return {
            "rows/id": self.ids(examples),
            "rows/text": storable(texts[row] if texts else "" for row in examples),
            "rows/length": lengths.astype(np.int64),
            "rows/loss": result.losses.double().numpy(),
            "rows/zero": zero,
        }

    def summary(self, path: Path, resumed: int, layers: tuple[str, ...]) -> Summary:
        """What was written."""
        own = self.examples
        start, stop = self.span(own)
        with open_part(path.parent, self.kind) as store:
            zero = int(store.read("rows/zero", start, stop).sum())
        return Summary(path, stop - start, unsupervised(self.data, own), zero, resumed, layers)


def write_rows(
    rows: RunRows,
    scorer_of: Callable[[], Scorer],
    arrays: Callable[[Blocks | Tensor], Mapping[str, Values]],
    token_batch_size: int,
) -> Summary:
    """Make the rows that are missing, a segment at a time, and join the segments.

    Args:
        rows: what to write, and where.
        scorer_of: gives what makes gradients or scores of examples; not called where a run has all its rows.
        arrays: these as a store holds them.
        token_batch_size: a segment holds at most 64 batches of so many tokens, and what takes a minute.
    """
    progress = rows.output.progress
    first, last = rows.span(rows.examples)
    # What a scorer refuses is refused before anything is written.
    scorer = None if (rows.output.folder / f"{rows.kind}.h5").exists() else scorer_of()
    with rows.open() as writer:
        if writer.complete:
            if progress:
                progress(Resumed(rows.lengths[rows.examples.start : rows.examples.stop].sum()))
            return rows.summary(writer.index, last - first, ())
        scorer = scorer or scorer_of()
        row_bytes = scorer.engine.result_bytes if isinstance(scorer, EngineScorer) else 0
        slices = rows.slices(row_bytes, token_batch_size)
        missing = [rows.between(*span) for span in writer.missing(slices)]
        made = sum(stop - start for start, stop in map(rows.span, missing))
        check_disk(writer.index.parent, made * row_bytes, f"{made:,} rows")
        if progress:
            todo = sum(int(rows.lengths[part.start : part.stop].sum()) for part in missing)
            progress(Resumed(rows.lengths[rows.examples.start : rows.examples.stop].sum() - todo))
        for examples, result in _timed(rows, scorer, missing, token_batch_size):
            writer.write(*rows.span(examples), {**arrays(result.values), **rows.arrays(examples, result)})
        path = rows.finish(writer)
    return rows.summary(path, last - first - made, unprobed(scorer))


def _timed(
    rows: RunRows, scorer: Scorer, missing: Sequence[range], token_batch_size: int
) -> Iterator[tuple[range, Rows]]:
    """Results of the missing examples: of an engine, as many at a time as take a minute."""
    todo, tokens = list(missing), max(token_batch_size, FIRST_TOKENS)
    while todo:
        examples, later = todo.pop(0), range(0)
        if isinstance(scorer, EngineScorer):  # another may do for each part what it does for all
            examples, later = rows.split(examples, tokens)
        if later:
            todo.insert(0, later)
        start, stop = rows.span(examples)
        if start == stop:  # documents without a token, by token
            continue
        begun = time.monotonic()
        yield examples, scorer(rows.data, examples, progress=rows.output.progress)
        seconds = max(time.monotonic() - begun, 1e-9)
        done = int(rows.lengths[examples.start : examples.stop].sum())
        tokens = max(token_batch_size, int(SEGMENT_SECONDS * done / seconds))


def plan_slices(lengths: np.ndarray, token_batch_size: int, row_bytes: int | np.ndarray) -> list[Span]:
    """Cut rows into the slices of segments: at most 64 batches of tokens and 256 MiB each.

    >>> plan_slices(np.array([4, 4, 4]), token_batch_size=1, row_bytes=200 << 20)
    [(0, 1), (1, 2), (2, 3)]
    """
    sizes = np.broadcast_to(row_bytes, len(lengths))
    slices, start, tokens, held = [], 0, 0, 0
    for row, (length, size) in enumerate(zip(lengths.tolist(), sizes.tolist(), strict=True)):
        full = held + size > SEGMENT_BYTES or tokens + length > SEGMENT_BATCHES * token_batch_size
        if row > start and full:
            slices.append((start, row))
            start, tokens, held = row, 0, 0
        tokens, held = tokens + length, held + size
    return [*slices, (start, len(lengths))]


def unprobed(made: Engine | Scorer) -> tuple[str, ...]:
    """The layers of an engine that go through `vmap(grad)`; known for certain after its first batch.

    A scorer that is no engine has none.
    """
    engine = made.engine if isinstance(made, EngineScorer) else made
    sites = engine.sites if isinstance(engine, Engine) else ()
    return tuple(dict.fromkeys(site.path or "root" for site in sites if not site.probed))


def unsupervised(data: Data, rows: range) -> int:
    """How many of some rows have nothing to supervise; none where the data does not say."""
    supervised: Sequence[int] | np.ndarray | None = getattr(data, "supervised", None)
    return 0 if supervised is None else int((np.asarray(supervised)[rows.start : rows.stop] == 0).sum())


def layer_summary(model: nn.Module, view: View | None = None) -> str:
    """One line on what is attributed and what is not, in layers and parameters."""
    sites = find_sites(model, view)
    everything = sum(p.numel() for p in model.parameters())
    share = 1 - sum(uncovered(model, sites).values()) / everything
    count = len({site.path for site in sites})
    kind = "linear layer" if all(site.layer.kind == "linear" for site in sites) else "layer"
    return f"{count} {kind}{'' if count == 1 else 's'}, {share:.0%} of {everything:,} parameters"
