"""A model's parameters as values, and the model as a function of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.func import functional_call

from gradfn.types import Params


def params_of(model: nn.Module) -> Params:
    """The model's parameters by name, detached: what losses and their gradients are functions of.

    >>> sorted(params_of(nn.Linear(2, 1)))
    ['bias', 'weight']
    """
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in eval mode, and put those of its modules back that were not.

    >>> net = nn.Linear(2, 1)
    >>> with evaluating(net):
    ...     net.training
    False
    >>> net.training
    True
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def call(model: nn.Module, params: Params, *inputs: Any, **named: Any) -> Any:
    """Call a model at other parameters; every use of a shared parameter is replaced.

    `functional_call` alone would replace the parameters of a module that occurs twice two times, and put its
    own replacement back afterwards.

    >>> import torch
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
