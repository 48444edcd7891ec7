"""Labels and weights of rows, from the columns of a dataset."""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Int64

from gradfn.data import Corpus, Documents, Pairs
from gradfn.errors import InputError
from gradfn.hf.chats import prompt_of
from gradfn.hf.datasets import column_values
from gradfn.model.losses import advantages
from gradfn.shown import asked_and_said, brief

if TYPE_CHECKING:
    import datasets

MOST_WEIGHT = 1e12
"""The largest weight of a row; products of two gradients would leave float32 with far larger ones."""
Weighed = TypeVar("Weighed", bound=Corpus)


def with_labels(
    docs: Documents, rows: "datasets.Dataset", column: str, classes: Mapping[str, int] | None
) -> Documents:
    """Documents with one label a row instead of labels of tokens; it is shown behind the text.

    Args:
        docs: what `tokenize` made of the rows.
        rows: the rows.
        column: class numbers or names, see `class_numbers`; or the numbers that a regression predicts.
        classes: the numbers of the model's classes by name, `config.label2id`; None for a regression.

    Raises:
        InputError: there is no such column, or a row has no valid label or no tokens.
    """
    if classes is None:
        labels = _numbers(column_values(rows, column, "label_column"), column)
        shown = [f"{label:g}" for label in labels]
    else:
        labels = class_numbers(rows, column, classes)
        shown = class_names(rows, column, classes, labels)
    if (docs.lengths == 0).any():
        row = int(np.argmin(docs.lengths))
        raise InputError(f"row {row} (id {brief(docs.ids[row])}) has no tokens: leave it out")
    texts = list(map(asked_and_said, docs.texts, shown))
    return dataclasses.replace(docs, texts=texts, extras={**docs.extras, "labels": labels})


def with_weights(
    docs: Weighed,
    rows: "datasets.Dataset",
    *,
    advantage_column: str | None = None,
    reward_column: str | None = None,
    prompt_column: str | None = None,
    messages_column: str | None = None,
) -> Weighed:
    """Documents with one weight a row, which multiplies its loss.

    Args:
        docs: what `tokenize` or `tokenize_pairs` made of the rows.
        rows: the rows.
        advantage_column: the weights themselves; or else
        reward_column: rewards, from which the mean reward of the rows with the same prompt is subtracted; see
            `advantages`.
        prompt_column: the column of prompts, for rewards; or else
        messages_column: the column of chats; the messages before the assistant's last one are the prompt.

    Raises:
        InputError: not exactly one of advantages and rewards is given, a column is missing or holds
            something else, or rewards come without prompts.
    """
    if (advantage_column is None) == (reward_column is None):
        raise InputError("expected one source of weights: give either advantage_column or reward_column")
    if advantage_column is not None:
        weights = _numbers(column_values(rows, advantage_column, "advantage_column"), advantage_column)
    else:
        assert reward_column is not None
        prompts = _prompts(rows, prompt_column, messages_column)
        rewards = _numbers(column_values(rows, reward_column, "reward_column"), reward_column)
        weights = np.array(advantages(rewards.tolist(), prompts), np.float64)
    for row in np.flatnonzero(np.abs(weights) > MOST_WEIGHT)[:1]:
        raise InputError(
            f"row {row} has the weight {weights[row]:g}, and gradients in float32 hold {MOST_WEIGHT:g} at "
            "most: scale the column down"
        )
    if isinstance(docs, Pairs):
        inputs = dataclasses.replace(docs.inputs, extras={**docs.extras, "weight": weights})
        return dataclasses.replace(docs, inputs=inputs)
    return dataclasses.replace(docs, extras={**docs.extras, "weight": weights})


def class_numbers(
    rows: "datasets.Dataset", column: str, classes: Mapping[str, int]
) -> Int64[np.ndarray, " rows"]:
    """The model's number of each row's class; by name where both the dataset and the model name classes.

    Args:
        rows: the rows.
        column: class numbers or names.
        classes: the numbers of the model's classes by name, `config.label2id`.

    Raises:
        InputError: there is no such column, or a row's label is not a class of the model.
    """
    values = column_values(rows, column, "label_column")
    names = getattr(rows.features[column], "names", None)
    unnamed = all(name == f"LABEL_{number}" for name, number in classes.items())
    if names is not None and not unnamed:
        values = [names[value] if value is not None and value >= 0 else value for value in values]
    return np.array([_class_number(value, row, classes) for row, value in enumerate(values)], np.int64)


def class_names(
    rows: "datasets.Dataset", column: str, classes: Mapping[str, int], numbers: Int64[np.ndarray, " rows"]
) -> list[str]:
    """How the model calls the class of each row, or else the dataset; the number where neither has a name.

    Args:
        rows, column, classes: see `class_numbers`.
        numbers: what that gives.
    """
    named = {number: name for name, number in classes.items() if name != f"LABEL_{number}"}
    known = named or dict(enumerate(getattr(rows.features[column], "names", None) or ()))
    return [str(known.get(number, number)) for number in numbers.tolist()]


def _class_number(value: Any, row: int, classes: Mapping[str, int]) -> int:
    """The number of a class, given by name or number."""
    if isinstance(value, str) and value in classes:
        return int(classes[value])
    if isinstance(value, int) and 0 <= value < len(classes):
        return int(value)
    known = ", ".join([*classes][:8]) + (", ..." if len(classes) > 8 else "")
    raise InputError(
        f"row {row} has the label {brief(value)}, expected a number from 0 to {len(classes) - 1} or one of "
        f"{known}: correct it, or give another label_column"
    )


def _numbers(values: list[Any], column: str) -> np.ndarray:
    for row, value in enumerate(values):
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise InputError(
                f"row {row} has {brief(value)} in column {column!r}, expected a number: correct it"
            )
    return np.array(values, np.float64)


def _prompts(rows: "datasets.Dataset", prompt_column: str | None, messages_column: str | None) -> list[Any]:
    """The prompt of each row."""
    if prompt_column is not None:
        prompts = column_values(rows, prompt_column, "prompt_column")
        return [one if isinstance(one, str) else json.dumps(one, sort_keys=True) for one in prompts]
    if messages_column is None:
        raise InputError(
            "a reward is compared with other rewards of its prompt, but these rows have no prompts: give a "
            "prompt_column or a messages_column, or weights of your own as advantage_column"
        )
    chats = column_values(rows, messages_column, "messages_column")
    return [prompt_of(chat, messages_column, str(row)) for row, chat in enumerate(chats)]
