"""Training one model, step by step, so that all of it is known afterwards: order, batches, weights, schedule.

A step is a pure function of the state before it, the rows and the seed. A state that was saved and read again
therefore goes on to the same bits. The memory is that of one model, its moments and its gradient.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from math import isfinite
from typing import NamedTuple, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gradfn.data import check_rows, collate
from gradfn.engine.batching import plan_batches, plan_equal, shapes_of
from gradfn.engine.stream import labelled, lengths_of
from gradfn.engine.tap import Tapped
from gradfn.errors import InputError
from gradfn.exact.products import forward_mode
from gradfn.subject import TOKEN_BATCH_SIZE, Normalize, row_weights
from gradfn.train.dots import Values
from gradfn.train.in_run import Kind, check_values, step_direction
from gradfn.train.optimizers import State, clip_scale, first_state, learning_rate, update
from gradfn.train.record import Recorder
from gradfn.train.spec import Training
from gradfn.train.stacked import check_start
from gradfn.train.step import Losses, losses_of
from gradfn.train.table import orders
from gradfn.train.weights import placed_weights
from gradfn.types import Data, LossFn, Params

DIRECTIONS_BYTES = 1 << 30
"""Memory of the validation gradients that are taken at a time; a single one may be larger."""


class Diverged(InputError):
    """A loss or a gradient that is not finite."""


class Taken(NamedTuple):
    """One step that was taken.

    Args:
        state: after it. The next step empties it; its tensors never change, so keep a copy of its dicts.
        rows: the rows of the batch, in their order.
        epoch: from 0.
        learning_rate: of this step.
        loss: what was minimised, at the parameters before the step.
        norm: of its gradient, over all parameters, before it was clipped.
        clip: the factor by which clipping scaled the gradient.
        tokens: of the rows.
        losses: of the rows, before the step.
        values: what each row did to each validation loss, `[batch, queries]`, see `in_run`; None: not asked.
    """

    state: State
    rows: Int64[np.ndarray, " batch"]
    epoch: int
    learning_rate: float
    loss: float
    norm: float
    clip: float
    tokens: int
    losses: Float64[np.ndarray, " batch"]
    values: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Valuing:
    """Which validation losses the rows of a step are valued by, and how; see `in_run`.

    Args:
        data: the validation rows, each a query.
        loss: of such a row.
        kind: see `step_direction`.
        every: steps from one that is valued to the next; the first one of all is.
        probes: of all parameters of the model, off; None: forward mode, which every model has. See
            `gradfn.train.watched.fast_values`.

    Raises:
        InputError: no rows, or fewer than one step.
    """

    data: Data
    loss: LossFn
    kind: Kind = "shapley"
    every: int = 1
    probes: Values | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or not len(self.data):
            raise InputError(
                f"{len(self.data)} validation rows every {self.every} steps: give 1 or more of both"
            )


@runtime_checkable
class Recorded(Protocol):
    """What records the rows of steps, see `gradfn.train.watched.Recorded`."""

    @property
    def recorder(self) -> Recorder:
        """Which is told the losses of rows, and records from its step `number` on."""
        ...

    def begin(self, state: State) -> None:
        """Tell the state before a step."""
        ...

    def end(self, state: State, epoch: int, factor: float) -> None:
        """Tell the state after it, and record the rows."""
        ...


@dataclass(frozen=True, eq=False)
class Course:
    """The training of one model, from which all steps follow.

    Args:
        loss: of a row.
        data: the rows.
        training: optimizer, schedule, batches.
        seed: of the order of the rows in each epoch.
        normalize: "rows": a step minimises the mean of its rows' losses. "tokens": the mean over their
            supervised tokens, so that long rows count more.
        token_batch_size: padded tokens whose gradient is made at a time; their gradients are added up.
        pads: whether rows of unequal length may share a batch, see `gradfn.engine.stream.pads`.
        valuing: what the rows of each step are valued by.
        recorded: what the gradients of the rows are told to.
        weights: what the losses of rows are multiplied by, `[rows]`, or `[epochs, rows]`; or what the parts
            of its tokens are, `[rows, tokens]`, as many as the longest row has; see `placed_weights`. None:
            1. They change no batch, no denominator and no schedule, so a row of weight 0 is masked, and a
            step is taken even where all of its rows are. The parameters are continuous in the weights.

    Raises:
        InputError: a batch that is larger than the rows; a warmup longer than the training; tokens to
            normalize by, in data that has none; weights that are not one finite number for each row, visit
            or token; weights of tokens, of a loss that is not told apart by token.

    >>> def loss(p, e):
    ...     return (p["w"] * e["x"] - e["y"]).square()
    >>> data = [{"x": torch.tensor(1.0), "y": torch.tensor(float(i))} for i in range(4)]
    >>> course = Course(loss, data, Training(50, 2, 0.1, "sgd"))
    >>> *_, last = course.steps(course.start({"w": torch.zeros(())}))
    >>> last.state.params["w"].round(decimals=1), int(last.state.taken)
    (tensor(1.5000), 100)
    """

    loss: LossFn
    data: Data
    training: Training
    seed: int = 0
    normalize: Normalize = "rows"
    token_batch_size: int = TOKEN_BATCH_SIZE
    pads: bool = True
    valuing: Valuing | None = None
    recorded: Recorded | None = None
    weights: Float64[Tensor, "*axes"] | None = None

    def __post_init__(self) -> None:
        check_rows(self.data)
        rows, training = len(self.data), self.training
        if training.batch_size > rows:
            raise InputError(
                f"a batch of {training.batch_size} is larger than the data, of {rows} rows: give a "
                f"`batch_size` of at most {rows}"
            )
        if training.warmup > self.total:
            raise InputError(
                f"the warmup of {training.warmup} steps is longer than the training, of {self.total}: give "
                "fewer steps, or more epochs"
            )
        if self.valuing is not None:
            check_values(training, self.valuing.kind)
        if self.normalize not in get_args(Normalize):
            raise InputError(f"no `normalize` {self.normalize!r}: choose {' or '.join(get_args(Normalize))}")
        if self.normalize == "tokens" and not hasattr(self.data, "supervised"):
            raise InputError("the data does not say which tokens are supervised: normalize by rows")
        if self.placed is not None and self.recorded is not None:
            raise InputError("a row of weight 0 leaves no gradient to record: record without `weights`")
        self.losses()

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; the last one takes the rows that are left."""
        return -(-len(self.data) // self.training.batch_size)

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.training.epochs * self.per_epoch

    def start(self, params: Params) -> State:
        """The state before the first step.

        Raises:
            InputError: parameters that cannot be trained, see `check_start`.
        """
        params = check_start(params, self.loss)
        device = next(iter(params.values())).device
        return first_state(params, self.training, torch.tensor(self.total, device=device))

    def batches(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """The epoch and the rows of every step from `first` on: a function of the seed alone."""
        order, size = (-1, np.zeros(0, np.int64)), self.training.batch_size
        for step in range(first, self.total if stop is None else stop):
            epoch, place = divmod(step, self.per_epoch)
            if order[0] != epoch:
                order = epoch, orders(np.ones((1, len(self.data)), bool), [self.seed], epoch)[0]
            yield epoch, order[1][place * size : (place + 1) * size]

    def steps(self, state: State, stop: int | None = None) -> Iterator[Taken]:
        """Take the steps that follow on a state, up to the `stop`-th of all.

        Args:
            state: what `start` gave, or that of a step that was taken. It is emptied, so that no two states
                are in memory.
            stop: the number of steps after which to end; None: all.

        Raises:
            Diverged: a loss or a gradient is not finite; the step is named, and is not taken.
        """
        losses, first = self.losses(fused=True), int(state.taken)
        for number, (epoch, rows) in enumerate(self.batches(first, stop), first):
            weights = self.weights_of(epoch, rows)
            asked = self.valuing is not None and number % self.valuing.every == 0
            told = self.recorded if self.recorded and number >= self.recorded.recorder.number else None
            if told is not None:
                told.begin(state)
            recorder = None if told is None else told.recorder
            seen = recorder.tapped if recorder else self._held(rows) if asked else None
            with self._seen_by(seen):
                grads, made = self.gradient(losses, state.params, rows, weights, recorder)
            loss, (scale, norm) = float(weights.flatten() @ made.flatten()), clip_scale(self.training, grads)
            if not (isfinite(loss) and bool(norm.isfinite())):
                what = f"the loss of step {number + 1} is {loss:g} and the norm of its gradient {norm:g}"
                raise Diverged(f"{what}: give a lower `learning_rate`, or a longer `warmup`")
            values = self._values(losses, state, grads, rows, weights) if asked else None
            for grad in grads.values() if self.training.max_grad_norm is not None else ():
                grad.mul_(scale)
            rate = float(learning_rate(self.training, torch.tensor(number), torch.tensor(self.total)))
            state = self._moved(state, grads)
            if told is not None:
                told.end(state, epoch, float(scale))
            tokens, made = int(self.lengths[rows].sum()), (made if made.ndim == 1 else made.sum(1)).numpy()
            yield Taken(state, rows, epoch, rate, loss, float(norm), float(scale), tokens, made, values)

    def mean_loss(self, params: Params, data: Data) -> float:
        """The loss of all rows of other data, normalized like that of a step.

        >>> course = Course(lambda p, e: p["w"] * e["x"], [{"x": torch.ones(())}], Training(1, 1, 0.1))
        >>> course.mean_loss({"w": torch.tensor(2.0)}, [{"x": torch.tensor(3.0)}, {"x": torch.tensor(4.0)}])
        7.0
        """
        rows = np.arange(len(data))
        return float(row_weights(self.loss, data, rows, self.normalize) @ self.row_losses(params, data))

    def row_losses(self, params: Params, data: Data) -> Float64[Tensor, " rows"]:
        """The loss of every row of some data."""
        losses, rows = losses_of(self.loss, fused=True), np.arange(len(data))
        found = torch.zeros(len(data), dtype=torch.float64)
        with torch.no_grad():
            for places, batch in self.parts(rows, _device(params), data):
                found[places] = losses(params, batch).double().cpu()
        return found

    def shares(self, rows: np.ndarray) -> Float64[Tensor, " batch"]:
        """What a step multiplies the losses of its rows by, beside their weights; see `row_weights`."""
        return row_weights(self.loss, self.data, rows, self.normalize)

    def weights_of(self, epoch: int, rows: np.ndarray) -> Float64[Tensor, "batch *tokens"]:
        """What a step multiplies the losses of rows, or the parts of tokens, by: `shares` times weights."""
        shares = self.shares(rows)
        if self.placed is None:
            return shares
        own = self.placed[epoch if len(self.placed) > 1 else 0].cpu()[rows]
        return shares[:, None] * own[:, : self.lengths[rows].max()] if self.by_token else shares * own[:, 0]

    @cached_property
    def placed(self) -> Float64[Tensor, "visits rows tokens"] | None:
        """The weights on three axes; see `placed_weights`."""
        if self.weights is None:
            return None
        longest = int(self.lengths.max())
        return placed_weights(self.weights, self.training.epochs, len(self.data), longest)

    @property
    def by_token(self) -> bool:
        """Whether tokens have weights."""
        return self.placed is not None and self.placed.shape[2] > 1

    def losses(self, *, fused: bool = False) -> Losses:
        """The losses of a batch, see `losses_of`: by token where these have weights."""
        return losses_of(self.loss, fused=fused, tokens=self.by_token)

    @property
    def weights_digest(self) -> str | None:
        """16 hex digits of the weights; None where all are 1."""
        if self.weights is None:
            return None
        shape = str(self.placed.shape) if self.by_token and self.placed is not None else ""
        return sha256(self.weights.cpu().numpy().tobytes() + shape.encode()).hexdigest()[:16]

    def parts(
        self, rows: np.ndarray, device: torch.device, data: Data | None = None, times: int = 1
    ) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """The micro-batches of some rows: `(their places among them, {key: [places, ...]})`.

        Args:
            rows: their numbers.
            device: where the batches go.
            data: whose rows they are; None: the course's own.
            times: how often each row is in memory.
        """
        data = self.data if data is None else data
        for places in self._plan(data, rows, times):
            yield places, _batch(data, rows[places], device)

    def _moved(self, state: State, grads: Params) -> State:
        """The state after a step: `update`, one parameter at a time, which empties the old state."""
        training, parts = replace(self.training, max_grad_norm=None), (state.params, *state.moments)
        made: list[Params] = [{} for _ in parts]
        new = state
        for name in [*state.params]:
            params, *moments = ({name: part.pop(name)} for part in parts)
            new = update(training, State(params, tuple(moments), state.taken, state.total),
                         {name: grads.pop(name)})  # fmt: skip
            for part, own in zip(made, (new.params, *new.moments), strict=True):
                part.update(own)
        return State(made[0], tuple(made[1:]), new.taken, new.total)

    def gradient(
        self,
        losses: Losses,
        params: Params,
        rows: np.ndarray,
        weights: Tensor,
        recorder: Recorder | None = None,
    ) -> tuple[Params, Tensor]:
        """The gradient of a step's loss, summed over micro-batches, and the losses of its rows.

        Args:
            losses: of a batch, see `losses_of`.
            params: before the step.
            rows: of the step.
            weights: what their losses are multiplied by, or the parts of their tokens; see `weights_of`.
            recorder: which is told the losses.
        """
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        found = self._backward(losses, leaves, self.data, rows, weights, recorder)
        return _grads(leaves), found.cpu()

    def _backward(
        self,
        losses: Losses,
        params: Params,
        data: Data,
        rows: np.ndarray,
        weights: Tensor,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """The losses of some rows, and a backward pass of their weighted sum for each micro-batch."""
        device = _device(params)
        found = torch.zeros(weights.shape, dtype=torch.float64, device=device)
        for places, batch in self.parts(rows, device, data):
            with torch.enable_grad():
                made = losses(params, batch)
                if recorder is not None:
                    made = recorder.loss(made, rows[places])
                (made * _like(made, weights[places]).to(made)).sum().backward()
            if recorder is not None:
                recorder.substep()
            _like(made, found)[torch.from_numpy(places).to(device)] = made.detach().double()
        return found

    def _values(
        self, losses: Losses, state: State, grads: Params, rows: np.ndarray, weights: Tensor
    ) -> np.ndarray:
        """What each row does to each validation loss, `-w_i <u, g_i>`, for some of the losses at a time."""
        assert self.valuing is not None
        count, probes = len(self.valuing.data), self.valuing.probes
        size = sum(p.numel() * p.element_size() for p in state.params.values())
        values = torch.zeros(len(rows), count, dtype=torch.float64)
        for part in torch.arange(count).split(max(1, DIRECTIONS_BYTES // size)):
            with self._seen_by(None):
                slopes = self._slopes(state.params, part.numpy())
            u = step_direction(self.training, state, grads, slopes, kind=self.valuing.kind)
            del slopes
            if probes is None:
                values[:, part] = -self._forward(state.params, u, rows, weights)
                continue
            order = torch.from_numpy(np.concatenate(self._plan(self.data, rows)))
            if self._held(rows) is not None:
                along = probes.dots(u, keep=True)
            else:  # the factors of many micro-batches would take their memory, so they are made again
                probes.aim(u)
                with self._seen_by(probes):
                    self._backward(losses, state.params, self.data, rows, weights)
                along = probes.dots()
            values[order[:, None], part] = -along.double().cpu()
        if probes is not None:
            probes.aim(None)
        return values.numpy()

    def _held(self, rows: np.ndarray) -> Values | None:
        """The probes that keep the factors of a step's own backward pass, if it is one, and not recorded."""
        alone = self.recorded is None and len(self._plan(self.data, rows)) == 1
        return self.valuing.probes if alone and self.valuing is not None else None

    @contextmanager
    def _seen_by(self, seen: Tapped | None) -> Iterator[None]:
        """Have the probes of one tap see the forward passes inside, and those of the others not."""
        taps = [self.recorded and self.recorded.recorder.tapped, self.valuing and self.valuing.probes]
        with ExitStack() as stack:
            for tap in sorted(filter(None, taps), key=lambda tap: tap is seen):
                stack.enter_context(tap.seeing(tap is seen))
            yield

    def _slopes(self, params: Params, queries: np.ndarray) -> Params:
        """The gradients of validation losses, `{name: [queries, *parameter]}`."""
        assert self.valuing is not None
        asked, made = losses_of(self.valuing.loss, fused=True), list[Params]()
        for query in queries:
            leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
            self._backward(asked, leaves, self.valuing.data, np.array([query]), torch.ones(1).double())
            made.append(_grads(leaves))
        return {name: torch.stack([one[name] for one in made]) for name in params}

    def _forward(self, params: Params, u: Params, rows: np.ndarray, weights: Tensor) -> Tensor:
        """`w_i <u_q, g_i>` of every row with every direction, `[rows, queries]`, by forward mode."""
        losses, count = self.losses(), len(next(iter(u.values())))
        along = torch.zeros(len(rows), count, dtype=torch.float64)
        for places, batch in self.parts(rows, _device(params)):
            for query in range(count):
                own = {name: d[query] for name, d in u.items()}
                with self._seen_by(None), forward_mode():
                    made = torch.func.jvp(lambda p, batch=batch: losses(p, batch), (params,), (own,))[1]
                made = made.double().cpu()
                made = made * _like(made, weights[places])
                along[places, query] = made.reshape(len(places), -1).sum(1)
        return along

    def _plan(self, data: Data, rows: np.ndarray, times: int = 1) -> list[np.ndarray]:
        """The micro-batches of some rows, as places among them."""
        lengths = lengths_of(data)[rows] if data is not self.data else self.lengths[rows]
        budget = max(1, self.token_batch_size // times)
        if self.pads:
            return plan_batches(lengths, budget)
        shapes = [shapes_of(labelled(data, int(row))) for row in rows]
        return plan_equal(shapes, lengths, budget)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of every row."""
        return lengths_of(self.data)


def _grads(leaves: Params) -> Params:
    """The gradients that backward passes gave."""
    return {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}


def slope_of(losses: Losses, data: Data, row: int, params: Params) -> Params:
    """The gradient of the loss of one row.

    >>> losses = losses_of(lambda p, e: p["w"] * e["x"])
    >>> slope_of(losses, [{"x": torch.tensor(3.0)}], 0, {"w": torch.ones(())})
    {'w': tensor(3.)}
    """
    batch = _batch(data, np.array([row]), _device(params))
    return torch.func.grad(lambda params: losses(params, batch).sum())(params)


def _like(made: Tensor, given: Tensor) -> Tensor:
    """Numbers of rows, or of as many of their tokens as there are in a batch: a view."""
    return given[:, : made.shape[1]] if made.ndim == 2 else given


def _device(params: Params) -> torch.device:
    return next(iter(params.values())).device


def _batch(data: Data, rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """Rows, padded to one length, on the device."""
    made = collate([labelled(data, int(row)) for row in rows])
    return {key: value.to(device) for key, value in made.items()}
