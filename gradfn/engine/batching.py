"""How rows become batches: padded to one length, or of equal length where padding reaches a row's tokens.

Padding must not change a row. Most models are given a mask, or read only what stands before a token, but some
do neither: a mean over all positions, a Fourier transform, a rope that changes with the longest sequence. The
engine cannot read this off the code, so it compares the rows of a padded batch with the same rows alone,
unpadded.
"""

import sys
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from gradfn.data import collate
from gradfn.engine.engine import Engine
from gradfn.engine.verify import loss_tolerance, tolerance
from gradfn.errors import InputError
from gradfn.types import Batch, Example, Params

Measure = Callable[[Batch], tuple[Tensor, Tensor]]
"""Numbers of every row of a batch, `[rows, n]`, such as its gradient, and the losses of the rows."""
SMALL_SHARE = 16
"""A batch of less than this part of its budget costs more than the padding that it saves."""
BATCH_BYTES = 512 << 20
"""The results of a batch, and the activations of one whose rows have no tokens, take so much at most."""
LONG_TOKENS = 64.0
"""So many tokens, and four times those of the short row, are enough padding to compare with."""
LENGTH_ROPES = ("dynamic", "longrope")
"""The kinds of rope whose frequencies change when a sequence is longer than the model's first window."""
KEPT = ("index_topk", "keep_window_size")
"""So many tokens at most are read by some models; of equal scores, the length decides which."""


def plan_batches(
    lengths: Int64[np.ndarray, " rows"], token_batch_size: int, most_rows: int = sys.maxsize
) -> list[np.ndarray]:
    """Cut rows, longest first, into batches with `rows * longest <= token_batch_size`.

    A row longer than the budget is a batch of its own. A batch that fills a sixteenth of the budget ends
    before a row of half its length, so that a few rows of mixed lengths are not mostly padding. The largest
    batches come first, so that memory runs out at once or never. Rows of equal length stay in their order.

    Args:
        lengths: tokens of each row.
        token_batch_size: padded tokens of a batch, at most.
        most_rows: rows of a batch, at most.

    Returns:
        Row numbers of each batch; every row is in exactly one.

    Raises:
        InputError: a budget below 1.

    >>> plan_batches(np.array([2, 4, 2, 3]), 8)
    [array([1, 3]), array([0, 2])]
    >>> plan_batches(np.array([10, 100, 90]), 1000)
    [array([1, 2]), array([0])]
    """
    if token_batch_size < 1:
        raise InputError(
            f"a batch needs room for at least 1 token, got a token batch size of {token_batch_size}"
        )
    order = np.argsort(-lengths, kind="stable")
    padded = np.maximum(lengths[order], 1)  # collate gives an empty row one position
    batches, start = [], 0
    while start < len(order):
        longest = int(padded[start])
        count = max(1, min(token_batch_size // longest, most_rows))
        halved = int(np.searchsorted(-padded, -(longest // 2)))
        stop = min(start + count, max(halved, start + ceil(token_batch_size / SMALL_SHARE / longest)))
        batches.append(order[start:stop])
        start = stop
    return batches


def compared_rows(sizes: np.ndarray, useful: np.ndarray, enough: float = LONG_TOKENS) -> list[int]:
    """The shortest useful row, and one that is much longer and has `enough` tokens, or the longest.

    >>> compared_rows(np.array([9, 100, 4, 70]), np.ones(4, bool))
    [2, 3]
    """
    order = np.flatnonzero(useful)[np.argsort(sizes[useful], kind="stable")]
    if len(order) < 2:
        return []
    long = sizes[order] >= max(4 * sizes[order[0]], enough)
    return [int(order[0]), int(order[long.argmax() if long.any() else -1])]


def padding_changes_rows(
    measure: Measure, weights: Sequence[Tensor], rows: Sequence[Example], move: Callable[[Batch], Batch]
) -> bool:
    """Whether a row is another one in a padded batch than alone: other losses, or other gradients.

    Args:
        measure: what is compared.
        weights: of the model, by whose precision it is rounded.
        rows: of different lengths.
        move: puts a batch on the device.
    """
    found, losses = measure(move(collate(rows)))
    alone, own = (
        torch.cat(parts) for parts in zip(*(measure(move(collate([r]))) for r in rows), strict=True)
    )
    near, floor = tolerance([p.dtype for p in weights if p.is_floating_point()])
    norms = alone.norm(dim=1)
    same = (found - alone).norm(dim=1) <= near * norms + floor * norms.max()
    same &= (losses - own).abs() <= loss_tolerance(weights) * (1 + own.abs())
    return not bool(same.all())  # padding may make a row NaN, which equals nothing


def full_gradients(losses: Callable[[Params, Batch], Tensor], params: Params) -> Measure:
    """The gradients of every row with respect to all parameters, and the losses.

    >>> full_gradients(lambda p, b: p["w"] * b["x"], {"w": torch.ones(())})({"x": torch.tensor([2.0, 3.0])})
    (tensor([[2.],
            [3.]]), tensor([2., 3.]))
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}

    def measure(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            made = losses(leaves, batch)
            of_rows = [
                torch.autograd.grad(one, [*leaves.values()], retain_graph=True, materialize_grads=True)
                for one in made
            ]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in of_rows]), made.detach()

    return measure


def length_window(model: Any) -> float:
    """The length from which on a model's rope, or what it reads, changes with the longest sequence."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    ropes = [given, *(value for value in given.values() if isinstance(value, dict))]
    windows = [
        rope.get("original_max_position_embeddings") or getattr(text, "max_position_embeddings", 0)
        for rope in ropes
        if rope.get("rope_type", rope.get("type")) in LENGTH_ROPES
    ]
    windows += [getattr(text, name) for name in KEPT if isinstance(getattr(text, name, None), int)]
    return float(min(windows, default=float("inf")))


def shapes_of(example: Example) -> tuple[Any, ...]:
    """What two examples have in common if neither is padded beside the other."""
    return tuple(value.shape for value in example.values())


def batch_rows(engine: Engine, example: Example, tokens: bool) -> int:
    """How many rows a batch holds at most, so that neither their results nor their activations fill memory.

    Args:
        engine: what the batch is for.
        example: a row of it.
        tokens: whether a budget of tokens bounds the activations already.
    """
    row = engine.row_bytes
    if not tokens:
        row += engine.activation_bytes(example)
    return max(1, BATCH_BYTES // max(1, row))


def plan_equal(
    shapes: Sequence[Any], lengths: np.ndarray, token_batch_size: int, most_rows: int = sys.maxsize
) -> list[np.ndarray]:
    """`plan_batches` for rows that are not to be padded: a batch has rows of one shape.

    >>> plan_equal(["a", "b", "a"], np.array([2, 3, 2]), 8)
    [array([1]), array([0, 2])]
    """
    groups: dict[Any, list[int]] = {}
    for row in np.argsort(-lengths, kind="stable").tolist():
        groups.setdefault(shapes[row], []).append(row)
    return [
        np.array(rows)[batch]
        for rows in groups.values()
        for batch in plan_batches(lengths[rows], token_batch_size, most_rows)
    ]
