"""Rows of datasets, read from files, folders and the hub, and their columns."""

import glob
import re
from collections import Counter
from collections.abc import Iterator
from itertools import count as counting
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfn.errors import InputError
from gradfn.hf.hub import (
    disk_fault,
    hub_answers,
    is_hub_name,
    local,
    offline,
    quiet,
    refuse_revision,
    summary,
)
from gradfn.hf.json_names import named_rows, with_names
from gradfn.hf.unpack import PACKED, kind_of, read_bytes, temporary_folder
from gradfn.watch import WATCH

if TYPE_CHECKING:
    import datasets
    import pyarrow

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    # Only an empty cell is missing: pandas would also drop the texts "NA", "None" and "null". Ids of rows and
    # of their sources are texts: 007 is not 7.
    ".csv": (
        "csv",
        {"keep_default_na": False, "na_values": [""], "converters": {"id": str, "source": str}},
    ),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", "")
"""Endings of what else lies in the folders of datasets: images, and folders."""
_CRAWLED = 50_000
"""Files of a folder whose endings are looked at."""
_BATCH = 1000
"""Rows tokenised at once: enough for the tokenizer's threads, few enough to hold as Python lists."""


def load_rows(
    path: str | Path, split: str | None = "train", *, revision: str | None = None
) -> "datasets.Dataset":
    """The rows of a dataset, in memory. A local file is read anew each time, without a cache.

    Texts in JSON that look like times stay texts. The columns `id` and `source` of JSON and of a .csv are
    texts, with the digits that the file has.

    Args:
        path: a .jsonl, .json, .csv, .parquet, .arrow or .txt file (one row a line), also compressed as .gz,
            .bz2 or .zst; a folder that `save_to_disk` wrote or that holds such files; or a hub name, `name`
            or `name:configuration`.
        split: a split or a slice of one, such as "train[:100]", "test[10%:20%]" or "train+test". The rows of
            a file, and of a folder with a single unnamed dataset, are "train". None is the only split.
        revision: the branch, tag or commit of a dataset on the hub.

    Raises:
        InputError: there are no such rows, or they cannot be read.

    >>> load_rows("corpus.jsonl")
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: no dataset 'corpus.jsonl': no file or folder here has this name; check the path
    """
    return load_split(path, split, revision=revision)[0]


def load_split(
    path: str | Path, split: str | None = None, *, revision: str | None = None, argument: str = "split"
) -> tuple["datasets.Dataset", list[str]]:
    """The rows that `load_rows` gives, and the names of all splits that there are.

    Args:
        path, split, revision: see `load_rows`.
        argument: the name of the argument that gives the split, for the message.

    Raises:
        InputError: see `load_rows`; no split is named, and there are several.
    """
    place = local(path)
    refuse_revision(place, revision)
    with WATCH.get()(f"reading {path}"):
        splits = _read_local(place) if place.exists() else _read_hub(path, revision)
    names = [*{id(rows): name for name, rows in splits.items()}.values()]
    if split is None and len(names) > 1:
        raise InputError(
            f"dataset {str(path)!r} has the splits {', '.join(names)}: say which is meant with `{argument}`"
        )
    split = names[0] if split is None else split
    rows = _select_split(splits, split, path)
    if len(rows) == 0:
        raise InputError(f"dataset {str(path)!r} has no rows in split {split!r}: give a split that has rows")
    return rows, names


def check_dataset(rows: Any) -> None:
    """Refuse rows that are no dataset, such as a list of dicts, a stream, or all splits together.

    Raises:
        InputError: naming what they are.
    """
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        raise InputError(
            f"rows must be a datasets.Dataset, and this is a {type(rows).__name__}: give what gf.load_rows "
            "returns, one split, or Dataset.from_list(rows)"
        )


def check_column(rows: "datasets.Dataset", column: str, remedy: str) -> None:
    """Refuse a column that is not in the dataset.

    Args:
        rows: the rows.
        column: its name.
        remedy: what to do without it, for the message.

    Raises:
        InputError: there is no such column.
    """
    check_dataset(rows)
    if column not in rows.column_names:
        names = ", ".join(rows.column_names)
        raise InputError(f"no column {column!r} in the dataset, which has {names}: {remedy}")


