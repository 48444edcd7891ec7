"""Training many models at once: a pure, twice differentiable step, stacked parameters, seeded data order.

Counterfactual models differ in their rows and their seed, and in nothing else, so they train together: `vmap`
over stacked parameters makes one large product of many small ones. Every result is, to rounding, that of
training the models one at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, pi
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from gradfn.data import collate
from gradfn.engine.stream import labelled, row_name
from gradfn.errors import InputError
from gradfn.memory import free_memory
from gradfn.model.params import call, params_of
from gradfn.random import words
from gradfn.types import Batch, Data, Example, LossFn, Params

__all__ = [
    "State", "Step", "Table", "Trained", "Trainer", "Training", "first_state", "initial_params",
    "learning_rate", "losses_of", "make_step", "make_trainer", "stacked_losses", "table_of", "train",
    "update",
]  # fmt: skip

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "linear", "cosine"]
Losses = Callable[[Params, Batch], Tensor]
"""The losses of a batch at given parameters, `[batch]`; or of stacked ones, `[models, batch]`."""
Start = Callable[[], nn.Module] | Params
"""What makes a model, called once a seed; or the parameters that all models start from."""

CACHE_BYTES = 192 << 20
"""What is alive of the models of a chunk on a CPU: beyond its caches, a step waits for memory."""
RANDOM = "the loss is random (dropout?), and retraining is not: put its model in eval mode"
"""What is said of a loss that draws random numbers."""
STATE_COPIES = 10
"""Parameters, gradients and moments, old and new, and what is between, in sizes of the parameters."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Training:
    """How a model is trained: mini-batches of the mean loss, by the formulas of `torch.optim`.

    Args:
        epochs: passes over the rows.
        batch_size: rows a step; the last step of an epoch has what is left.
        learning_rate: before the schedule.
        optimizer: "sgd", "adam" (weight decay is added to the gradient) or "adamw" (it shrinks the weights).
        momentum, nesterov: of sgd.
        betas, eps: of adam and adamw.
        weight_decay: in the convention of the optimizer.
        schedule: of the learning rate after the warmup: "constant", or "linear" or "cosine" down to zero.
        warmup: steps over which the learning rate rises from zero.

    Raises:
        InputError: a number out of its range, an unknown name, momentum without sgd.

    >>> Training(epochs=3, batch_size=8, learning_rate=0.1, optimizer="sgd").momentum
    0.0
    """

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: Optimizer = "adamw"
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup: int = 0

    def __post_init__(self) -> None:
        for what, given, choices in (
            ("optimizer", self.optimizer, get_args(Optimizer)),
            ("schedule", self.schedule, get_args(Schedule)),
        ):  # fmt: skip
            if given not in choices:
                raise InputError(f"no {what} {given!r}: choose {', '.join(choices)}")
        for what, number, fits, wanted in (
            ("epochs", self.epochs, self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "1 or more"),
            ("learning_rate", self.learning_rate, 0 < self.learning_rate < inf, "above 0, and finite"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "at least 0 and below 1"),
            ("eps", self.eps, 0 < self.eps < inf, "above 0, and finite"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < inf, "0 or more, and finite"),
            ("warmup", self.warmup, self.warmup >= 0, "0 or more"),
        ):
            if not fits:
                raise InputError(f"{what} must be {wanted}, not {number}")
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise InputError(f"momentum is of sgd, and {self.optimizer} has betas: give one or the other")
        if self.nesterov and not self.momentum:
            raise InputError("nesterov looks ahead along the momentum: give one above 0, or leave it out")

    def settings(self) -> dict[str, Any]:
        """What a run records of it."""
        return asdict(self)


class State(NamedTuple):
    """A model in training, or many of them stacked: every tensor has the models first, then.

    `moments` are the optimizer's: none, the momentum, or Adam's two. `taken` is the number of steps taken and
    `total` that of all steps, by which the schedule goes.
    """

    params: Params
    moments: tuple[Params, ...]
    taken: Tensor
    total: Tensor


