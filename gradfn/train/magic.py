"""Metagradients: the exact derivative of query losses at the end of a training in the weights of its rows.

Step t has the gradient `g_t = sum_i w_i c_i grad l_i(theta_t)`. Its adjoint takes the derivatives of a query
loss in the state behind the step to those in the state before it, and to those in the weights:

    u           = (d state_{t+1} / d g_t)ᵀ lam         optimizer, schedule, decay and clipping included
    dL / dw_i  += c_i <u, grad l_i>
    lam_theta   = (d state_{t+1} / d theta_t)ᵀ lam + H u,    H = sum_i w_i c_i Hess l_i

One vjp of `(theta, w) -> g` along u gives all `<u, grad l_i>` and H u, so no gradient of one row is made, and
no graph of a step is kept.

Source: MAGIC, arXiv:2504.16430, section 3; REPLAY, arXiv:2503.13751, section 3.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradfn.data import check_rows, offsets_of
from gradfn.engine.precision import multiplying
from gradfn.engine.stream import Progress
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping
from gradfn.methods.attribution import Queries, Scorer
from gradfn.model.params import params_of
from gradfn.model.sites import View
from gradfn.subject import Subject
from gradfn.train.course import Course, Diverged, slope_of
from gradfn.train.optimizers import State, clipped, update
from gradfn.train.replay import Replay, copied, schedule
from gradfn.train.spec import Training
from gradfn.train.stacked import check_repeatable
from gradfn.train.step import Losses, losses_of
from gradfn.types import Batch, Data, LossFn, Params, Rows

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


class Metagradient(NamedTuple):
    """What a training owes to its rows.

    Args:
        values: minus the derivative of each query's loss in each weight, in units of that loss, `[rows,
            queries]`; per visit `[epochs, rows, queries]`; per token `[tokens, queries]`, the tokens of one
            row after those of another. Positive: a proponent, with more weight on it the loss is lower.
            Without the rows R the loss is about `sum_R values` higher.
        start: the derivative of each query's loss in the parameters that the window begins with,
            `{name: [queries, *parameter]}`.
        end: the state after the training.
        steps: the steps that were taken forward.
    """

    values: Float64[Tensor, "*axes queries"]
    start: Params
    end: State
    steps: int


def metagradient(
    course: Course,
    start: Params,
    queries: Data,
    query_loss: LossFn | None = None,
    *,
    per: Per = "row",
    window: tuple[int, int | None] = (0, None),
    replay: Replay | None = None,
    progress: Callable[[int], None] | None = None,
) -> Metagradient:
    """The exact derivative of query losses at the end of a training in the weights of its rows.

    `values_i = -d/dw_i L(theta_T)` at the weights of the course, 1 unless it has others. A weight changes
    neither batches, nor denominators, nor the schedule.

    Args:
        course: the training. It is run anew, by the same pure steps.
        start: the parameters before it.
        queries: examples, each a query.
        query_loss: of such an example; None: the loss of the course.
        per: "row", "visit" (a row in one epoch), or "token" (a token's part of the loss of its row, which a
            language model's loss has; it is the token that is predicted).
        window: steps whose weights count, `(first, behind the last)`; None: to the end. A training that is
            not smooth may have derivatives that say nothing of its first steps.
        replay: which states are kept, and how many queries go together; None: as many as fit.
        progress: called with the number of steps that were gone back through, one query chunk after another.

    Returns:
        `Metagradient`, with values, the end of the training, and the derivative in its start.

    Raises:
        InputError: a model that cannot be trained, is random, or multiplies rounded numbers; no queries; a
            window that is not of the training; a replay that comes to other states than before.
        Diverged: a number is not finite; the step and the parameter are named.

    >>> from gradfn.train import Training
    >>> def loss(p, e):
    ...     return (p["w"] - e["y"]).square() / 2
    >>> data = [{"y": torch.tensor(float(y))} for y in (1, 3)]
    >>> course = Course(loss, data, Training(1, 2, 0.5, "sgd"))
    >>> made = metagradient(course, {"w": torch.zeros(())}, [{"y": torch.tensor(2.0)}])
    >>> made.end.params["w"], made.values.T  # w = 1: each row moved it by 1/4 of its own y, towards 2
    (tensor(1.), tensor([[0.2500, 0.7500]], dtype=torch.float64))
    """
    course = replace(course, valuing=None, recorded=None)  # steps that are taken again are seen by nobody
    state, replay = course.start(start), replay or Replay()
    check_rows(queries)
    job = _Job(course, query_loss or course.loss, queries, per, _window(course, window), replay, progress)
    if not len(queries):
        raise InputError("there are no queries: give one or more")
    if per not in get_args(Per):
        raise InputError(f"no `per` {per!r}: choose {', '.join(get_args(Per))}")
    _check(course, state.params)
    chunk = replay.queries_for(state, len(queries))
    # Without the context, convolutions on CUDA would round to TF32.
    with multiplying("ieee", next(iter(state.params.values())).device):
        parts = [
            _sweep(job, copied(state), range(first, min(first + chunk, len(queries))))
            for first in range(0, len(queries), chunk)
        ]
    return Metagradient(
        torch.cat([part.values for part in parts], -1),
        {name: torch.cat([part.start[name] for part in parts]) for name in state.params},
        parts[0].end,
        sum(part.steps for part in parts),
    )


def pull(
    course: Course,
    state: State,
    epoch: int,
    rows: Int64[np.ndarray, " batch"],
    adjoint: Adjoint,
    *,
    per: Per = "row",
    mapped: bool = True,
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

    Returns:
        The adjoint of the state before the step, and the derivatives of the query losses in the weights.
    """
    shares, device = course.shares(rows), next(iter(state.params.values())).device
    weights = shares * course.weights_of(epoch, rows)
    grads, _ = course.gradient(losses_of(course.loss, fused=True), state.params, rows, weights)
    before, u = pull_update(course.training, state, grads, adjoint)
    params, queries = before.params, len(next(iter(u.values())))
    longest = (int(course.lengths[rows].max()),) if per == "token" else ()
    found = torch.zeros(len(rows), *longest, queries, dtype=torch.float64)
    losses = losses_of(course.loss, tokens=per == "token")
    for places, batch in course.parts(rows, device, times=queries if mapped else 1):
        own = weights[places].to(device)
        if per == "token":
            own = own[:, None].expand(batch["input_ids"].shape)
        curved, along = _along(losses, state.params, batch, own, u, mapped)
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


def _along(
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


# --- through the whole training


@dataclass(eq=False)
class _Job:
    """What going through a training and back needs, and what is known of it since the first time."""

    course: Course
    query_loss: LossFn
    queries: Data
    per: Per
    window: tuple[int, int]
    replay: Replay
    progress: Callable[[int], None] | None
    seen: dict[int, list[int]] = field(default_factory=dict)
    steps: int = 0

    def forward(self, state: State, stop: int) -> State:
        """The state after so many steps of all; a state that was met before must be the same to the bit."""
        for taken in self.course.steps(copied(state), stop):
            state, self.steps = taken.state, self.steps + 1
            number, bits = int(state.taken), _bits(state)
            if self.seen.setdefault(number, bits) != bits:
                raise InputError(
                    f"step {number} came to another state than before, but a replay must repeat the training "
                    "to the bit: use torch.use_deterministic_algorithms(True), and a loss that is not random"
                )
        return state


def _sweep(job: _Job, state: State, asked: range) -> Metagradient:
    """Through the training and back, for some of the queries."""
    course, (first, stop) = job.course, job.window
    before, state = job.steps, job.forward(state, first)
    values, adjoint, end = _zeros(job, len(asked)), None, state
    mapped = len(asked) > 1 and _maps(course, state.params, job.per)
    with job.replay.slots_like(state) as slots:
        for action in schedule(course.total - first, job.replay.slots_for(state, course.total - first)):
            step = first + action.step
            if action.kind == "save":
                slots.put(action.slot, state)
            elif action.kind == "restore":
                state = slots.take(action.slot)
            elif action.kind == "advance":
                state = job.forward(state, step)
            else:
                if adjoint is None:
                    end = job.forward(state, course.total)
                    adjoint = _adjoint_of_end(job, end, asked)
                ((epoch, rows),) = course.batches(step, step + 1)
                adjoint, made = pull(course, state, epoch, rows, adjoint, per=job.per, mapped=mapped)
                _check_finite(adjoint, step)
                if step < stop:
                    _subtract(job, values, epoch, rows, made)
                if job.progress is not None:
                    job.progress(1)
    assert adjoint is not None
    shaped = values if job.per == "visit" else values[0]
    return Metagradient(shaped, adjoint.params, end, job.steps - before)


def _adjoint_of_end(job: _Job, end: State, asked: range) -> Adjoint:
    """The gradients of query losses behind the last step."""
    for name, value in (job.replay.end or {}).items():
        if name not in end.params or not torch.equal(end.params[name], value.to(end.params[name].device)):
            raise InputError(
                f"the training does not end with the {name} that was given: give the course and the start of "
                "the model that is asked about, on the same device and with the same libraries"
            )
    losses = losses_of(job.query_loss)
    slopes = [slope_of(losses, job.queries, query, end.params) for query in asked]
    params = {name: torch.stack([slope[name] for slope in slopes]) for name in end.params}
    nothing = {name: torch.zeros_like(value) for name, value in params.items()}
    return Adjoint(params, tuple(nothing for _ in end.moments))


def _zeros(job: _Job, queries: int) -> Tensor:
    """No values yet: `[epochs, rows, queries]`, with one epoch for all where visits are not told apart."""
    course = job.course
    rows = int(course.lengths.sum()) if job.per == "token" else len(course.data)
    return torch.zeros(
        course.training.epochs if job.per == "visit" else 1, rows, queries, dtype=torch.float64
    )


def _subtract(job: _Job, values: Tensor, epoch: int, rows: np.ndarray, made: Tensor) -> None:
    """Take the derivatives of a step off the values, which are minus their sum."""
    if job.per != "token":
        values[epoch if job.per == "visit" else 0, rows] -= made
        return
    offsets = offsets_of(job.course.lengths)
    for row, own in zip(rows, made, strict=True):
        values[0, offsets[row] : offsets[row + 1]] -= own[: job.course.lengths[row]]


def _window(course: Course, window: tuple[int, int | None]) -> tuple[int, int]:
    first, stop = window[0], course.total if window[1] is None else window[1]
    if not 0 <= first < stop <= course.total:
        raise InputError(
            f"the `window` {window} is none of a training of {course.total} steps: give its first step, from "
            "0, and the one behind its last"
        )
    return first, stop


def _check(course: Course, params: Params) -> None:
    """Refuse what a replay cannot repeat, or what has no derivative that means anything."""
    device = next(iter(params.values())).device
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    if (products := backend.matmul.fp32_precision) in ("tf32", "bf16"):
        raise InputError(
            f"products of float32 are rounded to {products}, in which metagradients drown: call "
            'torch.set_float32_matmul_precision("highest")'
        )
    with torch.no_grad():
        check_repeatable(losses_of(course.loss, fused=True), params, _first_rows(course, device))


def _first_rows(course: Course, device: torch.device) -> Batch:
    _, batch = next(course.parts(next(course.batches())[1][:2], device))
    return batch


def _maps(course: Course, params: Params, per: Per) -> bool:
    """Whether the model's code can be mapped over queries."""
    u = {name: torch.zeros_like(value).expand(2, *value.shape) for name, value in params.items()}
    batch = _first_rows(course, next(iter(params.values())).device)
    losses = losses_of(course.loss, tokens=per == "token")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operation that cannot be mapped is looped over with a warning
        try:
            _along(losses, params, batch, torch.ones_like(losses(params, batch)), u, True)
        except (RuntimeError, UserWarning):
            return False
    return True


def _check_finite(adjoint: Adjoint, step: int) -> None:
    if bool(torch.stack([value.isfinite().all() for value in adjoint.params.values()]).all()):
        return
    name = next(name for name, value in adjoint.params.items() if not bool(value.isfinite().all()))
    raise Diverged(
        f"the derivative of a query's loss in the parameter {name} before step {step + 1} is not finite: "
        "give a lower `learning_rate`, a larger `eps`, or a `window` of later steps"
    )


def _bits(state: State) -> list[int]:
    """The sum of the bits of every tensor, as whole numbers: another state has other ones."""
    tensors = [value for part in (state.params, *state.moments) for value in part.values()]
    kinds = {4: torch.int32, 8: torch.int64}
    return torch.stack([value.view(kinds[value.element_size()]).sum() for value in tensors]).tolist()


# --- as an attribution


@dataclass(frozen=True, eq=False)
class Magic:
    """Metagradients as an attribution, for `gf.score` and whatever else takes one.

    The subject's model is the end of the training, which is checked to the bit; the rows are those of the
    course. All parameters that are trained count. A view may tell tokens apart, and nothing else.

    Args:
        course: the training.
        start: the parameters before it.
        window: steps whose weights count, see `metagradient`.
        replay: see `metagradient`.

    >>> import gradfn as gf
    >>> from gradfn.train import Training
    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> def loss(params, e):
    ...     return (torch.func.functional_call(net, params, e["x"]) - e["y"]).square().sum() / 2
    >>> data = [{"x": torch.ones(1), "y": torch.full((1,), float(y))} for y in (1, 3)]
    >>> course, start = Course(loss, data, Training(1, 2, 0.5, "sgd")), {"weight": torch.zeros(1, 1)}
    >>> *_, last = course.steps(course.start(start))
    >>> _ = net.load_state_dict(last.state.params)
    >>> gf.score(net, data, [{"x": torch.ones(1), "y": torch.full((1,), 2.0)}], method=Magic(course, start),
    ...          loss=loss).matrix.T
    tensor([[0.2500, 0.7500]])
    """

    course: Course
    start: Params
    window: tuple[int, int | None] = (0, None)
    replay: Replay = field(default_factory=Replay)

    @property
    def damping(self) -> tuple[Damping | None, ...]:
        """Nothing is damped."""
        return (None,)

    def settings(self) -> dict[str, Any]:
        """The training, and the window."""
        course = self.course
        how = {"normalize": course.normalize, "seed": course.seed, "weights": course.weights_digest}
        return {"magic": {**course.training.settings(), **how, "window": list(self.window)}}

    def scorer(self, subject: Subject, query: Queries, *, by_block: bool = False) -> Scorer:
        """See `Attribution`; gradients of queries will not do, for they are of one state of the model.

        Raises:
            InputError: no examples as queries; scores by block; a view of some of the weights.
        """
        if query is None or isinstance(query, dict):
            raise InputError("metagradients need the queries themselves: give examples")
        if by_block or subject.view != View(tokens=subject.view.tokens):
            raise InputError("metagradients are of all weights together: give no view but one of tokens")
        known = params_of(subject.model)
        if absent := self.start.keys() - known.keys():
            raise InputError(f"the model has no {min(absent)}, which is trained: give the trained model")
        replay = replace(self.replay, end={name: known[name] for name in self.start})

        def score(train: Data, rows: range | None = None, *, progress: Progress | None = None) -> Rows:
            _check_same(train, self.course.data)
            made = metagradient(
                self.course, self.start, query, subject.query_loss,
                per="token" if subject.view.tokens else "row", window=self.window, replay=replay,
            )  # fmt: skip
            if progress is not None:
                progress(int(self.course.lengths.sum()))
            values, losses = made.values, self.course.row_losses(made.end.params, train)
            if rows is not None:
                bounds = offsets_of(self.course.lengths) if subject.view.tokens else range(len(train) + 1)
                values = values[bounds[rows.start] : bounds[rows.stop]]
                losses = losses[rows.start : rows.stop]
            return Rows(values.float(), losses.float())

        return score


def _check_same(train: Data, data: Data) -> None:
    """Refuse rows that are not those of the training."""
    prints = [getattr(rows, "fingerprint", None) for rows in (train, data)]
    same = prints[0] is not None and prints[1] is not None and prints[0]() == prints[1]()
    if train is not data and not same:
        raise InputError("the rows are not those of the training: give the `data` of the course itself")
