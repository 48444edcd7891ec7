"""Rows from files, folders and the hub, and their tokens."""

import dataclasses
import glob
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from gradfn.data import IGNORED, Documents, check_lengths, make_documents, offsets_of
from gradfn.errors import InputError
from gradfn.hf.hub import hub_answers, is_hub_name, offline, quiet, summary

if TYPE_CHECKING:
    import datasets
    import pyarrow

__all__ = ["load_rows", "text_query", "tokenize"]

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # Only an empty cell means nothing: pandas would also drop the texts "NA", "None" and "null".
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}

_BATCH = 1000
"""Rows tokenised at once: enough for the tokenizer's threads, few enough to hold as Python lists."""

_EXCERPT = 128
"""Tokens decoded to show a row that came without its text."""

_Encode = Callable[["pyarrow.Table", list[str]], Documents]


def load_rows(path: str | Path, split: str = "train") -> "datasets.Dataset":
    """The rows of a dataset, in memory; a local file is read anew each time and leaves nothing behind.

    Args:
        path: a .jsonl, .json, .csv, .parquet, .arrow or .txt file (one row a line), a folder that
            `save_to_disk` wrote or that holds such files, or a hub name, `name` or `name:configuration`.
        split: a split or a slice of one, such as "train[:100]", "test[10%:20%]" or "train+test". The rows of
            a file, and of a folder with a single unnamed dataset, are "train".

    Raises:
        InputError: there are no such rows, or they cannot be read.

    >>> load_rows("corpus.jsonl")
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: no dataset 'corpus.jsonl': no file or folder here has this name; check the path
    """
    place = Path(path).expanduser()
    rows = _select_split(_read_local(place), split, path) if place.exists() else _read_hub(path, split)
    if len(rows) == 0:
        raise InputError(f"dataset {str(path)!r} has no rows in split {split!r}: give one that has")
    return rows


def tokenize(
    rows: "datasets.Dataset",
    tokenizer: Any,
    *,
    text_column: str = "text",
    prompt_column: str | None = None,
    completion_column: str | None = None,
    max_length: int | None = None,
    truncation: bool = False,
) -> Documents:
    """Documents from rows of text, of prompts and completions, or of token ids.

    Text gets the special tokens that the tokenizer adds. A prompt and its completion are tokenised apart and
    joined, with special tokens only around the whole; the completion alone is supervised. Without those two
    columns, rows that have `input_ids` (and `labels`) are used as they are, less the positions where
    an `attention_mask` is 0. A null text is an empty one.

    Args:
        rows: what `load_rows` returns; a column `id` names the rows.
        tokenizer: may be None for rows that have `input_ids`.
        text_column: the column of texts.
        prompt_column: the column of prompts; needs `completion_column`.
        completion_column: the column of completions, each with its own leading space if it needs one.
        max_length: tokens of a row, at most.
        truncation: cut longer rows instead of refusing them.

    Raises:
        InputError: a column is missing or holds something else, or a row is too long.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"the length limit must be at least 1 token, got {max_length}")
    encode = _choose_encoder(rows, tokenizer, text_column, prompt_column, completion_column)
    parts = []
    for start, table in _tables(rows):
        part = encode(table, _row_ids(table, start))
        parts.append(_fit(part, start, max_length, truncation))
    return _concatenate(parts)


def text_query(
    tokenizer: Any,
    text: str,
    completion: str | None = None,
    *,
    max_length: int | None = None,
    truncation: bool = False,
) -> Documents:
    """One document from a text, or from a prompt and its completion; tokenised as `tokenize` does.

    Args:
        tokenizer: the model's.
        text: the text, or the prompt if there is a completion.
        completion: what the model said; then it alone is supervised.
        max_length: tokens of the query, at most.
        truncation: cut a longer query instead of refusing it.

    Raises:
        InputError: there is nothing to predict in the query, or it is too long.
    """
    if not (text if completion is None else completion).strip():
        raise InputError(
            "the query is empty: give a text, in quotes, or a completion that the model produced"
        )
    if completion is None:
        docs = make_documents(_encode(tokenizer, [text]), texts=[text])
    else:
        docs = _join_pairs(tokenizer, [text], [completion], ["0"])
    docs = _fit(docs, 0, max_length, truncation)
    if docs.supervised[0] == 0:
        raise InputError(
            f"the query {docs.texts[0]!r} is {docs.lengths[0]} token long and leaves nothing to predict: "
            "give a longer text, or allow more tokens"
        )
    return docs


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
                return _read_uncached(str(place.resolve()), {})
            return _read_file(place)
    except InputError:
        raise
    except Exception as error:  # whatever is raised here is about what lies at `place`
        raise InputError(f"dataset {str(place)!r} cannot be read ({summary(error)}): check it") from error


def _read_file(file: Path) -> dict[str, "datasets.Dataset"]:
    if file.suffix.lower() not in _READERS:
        raise InputError(f"cannot tell what {file} holds: expected one of {', '.join(_READERS)}, or a folder")
    if file.stat().st_size == 0:
        raise InputError(f"dataset {str(file)!r} is an empty file: give one with rows")
    reader, options = _READERS[file.suffix.lower()]
    # The name stands for itself, whatever brackets and stars are in it.
    return _read_uncached(reader, {"data_files": {"train": glob.escape(str(file.resolve()))}, **options})


def _read_uncached(reader: str, options: dict[str, Any]) -> dict[str, "datasets.Dataset"]:
    """Read into memory by way of a temporary cache, which no later run can mistake for fresh."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="gradfn-") as cache:
        splits = datasets.load_dataset(reader, cache_dir=cache, keep_in_memory=True, **options)
        return {str(name): rows for name, rows in splits.items()}


