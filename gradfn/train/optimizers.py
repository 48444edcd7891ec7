"""Optimizers as pure functions of state and gradient, of one model or of many stacked ones."""

from collections.abc import Callable
from math import pi
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from gradfn.errors import InputError
from gradfn.methods.dynamics import Dynamics
from gradfn.train.spec import Training
from gradfn.types import Params

MUON_LEAVES = ("embed", "wte", "wpe", "shared", "head", "score", "classifier")
"""Words in the names of matrices that muon leaves to adamw: embeddings and heads, as its author has it."""
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, NEWTON_SCHULZ_EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7


class State(NamedTuple):
    """A model in training. Many models are stacked: then every tensor has a leading axis of models.

    Args:
        params: the parameters.
        moments: what the optimizer remembers: nothing, the momentum, or Adam's two moments; of a matrix that
            muon steps the momentum, and a zero in place of the second.
        taken: the number of steps taken so far.
        total: the number of steps of the whole training, which the schedule needs.
    """

    params: Params
    moments: tuple[Params, ...]
    taken: Tensor
    total: Tensor


Update = Callable[[Training, State, Params, Tensor | None], State]
"""`update` or `update_in_place`."""


def first_state(params: Params, training: Training, total: Tensor) -> State:
    """The state before the first step.

    Args:
        params: of one model, or stacked.
        training: its optimizer decides which moments there are.
        total: the number of steps of the whole training: `[]`, or `[models]`.

    >>> params = {"w": torch.ones(2)}
    >>> state = first_state(params, Training(1, 1, 0.1, "adam"), torch.tensor(10))
    >>> len(state.moments), state.taken
    (2, tensor(0))
    """
    count = 1 if training.optimizer == "sgd" else 2
    moments: list[Params] = [{name: torch.zeros_like(p) for name, p in params.items()} for _ in range(count)]
    if training.optimizer == "sgd" and not training.momentum:
        moments = []
    for name, p in params.items() if training.optimizer == "muon" else ():
        if orthogonalised(name, p.ndim - total.ndim):
            moments[1][name] = p.new_zeros(total.shape)
    return State(params, tuple(moments), torch.zeros_like(total), total)


def orthogonalised(name: str, dims: int) -> bool:
    """Whether muon steps a parameter by itself: a matrix whose name is not that of an embedding or a head.

    >>> orthogonalised("h.0.mlp.c_fc.weight", 2), orthogonalised("wte.weight", 2), orthogonalised("bias", 1)
    (True, False, False)
    """
    return dims == 2 and not any(word in name for word in MUON_LEAVES)


def dynamics_of(training: Training) -> Dynamics:
    """What its steps do near a minimum; powers of a step where all have one learning rate.

    Raises:
        InputError: muon; adam with weight decay; an `eps_root`, which no state of an optimizer tells.

    >>> dynamics_of(Training(1, 1, 0.1, "sgd", momentum=0.9)).states
    2
    """
    if training.optimizer == "muon":
        raise InputError("source knows no muon, whose step is of whole matrices: take metagradients")
    if training.eps_root:
        raise InputError("source knows no eps_root, which no state of an optimizer tells: train without it")
    even = training.optimizer == "sgd" and training.schedule == "constant" and not training.warmup
    return Dynamics(training.optimizer, training.momentum, training.nesterov, training.weight_decay,
                    training.learning_rate if even else None)  # fmt: skip


def learning_rate(training: Training, taken: Tensor, total: Tensor) -> Float64[Tensor, "*models"]:
    """The learning rate of the next step, warmup and schedule included.

    Args:
        training: the learning rate, its schedule and its warmup.
        taken: the number of steps taken so far.
        total: the number of steps of the whole training.

    >>> learning_rate(Training(1, 1, 0.1, schedule="linear"), torch.tensor(5), torch.tensor(10))
    tensor(0.0500, dtype=torch.float64)
    """
    t = taken.double()
    left = ((total - t) / (total - training.warmup).clamp_min(1)).clamp(0, 1)
    match training.schedule:
        case "linear":
            factor = left
        case "cosine":
            factor = (1 - (pi * left).cos()) / 2
        case _:
            factor = torch.ones_like(t)
    if training.warmup:
        factor = torch.where(t < training.warmup, t / training.warmup, factor)
    return training.learning_rate * factor