class Step(NamedTuple):
    """What a step was: the state after it, the rows it took, their weights and (before it) their losses."""

    state: State
    rows: Int64[Tensor, "models batch"]
    weights: Float[Tensor, "models batch"]
    losses: Float[Tensor, "models batch"]


# --- the step


def first_state(params: Params, training: Training, total: Tensor) -> State:
    """The state before the first step.

    Args:
        params: of one model, or stacked.
        training: which moments there are.
        total: the steps that there will be, for the schedule: `[]`, or `[models]`.

    >>> params = {"w": torch.ones(2)}
    >>> state = first_state(params, Training(1, 1, 0.1, "adam"), torch.tensor(10))
    >>> len(state.moments), state.taken
    (2, tensor(0))
    """
    kept = 2 if training.optimizer != "sgd" else 1 if training.momentum else 0
    zeros = tuple({name: torch.zeros_like(value) for name, value in params.items()} for _ in range(kept))
    return State(params, zeros, torch.zeros_like(total), total)


def learning_rate(training: Training, count: Tensor, total: Tensor) -> Float64[Tensor, "*models"]:
    """The learning rate of the step after `count` of `total` steps, warmup and schedule included.

    >>> learning_rate(Training(1, 1, 0.1, schedule="linear"), torch.tensor(5), torch.tensor(10))
    tensor(0.0500, dtype=torch.float64)
    """
    t = count.double()
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


def _root(v: Tensor) -> Tensor:
    """`sqrt(v)` with the derivative 0 at 0, where the root's is infinite and that of Adam's step is not."""
    if not torch.is_grad_enabled():
        return v.sqrt()
    return torch.where(v > 0, torch.where(v > 0, v, 1).sqrt(), 0)


def update(training: Training, state: State, grads: Params, active: Tensor | None = None) -> State:
    """The state after a step of the optimizer along gradients: elementwise, and so of stacked states too.

    * sgd: `b' = mu b + g`, `p' = p - lr b'` (nesterov: `p - lr (g + mu b')`), with `g` for `g + decay p`
    * adam: `m' = b1 m + (1 - b1) g`, `v' = b2 v + (1 - b2) g²`,
      `p' = p - lr m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps)`, with `g` for `g + decay p`
    * adamw: the same, with `(1 - lr decay) p` for `p` and `g` as it is

    Args:
        training: the optimizer.
        state: before the step.
        grads: by the names of the parameters.
        active: False leaves the state as it is; `[]`, or `[models]`. None means that all are.

    >>> state = first_state({"w": torch.ones(1)}, Training(1, 1, 0.5, "sgd"), torch.tensor(1))
    >>> update(Training(1, 1, 0.5, "sgd"), state, {"w": torch.ones(1)}).params["w"]
    tensor([0.5000])
    """
    lr, one = learning_rate(training, state.taken, state.total), state.taken + 1
    made = {}
    for name, p in state.params.items():
        moments = [moment[name] for moment in state.moments]
        made[name] = (_sgd if training.optimizer == "sgd" else _adam)(
            training, p, grads[name], moments, lr, one
        )
    new = State(
        {name: parts[0] for name, parts in made.items()},
        tuple({name: parts[1 + i] for name, parts in made.items()} for i in range(len(state.moments))),
        one, state.total,
    )  # fmt: skip
    return new if active is None else _chosen(active, new, state)


def _beside(number: Tensor, tensor: Tensor) -> Tensor:
    """A number a model, shaped to go with a tensor a model."""
    return number.reshape(*number.shape, *[1] * (tensor.ndim - number.ndim))


def _chosen(active: Tensor, new: State, old: State) -> State:
    def choose(a: Params, b: Params) -> Params:
        return {name: torch.where(_beside(active, value), value, b[name]) for name, value in a.items()}

    moments = tuple(choose(a, b) for a, b in zip(new.moments, old.moments, strict=True))
    return State(
        choose(new.params, old.params), moments, torch.where(active, new.taken, old.taken), old.total
    )


