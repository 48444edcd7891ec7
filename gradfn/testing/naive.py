"""The oracle of every faster engine: plain autograd, one unpadded example at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from gradfn.layers import View, blocks_of, find_sites
from gradfn.types import Blocks, Example, Params


def naive_causal_lm_loss(model: nn.Module, reduction: str = "mean") -> Callable[[Params, Example], Tensor]:
    """Next-token cross-entropy written with `F.cross_entropy`, for one example `{"input_ids", "labels"}`.

    Args:
        model: a causal LM with HF's interface.
        reduction: "mean" or "sum" over the supervised positions.

    >>> callable(naive_causal_lm_loss(nn.Linear(1, 1)))
    True
    """

    def loss(params: Params, example: Example) -> Tensor:
        inputs = {"input_ids": example["input_ids"][None], "use_cache": False}
        logits = functional_call(model, params, (), inputs).logits[0]
        targets = example["labels"][1:]
        total = F.cross_entropy(logits[:-1], targets, ignore_index=-100, reduction="sum")
        return total / max(1, int((targets != -100).sum())) if reduction == "mean" else total

    return loss


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers but the LM head; of those that share a weight, the first."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    seen = set()
    for path, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and module is not head and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield path, module


def naive_grads(
    loss: Callable[[Params, Example], Tensor], model: nn.Module, rows: Sequence[Example]
) -> Params:
    """Per-example gradients of all parameters, `{name: [rows, *parameter]}`, one `autograd.grad` an example.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return functional_call(net, params, e["x"]).sum()
    >>> naive_grads(loss, net, [{"x": torch.tensor([3.0, 4.0])}])["weight"]
    tensor([[[3., 4.]]])
    """
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    grads = [
        torch.autograd.grad(
            loss(params, example), list(params.values()), allow_unused=True, materialize_grads=True
        )
        for example in rows
    ]
    return {name: torch.stack(parts) for name, parts in zip(params, zip(*grads, strict=True), strict=True)}


def naive_blocks(
    loss: Callable[[Params, Example], Tensor],
    model: nn.Module,
    rows: Sequence[Example],
    view: View | None = None,
) -> Blocks:
    """Per-example gradients as blocks, one `autograd.grad` an example.

    Args:
        loss: `loss(params, example) -> scalar`.
        model: the module whose parameters `params` are.
        rows: examples, not padded.
        view: which weights, laid out by `blocks_of`; None is linear layers but the LM head, laid out here.

    Returns:
        `{module path: [rows, out, in (+ 1)]}`, the bias last.

    >>> net = nn.Linear(2, 1)
    >>> def loss(params, e):
    ...     return functional_call(net, params, e["x"]).sum()
    >>> naive_blocks(loss, net, [{"x": torch.tensor([3.0, 4.0])}])["root"]
    tensor([[[3., 4., 1.]]])
    """
    grads = naive_grads(loss, model, rows)
    if view is not None:
        return blocks_of(find_sites(model, view), grads)
    blocks = {}
    for path, module in _layers(model):
        prefix = f"{path}." if path else ""
        block = grads[f"{prefix}weight"] if isinstance(module, nn.Linear) else grads[f"{prefix}weight"].mT
        if getattr(module, "bias", None) is not None:
            block = torch.cat([block, grads[f"{prefix}bias"][..., None]], -1)
        blocks[path or "root"] = block
    return blocks


def assert_blocks_close(got: Blocks | Tensor, want: Blocks | Tensor, tolerance: float = 1e-9) -> None:
    """Assert that two statistics are the same, each block to `tolerance` times its largest number.

    Args:
        got, want: blocks with the same names and shapes, or two tensors.
        tolerance: relative to the largest magnitude in the block of `want`.

    Raises:
        AssertionError: naming the block and the largest deviation.

    >>> assert_blocks_close({"a": torch.ones(1)}, {"a": torch.ones(1)})
    """
    if isinstance(got, Tensor) or isinstance(want, Tensor):
        got, want = {"values": got}, {"values": want}  # pyright: ignore[reportAssignmentType]
    assert isinstance(got, dict)
    assert isinstance(want, dict)
    assert list(got) == list(want), f"blocks {list(got)} instead of {list(want)}"
    for name, expected in want.items():
        assert got[name].shape == expected.shape, f"{name}: {got[name].shape} instead of {expected.shape}"
        if expected.numel():
            worst = float((got[name].double() - expected.double()).abs().max())
            # 1e-13: rounding of numbers that would be zero in exact arithmetic.
            allowed = tolerance * float(expected.abs().max()) + 1e-13
            assert worst <= allowed, f"{name}: off by {worst:.3g}, allowed {allowed:.3g}"


@contextmanager
def recorded_shapes() -> Iterator[set[tuple[int, ...]]]:
    """Record the shape of every tensor that an operation makes, forward and backward.

    >>> with recorded_shapes() as shapes:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> (2, 5) in shapes
    True
    """
    shapes: set[tuple[int, ...]] = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, Tensor):
                    shapes.add(tuple(value.shape))
            return result

    with Recorder():
        yield shapes
