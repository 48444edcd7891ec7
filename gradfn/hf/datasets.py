"""Rows from files, folders and the hub, and their tokens."""

import dataclasses
import glob
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Int64

from gradfn.data import IGNORED, Corpus, Documents, Pairs, check_lengths, make_documents, offsets_of
from gradfn.errors import InputError
from gradfn.hf.hub import hub_answers, is_hub_name, offline, quiet, summary
from gradfn.hf.models import probe_word
from gradfn.model.losses import advantages

if TYPE_CHECKING:
    import datasets
    import pyarrow

__all__ = [
    "load_rows", "text_pair", "text_query", "tokenize", "tokenize_pairs", "with_labels", "with_weights",
]  # fmt: skip

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    # Only an empty cell means nothing: pandas would also drop the texts "NA", "None" and "null". Ids, of rows
    # and of their sources, are the texts that they are, 007 say.
    ".csv": (
        "csv",
        {"keep_default_na": False, "na_values": [""], "converters": {"id": str, "source": str}},
    ),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}

_BATCH = 1000
"""Rows tokenised at once: enough for the tokenizer's threads, few enough to hold as Python lists."""

_EXCERPT = 128
"""Tokens decoded to show a row that came without its text."""

_Encode = Callable[["pyarrow.Table", list[str]], Documents]
Weighed = TypeVar("Weighed", bound=Corpus)


def load_rows(path: str | Path, split: str = "train") -> "datasets.Dataset":
    """The rows of a dataset, in memory; a local file is read anew each time and leaves nothing behind.

    Texts of JSON that look like times stay texts, and so do the columns `id` and `source` of a .csv.

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
    messages_column: str | None = None,
    max_length: int | None = None,
    truncation: bool = False,
) -> Documents:
    """Documents from rows of text, of prompts and completions, of chats, or of token ids.

    Text gets the special tokens that the tokenizer adds. A prompt and its completion are tokenised apart and
    joined, with special tokens only around the whole; the completion alone is supervised. Without those two
    columns, rows that have `input_ids` (and `labels` and `token_type_ids`, lists too) are used as they are,
    less the positions where an `attention_mask` is 0. A null text is an empty one.

    A chat goes through the tokenizer's template. Supervised are the tokens that the template marks as the
    assistant's (`{% generation %}`); where it marks none, the assistant's last message alone.

    Args:
        rows: what `load_rows` returns; a column `id` names the rows.
        tokenizer: may be None for rows that have `input_ids`.
        text_column: the column of texts.
        prompt_column: the column of prompts; needs `completion_column`.
        completion_column: the column of completions, each with its own leading space if it needs one.
        messages_column: the column of chats, lists of messages with `role` and `content`.
        max_length: tokens of a row, at most.
        truncation: cut longer rows instead of refusing them.

    Raises:
        InputError: a column is missing or holds something else, or a row is too long.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"the length limit must be at least 1 token, got {max_length}")
    if messages_column is None:
        encode = _choose_encoder(rows, tokenizer, text_column, prompt_column, completion_column)
    else:
        encode = _chat_encoder(rows, tokenizer, messages_column)
    parts = []
    for start, table in _tables(rows):
        part = encode(table, _row_ids(rows, table, start))
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


def tokenize_pairs(
    rows: "datasets.Dataset",
    tokenizer: Any,
    *,
    prompt_column: str,
    completion_column: str,
    max_length: int | None = None,
    truncation: bool = False,
) -> Pairs:
    """Inputs and outputs of an encoder-decoder model, each with the special tokens that the tokenizer adds.

    Args:
        rows, tokenizer, max_length, truncation: see `tokenize`; the limit is that of each side.
        prompt_column: the column of inputs.
        completion_column: the column of outputs.

    Raises:
        InputError: a column is missing or holds something else, or a row is too long.
    """
    _check_text(rows, prompt_column)
    _check_text(rows, completion_column)
    inputs, outputs = [], []
    for start, table in _tables(rows):
        ids = _row_ids(rows, table, start)
        for parts, column, target in ((inputs, prompt_column, False), (outputs, completion_column, True)):
            texts = _texts(table, column)
            part = make_documents(_encode_side(tokenizer, texts, target), ids=ids, texts=texts)
            parts.append(_fit(part, start, max_length, truncation))
    return Pairs(_concatenate(inputs), _concatenate(outputs))