def _sgd(
    training: Training, p: Tensor, g: Tensor, moments: list[Tensor], lr: Tensor, t: Tensor
) -> list[Tensor]:
    if training.weight_decay:
        g = g + training.weight_decay * p
    if moments:
        moments = [training.momentum * moments[0] + g]
        g = g + training.momentum * moments[0] if training.nesterov else moments[0]
    return [torch.addcmul(p, g, _beside(-lr.to(p.dtype), p)), *moments]


def _adam(
    training: Training, p: Tensor, g: Tensor, moments: list[Tensor], lr: Tensor, t: Tensor
) -> list[Tensor]:
    b1, b2 = training.betas
    if training.weight_decay and training.optimizer == "adam":
        g = g + training.weight_decay * p
    elif training.weight_decay:
        p = p * _beside((1 - lr * training.weight_decay).to(p.dtype), p)
    m = torch.lerp(moments[0], g, 1 - b1)
    v = torch.addcmul(b2 * moments[1], g, g, value=1 - b2)
    size, scale = lr / (1 - b1 ** t.double()), (1 - b2 ** t.double()).rsqrt()
    direction = m / (_root(v) * _beside(scale.to(p.dtype), p) + training.eps)
    return [torch.addcmul(p, direction, _beside(-size.to(p.dtype), p)), m, v]


Update = Callable[[Training, State, Params, Tensor | None], State]


def _update_in_place(training: Training, state: State, grads: Params, active: Tensor | None = None) -> State:
    """`update` of stacked models that all take the same step, in one pass over a state that it changes."""
    assert active is None
    lr = float(learning_rate(training, state.taken[0].cpu(), state.total[0].cpu()))
    along = [_dense(grad) for grad in grads.values()]
    params, *moments = (
        [_laid_out(part[name], like) for name, like in zip(grads, along, strict=True)]
        for part in (state.params, *state.moments)
    )
    p, g, *m = ([_in_a_line(tensor) for tensor in part] for part in (params, along, *moments))
    if training.optimizer == "sgd":
        sgd(p, g, [*m[0]] if m else [None] * len(p), fused=True, lr=lr,
            weight_decay=training.weight_decay, momentum=training.momentum, dampening=0.0,
            nesterov=training.nesterov, maximize=False, has_sparse_grad=False)  # fmt: skip
    else:
        steps = [state.taken[0].float() for _ in params]  # the optimizer counts the step itself
        (adam if training.optimizer == "adam" else adamw)(
            p, g, m[0], m[1], [], steps, fused=True, amsgrad=False,
            beta1=training.betas[0], beta2=training.betas[1], lr=lr, maximize=False,
            weight_decay=training.weight_decay, eps=training.eps,
        )  # fmt: skip
    made = [dict(zip(grads, part, strict=True)) for part in (params, *moments)]
    return State(made[0], tuple(made[1:]), state.taken + 1, state.total)


def _dense(tensor: Tensor) -> Tensor:
    """The tensor in memory without gaps or overlaps, in the order it has."""
    return tensor if torch.empty_like(tensor).stride() == tensor.stride() else tensor.contiguous()