def column_values(rows: "datasets.Dataset", column: str, argument: str) -> list[Any]:
    """The values of a column.

    Args:
        rows: the rows.
        column: its name.
        argument: the name of the argument that gave it, for the message.

    Raises:
        InputError: there is no such column.
    """
    check_column(rows, column, f"give another {argument}")
    return list(rows[column])


def row_names(rows: "datasets.Dataset") -> list[str]:
    """The name of each row: its value in the column `id`, or else its number."""
    return [name for start, table in tables(rows) for name in row_ids(rows, table, start)]


def tables(rows: "datasets.Dataset", work: str = "rows") -> Iterator[tuple[int, "pyarrow.Table"]]:
    """The rows in parts: the number of the first row, and a table.

    Args:
        work: what is done with them, as who watches is told.
    """
    check_dataset(rows)
    tables: Any = rows.with_format("arrow")
    with WATCH.get()(work, len(rows), "rows") as progress:
        for start in range(0, len(rows), _BATCH):
            yield start, (table := tables[start : start + _BATCH])
            progress(len(table))


def row_ids(rows: "datasets.Dataset", table: "pyarrow.Table", start: int) -> list[str]:
    """The names of the rows in a table whose first row has the number `start`."""
    given = decoded(rows, table, "id") if "id" in table.column_names else [None] * len(table)
    return [str(row if name is None else name) for row, name in enumerate(given, start)]


def decoded(rows: "datasets.Dataset", table: "pyarrow.Table", column: str) -> list[Any]:
    """The values of a column in a table of the rows, with JSON decoded."""
    return rows.features.decode_batch({column: table[column].to_pylist()})[column]


def _read_local(place: Path) -> dict[str, "datasets.Dataset"]:
    """All splits of a file or a folder, by name."""
    import datasets

    try:
        with quiet():
            if (place / "dataset_dict.json").exists():
                return {
                    str(name): rows for name, rows in datasets.DatasetDict.load_from_disk(str(place)).items()
                }
            if (place / "state.json").exists():
                rows = datasets.Dataset.load_from_disk(str(place))
                return {str(rows.split or "train"): rows, "train": rows}
            if place.is_dir():
                return _read_uncached(str(place.resolve()), _folder_options(place))
            return _read_file(place)
    except InputError:
        raise
    except Exception as error:  # whatever else is raised here is about what lies at `place`
        if fault := disk_fault(error):
            raise fault from error
        raise InputError(f"dataset {str(place)!r} cannot be read ({summary(error)}): check it") from error


def _folder_options(place: Path) -> dict[str, Any]:
    """The options that files of one kind need; a folder of too many other files is refused."""
    files = list(islice(place.rglob("*"), _CRAWLED))
    kinds = Counter(map(kind_of, files))
    if len(files) == _CRAWLED and sum(kinds[kind] for kind in (*_READERS, *_IMAGES)) < _CRAWLED / 2:
        raise InputError(
            f"folder {place} holds {_CRAWLED:,} files or more, most of them no rows: give the folder of "
            "a dataset"
        )
    return _READERS[".csv"][1] if kinds.keys() & _READERS.keys() == {".csv"} else {}


def _read_file(file: Path) -> dict[str, "datasets.Dataset"]:
    if kind_of(file) not in _READERS:
        raise InputError(
            f"{file} has no known ending: expected one of {', '.join(_READERS)}, perhaps with "
            f"{', '.join(PACKED)} behind it, or a folder"
        )
    if file.stat().st_size == 0:
        raise InputError(f"dataset {str(file)!r} is an empty file: give one with rows")
    reader, options = _READERS[kind_of(file)]
    with temporary_folder() as folder:
        plain = file.resolve()
        if file.suffix.lower() in PACKED:
            plain = Path(folder).resolve() / file.stem
            plain.write_bytes(read_bytes(file))
        if reader in ("json", "csv", "text") and not plain.read_bytes().strip():
            raise InputError(f"dataset {str(file)!r} has no rows, only blanks: give one with rows")
        # Escaped, because the reader would expand brackets and stars in the name.
        files = {"data_files": {"train": glob.escape(str(plain))}, **options}
        try:
            return _read_uncached(reader, files)
        except (InputError, ValueError) as error:  # which may name a file that is gone by then
            kind = InputError if isinstance(error, InputError) else ValueError
            raise kind(str(error).replace(str(plain), str(file))) from error.__cause__


