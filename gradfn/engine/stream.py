"""Running an engine over data: batches by length under a token budget, results in the order of the rows."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from gradfn.data import IGNORED, check_rows, collate, offsets_of
from gradfn.engine.batching import (
    LONG_TOKENS,
    Measure,
    batch_rows,
    compared_rows,
    length_window,
    padding_changes_rows,
    plan_batches,
    plan_equal,
    shapes_of,
)
from gradfn.engine.cache import CachedRows
from gradfn.engine.engine import Engine, probe_engine
from gradfn.errors import InputError
from gradfn.memory import check_memory
from gradfn.shown import brief
from gradfn.subject import TOKEN_BATCH_SIZE, Subject, SubjectOptions, subject_of
from gradfn.transforms import Transform
from gradfn.types import Batch, Blocks, Data, Example, Rows
from gradfn.watch import Progress

TRIAL_TOKENS = 4
"""Rows that are shorter say nothing of how a model treats positions."""

TRIAL_ROWS = 32
"""Of rows without tokens, so many are asked for their size before two are compared."""

BATCHES_AHEAD = 2
"""Batches made while the device computes: one to start with at once, one in case the next takes longer."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def lengths_of(data: Data) -> np.ndarray:
    """Tokens of every row; rows without `input_ids` count as one.

    >>> lengths_of([{"x": torch.zeros(3)}, {"input_ids": torch.zeros(5)}])
    array([1, 5])
    """
    check_rows(data)
    known = getattr(data, "lengths", None)
    if known is not None:
        return np.asarray(known)
    return np.array([len(row["input_ids"]) if "input_ids" in row else 1 for row in data], np.int64)


def row_name(data: Data, row: int) -> str:
    """What to call a row in a message: its number, and its id where it has one."""
    ids = getattr(data, "ids", None)
    return f"row {row}" if ids is None or ids[row] == str(row) else f"row {row} (id {brief(ids[row])})"


def stream(
    engine: Engine,
    data: Data,
    *,
    rows: range | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
    to_host: bool = False,
) -> Iterator[tuple[np.ndarray, Rows]]:
    """Yield `(row numbers, results)` batch by batch, longest rows first.

    Where the engine's view is by token, the results of a batch are those of its rows' tokens, row after row.

    Args:
        engine: what to run; see `probe_engine`.
        data: examples; sequences may differ in length.
        rows: which rows; None means all.
        token_batch_size: tokens a batch, padding included. It changes no result.
        progress: called after every batch with its tokens.
        to_host: give results on the CPU; those of a batch come off a GPU while it computes the next.

    Raises:
        InputError: a loss or gradient is NaN or infinite; the row is named.
    """
    check_rows(data)
    rows = range(len(data)) if rows is None else rows
    if rows.step != 1:
        raise InputError(f"rows must follow one another, not be {rows}")
    device = next(engine.model.parameters()).device
    lengths = lengths_of(data)[rows.start : rows.stop]
    move = _mover(device)
    plan = [batch + rows.start for batch in _plan(engine, data, rows, lengths, token_batch_size)]
    computed = _compute(engine, data, plan, move, _overlaps(device), to_host)
    with closing(_one_behind(computed) if to_host and _overlaps(device) else computed) as results:
        for result in results:
            sizes = lengths[result.numbers - rows.start]
            counts = sizes if engine.view.tokens else np.ones_like(sizes)
            _refuse_nonfinite(result, data, counts, engine.summed)
            yield result.numbers, result.rows
            if progress:
                progress(int(sizes.sum()))


def _plan(
    engine: Engine, data: Data, rows: range, lengths: np.ndarray, token_batch_size: int
) -> list[np.ndarray]:
    """Verify the engine, and cut the rows into batches."""
    pads = _pads(engine, data, rows, lengths)
    if not len(rows):
        return plan_rows(data, rows, token_batch_size, pads=True)
    example = _mover(next(engine.model.parameters()).device)(dict(labelled(data, rows.start)))
    most = batch_rows(engine, example, "input_ids" in example)
    if engine.view.tokens:  # the results are of tokens
        token_batch_size, most = min(token_batch_size, most), sys.maxsize
    return plan_rows(data, rows, token_batch_size, most, pads=pads)


def plan_rows(
    data: Data, rows: range, token_batch_size: int, most_rows: int = sys.maxsize, *, pads: bool
) -> list[np.ndarray]:
    """Cut rows into batches, of one shape each unless `pads`; numbers count from `rows.start`."""
    lengths = lengths_of(data)[rows.start : rows.stop]
    if pads:
        return plan_batches(lengths, token_batch_size, most_rows)
    shapes = [shapes_of(labelled(data, row)) for row in rows]
    return plan_equal(shapes, lengths, token_batch_size, most_rows)


