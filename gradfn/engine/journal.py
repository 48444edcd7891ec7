"""What a forward pass sets on the modules of a model, and how to run the model as a function."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

_MISSING = object()
_STOCK = vars(nn.Module()).keys()
"""What every module has."""


@dataclass(eq=False)
class Journal:
    """What modules had where a forward pass set something else; see `as_function`.

    Args:
        rebinds: whether a module or a parameter was set, or a module converted (`module.to(...)`). Under
            `vmap(grad)` the parameters are wrappers, and such a model may crash the process.
    """

    rebinds: bool = False
    before: dict[tuple[nn.Module, str], tuple[dict[str, Any], Any]] = field(default_factory=dict)

    def note(self, module: nn.Module, name: str) -> None:
        """Remember what a module has by this name; parameters are put back by `functional_call`."""
        for own in (module._buffers, module._modules, module.__dict__):
            if name in own:
                self.before.setdefault((module, name), (own, own[name]))
                return
        if name not in module._parameters:
            self.before.setdefault((module, name), (module.__dict__, _MISSING))

    def undo(self) -> None:
        """Put everything back."""
        for (module, name), (own, value) in self.before.items():
            for other in (module._buffers, module._modules, module.__dict__):
                other.pop(name, None)
            if value is not _MISSING:
                own[name] = value


class _Called:
    """What `CheckpointFunction` is to `checkpoint`, without the dropping."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


class _Contiguous(torch.autograd.Function):
    """A copy, with a contiguous gradient.

    Of a transposed one, torch's batch norm of one example in evaluation mode makes a wrong one on CPUs. A
    view would not do, because activations in place may follow.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].contiguous()


def _batch_norm(*args: Any, stock: Callable[..., Tensor] = F.batch_norm, **options: Any) -> Any:
    y = stock(*args, **options)
    return _Contiguous.apply(y) if len(y) == 1 else y


def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    """What `checkpoint` does before and after it calls its function."""
    yield


@contextmanager
def as_function(model: nn.Module, *, drops: bool = False) -> Iterator[Journal]:
    """Run a model as a function of parameters and inputs.

    What modules set on themselves is undone at the end, such as a cache that grows with the longest sequence
    so far, or a recurrent state: a row must not depend on the rows before it. So is what they put into their
    lists and dicts, such as a tensor made of parameters: without its graph it has no gradient.
    `torch.utils.checkpoint` calls its function and drops nothing, because a forward pass that is repeated in
    the backward would miss the probes, and cannot be repeated under `vmap`.

    Args:
        model: whose parameters are put back too. `functional_call` leaves plain tensors behind in a module
            that the model contains twice, or that registers its parameters anew.
        drops: let `torch.utils.checkpoint` drop what it is for, because the backward pass runs inside too.

    >>> class Counts(nn.Module):
    ...     calls = 0
    ...     def forward(self, x):
    ...         self.calls += 1
    ...         return x
    >>> counts = Counts()
    >>> with as_function(counts):
    ...     _ = counts(1), counts(2)
    >>> counts.calls
    0
    """
    journal, modules = Journal(), list(model.modules())
    parameters = [(module, dict(module._parameters)) for module in modules if module._parameters]
    held = [
        (value, copy(value))
        for module in modules
        for name in vars(module).keys() - _STOCK
        if isinstance(value := vars(module)[name], (dict, list))  # a union would be made for every name
    ]
    stock = {name: getattr(nn.Module, name) for name in ("__setattr__", "register_buffer", "_apply")}

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if "_modules" in module.__dict__:  # else it is being made
            journal.note(module, name)
            journal.rebinds |= isinstance(value, nn.Module | nn.Parameter)
        stock["__setattr__"](module, name, value)

    def register_buffer(module: nn.Module, name: str, *args: Any, **options: Any) -> None:
        journal.note(module, name)
        stock["register_buffer"](module, name, *args, **options)

    def convert(module: nn.Module, *args: Any, **options: Any) -> nn.Module:
        journal.rebinds = True
        return stock["_apply"](module, *args, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "batch_norm", _batch_norm))
        if not drops:
            stack.enter_context(patch.object(checkpoint, "CheckpointFunction", _Called))
            stack.enter_context(patch.object(checkpoint, "_checkpoint_without_reentrant_generator", _nothing))
        for name, function in zip(stock, (set_attribute, register_buffer, convert), strict=True):
            stack.enter_context(patch.object(nn.Module, name, function))
        try:
            yield journal
        finally:
            journal.undo()
            for module, own in parameters:
                module._parameters.update(own)
            for value, before in held:
                value.clear()
                value.update(before) if isinstance(value, dict) else value.extend(before)
