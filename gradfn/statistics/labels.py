"""Labels drawn from the model itself: what makes a Fisher matrix the true one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradfn.data import IGNORED, collate
from gradfn.engine.stream import Progress, keeps_rows, labelled, lengths_of, plan_rows
from gradfn.errors import InputError
from gradfn.model.losses import CausalLMLoss, ModelLoss, hidden_states, output_head, shifted_labels
from gradfn.model.params import evaluating
from gradfn.model.sharded import turns_of
from gradfn.random import uniforms
from gradfn.subject import TOKEN_BATCH_SIZE
from gradfn.types import Batch, Data, Example, LossFn
from gradfn.watch import WATCH

POSITIONS = 64
"""Positions whose distribution over the vocabulary is held at a time."""
Uniforms = Callable[[int, int], np.ndarray]
"""`uniforms(place in the batch, count)`: a row's first numbers in (0, 1)."""


@dataclass(frozen=True, eq=False)
class Relabelled:
    """Rows of data with other labels; names, texts and lengths are the data's own."""

    data: Data
    labels: list[dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Example:
        return {**labelled(self.data, row), **self.labels[row]}

    def __getattr__(self, name: str) -> Any:
        if name in ("ids", "texts", "lengths", "supervised"):
            return getattr(self.data, name)
        raise AttributeError(name)


def _draw(logits: Float[Tensor, "n classes"], uniform: np.ndarray) -> Int[Tensor, " n"]:
    """Classes by the inverse of the distribution function, in float64."""
    below = logits.double().softmax(-1).cumsum(-1)
    at = torch.from_numpy(uniform).to(below) * below[:, -1]
    return torch.searchsorted(below, at[:, None]).squeeze(1).clamp_max(logits.shape[-1] - 1)


def _draw_at(kept: Tensor, logits_at: Callable[[slice], Tensor], uniforms: Uniforms) -> Tensor:
    """A label for every kept position, row after row; a row's numbers are its own."""
    counts = kept.flatten(1).sum(1).tolist() if kept.ndim > 1 else kept.long().tolist()
    uniform = np.concatenate([uniforms(place, count) for place, count in enumerate(counts)])
    parts = [slice(start, start + POSITIONS) for start in range(0, len(uniform), POSITIONS)]
    drawn = [_draw(logits_at(part), uniform[part]) for part in parts]
    return torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.long)


def _next_tokens(loss: CausalLMLoss, batch: Batch, uniforms: Uniforms) -> dict[str, Tensor]:
    labels = batch["labels"].clone()
    kept = shifted_labels(labels) != IGNORED
    if loss.fused_head and turns_of(loss.model) is None:
        hidden, head = hidden_states(loss.model, batch["input_ids"])[kept], output_head(loss.model)
        drawn = _draw_at(kept, lambda part: head(hidden[part]), uniforms)  # pyright: ignore
    else:
        logits = loss.model(input_ids=batch["input_ids"], use_cache=False).logits[kept]
        drawn = _draw_at(kept, lambda part: logits[part], uniforms)
    labels[kept.roll(1, 1)] = drawn.to(labels)
    return {"labels": labels}


def _classes(loss: ModelLoss, batch: Batch, uniforms: Uniforms) -> dict[str, Tensor]:
    """Labels where labels are given; a decoder goes on reading the given ones."""
    labels, read = batch["labels"].clone(), {}
    if loss.task == "seq2seq_lm":
        read_labels = loss.read_labels(labels)
        made = loss.model.prepare_decoder_input_ids_from_labels(labels=read_labels)  # pyright: ignore
        read = {"decoder_input_ids": made}
    kept = labels != IGNORED
    logits = loss.logits({**batch, **read})[kept]
    labels[kept] = _draw_at(kept, lambda part: logits[part], uniforms).to(labels)
    return {"labels": labels, **read}


def _numbers(loss: ModelLoss, batch: Batch, uniforms: Uniforms) -> dict[str, Tensor]:
    """A squared error is the negative log of a Gaussian of variance 1/2 (k/2 for a mean over k numbers)."""
    means = loss.logits(batch).double().flatten(1)
    uniform = np.stack([uniforms(place, means.shape[1]) for place in range(len(means))])
    normal = torch.special.ndtri(torch.from_numpy(uniform)).to(means)
    scale = (0.5 * (means.shape[1] if loss.reduction == "mean" else 1)) ** 0.5
    return {"labels": (means + scale * normal).reshape(batch["labels"].shape).to(batch["labels"])}


def _relabel(loss: CausalLMLoss | ModelLoss, batch: Batch, uniforms: Uniforms) -> dict[str, Tensor]:
    if isinstance(loss, CausalLMLoss):
        return _next_tokens(loss, batch, uniforms)
    return (_numbers if loss.task == "regression" else _classes)(loss, batch, uniforms)


def check_drawn(loss: LossFn) -> None:
    """Refuse a loss that is not minus the logarithm of a distribution of labels; see `sample_labels`."""
    known = isinstance(loss, CausalLMLoss | ModelLoss)
    if not known or loss.criterion != "cross_entropy" or loss.label_smoothing:
        raise InputError("labels are drawn for a plain cross-entropy or squared error only: use the data's")


def sample_labels(
    loss: LossFn,
    data: Data,
    seed: int = 0,
    *,
    rows: range | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> Relabelled:
    """The data with labels drawn from the model, `y ~ p(. | example)`, for the true Fisher matrix.

    Labels are drawn where labels are given, in one forward pass. A row's labels depend
    on (seed, row) alone, not on its batch: where padding changes a row, batches have rows of one length.

    Args:
        loss: a cross-entropy or squared error made by `causal_lm_loss` or `model_loss`.
        data, token_batch_size, progress: see `collect`.
        seed: key of the draws.
        rows: which rows to draw for, the others keeping their labels; None means all.

    Raises:
        InputError: any other loss, which is not the negative logarithm of a distribution of labels.

    >>> sample_labels(lambda params, example: example["x"], [])
    Traceback (most recent call last):
    gradfn.errors.InputError: labels are drawn for a plain cross-entropy or squared error only: use the data's

    Source: Kunstner et al., arXiv:1905.12558, section 2.
    """
    check_drawn(loss)
    assert isinstance(loss, CausalLMLoss | ModelLoss)
    made: list[dict[str, Tensor]] = [{} for _ in range(len(data))]
    rows = range(len(data)) if rows is None else rows
    lengths, weights = lengths_of(data), [*loss.model.parameters()]
    total = int(lengths[rows.start : rows.stop].sum())

    def measure(batch: Batch) -> tuple[Tensor, Tensor]:
        losses = loss.batched(batch)
        return losses.new_zeros(len(losses), 1), losses

    with evaluating(loss.model), torch.no_grad(), WATCH.get()("labels", total, "tokens") as shown:
        pads = keeps_rows(measure, weights, data, rows)
        for places in plan_rows(data, rows, token_batch_size, pads=pads):
            numbers = places + rows.start
            examples = [labelled(data, int(row)) for row in numbers]
            batch = {key: value.to(weights[0].device) for key, value in collate(examples).items()}
            new = _relabel(
                loss, batch, lambda place, n, of=numbers: uniforms(n, seed, "labels", int(of[place]))
            )
            for place, row in enumerate(numbers):
                size = examples[place]["labels"].shape
                made[int(row)] = {k: v[place].cpu()[tuple(map(slice, size))] for k, v in new.items()}
            (progress or shown)(int(lengths[numbers].sum()))
    return Relabelled(data, made)