def text_pair(
    tokenizer: Any, text: str, completion: str, *, max_length: int | None = None, truncation: bool = False
) -> Pairs:
    """One pair from an input and an output; tokenised as `tokenize_pairs` does."""
    sides = [
        _fit(make_documents(_encode_side(tokenizer, [side], target), texts=[side]), 0, max_length, truncation)
        for side, target in ((text, False), (completion, True))
    ]
    return Pairs(*sides)


def with_labels(
    docs: Documents, rows: "datasets.Dataset", column: str, classes: Mapping[str, int] | None
) -> Documents:
    """Documents with a label each instead of token labels.

    Args:
        docs: what `tokenize` made of the rows.
        rows: the rows.
        column: class numbers or names, see `class_numbers`; or the numbers that a regression is to give.
        classes: the numbers of the model's classes by name, `config.label2id`; None for a regression.

    Raises:
        InputError: there is no such column, or a row's label is none.
    """
    if classes is None:
        labels = _numbers(column_values(rows, column, "--label-column"), column)
    else:
        labels = class_numbers(rows, column, classes)
    if (docs.lengths == 0).any():
        row = int(np.argmin(docs.lengths))
        raise InputError(f"row {row} (id {docs.ids[row]!r}) has no tokens to read: leave it out")
    return dataclasses.replace(docs, extras={**docs.extras, "labels": labels})


def with_weights(
    docs: Weighed,
    rows: "datasets.Dataset",
    *,
    advantage_column: str | None = None,
    reward_column: str | None = None,
    prompt_column: str | None = None,
    messages_column: str | None = None,
) -> Weighed:
    """Documents with a weight each, which multiplies its loss.

    Args:
        docs: what `tokenize` or `tokenize_pairs` made of the rows.
        rows: the rows.
        advantage_column: the weights themselves; or else
        reward_column: rewards, of which the mean over the rows with the same prompt is taken; see
            `advantages`.
        prompt_column: the column of prompts, for rewards; or else
        messages_column: the column of chats; what stands before the assistant's last message is the prompt.

    Raises:
        InputError: not one of the two columns is given, is there and holds numbers, or nothing is a prompt.
    """
    if (advantage_column is None) == (reward_column is None):
        raise InputError("weights come of rewards or are given as advantages: name one of the two columns")
    if advantage_column is not None:
        weights = _numbers(column_values(rows, advantage_column, "--advantage-column"), advantage_column)
    else:
        assert reward_column is not None
        prompts = _prompts(rows, prompt_column, messages_column)
        rewards = _numbers(column_values(rows, reward_column, "--reward-column"), reward_column)
        weights = np.array(advantages(rewards.tolist(), prompts), np.float64)
    if isinstance(docs, Pairs):
        inputs = dataclasses.replace(docs.inputs, extras={**docs.extras, "weight": weights})
        return dataclasses.replace(docs, inputs=inputs)
    return dataclasses.replace(docs, extras={**docs.extras, "weight": weights})


def _prompts(rows: "datasets.Dataset", prompt_column: str | None, messages_column: str | None) -> list[Any]:
    """What each row answers."""
    if prompt_column is not None:
        return column_values(rows, prompt_column, "--prompt-column")
    if messages_column is None:
        raise InputError(
            "a reward is compared with others of its prompt, and these rows have none: give prompts and "
            "completions or chats, or weights of your own as --advantage-column"
        )
    chats = column_values(rows, messages_column, "--messages-column")
    asked = (_messages(chat, messages_column, str(row))[:-1] for row, chat in enumerate(chats))
    return [json.dumps(messages, sort_keys=True, default=str) for messages in asked]


