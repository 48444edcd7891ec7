"""Parts of an array job: which rows each of them does, and joining what they wrote.

Part I of N writes to a run directory of its own, `RUN/shards/I-of-N`, and needs nothing of the others. The
parts may be written on other machines and copied there. Joining links (or copies) their segments into
`RUN`, which is then what one process would have written.
"""

import filecmp
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from gradfn.errors import InputError, LostFileError
from gradfn.store import Span, Store, Writer, differing, in_words, open_part, open_store, open_writer
from gradfn.store.guard import refuse_links

__all__ = [
    "Shard", "complete_shards", "is_complete", "join_shards", "joinable_shards", "kind_name", "listed",
    "parse_shard", "present_shards", "refuse_gaps", "refuse_unlike", "shard_rows", "shard_run", "shards_of",
]  # fmt: skip

FOLDER = "shards"
TRACES = (r"\.([a-z_]+)\.lock", r"([a-z_]+)\.h5", r"segments/([a-z_]+)-\d{10,}-\d{10,}\.h5")
"""Files of a part that tell of which kinds it has something."""


@dataclass(frozen=True, order=True)
class Shard:
    """Part `number`, from 1 to `count`.

    Raises:
        InputError: a number that is not between 1 and the count.

    >>> str(Shard(2, 8))
    '2/8'
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise InputError(
                f"a shard is I/N with I from 1 to N, not {self}: give 1/{max(1, self.count)}, say"
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


class TooManyShards(InputError):
    """There are fewer rows than parts.

    Args:
        message: the sentence.
        parts: the most that there may be.
    """

    def __init__(self, message: str, parts: int):
        super().__init__(message)
        self.parts = parts


def parse_shard(text: str | None) -> Shard | None:
    """Read a shard that is spelled I/N.

    Raises:
        InputError: anything but I/N with I from 1 to N.

    >>> parse_shard("2/8")
    Shard(number=2, count=8)
    """
    if text is None:
        return None
    if not (match := re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip(), re.ASCII)):
        raise InputError(f"a shard is I/N, the I-th of N parts, not {text!r}: give 2/8, say")
    return Shard(int(match[1]), int(match[2]))


def shard_rows(sizes: Int[np.ndarray, " rows"], shard: Shard) -> range:
    """The rows of one part: contiguous, none without a row, and balanced by size.

    Args:
        sizes: how much work each row is: its tokens, or ones.
        shard: which part; all parts together are all rows.

    Raises:
        TooManyShards: more parts than rows.

    >>> [shard_rows(np.array([9, 1, 1, 1, 6]), Shard(number, 3)) for number in (1, 2, 3)]
    [range(0, 1), range(1, 4), range(4, 5)]
    """
    rows, count = len(sizes), shard.count
    if count > rows:
        raise TooManyShards(
            f"{rows} rows do not go into {count} shards: give "
            f"`shard=Shard(I, {max(rows, 1)})`, or fewer shards",
            rows,
        )
    ends = np.concatenate([[0], np.cumsum(np.maximum(sizes, 1), dtype=np.float64)])
    middles = (ends[:-1] + ends[1:]) / 2
    each = np.arange(count + 1)
    nearest = np.searchsorted(middles, each * ends[-1] / count)
    bounds = np.minimum(np.maximum.accumulate(nearest - each) + each, rows - count + each)
    return range(int(bounds[shard.number - 1]), int(bounds[shard.number]))


def shard_run(run: str | Path, shard: Shard | None) -> Path:
    """The run directory of a part; of no part, the run itself.

    >>> shard_run("runs/index", Shard(2, 8)).as_posix()
    'runs/index/shards/2-of-8'
    """
    return Path(run) if shard is None else Path(run) / FOLDER / f"{shard.number}-of-{shard.count}"


def shards_of(run: str | Path) -> dict[str, list[Shard]]:
    """The parts in a run directory of which something is there, complete or not, by the kind of store.

    >>> import tempfile
    >>> run = tempfile.mkdtemp()
    >>> with open_writer(shard_run(run, Shard(1, 2)), "store", {}, rows=4, part=(0, 2)):
    ...     shards_of(run)
    {'store': [Shard(number=1, count=2)]}
    """
    found: dict[str, set[Shard]] = {}
    refuse_links(Path(run) / FOLDER)
    for folder in (Path(run) / FOLDER).glob("*"):
        refuse_links(folder)
        if not (match := re.fullmatch(r"(\d+)-of-(\d+)", folder.name)):
            continue
        shard = Shard(int(match[1]), int(match[2]))
        for path in [*folder.glob("*"), *folder.glob("segments/*")]:
            names = (re.fullmatch(trace, path.relative_to(folder).as_posix()) for trace in TRACES)
            for name in filter(None, names):
                found.setdefault(name[1], set()).add(shard)
    return {kind: sorted(found[kind]) for kind in sorted(found)}


def is_complete(run: str | Path, kind: str, shard: Shard) -> bool:
    """Whether a part has all its rows."""
    return (shard_run(run, shard) / f"{kind}.h5").exists()


def complete_shards(run: str | Path, kind: str) -> list[Store]:
    """Open the parts of one kind, in order, after checking that together they are all rows, each once.

    Raises:
        InputError: parts are missing, incomplete, overlap, or were made with different settings.
    """
    stores = present_shards(run, kind)
    refuse_unlike(run, kind, stores)
    refuse_gaps(run, kind, [store.span for store in stores], stores[0].rows)
    return stores


def present_shards(run: str | Path, kind: str) -> list[Store]:
    """Open the parts of one kind, in order, after checking that all are there and complete.

    Raises:
        InputError: parts are missing or incomplete, or there are those of several counts.
    """
    found = shards_of(run).get(kind, [])
    if not found:
        raise InputError(f"{run} has no shards of its {kind_name(kind)}: write them with `shard=Shard(I, N)`")
    _refuse_several_counts(run, kind, found)
    count = found[0].count
    missing = [number for number in range(1, count + 1) if Shard(number, count) not in found]
    unfinished = [shard.number for shard in found if not is_complete(run, kind, shard)]
    there = shard_run(run, next((shard for shard in found if shard.number not in unfinished), found[0]))
    lacking = f"of {count} of the {kind_name(kind)} of {run}", there / f"{kind}.h5", count
    _refuse_lacking(*lacking, missing, "missing", "")
    _refuse_lacking(*lacking, unfinished, "incomplete", " again, which resumes")
    return [open_part(shard_run(run, shard), kind) for shard in found]


def joinable_shards(run: str | Path, kind: str, *, overwrite: bool = False) -> list[Store]:
    """Open the parts of one kind after checking also that what the run has already is made of them.

    Args:
        overwrite: what is there will be replaced.

    Raises:
        InputError: see `complete_shards`; what is there was made otherwise, without parts, or of parts that
            have been made again since.
    """
    stores = complete_shards(run, kind)
    if not overwrite:
        writer = Writer(Path(run), kind, stores[0].settings, stores[0].rows)
        _refuse_other_rows(writer, kind, stores)
    return stores


def join_shards(run: str | Path, kind: str, *, overwrite: bool = False) -> Path:
    """Join all parts of one kind to `RUN/<kind>.h5`, which appears complete or not at all; may be repeated.

    Args:
        overwrite: replace what is there and was made otherwise, or not in these parts.

    Returns:
        The path of the index.

    Raises:
        InputError: see `joinable_shards`.
        StorageError: the disk is full or failed; what is joined so far is kept.

    >>> import tempfile
    >>> run = tempfile.mkdtemp()
    >>> for shard in (Shard(1, 2), Shard(2, 2)):
    ...     rows = shard_rows(np.ones(5, int), shard)
    ...     part = rows.start, rows.stop
    ...     with open_writer(shard_run(run, shard), "store", {}, rows=5, part=part) as writer:
    ...         writer.write(*part, {"loss": np.arange(*part)})
    ...         _ = writer.finish()
    >>> from gradfn.store import open_store
    >>> open_store(join_shards(run, "store")).read("loss")
    array([0, 1, 2, 3, 4])
    """
    stores = joinable_shards(run, kind, overwrite=overwrite)
    first = stores[0]
    with open_writer(
        run, kind, first.settings, first.rows, overwrite, request=whole_request(first)
    ) as writer:
        if not writer.complete:
            for span, path in _segments_of(stores).items():
                if span not in writer.done:
                    writer.take(path)
        return writer.finish({name: first.index_array(name) for name in first.header.index_arrays})


def whole_request(part: Store) -> dict[str, Any]:
    """What a joined run records as its request: that of a part, without the shard."""
    given = part.request.get("given", {})
    return {**part.request, "given": {key: value for key, value in given.items() if key != "shard"}}


def _segments_of(stores: Sequence[Store]) -> dict[Span, Path]:
    """The segments of all parts by their rows."""
    return {
        span: path
        for store in stores
        for span, path in zip(store.header.segments, store.files(), strict=True)
    }


def _refuse_other_rows(writer: Writer, kind: str, stores: Sequence[Store]) -> None:
    """Refuse rows that the run has and that are not those of the parts."""
    ours, segments = _segments_of(stores), sorted((writer.run / "segments").glob(f"{kind}-*-*.h5"))
    named = {path.name: span for span, path in ours.items()}
    for there in segments:
        if there.name not in named:
            start, stop = map(int, there.stem.split("-")[-2:])
            raise InputError(
                f"{writer.run} has rows {start} to {stop} of a run without shards: give `overwrite=True` to "
                "take those of the shards, or make the run again without `shard`"
            )
        part = ours[named[there.name]]
        if not (there.samefile(part) or filecmp.cmp(there, part, shallow=False)):
            _refuse_remade(writer.run, kind, named[there.name])
    if writer.complete and not segments:
        with open_store(writer.run, kind) as joined:
            for store in stores:
                if not _same_rows(joined, store):
                    _refuse_remade(writer.run, kind, store.span)


def _refuse_remade(run: Path, kind: str, rows: Span) -> None:
    raise InputError(
        f"rows {rows[0]} to {rows[1]} of the {kind_name(kind)} of {run} are not those of its shards, which "
        "were made again: give `overwrite=True` to take these"
    )


def _same_rows(joined: Store, part: Store) -> bool:
    """Whether a copy has the rows of a part, bit for bit."""

    def alike(name: str) -> bool:
        a, b = (store.read(name, *part.span) for store in (joined, part))
        if a.dtype == object:
            return a.tolist() == b.tolist()
        return a.shape == b.shape and a.tobytes() == b.tobytes()

    return joined.names() == part.names() and all(map(alike, part.names()))


def _refuse_several_counts(run: str | Path, kind: str, found: Sequence[Shard]) -> None:
    counts = sorted({shard.count for shard in found})
    if len(counts) > 1:
        a, b = (next(shard for shard in found if shard.count == count) for count in counts[:2])
        raise InputError(
            f"{run} has shards {a} and {b} of its {kind_name(kind)}, which overlap: delete "
            f"{shard_run(run, b)} and the others of {b.count}, or those of {a.count}"
        )


def _refuse_lacking(
    which: str, there: Path, count: int, numbers: Sequence[int], lack: str, again: str
) -> None:
    if numbers:
        shards, commands = ("shard", "its command") if len(numbers) == 1 else ("shards", "their commands")
        raise LostFileError(
            f"{shards} {listed(numbers)} {which} {'is' if len(numbers) == 1 else 'are'} {lack}: run "
            f"{commands}{again} (`shard=Shard({numbers[0]}, {count})`), then merge",
            there,
        )


def refuse_unlike(run: str | Path, kind: str, stores: Sequence[Store], *, rows: bool = True) -> None:
    """Refuse parts that were made differently.

    Args:
        rows: whether all must know the same number of rows, that of all parts together.

    Raises:
        InputError: naming the values that differ.
    """
    unknown, count = {} if rows else {"rows": None}, len(stores)
    sides = [{**_made_with(store), **unknown} for store in stores]
    for number, side in enumerate(sides, 1):
        if differences := differing(sides[0], side):
            raise InputError(
                f"shards 1/{count} and {number}/{count} of the {kind_name(kind)} of {run} were made "
                f"differently ({in_words(differences, str)}): make one of them again with `overwrite=True`"
            )


def _made_with(store: Store) -> dict[str, Any]:
    """What all parts have in common: settings, the number of rows, the names of queries."""
    named = {
        name: store.index_array(name).tolist() for name in store.header.index_arrays if name.endswith("/id")
    }
    return {**store.settings, "rows": store.rows, **named}


def refuse_gaps(run: str | Path, kind: str, spans: Sequence[tuple[int, int]], rows: int) -> None:
    """Refuse parts that were cut differently, so that they do not follow one another."""
    ends, starts = [0, *(stop for _, stop in spans)], [*(start for start, _ in spans), rows]
    for number, (end, start) in enumerate(zip(ends, starts, strict=True), 1):
        if end != start:
            wrong = f"overlap in rows {start} to {end}" if start < end else f"leave out rows {end} to {start}"
            at = f"{min(number, len(spans))}/{len(spans)}"
            raise InputError(
                f"the shards of the {kind_name(kind)} of {run} {wrong}, at shard {at}: make them again with "
                "`overwrite=True`"
            )


def kind_name(kind: str) -> str:
    """A kind of store in a sentence.

    >>> kind_name("second_sums")
    'second sums'
    """
    return kind.replace("_", " ")


def listed(numbers: Sequence[int]) -> str:
    """Numbers in words: all of a few, the first of many.

    >>> listed([1]), listed([1, 3, 4])
    ('1', '1, 3 and 4')
    """
    shown = [str(number) for number in numbers[:8]]
    if len(numbers) > 8:
        return f"{', '.join(shown)} and {len(numbers) - 8} more"
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
