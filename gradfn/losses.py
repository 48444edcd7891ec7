"""Pure per-example losses, and the chunked LM head that never holds the logits."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from gradfn.data import IGNORED
from gradfn.layers import output_head
from gradfn.types import Batch, Example, Params

Reduction = Literal["mean", "sum"]


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
    return (1024, 1024) if device.type == "cpu" else (4096, 8192)


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
    forward. The
    head itself gets no gradient: freeze it, or compute the logits.

    >>> linear_cross_entropy(torch.zeros(1, 2), torch.ones(4, 2), None, torch.tensor([3])).exp()
    tensor([4.])
    """
    return _LinearCrossEntropy.apply(x, weight, bias, targets)  # pyright: ignore[reportReturnType]


def token_cross_entropy(
    logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Cross-entropy at every position in float32 or better; 0 where the target is -100.

    >>> token_cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100])).exp()
    tensor([4., 1.])
    """
    logits = logits.to(_wide(logits.dtype))
    picked = logits.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return torch.where(targets == IGNORED, 0.0, logits.logsumexp(-1) - picked)


@dataclass(frozen=True, eq=False)
class CausalLMLoss:
    """Next-token cross-entropy of a decoder LM; see `causal_lm_loss`."""

    model: nn.Module
    reduction: Reduction = "mean"
    fused_head: bool = False

    def __call__(self, params: Params, example: Example) -> Tensor:
        """The definition, for one example: `functional_call` and the logits."""
        inputs = {"input_ids": example["input_ids"][None], "use_cache": False}
        logits = functional_call(self.model, params, (), inputs).logits[0]
        targets = shifted_labels(_labels(example))
        return self._reduce(token_cross_entropy(logits, targets), targets)

    def batched(self, batch: Batch) -> Float[Tensor, " batch"]:
        """The same for a right-padded batch in one forward, at the model's own parameters.

        No attention mask is needed: padding stands after every supervised position of a causal model.
        """
        targets = shifted_labels(_labels(batch))
        if not self.fused_head:
            logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
            return self._reduce(token_cross_entropy(logits, targets), targets)
        hidden = hidden_states(self.model, batch["input_ids"])
        head = output_head(self.model)
        kept = targets != IGNORED
        losses = linear_cross_entropy(hidden[kept], head.weight, head.bias, targets[kept])  # pyright: ignore
        rows = kept.nonzero()[:, 0]
        total = losses.new_zeros(len(targets)).index_add(0, rows, losses)
        return total / self._count(targets)

    def _count(self, targets: Tensor) -> Tensor | int:
        return (targets != IGNORED).sum(-1).clamp_min(1) if self.reduction == "mean" else 1

    def _reduce(self, losses: Tensor, targets: Tensor) -> Tensor:
        return losses.sum(-1) / self._count(targets)


def _labels(batch: Batch) -> Tensor:
    return batch["labels"] if "labels" in batch else batch["input_ids"]


def hidden_states(
    model: nn.Module, input_ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens dim"]:
    """The hidden states that the LM head reads: the output of the model without its head."""
    return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # pyright: ignore


def head_is_plain(model: nn.Module) -> bool:
    """Whether the model's logits are just `W h + b`: not scaled, capped or computed from something else.

    Compares the head applied to the hidden states with the model's own logits on a few tokens.
    """
    head = output_head(model)
    if not isinstance(head, nn.Linear) or not hasattr(model, "base_model") or model.base_model is model:
        return False
    ids = torch.linspace(0, len(head.weight) - 1, 8, device=head.weight.device).long().view(4, 2)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)  # pyright: ignore
        ours = head(hidden) if hidden is not None and hidden.shape[-1] == head.in_features else None
    if ours is None or ours.shape != own.shape:
        return False
    # A plain head runs the very same product, so there is hardly anything to tolerate.
    return float((ours - own).abs().max()) <= 4 * torch.finfo(own.dtype).eps * float(own.abs().max())


def causal_lm_loss(model: nn.Module, reduction: Reduction = "mean") -> CausalLMLoss:
    """Next-token cross-entropy over supervised positions, `-(1/n) sum_t log p(y_t | y_<t)`.

    Supervised: all tokens but the first whose label is not -100; without `labels`, `input_ids` are the
    labels. Computed in float32 or better. An example with nothing to supervise has loss 0.

    The LM head is computed a few positions at a time and its logits are never held, if the model's logits
    are found to be the plain linear map of its hidden states (`loss.fused_head` says so).

    Args:
        model: a causal LM with HF's interface (`input_ids -> .logits`), in eval mode.
        reduction: "mean" or "sum" over an example's supervised positions, in nats.

    Returns:
        `loss(params, example) -> scalar`, with `loss.batched(batch) -> [batch]`.
    """
    return CausalLMLoss(model, reduction, fused_head=head_is_plain(model))
