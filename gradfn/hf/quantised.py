"""Linear layers of bitsandbytes, multiplied with the weights that their 4 or 8 bits stand for."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 127
"""What the largest number of a row of 8 bits is."""


class _Product(torch.autograd.Function):
    """`x Wᵀ`, with a `W` that is made where it is used, in the forward pass and in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, make: Callable[[torch.dtype], Tensor]) -> Tensor:
        return F.linear(x, make(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.make = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.make(grads[0].dtype), None


def multiply_exactly(model: nn.Module) -> nn.Module:
    """Have the 4 and 8 bit layers of bitsandbytes multiply with the weights that they stand for.

        y = x Wᵀ + b,      W = scale * code

    bitsandbytes itself also rounds the inputs of an 8 bit layer to 8 bits, by the largest numbers of all rows
    together, so that a row would depend on the other rows of its batch; on CPUs it may multiply with 4 bits
    in bfloat16. Both would be in the gradients of the rows. No layer's `W` is kept.

    Args:
        model: changed in place. Its layers are on their device already.

    Returns:
        The model.

    Source: LLM.int8(), arXiv:2208.07339; QLoRA, arXiv:2305.14314.

    >>> multiply_exactly(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    if (bnb := sys.modules.get("bitsandbytes")) is None:
        return model
    modules: Any = model.modules()
    for module in modules:
        if isinstance(module, bnb.nn.Linear4bit):
            make = partial(_of_four_bits, module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt) and not module.state.has_fp16_weights:
            make = partial(_of_eight_bits, module.weight.data, module.weight.SCB)
        else:
            continue
        module.forward = partial(_forward, module, make)
    return model


def _forward(module: nn.Module, make: Callable[[torch.dtype], Tensor], x: Tensor) -> Tensor:
    y, bias = _Product.apply(x, make), module._parameters.get("bias")
    return y if bias is None else y + bias.to(y.dtype)  # pyright: ignore


def _of_four_bits(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(codes, state).to(dtype)


def _of_eight_bits(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * (scales.to(wide)[:, None] / STEPS)).to(dtype)
