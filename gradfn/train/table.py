"""Rows in memory as one table, and their order and batches in each epoch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from gradfn.data import check_rows, collate
from gradfn.engine.batching import shapes_of
from gradfn.engine.stream import labelled, row_name
from gradfn.errors import InputError
from gradfn.random import words
from gradfn.types import Data, Example


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of data, padded and stacked.

    Args:
        columns: `{key: [rows, ...]}`.
        lengths: the length of each row's sequences.
        padded: the keys of sequences.
        alone: the rows themselves, where padding changes them.
    """

    columns: dict[str, Tensor]
    lengths: Int64[Tensor, " rows"]
    padded: frozenset[str]
    alone: Sequence[Example] | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Int64[Tensor, "*shape"]) -> dict[str, Tensor]:
        """The given rows, `{key: [*shape, ...]}`, with sequences as long as the longest of them."""
        flat = rows.reshape(-1).to(self.lengths.device)
        longest = max(1, int(self.lengths[flat].max())) if self.padded else 0
        taken = {}
        for key, column in self.columns.items():
            column = column[:, :longest] if key in self.padded else column
            taken[key] = column.index_select(0, flat).reshape(*rows.shape, *column.shape[1:])
        return taken

    def unpadded(self, rows: Int64[Tensor, " some"]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Batches of rows of one shape: `(their places among the rows, {key: [places, ...]})`."""
        assert self.alone is not None
        groups: dict[Any, list[int]] = {}
        for place, row in enumerate(rows.tolist()):
            groups.setdefault(shapes_of(self.alone[row]), []).append(place)
        for places in groups.values():
            made = collate([self.alone[int(rows[place])] for place in places])
            yield places, {key: v.to(self.lengths.device) for key, v in made.items() if key in self.columns}


def table_of(data: Data, device: torch.device | None = None) -> Table:
    """All rows in memory, sequences padded on the right.

    Raises:
        InputError: there are no rows, they are no examples, or a row lacks a key that another one has.

    >>> table_of([{"x": torch.ones(2)}] * 3).take(torch.tensor([0, 2]))["x"].shape
    torch.Size([2, 2])
    """
    check_rows(data)
    if not len(data):
        raise InputError("the data has no rows: give at least one example")
    examples = [labelled(data, row) for row in range(len(data))]
    first_with = {key: row for row, example in reversed([*enumerate(examples)]) for key in example}
    for row, example in enumerate(examples):
        for key in sorted(first_with.keys() - example.keys()):
            raise InputError(
                f"{row_name(data, row)} has no {key!r}, which {row_name(data, first_with[key])} has: give "
                "all rows the same keys"
            )
    columns = {key: value.to(device) for key, value in collate(examples).items()}
    sizes = {key: {len(e[key]) if e[key].ndim else 0 for e in examples} for key in examples[0]}
    padded = frozenset(key for key, lengths in sizes.items() if len(lengths) > 1)
    lengths = torch.tensor([max([len(e[key]) for key in padded], default=1) for e in examples])
    masks = columns.keys() - examples[0].keys()  # collate adds the mask of what it pads
    return Table(columns, lengths.to(device), padded | masks)


def orders(subsets: np.ndarray, seeds: Sequence[int], epoch: int) -> np.ndarray:
    """The rows of each subset in their order of an epoch, and then all other rows, `[models, rows]`.

    Every row of the data draws a number, so leaving a row out does not change the order of the others.

    Args:
        subsets: the rows of each model, bool `[models, rows]`.
        seeds: one a model.
        epoch: its number, from 0.

    >>> orders(np.array([[True, False, True]]), [0], epoch=0)[:, 2]
    array([1])
    """
    drawn = {seed: words(subsets.shape[1], "order", seed, epoch) >> np.uint64(1) for seed in {*seeds}}
    keys = np.stack([drawn[seed] for seed in seeds])
    return np.where(subsets, keys, np.iinfo(np.uint64).max).argsort(axis=1)


def batches(
    orders: np.ndarray, sizes: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The steps of an epoch: `(rows [models, batch], how many of them count [models])`.

    The first ones count. Where a model has fewer rows left than others, one of its own rows fills the batch.

    Args:
        orders: see `orders`.
        sizes: the number of rows of each model.
        batch_size: rows a step.

    >>> [rows.tolist() for rows, counts in batches(np.array([[2, 0, 1]]), np.array([2]), batch_size=1)]
    [[[2]], [[0]]]
    """
    for start in range(0, int(sizes.max()), batch_size):
        counts = np.clip(sizes - start, 0, batch_size)
        rows = orders[:, start : start + int(counts.max())]
        yield np.where(np.arange(rows.shape[1]) < counts[:, None], rows, orders[:, :1]), counts
