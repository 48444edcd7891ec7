"""A second device, made of memory of the CPU: what mixes devices fails on it as it does on a GPU.

    net.to("elsewhere"); torch.ones(3, device="elsewhere")

Its tensors hold one of the CPU each, and every operation runs there, so that numbers are those of the CPU.
An operation that is given tensors of both is refused, but for what a GPU takes from the CPU too: a single
number, the indices of an index, and a copy.
"""

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "elsewhere"
FROM_CPU = ("copy", "_to_copy", "index", "index_put", "_index_put_impl")
"""Operations that may be given tensors of both devices."""


class Elsewhere(torch.Tensor):
    """A tensor of the other device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_):
        return f"Elsewhere({self.held})"

    def tolist(self):
        """As a tensor of a GPU gives its numbers."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name not in FROM_CPU:
            refuse_mixed(func, args, kwargs)
        device = kwargs.get("device")
        leaves = device is not None and torch.device(device).type == "cpu"
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        inputs, named = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
        made = func(*inputs, **named)
        if name == "_local_scalar_dense" or leaves:
            return made
        if func._schema.is_mutable and args and isinstance(args[0], Elsewhere):
            written = [argument.name for argument in func._schema.arguments
                       if argument.alias_info is not None and argument.alias_info.is_write]  # fmt: skip
            if made is inputs[0]:
                return args[0]
            if "out" in written and "out" in kwargs:
                return kwargs["out"]
        if name == "copy":
            return args[0]
        return tree_map(wrapped, made)


def refuse_mixed(func, args, kwargs):
    flat = torch.utils._pytree.tree_leaves((args, kwargs))
    others = [one for one in flat if isinstance(one, torch.Tensor) and not isinstance(one, Elsewhere)]
    if any(one.ndim for one in others):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu in {func}"
        )


def unwrapped(value):
    return value.held if isinstance(value, Elsewhere) else value


def wrapped(value):
    return Elsewhere(value) if isinstance(value, torch.Tensor) and not isinstance(value, Elsewhere) else value


_setup_privateuseone_for_python_backend(NAME)


@torch.library.impl("aten::empty.memory_format", "PrivateUse1")
def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Elsewhere(torch.empty(size, dtype=dtype, memory_format=memory_format))


@torch.library.impl("aten::empty_strided", "PrivateUse1")
def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::_copy_from", "PrivateUse1")
def copy_from(self, dst, non_blocking=False):
    unwrapped(dst).copy_(unwrapped(self))
    return dst


@torch.library.impl("aten::_efficientzerotensor", "PrivateUse1")
def zeros(size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Elsewhere(torch.zeros(size, dtype=dtype))
