"""How rows become batches: padded to one length, or of equal length where padding reaches a row's tokens.

Padding must not change a row. Most models are given a mask, or read only what stands before a token, but some
do neither: a mean over all positions, a Fourier transform, a rope that changes with the longest sequence. The
engine cannot read this off the code, so it compares the rows of a padded batch with the same rows alone,
unpadded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradfn.data import collate, plan_batches
from gradfn.engine.engine import Engine
from gradfn.engine.verify import loss_tolerance, tolerance
from gradfn.types import Batch, Example

LONG_TOKENS = 64
"""So many tokens, and four times those of the short row, are enough padding to compare with."""
LENGTH_ROPES = ("dynamic", "longrope")
"""The kinds of rope whose frequencies change when a sequence is longer than the model's first window."""
KEPT = ("index_topk", "keep_window_size")
"""So many tokens at most are read by some models; of equal scores, the length decides which."""


def compared_rows(sizes: np.ndarray, useful: np.ndarray) -> list[int]:
    """The shortest useful row, and one that is much longer, or the longest.

    >>> compared_rows(np.array([9, 100, 4, 70]), np.ones(4, bool))
    [2, 3]
    """
    order = np.flatnonzero(useful)[np.argsort(sizes[useful], kind="stable")]
    if len(order) < 2:
        return []
    enough = sizes[order] >= max(4 * sizes[order[0]], LONG_TOKENS)
    return [int(order[0]), int(order[enough.argmax() if enough.any() else -1])]


def padding_changes_rows(engine: Engine, rows: Sequence[Example], move: Callable[[Batch], Batch]) -> bool:
    """Whether a row is another one in a padded batch than alone: other losses, or other gradients."""
    found, losses = engine.sketch(move(collate(rows)))
    alone, own = (
        torch.cat(parts) for parts in zip(*(engine.sketch(move(collate([r]))) for r in rows), strict=True)
    )
    near, floor = tolerance([p.dtype for p in engine.model.parameters() if p.is_floating_point()])
    norms = alone.norm(dim=1)
    same = (found - alone).norm(dim=1) <= near * norms + floor * norms.max()
    same &= (losses - own).abs() <= loss_tolerance(engine.model) * (1 + own.abs())
    return not bool(same.all())  # padding may make a row NaN, which equals nothing


def length_window(model: nn.Module) -> float:
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


def plan_equal(shapes: Sequence[Any], lengths: np.ndarray, token_batch_size: int) -> list[np.ndarray]:
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
        for batch in plan_batches(lengths[rows], token_batch_size)
    ]
