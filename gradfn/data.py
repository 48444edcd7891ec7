"""Tokenised documents, pairs and images in rows, and how rows become batches."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from operator import index
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from gradfn.errors import InputError
from gradfn.shown import asked_and_said

__all__ = [
    "IGNORED", "Corpus", "Documents", "Images", "Pairs", "check_lengths", "check_rows", "collate",
    "make_documents", "offsets_of",
]  # fmt: skip

IGNORED = -100
"""The label of a position that is not supervised, and the padding of labels."""


@dataclass(frozen=True, eq=False)
class Documents:
    """Rows of token ids, stored end to end: row i is `input_ids[offsets[i]:offsets[i + 1]]`.

    A label at position t supervises the prediction of token t from the tokens before it, so the first
    position of a row is never supervised; -100 marks the others that are not.

    Args:
        input_ids: token ids of all rows, int32 `[tokens]`.
        labels: labels of all rows, int32 `[tokens]`.
        offsets: where each row starts and the last one ends, int64 `[rows + 1]`.
        ids: the name of each row.
        texts: what to show of each row.
        extras: one number a row by name: "weight", which multiplies a row's loss; "labels", a class or a
            number, which replaces the labels of tokens. With "labels", examples have an attention mask.
        masked: whether labels are those of masked tokens. Then any position may be supervised, also the
            first, and examples have an attention mask.
        token_types: which of two texts each token belongs to, int32 `[tokens]`, for models that read this;
            None is 0 everywhere.
        cut: how many of the rows that were read have lost tokens, and how many tokens the longest had.

    Raises:
        InputError: the fields do not describe the same rows.

    >>> docs = make_documents([[5, 6, 7], [8]], ids=["a", "b"])
    >>> len(docs), docs.lengths.tolist(), docs.supervised.tolist()
    (2, [3, 1], [2, 0])
    >>> docs[0]["input_ids"]
    tensor([5, 6, 7])
    >>> docs.select([1, 0]).ids
    ['b', 'a']
    """

    input_ids: Int32[np.ndarray, " tokens"]
    labels: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " bounds"]
    ids: list[str]
    texts: list[str]
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    masked: bool = False
    token_types: Int32[np.ndarray, " tokens"] | None = None
    cut: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        rows, tokens = len(self.offsets) - 1, len(self.input_ids)
        if self.token_types is not None and len(self.token_types) != tokens:
            raise InputError(
                f"{tokens} tokens came with {len(self.token_types)} token types: give one for each"
            )
        if not len(self.ids) == len(self.texts) == rows or len(self.labels) != tokens:
            raise InputError(
                f"documents need an id and a text for each row and a label for each token, but {rows} rows "
                f"of {tokens} tokens came with {len(self.ids)} ids, {len(self.texts)} texts and "
                f"{len(self.labels)} labels"
            )
        if self.offsets[0] != 0 or self.offsets[-1] != tokens or (np.diff(self.offsets) < 0).any():
            raise InputError(f"document offsets must rise from 0 to the {tokens} tokens there are")
        for name, values in self.extras.items():
            if values.shape != (rows,):
                raise InputError(
                    f"{name!r} has shape {list(values.shape)}, expected a number for each of the {rows} rows"
                )

    def __repr__(self) -> str:
        return f"Documents({len(self)} rows, {len(self.input_ids)} tokens)"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        row = range(len(self))[row]  # checks bounds, and allows negative rows, like a list
        span = slice(self.offsets[row], self.offsets[row + 1])
        example = {
            "input_ids": torch.from_numpy(self.input_ids[span].astype(np.int64)),
            "labels": torch.from_numpy(self.labels[span].astype(np.int64)),
        }
        if self.masked or "labels" in self.extras:
            example["attention_mask"] = torch.ones_like(example["input_ids"])
        if self.token_types is not None:
            example["token_type_ids"] = torch.from_numpy(self.token_types[span].astype(np.int64))
        return {**example, **{name: torch.as_tensor(values[row]) for name, values in self.extras.items()}}

    @cached_property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def supervised(self) -> Int64[np.ndarray, " rows"]:
        """Supervised positions of each row: label not -100, and position not 0 unless tokens are masked; one
        where the row has a label."""
        if "labels" in self.extras:
            return np.ones(len(self), np.int64)
        counts = np.zeros(len(self), np.int64)
        filled = self.lengths > 0  # reduceat would give wrong numbers for empty rows
        if filled.any():
            starts = self.offsets[:-1][filled]
            mask = self.labels != IGNORED
            if not self.masked:
                mask[starts] = False
            counts[filled] = np.add.reduceat(mask, starts, dtype=np.int64)
        return counts

    def select(self, rows: Any) -> "Documents":
        """The given rows in the given order.

        Args:
            rows: anything that indexes a numpy array: row numbers, a slice, a boolean mask; tensors too.
        """
        chosen = _chosen(len(self), rows)
        lengths = self.lengths[chosen]
        offsets = offsets_of(lengths)
        tokens = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        ids, texts = [self.ids[row] for row in chosen], [self.texts[row] for row in chosen]
        extras = {name: values[chosen] for name, values in self.extras.items()}
        types = None if self.token_types is None else self.token_types[tokens]
        return Documents(
            self.input_ids[tokens], self.labels[tokens], offsets, ids, texts, extras, self.masked, types
        )

    def fingerprint(self) -> str:
        """16 hex digits of everything that gradients depend on: ids, labels, offsets, extras, token types."""
        digest = hashlib.sha256(b"masked" if self.masked else b"")
        for array, kind in ((self.input_ids, "<i4"), (self.labels, "<i4"), (self.offsets, "<i8")):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(array, kind).data)
        types = {} if self.token_types is None else {"token_type_ids": self.token_types}
        _digest_extras(digest, {**self.extras, **types})
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Rows of an input and its output, for encoder-decoder models.

    Args:
        inputs: what the encoder reads. Its ids and extras are those of the rows.
        outputs: what the decoder should say. Every token of it is supervised.

    Raises:
        InputError: there are not as many inputs as outputs.

    >>> pairs = Pairs(make_documents([[5, 6]]), make_documents([[7, 8, 9]]))
    >>> pairs[0]["attention_mask"], pairs[0]["labels"], pairs.lengths
    (tensor([1, 1]), tensor([7, 8, 9]), array([3]))
    """

    inputs: Documents
    outputs: Documents

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.outputs):
            raise InputError(
                f"{len(self.inputs)} inputs came with {len(self.outputs)} outputs: give one for each"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        example = self.inputs[row]
        mask = torch.ones_like(example["input_ids"])
        return {**example, "attention_mask": mask, "labels": self.outputs[row]["labels"]}

    @property
    def ids(self) -> list[str]:
        """The name of each row."""
        return self.inputs.ids

    @property
    def texts(self) -> list[str]:
        """What to show of each row: the input, an arrow, the output."""
        return list(map(asked_and_said, self.inputs.texts, self.outputs.texts))

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of the longer of the two."""
        return np.maximum(self.inputs.lengths, self.outputs.lengths)

    @property
    def supervised(self) -> Int64[np.ndarray, " rows"]:
        """Tokens of each output."""
        return self.outputs.lengths

    @property
    def extras(self) -> Mapping[str, np.ndarray]:
        """One number a row by name; see `Documents`."""
        return self.inputs.extras

    def select(self, rows: Any) -> "Pairs":
        """The given rows in the given order; see `Documents.select`."""
        return Pairs(self.inputs.select(rows), self.outputs.select(rows))

    def fingerprint(self) -> str:
        """16 hex digits of inputs and outputs."""
        both = self.inputs.fingerprint() + self.outputs.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Images:
    """Rows of images, each with a class. The pixels of a row are made when the row is read.

    Args:
        pixels: `pixels(image) -> [channels, height, width]`, float, the same numbers every time.
        digests: a text for each image that is different if its pixels are.
        numbers: the image of each row, int64 `[rows]`.
        tokens: how many tokens a row counts as in a batch: the number of its patches, say.
        ids: the name of each row.
        texts: what to show of each row.
        extras: one number a row by name: "labels", the class; "weight", which multiplies a row's loss.

    Raises:
        InputError: the fields do not describe the same rows.

    >>> two = [torch.zeros(1, 2, 2), torch.ones(1, 2, 2)]
    >>> extras = {"labels": np.array([4, 5])}
    >>> images = Images(two.__getitem__, ["a", "b"], np.arange(2), 1, ["0", "1"], ["", ""], extras)
    >>> images.select([1])[0]
    {'pixel_values': tensor([[[1., 1.],
             [1., 1.]]]), 'labels': tensor(5)}
    """

    pixels: Callable[[int], Tensor]
    digests: Sequence[str]
    numbers: Int64[np.ndarray, " rows"]
    tokens: int
    ids: list[str]
    texts: list[str]
    extras: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        rows = len(self.numbers)
        sizes = {len(self.ids), len(self.texts), *(len(values) for values in self.extras.values())}
        if sizes != {rows} or "labels" not in self.extras:
            raise InputError(f"images need an id, a text and a label for each of the {rows} rows")

    def __repr__(self) -> str:
        return f"Images({len(self)} rows, {self.tokens} tokens each)"

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        row = range(len(self))[row]
        pixels = self.pixels(int(self.numbers[row]))
        extras = {name: torch.as_tensor(values[row]) for name, values in self.extras.items()}
        return {"pixel_values": pixels, **extras}

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """How many tokens each row counts as in a batch."""
        return np.full(len(self), self.tokens, np.int64)

    @property
    def supervised(self) -> Int64[np.ndarray, " rows"]:
        """One class a row."""
        return np.ones(len(self), np.int64)

    def select(self, rows: Any) -> "Images":
        """The given rows in the given order; see `Documents.select`."""
        chosen = _chosen(len(self), rows)
        ids, texts = [self.ids[row] for row in chosen], [self.texts[row] for row in chosen]
        extras = {name: values[chosen] for name, values in self.extras.items()}
        return Images(self.pixels, self.digests, self.numbers[chosen], self.tokens, ids, texts, extras)

    def fingerprint(self) -> str:
        """16 hex digits of the images' digests and of the extras."""
        digest = hashlib.sha256("\0".join(self.digests[number] for number in map(int, self.numbers)).encode())
        _digest_extras(digest, self.extras)
        return digest.hexdigest()[:16]


Corpus = Documents | Pairs | Images
"""Rows with names, something to show, lengths and a fingerprint."""


def _digest_extras(digest: Any, extras: Mapping[str, np.ndarray]) -> None:
    """Add the numbers of rows, by name, to a digest."""
    for name, values in sorted(extras.items()):
        digest.update(f"{name} {values.dtype.str} ".encode())
        digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)


