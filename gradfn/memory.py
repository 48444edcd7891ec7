"""How much memory is free, and freeing it."""

import ctypes
import os
import sys
from pathlib import Path

import torch

MEMORY_FACTS = Path("/proc/meminfo")


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that are free on a device, the CPU unless told otherwise: what a new tensor may take."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMORY_FACTS.exists():  # what a cache of files holds counts as available there
        facts = dict(line.split(":", 1) for line in MEMORY_FACTS.read_text().splitlines())
        return int(facts["MemAvailable"].split()[0]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def release_memory() -> None:
    """Give the system back what was freed in this process, as far as the C library keeps it to itself.

    What a pass over data frees in small pieces glibc holds for pieces like them; what is large comes on top.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)
