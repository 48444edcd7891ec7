"""Per-example gradients by definition, which every faster engine is tested against.

There are two: `vmap(grad(loss), in_dims=(None, 0))(params, batch)`, and a loop of plain autograd over rows.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from gradfn.data import check_rows
from gradfn.engine.journal import as_function
from gradfn.errors import InputError
from gradfn.model.sites import View, blocks_of, find_sites
from gradfn.types import Batch, Blocks, Example, LossFn, Params

MUST = "a loss must be one number an example"


def one_number(losses: Any, *batch: int) -> Tensor:
    """What a loss gave; refused unless it is one real number an example.

    Args:
        losses: of an example, or `[batch]` of a batch.
        batch: how many examples, where it is of a batch.

    >>> one_number(torch.ones(2))
    Traceback (most recent call last):
    gradfn.errors.InputError: a loss must be one number an example, not of shape [2]: reduce it, .mean() say
    """
    if not isinstance(losses, Tensor):
        kind = type(losses).__name__
        raise InputError(f"{MUST}, a tensor, and not a {kind}: return the tensor")
    if losses.is_complex():
        raise InputError(f"{MUST}, and not complex: take its .abs() or .real")
    if losses.shape != batch:
        which = f"`loss.batched` must be one number for each of {batch[0]} examples" if batch else MUST
        raise InputError(f"{which}, not of shape {list(losses.shape)}: reduce it, .mean() say")
    return losses


def refuse_constant(
    function: Callable[[Params, Example], Tensor],
    params: Params,
    example: Example,
    *,
    differentiable: bool = True,
) -> None:
    """Refuse a loss, or outputs of a model, that do not depend on their `params`, as those of a closure.

    Args:
        function, params, example: one call of it.
        differentiable: whether what has no gradient at all, such as a count of errors, is refused too.

    >>> net = nn.Linear(1, 1)
    >>> refuse_constant(lambda p, e: net(e["x"]).sum(), {"weight": torch.ones(1, 1)}, {"x": torch.ones(1)})
    Traceback (most recent call last):
    gradfn.errors.InputError: the loss does not depend on its `params`: call the model in it with ...
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items() if p.is_floating_point()}
    with torch.enable_grad():
        value, grads = function({**params, **leaves}, example), []
        if not isinstance(value, Tensor):
            return  # which `one_number` refuses
        if value.requires_grad:
            grads = torch.autograd.grad(value.real.sum(), [*leaves.values()], allow_unused=True)
    if all(grad is None for grad in grads) and (differentiable or grads):
        raise InputError(
            "the loss does not depend on its `params`: call the model in it with "
            "torch.func.functional_call(model, params, ...)"
        )


def per_example_grads(loss: LossFn, params: Params, batch: Batch, *, chunk_size: int | None = None) -> Params:
    """The gradient of each example's own loss, `d loss(params, example_b) / d params`.

    This is the definition that every faster engine is tested against. It has `[batch, *parameter]` of every
    parameter in memory at once.

    Args:
        loss: `loss(params, example) -> scalar`, pure.
        params: the parameters to differentiate with respect to.
        batch: tensors `[batch, ...]`.
        chunk_size: how many examples at a time; None means all.

    Returns:
        `{name: [batch, *parameter]}`, in units of loss per unit of parameter.

    Raises:
        InputError: a loss that is not one number an example.

    >>> def loss(p, e):
    ...     return (p["w"] @ e["x"]) ** 2
    >>> per_example_grads(loss, {"w": torch.ones(2)}, {"x": torch.eye(2)})["w"]
    tensor([[2., 0.],
            [0., 2.]])
    """

    def checked(params: Params, example: Example) -> Tensor:
        return one_number(loss(params, example))

    # vmap wants a dict, not any mapping (a BatchEncoding, say).
    return vmap(grad(checked), in_dims=(None, 0), chunk_size=chunk_size)(params, dict(batch))


def definition(
    loss: LossFn, params: Params, batch: Batch, model: nn.Module, *, plain: bool = False
) -> Params:
    """`per_example_grads`, or plain autograd of one example after the other.

    Args:
        loss, params, batch: see `per_example_grads`.
        model: whose loss it is.
        plain: do not try `vmap`. If `vmap` cannot map over the model's code, it is plain autograd as well.

    >>> def loss(p, e):
    ...     return p["weight"].sum() * (e["x"] if bool(e["x"] > 0) else 0)
    >>> batch = {"x": torch.tensor([3.0, -1.0])}
    >>> definition(loss, {"weight": torch.ones(1, 1)}, batch, nn.Linear(1, 1))["weight"].flatten()
    tensor([3., 0.])
    """
    if not plain:
        try:
            with warnings.catch_warnings(), as_function(model):
                warnings.filterwarnings("ignore", "There is a performance drop")  # kernels without a rule
                return per_example_grads(loss, params, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            pass  # an error of the loss itself is raised again below
    size = len(next(iter(batch.values())))
    examples = [{key: value[row] for key, value in batch.items()} for row in range(size)]
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    return _plain_grads(loss, leaves, examples, model)


def _plain_grads(
    loss: Callable[[Params, Example], Tensor], leaves: Params, rows: Sequence[Example], model: nn.Module
) -> Params:
    """One `autograd.grad` an example."""
    made = []
    for example in rows:
        with as_function(model):
            value, inputs = one_number(loss(leaves, example)), list(leaves.values())
            if value.requires_grad:
                made.append(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))
            else:
                made.append([torch.zeros_like(leaf) for leaf in inputs])
    return {name: torch.stack(parts) for name, parts in zip(leaves, zip(*made, strict=True), strict=True)}


WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers and convolutions without the LM head; of modules that share a weight, the first."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    seen = set()
    for path, module in model.named_modules():
        counts = isinstance(module, WEIGHTED) or type(module).__name__ == "Conv1D"
        if counts and module is not head and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield path, module


def naive_grads(
    loss: Callable[[Params, Example], Tensor], model: nn.Module, rows: Sequence[Example]
) -> Params:
    """Per-example gradients of all parameters, `{name: [rows, *parameter]}`, one `autograd.grad` an example.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> naive_grads(loss, net, [{"x": torch.tensor([3.0, 4.0])}])["weight"]
    tensor([[[3., 4.]]])
    """
    check_rows(rows)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    return _plain_grads(loss, params, rows, model)


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
        view: which weights, laid out by `blocks_of`; None is linear layers and convolutions without the LM
            head, laid out by code that is independent of `blocks_of`.

    Returns:
        `{module path: [rows, out, in (+ 1)]}`, the bias last.

    >>> net = nn.Linear(2, 1)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> naive_blocks(loss, net, [{"x": torch.tensor([3.0, 4.0])}])["root"]
    tensor([[[3., 4., 1.]]])
    """
    grads = naive_grads(loss, model, rows)
    if view is not None:
        return blocks_of(find_sites(model, view), grads)
    blocks = {}
    for path, module in _layers(model):
        prefix = f"{path}." if path else ""
        block = grads[f"{prefix}weight"].flatten(2)
        block = block if isinstance(module, WEIGHTED) else block.mT
        if getattr(module, "bias", None) is not None:
            block = torch.cat([block, grads[f"{prefix}bias"][..., None]], -1)
        blocks[path or "root"] = block
    return blocks
