"""Pure per-example losses, and the chunked LM head that never holds the logits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gradfn.data import IGNORED
from gradfn.errors import InputError
from gradfn.model.output import chunked_cross_entropy, fits
from gradfn.model.params import call
from gradfn.model.sharded import at_head, check_turns, turns_of
from gradfn.model.sites import output_head
from gradfn.model.spread import refuse_spread
from gradfn.model.trials import decoder_of, head_is_plain, refuse_later_tokens, refuse_unread_labels
from gradfn.types import Batch, Example, Params

Reduction = Literal["mean", "sum"]
Criterion = Literal["cross_entropy", "log_odds", "margin", "kl"]
Task = Literal["masked_lm", "seq2seq_lm", "classification", "image_classification", "regression"]
READS_ENCODER = re.compile(r"(EncDecAttention|encoder_attn|cross_?att\w*)\.(.*\.)?(k|v|key|value)(_proj)?$")
"""Paths in a decoder whose input is what the encoder gives."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Losses are computed in float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def shifted_labels(labels: Int[Tensor, "*batch tokens"]) -> Int[Tensor, "*batch tokens"]:
    """Align labels with the positions that predict them; the last position predicts nothing.

    >>> shifted_labels(torch.tensor([5, 6, 7]))
    tensor([   6,    7, -100])
    """
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


def _tile(device: torch.device) -> tuple[int, int]:
    """Positions and vocabulary entries at a time: on a CPU few enough for its cache."""
    return (2048, 512) if device.type == "cpu" else (4096, 8192)


class _LinearCrossEntropy(torch.autograd.Function):
    """Per-position cross-entropy of `x Wᵀ + b`; the gradient w.r.t. `x` is made in the forward."""

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        losses = x.new_empty(len(x), dtype=_wide(x.dtype))
        grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        rows, _ = _tile(x.device)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            losses[part], part_grad = _head_rows(x[part], weight, bias, targets[part], grad is not None)
            if grad is not None and part_grad is not None:
                grad[part] = part_grad
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = ctx.saved_tensors
        return (grad * grads[0][:, None]).to(grad.dtype), None, None, None