def keeps_rows(measure: Measure, weights: Iterable[Tensor], data: Data, rows: range | None = None) -> bool:
    """Whether padding changes nothing that is measured of the shortest and of the longest row.

    Args:
        measure: numbers of every row of a batch, and their losses.
        weights: of the model, which say the device and the precision.
        data, rows: see `stream`.
    """
    rows, weights = range(len(data)) if rows is None else rows, [*weights]
    examples, _ = _compared(data, rows, lengths_of(data)[rows.start : rows.stop], enough=np.inf)
    move = _mover(weights[0].device)
    return not examples or not padding_changes_rows(measure, weights, examples, move)


def pads(engine: Engine, data: Data) -> bool:
    """Whether rows of unequal length may share a batch: where padding changes a row, they may not.

    Compares, once for a model and a loss, two rows of the data in one padded batch with each alone.

    Args:
        engine, data: see `stream`.
    """
    return _pads(engine, data, range(len(data)), lengths_of(data))


def _pads(engine: Engine, data: Data, rows: range, lengths: np.ndarray) -> bool:
    move = _mover(next(engine.model.parameters()).device)
    useful = _useful(data, rows, lengths)
    shortest = np.flatnonzero(useful)[np.argsort(lengths[useful], kind="stable")[:2]]
    if len(shortest) == 2:
        engine.verify(move(collate([labelled(data, rows.start + int(row)) for row in shortest])))
    if len(lengths) and lengths.max() > max(length_window(engine.model), lengths.min()):
        return False
    examples, far = _compared(data, rows, lengths)
    if not examples:
        return True
    keys, known = (frozenset(examples[0]), far), engine.facts.unpadded
    if keys not in known:
        known[keys] = padding_changes_rows(engine.sketch, [*engine.model.parameters()], examples, move)
    return not known[keys]


def _compared(
    data: Data, rows: range, lengths: np.ndarray, enough: float = LONG_TOKENS
) -> tuple[list[Example], bool]:
    """Two rows to see what padding changes, none of rows of one shape; and whether one is much longer."""
    sizes, useful = _sizes(data, rows, lengths)
    pair = compared_rows(sizes, useful, enough)
    examples = [labelled(data, rows.start + row) for row in pair]
    if len({shapes_of(example) for example in examples}) < 2:
        return [], False
    return examples, bool(sizes[pair[1]] >= 4 * sizes[pair[0]])