def make_documents(
    input_ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]] | None = None,
    *,
    ids: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
) -> Documents:
    """Documents from one sequence of token ids a row.

    Args:
        input_ids: token ids, one sequence a row, which may be empty.
        labels: the same shape, -100 where not supervised; `input_ids` themselves if not given.
        ids: the name of each row; row numbers if not given.
        texts: what to show of each row; empty if not given.

    Raises:
        InputError: labels of another length than their row; something that is not a whole number.

    >>> make_documents([[1, 2, 3]], [[-100, -100, 3]]).supervised
    array([1])
    """
    lengths = np.array([len(row) for row in input_ids], np.int64)
    tokens = _flat(input_ids, lengths)
    targets = tokens.copy()
    if labels is not None:
        label_lengths = np.array([len(row) for row in labels], np.int64)
        check_lengths(lengths, label_lengths, "labels")
        targets = _flat(labels, label_lengths)
    names = [str(row) for row in range(len(lengths))] if ids is None else list(ids)
    return Documents(
        tokens, targets, offsets_of(lengths), names, [""] * len(lengths) if texts is None else list(texts)
    )


def check_rows(data: Any) -> None:
    """Refuse what is no sequence of examples, each a mapping of tensors.

    Raises:
        InputError: a DataLoader, a dictionary of columns, rows that are tuples, ...

    >>> check_rows([{"x": torch.ones(2)}])
    >>> check_rows([(torch.ones(2), 1)])
    Traceback (most recent call last):
    gradfn.errors.InputError: row 0 is a tuple: give each example as a dict of tensors, {"x": x, "y": y}, say
    """
    kind = type(data).__name__
    if hasattr(data, "dataset") and not hasattr(data, "__getitem__"):
        raise InputError(f"the data is a {kind}, of batches: give the dataset in it, `loader.dataset`")
    whole = isinstance(data, Mapping | Tensor | str) or not hasattr(data, "__getitem__")
    if whole or not hasattr(data, "__len__"):
        raise InputError(f"the data is a {kind}: give a sequence of examples, each a dict of tensors")
    row = data[0] if len(data) else {}
    if not isinstance(row, Mapping):
        wanted = 'give each example as a dict of tensors, {"x": x, "y": y}, say'
        raise InputError(f"row 0 is a {type(row).__name__}: {wanted}")
    _check_tensors(row)


