"""Tables as files: CSV, JSON lines, Parquet."""

import csv
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gradfn.errors import StorageError
from gradfn.report.words import as_json, on_terminal
from gradfn.shown import SAID

Row = Mapping[str, Any]
EXPORTED: tuple[str, ...] = ("query", "side", "rank", "score", "row", "id", "text")
FURTHER = {"module": ("module", "share"), "head": ("module", "share"), "time": ("time", "share"),
           "token": ("document", "position", "token")}  # fmt: skip
"""Columns of an export that there are only where scores are told apart so finely."""
CLASSES = ("label", "predicted")
"""Columns of rows with a class: its name, and the model's own."""
FORMULA, NUMBER = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r]"), re.compile(r"[+-]?\d+(\.\d+)?")
"""Texts that a spreadsheet may run (the signs may have full width), and those that are only numbers."""


def export_ranking(
    rows: Sequence[Row],
    paths: Mapping[str, Path | None],
    by: str = "example",
    baselines: Sequence[str] = (),
) -> None:
    """Write rankings, a line a row, or a line a share of a score; see `export_table`.

    Args:
        by: how finely scores are told apart: "example", "module", "head" or "token".
        baselines: whose scores and ranks stand beside those of the method.
    """
    lines = [line for row in rows for line in _lines(row)]
    classes = CLASSES if any("label" in row for row in rows) else ()
    beside = [column for name in baselines for column in (name, f"{name}_rank")]
    export_table(lines, (*EXPORTED, *FURTHER.get(by, ()), *classes, *beside), paths)


def export_table(lines: Sequence[Row], columns: Sequence[str], paths: Mapping[str, Path | None]) -> None:
    """Write a table in the formats asked for, each file whole or not at all.

    Args:
        lines: what stands in the columns, by name; other names are left out.
        paths: by format, "csv", "jsonl" or "parquet"; None: not in this one; "-": to stdout.

    Raises:
        StorageError: the disk is full or failed; the old file is kept.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "t.csv"
    >>> export_table([{"a": 1, "b": 2}], ["b"], {"csv": path})
    >>> path.read_text()
    'b\\n2\\n'
    """
    for kind, path in paths.items():
        if path is None:
            continue
        if str(path) == "-":
            sys.stdout.write(_as_text(kind, lines, columns))
            continue
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
        try:
            WRITERS[kind](lines, columns, unfinished)
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise StorageError(error.errno, f"could not write {path}: {error.strerror or error}") from error


def _lines(row: Row) -> list[dict[str, Any]]:
    """A row of the table as lines of the export: one, or one a share."""
    line = {key: value for key, value in row.items() if key not in ("shares", "shown")}
    line["text"] = line["text"].replace(SAID, " → ")
    if "shares" not in row:
        return [line]
    return [{**line, "module": name, "time": name, "share": share} for name, share in row["shares"]]


def _put_csv(rows: Sequence[Row], columns: Sequence[str], file: Any) -> None:
    writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: inert(row.get(name)) for name in columns} for row in rows)


def _put_jsonl(rows: Sequence[Row], columns: Sequence[str], file: Any) -> None:
    for row in rows:
        file.write(as_json({name: row[name] for name in columns}) + "\n")


TEXTS: dict[str, Callable[[Sequence[Row], Sequence[str], Any], None]] = {
    "csv": _put_csv,
    "jsonl": _put_jsonl,
}
"""The formats that are text, which can go to stdout."""


def _as_text(kind: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table for stdout; if that is a terminal, no text of it is more than text."""
    file = io.StringIO(newline="")
    TEXTS[kind](rows, columns, file)
    return on_terminal(file.getvalue()) if sys.stdout.isatty() else file.getvalue()


def _write_text(kind: str, rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        TEXTS[kind](rows, columns, file)


def inert(value: Any) -> Any:
    """A cell of a CSV that no spreadsheet takes for a formula: such texts get an apostrophe before them.

    >>> inert("=1+1"), inert("a=b"), inert("-2"), inert(-2.5)
    ("'=1+1", 'a=b', '-2', -2.5)
    """
    if not isinstance(value, str):
        return value
    formula = FORMULA.match(value) and not NUMBER.fullmatch(value)
    return whole_letters(f"'{value}" if formula else value)


def whole_letters(text: str) -> str:
    """A text of which every letter can be written: half of a pair of surrogates becomes \ufffd.

    >>> whole_letters("a\\ud83d") == "a\ufffd"
    True
    """
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _write_parquet(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = {name: _parquet_kind([row[name] for row in rows]) for name in columns}
    kinds = {**found, **dict.fromkeys(("rank", "row", "document", "position"), pa.int64()),
             **dict.fromkeys(("score", "share"), pa.float64())}  # fmt: skip
    schema = pa.schema([(name, kinds[name]) for name in columns])
    whole = [{name: whole_letters(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(whole, schema), path)


def _parquet_kind(values: Sequence[Any]) -> Any:
    """The type of a column; numbers that are sometimes absent are numbers, and an empty column is text."""
    import pyarrow as pa

    there = [value for value in values if value is not None]
    if there and all(isinstance(value, int) for value in there):
        return pa.int64()
    return pa.float64() if there and all(isinstance(value, int | float) for value in there) else pa.string()


WRITERS: dict[str, Callable[[Sequence[Row], Sequence[str], Path], None]] = {
    "csv": partial(_write_text, "csv"),
    "jsonl": partial(_write_text, "jsonl"),
    "parquet": _write_parquet,
}
"""By format."""
