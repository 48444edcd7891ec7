"""Back through one step of a training: the adjoint of its optimizer, and of its gradient.

Step t has the gradient `g_t = sum_i w_i c_i grad l_i(theta_t)`. Its adjoint takes the derivatives of a query
loss in the state behind the step to those in the state before it, and to those in the weights:

    u           = (d state_{t+1} / d g_t)ᵀ lam         optimizer, schedule, decay and clipping included
    dL / dw_i  += c_i <u, grad l_i>
    lam_theta   = (d state_{t+1} / d theta_t)ᵀ lam + H u,    H = sum_i w_i c_i Hess l_i

One vjp of `(theta, w) -> g` along u gives all `<u, grad l_i>` and H u, so no gradient of one row is made, and
no graph of a step is kept. With the Gauss-Newton matrix, `H u = sum_i w_i c_i J_iᵀ (Hess_z l_i) J_i u`, where
J_i is the Jacobian of the model's outputs z; all else is the same.

Source: MAGIC, arXiv:2504.16430, section 3; REPLAY, arXiv:2503.13751, section 3.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradfn.exact.products import forward_mode
from gradfn.train.course import Course
from gradfn.train.optimizers import State, clipped, update
from gradfn.train.replay import Curvature
from gradfn.train.spec import Training
from gradfn.train.split import Split, split_of
from gradfn.train.step import Losses, losses_of
from gradfn.types import Batch, LossFn, Params

Per = Literal["row", "visit", "token"]
"""What has a weight: a row, a row in one epoch, or the loss of one token of a row."""


class Adjoint(NamedTuple):
    """The derivatives of query losses in a state.

    Args:
        params: in its parameters, `{name: [queries, *parameter]}`.
        moments: in its moments, the same for each.
    """

    params: Params
    moments: tuple[Params, ...]


def pull(
    course: Course,
    state: State,
    epoch: int,
    rows: Int64[np.ndarray, " batch"],
    adjoint: Adjoint,
    *,
    per: Per = "row",
    mapped: bool = True,
    curvature: Curvature = "hessian",
) -> tuple[Adjoint, Float64[Tensor, "batch *tokens queries"]]:
    """The adjoint of one step of a course: back through the optimizer, and through the gradient.

    Args:
        course: the training.
        state: before the step.
        epoch: of the step.
        rows: of its batch.
        adjoint: of the state behind the step.
        per: "token" gives the derivatives in the weights of tokens, of each row as many as the longest has.
        mapped: take all queries at once by `vmap`; else one by one, which gives the same numbers.
        curvature: H, see `Replay`.

    Returns:
        The adjoint of the state before the step, and the derivatives of the query losses in the weights.
    """
    shares, device = course.shares(rows), next(iter(state.params.values())).device
    weights = course.weights_of(epoch, rows)
    grads, _ = course.gradient(course.losses(fused=True), state.params, rows, weights)
    before, u = pull_update(course.training, state, grads, adjoint)
    params, queries = before.params, len(next(iter(u.values())))
    longest = (int(course.lengths[rows].max()),) if per == "token" else ()
    found = torch.zeros(len(rows), *longest, queries, dtype=torch.float64)
    along_them = along_of(course.loss, per, curvature)
    for places, batch in course.parts(rows, device, times=queries if mapped else 1):
        own = weights[places].to(device)
        if per == "token":
            own = own.reshape(len(places), -1)[:, : (shape := batch["input_ids"].shape)[1]].expand(shape)
        curved, along = along_them(state.params, batch, own, u, mapped)
        params = {name: value + curved[name] for name, value in params.items()}
        made = along.movedim(0, -1).double().cpu()
        found[(places, *(slice(size) for size in made.shape[1:]))] = made
    return before._replace(params=params), found * shares.reshape(-1, *[1] * (found.ndim - 1))


def pull_update(training: Training, state: State, grads: Params, adjoint: Adjoint) -> tuple[Adjoint, Params]:
    """Back through the optimizer: the adjoint of the state at a given gradient, and u, that of the gradient.

    Args:
        training: the optimizer.
        state: before the step.
        grads: of the step, before clipping.
        adjoint: of the state behind the step.

    >>> state = State({"w": torch.ones(1)}, (), torch.tensor(0), torch.tensor(1))
    >>> adjoint = Adjoint({"w": torch.ones(1, 1)}, ())
    >>> pull_update(Training(1, 1, 0.5, "sgd", weight_decay=0.1), state, {"w": torch.ones(1)}, adjoint)
    (Adjoint(params={'w': tensor([[0.9500]])}, moments=()), {'w': tensor([[-0.5000]])})
    """
    plain, passed = replace(training, max_grad_norm=None), clipped(training, grads)
    params: Params = {}
    moments: tuple[Params, ...] = tuple({} for _ in state.moments)
    u: Params = {}
    for name in state.params:

        def step(g: Tensor, p: Tensor, *old: Tensor, name: str = name) -> tuple[Tensor, ...]:
            own = State({name: p}, tuple({name: m} for m in old), state.taken, state.total)
            new = update(plain, own, {name: g})
            return new.params[name], *(m[name] for m in new.moments)

        back = vjp(step, passed[name], state.params[name], *(m[name] for m in state.moments))[1]
        u[name], params[name], *rest = vmap(back)((adjoint.params[name], *(m[name] for m in adjoint.moments)))
        for part, value in zip(moments, rest, strict=True):
            part[name] = value
    if training.max_grad_norm is not None:
        unclip = vjp(lambda g: clipped(training, g), grads)[1]
        u = vmap(lambda u: unclip(u)[0])(u)
    return Adjoint(params, moments), u


Along = Callable[[Params, Batch, Tensor, Params, bool], tuple[Params, Tensor]]
"""`(params, batch, weights, u, mapped) -> (H u, derivatives of the losses along u)`, see `along_losses`."""


def along_of(loss: LossFn, per: Per, curvature: Curvature) -> Along:
    """`along_losses` of a loss, or `along_outputs` of its two parts.

    Raises:
        InputError: a loss that cannot be split, or is not told apart by token.
    """
    tokens = per == "token"
    if curvature == "hessian":
        return partial(along_losses, losses_of(loss, tokens=tokens))
    return partial(along_outputs, split_of(loss, tokens=tokens))


def along_losses(
    losses: Losses, params: Params, batch: Batch, weights: Tensor, u: Params, mapped: bool
) -> tuple[Params, Tensor]:
    """`H u`, and the derivatives of the losses along u, for every query: `[queries, batch]`, or by token.

    Both are the vjp of `(theta, w) -> g` along u. (The gradient of a jvp would do, too, but PyTorch's jvp of
    a LayerNorm has a wrong derivative; the second derivative in reverse mode is right.)
    """

    def gradient(params: Params, weights: Tensor) -> Params:
        def total(params: Params) -> Tensor:
            made = losses(params, batch)
            return (made * weights.to(made.dtype)).sum()

        return grad(total)(params)

    with sdpa_kernel(SDPBackend.MATH):
        back = vjp(gradient, params, weights)[1]
        if mapped:
            return vmap(back)(u)
        queries = len(next(iter(u.values())))
        made = [back({name: value[query] for name, value in u.items()}) for query in range(queries)]
    curved = {name: torch.stack([one[name] for one, _ in made]) for name in params}
    return curved, torch.stack([along for _, along in made])


def along_outputs(
    split: Split, params: Params, batch: Batch, weights: Tensor, u: Params, mapped: bool
) -> tuple[Params, Tensor]:
    """The same with the Gauss-Newton matrix for H: forward to the outputs, and back from them."""

    def slope(z: Tensor) -> Tensor:
        def total(z: Tensor) -> Tensor:
            made = split.losses(z, batch)
            return (made * weights.to(made.dtype)).sum()

        return grad(total)(z)

    def outputs(params: Params) -> Tensor:
        return split.outputs(params, batch)

    def product(u: Params) -> tuple[Params, Tensor]:
        z, moved = jvp(outputs, (params,), (u,))[:2]
        along = jvp(lambda z: split.losses(z, batch), (z,), (moved,))[1]
        curved = jvp(slope, (z,), (moved,))[1]
        return vjp(outputs, params)[1](curved)[0], along

    with forward_mode():
        if mapped:
            return vmap(product)(u)
        made = [product({n: v[query] for n, v in u.items()}) for query in range(len(next(iter(u.values()))))]
    curved = {name: torch.stack([one[name] for one, _ in made]) for name in params}
    return curved, torch.stack([along for _, along in made])
