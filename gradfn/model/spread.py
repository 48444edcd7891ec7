"""Tensors of which a process holds a part only, because they are spread over several (DTensors)."""

from typing import Any

from torch import Tensor, nn

from gradfn.errors import InputError


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process may hold a part only.

    >>> is_spread(nn.Linear(1, 1).weight)
    False
    """
    return hasattr(tensor, "device_mesh")


def sharding(model: nn.Module) -> str | None:
    """How parameters are spread over processes: "fsdp" by FSDP2, "other" (a tensor-parallel plan), or None.

    >>> sharding(nn.Linear(1, 1)) is None
    True
    """
    spread: list[Any] = [p for p in model.parameters() if is_spread(p)]
    if not spread:
        return None
    from torch.distributed.fsdp import FSDPModule

    rows = all(p.device_mesh.ndim == 1 and p.placements[0].is_shard(0) for p in spread)
    return "fsdp" if isinstance(model, FSDPModule) and rows else "other"


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its numbers; all processes that hold parts of it must ask for it."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_spread(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def refuse_spread(model: nn.Module) -> None:
    """Refuse a model whose parameters are spread over processes otherwise than by FSDP2."""
    if sharding(model) == "other":
        raise InputError(
            f"the parameters of {type(model).__name__} are DTensors that a tensor-parallel plan or a mesh of "
            "one's own has put on several devices: load it without `tp_plan`, or with gf.hf.load_sharded"
        )


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, which FSDP2 replaces by one of its own.

    >>> class_of(nn.Linear(1, 1))
    <class 'torch.nn.modules.linear.Linear'>
    """
    names = ((one, {base.__name__ for base in one.__mro__}) for one in type(module).__mro__)
    return next(one for one, bases in names if "FSDPModule" not in bases)