def update(training: Training, state: State, grads: Params, active: Tensor | None = None) -> State:
    """The state after one step of the optimizer, twice differentiable; stacked models each take their own.

    * sgd: `b' = mu b + g`, `p' = p - lr b'` (nesterov: `p - lr (g + mu b')`), with `g` for `g + decay p`
    * adam: `m' = b1 m + (1 - b1) g`, `v' = b2 v + (1 - b2) g²`,
      `p' = p - lr m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t) + eps_root) + eps)`, with `g` for `g + decay p`
    * adamw: the same, with `(1 - lr decay) p` for `p`, and without decay in `g`
    * muon, of matrices `[a, b]` that are neither embeddings nor heads (`orthogonalised`):
      `m' = mu m + (1 - mu) g`, `p' = (1 - lr decay) p - 0.2 sqrt(max(a, b)) lr NS(m')`, with nesterov
      `NS((1 - mu) g + mu m')`. NS is five steps of Newton and Schulz towards the nearest orthogonal matrix,
      in the type of `p`. The factor gives a step the size of adamw's, which all else takes at the same rate.

    With `max_grad_norm`, `g` is what `clipped` gives.

    Args:
        training: the optimizer and its settings.
        state: before the step.
        grads: the gradient of each parameter, by name.
        active: which models take the step, `[]` or `[models]`; the state of the others stays. None: all.

    >>> state = first_state({"w": torch.ones(1)}, Training(1, 1, 0.5, "sgd"), torch.tensor(1))
    >>> update(Training(1, 1, 0.5, "sgd"), state, {"w": torch.ones(1)}).params["w"]
    tensor([0.5000])

    Source: Adam, arXiv:1412.6980; AdamW, arXiv:1711.05101; Muon, arXiv:2502.16982, section 2.
    """

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return new if active is None else torch.where(_align(active, new), new, old)

    grads = clipped(training, grads, stacked=state.taken.ndim > 0)
    lr, taken = learning_rate(training, state.taken, state.total), state.taken + 1
    models = state.taken.ndim
    parts = [state.params, *state.moments]
    made: list[Params] = [{} for _ in parts]
    for name in state.params:
        old = [part[name] for part in parts]
        if training.optimizer == "sgd":
            step = _sgd
        else:
            muon = training.optimizer == "muon" and orthogonalised(name, old[0].ndim - models)
            step = _muon if muon else _adam
        for part, new, before in zip(made, step(training, grads[name], old, lr, taken), old, strict=True):
            part[name] = chosen(new, before)
    return State(made[0], tuple(made[1:]), chosen(taken, state.taken), state.total)


