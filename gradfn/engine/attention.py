"""Causal attention on the CPU with a faster backward.

The backward of `scaled_dot_product_attention` is the largest single cost of a small language model on a CPU.
Written as a few batched products over bands of queries, it takes 0.63 to 0.96 of PyTorch's time
(docs/benchmarks.md); the forward is PyTorch's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BAND = 64
"""How many queries a band has."""
BAND_ELEMENTS = 1 << 20
"""How many attention weights the bands of all heads of one step have: they fit into the CPU's cache."""


class _CausalAttention(torch.autograd.Function):
    """PyTorch's flash forward; the backward recomputes the weights `p = exp(s q kᵀ - lse)` band by band.

    With `delta = sum(go * o)`: `dv = pᵀ go`, `dz = p * (go vᵀ - delta)`, `dq = s dz k`, `dk = s dzᵀ q`.
    Source: FlashAttention, arXiv:2205.14135, appendix B.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out, lse = _FLASH(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        delta = (grads[0] * out).sum(-1, keepdim=True)
        # One more feature subtracts lse and delta within the products: [q, -lse] [k, 1]ᵀ = q kᵀ - lse.
        one = torch.ones_like(delta)
        inputs = _joined(q * ctx.scale, -lse[..., None]), _joined(k, one), _joined(v, one)
        inputs = (*inputs, _joined(grads[0], -delta))
        results = tuple(torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
        heads = max(1, BAND_ELEMENTS // (BAND * q.shape[-2]))
        for group in zip(*(part.flatten(0, 1).split(heads) for part in inputs + results), strict=True):
            _banded_backward(*group)
        return results[0].mul_(ctx.scale), *results[1:], None


def _joined(v: Tensor, feature: Tensor) -> Tensor:
    return torch.cat([v, feature], -1)


def _banded_backward(q: Tensor, k: Tensor, v: Tensor, go: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Fill `dq, dk, dv [heads, tokens, dim]` of a few heads; the other four tensors have one more feature."""
    tokens, dim = dq.shape[1:]
    # Making views inside the loop would take a tenth of its time.
    k_t, v_t, k_own = k.mT, v.mT, k[..., :dim]
    sides = q, go, q[..., :dim], go[..., :dim], dq
    bands = list(zip(range(0, tokens, BAND), *(side.split(BAND, 1) for side in sides), strict=True))
    for start, q_band, go_band, q_own, go_own, dq_band in reversed(bands):
        size = q_band.shape[1]
        stop = start + size
        p = torch.bmm(q_band, k_t.narrow(2, 0, stop)).exp_()
        p.narrow(2, start, size).tril_()
        p_t = p.mT
        dv_part = torch.bmm(p_t, go_own)
        p.mul_(torch.bmm(go_band, v_t.narrow(2, 0, stop)))  # p holds dz from here on
        dq_band.copy_(torch.bmm(p, k_own.narrow(1, 0, stop)))
        dk_part = torch.bmm(p_t, q_own)
        if stop == tokens:  # the last band has every key: it writes, and the others add
            dv.copy_(dv_part)
            dk.copy_(dk_part)
        else:
            dv.narrow(1, 0, stop).add_(dv_part)
            dk.narrow(1, 0, stop).add_(dk_part)


_stock = F.scaled_dot_product_attention


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` with our backward if it applies, else PyTorch's own."""
    scale = options.get("scale")
    plain = not args and set(options) <= {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    eligible = (
        plain
        and options.get("is_causal", False)
        and options.get("attn_mask") is None
        and not options.get("dropout_p")
        and not options.get("enable_gqa")
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and query.ndim == 4
        and query.shape == key.shape == value.shape
        and query.requires_grad
    )
    if not eligible:
        return _stock(query, key, value, *args, **options)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _CausalAttention.apply(query, key, value, scale)  # pyright: ignore[reportReturnType]


@contextmanager
def fast_attention() -> Iterator[None]:
    """Use the faster backward for causal attention on the CPU inside the context; results are the same.

    >>> q = torch.ones(1, 1, 3, 2, requires_grad=True)
    >>> with fast_attention():
    ...     F.scaled_dot_product_attention(q, q, q, is_causal=True).shape
    torch.Size([1, 1, 3, 2])
    """
    with patch.object(F, "scaled_dot_product_attention", _attention):
        yield
