"""Rows of a dataset as a file or folder that can be scored again and trained on, with what ranked them."""

import csv
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfn.errors import InputError, StorageError
from gradfn.hf.hub import quiet
from gradfn.report.exports import inert
from gradfn.report.words import as_json
from gradfn.selection import Selection

if TYPE_CHECKING:
    import datasets

PREFIX = "gradfn_"
"""What the names of columns begin with that say how a row was ranked."""
FOLDER = ""
"""The ending of a folder that `datasets` saves."""
_BATCH = 1000
_TEXT_VALUES = re.compile(r"bool|u?int\d+|float\d+|(large_)?string|null")


def with_ranks(
    rows: "datasets.Dataset", chosen: Selection, query_ids: Sequence[str] = ()
) -> "datasets.Dataset":
    """The rows that were chosen, with their numbers, scores and ranks.

    Args:
        rows: the dataset that was scored.
        chosen: what `select_rows` gave.
        query_ids: the names of the queries, where these have rows of their own.

    Returns:
        All columns of the rows, and `gradfn_row`, `gradfn_score`, `gradfn_rank`, with `gradfn_query` where
        each query has rows of its own. Columns of these names are of an earlier selection and are replaced.

    >>> import torch
    >>> from datasets import Dataset
    >>> two = Selection(torch.tensor([1]), torch.tensor([0.5]), torch.tensor([1]))
    >>> with_ranks(Dataset.from_dict({"text": ["a", "b"]}), two)[0]
    {'text': 'b', 'gradfn_row': 1, 'gradfn_score': 0.5, 'gradfn_rank': 1}
    """
    columns: dict[str, list[Any]] = {
        "row": chosen.rows.tolist(), "score": chosen.scores.tolist(), "rank": chosen.ranks.tolist()
    }  # fmt: skip
    if chosen.queries is not None:
        columns["query"] = [query_ids[number] for number in chosen.queries.tolist()]
    kept = rows.remove_columns([name for name in rows.column_names if name.startswith(PREFIX)])
    kept = kept.select(columns["row"])
    with quiet():
        for name, values in columns.items():
            kept: Any = kept.add_column(PREFIX + name, values)  # pyright: ignore
    return kept


def check_subset(path: Path, *, source: Path | None = None, overwrite: bool = False) -> None:
    """Refuse, before any work, a place where no subset can be written.

    Args:
        path: the file or folder to write.
        source: the dataset that it is of, which is never replaced.
        overwrite: replace what is there: a file, or a folder that `datasets` saved.

    Raises:
        InputError: an ending that is not one of `WRITERS`; there is something, or no folder to write to.
    """
    if path.suffix.lower() not in WRITERS:
        endings = ", ".join(filter(None, WRITERS))
        raise InputError(f"{path} has no ending of a dataset: give one of {endings}, or a folder without one")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"cannot write {path}: give a place in a folder that exists and can be written")
    if not (path.exists() or path.is_symlink()):
        return
    if source is not None and source.exists() and path.resolve() == source.resolve():
        raise InputError(f"{path} is the dataset itself, which stays: give the subset another name")
    if not overwrite:
        raise InputError(f"{path} exists: give another name, or `overwrite=True` to replace it")
    of_datasets = path.is_dir() and (path / "state.json").exists() and path.suffix.lower() == FOLDER
    if not of_datasets and (not path.is_file() or path.suffix.lower() == FOLDER):
        raise InputError(f"{path} is no subset that could be replaced: give another name")


def write_subset(rows: "datasets.Dataset", path: Path) -> None:
    """Write rows to a file or folder, by its ending, whole or not at all.

    Args:
        rows: what to write.
        path: a place that `check_subset` allows; what is there is replaced.

    Raises:
        InputError: a column that the format cannot hold.
        StorageError: the disk is full or failed; what was there is kept.

    >>> import tempfile
    >>> from datasets import Dataset
    >>> path = Path(tempfile.mkdtemp()) / "subset.jsonl"
    >>> write_subset(Dataset.from_dict({"text": ["a"]}), path)
    >>> path.read_text()
    '{"text": "a"}\\n'
    """
    check_columns(rows, path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with quiet():
            WRITERS[path.suffix.lower()](rows, unfinished)
        if path.is_dir():
            _exchange(unfinished, path)
        else:
            unfinished.replace(path)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if unfinished.is_file():
            unfinished.unlink()
        raise StorageError(error.errno, f"could not write {path}: {error.strerror or error}") from error


def check_columns(rows: "datasets.Dataset", path: Path) -> None:
    """Refuse columns that the format of a path cannot hold.

    Raises:
        InputError: lists in a .csv; images, times and the like in text.
    """
    kind = path.suffix.lower()
    if kind not in TEXTS:
        return
    for name, feature in rows.features.items():
        if not _fits(feature, nested=kind != ".csv"):
            raise InputError(
                f"column {name!r} holds {type(feature).__name__} {getattr(feature, 'dtype', '')}".rstrip()
                + f", which a {kind} file cannot hold: write .parquet, .arrow or a folder"
            )


def _fits(feature: Any, *, nested: bool) -> bool:
    """Whether values of a feature can be written as text and read again."""
    if isinstance(feature, dict):
        return nested and all(_fits(one, nested=True) for one in feature.values())
    match type(feature).__name__:
        case "Value":
            return _TEXT_VALUES.fullmatch(feature.dtype) is not None
        case "ClassLabel":
            return True
        case "Json":
            return nested
        case "List" | "LargeList" | "Sequence":
            return nested and _fits(feature.feature, nested=True)
        case _:
            return False


def _exchange(new: Path, old: Path) -> None:
    """Put a folder in the place of another."""
    aside = old.with_name(f"{new.name}.old")
    old.rename(aside)
    new.rename(old)
    shutil.rmtree(aside)


def _dicts(rows: "datasets.Dataset") -> Iterator[dict[str, Any]]:
    """The rows, a part at a time."""
    for start in range(0, len(rows), _BATCH):
        columns: Any = rows[start : start + _BATCH]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _write_jsonl(rows: "datasets.Dataset", path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(as_json(row) + "\n" for row in _dicts(rows))


def _write_json(rows: "datasets.Dataset", path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(_dicts(rows)):
            file.write(("[\n" if not number else ",\n") + as_json(row))
        file.write("\n]\n")


def _write_csv(rows: "datasets.Dataset", path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(inert, rows.column_names))
        writer.writerows([inert(value) for value in row.values()] for row in _dicts(rows))


def _write_parquet(rows: "datasets.Dataset", path: Path) -> None:
    rows.to_parquet(str(path))


def _write_arrow(rows: "datasets.Dataset", path: Path) -> None:
    import pyarrow as pa

    tables: Any = rows.with_format("arrow")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.features.arrow_schema) as stream:
        for start in range(0, len(rows), _BATCH):
            stream.write_table(tables[start : start + _BATCH].cast(rows.features.arrow_schema))


def _write_folder(rows: "datasets.Dataset", path: Path) -> None:
    rows.save_to_disk(str(path))


WRITERS: dict[str, Callable[["datasets.Dataset", Path], None]] = {
    ".jsonl": _write_jsonl, ".ndjson": _write_jsonl, ".json": _write_json, ".csv": _write_csv,
    ".parquet": _write_parquet, ".arrow": _write_arrow, FOLDER: _write_folder,
}  # fmt: skip
"""By the ending of a path."""
TEXTS = (".jsonl", ".ndjson", ".json", ".csv")
"""Endings of files that are text."""
