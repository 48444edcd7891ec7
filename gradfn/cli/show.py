"""What a person sees: progress, tables, exported tables. Text that comes from data is never markup."""

import csv
import datetime
import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from gradfn.errors import InputError, StorageError

Row = Mapping[str, Any]
PLAIN_EVERY_S = 10.0
QUIET_BELOW_S = 2.0
RESUMED_WITHIN_S = 0.5
NAME_WIDTH = 30
EXCERPT_WIDTH = 20
SHOWN_SHARES = 3
EXPORTED: tuple[str, ...] = ("query", "side", "rank", "score", "row", "id", "text")
FURTHER = {"module": ("module", "share"), "head": ("module", "share"),
           "token": ("document", "position", "token")}  # fmt: skip
"""Columns of an export that there are only where scores are told apart so finely."""


def console() -> Console:
    """Where results are printed; 100 columns where there is no terminal."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width, highlight=False, soft_wrap=False, emoji=False)


def count(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count(1, "row"), count(1200, "row"), count(2, "query")
    ('1 row', '1,200 rows', '2 queries')
    """
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun if number == 1 else plural}"


def clean(text: str, width: int | None = None) -> str:
    """One line of printable text: line breaks become spaces, control characters are dropped.

    >>> clean("a\\n\\x1b[31mb")
    'a [31mb'
    """
    line = " ".join(text.split())
    line = "".join(c for c in line if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return line if width is None or len(line) <= width else line[: width - 1].rstrip() + "…"


@contextmanager
def progress_bar(label: str, total: int, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """A bar with the time left on a terminal; elsewhere a plain line every ten seconds."""
    if sys.stderr.isatty():
        pace = _Pace(total)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                   TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit), TimeElapsedColumn(),
                   _TimeLeft(pace))  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)

            def advance(done: int) -> None:
                pace.add(done, time.monotonic())
                bar.advance(task, done)

            yield advance
        return
    lines = _PlainProgress(label, total, unit)
    yield lines
    lines.close()


class _Pace:
    """How far, and how long it will take at the speed so far.

    What is reported in the first moment was there already, of a run that resumes, and says nothing of speed.
    """

    def __init__(self, total: int):
        self.total, self.done, self.given, self.start = total, 0, 0, time.monotonic()

    def add(self, done: int, now: float) -> None:
        self.done += done
        if now - self.start < RESUMED_WITHIN_S:
            self.given += done

    def left(self, now: float) -> float | None:
        """Seconds left, or None where nothing is done yet."""
        made = self.done - self.given
        return (now - self.start) * (self.total - self.done) / made if made else None


class _TimeLeft(ProgressColumn):
    """The time left; rich's own column forgets batches that took longer than half a minute."""

    def __init__(self, pace: _Pace):
        super().__init__()
        self.pace = pace

    def render(self, task: Task) -> Text:
        """`eta 0:01:30`, as soon as anything is done."""
        left = self.pace.left(time.monotonic())
        return Text("eta -:--:--" if left is None else f"eta {datetime.timedelta(seconds=round(left))}")


class _PlainProgress:
    """Lines for logs: how far, how long it took, how long it will take."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.unit, self.pace = label, unit, _Pace(total)
        self.last = self.pace.start

    def __call__(self, done: int) -> None:
        now, pace = time.monotonic(), self.pace
        pace.add(done, now)
        left = pace.left(now)
        if now - self.last >= PLAIN_EVERY_S and left is not None and pace.done < pace.total:
            self.last = now
            self._line(f"{pace.done / pace.total:.0%}, {now - pace.start:.0f} s, about {left:.0f} s left")

    def close(self) -> None:
        elapsed = time.monotonic() - self.pace.start
        if elapsed >= QUIET_BELOW_S:
            self._line(f"{self.pace.done:,} {self.unit} in {elapsed:.1f} s")

    def _line(self, text: str) -> None:
        print(f"{self.label}: {text}", file=sys.stderr, flush=True)


def facts(pairs: Sequence[tuple[str, str]]) -> Table:
    """A borderless table of names and values."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True, overflow="ellipsis", max_width=NAME_WIDTH)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(clean(name)), Text(clean(value)))
    return table