def check_vocabulary(docs: Documents, size: int) -> None:
    """Refuse tokens, or labels of tokens, that a model does not have.

    Args:
        docs: what `tokenize` made of rows.
        size: how many tokens the model has.

    Raises:
        InputError: naming the first row with one.

    >>> from gradfn.data import make_documents
    >>> check_vocabulary(make_documents([[5], [6, 7]]), 7)
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: row 1 (id '1') has token 7, and the model has 7 tokens...
    """
    for noun, tokens in (("token", docs.input_ids), ("label", docs.labels)):
        for place in np.flatnonzero(tokens >= size)[:1]:
            row = int(np.searchsorted(docs.offsets, place, "right")) - 1
            raise InputError(
                f"row {row} (id {docs.ids[row]!r}) has {noun} {tokens[place]}, and the model has {size} "
                "tokens, numbered from 0: tokenise the rows with the model's own tokenizer"
            )


def column_values(rows: "datasets.Dataset", column: str, option: str) -> list[Any]:
    """A column; one that is not there is refused, with the option that names it."""
    if column not in rows.column_names:
        raise InputError(
            f"no column {column!r} in the dataset, which has {', '.join(rows.column_names)}: "
            f"name another with {option}"
        )
    return list(rows[column])


def _numbers(values: list[Any], column: str) -> np.ndarray:
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise InputError(f"row {row} has {value!r} in column {column!r}, expected a number: mend it")
    return np.array(values, np.float64)


def class_numbers(
    rows: "datasets.Dataset", column: str, classes: Mapping[str, int]
) -> Int64[np.ndarray, " rows"]:
    """The model's number of each row's class; by name where both the dataset and the model name classes.

    Args:
        rows: the rows.
        column: class numbers or names.
        classes: the numbers of the model's classes by name, `config.label2id`.

    Raises:
        InputError: there is no such column, or a row's label is no class of the model's.
    """
    values = column_values(rows, column, "--label-column")
    names = getattr(rows.features[column], "names", None)
    unnamed = all(name == f"LABEL_{number}" for name, number in classes.items())
    if names is not None and not unnamed:
        values = [names[value] if value is not None and value >= 0 else value for value in values]
    return np.array([_class_number(value, row, classes) for row, value in enumerate(values)], np.int64)


def _class_number(value: Any, row: int, classes: Mapping[str, int]) -> int:
    """The number of a class that is given by its name or its number."""
    if isinstance(value, str) and value in classes:
        return int(classes[value])
    if isinstance(value, int) and 0 <= value < len(classes):
        return int(value)
    known = ", ".join([*classes][:8]) + (", ..." if len(classes) > 8 else "")
    raise InputError(
        f"row {row} has the label {value!r}, expected a number from 0 to {len(classes) - 1} or one of "
        f"{known}: mend it, or name another --label-column"
    )


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
                kinds = {file.suffix.lower() for file in place.rglob("*")} & _READERS.keys()
                return _read_uncached(str(place.resolve()), _READERS[".csv"][1] if kinds == {".csv"} else {})
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

    def read(cache: str, **more: Any) -> dict[str, "datasets.Dataset"]:
        splits = datasets.load_dataset(reader, cache_dir=cache, keep_in_memory=True, **options, **more)
        return {str(name): rows for name, rows in splits.items()}

    with tempfile.TemporaryDirectory(prefix="gradfn-") as cache:
        splits = read(cache)
        first = next(iter(splits.values()))
        if first.info.builder_name != "json" or not (dated := _dated(first.features)):
            return splits
        # JSON knows no times: these were texts, and read as JSON of their own they stay what they were.
        features = {**first.features, **{column: datasets.Json() for column in dated}}
        splits = read(cache, features=datasets.Features(features))
        return {name: _as_texts(rows, first.features, dated) for name, rows in splits.items()}


def _dated(features: "datasets.Features") -> list[str]:
    """The columns in which texts were taken for times."""
    time = re.compile(r"(timestamp|date(32|64)|time(32|64))\[")
    return [field.name for field in features.arrow_schema if time.search(str(field.type))]


