"""Running an engine over data: batches by length under a token budget, results in the order of the rows."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradfn.data import IGNORED, collate, offsets_of, plan_batches
from gradfn.errors import InputError
from gradfn.layers import View
from gradfn.losses import causal_lm_loss
from gradfn.probes import Engine, probe_engine
from gradfn.transforms import Transform
from gradfn.types import Blocks, Data, Example, LossFn, Rows

TOKEN_BATCH_SIZE = 8192
"""Tokens a batch, padding included, unless told otherwise."""

TRIAL_TOKENS = 4
"""Rows that are shorter say nothing of how a model treats positions."""

Progress = Callable[[int], None]
"""Called with the number of tokens done since the last call."""

Value = TypeVar("Value", bound=Blocks | Tensor)


def lengths_of(data: Data) -> np.ndarray:
    """Tokens of every row; rows without `input_ids` count as one.

    >>> lengths_of([{"x": torch.zeros(3)}, {"input_ids": torch.zeros(5)}])
    array([1, 5])
    """
    known = getattr(data, "lengths", None)
    if known is not None:
        return np.asarray(known)
    return np.array([len(row["input_ids"]) if "input_ids" in row else 1 for row in data], np.int64)


def row_name(data: Data, row: int) -> str:
    """What to call a row in a message: its number, and its id where it has one."""
    ids = getattr(data, "ids", None)
    return f"row {row}" if ids is None or ids[row] == str(row) else f"row {row} (id {ids[row]})"


def stream(
    engine: Engine,
    data: Data,
    *,
    rows: range | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> Iterator[tuple[np.ndarray, Rows]]:
    """Yield `(row numbers, results)` batch by batch, longest rows first.

    Where the engine's view is by token, the results of a batch are those of its rows' tokens, row after row.

    Args:
        engine: what to run; see `probe_engine`.
        data: examples; sequences may differ in length.
        rows: which rows; None means all.
        token_batch_size: tokens a batch, padding included. It changes no result.
        progress: called after every batch with its tokens.

    Raises:
        InputError: a loss or gradient is NaN or infinite; the row is named.
    """
    rows = range(len(data)) if rows is None else rows
    if rows.step != 1:
        raise InputError(f"rows must follow one another, not be {rows}")
    lengths = lengths_of(data)[rows.start : rows.stop]
    device = next(engine.model.parameters()).device
    trial = _short_rows(data, rows, lengths)
    if trial:
        examples = collate([_labelled(data, row) for row in trial])
        engine.look({key: value.to(device) for key, value in examples.items()})
    for batch in plan_batches(lengths, token_batch_size):
        numbers = batch + rows.start
        examples = [_labelled(data, int(i)) for i in numbers]
        if engine.view.tokens:
            examples = [_masked(example) for example in examples]
        result = engine({key: value.to(device) for key, value in collate(examples).items()})
        owners = np.repeat(numbers, lengths[batch]) if engine.view.tokens else numbers
        _refuse_nonfinite(result, data, numbers, owners)
        yield numbers, result
        if progress:
            progress(int(lengths[batch].sum()))


def _short_rows(data: Data, rows: range, lengths: np.ndarray) -> list[int]:
    """Two short rows with something to learn from, for the engine to look at first, or none."""
    supervised = getattr(data, "supervised", None)
    useful = lengths >= TRIAL_TOKENS
    if supervised is not None:
        useful &= np.asarray(supervised)[rows.start : rows.stop] > 0
    candidates = np.flatnonzero(useful)
    shortest = candidates[np.argsort(lengths[candidates], kind="stable")[:2]]
    return [rows.start + int(row) for row in shortest] if len(shortest) == 2 else []


def _labelled(data: Data, row: int) -> Example:
    """The example; tokens without labels are their own labels, said before padding could be taken for one."""
    example = data[row]
    mask = example.get("attention_mask")
    if mask is not None and len(mask) and not bool(mask[0]):
        raise InputError(
            f"{row_name(data, row)} is padded on the left (its attention_mask starts with 0): "
            "give it without padding"
        )
    if "input_ids" not in example or "labels" in example:
        return example
    ids = example["input_ids"]
    return {**example, "labels": ids if mask is None else torch.where(mask.bool(), ids, IGNORED)}


def _masked(example: Example) -> Example:
    """The example with an attention mask, which says what is a token and what is padding."""
    if "input_ids" not in example:
        raise InputError("rows without input_ids have no tokens: view them by example")
    return {"attention_mask": torch.ones_like(example["input_ids"]), **example}


def _refuse_nonfinite(result: Rows, data: Data, numbers: np.ndarray, owners: np.ndarray) -> None:
    parts = list(result.values.values()) if isinstance(result.values, dict) else [result.values]
    sums = torch.stack([result.losses.sum(), *(part.sum().to(result.losses) for part in parts)])
    if bool(torch.isfinite(sums).all()):
        return
    values = [("loss", result.losses, numbers), *(("gradient", part, owners) for part in parts)]
    for what, value, rows in values:
        bad = ~torch.isfinite(value.flatten(1) if value.ndim > 1 else value[:, None]).all(1)
        if bool(bad.any()):
            row = row_name(data, int(rows[int(bad.nonzero()[0, 0])]))
            raise InputError(
                f"the {what} of {row} is NaN or infinite: mend or leave out that row, or use --precision fp32"
            )


def gather(
    engine: Engine,
    data: Data,
    *,
    rows: range | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> Rows:
    """Run the engine over the rows and put everything, in the rows' order, into memory; see `stream`."""
    rows = range(len(data)) if rows is None else rows
    if not len(rows):
        raise InputError("the data has no rows: give at least one example")
    lengths = lengths_of(data)[rows.start : rows.stop] if engine.view.tokens else np.ones(len(rows), np.int64)
    offsets = offsets_of(lengths)
    out: Rows | None = None
    for numbers, result in stream(
        engine, data, rows=rows, token_batch_size=token_batch_size, progress=progress
    ):
        batch = numbers - rows.start
        spans = [range(int(offsets[i]), int(offsets[i + 1])) for i in batch]
        at = torch.tensor([place for span in spans for place in span], dtype=torch.long)
        if out is None:
            count = int(offsets[-1])
            _refuse_too_large(result.values, count)
            out = Rows(_map(lambda v, n=count: v.new_empty(n, *v.shape[1:], device="cpu"), result.values),
                       result.losses.new_empty(len(rows), device="cpu"))  # fmt: skip
        out.losses[torch.from_numpy(batch)] = result.losses.cpu()
        if isinstance(result.values, dict):
            for name, value in result.values.items():
                out.values[name][at] = value.cpu()  # pyright: ignore[reportCallIssue, reportArgumentType]
        else:
            out.values[at] = result.values.cpu()  # pyright: ignore[reportArgumentType]
    assert out is not None
    return out


