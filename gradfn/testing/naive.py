"""A naive loss of next tokens, and how statistics are compared with what the oracle gives."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from gradfn.types import Blocks, Example, Params


def naive_causal_lm_loss(
    model: nn.Module, reduction: str = "mean", criterion: str = "cross_entropy", label_smoothing: float = 0.0
) -> Callable[[Params, Example], Tensor]:
    """A loss of next tokens written with `F.cross_entropy`, for one example `{"input_ids", "labels"}`.

    Args:
        model: a causal LM with HF's interface.
        reduction: "mean" or "sum" over the supervised positions.
        criterion: "cross_entropy", or "log_odds": `-log (p_y / (1 - p_y))`.
        label_smoothing: the share of the target that is spread over all tokens.

    >>> callable(naive_causal_lm_loss(nn.Linear(1, 1)))
    True
    """

    def loss(params: Params, example: Example) -> Tensor:
        inputs = {"input_ids": example["input_ids"][None], "use_cache": False}
        logits = functional_call(model, params, (), inputs).logits[0]
        targets = example["labels"][1:]
        total = naive_token_loss(logits[:-1], targets, criterion, label_smoothing)
        total = total / max(1, int((targets != -100).sum())) if reduction == "mean" else total
        return total * example["weight"] if "weight" in example else total

    return loss


def naive_token_loss(
    logits: Tensor, targets: Tensor, criterion: str = "cross_entropy", label_smoothing: float = 0.0
) -> Tensor:
    """The sum over positions (or classes) that are supervised.

    >>> naive_token_loss(torch.zeros(2, 4), torch.tensor([1, -100])).exp()
    tensor(4.)
    """
    if criterion == "cross_entropy":
        return F.cross_entropy(
            logits, targets, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing
        )
    at = (targets != -100).nonzero()[:, 0]
    p = logits[at].softmax(-1)[range(len(at)), targets[at]]
    return -(p / (1 - p)).log().sum()


def difference(got: Blocks | Tensor, want: Blocks | Tensor, tolerance: float = 1e-9) -> str:
    """What is different between two statistics, or "" if each block is the same up to rounding.

    Args:
        got, want: blocks with the same names and shapes, or two tensors, whose first axis is rows.
        tolerance: relative to the largest magnitude in the block of `want`.

    >>> difference({"a": torch.tensor([[1.0], [2.5]])}, {"a": torch.tensor([[1.0], [2.0]])})
    'a: off by 0.5, allowed 2e-09, in row 1 (2.5 instead of 2)'
    """
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        got, want = {"values": got}, {"values": want}
    if not (isinstance(got, dict) and isinstance(want, dict)):
        return f"{type(got).__name__} instead of {type(want).__name__}"
    if list(got) != list(want):
        return f"blocks {list(got)} instead of {list(want)}"
    for name, expected in want.items():
        if got[name].shape != expected.shape:
            return f"{name}: shape {list(got[name].shape)} instead of {list(expected.shape)}"
        if wrong := _off(got[name].double(), expected.double(), tolerance):
            return f"{name}: {wrong}"
    return ""


def chain_difference(
    got: Blocks | Tensor,
    transform: Callable[[Blocks], Blocks | Tensor],
    dense: Blocks,
    tolerance: float = 1e-9,
) -> str:
    """What is different between a statistic and a chain applied to gradients, or "" if rounding decides it.

    At a jump (a sign, a root at zero) and where numbers cancel, the rounding of the gradients makes the
    result, which then says nothing: noise as small as rounding would change it too.

    Args:
        got: what should be `transform(dense)`.
        transform, dense: a chain (or any function of them) and the gradients `{block: [rows, out, in]}`.
        tolerance: see `difference`.

    >>> from gradfn.transforms import project
    >>> G = {"a": torch.ones(1, 2, 2)}
    >>> chain_difference({"a": torch.zeros(1, 1, 1)}, project(1, "mask"), G)
    'a: off by 2, allowed 2e-09 (0 instead of 2)'
    """
    want = transform(dense)
    wrong = difference(got, want, tolerance)
    return "" if wrong and difference(transform(_jittered(dense)), want, tolerance) else wrong


def _jittered(dense: Blocks) -> Blocks:
    """The blocks with more noise than rounding makes, and less than the tolerance lets pass."""
    size = 1e-13 * (1.0 + max(float(G.abs().max()) for G in dense.values()))
    generator = torch.Generator().manual_seed(0)
    return {
        name: G + size * torch.randn(G.shape, generator=generator, dtype=G.dtype) for name, G in dense.items()
    }


def _off(got: Tensor, want: Tensor, tolerance: float) -> str:
    # 1e-13: rounding of numbers that would be zero in exact arithmetic.
    allowed = tolerance * float(want.abs().max()) + 1e-13 if want.numel() else 0.0
    off = (got - want).abs().nan_to_num(nan=torch.inf)
    worst = float(off.max()) if want.numel() else 0.0
    if worst <= allowed:
        return ""
    at = int(off.argmax())
    instead = f"{float(got.flatten()[at]):.4g} instead of {float(want.flatten()[at]):.4g}"
    row = f", in row {at // (want.numel() // len(want))}" if want.ndim and len(want) > 1 else ""
    return f"off by {worst:.3g}, allowed {allowed:.3g}{row} ({instead})"


def assert_blocks_close(got: Blocks | Tensor, want: Blocks | Tensor, tolerance: float = 1e-9) -> None:
    """Assert that two statistics are the same, each block to `tolerance` times its largest number.

    Args:
        got, want, tolerance: see `difference`.

    Raises:
        AssertionError: naming the block and the largest deviation.

    >>> assert_blocks_close({"a": torch.ones(1)}, {"a": torch.ones(1)})
    """
    wrong = difference(got, want, tolerance)
    assert not wrong, wrong


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