def _sizes(data: Data, rows: range, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How long rows are, and which are worth comparing; without tokens, the numbers of the first rows."""
    if bool((lengths > 1).any()):
        useful = _useful(data, rows, lengths)
        return lengths, useful if useful.sum() > 1 else _useful(data, rows, lengths, least=2)
    sizes = [sum(v.numel() for v in data[row].values()) for row in rows[:TRIAL_ROWS]]
    return np.array(sizes, np.int64), np.ones(len(sizes), bool)


@dataclass(frozen=True, eq=False)
class _Computed:
    """The results of a batch, which may still be under way until `arrived`.

    Args:
        numbers: the rows of the batch.
        rows: their results.
        finite: whether all of these are, a scalar.
        arrived: recorded behind the copies to the host, on each device that they come from.
    """

    numbers: np.ndarray
    rows: Rows
    finite: Tensor
    arrived: tuple[torch.Event, ...] = ()


def _compute(
    engine: Engine,
    data: Data,
    plan: list[np.ndarray],
    move: Callable[[Batch], Batch],
    overlaps: bool,
    to_host: bool,
) -> Generator[_Computed]:
    """Run the engine over the batches, made ahead of it where that overlaps with its work."""
    if isinstance(data, CachedRows) and (read := data.reader(engine)):
        yield from (_computed(numbers, read(numbers), to_host) for numbers in plan)
        return

    def make(numbers: np.ndarray) -> Batch:
        examples = [labelled(data, int(row)) for row in numbers]
        if engine.view.tokens:
            examples = [
                _masked(e, row_name(data, int(row))) for e, row in zip(examples, numbers, strict=True)
            ]
        return move(collate(examples))

    run = data.writer(engine) if isinstance(data, CachedRows) else lambda numbers, batch: engine(batch)
    with closing(ahead(make, plan) if overlaps else (make(numbers) for numbers in plan)) as batches:
        for numbers, batch in zip(plan, batches, strict=True):
            yield _computed(numbers, run(numbers, batch), to_host)


def _computed(numbers: np.ndarray, result: Rows, to_host: bool) -> _Computed:
    """Results where they are, or on the CPU; these come from a GPU without waiting, into pinned memory."""
    if not to_host:
        return _Computed(numbers, result, _all_finite(result))
    values = list(result.values.values()) if isinstance(result.values, dict) else [result.values]
    devices = {value.device for value in (*values, result.losses) if value.is_cuda}
    host = partial(Tensor.to, device="cpu", non_blocking=bool(devices))
    copies = Rows(_map(host, result.values), host(result.losses))
    finite = host(_all_finite(result))
    marks = tuple(torch.cuda.current_stream(device).record_event() for device in devices)
    return _Computed(numbers, copies, finite, marks)


def _overlaps(device: torch.device) -> bool:
    """Whether the device computes while this process does something else.

    On a CPU a second thread would only compete with the engine, and making a batch takes 0.02 % of its time.
    """
    return device.type == "cuda"


def _mover(device: torch.device) -> Callable[[Batch], Batch]:
    """Moves batches to the device; on a GPU without waiting, in the order of the caller's stream."""
    if device.type != "cuda":
        return lambda batch: {key: value.to(device) for key, value in batch.items()}
    caller = torch.cuda.current_stream(device)

    def pinned(value: Tensor) -> Tensor:
        return value.pin_memory() if value.device.type == "cpu" else value

    def move(batch: Batch) -> Batch:
        with torch.cuda.stream(caller):  # another thread has a stream, and a device, of its own
            return {key: pinned(value).to(device, non_blocking=True) for key, value in batch.items()}

    return move


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made]:
    """`map(make, items)`, made in a thread, up to `BATCHES_AHEAD` items before they are asked for.

    What `make` raises is raised where its result would have come. Closing ends the thread.

    >>> list(ahead(len, ["a", "bc", ""]))
    [1, 2, 0]
    """
    rest = iter(items)
    pool = ThreadPoolExecutor(1, "gradfn-batches")
    try:
        waiting = deque(pool.submit(make, item) for item in islice(rest, BATCHES_AHEAD))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(make, item) for item in islice(rest, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)


def _one_behind(items: Generator[Made]) -> Generator[Made]:
    """The same items, each when the next has come: what is under way has time to arrive."""
    with closing(items):
        for last in items:
            for item in items:
                yield last
                last = item
            yield last


def _useful(data: Data, rows: range, lengths: np.ndarray, least: int = TRIAL_TOKENS) -> np.ndarray:
    """Which rows have something to learn from: a few tokens, and one to predict."""
    supervised = getattr(data, "supervised", None)
    useful = lengths >= least
    if supervised is not None:
        useful &= np.asarray(supervised)[rows.start : rows.stop] > 0
    return useful


def labelled(data: Data, row: int) -> Example:
    """The example; tokens without labels are their own labels, said before padding could be taken for one."""
    example = data[row]
    mask = example.get("attention_mask")
    if mask is not None and len(mask) and not bool(mask[0]):
        raise InputError(
            f"{row_name(data, row)} is padded on the left (its attention_mask starts with 0): "
            "give it without padding"
        )
    labels = example.get("labels")
    whole = isinstance(labels, Tensor) and not labels.is_floating_point()
    if whole and bool(((labels < 0) & (labels != IGNORED)).any()):  # pyright: ignore[reportOptionalOperand]
        raise InputError(
            f"{row_name(data, row)} has a label below 0, which is none: give classes or tokens, and "
            f"{IGNORED} for what is not to be learned"
        )
    if "input_ids" not in example or labels is not None:
        return example
    ids = example["input_ids"]
    return {**example, "labels": ids if mask is None else torch.where(mask.bool(), ids, IGNORED)}


def _masked(example: Example, name: str) -> Example:
    """The example with an attention mask, which says what is a token and what is padding."""
    if "input_ids" not in example:
        raise InputError("rows without input_ids have no tokens: view them by example")
    if not bool(example.get("attention_mask", torch.ones(())).all()):
        raise InputError(
            f"{name} is padded (its attention_mask has a 0): give it without padding to view tokens"
        )
    return {"attention_mask": torch.ones_like(example["input_ids"]), **example}


def _all_finite(result: Rows) -> Tensor:
    """Whether the sums of losses and values are finite, a scalar; where not, it may be for their size."""
    parts = result.values.values() if isinstance(result.values, dict) else [result.values]
    sums = torch.stack([result.losses.sum(), *(part.sum().to(result.losses) for part in parts)])
    return torch.isfinite(sums).all()