def _in_a_line(tensor: Tensor) -> Tensor:
    """A dense tensor as it lies in memory: fused kernels copy what is transposed."""
    return tensor.as_strided((tensor.numel(),), (1,))


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the layout of another one: fused kernels walk through memory and do not look at strides.

    Gradients of weights come transposed, so a state is laid out anew at its first step and never again.
    """
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=like.device).copy_(
        tensor
    )


def make_step(loss: LossFn, training: Training) -> Callable[[State, Batch, Tensor], State]:
    """The training step, a pure function of state, batch and example weights, twice differentiable in all.

    The gradient is that of `sum_b weights_b loss_b`: nothing is divided by anything. Where all weights are 0,
    the state stays as it is.

    Args:
        loss: `loss(params, example) -> scalar`; one that offers `batched` is computed by that.
        training: optimizer and schedule.

    Returns:
        `step(state, batch, weights [batch]) -> state`, of one model; `vmap(step)` steps many.

    >>> def loss(p, e):
    ...     return (p["w"] * e["x"]).sum()
    >>> training = Training(1, 2, 0.5, "sgd")
    >>> state = first_state({"w": torch.zeros(1)}, training, torch.tensor(1))
    >>> step = make_step(loss, training)
    >>> step(state, {"x": torch.tensor([[1.0], [3.0]])}, torch.tensor([0.5, 0.5])).params["w"]
    tensor([-1.])
    """
    losses = losses_of(loss)

    def step(state: State, batch: Batch, weights: Tensor) -> State:
        grads = grad(lambda params: (losses(params, batch) * weights).sum())(state.params)
        return update(training, state, grads, (weights != 0).any())

    return step


# --- losses of batches, of one model and of many


class _Held(nn.Module):
    """A loss with its model as a module, whose parameters can be put in for a call."""

    def __init__(self, loss: Any):
        super().__init__()
        self.model, self.loss = loss.model, loss

    def forward(self, batch: Batch) -> Tensor:
        """The losses of the batch."""
        return self.loss.batched(batch)


def losses_of(loss: LossFn) -> Losses:
    """The losses of a batch as a function of parameters: by `loss.batched` where it is there, else by `vmap`.

    >>> losses_of(lambda p, e: p["w"] * e["x"])({"w": torch.tensor(2.0)}, {"x": torch.arange(3.0)})
    tensor([0., 2., 4.])
    """
    if callable(getattr(loss, "batched", None)) and isinstance(getattr(loss, "model", None), nn.Module):
        whole: Any = getattr(loss, "with_whole_logits", None)
        held = _Held(whole() if whole is not None else loss)
        return _plainly(
            lambda params, batch: call(held, {f"model.{n}": p for n, p in params.items()}, dict(batch))
        )
    return _plainly(lambda params, batch: vmap(loss, in_dims=(None, 0))(params, dict(batch)))


def _plainly(losses: Losses) -> Losses:
    """The same with attention in plain products: its kernels can be neither mapped nor derived twice."""

    def plain(params: Params, batch: Batch) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return losses(params, batch)

    return plain


def _one_by_one(loss: LossFn) -> Losses:
    """The losses of a batch, example by example, for losses that cannot be mapped over."""

    def losses(params: Params, batch: Batch) -> Tensor:
        size = len(next(iter(batch.values())))
        return torch.stack([loss(params, {key: v[row] for key, v in batch.items()}) for row in range(size)])

    return losses


def _looped(losses: Losses) -> Losses:
    """The losses of many models, model by model."""

    def of_all(params: Params, batch: Batch) -> Tensor:
        parts = {name: value.unbind() for name, value in params.items()}
        models = len(next(iter(batch.values())))
        return torch.stack([
            losses({name: of[m] for name, of in parts.items()}, {key: v[m] for key, v in batch.items()})
            for m in range(models)
        ])  # fmt: skip

    return of_all


def stacked_losses(loss: LossFn, params: Params, batch: Batch) -> tuple[Losses, str | None]:
    """The losses of many models, `(stacked params, {key: [models, batch, ...]}) -> [models, batch]`.

    By `vmap` over the models, or one by one where their code cannot be mapped over, which a trial shows.

    Args:
        loss: of one model.
        params: of one model, to try with.
        batch: two examples, to try with.

    Returns:
        The function, and why it is a loop, or None where it is not.

    Raises:
        InputError: the loss is random, or is not one number an example.

    >>> many, why = stacked_losses(lambda p, e: p["w"] * e["x"], {"w": torch.ones(())}, {"x": torch.ones(2)})
    >>> many({"w": torch.tensor([1.0, 2.0])}, {"x": torch.ones(2, 3)})
    tensor([[1., 1., 1.],
            [2., 2., 2.]])
    """
    both = [{name: torch.stack([v, v]) for name, v in given.items()} for given in (params, batch)]
    tries: list[Losses] = [vmap(losses_of(loss)), _looped(losses_of(loss)), _looped(_one_by_one(loss))]
    first, why = None, None
    for losses in tries:
        try:
            with torch.no_grad():
                made = _twice(losses, *both)
        except (RuntimeError, NotImplementedError) as error:
            first = first or error
            if "randomness" in str(error):
                raise InputError(RANDOM) from error
            why = str(first).strip().splitlines()[0]
            continue
        if made.shape != (2, len(next(iter(batch.values())))):
            raise InputError(
                f"a loss must be one number an example, not of shape {list(made.shape[2:])}: reduce it"
            )
        return losses, why
    assert first is not None
    raise first


def _twice(losses: Losses, params: Params, batch: Batch) -> Tensor:
    """The losses, refused where they draw random numbers or are others the second time.

    The first is not seen in the second where the start is zero, nor the second in the first where the numbers
    are not PyTorch's.
    """
    device = next(iter(params.values())).device
    before = _generator_state(device)
    made, again = losses(params, batch), losses(params, batch)
    drew = not torch.equal(before, _generator_state(device))
    # Not to the bit: sums on GPUs may be added up in another order.
    if drew or not torch.allclose(made, again, rtol=1e-4, equal_nan=True):
        raise InputError(RANDOM)
    return made


def _generator_state(device: torch.device) -> Tensor:
    """The state of PyTorch's generators on CPU and device."""
    states = [torch.get_rng_state()]
    return torch.cat(states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


def _check_layers(model: nn.Module) -> None:
    """Refuse layers by which rows of a batch, or chance, would get into one another's losses."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        ):
            raise InputError(
                f"{path or 'the model'} is a BatchNorm, which mixes the rows of a batch and keeps running "
                "statistics: use GroupNorm or LayerNorm in models that are retrained"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            raise InputError(
                f"{path or 'the model'} is a Dropout that is on, and retraining is without: call model.eval()"
            )


def _check_dtypes(params: Params) -> None:
    """Refuse parameters that lose the steps of training to rounding, or cannot take them."""
    for name, value in params.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"the parameter {name} is {str(value.dtype).removeprefix('torch.')}, in which most steps of "
                "training round to nothing: start from parameters in fp32 (tf32 has such, too)"
            )


def _check_names(start: Start, params: Params, model: nn.Module) -> None:
    """Refuse parameters that are not those of the model of the loss, which would not see them."""
    theirs = {name: list(p.shape) for name, p in model.named_parameters()}
    ours = {name: list(p.shape) for name, p in params.items()}
    # Parameters that are given may be some of the model's: the others stay as they are.
    for name in ours if isinstance(start, dict) else theirs | ours:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"the parameter {name} is {ours.get(name, 'absent')} in the start and "
                f"{theirs.get(name, 'absent')} in the model of the loss: make the loss of such a model"
            )


def _check_buffers(start: Callable[[], nn.Module]) -> None:
    """Refuse models that differ in more than their parameters: the loss has one set of buffers for all."""
    first, second = (dict(_made(start, seed).named_buffers()) for seed in (0, 1))
    for name, buffer in first.items():
        if not torch.equal(buffer, second[name]):
            raise InputError(
                f"the buffer {name} differs from seed to seed, and only parameters are put into the loss: "
                "draw it from a seed of its own, or make it a parameter"
            )


# --- rows and their order


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of data, padded and stacked, and the tokens of each."""

    columns: dict[str, Tensor]
    lengths: Int64[Tensor, " rows"]
    padded: frozenset[str]

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Int64[Tensor, "*shape"]) -> dict[str, Tensor]:
        """The rows, `{key: [*shape, ...]}`, sequences as long as the longest of them."""
        flat = rows.reshape(-1).to(self.lengths.device)
        longest = max(1, int(self.lengths[flat].max())) if self.padded else 0
        taken = {}
        for key, column in self.columns.items():
            column = column[:, :longest] if key in self.padded else column
            taken[key] = column.index_select(0, flat).reshape(*rows.shape, *column.shape[1:])
        return taken


