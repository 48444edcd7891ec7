"""Exact curvature products: what approximations of a curvature are measured against.

A product is a symmetric linear map of vectors, row by row, and a plain function. It passes over the data in
forward and reverse mode, and holds neither a curvature nor the gradient of one example.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradfn.data import check_rows, collate
from gradfn.engine.batching import full_gradients
from gradfn.engine.reference import one_number, refuse_constant
from gradfn.engine.stream import keeps_rows, labelled, plan_rows
from gradfn.errors import InputError
from gradfn.exact.outputs import OutputLoss, Outputs
from gradfn.exact.vectors import Product
from gradfn.subject import TOKEN_BATCH_SIZE
from gradfn.types import Batch, Data, Example, LossFn, Params


def fisher_product(
    loss: LossFn, params: Params, data: Data, *, token_batch_size: int = TOKEN_BATCH_SIZE
) -> Product:
    """The product with the empirical Fisher, `F v = 1/N sum_b g_b <g_b, v>`, `g_b` the gradient of example b.

    Forward mode gives `<g_b, v>` of all examples of a batch, and reverse mode the sum weighted by these
    numbers, so the gradient of one example is never made.

    Args:
        loss: `loss(params, example) -> scalar`, pure.
        params: what to differentiate with respect to; it may be only some of the model's parameters.
        data: the N examples; sequences may differ in length.
        token_batch_size: tokens a batch, padding included, times the rows of `v`. It changes no result: where
            padding changes a row's gradient, batches have rows of one length.

    Returns:
        `v -> F v`, vectors `{name: [k, *parameter]}`; each call is a pass over the data.

    Raises:
        InputError: no data, or a loss that does not depend on `params`; when called, a vector of other names
            or shapes, a loss that is not one number, an operation without forward mode. (Attention has one:
            it runs by its formula.)

    >>> def loss(p, e):
    ...     return (p["w"] * e["x"]).sum()
    >>> data = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> fisher_product(loss, {"w": torch.zeros(2)}, data)({"w": torch.ones(1, 2)})
    {'w': tensor([[0.5000, 2.0000]])}
    """

    def of_batch(batch: Batch, v: Params) -> Params:
        losses = _losses(loss, batch)
        dots = jvp(losses, (params,), (v,))[1]
        return vjp(losses, params)[1](dots)[0]

    return _streamed(of_batch, loss, params, data, token_batch_size)


def gauss_newton_product(
    outputs: Outputs,
    output_loss: OutputLoss,
    params: Params,
    data: Data,
    *,
    token_batch_size: int = TOKEN_BATCH_SIZE,
) -> Product:
    """The product with the generalised Gauss-Newton matrix, `1/N sum_b J_bᵀ H_b J_b v`.

    `J_b` is the Jacobian of the outputs with respect to the parameters, `H_b` the Hessian of the loss with
    respect to the outputs. Where the loss is convex in them the matrix is positive semidefinite; for a
    softmax or Gaussian likelihood it is the Fisher of labels sampled from the model.

    Args:
        outputs: `outputs(params, example) -> tensor`.
        output_loss: `output_loss(outputs, example) -> scalar`, convex in the outputs.
        params, data, token_batch_size: see `fisher_product`.

    Returns:
        `v -> G v`, vectors `{name: [k, *parameter]}`; each call is a pass over the data.

    Raises:
        InputError: see `fisher_product`.

    >>> def outputs(p, e):
    ...     return p["w"] * e["x"]
    >>> def output_loss(z, e):
    ...     return (z**2).sum() / 2
    >>> data = [{"x": torch.tensor([1.0, 3.0])}]
    >>> gauss_newton_product(outputs, output_loss, {"w": torch.zeros(2)}, data)({"w": torch.ones(1, 2)})
    {'w': tensor([[1., 9.]])}

    Source: Schraudolph 2002, Fast curvature matrix-vector products; Martens, arXiv:1412.1193, section 8.
    """

    def of_batch(batch: Batch, v: Params) -> Params:
        def made(p: Params) -> Tensor:
            return _each(outputs, p, batch)

        def slope(z: Tensor) -> Tensor:
            return grad(lambda z: _each(output_loss, z, batch, 0).sum())(z)

        z, moved = jvp(made, (params,), (v,))[:2]
        curved = jvp(slope, (z,), (moved,))[1]
        return vjp(made, params)[1](curved)[0]

    def loss(params: Params, example: Example) -> Tensor:
        return output_loss(outputs(params, example), example)

    return _streamed(of_batch, loss, params, data, token_batch_size, outputs)


def hessian_product(
    loss: LossFn, params: Params, data: Data, *, token_batch_size: int = TOKEN_BATCH_SIZE
) -> Product:
    """The product with the Hessian of the mean loss, `1/N sum_b d²loss_b v`, forward over reverse mode.

    Away from a minimum it is indefinite: a solve needs more damping than its most negative eigenvalue.

    Args:
        loss, params, data, token_batch_size: see `fisher_product`.

    Returns:
        `v -> H v`, vectors `{name: [k, *parameter]}`; each call is a pass over the data.

    Raises:
        InputError: see `fisher_product`.

    >>> def loss(p, e):
    ...     return e["x"] * p["w"].prod()
    >>> product = hessian_product(loss, {"w": torch.ones(2)}, [{"x": torch.tensor(3.0)}])
    >>> product({"w": torch.tensor([[1.0, 0.0]])})
    {'w': tensor([[0., 3.]])}

    Source: Pearlmutter 1994, Fast exact multiplication by the Hessian.
    """

    def of_batch(batch: Batch, v: Params) -> Params:
        losses = _losses(loss, batch)
        return jvp(grad(lambda p: losses(p).sum()), (params,), (v,))[1]

    return _streamed(of_batch, loss, params, data, token_batch_size)


def _each(function: Callable, first: Params | Tensor, batch: Batch, dim: int | None = None) -> Tensor:
    """`function(first, example)` of every example; of a single one without vmap, which some code refuses."""
    if len(next(iter(batch.values()))) > 1:
        return vmap(function, in_dims=(dim, 0))(first, batch)
    example = {name: value[0] for name, value in batch.items()}
    return function(first if dim is None else first[dim], example)[None]  # pyright: ignore[reportArgumentType]


def _losses(loss: LossFn, batch: Batch) -> Callable[[Params], Tensor]:
    return lambda params: _each(lambda p, example: one_number(loss(p, example)), params, batch)


def _streamed(
    of_batch: Callable[[Batch, Params], Params],
    loss: LossFn,
    params: Params,
    data: Data,
    token_batch_size: int,
    outputs: Outputs | None = None,
) -> Product:
    """The mean over the data of a sum over the examples of a batch, for every row of a vector.

    Args:
        of_batch: the sum.
        loss: of an example.
        outputs: what is differentiated instead of the loss.
    """
    check_rows(data)
    if not len(data) or not params:
        raise InputError("a product needs at least one example and one parameter")
    plan_rows(data, range(1), token_batch_size, pads=True)  # refuses a budget below 1 now, not when called
    device, rows = next(iter(params.values())).device, range(len(data))
    first = {name: value.to(device) for name, value in labelled(data, 0).items()}
    refuse_constant(outputs or loss, params, first)

    @cache
    def pads() -> bool:
        measure = full_gradients(lambda p, batch: _losses(loss, batch)(p), params)
        with forward_mode():
            return keeps_rows(measure, params.values(), data)

    @cache
    def plan(budget: int) -> list[np.ndarray]:
        batches = plan_rows(data, rows, budget, pads=True)
        shared = any(len(batch) > 1 for batch in batches)
        return batches if not shared or pads() else plan_rows(data, rows, budget, pads=False)

    @torch.no_grad()  # torch.func needs no graph, and that of a trainable model would fill memory
    def product(v: Params) -> Params:
        count = _rows_of(v, params)
        total = {
            name: torch.zeros_like(v[name], dtype=torch.promote_types(p.dtype, torch.float32), device=device)
            for name, p in params.items()
        }
        if not count:
            return total
        tangents = {name: v[name].to(p) for name, p in params.items()}
        for batch_rows in plan(max(1, token_batch_size // count)):
            examples = collate([labelled(data, int(row)) for row in batch_rows])
            batch = {name: value.to(device) for name, value in examples.items()}
            with forward_mode():
                share = vmap(of_batch, in_dims=(None, 0))(batch, tangents)
            total = {name: total[name] + share[name] for name in total}
        return {name: value / len(data) for name, value in total.items()}

    return product


def _rows_of(v: Params, params: Params) -> int:
    if wrong := v.keys() ^ params.keys():
        raise InputError(
            f"the vector and the parameters differ in {min(wrong)}: give both the same {len(params)} names"
        )
    for name, p in params.items():
        if v[name].ndim != p.ndim + 1 or v[name].shape[1:] != p.shape:
            raise InputError(
                f"the vector's {name} has shape {list(v[name].shape)}, expected {['k', *p.shape]}: "
                "a single vector has k = 1, v[None]"
            )
    counts = {len(value) for value in v.values()}
    if len(counts) > 1:
        raise InputError(f"the vector's parts have {sorted(counts)} rows: give all of them the same number")
    return counts.pop()


REMEDIES = (
    ("random operation", "the model is random", "put it into eval mode, model.eval()"),
    (
        "autograd.Function|forward AD",
        "the model has an operation without forward mode",
        "load it with attn_implementation='eager' and without fused kernels",
    ),
    ("vmap", "the model's code cannot be mapped over examples", "take them one by one, token_batch_size=1"),
)
"""A pattern of PyTorch's message, what it means, and what to do."""


@contextmanager
def forward_mode() -> Iterator[None]:
    """Run attention by its formula, which has a forward mode, and refuse operations that have none."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # PyTorch itself causes this warning when it loads its table of forward derivatives.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        try:
            yield
        except RuntimeError as error:
            cause = " ".join(str(error).split())
            for pattern, meaning, remedy in REMEDIES:
                if re.search(pattern, cause):
                    raise InputError(f"{meaning} ({cause[:100]}...): {remedy}") from error
            raise