def _read_uncached(reader: str, options: dict[str, Any]) -> dict[str, "datasets.Dataset"]:
    """Read into memory by way of a temporary cache, so that no later run reads an outdated copy."""
    import datasets

    def read(cache: str, **more: Any) -> dict[str, "datasets.Dataset"]:
        splits = datasets.load_dataset(reader, cache_dir=cache, keep_in_memory=True, **options, **more)
        return {str(name): rows for name, rows in splits.items()}

    with temporary_folder() as cache:
        builder = datasets.load_dataset_builder(reader, cache_dir=cache, **options)
        if builder.name != "json":
            return read(cache)
        files: Any = builder.config.data_files
        named = {str(split): [named_rows(Path(file)) for file in some] for split, some in files.items()}
        if not all(part.exact for parts in named.values() for part in parts):
            texts = (Path(cache) / f"{number}.jsonl" for number in counting())
            named = {split: [part.rewritten(next(texts)) for part in parts] for split, parts in named.items()}
            paths = {split: [glob.escape(str(part.file)) for part in parts] for split, parts in named.items()}
            reader, options = "json", {"data_files": paths}
        splits = read(cache)
        first = next(iter(splits.values()))
        time = re.compile(r"(timestamp|date(32|64)|time(32|64))\[")
        dated = [field.name for field in first.features.arrow_schema if time.search(str(field.type))]
        if dated:
            # JSON has no times: the reader took texts for them. Columns of type Json stay what they were.
            features = {**first.features, **{column: datasets.Json() for column in dated}}
            splits = read(cache, features=datasets.Features(features))
            splits = {name: _as_texts(rows, first.features, dated) for name, rows in splits.items()}
        return {split: with_names(rows, named[split]) for split, rows in splits.items()}


def _as_texts(
    rows: "datasets.Dataset", features: "datasets.Features", dated: list[str]
) -> "datasets.Dataset":
    """The rows with plain columns that were read as JSON turned into texts; lists and the like stay JSON."""
    import datasets

    plain = [column for column in dated if isinstance(features[column], datasets.Value)]
    text = datasets.Value("string")
    return rows.map(
        lambda batch: {column: batch[column] for column in plain}, batched=True, keep_in_memory=True,
        features=datasets.Features({**rows.features, **dict.fromkeys(plain, text)}),
    )  # fmt: skip


def _read_hub(path: str | Path, revision: str | None) -> dict[str, "datasets.Dataset"]:
    """All splits of a dataset on the hub, by name."""
    import datasets

    name, _, configuration = str(path).partition(":")
    if isinstance(path, Path) or kind_of(Path(name)) in _READERS or not is_hub_name(name):
        raise InputError(f"no dataset {str(path)!r}: no file or folder here has this name; check the path")
    reachable = hub_answers()

    def read() -> dict[str, "datasets.Dataset"]:
        splits = datasets.load_dataset(name, configuration or None, revision=revision)
        return {str(split): rows for split, rows in splits.items()}

    try:
        if reachable:
            with quiet():
                return read()
        with quiet(), offline():
            return read()
    except Exception as error:  # whatever is raised here is about what `path` names
        if reachable:
            raise InputError(
                f"dataset {str(path)!r} cannot be read from the hub ({summary(error)}): "
                "check the name, written as name or name:configuration"
            ) from error
        raise InputError(
            f"no dataset {str(path)!r}: no file or folder here has this name, it is not among the cached "
            "downloads, and the hub does not answer: give the path of a file, or go online"
        ) from error


def _select_split(splits: dict[str, "datasets.Dataset"], split: str, path: str | Path) -> "datasets.Dataset":
    import datasets

    try:
        spans = datasets.ReadInstruction.from_spec(split).to_absolute(
            {name: len(splits[name]) for name in splits}
        )
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"dataset {str(path)!r} has no split {split!r}: it has {', '.join(splits)}; "
            "a slice is written as train[:100] or train[:10%]"
        ) from error
    # `select` would call an empty span that starts where the rows end out of range.
    parts: list[Any] = [
        splits[span.splitname].select(range(span.from_, span.to) if span.from_ < span.to else [])
        for span in spans
    ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