def table_of(data: Data, device: torch.device | None = None) -> Table:
    """All rows in memory, sequences padded on the right.

    >>> table_of([{"x": torch.ones(2)}] * 3).take(torch.tensor([0, 2]))["x"].shape
    torch.Size([2, 2])
    """
    if not len(data):
        raise InputError("the data has no rows: give at least one example")
    examples = [labelled(data, row) for row in range(len(data))]
    _check_keys(data, examples)
    sizes = {key: {len(e[key]) if e[key].ndim else 0 for e in examples} for key in examples[0]}
    padded = frozenset(key for key, lengths in sizes.items() if len(lengths) > 1)
    lengths = torch.tensor([max([len(e[key]) for key in padded], default=1) for e in examples])
    return Table({k: v.to(device) for k, v in collate(examples).items()}, lengths.to(device), padded)


def _check_keys(data: Data, examples: Sequence[Example]) -> None:
    """Refuse rows that lack a key which others have."""
    keys = {key: row for row, example in reversed([*enumerate(examples)]) for key in example}
    for row, example in enumerate(examples):
        for key in sorted(keys.keys() - example.keys()):
            raise InputError(
                f"{row_name(data, row)} has no {key!r}, which {row_name(data, keys[key])} has: give all rows "
                "the same keys"
            )


