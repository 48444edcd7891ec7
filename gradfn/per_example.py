"""Per-example gradients by definition: `vmap(grad(loss), in_dims=(None, 0))(params, batch)`."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from gradfn.types import Batch, LossFn, Params


def params_of(model: nn.Module) -> Params:
    """The model's parameters by name, detached: what losses and their gradients are functions of.

    >>> sorted(params_of(nn.Linear(2, 1)))
    ['bias', 'weight']
    """
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def call(model: nn.Module, params: Params, *inputs: Any, **named: Any) -> Any:
    """Call a model at other parameters; every use of a shared parameter is replaced.

    `functional_call` alone would replace the parameters of a module that occurs twice two times, and put its
    own replacement back afterwards.

    >>> call(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)}, torch.ones(1))
    tensor([1.])
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    replaced = {
        f"{path}.{name}".removeprefix("."): params[names[id(parameter)]]
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and names[id(parameter)] in params
    }
    return functional_call(model, replaced, inputs, named, tie_weights=False)


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

    >>> def loss(p, e):
    ...     return (p["w"] @ e["x"]) ** 2
    >>> per_example_grads(loss, {"w": torch.ones(2)}, {"x": torch.eye(2)})["w"]
    tensor([[2., 0.],
            [0., 2.]])
    """
    # vmap wants a dict, not any mapping (a BatchEncoding, say).
    return vmap(grad(loss), in_dims=(None, 0), chunk_size=chunk_size)(params, dict(batch))


def definition(loss: LossFn, params: Params, batch: Batch) -> Params:
    """`per_example_grads`, one example at a time where the model cannot be mapped over (data-dependent code).

    >>> def loss(p, e):
    ...     return p["w"] * (e["x"] if bool(e["x"] > 0) else 0)
    >>> definition(loss, {"w": torch.ones(())}, {"x": torch.tensor([3.0, -1.0])})["w"]
    tensor([3., 0.])
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # it is the definition, not fast
            return per_example_grads(loss, params, batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        pass  # what is wrong with the loss itself is raised below
    size = len(next(iter(batch.values())))
    rows = [grad(loss)(params, {key: value[row] for key, value in batch.items()}) for row in range(size)]
    return {name: torch.stack([row[name] for row in rows]) for name in params}
