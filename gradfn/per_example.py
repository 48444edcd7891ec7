"""Per-example gradients by definition: `vmap(grad(loss), in_dims=(None, 0))(params, batch)`."""

from torch import nn
from torch.func import grad, vmap

from gradfn.types import Batch, LossFn, Params


def params_of(model: nn.Module) -> Params:
    """The model's parameters by name, detached: what losses and their gradients are functions of.

    >>> sorted(params_of(nn.Linear(2, 1)))
    ['bias', 'weight']
    """
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def per_example_grads(loss: LossFn, params: Params, batch: Batch, *, chunk_size: int | None = None) -> Params:
    """The gradient of each example's own loss, `d loss(params, example_b) / d params`.

    This is the definition that every faster engine is tested against. It holds `[batch, *parameter]` for
    every parameter at once.

    Args:
        loss: `loss(params, example) -> scalar`, pure.
        params: the parameters to differentiate with respect to.
        batch: tensors `[batch, ...]`.
        chunk_size: how many examples at a time; None means all.

    Returns:
        `{name: [batch, *parameter]}`, in units of loss per unit of parameter.

    >>> import torch
    >>> def loss(p, e):
    ...     return (p["w"] @ e["x"]) ** 2
    >>> per_example_grads(loss, {"w": torch.ones(2)}, {"x": torch.eye(2)})["w"]
    tensor([[2., 0.],
            [0., 2.]])
    """
    # vmap wants a dict, not any mapping (a BatchEncoding, say).
    return vmap(grad(loss), in_dims=(None, 0), chunk_size=chunk_size)(params, dict(batch))
