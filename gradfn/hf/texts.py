"""Documents from rows of texts, of prompts with completions, of chats, or of token ids."""

import dataclasses
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
from jaxtyping import Int64

from gradfn.data import IGNORED, Documents, Pairs, check_lengths, make_documents, offsets_of
from gradfn.errors import InputError
from gradfn.hf.chats import Encoder, chat_encoder, holds_chats, pair_encoder
from gradfn.hf.datasets import check_column, check_dataset, row_ids, tables
from gradfn.hf.tokenizers import no_panic, probe_word
from gradfn.shown import asked_and_said, brief

if TYPE_CHECKING:
    import datasets
    import pyarrow

_EXCERPT = 128
"""Tokens decoded to show a row that came without its text."""


class Columns(TypedDict, total=False):
    """Where the texts of rows stand; see `tokenize`."""

    text_column: str
    prompt_column: str | None
    completion_column: str | None
    messages_column: str | None


def tokenize(
    rows: "datasets.Dataset",
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncation: bool = False,
    special_tokens: bool = True,
    **columns: Unpack[Columns],
) -> Documents:
    """Documents from rows of text, of prompts and completions, of chats, or of token ids.

    A text gets the special tokens that the tokenizer adds. A prompt and its completion are tokenised apart
    and joined, with special tokens only around the whole; only the completion is supervised. Without those
    two columns, rows that have `input_ids` (and perhaps lists of `labels` and `token_type_ids`) are used as
    they are, without the positions where an `attention_mask` is 0. A null text counts as an empty one.

    A chat goes through the tokenizer's template. The tokens that the template marks as the assistant's
    (`{% generation %}`) are supervised; where it marks none, only the assistant's last message is. Prompts
    and completions may be lists of messages too; then the messages of the completion are supervised. Keys of
    messages that are null count as absent.

    Args:
        rows: what `load_rows` returns; a column `id` names the rows.
        tokenizer: may be None for rows that have `input_ids`.
        max_length: tokens of a row, at most.
        truncation: cut longer rows instead of refusing them.
        special_tokens: add those of the tokenizer to texts, and to prompts with their completions.
        columns: `text_column`, that of texts, "text" unless told; `prompt_column` and `completion_column`,
            given together, with completions that have a leading space if they need one; `messages_column`,
            that of chats, lists of messages with `role` and `content`.

    Raises:
        InputError: a column is missing or holds something else, or a row is too long.
    """
    if max_length is not None and max_length < 1:
        raise InputError(f"the length limit must be at least 1 token, got {max_length}")
    check_dataset(rows)
    encode, parts = _choose_encoder(rows, tokenizer, special_tokens, **columns), []
    for start, table in tables(rows, "tokenizing"):
        part = encode(table, row_ids(rows, table, start))
        parts.append(_fit(part, start, max_length, truncation))
    return _concatenate(parts)


