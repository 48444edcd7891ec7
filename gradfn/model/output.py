"""The cross-entropy of a language model's head, twice differentiable, without holding the logits.

With `z = W x + b` at a position of target y, `p = softmax(z)`, `e = p - 1_y`:

    l = logsumexp(z) - z_y,      l' = e · (W x' + W' x + b')
    (dx, dW, db) = g (Wᵀ e, e xᵀ, e)                                     at a cotangent g of l

and for cotangents (a, A, c) of these three, with `s = W a + A x + c` and `q = g (p * s - p (p · s))`:

    dg = e · s,      dx = Wᵀ q + g Aᵀ e,      dW = q xᵀ + g e aᵀ,      db = q

Each is a sum over positions, a few of which are taken at a time, and their logits are made anew.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""The logits that are held at a time."""


def chunked_cross_entropy(
    x: Float[Tensor, "positions dim"],
    weight: Float[Tensor, "vocab dim"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " positions"],
) -> Float[Tensor, " positions"]:
    """Cross-entropy of a linear head, with all derivatives up to the second, and in forward mode the first.

    `linear_cross_entropy` is faster, and its head gets no gradient.

    >>> x, w = torch.zeros(1, 2), torch.ones(4, 2)
    >>> chunked_cross_entropy(x, w, None, torch.tensor([3])).exp()
    tensor([4.])
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return _Losses.apply(x, weight, bias, targets)  # pyright: ignore[reportReturnType]


def fits(positions: int, weight: Tensor) -> bool:
    """Whether the logits of so many positions need no chunks."""
    return positions * len(weight) * weight.element_size() <= CHUNK_BYTES


def _parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES // (len(weight) * weight.element_size()))
    for start in range(0, len(x), size):
        yield slice(start, start + size)


def _errors(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`p` and `p - 1_y`."""
    p = z.softmax(-1)
    return p, p.scatter_add(1, targets[:, None], -torch.ones_like(p[:, :1]))


class _Last(torch.autograd.Function):
    """A function that is not differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "the head in chunks has no third derivative, and forward mode through it no gradient: compute "
            "the logits"
        )


class _Losses(torch.autograd.Function):
    """`l`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, targets):
        made = [
            F.cross_entropy(F.linear(x[part], weight, bias), targets[part], reduction="none")
            for part in _parts(x, weight)
        ]
        return torch.cat(made) if made else x.new_zeros(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        return (*_Slopes.apply(*ctx.saved_tensors, grads[0]), None)

    @staticmethod
    def jvp(ctx, *tangents):
        x, weight, bias, targets = ctx.saved_tensors
        return _Along.apply(x, weight, bias, targets, *(
            torch.zeros_like(value) if tangent is None else tangent
            for value, tangent in zip((x, weight, bias), tangents[:3], strict=True)
        ))  # fmt: skip


class _Slopes(torch.autograd.Function):
    """`dx, dW, db` at a cotangent of the losses."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, targets, g):
        dx, dweight, dbias = [], torch.zeros_like(weight), torch.zeros_like(bias)
        for part in _parts(x, weight):
            _, e = _errors(F.linear(x[part], weight, bias), targets[part])
            e = e * g[part, None]
            dx.append(e @ weight)
            dweight, dbias = dweight + e.mT @ x[part], dbias + e.sum(0)
        return torch.cat(dx) if dx else torch.zeros_like(x), dweight, dbias

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        dx, dweight, dbias, dg = _Bends.apply(*ctx.saved_tensors, *grads)
        return dx, dweight, dbias, None, dg


class _Bends(_Last):
    """`dx, dW, db, dg` at cotangents of the slopes."""

    @staticmethod
    def forward(x, weight, bias, targets, g, a, A, c):
        dx, dg, dweight, dbias = [], [], torch.zeros_like(weight), torch.zeros_like(bias)
        for part in _parts(x, weight):
            own = g[part, None]
            p, e = _errors(F.linear(x[part], weight, bias), targets[part])
            s = F.linear(a[part], weight, c) + x[part] @ A.mT
            dg.append((e * s).sum(1))
            q, e = (p * s - p * (p * s).sum(1, keepdim=True)) * own, e * own
            dx.append(q @ weight + e @ A)
            dweight, dbias = dweight + q.mT @ x[part] + e.mT @ a[part], dbias + q.sum(0)
        return torch.cat(dx) if dx else torch.zeros_like(x), dweight, dbias, torch.cat(dg) if dg else g


class _Along(_Last):
    """`l'` along tangents."""

    @staticmethod
    def forward(x, weight, bias, targets, x1, weight1, bias1):
        made = []
        for part in _parts(x, weight):
            _, e = _errors(F.linear(x[part], weight, bias), targets[part])
            made.append((e * (F.linear(x1[part], weight, bias1) + x[part] @ weight1.mT)).sum(1))
        return torch.cat(made) if made else x.new_zeros(0)