def _as_texts(
    rows: "datasets.Dataset", features: "datasets.Features", dated: list[str]
) -> "datasets.Dataset":
    """The rows with columns of texts as such, which were read as JSON; lists and the like stay JSON."""
    import datasets

    plain = [column for column in dated if isinstance(features[column], datasets.Value)]
    text = datasets.Value("string")
    return rows.map(
        lambda batch: {column: batch[column] for column in plain}, batched=True, keep_in_memory=True,
        features=datasets.Features({**rows.features, **dict.fromkeys(plain, text)}),
    )  # fmt: skip


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


def _chat_encoder(rows: "datasets.Dataset", tokenizer: Any, column: str) -> _Encode:
    """How a table of chats becomes documents; refuses a column or a tokenizer that cannot."""
    if column not in rows.column_names:
        raise InputError(
            f"no column {column!r} in the dataset, which has {', '.join(rows.column_names)}: "
            "name another with --messages-column"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "chats need a tokenizer with a chat template, and this one has none: use the model's tuned "
            "version, or turn the chats into prompts and completions"
        )
    marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()))
    encode = _marked_chat if marked else _last_answer

    def documents(table: "pyarrow.Table", ids: list[str]) -> Documents:
        given = _decoded(rows, table, column)
        chats = [_messages(chat, column, name) for chat, name in zip(given, ids, strict=True)]
        tokens, labels, texts = zip(
            *(encode(tokenizer, chat, name) for chat, name in zip(chats, ids, strict=True)), strict=True
        )
        return make_documents(tokens, labels, ids=ids, texts=texts)

    return documents


def _messages(chat: Any, column: str, name: str) -> list[dict[str, Any]]:
    """A chat up to the assistant's last message; what comes after it has no loss."""
    if not isinstance(chat, list) or not all(isinstance(m, dict) and "role" in m for m in chat):
        raise InputError(f"row {name} of column {column!r} is no chat: give a list of role and content")
    said = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    if not said:
        raise InputError(f"the chat of row {name} has no message of the assistant's: leave it out")
    return chat[: said[-1] + 1]


_Encoded = tuple[list[int], list[int], str]


def _templated(tokenizer: Any, chat: list[dict[str, Any]], name: str, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, **options)
    except Exception as error:  # a template is a program of the tokenizer's author's
        raise InputError(
            f"the chat template cannot take the chat of row {name} ({summary(error)}): mend it"
        ) from error


def _marked_chat(tokenizer: Any, chat: list[dict[str, Any]], name: str) -> _Encoded:
    """Tokens and labels of a chat whose template marks what the assistant says."""
    made = _templated(tokenizer, chat, name, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
    labels = [token if own else IGNORED for token, own in pairs]
    return list(made["input_ids"]), labels, _templated(tokenizer, chat, name, tokenize=False)


def _last_answer(tokenizer: Any, chat: list[dict[str, Any]], name: str) -> _Encoded:
    """Tokens and labels of a chat of which the last message is supervised."""
    whole = list(_templated(tokenizer, chat, name, return_dict=True)["input_ids"])
    asked = _templated(tokenizer, chat[:-1], name, return_dict=True, add_generation_prompt=True)["input_ids"]
    if list(asked) != whole[: len(asked)]:
        raise InputError(
            f"the chat template writes row {name} up to the answer otherwise than in the whole chat, so the "
            "answer's tokens cannot be told: use prompts and completions, or mark it with {% generation %}"
        )
    labels = [IGNORED] * len(asked) + whole[len(asked) :]
    return whole, labels, _templated(tokenizer, chat, name, tokenize=False)


def _check_text(rows: "datasets.Dataset", column: str) -> None:
    if column not in rows.column_names:
        raise InputError(
            f"no column {column!r} in the dataset, which has {', '.join(rows.column_names)}: "
            "name one with --text-column, or two with --prompt-column and --completion-column"
        )
    kind = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)
    if kind not in ("string", "large_string", "string_view", "null"):
        raise InputError(
            f"column {column!r} holds {kind}, not text: name one of text, or give JSON with values in quotes"
        )


def _tables(rows: "datasets.Dataset") -> Iterator[tuple[int, "pyarrow.Table"]]:
    tables: Any = rows.with_format("arrow")
    for start in range(0, len(rows), _BATCH):
        yield start, tables[start : start + _BATCH]


