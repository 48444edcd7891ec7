"""Tokens and labels of chats, by the tokenizer's chat template."""

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradfn.data import IGNORED, Documents, make_documents
from gradfn.errors import InputError
from gradfn.hf.datasets import check_column, decoded
from gradfn.hf.hub import summary
from gradfn.hf.tokenizers import no_panic
from gradfn.shown import asked_and_said

if TYPE_CHECKING:
    import datasets
    import pyarrow

Encoder = Callable[["pyarrow.Table", list[str]], Documents]
"""Makes documents of a table of rows and their names."""

_Encoded = tuple[list[int], list[int], str]
"""The tokens, labels and text of a chat."""


def chat_encoder(rows: "datasets.Dataset", tokenizer: Any, column: str) -> Encoder:
    """The function that makes documents of a table of chats; see `tokenize`.

    Args:
        rows: the rows.
        tokenizer: one with a chat template.
        column: the column of chats.

    Raises:
        InputError: there is no such column or no chat template; when called, a chat that does not fit.
    """
    check_column(rows, column, "give another messages_column")
    _check_template(tokenizer)
    marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()))

    def documents(table: "pyarrow.Table", ids: list[str]) -> Documents:
        made = []
        for given, name in zip(decoded(rows, table, column), ids, strict=True):
            chat = _messages(given, column, name)
            last = len(chat) - 1
            made.append(_marked(tokenizer, chat, name) if marked else _behind(tokenizer, chat, last, name))
        tokens, labels, texts = zip(*made, strict=True)
        return make_documents(tokens, labels, ids=ids, texts=texts)

    return documents


def pair_encoder(rows: "datasets.Dataset", tokenizer: Any, prompts: str, completions: str) -> Encoder:
    """The function that makes documents of prompts and completions in messages; see `tokenize`.

    Args:
        rows: the rows.
        tokenizer: one with a chat template.
        prompts, completions: the columns.

    Raises:
        InputError: there is no chat template; when called, messages that do not fit.
    """
    _check_template(tokenizer)

    def documents(table: "pyarrow.Table", ids: list[str]) -> Documents:
        made = []
        sides = (decoded(rows, table, column) for column in (prompts, completions))
        for asked, said, name in zip(*sides, ids, strict=True):
            prompt = _checked(asked, prompts, name)
            chat = prompt + _checked(said, completions, name)
            made.append(_behind(tokenizer, chat, len(prompt), name))
        tokens, labels, texts = zip(*made, strict=True)
        return make_documents(tokens, labels, ids=ids, texts=texts)

    return documents


def holds_chats(rows: "datasets.Dataset", column: str) -> bool:
    """Whether a column holds lists of messages."""
    import datasets

    whole: Any = rows.features.get(column)
    kind = getattr(whole, "feature", whole)
    # Messages of unlike keys are JSON inside.
    return isinstance(kind, datasets.Json) or (isinstance(kind, dict) and "role" in kind)


def _check_template(tokenizer: Any) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "chats need a tokenizer with a chat template, and this one has none: use the model's tuned "
            "version, or turn the chats into prompts and completions"
        )


def prompt_of(chat: Any, column: str, name: str) -> str:
    """The messages before the assistant's last one, as text that is equal for equal prompts.

    Args:
        chat: a list of messages.
        column, name: the column and the row, for the message.

    Raises:
        InputError: it is no chat, or the assistant says nothing.

    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    >>> prompt_of(chat, "messages", "0")
    '[{"content": "Hi", "role": "user"}]'
    """
    return json.dumps(_messages(chat, column, name)[:-1], sort_keys=True, default=str)


def _messages(chat: Any, column: str, name: str) -> list[dict[str, Any]]:
    """A chat up to the assistant's last message; the messages after it have no loss."""
    chat = _checked(chat, column, name)
    said = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    if not said:
        raise InputError(f"the chat of row {name} has no message of the assistant: leave it out")
    return chat[: said[-1] + 1]


def _checked(chat: Any, column: str, name: str) -> list[dict[str, Any]]:
    """Messages without the keys that are null: in a table every message has the keys of all others."""
    if not isinstance(chat, list) or not all(isinstance(m, dict) and "role" in m for m in chat):
        raise InputError(
            f"row {name} of column {column!r} is no chat: give a list of messages with role and content"
        )
    return [_without_nulls(message) for message in chat]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _marked(tokenizer: Any, chat: list[dict[str, Any]], name: str) -> _Encoded:
    """A chat whose template marks the tokens of the assistant, which are supervised."""
    made = _templated(tokenizer, chat, name, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(made["input_ids"], made["assistant_masks"], strict=True)
    labels = [token if own else IGNORED for token, own in pairs]
    return list(made["input_ids"]), labels, _as_text(chat, len(chat) - 1)


def _behind(tokenizer: Any, chat: list[dict[str, Any]], asked_by: int, name: str) -> _Encoded:
    """A chat of which only the messages behind the first `asked_by` are supervised."""
    whole = list(_templated(tokenizer, chat, name, return_dict=True)["input_ids"])
    asked = _templated(tokenizer, chat[:asked_by], name, return_dict=True, add_generation_prompt=True)[
        "input_ids"
    ]
    if list(asked) != whole[: len(asked)]:
        raise InputError(
            f"the chat template writes the prompt of row {name} differently without the answer, so the "
            "answer cannot be found: use prompts and completions, or mark it with {% generation %}"
        )
    labels = [IGNORED] * len(asked) + whole[len(asked) :]
    return whole, labels, _as_text(chat, asked_by)


def _as_text(chat: list[dict[str, Any]], asked_by: int) -> str:
    """A chat as a person reads it: the messages one after the other, an arrow before what answers them."""
    asked = "\n".join(f"{message['role']}: {_content(message)}" for message in chat[:asked_by])
    return asked_and_said(asked, "\n".join(map(_content, chat[asked_by:])))


def _content(message: dict[str, Any]) -> str:
    """What a message says, in words where it has any; the calls of tools as JSON."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    words = [part.get("text", part) if isinstance(part, dict) else part for part in parts]
    said = [*words, *(message[key] for key in ("reasoning_content", "tool_calls") if key in message)]
    return "\n".join(
        one if isinstance(one, str) else json.dumps(one, ensure_ascii=False, default=str)
        for one in said if one not in (None, "", [])
    )  # fmt: skip


def _templated(tokenizer: Any, chat: list[dict[str, Any]], name: str, **options: Any) -> Any:
    try:
        with no_panic():
            return tokenizer.apply_chat_template(chat, **options)
    except InputError:
        raise
    except Exception as error:  # a template is a program, which may raise anything
        raise InputError(
            f"the chat template cannot take the chat of row {name} ({summary(error)}): correct it"
        ) from error