def ranking(rows: Sequence[Row], width: int) -> Table:
    """Proponents and opponents of one query: rank, score, id and an excerpt that fits in the width.

    Below a row that has `shares` stand the largest of them.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, overflow="ellipsis")
    sides = [Text(f"  {row['side']} {row['rank']}") for row in rows]
    scores, ids = [_signed(float(row["score"])) for row in rows], [clean(_name(row)) for row in rows]
    # Rich would shrink all columns alike, down to no score at all; it is the texts that have room to spare.
    name = min(NAME_WIDTH, _longest(map(Text, ids)))
    excerpt = width - 32 - name
    if excerpt < EXCERPT_WIDTH:
        left = max(0, width - 6 - _longest(sides) - _longest(scores))
        name = min(name, max(left - EXCERPT_WIDTH, min(left, EXCERPT_WIDTH // 2)))
        excerpt = min(EXCERPT_WIDTH, left - name)
    for row, side, score, which in zip(rows, sides, scores, ids, strict=True):
        table.add_row(side, score, _cut(which, name), _cut(clean(str(row["text"])), excerpt))
        for block, share in row.get("shares", ())[:SHOWN_SHARES]:
            table.add_row("", _signed(share), "", _cut(clean(block), excerpt))
    return table


def _longest(texts: Iterable[Text]) -> int:
    return max((text.cell_len for text in texts), default=0)


def _name(row: Row) -> str:
    """The id of a row; of a token, that of its document with the position in it."""
    return f"{row['id']}:{row['position']}" if "position" in row else str(row["id"])


def _signed(value: float) -> Text:
    return Text(f"{value:+.4g}", style="green" if value > 0 else "red" if value < 0 else "")


def _cut(text: str, cells: int) -> Text:
    """Text of a width in terminal cells, of which a Chinese letter takes two."""
    cut = Text(text if cells else "")
    cut.truncate(cells, overflow="ellipsis")
    return cut


def check_exports(paths: Sequence[Path | None], overwrite: bool) -> None:
    """Refuse, before any work, an export that could not be written or would replace a file."""
    given = [path for path in paths if path is not None]
    if len({path.absolute() for path in given}) < len(given):
        raise InputError("two exports have the same path: give each a file of its own")
    for path in given:
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"cannot write {path}: give a file in a folder that exists and can be written")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists: give another name, or --overwrite to replace it")


def export(
    rows: Sequence[Row],
    *,
    by: str = "example",
    csv_path: Path | None,
    jsonl_path: Path | None,
    parquet_path: Path | None,
) -> None:
    """Write the table in the formats asked for, each whole or not at all; one line a share of a score."""
    lines = [line for row in rows for line in _lines(row)]
    export_table(
        lines, (*EXPORTED, *FURTHER.get(by, ())), csv_path=csv_path, jsonl_path=jsonl_path,
        parquet_path=parquet_path,
    )  # fmt: skip


def export_table(
    lines: Sequence[Row],
    columns: Sequence[str],
    *,
    csv_path: Path | None,
    jsonl_path: Path | None,
    parquet_path: Path | None,
) -> None:
    """Write any table in the formats asked for, each whole or not at all."""
    for path, write in ((csv_path, _write_csv), (jsonl_path, _write_jsonl), (parquet_path, _write_parquet)):
        if path is None:
            continue
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            write(lines, columns, partial)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise StorageError(error.errno, f"could not write {path}: {error.strerror or error}") from error


def _lines(row: Row) -> list[dict[str, Any]]:
    """A row of the table as lines of the export: one, or one a share."""
    line = {key: value for key, value in row.items() if key != "shares"}
    if "shares" not in row:
        return [line]
    return [{**line, "module": name, "share": share} for name, share in row["shares"]]


def _write_csv(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def _write_jsonl(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n")


def _write_parquet(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = {name: _parquet_kind([row[name] for row in rows]) for name in columns}
    kinds = {**found, **dict.fromkeys(("rank", "row", "document", "position"), pa.int64()),
             **dict.fromkeys(("score", "share"), pa.float64())}  # fmt: skip
    schema = pa.schema([(name, kinds[name]) for name in columns])
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema), path)


def _parquet_kind(values: Sequence[Any]) -> Any:
    """The type of a column; numbers that are sometimes absent are numbers, and an empty column is text."""
    import pyarrow as pa

    there = [value for value in values if value is not None]
    if there and all(isinstance(value, int) for value in there):
        return pa.int64()
    return pa.float64() if there and all(isinstance(value, int | float) for value in there) else pa.string()