def clipped(training: Training, grads: Params, *, stacked: bool = False) -> Params:
    """The gradient that a step takes: `min(1, C / (n + 1e-6)) g`, `n = |g|` over all parameters.

    The derivative of n at 0 counts as 0.

    Args:
        training: C is its `max_grad_norm`; None leaves the gradient as it is.
        grads: by parameter.
        stacked: whether they are of many models, each of which has a norm of its own.

    >>> clipped(Training(1, 1, 0.1, max_grad_norm=1.0), {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    if training.max_grad_norm is None:
        return grads
    scale, _ = clip_scale(training, grads, stacked=stacked)
    return {name: g * _align(scale, g) for name, g in grads.items()}


def clip_scale(training: Training, grads: Params, *, stacked: bool = False) -> tuple[Tensor, Tensor]:
    """The factor by which `clipped` scales a gradient, and the gradient's norm.

    >>> clip_scale(Training(1, 1, 0.1, max_grad_norm=1.0), {"a": torch.tensor([3.0, 4.0])})
    (tensor(0.2000), tensor(5.))
    """
    squares = [g.square().reshape(*g.shape[:stacked], -1).sum(-1) for g in grads.values()]
    norm = _root(torch.stack(squares).sum(0))
    if training.max_grad_norm is None:
        return torch.ones_like(norm), norm
    return (training.max_grad_norm / (norm + 1e-6)).clamp_max(1), norm


def _align(number: Tensor, like: Tensor) -> Tensor:
    """A number a model, with as many axes as a tensor that has a leading axis of models."""
    return number.reshape((*number.shape, *[1] * (like.ndim - number.ndim)))


def _sgd(training: Training, g: Tensor, old: list[Tensor], lr: Tensor, t: Tensor) -> list[Tensor]:
    p, *moments = old
    if training.weight_decay:
        g = g + training.weight_decay * p
    if moments:
        moments = [training.momentum * moments[0] + g]
        g = g + training.momentum * moments[0] if training.nesterov else moments[0]
    return [torch.addcmul(p, g, _align(-lr.to(p.dtype), p)), *moments]


def _adam(training: Training, g: Tensor, old: list[Tensor], lr: Tensor, t: Tensor) -> list[Tensor]:
    p, m, v = old
    b1, b2 = training.betas
    if training.weight_decay and training.optimizer == "adam":
        g = g + training.weight_decay * p
    elif training.weight_decay:
        p = p * _align((1 - lr * training.weight_decay).to(p.dtype), p)
    m = torch.lerp(m, g, 1 - b1)
    v = torch.addcmul(b2 * v, g, g, value=1 - b2)
    size, scale = lr / (1 - b1 ** t.double()), (1 - b2 ** t.double()).rsqrt()
    seen = v + _align(training.eps_root * (1 - b2 ** t.double()), v).to(v.dtype) if training.eps_root else v
    direction = m / (_root(seen) * _align(scale.to(p.dtype), p) + training.eps)
    return [torch.addcmul(p, direction, _align(-size.to(p.dtype), p)), m, v]


def _muon(training: Training, g: Tensor, old: list[Tensor], lr: Tensor, t: Tensor) -> list[Tensor]:
    p, m, nothing = old
    m = torch.lerp(m, g, 1 - training.momentum)
    along = torch.lerp(g, m, training.momentum) if training.nesterov else m
    p = p * _align((1 - lr * training.weight_decay).to(p.dtype), p) if training.weight_decay else p
    size = lr * 0.2 * max(p.shape[-2:]) ** 0.5
    return [torch.addcmul(p, _orthogonal(along), _align(-size.to(p.dtype), p)), m, nothing]


def _orthogonal(matrix: Tensor) -> Tensor:
    """`matrix = U S Vᵀ` with its singular values brought near 1, most of them to between .7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / _root(x.square().sum((-2, -1), keepdim=True)).clamp_min(NEWTON_SCHULZ_EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _root(v: Tensor) -> Tensor:
    """`sqrt(v)` with the derivative 0 at 0. The root has an infinite one there, but Adam's step is smooth."""
    if not torch.is_grad_enabled():
        return v.sqrt()
    return torch.where(v > 0, torch.where(v > 0, v, 1).sqrt(), 0)


def update_in_place(training: Training, state: State, grads: Params, active: Tensor | None = None) -> State:
    """The step of `update` for stacked models that all take it at the same count, written into the state.

    PyTorch's fused optimizers do it in one pass over the memory of parameters and moments. They have no
    `eps_root` and no muon: with these, this is `update`.

    Args:
        training, state, grads: see `update`.
        active: None.

    >>> state = first_state({"w": torch.ones(1, 1)}, Training(1, 1, 0.5, "sgd"), torch.tensor([1]))
    >>> update_in_place(Training(1, 1, 0.5, "sgd"), state, {"w": torch.ones(1, 1)}).params["w"]
    tensor([[0.5000]])
    """
    assert active is None
    if training.eps_root or training.optimizer == "muon":
        return update(training, state, grads)
    grads = clipped(training, grads, stacked=True)
    lr = float(learning_rate(training, state.taken[0].cpu(), state.total[0].cpu()))
    # Fused kernels walk through memory and ignore strides, so gradients must be dense.
    along = [g if torch.empty_like(g).stride() == g.stride() else g.contiguous() for g in grads.values()]
    params, *moments = (
        [_laid_out(part[name], like) for name, like in zip(grads, along, strict=True)]
        for part in (state.params, *state.moments)
    )
    # They copy a transposed tensor, so all are given as the vectors that lie in memory.
    p, g, *m = ([tensor.as_strided((tensor.numel(),), (1,)) for tensor in part]
                for part in (params, along, *moments))  # fmt: skip
    if training.optimizer == "sgd":
        sgd(p, g, [*m[0]] if m else [None] * len(p), fused=True, lr=lr,
            weight_decay=training.weight_decay, momentum=training.momentum, dampening=0.0,
            nesterov=training.nesterov, maximize=False, has_sparse_grad=False)  # fmt: skip
    else:
        steps = [state.taken[0].float() for _ in params]  # the optimizer adds the step itself
        (adam if training.optimizer == "adam" else adamw)(
            p, g, m[0], m[1], [], steps, fused=True, amsgrad=False,
            beta1=training.betas[0], beta2=training.betas[1], lr=lr, maximize=False,
            weight_decay=training.weight_decay, eps=training.eps,
        )  # fmt: skip
    made = [dict(zip(grads, part, strict=True)) for part in (params, *moments)]
    return State(made[0], tuple(made[1:]), state.taken + 1, state.total)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the strides of another one.

    Gradients of weights come transposed, so a state is copied at its first step and never again.
    """
    if tensor.stride() == like.stride():
        return tensor
    new = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=like.device)
    return new.copy_(tensor)
