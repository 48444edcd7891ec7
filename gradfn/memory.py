"""How much memory is free, and freeing it."""

import ctypes
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradfn.errors import InputError

MEMORY_FACTS = Path("/proc/meminfo")
SURE_BYTES = 1 << 30
"""So much is not worth asking for."""


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that are free on a device, the CPU unless told otherwise: what a new tensor may take."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMORY_FACTS.exists():  # what a cache of files holds counts as available there
        facts = dict(line.split(":", 1) for line in MEMORY_FACTS.read_text().splitlines())
        return int(facts["MemAvailable"].split()[0]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(size: int, what: str, instead: str, device: torch.device | None = None) -> None:
    """Refuse what would not fit in memory while there is still memory to say so.

    Args:
        size: the bytes that it takes.
        what: what takes them, a plural.
        instead: what to do.
        device: where; None is the CPU.

    >>> check_memory(1 << 60, "2 rows of gradients", "project them")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    gradfn.errors.InputError: 2 rows of gradients take 1073741824.0 GiB and ... GiB are free: project them
    """
    if size > SURE_BYTES and size > (free := free_memory(device)):
        raise InputError(f"{what} take {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: {instead}")


class CountBytes(TorchDispatchMode):
    """Counts the bytes of what operations return, but for views of what they are given.

    >>> with CountBytes() as made:
    ...     _ = torch.ones(3) + 1
    >>> made.count
    24
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        """Run the operation."""
        made, given = func(*args, **(kwargs or {})), [v for v in tree_leaves(args) if isinstance(v, Tensor)]
        there = {value.untyped_storage()._cdata for value in given}
        new = (
            v for v in tree_leaves(made) if isinstance(v, Tensor) and v.untyped_storage()._cdata not in there
        )
        self.count += sum(value.nbytes for value in new)
        return made


def release_memory() -> None:
    """Give the system back what was freed in this process, as far as the C library keeps it to itself.

    What a pass over data frees in small pieces glibc holds for pieces like them; what is large comes on top.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)
