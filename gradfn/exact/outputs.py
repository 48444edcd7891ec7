"""Losses as functions of a model's outputs, which the Gauss-Newton matrix is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gradfn.data import IGNORED
from gradfn.errors import InputError
from gradfn.model.losses import CausalLMLoss, ModelLoss, shifted_labels, token_losses
from gradfn.model.params import call
from gradfn.types import Batch, Example, LossFn, Params

Outputs = Callable[[Params, Example], Tensor]
"""What a model makes of one example: `outputs(params, example) -> tensor`."""

OutputLoss = Callable[[Tensor, Example], Tensor]
"""The loss as a function of the outputs: `output_loss(outputs, example) -> scalar`."""


@dataclass(frozen=True)
class SplitLoss:
    """A loss of an example that says what its outputs are, for the Gauss-Newton matrix.

    Args:
        outputs: `outputs(params, example) -> tensor`.
        output_loss: `output_loss(outputs, example) -> scalar`, convex in the outputs.

    >>> import torch
    >>> loss = SplitLoss(lambda p, e: p["w"] * e["x"], lambda z, e: (z - e["y"]).square() / 2)
    >>> loss({"w": torch.tensor(2.0)}, {"x": torch.tensor(3.0), "y": torch.tensor(4.0)})
    tensor(2.)
    """

    outputs: Outputs
    output_loss: OutputLoss

    def __call__(self, params: Params, example: Example) -> Tensor:
        """The loss of one example."""
        return self.output_loss(self.outputs(params, example), example)


def outputs_and_loss(loss: LossFn) -> tuple[Outputs, OutputLoss]:
    """Split a loss for `gauss_newton_product`: the model's outputs, and the loss as a function of them.

    The outputs of `causal_lm_loss` are the logits `[tokens, vocabulary]` of all positions, those of
    `model_loss` the logits of the model. The loss does not depend on positions that are not supervised, so
    these add nothing to the product.

    Args:
        loss: `causal_lm_loss(model)` or `model_loss(model, task)`, of cross-entropy, squared error or
            log-odds, all convex in the logits; or a `SplitLoss`, which says itself what its outputs are.

    Returns:
        `(outputs, output_loss)`, with `output_loss(outputs(params, e), e) = loss(params, e)`.

    Raises:
        InputError: another loss; the "kl" loss, which needs the logits of another model too.

    >>> split = SplitLoss(lambda p, e: p["w"] * e["x"], lambda z, e: z.square())
    >>> outputs_and_loss(split)[0] is split.outputs
    True
    """
    if isinstance(loss, SplitLoss):
        return loss.outputs, loss.output_loss
    if not isinstance(loss, CausalLMLoss | ModelLoss):
        raise InputError(
            "the Gauss-Newton matrix needs a loss that is a function of a model's outputs: give one of "
            "`causal_lm_loss` or `model_loss`, or a `gradfn.exact.SplitLoss`, or take another `product`"
        )
    if loss.criterion == "kl":
        raise InputError("the kl loss depends on two models' logits: take cross_entropy or log_odds")
    return _of_next_tokens(loss) if isinstance(loss, CausalLMLoss) else _of_logits(loss)


def _of_next_tokens(loss: CausalLMLoss) -> tuple[Outputs, OutputLoss]:
    def outputs(params: Params, example: Example) -> Tensor:
        ids = example["input_ids"][None]
        return call(loss.model, params, input_ids=ids, use_cache=False).logits[0]

    def output_loss(logits: Tensor, example: Example) -> Tensor:
        targets = shifted_labels(example.get("labels", example["input_ids"]))
        total = token_losses(logits, targets, loss.criterion, loss.label_smoothing).sum()
        if loss.reduction == "mean":
            total = total / (targets != IGNORED).sum().clamp_min(1)
        return total * example["weight"].to(total.dtype) if "weight" in example else total

    return outputs, output_loss


def _of_logits(loss: ModelLoss) -> tuple[Outputs, OutputLoss]:
    def alone(example: Example) -> Batch:
        return {name: value[None] for name, value in example.items()}

    def outputs(params: Params, example: Example) -> Tensor:
        return call(loss.model, params, **loss.inputs(alone(example))).logits[0]

    def output_loss(logits: Tensor, example: Example) -> Tensor:
        return loss.of_logits(logits[None], alone(example))[0]

    return outputs, output_loss