def _read_hub(path: str | Path, split: str) -> "datasets.Dataset":
    import datasets

    name, _, configuration = str(path).partition(":")
    if isinstance(path, Path) or Path(name).suffix.lower() in _READERS or not is_hub_name(name):
        raise InputError(f"no dataset {str(path)!r}: no file or folder here has this name; check the path")
    reachable = hub_answers()
    try:
        if reachable:
            with quiet():
                return datasets.load_dataset(name, configuration or None, split=split)
        with quiet(), offline():
            return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # whatever is raised here is about what `path` names
        if reachable:
            raise InputError(
                f"dataset {str(path)!r}, split {split!r}, cannot be read from the hub ({summary(error)}): "
                "check the name, written as name or name:configuration"
            ) from error
        raise InputError(
            f"no dataset {str(path)!r}: no file or folder here has this name, it is not among the cached "
            "downloads, and the hub does not answer; give the path of a file, or go online"
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
    # A span that starts where the rows end is empty, but `select` would call it out of range.
    parts: list[Any] = [
        splits[span.splitname].select(range(span.from_, span.to) if span.from_ < span.to else [])
        for span in spans
    ]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _choose_encoder(
    rows: "datasets.Dataset",
    tokenizer: Any,
    text_column: str,
    prompt_column: str | None,
    completion_column: str | None,
) -> _Encode:
    """How a table of rows becomes documents; refuses columns that cannot."""
    paired = [column for column in (prompt_column, completion_column) if column is not None]
    if len(paired) == 1:
        raise InputError(
            f"a prompt column and a completion column go together, got only {paired[0]!r}: name both"
        )
    if not paired and "input_ids" in rows.column_names:
        text_column = text_column if text_column in rows.column_names else ""
        return lambda table, ids: _from_token_ids(table, ids, tokenizer, text_column)
    if tokenizer is None:
        raise InputError(
            "rows of text need a tokenizer, got none: give one, or rows with a column 'input_ids'"
        )
    for column in paired or [text_column]:
        _check_text(rows, column)
    if paired:
        prompt, completion = paired
        return lambda table, ids: _join_pairs(
            tokenizer, _texts(table, prompt), _texts(table, completion), ids
        )
    return lambda table, ids: _from_texts(tokenizer, _texts(table, text_column), ids)


def _check_text(rows: "datasets.Dataset", column: str) -> None:
    if column not in rows.column_names:
        raise InputError(
            f"no column {column!r} in the dataset, which has {', '.join(rows.column_names)}: "
            "name one with --text-column, or two with --prompt-column and --completion-column"
        )
    kind = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)
    if kind not in ("string", "large_string", "string_view", "null"):
        raise InputError(f"column {column!r} holds {kind}, not text: name a column of text")


def _tables(rows: "datasets.Dataset") -> Iterator[tuple[int, "pyarrow.Table"]]:
    tables: Any = rows.with_format("arrow")
    for start in range(0, len(rows), _BATCH):
        yield start, tables[start : start + _BATCH]


def _row_ids(table: "pyarrow.Table", start: int) -> list[str]:
    numbers = range(start, start + len(table))
    if "id" not in table.column_names:
        return [str(number) for number in numbers]
    given = table["id"].to_pylist()
    return [str(number if name is None else name) for number, name in zip(numbers, given, strict=True)]


def _texts(table: "pyarrow.Table", column: str) -> list[str]:
    return [text or "" for text in table[column].to_pylist()]


