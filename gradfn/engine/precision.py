"""How float32 matrices are multiplied: in float32, or rounded, on the reduced-precision units of a device."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from gradfn.errors import InputError

Products = Literal["ieee", "tf32", "bf16"]
"""How factors are rounded before they are multiplied, in PyTorch's terms; "ieee" rounds nothing."""

EPS: dict[Products, float] = {"ieee": 2.0**-23, "tf32": 2.0**-10, "bf16": 2.0**-7}
"""The relative rounding error of each, as in `torch.finfo`."""

UNITS: dict[str, dict[str, Products]] = {
    "cuda": {"tf32": "tf32"},
    "cpu": {"amx_fp16": "tf32", "amx_bf16": "bf16", "avx512_bf16": "bf16"},
}
"""The feature that a device must have, best first, and the coarsest rounding of float32 factors with it.

With AVX512-BF16 alone, the oneDNN of torch 2.13 still multiplies in float32, in kernels of its own.
"""


def features_of(device: torch.device) -> frozenset[str]:
    """The features that a device reports: the instructions of a CPU, or "tf32" if a GPU has such units.

    >>> "cuda" in features_of(torch.device("cpu"))
    False
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return frozenset(["tf32"] if torch.cuda.is_tf32_supported() else [])
    if device.type == "cpu":
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    return frozenset()


def products_of(precision: str, device: torch.device, features: Collection[str] | None = None) -> Products:
    """How a run in a precision multiplies float32 matrices on a device.

    Args:
        precision: "tf32" uses the device's reduced-precision units; any other precision uses float32.
        device: the device of the run.
        features: see `features_of`; None asks the device.

    Raises:
        InputError: "tf32" on a device without such units.

    >>> products_of("tf32", torch.device("cpu"), {"avx2", "avx512_bf16"})
    'bf16'
    >>> products_of("fp32", torch.device("cpu"))
    'ieee'
    """
    if precision != "tf32":
        return "ieee"
    known = features_of(device) if features is None else features
    for name, unit in UNITS.get(device.type, {}).items():
        if name in known:
            return unit
    raise InputError(
        f"tf32 multiplies on TF32 units (CUDA) or on AMX or AVX512-BF16 units (CPUs), and {device} has none "
        "of them: use fp32"
    )


@contextmanager
def multiplying(products: Products, device: torch.device) -> Iterator[None]:
    """Multiply and convolve float32 matrices in this way inside the context.

    "ieee" needs the context too, because the default of PyTorch's convolutions on CUDA is TF32.

    >>> with multiplying("bf16", torch.device("cpu")):
    ...     torch.backends.mkldnn.matmul.fp32_precision
    'bf16'
    """
    backends: Any = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv  # pyright: ignore
    if device.type == "cuda":
        backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # pyright: ignore
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = products
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