def _refuse_too_large(values: Blocks | Tensor, count: int) -> None:
    """Refuse what would not fit in memory while there is still memory to say so."""
    parts = values.values() if isinstance(values, dict) else [values]
    size = sum(part[0].numel() * part.element_size() for part in parts) * count
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > 1 << 30 and size > free:
        raise InputError(
            f"{count} rows of gradients take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            "project them (--projection-dim 16), or take fewer rows"
        )


def _map(function: Callable[[Tensor], Tensor], values: Blocks | Tensor) -> Blocks | Tensor:
    if isinstance(values, dict):
        return {name: function(value) for name, value in values.items()}
    return function(values)


def collect(
    model: nn.Module,
    data: Data,
    transform: Transform | None = None,
    *,
    loss: LossFn | None = None,
    view: View | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> Blocks | Tensor:
    """Per-example gradients of all rows, transformed, in memory.

    Args:
        model: the module to attribute.
        data: examples, each a mapping of tensors.
        transform: applied to every example's blocks; None is the full gradient.
        loss: `loss(params, example)`; None means next-token cross-entropy, `causal_lm_loss(model)`.
        view: which weights, by head or not, by token or not; None is all linear layers, see `View`.
        token_batch_size: tokens a batch, padding included; changes no result.
        progress: called with the tokens done.

    Returns:
        `{module path: [rows, ...]}` on the CPU, or `[rows, queries]` where the transform ends in `dot`. By
        token, all tokens of all rows one after the other: row i's start at `offsets_of(lengths)[i]`.

    Raises:
        InputError: no rows, nothing to attribute, a loss that is not finite.

    >>> net = nn.Linear(3, 1)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).square().sum()
    >>> collect(net, [{"x": torch.ones(3)}] * 5, loss=loss)["root"].shape
    torch.Size([5, 1, 4])
    """
    engine = probe_engine(model, loss or causal_lm_loss(model), transform, view=view)
    return gather(engine, data, token_batch_size=token_batch_size, progress=progress).values
