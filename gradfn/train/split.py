"""A loss in two: what a model makes of a batch, and the losses as a function of that."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.func import vmap

from gradfn.errors import InputError
from gradfn.exact import SplitLoss
from gradfn.model.losses import CausalLMLoss, ModelLoss
from gradfn.model.params import call
from gradfn.train.step import LossModule
from gradfn.types import Batch, LossFn, Params


class Split(NamedTuple):
    """The same of a batch.

    Args:
        outputs: of a batch at given parameters, the first axis that of rows.
        losses: at these outputs, `[batch]` or `[batch, tokens]`.
    """

    outputs: Callable[[Params, Batch], Tensor]
    losses: Callable[[Tensor, Batch], Tensor]


def split_of(loss: LossFn, *, tokens: bool = False) -> Split:
    """Split a loss of `causal_lm_loss` or `model_loss`, whose outputs are the logits, or a `SplitLoss`.

    Args:
        loss: of an example.
        tokens: give each token's part of the loss of its row, see `by_token` of the loss.

    Raises:
        InputError: another loss, or that of "kl", which needs the logits of two models; a loss that is not
            told apart by token, where this is asked.

    >>> import torch
    >>> split = split_of(SplitLoss(lambda p, e: p["w"] * e["x"], lambda z, e: z.square()))
    >>> split.losses(split.outputs({"w": torch.tensor(2.0)}, {"x": torch.arange(3.0)}), {"x": torch.zeros(3)})
    tensor([ 0.,  4., 16.])
    """
    if tokens and not isinstance(loss, CausalLMLoss):
        raise InputError(
            "the loss is not told apart by token and by outputs: take the rows, or a `causal_lm_loss`"
        )
    if isinstance(loss, SplitLoss):
        return Split(vmap(loss.outputs, (None, 0)), vmap(loss.output_loss))
    if not isinstance(loss, CausalLMLoss | ModelLoss) or loss.criterion == "kl":
        raise InputError(
            "the Gauss-Newton matrix needs a loss that is a function of a model's outputs: give one of "
            "`causal_lm_loss` or `model_loss`, not kl, or a `gradfn.train.SplitLoss`"
        )
    module = LossModule(loss, "logits")

    def outputs(params: Params, batch: Batch) -> Tensor:
        return call(module, {f"model.{name}": p for name, p in params.items()}, dict(batch))

    return Split(outputs, loss.tokens_of_logits if tokens else loss.of_logits)  # pyright: ignore