def _encode(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _from_texts(tokenizer: Any, texts: list[str], ids: list[str]) -> Documents:
    return make_documents(_encode(tokenizer, texts), ids=ids, texts=texts)


def _join_pairs(tokenizer: Any, prompts: list[str], completions: list[str], ids: list[str]) -> Documents:
    tail = _special_tail(tokenizer)
    heads = [tokens[: len(tokens) - len(tail)] for tokens in _encode(tokenizer, prompts)]
    bodies = [tokens + tail for tokens in _encode_continuations(tokenizer, completions)]
    pairs = list(zip(heads, bodies, strict=True))
    return make_documents(
        [head + body for head, body in pairs],
        [[IGNORED] * len(head) + body for head, body in pairs],
        ids=ids,
        texts=[prompt + completion for prompt, completion in zip(prompts, completions, strict=True)],
    )


def _special_tail(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer adds at the end of a text."""
    plain, whole = _encode(tokenizer, ["a"], special=False)[0], _encode(tokenizer, ["a"])[0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[start + len(plain) :] if plain else []
    return []


def _encode_continuations(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that stand behind another, without special tokens.

    Some tokenizers put a space before every text. It does not belong inside a document, so a text is there
    tokenised behind a line break, whose tokens are then taken away.
    """
    anchor = "\n"
    first, lone, behind = _encode(tokenizer, [anchor, "a", anchor + "a"], special=False)
    plain = _encode(tokenizer, texts, special=False)
    if behind == first + lone:
        return plain
    anchored = _encode(tokenizer, [anchor + text for text in texts], special=False)
    # A break that merged with the text cannot be taken away; such a text stays as it was.
    return [
        whole[len(first) :] if whole[: len(first)] == first else own
        for own, whole in zip(plain, anchored, strict=True)
    ]


def _from_token_ids(table: "pyarrow.Table", ids: list[str], tokenizer: Any, text_column: str) -> Documents:
    tokens, lengths = _integers(table, "input_ids", 0)
    labels, label_lengths = (
        _integers(table, "labels", IGNORED) if "labels" in table.column_names else (tokens, lengths)
    )
    check_lengths(lengths, label_lengths, "labels")
    if "attention_mask" in table.column_names:
        mask, mask_lengths = _integers(table, "attention_mask", 0)
        check_lengths(lengths, mask_lengths, "mask values")
        rows = np.repeat(np.arange(len(lengths)), lengths)[mask > 0]
        tokens, labels, lengths = (
            tokens[mask > 0],
            labels[mask > 0],
            np.bincount(rows, minlength=len(lengths)),
        )
    offsets = offsets_of(lengths)
    if text_column:
        texts = _texts(table, text_column)
    else:
        texts = [
            _excerpt(tokenizer, tokens[start : start + min(_EXCERPT, size)])
            for start, size in zip(offsets, lengths, strict=False)
        ]
    return Documents(tokens.astype(np.int32), labels.astype(np.int32), offsets, ids, texts)


def _integers(
    table: "pyarrow.Table", column: str, least: int
) -> tuple[Int64[np.ndarray, " all"], Int64[np.ndarray, " rows"]]:
    """A column of lists of integers, end to end, and the length of each list."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made at run time, unknown to type checkers
    kind: Any = table.schema.field(column).type
    if not (hasattr(kind, "value_type") and str(kind.value_type).startswith(("int", "uint"))):
        raise InputError(
            f"column {column!r} holds {kind}, expected a list of integers a row: tokenise the rows again"
        )
    lists = table[column]
    values, lengths = pc.list_flatten(lists), pc.fill_null(pc.list_value_length(lists), 0)
    if values.null_count:
        raise InputError(
            f"column {column!r} has gaps, expected a whole number a token: tokenise the rows again"
        )
    numbers = values.to_numpy().astype(np.int64)
    bad = numbers[(numbers < least) | (numbers >= 2**31)]
    if len(bad):
        raise InputError(
            f"column {column!r} holds {bad[0]}, expected {least} or more, in 31 bits: tokenise again"
        )
    return numbers, lengths.to_numpy().astype(np.int64)


def _excerpt(tokenizer: Any, tokens: np.ndarray) -> str:
    return " ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens.tolist())


def _fit(docs: Documents, start: int, max_length: int | None, truncation: bool) -> Documents:
    """Cut rows to `max_length`, or refuse the first that is longer; `start` is the first row's number."""
    if max_length is None or not (docs.lengths > max_length).any():
        return docs
    if not truncation:
        row = int(np.argmax(docs.lengths > max_length))
        raise InputError(
            f"row {start + row} (id {docs.ids[row]!r}) has {docs.lengths[row]} tokens, more than the limit "
            f"of {max_length}: cut such rows with --truncation, or split them"
        )
    lengths = np.minimum(docs.lengths, max_length)
    kept = np.arange(len(docs.input_ids)) - np.repeat(docs.offsets[:-1], docs.lengths) < max_length
    return dataclasses.replace(
        docs, input_ids=docs.input_ids[kept], labels=docs.labels[kept], offsets=offsets_of(lengths)
    )


def _concatenate(parts: list[Documents]) -> Documents:
    if not parts:
        return make_documents([])
    return Documents(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        offsets_of(np.concatenate([part.lengths for part in parts])),
        [name for part in parts for name in part.ids],
        [text for part in parts for text in part.texts],
    )