def check_lengths(lengths: Int64[np.ndarray, " rows"], others: Int64[np.ndarray, " _"], noun: str) -> None:
    """Refuse labels, or something like them, that are not one for each token.

    Args:
        lengths: tokens of each row.
        others: the number of labels (or the like) of each row.
        noun: what they are, in the plural, for the message.

    Raises:
        InputError: a row has more or fewer; the first one is named.
    """
    if len(lengths) != len(others):
        raise InputError(
            f"{noun} must come for every row, but {len(lengths)} rows have {noun} for {len(others)}"
        )
    for row in np.flatnonzero(lengths != others)[:1]:
        raise InputError(f"row {row} has {lengths[row]} tokens but {others[row]} {noun}: give one a token")


def offsets_of(lengths: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " bounds"]:
    """Where rows of these lengths start when stored end to end, and where the last one ends.

    >>> offsets_of(np.array([2, 0, 3]))
    array([0, 2, 2, 5])
    """
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def collate(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack examples into a batch; sequences of unequal length are padded on the right.

    `labels` are padded with -100 and everything else with 0; a batch of empty sequences is one position long.
    Where `input_ids` are padded, an `attention_mask` is added.

    Args:
        examples: mappings with the same keys; tensors of one key differ in shape only if they have one axis.

    Returns:
        One tensor a key, with a leading batch axis.

    Raises:
        InputError: no examples, different keys, values that are not tensors, or shapes that cannot be padded.

    >>> short, long = make_documents([[5], [6, 7]])
    >>> collate([short, long])["labels"]
    tensor([[   5, -100],
            [   6,    7]])
    """
    if not examples:
        raise InputError("a batch needs at least one example, got none")
    keys = examples[0].keys()
    for example in examples:
        if (own := example.keys()) != keys:
            raise InputError(f"examples of a batch need the same keys, got {sorted(keys)} and {sorted(own)}")
        _check_tensors(example)
    batch = {key: _stack(key, [example[key] for example in examples]) for key in keys}
    if "input_ids" in keys and "attention_mask" not in keys and examples[0]["input_ids"].ndim == 1:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        if int(lengths.min()) < batch["input_ids"].shape[1]:
            mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
            batch["attention_mask"] = mask.to(batch["input_ids"])
    return batch


def _check_tensors(example: Mapping[str, Any]) -> None:
    for key, value in example.items():
        if not isinstance(value, Tensor):
            remedy = "make it one, with torch.tensor, say"
            raise InputError(f"{key!r} is a {type(value).__name__}, not a tensor: {remedy}")


def _stack(key: str, tensors: list[Tensor]) -> Tensor:
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) == 1 and tensors[0].shape != (0,):
        return torch.stack(tensors)
    if any(len(shape) != 1 for shape in shapes):
        shown = ", ".join(sorted(str(list(shape)) for shape in shapes))
        raise InputError(f"{key!r} has shapes {shown} in one batch: give one shape, or pad to it")
    fill = IGNORED if key == "labels" else 0
    batch = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
    return batch if batch.shape[1] else batch.new_full((len(tensors), 1), fill)


def _chosen(count: int, rows: Any) -> Int64[np.ndarray, " chosen"]:
    """The numbers of the rows that a list, an array, a tensor, a mask, a slice or a number selects."""
    which = rows if isinstance(rows, slice) else np.asarray(rows)
    if isinstance(which, np.ndarray) and which.size == 0:
        which = which.astype(np.int64)  # an empty list would be one of floats
    return np.atleast_1d(np.arange(count)[which])


def _flat(rows: Sequence[Sequence[int]], lengths: Int64[np.ndarray, " rows"]) -> Int32[np.ndarray, " tokens"]:
    try:
        return np.fromiter(map(index, chain.from_iterable(rows)), np.int32, count=int(lengths.sum()))
    except (TypeError, OverflowError) as error:
        raise InputError(
            f"token ids and labels are whole numbers of 32 bits ({error}): correct the rows"
        ) from error