def _head_rows(x, weight, bias, targets, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """Losses of some positions and their gradient, `softmax(z) W - W[target]`, in one pass over `W`.

    The softmax is the online one: when a tile raises the running maximum, what was summed is scaled down.
    Source: online normalizer calculation for softmax, arXiv:1805.02867, algorithm 3.
    """
    wide = _wide(x.dtype)
    total, target = x.new_zeros(len(x), 1, dtype=wide), x.new_zeros(len(x), 1, dtype=wide)
    peak = torch.full_like(total, -torch.inf)
    grad = torch.zeros_like(x, dtype=wide) if differentiate else None
    _, columns = _tile(x.device)
    for start in range(0, len(weight), columns):
        tile = weight[start : start + columns]
        z = F.linear(x, tile, None if bias is None else bias[start : start + columns]).to(wide)
        at = targets[:, None] - start
        target = torch.where((at >= 0) & (at < len(tile)), z.gather(1, at.clamp(0, len(tile) - 1)), target)
        before, peak = peak, torch.maximum(peak, z.amax(1, keepdim=True))
        scale, exps = (before - peak).exp_(), z.sub_(peak).exp_()
        total = total.mul_(scale).add_(exps.sum(1, keepdim=True))
        if grad is None:
            continue
        if exps.dtype == tile.dtype:
            grad.mul_(scale).addmm_(exps, tile)
        else:
            grad.mul_(scale).add_(exps.to(tile.dtype) @ tile)
    losses = (total.log() + peak - target).squeeze(1)
    return losses, None if grad is None else grad.div_(total).sub_(weight[targets])


def linear_cross_entropy(
    x: Float[Tensor, "positions dim"],
    weight: Float[Tensor, "vocab dim"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " positions"],
) -> Float[Tensor, " positions"]:
    """Cross-entropy of a linear head, `logsumexp(W x + b) - (W x + b)[target]`, without the logits.

    Positions and vocabulary are taken a tile at a time, and the gradient with respect to `x` is made in the
    forward. The head itself gets no gradient: freeze it, or compute the logits.

    >>> linear_cross_entropy(torch.zeros(1, 2), torch.ones(4, 2), None, torch.tensor([3])).exp()
    tensor([4.])
    """
    return _LinearCrossEntropy.apply(x, weight, bias, targets)  # pyright: ignore[reportReturnType]


def token_losses(
    logits: Float[Tensor, "*batch vocab"],
    targets: Int[Tensor, "*batch"],
    criterion: Criterion = "cross_entropy",
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*batch"]:
    """The loss of every position (or class) in float32 or better; 0 where the target is -100.

    * cross_entropy: `-log p_y`; with label smoothing e, `(1 - e) (-log p_y) + e mean_v (-log p_v)`.
    * log_odds: `-(z_y - logsumexp_{v != y} z_v)`, minus the log of the odds `p_y / (1 - p_y)`.
      Source: TRAK, arXiv:2303.14186, section 3.
    * margin: `max_{v != y} z_v - z_y`, below 0 where y is predicted.

    >>> token_losses(torch.zeros(2, 4), torch.tensor([1, -100])).exp()
    tensor([4., 1.])
    >>> token_losses(torch.zeros(1, 4), torch.tensor([1]), "log_odds").exp()
    tensor([3.])
    """
    logits = logits.to(_wide(logits.dtype))
    at = targets.clamp_min(0)[..., None]
    picked = logits.gather(-1, at).squeeze(-1)
    if criterion in ("log_odds", "margin"):
        others = logits.scatter(-1, at, -torch.inf)
        losses = (others.logsumexp(-1) if criterion == "log_odds" else others.amax(-1)) - picked
    else:
        total = logits.logsumexp(-1)
        losses = total - picked
        if label_smoothing:
            losses = (1 - label_smoothing) * losses + label_smoothing * (total - logits.mean(-1))
    return torch.where(targets == IGNORED, 0.0, losses)


def token_divergences(
    logits: Float[Tensor, "*batch vocab"],
    reference: Float[Tensor, "*batch vocab"],
    targets: Int[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """`KL(reference || model) = sum_v r_v (log r_v - log p_v)` at every position whose target is not -100.

    >>> token_divergences(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([1]))
    tensor([0.])
    """
    ours = logits.to(_wide(logits.dtype)).log_softmax(-1)
    theirs = reference.detach().to(ours.dtype).log_softmax(-1)
    return torch.where(targets == IGNORED, 0.0, (theirs.exp() * (theirs - ours)).sum(-1))


def _check(reduction: str, criterion: str, label_smoothing: float, reference: nn.Module | None) -> None:
    for what, given, choices in (
        ("reduction", reduction, get_args(Reduction)), ("loss", criterion, get_args(Criterion)),
    ):  # fmt: skip
        if given not in choices:
            raise InputError(f"no {what} {given!r}: choose {', '.join(choices)}")
    if not 0 <= label_smoothing < 1:
        raise InputError(f"label smoothing must be at least 0 and below 1, not {label_smoothing}")
    if label_smoothing and criterion != "cross_entropy":
        raise InputError(f"label smoothing is for cross_entropy, not for {criterion}")
    if (criterion == "kl") != (reference is not None):
        raise InputError("the kl loss, and no other, needs a reference model")


class _Weighted:
    """What losses of models have in common: a weight of the example, where it has one."""

    def _weigh(self, losses: Tensor, batch: Batch) -> Tensor:
        return losses * batch["weight"].to(losses.dtype) if "weight" in batch else losses


@dataclass(frozen=True)
class CausalLMLoss(_Weighted):
    """A loss of the next tokens of a decoder LM; see `causal_lm_loss`."""

    model: nn.Module
    reduction: Reduction = "mean"
    fused_head: bool = False
    criterion: Criterion = "cross_entropy"
    label_smoothing: float = 0.0
    reference: nn.Module | None = None
    chunked_head: bool = False

    def __post_init__(self) -> None:
        _check(self.reduction, self.criterion, self.label_smoothing, self.reference)

    def __call__(self, params: Params, example: Example) -> Tensor:
        """The definition, for one example: a functional call and the logits."""
        ids = example["input_ids"][None]
        logits = call(self.model, params, input_ids=ids, use_cache=False).logits[0]
        theirs = None if self.reference is None else self._reference_logits(ids)[0]
        targets = shifted_labels(_labels(example))
        return self._weigh(self._reduce(self._positions(logits, theirs, targets), targets), example)

    def batched(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The same for a right-padded batch in one forward, at the model's own parameters.

        No attention mask is needed: padding stands after every supervised position of a causal model.
        """
        targets = shifted_labels(_labels(batch))
        return self._weigh(self._reduce(self._at_positions(batch, targets, self.fused_head), targets), batch)

    def by_token(self, batch: Batch) -> Float[Tensor, "batch tokens"]:
        """Each token's part of `batched`, at the token that is predicted; the parts of a row add up to it."""
        targets = shifted_labels(_labels(batch))
        return self._by_token(self._at_positions(batch, targets, False), targets, batch)

    def logits(self, batch: Batch) -> Float[Tensor, "batch tokens vocab"]:
        """What the model makes of a right-padded batch."""
        return self.model(input_ids=batch["input_ids"], use_cache=False).logits

    def tokens_of_logits(self, logits: Tensor, batch: Batch) -> Float[Tensor, "batch tokens"]:
        """`by_token` as a function of the logits; not of "kl", which needs those of another model too."""
        targets = shifted_labels(_labels(batch))
        return self._by_token(self._positions(logits, None, targets), targets, batch)

    def of_logits(self, logits: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        """`batched` as a function of the logits; not of "kl"."""
        return self.tokens_of_logits(logits, batch).sum(1)

    def _by_token(self, losses: Tensor, targets: Tensor, batch: Batch) -> Tensor:
        """The parts of rows' losses, from those of positions, at the tokens that are predicted."""
        count = self._count(targets)
        parts = losses / (count if isinstance(count, int) else count[:, None])
        return F.pad(self._weigh(parts.T, batch).T[:, :-1], (1, 0))

    def _at_positions(self, batch: Batch, targets: Tensor, fused: bool) -> Float[Tensor, "batch tokens"]:
        """The loss of every position, 0 where nothing is supervised; fused, the head gets no gradient."""
        ids, head = batch["input_ids"], output_head(self.model)
        chunked = self.chunked_head and not fits(ids.numel(), head.weight)  # pyright: ignore
        if not (fused or chunked):
            theirs = None if self.reference is None else self._reference_logits(ids)
            return self._positions(self.logits(batch), theirs, targets)
        kept = (targets != IGNORED).nonzero(as_tuple=True)
        of_head = chunked_cross_entropy if chunked else linear_cross_entropy

        def of_hidden(hidden: Tensor) -> Tensor:
            losses = of_head(hidden[kept], head.weight, head.bias, targets[kept])  # pyright: ignore
            return losses.new_zeros(targets.shape).index_put(kept, losses)

        if turns_of(self.model) is not None:
            return at_head(self.model, ids, of_hidden)
        return of_hidden(hidden_states(self.model, ids))

    def positions(self, batch: Batch, path: str) -> Bool[Tensor, "batch tokens"]:
        """The positions whose statistics count: those that predict a supervised token."""
        return shifted_labels(_labels(batch)) != IGNORED

    def with_whole_logits(self) -> "CausalLMLoss":
        """The same loss with the head's output computed, which the head's own gradient needs."""
        return replace(self, fused_head=False)

    def with_chunked_head(self) -> "CausalLMLoss":
        """The same loss, twice differentiable in all parameters; many logits are not held at once."""
        return replace(self, fused_head=False, chunked_head=self.fused_head)

    def _reference_logits(self, ids: Tensor) -> Tensor:
        assert self.reference is not None
        with torch.no_grad():
            return self.reference(input_ids=ids, use_cache=False).logits

    def _positions(self, logits: Tensor, theirs: Tensor | None, targets: Tensor) -> Tensor:
        if theirs is not None:
            return token_divergences(logits, theirs, targets)
        return token_losses(logits, targets, self.criterion, self.label_smoothing)

    def _count(self, targets: Tensor) -> Tensor | int:
        return (targets != IGNORED).sum(-1).clamp_min(1) if self.reduction == "mean" else 1

    def _reduce(self, losses: Tensor, targets: Tensor) -> Tensor:
        return losses.sum(-1) / self._count(targets)


@dataclass(frozen=True)
class ModelLoss(_Weighted):
    """A loss of the logits of any HF model; see `model_loss`."""

    model: nn.Module
    task: Task
    reduction: Reduction = "mean"
    criterion: Criterion = "cross_entropy"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise InputError(f"no task {self.task!r}: choose {', '.join(get_args(Task))}")
        _check(self.reduction, self.criterion, self.label_smoothing, None)

    def __call__(self, params: Params, example: Example) -> Tensor:
        """The definition: the batch of one example at other parameters."""
        batch = {key: value[None] for key, value in example.items()}
        logits = call(self.model, params, **self.inputs(batch)).logits
        return self.of_logits(logits, batch)[0]

    def batched(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The same for a padded batch in one forward; `attention_mask` says what is padding."""
        return self.of_logits(self.logits(batch), batch)

    def logits(self, batch: Batch) -> Tensor:
        """What the model makes of a padded batch."""
        return self.model(**self.inputs(batch)).logits

    def positions(self, batch: Batch, path: str) -> Tensor | None:
        """The positions whose statistics count: those that predict a token, else all but padding.

        Keys and values of cross-attention are made of the encoder's positions.
        """
        encoded = "encoder" in path.split(".") or READS_ENCODER.search(path)
        decoder = self.task == "seq2seq_lm" and not encoded
        if decoder or self.task == "masked_lm":
            return batch["labels"] != IGNORED
        return batch["attention_mask"].bool() if "attention_mask" in batch else None

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is called with for a padded batch."""
        like = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        inputs = {
            key: value.to(like) if value.is_floating_point() else value  # pixels come in float32
            for key, value in batch.items()
            if key not in ("labels", "weight")
        }
        if "input_ids" in inputs and "attention_mask" in inputs:
            # A decoder that classifies finds the end of a text by its padding token.
            inputs["input_ids"] = torch.where(
                inputs["attention_mask"].bool(), inputs["input_ids"], self._padding or 0
            )
        if self.task == "seq2seq_lm":
            return {**inputs, "labels": self.read_labels(batch["labels"]), "use_cache": False}
        return inputs

    def read_labels(self, labels: Tensor) -> Tensor:
        """The labels of which the model itself makes the decoder's inputs: tokens where it has no padding."""
        return labels.clamp_min(0) if self._padding is None else labels

    @property
    def _padding(self) -> int | None:
        """The padding token; None if it is none of the model's tokens, so that the mask alone decides."""
        config: Any = getattr(self.model, "config", None)
        pad, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
        return pad if pad is not None and 0 <= pad < (size or pad + 1) else None

    def of_logits(self, logits: Tensor, batch: Batch) -> Float[Tensor, " batch"]:
        """`batched` as a function of the logits."""
        labels = batch["labels"]
        if self.task == "regression":
            wide = logits.to(_wide(logits.dtype)).flatten(1)
            squares = (wide - labels.to(wide.dtype).reshape(wide.shape)).square()
            return self._weigh(squares.mean(1) if self.reduction == "mean" else squares.sum(1), batch)
        losses = token_losses(logits, labels, self.criterion, self.label_smoothing)
        if losses.ndim > 1:
            count = (labels != IGNORED).sum(-1).clamp_min(1) if self.reduction == "mean" else 1
            losses = losses.sum(-1) / count
        return self._weigh(losses, batch)


def _labels(batch: Batch) -> Tensor:
    return batch["labels"] if "labels" in batch else batch["input_ids"]


def hidden_states(
    model: nn.Module, input_ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens dim"]:
    """The hidden states that the LM head reads: the output of the model without its head."""
    return decoder_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state  # pyright: ignore


def causal_lm_loss(
    model: nn.Module,
    reduction: Reduction = "mean",
    *,
    criterion: Criterion = "cross_entropy",
    label_smoothing: float = 0.0,
    reference: nn.Module | None = None,
) -> CausalLMLoss:
    """A loss of next tokens: cross-entropy, `-(1/n) sum_t log p(y_t | y_<t)`, unless told otherwise.

    Supervised: all tokens but the first whose label is not -100; without `labels`, `input_ids` are the
    labels. Computed in float32 or better. An example with nothing to supervise has loss 0. An example's
    `weight`, an advantage say, multiplies its loss.

    The LM head is computed a tile at a time and its logits are never held, if the loss is cross-entropy
    and the model's logits are found to be the plain linear map of its hidden states (`loss.fused_head`).

    Args:
        model: a causal LM with HF's interface (`input_ids -> .logits`), in eval mode.
        reduction: "mean" or "sum" over an example's supervised positions, in nats.
        criterion: "cross_entropy", "log_odds", "margin" (see `token_losses`), or "kl" (see
            `token_divergences`).
        label_smoothing: the share of the target that is spread over all tokens.
        reference: the model that "kl" compares with, of the same tokens.

    Returns:
        `loss(params, example) -> scalar`, with `loss.batched(batch) -> [batch]`.

    Raises:
        InputError: no such reduction or criterion, options that do not go together, a model whose logits
            depend on later tokens, or one that is spread over processes which do not take turns.
    """
    check_turns(model)
    refuse_spread(model)
    refuse_later_tokens(model)
    fused = criterion == "cross_entropy" and not label_smoothing and head_is_plain(model)
    return CausalLMLoss(model, reduction, fused, criterion, label_smoothing, reference)


def model_loss(
    model: nn.Module,
    task: Task,
    reduction: Reduction = "mean",
    *,
    criterion: Criterion = "cross_entropy",
    label_smoothing: float = 0.0,
) -> ModelLoss:
    """A loss of an HF model's logits; all in an example but `labels` and `weight` is the model's input.

    Args:
        model: maps keyword inputs to an output with `.logits`.
        task: "masked_lm" (labels [tokens], -100 where not asked), "seq2seq_lm" (the decoder's labels),
            "classification" (label a class; of a sequence or an image), "image_classification" (the same,
            where what is recorded of it shall say that images are read), "regression" (label numbers; the
            loss is the squared error).
        reduction: "mean" or "sum" over supervised positions, or over the numbers of a regression.
        criterion, label_smoothing: see `causal_lm_loss`.

    Returns:
        `loss(params, example) -> scalar`, with `loss.batched(batch) -> [batch]`.

    Raises:
        InputError: no such task, reduction or criterion, or an encoder-decoder that does not read its labels.
    """
    loss = ModelLoss(model, task, reduction, criterion, label_smoothing)
    if task == "seq2seq_lm":
        refuse_unread_labels(model)
    return loss


def advantages(rewards: Sequence[float], groups: Sequence[Any]) -> list[float]:
    """Dr. GRPO's advantages: each reward minus the mean reward of its group, not divided by any deviation.

    Args:
        rewards: one an example.
        groups: what each example belongs to, its prompt.

    >>> advantages([1.0, 0.0, 5.0], ["a", "a", "b"])
    [0.5, -0.5, 0.0]

    Source: Dr. GRPO, arXiv:2503.20783, section 3.2.
    """
    members: dict[Any, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        members.setdefault(group, []).append(reward)
    means = {group: sum(values) / len(values) for group, values in members.items()}
    return [reward - means[group] for reward, group in zip(rewards, groups, strict=True)]