def text_query(
    tokenizer: Any,
    text: str,
    completion: str | None = None,
    *,
    max_length: int | None = None,
    truncation: bool = False,
    special_tokens: bool = True,
) -> Documents:
    """One document from a text, or from a prompt and its completion; tokenised as `tokenize` does.

    Args:
        tokenizer: the model's.
        text: the text, or the prompt if there is a completion.
        completion: what the model said; if it is given, only this part is supervised.
        max_length: tokens of the query, at most.
        truncation: cut a longer query instead of refusing it.
        special_tokens: see `tokenize`.

    Raises:
        InputError: the query has no token to predict, or it is too long.
    """
    if not (text if completion is None else completion).strip():
        raise InputError(
            "the query is empty: give a text, in quotes, or a completion that the model produced"
        )
    if completion is None:
        docs = make_documents(_encode(tokenizer, [text], special_tokens), texts=[text])
    else:
        docs = _join_pairs(tokenizer, [text], [completion], ["0"], special_tokens)
    docs = _fit(docs, 0, max_length, truncation)
    if docs.supervised[0] == 0:
        raise InputError(
            f"the query {docs.texts[0]!r} leaves nothing to predict (tokens in all: {docs.lengths[0]}): "
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
        rows, tokenizer, max_length, truncation: see `tokenize`; the limit holds for each side.
        prompt_column: the column of inputs.
        completion_column: the column of outputs.

    Raises:
        InputError: a column is missing or holds something else, or a row is too long.
    """
    _check_text(rows, prompt_column)
    _check_text(rows, completion_column)
    inputs, outputs = [], []
    for start, table in tables(rows, "tokenizing"):
        ids = row_ids(rows, table, start)
        for parts, column, target in ((inputs, prompt_column, False), (outputs, completion_column, True)):
            texts = _texts(table, column)
            part = make_documents(_encode_side(tokenizer, texts, target), ids=ids, texts=texts)
            parts.append(_fit(part, start, max_length, truncation))
    return Pairs(_concatenate(inputs), _concatenate(outputs))


def text_pair(
    tokenizer: Any, text: str, completion: str, *, max_length: int | None = None, truncation: bool = False
) -> Pairs:
    """One pair from an input and an output; tokenised as `tokenize_pairs` does.

    Args:
        tokenizer: the model's.
        text: the input.
        completion: the output.
        max_length, truncation: see `tokenize`; the limit holds for each side.

    Raises:
        InputError: a side is too long.
    """
    sides = [
        _fit(make_documents(_encode_side(tokenizer, [side], target), texts=[side]), 0, max_length, truncation)
        for side, target in ((text, False), (completion, True))
    ]
    return Pairs(*sides)


def begins_twice(docs: Documents, tokenizer: Any) -> int:
    """How many rows begin with the first token of the tokenizer twice: once added, and once in their text."""
    first = getattr(tokenizer, "bos_token_id", None)
    starts = docs.offsets[:-1][docs.lengths > 1]
    return int(((docs.input_ids[starts] == first) & (docs.input_ids[starts + 1] == first)).sum())


def check_vocabulary(docs: Documents, size: int) -> None:
    """Refuse tokens, or labels of tokens, that a model does not have.

    Args:
        docs: what `tokenize` made of rows.
        size: how many tokens the model has.

    Raises:
        InputError: a row has such a token; the first one is named.

    >>> from gradfn.data import make_documents
    >>> check_vocabulary(make_documents([[5], [6, 7]]), 7)
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: row 1 (id '1') has token 7, but the model has 7 tokens...
    """
    for noun, tokens in (("token", docs.input_ids), ("label", docs.labels)):
        for place in np.flatnonzero(tokens >= size)[:1]:
            row = int(np.searchsorted(docs.offsets, place, "right")) - 1
            raise InputError(
                f"row {row} (id {brief(docs.ids[row])}) has {noun} {tokens[place]}, but the model has {size} "
                "tokens, numbered from 0: tokenise the rows with the model's own tokenizer"
            )


def _choose_encoder(
    rows: "datasets.Dataset",
    tokenizer: Any,
    special: bool,
    text_column: str = "text",
    prompt_column: str | None = None,
    completion_column: str | None = None,
    messages_column: str | None = None,
) -> Encoder:
    """The function that makes documents of a table of rows; columns that do not fit are refused."""
    if messages_column is not None:
        return chat_encoder(rows, tokenizer, messages_column)
    paired = [column for column in (prompt_column, completion_column) if column is not None]
    if len(paired) == 1:
        raise InputError(
            f"a prompt column and a completion column go together, got only {paired[0]!r}: name both"
        )
    if not paired and "input_ids" in rows.column_names:
        if text_column != "text":
            check_column(rows, text_column, "give another text_column")
        text_column = text_column if text_column in rows.column_names else ""
        return lambda table, ids: _from_token_ids(table, ids, tokenizer, text_column)
    if tokenizer is None:
        raise InputError(
            "rows of text need a tokenizer, got none: give one, or rows with a column 'input_ids'"
        )
    if paired and all(holds_chats(rows, column) for column in paired):
        return pair_encoder(rows, tokenizer, *paired)
    for column in paired or [text_column]:
        _check_text(rows, column)
    if paired:
        prompt, completion = paired
        return lambda table, ids: _join_pairs(
            tokenizer, _texts(table, prompt), _texts(table, completion), ids, special
        )

    def documents(table: "pyarrow.Table", ids: list[str]) -> Documents:
        texts = _texts(table, text_column)
        return make_documents(_encode(tokenizer, texts, special), ids=ids, texts=texts)

    return documents


def _check_text(rows: "datasets.Dataset", column: str) -> None:
    check_column(rows, column, "give another text_column, or a prompt_column and a completion_column")
    kind = getattr(rows.features[column], "dtype", type(rows.features[column]).__name__)
    if kind not in ("string", "large_string", "string_view", "null"):
        pairs = enumerate(rows[column]) if kind == "Json" else ()
        odd = (
            f", such as row {row}, {str(value)[:40]!r}" for row, value in pairs if not isinstance(value, str)
        )
        raise InputError(
            f"column {column!r} holds {kind}, not text{next(odd, '')}: give a column of texts, or JSON with "
            "values in quotes"
        )


def _texts(table: "pyarrow.Table", column: str) -> list[str]:
    return [text or "" for text in table[column].to_pylist()]


def _encode(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
    with no_panic():
        return tokenizer(texts, **options)["input_ids"]


def _encode_side(tokenizer: Any, texts: list[str], target: bool) -> list[list[int]]:
    """Tokens of inputs, or of outputs, which some tokenizers treat differently."""
    given = {"text_target": texts} if target else {"text": texts}
    with no_panic():
        return tokenizer(**given, return_attention_mask=False, verbose=False)["input_ids"]


def _join_pairs(
    tokenizer: Any, prompts: list[str], completions: list[str], ids: list[str], special: bool
) -> Documents:
    tail = _special_tail(tokenizer) if special else []
    heads = [tokens[: len(tokens) - len(tail)] for tokens in _encode(tokenizer, prompts, special)]
    bodies = [tokens + tail for tokens in _encode_continuations(tokenizer, completions)]
    pairs = list(zip(heads, bodies, strict=True))
    return make_documents(
        [head + body for head, body in pairs],
        [[IGNORED] * len(head) + body for head, body in pairs],
        ids=ids,
        texts=list(map(asked_and_said, prompts, completions)),
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
    """Tokens of texts that follow another text, without special tokens.

    Some tokenizers put a space before every text, which is wrong inside a document. With them a text is
    tokenised after a line break, and the tokens of the line break are removed.
    """
    anchor, word = "\n", probe_word(tokenizer)
    first, lone, behind = _encode(tokenizer, [anchor, word, anchor + word], special=False)
    plain = _encode(tokenizer, texts, special=False)
    if behind == first + lone:
        return plain
    anchored = _encode(tokenizer, [anchor + text for text in texts], special=False)
    # A line break that merged with the text cannot be removed: then the text is tokenised as it is.
    return [
        whole[len(first) :] if whole[: len(first)] == first else own
        for own, whole in zip(plain, anchored, strict=True)
    ]


def _from_token_ids(table: "pyarrow.Table", ids: list[str], tokenizer: Any, text_column: str) -> Documents:
    tokens, lengths = _integers(table, "input_ids", 0)
    labels, types = tokens, np.zeros_like(tokens)
    # Only lists are labels of tokens: a number is the label of the row.
    if "labels" in table.column_names and hasattr(table.schema.field("labels").type, "value_type"):
        labels, label_lengths = _integers(table, "labels", IGNORED)
        check_lengths(lengths, label_lengths, "labels")
    if "token_type_ids" in table.column_names:
        types, type_lengths = _integers(table, "token_type_ids", 0)
        check_lengths(lengths, type_lengths, "token types")
    if "attention_mask" in table.column_names:
        mask, mask_lengths = _integers(table, "attention_mask", 0)
        check_lengths(lengths, mask_lengths, "mask values")
        rows, real = np.repeat(np.arange(len(lengths)), lengths), mask > 0
        tokens, labels, types = tokens[real], labels[real], types[real]
        lengths = np.bincount(rows[real], minlength=len(lengths))
    offsets = offsets_of(lengths)
    if text_column:
        texts = _texts(table, text_column)
    else:
        texts = [_excerpt(tokens[a:b], labels[a:b], tokenizer) for a, b in pairwise(offsets)]
    types = types.astype(np.int32) if types.any() else None
    return Documents(tokens.astype(np.int32), labels.astype(np.int32), offsets, ids, texts, token_types=types)


def _excerpt(tokens: np.ndarray, labels: np.ndarray, tokenizer: Any) -> str:
    """What to show of a row of tokens: its first ones, or where the last part that is supervised begins."""

    def read(part: np.ndarray) -> str:
        return " ".join(map(str, part)) if tokenizer is None else tokenizer.decode(part.tolist())

    said = np.flatnonzero((labels[1:] != IGNORED) & (labels[:-1] == IGNORED)) + 1
    if not len(said) or said[-1] == 1:  # the first token of a row is never supervised
        return read(tokens[:_EXCERPT])
    start, half = int(said[-1]), _EXCERPT // 2
    return asked_and_said(read(tokens[max(0, start - half) : start]), read(tokens[start : start + half]))


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


def _fit(docs: Documents, start: int, max_length: int | None, truncation: bool) -> Documents:
    """Cut rows to `max_length`, or refuse the first that is longer; `start` is the first row's number."""
    if max_length is None or not (docs.lengths > max_length).any():
        return docs
    if not truncation:
        row = int(np.argmax(docs.lengths > max_length))
        raise InputError(
            f"row {start + row} (id {brief(docs.ids[row])}) has {docs.lengths[row]} tokens, more than the "
            f"limit of {max_length}: cut such rows with truncation=True, or split them"
        )
    lengths = np.minimum(docs.lengths, max_length)
    fits = np.arange(len(docs.input_ids)) - np.repeat(docs.offsets[:-1], docs.lengths) < max_length
    types = None if docs.token_types is None else docs.token_types[fits]
    return dataclasses.replace(
        docs, input_ids=docs.input_ids[fits], labels=docs.labels[fits], offsets=offsets_of(lengths),
        token_types=types, cut=(int((docs.lengths > max_length).sum()), int(docs.lengths.max())),
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
        cut=(sum(part.cut[0] for part in parts), max(part.cut[1] for part in parts)),
    )