def _orders(subsets: np.ndarray, seeds: Sequence[int], epoch: int) -> np.ndarray:
    """The rows of each subset in the order of an epoch, then all others, `[models, rows]`.

    The words are drawn for all rows of the data, so that a row left out does not change the others' order.
    """
    drawn = {seed: words(subsets.shape[1], "order", seed, epoch) >> np.uint64(1) for seed in {*seeds}}
    keys = np.stack([drawn[seed] for seed in seeds])
    return np.where(subsets, keys, np.iinfo(np.uint64).max).argsort(axis=1)


def _batches(
    orders: np.ndarray, sizes: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The steps of an epoch: rows `[models, batch]`, and how many of them are real, the first ones.

    Where a model has none, or fewer than others, a row of its own stands in.
    """
    for start in range(0, int(sizes.max()), batch_size):
        counts = np.clip(sizes - start, 0, batch_size)
        rows = orders[:, start : start + int(counts.max())]
        yield np.where(np.arange(rows.shape[1]) < counts[:, None], rows, orders[:, :1]), counts


# --- training


@dataclass(frozen=True, eq=False)
class Trained:
    """Models after their training.

    Args:
        params: `{name: [models, ...]}`.
        losses: the mean loss over the rows of the last epoch, each before its step, `[models]`.
        diverged: whether a loss or a parameter is not finite, `[models]`.
    """

    params: Params
    losses: Float64[Tensor, " models"]
    diverged: Bool[Tensor, " models"]


@dataclass(frozen=True, eq=False)
class Trainer:
    """What training depends on, but for subsets and seeds; see `make_trainer`.

    Args:
        start: what makes a model, or the parameters of the start.
        loss: of an example.
        table: the rows.
        training: optimizer, schedule, batches.
        losses: of stacked models.
        looped: why the models do not stack, or None where they do.
    """

    start: Start
    loss: LossFn
    table: Table
    training: Training
    losses: Losses
    looped: str | None

    def trajectory(self, subsets: Bool[Tensor, "models rows"], seeds: Sequence[int]) -> Iterator[Step]:
        """Train the models and yield every step; states that were yielded are not changed afterwards.

        Args:
            subsets: the rows of each model.
            seeds: of each model's initialisation and order.

        Raises:
            InputError: subsets that do not fit the rows, the seeds or the batches.
        """
        self.check(subsets, seeds)
        return self._steps(subsets, seeds, update)

    def _steps(self, subsets: Tensor, seeds: Sequence[int], move: "Update") -> Iterator[Step]:
        chosen = subsets.cpu().numpy()
        sizes = chosen.sum(1)
        params = self.initial(seeds)
        device = next(iter(params.values())).device
        total = torch.from_numpy(self.training.epochs * -(-sizes // self.training.batch_size)).to(device)
        state = first_state(params, self.training, total)
        for epoch in range(self.training.epochs):
            for rows, counts in _batches(_orders(chosen, seeds, epoch), sizes, self.training.batch_size):
                step = self._step(state, torch.from_numpy(rows), torch.from_numpy(counts), move)
                yield step
                state = step.state

    def _step(self, state: State, rows: Tensor, counts: Tensor, move: "Update") -> Step:
        """A step of many models by plain autograd on their sum: `vmap` of `make_step`, but faster."""
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        device = next(iter(leaves.values())).device
        real = (torch.arange(rows.shape[1]) < counts[:, None]).to(device)
        with torch.enable_grad():
            losses = self.losses(leaves, self.table.take(rows))
            weights = (real.double() / counts.clamp_min(1)[:, None].to(device)).to(losses.dtype)
            grads = torch.autograd.grad((losses * weights).sum(), [*leaves.values()], materialize_grads=True)
        with torch.no_grad():
            active = None if bool((counts > 0).all()) else (counts > 0).to(device)
            state = move(self.training, state, dict(zip(leaves, grads, strict=True)), active)
        return Step(state, rows, weights, losses.detach())

    def initial(self, seeds: Sequence[int]) -> Params:
        """The parameters of models before their training, stacked."""
        made = {seed: initial_params(self.start, seed) for seed in {*seeds}}
        return {name: torch.stack([made[seed][name] for seed in seeds]) for name in made[seeds[0]]}

    def train(
        self,
        subsets: Bool[Tensor, "models rows"],
        seeds: Sequence[int],
        *,
        chunk: int | None = None,
        progress: Progress | None = None,
    ) -> Trained:
        """Train the models to the end, so many at a time as fit; see `train`."""
        self.check(subsets, seeds)
        size = self.at_once(chunk)
        parts = [
            self._train_chunk(subsets[start : start + size], list(seeds[start : start + size]), progress)
            for start in range(0, len(seeds), size)
        ]
        return Trained(
            {name: torch.cat([part.params[name] for part in parts]) for name in parts[0].params},
            torch.cat([part.losses for part in parts]), torch.cat([part.diverged for part in parts]),
        )  # fmt: skip

    def _train_chunk(self, subsets: Tensor, seeds: Sequence[int], progress: Progress | None) -> Trained:
        sizes = subsets.sum(1)
        last = (self.training.epochs - 1) * -(-int(sizes.max()) // self.training.batch_size)
        sums, params = torch.zeros(len(seeds), dtype=torch.float64), {}
        alike = bool((sizes == sizes[0]).all())
        for number, step in enumerate(self._steps(subsets, seeds, _update_in_place if alike else update)):
            params, real = step.state.params, step.weights > 0
            if number >= last:
                sums = sums.to(real.device) + torch.where(real, step.losses, 0).sum(1, dtype=torch.float64)
            if progress is not None:
                progress(int(real.sum()))
        losses = sums / sizes.to(sums.device)
        finite = torch.stack([p[..., None].isfinite().flatten(1).all(1) for p in params.values()]).all(0)
        return Trained(params, losses, ~(finite & losses.isfinite()))

    def at_once(self, chunk: int | None = None) -> int:
        """How many models train together: `chunk`, or what fits in memory and, on a CPU, in its caches."""
        if chunk is not None:
            if chunk < 1:
                raise InputError(f"chunk must be 1 or more models at a time, not {chunk}: leave it out")
            return chunk
        params = initial_params(self.start, 0)
        device = next(iter(params.values())).device
        state = STATE_COPIES * sum(p.numel() * p.element_size() for p in params.values())
        rows = torch.arange(min(self.training.batch_size, len(self.table)))
        one = state + 2 * _saved_bytes(_looped(losses_of(self.loss)) if self.looped is None else self.losses,
                                       params, self.table.take(rows))  # fmt: skip
        room = free_memory(device) // 2
        return max(1, (min(room, CACHE_BYTES) if device.type == "cpu" else room) // one)

    def check(self, subsets: Tensor, seeds: Sequence[int]) -> None:
        """Refuse subsets that do not fit the rows, the seeds or the batches."""
        models, rows = subsets.shape
        if rows != len(self.table) or models != len(seeds) or not models:
            raise InputError(
                f"subsets are one a seed over all rows, but {models} of {rows} rows came for {len(seeds)} "
                f"seeds and {len(self.table)} rows"
            )
        smallest = int(subsets.sum(1).min())
        if smallest < 1:
            raise InputError(f"subset {int(subsets.sum(1).argmin())} leaves everything out: keep a row")
        if smallest < self.training.batch_size:
            raise InputError(
                f"a batch of {self.training.batch_size} is larger than the smallest subset, of {smallest} "
                f"rows: give a batch size of at most {smallest}"
            )


def _saved_bytes(losses: Losses, params: Params, batch: Batch) -> int:
    """Bytes that the backward of a batch needs of its forward, for one model."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = {name: p.detach()[None].requires_grad_() for name, p in params.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses(leaves, {key: value[None] for key, value in batch.items()})
    return sum(sizes.values())


def initial_params(start: Start, seed: int) -> Params:
    """The parameters of a model before its training: those given, or a new model's after `manual_seed(seed)`.

    >>> a, b = (initial_params(lambda: nn.Linear(2, 1), seed=3)["weight"] for _ in range(2))
    >>> torch.equal(a, b)
    True
    """
    if isinstance(start, dict):
        return {name: value.detach() for name, value in start.items()}
    model = _made(start, seed)
    _check_layers(model)
    return params_of(model)


def _made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new model, a function of the seed."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        # torch.manual_seed keeps a traceback at every call for devices that are not there yet.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        return make()


def make_trainer(start: Start, loss: LossFn, data: Data, training: Training) -> Trainer:
    """Prepare training over data: rows in memory, and the losses of many models, by `vmap` where they stack.

    Only parameters are put into the loss. Buffers are those of the model that the loss holds, not those of
    the models that `start` makes.

    Args:
        start: what makes a model (called once a seed), or the parameters that all models start from.
        loss: `loss(params, example) -> scalar`; one that offers `batched` is computed by that.
        data: the rows, all of which are put in memory.
        training: optimizer, schedule, batches.

    Raises:
        InputError: no rows, or of other keys; a BatchNorm or dropout; a loss that is random or not one number
            an example; parameters in 16 bits; a start of other parameters than those of `loss.model` where
            there is one, or with buffers that differ from seed to seed.
    """
    model: Any = getattr(loss, "model", None)
    model = model if isinstance(model, nn.Module) else None
    if model is not None:
        _check_layers(model)
    params = initial_params(start, 0)
    _check_dtypes(params)
    if model is not None:
        _check_names(start, params, model)
    if not isinstance(start, dict):
        _check_buffers(start)
    table = table_of(data, next(iter(params.values())).device)
    many, looped = stacked_losses(loss, params, table.take(torch.tensor([0, len(table) - 1])))
    return Trainer(start, loss, table, training, many, looped)


def train(
    start: Start,
    loss: LossFn,
    data: Data,
    subsets: Bool[Tensor, "models rows"],
    seeds: Sequence[int],
    training: Training,
    *,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train one model for each subset, many at a time.

    Model m starts from `start`, is seeded with `seeds[m]`, and is trained on the rows of `subsets[m]` in an
    order that is a function of seed and epoch. All parameters are trained; dropout is off.

    Args:
        start: what makes a model, called under `torch.manual_seed(seeds[m])`, or the parameters of the start.
        loss: `loss(params, example) -> scalar`.
        data: the rows.
        subsets: which rows each model sees.
        seeds: one a model.
        training: optimizer, schedule, batches.
        chunk: how many models train together; changes no result. None: what fits.
        progress: called with the examples done.

    Raises:
        InputError: subsets, batches or a chunk that do not fit; see `make_trainer`.

    >>> def loss(p, e):
    ...     return (p["weight"] @ e["x"] - e["y"]).square().sum()
    >>> data = [{"x": torch.ones(2), "y": torch.tensor([float(i)])} for i in range(4)]
    >>> subsets = torch.tensor([[True, True, False, False], [False, False, True, True]])
    >>> settings = Training(epochs=50, batch_size=2, learning_rate=0.1, optimizer="sgd")
    >>> trained = train(lambda: nn.Linear(2, 1, bias=False), loss, data, subsets, [0, 1], settings)
    >>> trained.params["weight"].sum((1, 2))
    tensor([0.5000, 2.5000])
    """
    trainer = make_trainer(start, loss, data, training)
    return trainer.train(subsets, seeds, chunk=chunk, progress=progress)
