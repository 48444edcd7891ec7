"""A model's parameters as values, and the model as a function of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from gradfn.errors import InputError
from gradfn.model.spread import is_spread
from gradfn.types import Params


def params_of(model: nn.Module) -> Params:
    """The model's parameters by name, detached: what losses and their gradients are functions of.

    Raises:
        InputError: a parameter is sharded over processes.

    >>> sorted(params_of(nn.Linear(2, 1)))
    ['bias', 'weight']
    """
    if (spread := next((n for n, p in model.named_parameters() if is_spread(p)), None)) is not None:
        raise InputError(
            f"{spread} is sharded over processes, and this is a function of whole weights: load the model "
            "whole"
        )
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def seeded_model(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new model, a function of the seed.

    >>> a, b = (seeded_model(lambda: nn.Linear(2, 1), 3).weight for _ in range(2))
    >>> torch.equal(a, b)
    True
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        # torch.manual_seed keeps a traceback at every call for devices that are not there yet.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        return make()


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
    own replacement back afterwards. Quantised parameters stay: their codes mean nothing without the scales
    that they carry.

    >>> call(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)}, torch.ones(1))
    tensor([1.])
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    replaced = {
        f"{path}.{name}".removeprefix("."): params[names[id(parameter)]]
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and names[id(parameter)] in params and parameter.is_floating_point()
    }
    return functional_call(model, replaced, inputs, named, tie_weights=False)