def _refuse_nonfinite(result: _Computed, data: Data, counts: np.ndarray, summed: bool) -> None:
    """Refuse losses and values that are not finite; `counts` are the results of each row."""
    for mark in result.arrived:
        mark.synchronize()
    if bool(result.finite):
        return
    values, losses = result.rows
    if summed and bool(torch.isfinite(losses).all()):
        names = ", ".join(row_name(data, int(row)) for row in result.numbers[:4])
        names += " ..." if len(result.numbers) > 4 else ""
        raise InputError(
            f"a gradient among those of {names} is NaN or infinite: leave "
            "that row out, or use --precision fp32"
        )
    parts = values.values() if isinstance(values, dict) else [values]
    owners = np.repeat(result.numbers, counts)
    named = [("loss", losses, result.numbers), *(("gradient", part, owners) for part in parts)]
    for what, value, rows in named:
        bad = ~torch.isfinite(value.flatten(1) if value.ndim > 1 else value[:, None]).all(1)
        if bool(bad.any()):
            row = row_name(data, int(rows[int(bad.nonzero()[0, 0])]))
            raise InputError(
                f"the {what} of {row} is NaN or infinite: mend or leave out that row, or use --precision fp32"
            )


def result_numbers(numbers: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Where the results of rows stand among all results; those of row i end at `offsets[i + 1]`.

    >>> result_numbers(np.array([2, 0]), np.array([0, 2, 3, 5]))
    array([3, 4, 0, 1])
    """
    return np.concatenate([np.arange(*offsets[row : row + 2]) for row in numbers])


def results_per_row(engine: Engine, data: Data) -> np.ndarray:
    """One, or where the engine's view is by token the tokens of the row."""
    return lengths_of(data) if engine.view.tokens else np.ones(len(data), np.int64)


def check_results(engine: Engine, count: int, what: str = "rows") -> None:
    """Refuse results that have no room in memory: of `count` rows, or of what `what` calls them.

    Raises:
        InputError: they take more than is free.
    """
    check_memory(
        count * engine.result_bytes, f"the results of {count:,} {what}",
        f"project the gradients (`gf.project(16)`), or take fewer {what} at a time",
    )  # fmt: skip


def gather(
    engine: Engine,
    data: Data,
    *,
    rows: range | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> Rows:
    """Run the engine over the rows and put everything, in the rows' order, into memory; see `stream`."""
    check_rows(data)
    rows = range(len(data)) if rows is None else rows
    if not len(rows):
        raise InputError("the data has no rows: give at least one example")
    offsets = offsets_of(results_per_row(engine, data)[rows.start : rows.stop])
    count = int(offsets[-1])
    check_results(engine, count)
    out: Rows | None = None
    for numbers, result in stream(
        engine, data, rows=rows, token_batch_size=token_batch_size, progress=progress, to_host=True
    ):
        batch = numbers - rows.start
        if out is None:
            out = Rows(_map(lambda v, n=count: v.new_empty(n, *v.shape[1:]), result.values),
                       result.losses.new_empty(len(rows)))  # fmt: skip
        at = torch.from_numpy(result_numbers(batch, offsets))
        out.losses[torch.from_numpy(batch)] = result.losses
        if isinstance(result.values, dict):
            for name, value in result.values.items():
                out.values[name][at] = value  # pyright: ignore[reportCallIssue, reportArgumentType]
        else:
            out.values[at] = result.values  # pyright: ignore[reportArgumentType]
    assert out is not None
    return out


def _map(function: Callable[[Tensor], Tensor], values: Blocks | Tensor) -> Blocks | Tensor:
    if isinstance(values, dict):
        return {name: function(value) for name, value in values.items()}
    return function(values)


def collect(
    model: nn.Module | Subject,
    data: Data,
    transform: Transform | None = None,
    *,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Blocks | Tensor:
    """Per-example gradients of all rows, transformed, in memory.

    Args:
        model: what is attributed: a `Subject`, or a module with a subject's `options` as keywords.
        data: examples, each a mapping of tensors.
        transform: applied to every example's blocks; None is the full gradient.
        progress: called with the tokens done.
        options: `loss`, `view`, `token_batch_size`; see `Subject`.

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
    subject = subject_of(model, **options)
    engine = probe_engine(subject.model, subject.loss, transform, view=subject.view)
    return gather(engine, data, token_batch_size=subject.token_batch_size, progress=progress).values
