"""How to observe a module where it uses a weight: its input and output there, and a new output in return."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from inspect import signature
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OnUse = Callable[..., Tensor]
"""`on_use(weight name, x, y, *call) -> y`: called with the input and output of a weight, gives the output.

What `call` holds is between a site's `attach` and its layer's `in_call`.
"""

Attach = Callable[[nn.Module, OnUse], Callable[[], None]]
"""Makes a module call `on_use` wherever it uses a weight; returns the function that undoes this."""


def attach_hook(module: nn.Module, on_use: OnUse) -> Callable[[], None]:
    """Attach to a module that returns the output of its weight: a forward hook is enough."""

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Any) -> Any:
        return on_use("weight", args[0] if args else next(iter(named.values())), y)

    return module.register_forward_hook(hook, with_kwargs=True).remove


def attach_channels_first(module: nn.Module, on_use: OnUse) -> Callable[[], None]:
    """Attach to a normalisation over axis 1, and move the features to the end for the probe."""
    return attach_hook(module, lambda name, x, y: on_use(name, x, y.movedim(1, -1)).movedim(-1, 1))


def attach_convolution(module: Any, on_use: OnUse) -> Callable[[], None]:
    """Attach to the convolution inside a subclass, which may pad its input or do more to its output."""
    name = f"conv{len(module.kernel_size)}d"
    convolve, forward = getattr(F, name), module.forward

    def tapped(x: Tensor, weight: Tensor, *args: Any, **named: Any) -> Tensor:
        y = convolve(x, weight, *args, **named)
        return on_use("weight", x, y) if weight is module.weight else y

    def patched(*args: Any, **named: Any) -> Any:
        with patch.object(F, name, tapped):
            return forward(*args, **named)

    module.forward = patched
    return lambda: delattr(module, "forward")


def attach_attention(module: Any, on_use: OnUse) -> Callable[[], None]:
    """Attach to the calls of `F.linear` inside nn.MultiheadAttention, where the batch is axis 1."""
    own: dict[int, tuple[str, int]] = {}
    linear = F.linear
    width = module.embed_dim
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = module._parameters.get(name)
        if weight is not None:
            starts = (0, width, 2 * width) if name == "in_proj_weight" else (0,)
            own |= {weight[start].data_ptr(): (name, start) for start in starts}  # pyright: ignore
    own[module.out_proj.weight.data_ptr()] = ("out_proj.weight", 0)  # pyright: ignore

    def tapped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        found = own.get(weight.data_ptr())
        if found is None:
            return y
        name, start = found
        if name == "out_proj.weight":  # [tokens * batch, features]
            x, flat = x.unflatten(0, (-1, batch[0])), y.unflatten(0, (-1, batch[0]))
            return on_use(name, x.movedim(1, 0), flat.movedim(1, 0)).movedim(0, 1).flatten(0, 1)
        batch[0] = x.shape[1]
        return on_use(name, x.movedim(1, 0), y.movedim(1, 0), start, start + len(weight)).movedim(0, 1)

    batch = [1]
    forward = module.forward

    def patched(*args: Any, **named: Any) -> Any:
        with patch.object(F, "linear", tapped):
            return forward(*args, **named)

    module.forward = patched
    return lambda: delattr(module, "forward")


def attach_experts(module: Any, on_use: OnUse) -> Callable[[], None]:
    """Attach to transformers' fused experts, and compute the rows of all experts in one tensor."""

    stock = signature(type(module).forward)

    def forward(*args: Any, **named: Any) -> Tensor:
        hidden, top_k_index, top_k_weights = list(stock.bind(module, *args, **named).arguments.values())[1:]
        count = module.down_proj.shape[0]
        chosen = top_k_index.flatten()
        tokens = torch.arange(len(hidden), device=hidden.device).repeat_interleave(top_k_index.shape[-1])
        real = chosen < count  # some mixtures mark dropped tokens by one expert more
        order = chosen.masked_fill(~real, count).argsort(stable=True)[: int(real.sum())]
        weights = top_k_weights.flatten()
        outer = _apply_experts(
            module, on_use, hidden[tokens[order]], tokens[order], chosen[order], len(hidden)
        )
        outer = outer * weights[order][:, None]
        total = torch.zeros_like(hidden).index_add(0, tokens[order], outer.to(hidden.dtype))
        if not hasattr(module, "identity_expert"):
            return total
        through = tokens[~real]
        return total.index_add(0, through, (hidden[through] * weights[~real][:, None]).to(hidden.dtype))

    module.forward = forward
    return lambda: delattr(module, "forward")


def attach_dense_experts(module: Any, on_use: OnUse) -> Callable[[], None]:
    """Attach to experts that are all given all tokens, one expert after the other, as in Llama 4."""

    def forward(hidden: Tensor) -> Tensor:
        count = module.down_proj.shape[0]
        size = len(hidden) // count
        experts = torch.arange(count, device=hidden.device).repeat_interleave(size)
        tokens = torch.arange(size, device=hidden.device).repeat(count)
        return _apply_experts(module, on_use, hidden, tokens, experts, size)

    module.forward = forward
    return lambda: delattr(module, "forward")


def _apply_experts(
    module: Any, on_use: OnUse, x: Tensor, tokens: Tensor, experts: Tensor, count: int
) -> Tensor:
    """The outputs of experts for rows in the order of their experts; `tokens` of `count` they belong to."""

    def apply(name: str, x: Tensor) -> Tensor:
        weight, bias = module.get_parameter(name), module._parameters.get(f"{name}_bias")
        parts, (present, counts) = [], experts.unique_consecutive(return_counts=True)
        runs = zip(present.tolist(), x.split(counts.tolist()), strict=True)
        for expert, part in runs if len(x) else [(0, x)]:  # all rows may be dropped
            own = weight[expert].T if is_transposed(module) else weight[expert]
            parts.append(F.linear(part, own, None if bias is None else bias[expert]))
        return on_use(name, x, torch.cat(parts), tokens, experts, count)

    if not getattr(module, "has_gate", True):
        return apply("down_proj", module.act_fn(apply("up_proj", x)))
    inner = apply("gate_up_proj", x)
    gate = getattr(module, "_apply_gate", None)
    if gate is not None:
        return apply("down_proj", gate(inner))
    first, second = inner.chunk(2, dim=-1)
    return apply("down_proj", module.act_fn(first) * second)


def attach_sorted_experts(module: Any, on_use: OnUse) -> Callable[[], None]:
    """Attach to experts whose rows are sorted already; their router says which token each is (JetMoE)."""
    routed: list[Tensor] = []

    def route(_: nn.Module, args: tuple[Any, ...], found: Any) -> None:
        _, tokens, _, counts, _ = found
        counts = torch.tensor(counts, device=tokens.device)
        routed[:] = tokens, torch.arange(len(counts), device=tokens.device).repeat_interleave(counts), args[0]

    def hook(name: str, _: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        tokens, experts, hidden = routed
        return on_use(name, args[0], y, tokens, experts, len(hidden))

    with ExitStack() as stack:
        stack.callback(module.router.register_forward_hook(route).remove)
        for name in ("input_linear", "output_linear"):
            own = partial(hook, f"{name}.weight")
            stack.callback(getattr(module, name).register_forward_hook(own).remove)
        return stack.pop_all().close


def is_transposed(module: nn.Module) -> bool:
    """Whether the weights of experts are stored as `[experts, in, out]`."""
    return getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")