def _row_ids(rows: "datasets.Dataset", table: "pyarrow.Table", start: int) -> list[str]:
    given = _decoded(rows, table, "id") if "id" in table.column_names else [None] * len(table)
    return [str(row if name is None else name) for row, name in enumerate(given, start)]


def row_names(rows: "datasets.Dataset") -> list[str]:
    """The names of all rows, which are their numbers where none are given."""
    return [name for start, table in _tables(rows) for name in _row_ids(rows, table, start)]


def _decoded(rows: "datasets.Dataset", table: "pyarrow.Table", column: str) -> list[Any]:
    """A column of a table of the rows; what lies there as JSON is decoded."""
    return rows.features.decode_batch({column: table[column].to_pylist()})[column]


def _texts(table: "pyarrow.Table", column: str) -> list[str]:
    return [text or "" for text in table[column].to_pylist()]


def _encode(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)[
        "input_ids"
    ]


def _encode_side(tokenizer: Any, texts: list[str], target: bool) -> list[list[int]]:
    """Tokens of inputs or, in the tokenizer's own way with these, of outputs."""
    given = {"text_target": texts} if target else {"text": texts}
    return tokenizer(**given, return_attention_mask=False, verbose=False)["input_ids"]


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
    word = probe_word(tokenizer)
    plain, whole = _encode(tokenizer, [word], special=False)[0], _encode(tokenizer, [word])[0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[start + len(plain) :] if plain else []
    return []


def _encode_continuations(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that stand behind another, without special tokens.

    Some tokenizers put a space before every text. It does not belong inside a document, so a text is there
    tokenised behind a line break, whose tokens are then taken away.
    """
    anchor, word = "\n", probe_word(tokenizer)
    first, lone, behind = _encode(tokenizer, [anchor, word, anchor + word], special=False)
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
    labels, types = tokens, np.zeros_like(tokens)
    if _holds_lists(table, "labels"):
        labels, label_lengths = _integers(table, "labels", IGNORED)
        check_lengths(lengths, label_lengths, "labels")
    if "token_type_ids" in table.column_names:
        types, type_lengths = _integers(table, "token_type_ids", 0)
        check_lengths(lengths, type_lengths, "token types")
    if "attention_mask" in table.column_names:
        mask, mask_lengths = _integers(table, "attention_mask", 0)
        check_lengths(lengths, mask_lengths, "mask values")
        rows, kept = np.repeat(np.arange(len(lengths)), lengths), mask > 0
        tokens, labels, types = tokens[kept], labels[kept], types[kept]
        lengths = np.bincount(rows[kept], minlength=len(lengths))
    offsets = offsets_of(lengths)
    if text_column:
        texts = _texts(table, text_column)
    else:
        texts = [
            _excerpt(tokenizer, tokens[start : start + min(_EXCERPT, size)])
            for start, size in zip(offsets, lengths, strict=False)
        ]
    types = types.astype(np.int32) if types.any() else None
    return Documents(tokens.astype(np.int32), labels.astype(np.int32), offsets, ids, texts, token_types=types)


def _holds_lists(table: "pyarrow.Table", column: str) -> bool:
    """Whether there are labels of tokens, not of rows."""
    return column in table.column_names and hasattr(table.schema.field(column).type, "value_type")


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
    types = None if docs.token_types is None else docs.token_types[kept]
    return dataclasses.replace(
        docs, input_ids=docs.input_ids[kept], labels=docs.labels[kept], offsets=offsets_of(lengths),
        token_types=types,
    )  # fmt: skip


def _concatenate(parts: list[Documents]) -> Documents:
    if not parts:
        return make_documents([])
    types = None
    if any(part.token_types is not None for part in parts):
        types = [np.zeros_like(p.labels) if p.token_types is None else p.token_types for p in parts]
    return Documents(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        offsets_of(np.concatenate([part.lengths for part in parts])),
        [name for part in parts for name in part.ids],
        [text for part in parts for text in part.texts],
        token_types=None if types is None else np.concatenate(types),
    )
