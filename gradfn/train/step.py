"""One training step as a pure, twice differentiable function, and the losses of a batch that it needs."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradfn.engine.reference import one_number
from gradfn.errors import InputError
from gradfn.model.params import call
from gradfn.train.optimizers import State, update
from gradfn.train.spec import Training
from gradfn.types import Batch, Example, LossFn, Params

Losses = Callable[[Params, Batch], Tensor]
"""The losses of a batch at given parameters, `[batch]`; or of stacked ones, `[models, batch]`."""

Removal = Literal["drop", "mask"]
"""Whether a row that is removed has no place in a training, or keeps it with weight 0; see `make_step`."""


def make_step(
    loss: LossFn, training: Training, *, removal: Removal = "drop"
) -> Callable[[State, Batch, Tensor], State]:
    """The training step, a pure function of state, batch and example weights, twice differentiable in all.

    The gradient is that of `sum_b weights_b loss_b`, with no division by the batch size.

    Args:
        loss: `loss(params, example) -> scalar`; its `batched`, where it has one, is used instead.
        training: optimizer and schedule.
        removal: what a step does where all weights are 0. "drop": there is no such step, so the state stays
            as it is. "mask": the step is taken with a gradient of 0, so momentum and decay still move the
            parameters, and the step is continuous in the weights.

    Returns:
        `step(state, batch, weights [batch]) -> state`, of one model; `vmap(step)` steps many.

    >>> import torch
    >>> from gradfn.train import first_state
    >>> def loss(p, e):
    ...     return (p["w"] * e["x"]).sum()
    >>> training = Training(1, 2, 0.5, "sgd")
    >>> state = first_state({"w": torch.zeros(1)}, training, torch.tensor(1))
    >>> step = make_step(loss, training)
    >>> step(state, {"x": torch.tensor([[1.0], [3.0]])}, torch.tensor([0.5, 0.5])).params["w"]
    tensor([-1.])
    """
    losses = losses_of(loss)

    def step(state: State, batch: Batch, weights: Tensor) -> State:
        grads = grad(lambda params: (losses(params, batch) * weights).sum())(state.params)
        return update(training, state, grads, (weights != 0).any() if removal == "drop" else None)

    return step


def losses_of(loss: LossFn, *, fused: bool = False, tokens: bool = False) -> Losses:
    """The losses of a batch as a function of parameters: `loss.batched` where there is one, else `vmap`.

    Attention runs by its formula: fused kernels can be neither mapped over nor differentiated twice.

    Args:
        loss: of an example.
        fused: let attention run in the model's own kernel, for one gradient and no second one.
        tokens: give each token's part of the loss of its row, `[batch, tokens]`, see `by_token` of the loss.

    Raises:
        InputError: a loss that is not told apart by token.

    >>> import torch
    >>> losses_of(lambda p, e: p["w"] * e["x"])({"w": torch.tensor(2.0)}, {"x": torch.arange(3.0)})
    tensor([0., 2., 4.])
    """

    def one(params: Params, example: Example) -> Tensor:
        return one_number(loss(params, example))

    each = vmap(one, in_dims=(None, 0))
    form = "by_token" if tokens else "batched"
    module = None
    if callable(getattr(loss, form, None)) and isinstance(getattr(loss, "model", None), nn.Module):
        own: Any = getattr(loss, "with_whole_logits" if fused else "with_chunked_head", None)
        module = LossModule(loss if own is None else own(), form)
    elif tokens:
        raise InputError(
            "the loss is not told apart by token: take the rows, or a loss of a language model, which has "
            "`by_token`"
        )

    def losses(params: Params, batch: Batch) -> Tensor:
        with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
            if module is None:
                return each(params, dict(batch))
            made = call(module, {f"model.{name}": p for name, p in params.items()}, dict(batch))
            return made if tokens else one_number(made, len(next(iter(batch.values()))))

    return losses


class LossModule(nn.Module):
    """A loss and its model as one module, so that a call can replace the model's parameters."""

    def __init__(self, loss: Any, form: str):
        super().__init__()
        self.model, self.loss, self.form = loss.model, loss, form

    def forward(self, batch: Batch) -> Tensor:
        """The losses of the batch."""
        return getattr(self.loss, self.form)(batch)
