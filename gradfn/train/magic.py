"""Metagradients: the exact derivative of query losses at the end of a training in the weights of its rows.

The training is gone through forward, and then back, one step at a time; see `gradfn.train.pull` for a step.

Source: MAGIC, arXiv:2504.16430, section 3; REPLAY, arXiv:2503.13751, section 3.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

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
from gradfn.train.kept import Kept, Way, key_of
from gradfn.train.optimizers import State
from gradfn.train.pull import Adjoint, Per, along_of, pull
from gradfn.train.replay import Curvature, Replay, copied, schedule
from gradfn.train.stacked import check_repeatable
from gradfn.train.step import losses_of
from gradfn.types import Batch, Data, LossFn, Params, Rows
from gradfn.watch import WATCH, Resumed


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
        replay: which states are kept, and how many queries go together; None: as many as fit. Its
            `curvature` may be the Gauss-Newton matrix, and then the derivative is not exact.
        progress: called with the number of steps that were gone back through, one query chunk after another.

    Returns:
        `Metagradient`, with values, the end of the training, and the derivative in its start.

    Raises:
        InputError: a model that cannot be trained, is random, or multiplies rounded numbers; no queries; a
            loss that cannot be split for the Gauss-Newton matrix; a window that is not of the training; a
            replay that comes to other states than before.
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
    state, replay, query_loss = course.start(start), replay or Replay(), query_loss or course.loss
    check_rows(queries)
    if not len(queries):
        raise InputError("there are no queries: give one or more")
    if per not in get_args(Per):
        raise InputError(f"no `per` {per!r}: choose {', '.join(get_args(Per))}")
    if course.by_token and per != "token":
        raise InputError(
            "the tokens of the course have weights, so derivatives are in these: give per='token'"
        )
    window = _window(course, window)
    _check(course, state.params)
    along_of(course.loss, per, replay.curvature)
    asked = (per, *window, replay.curvature)
    key = "" if replay.resume is None else key_of(course, state, queries, query_loss, asked)
    kept = Kept(replay.resume, key)
    chunk = kept.chunk() or replay.queries_for(state, len(queries))
    asked = [range(first, min(first + chunk, len(queries))) for first in range(0, len(queries), chunk)]
    steps = len(asked) * (course.total - window[0])
    # Without the context, convolutions on CUDA would round to TF32.
    with (
        multiplying("ieee", next(iter(state.params.values())).device),
        WATCH.get()("steps back", steps, "steps") as told,
    ):
        job = _Job(course, state, query_loss, queries, per, window, replay, kept, (told, progress))
        ways = [_sweep(job, own) for own in asked]
    return Metagradient(
        torch.cat([way.values if per == "visit" else way.values[0] for way in ways], -1),
        {name: torch.cat([way.adjoint.params[name] for way in ways]) for name in state.params},
        ways[0].end,
        sum(way.steps for way in ways),
    )


# --- through the whole training


@dataclass(eq=False)
class _Job:
    """What going through a training and back needs, and what is known of it since the first time."""

    course: Course
    start: State
    query_loss: LossFn
    queries: Data
    per: Per
    window: tuple[int, int]
    replay: Replay
    kept: Kept
    told: tuple[Callable[[int], None] | None, ...]
    seen: dict[int, list[int]] = field(default_factory=dict)
    steps: int = 0

    def tell(self, done: int) -> None:
        """Say how many steps were gone back through."""
        for told in filter(None, self.told):
            told(done)

    def at(self, step: int) -> State:
        """The state before a step, from the nearest one that is known."""
        known = max((number for number in self.replay.states if 0 < number <= step), default=0)
        state = self.replay.states[known]() if known else copied(self.start)
        self.meet(state)
        return self.forward(state, step)

    def forward(self, state: State, stop: int) -> State:
        """The state after so many steps of all."""
        for taken in self.course.steps(copied(state), stop):
            state, self.steps = taken.state, self.steps + 1
            self.meet(state)
        return state

    def meet(self, state: State) -> None:
        """Refuse a state that was met before, if it is not the same to the bit."""
        number, bits = int(state.taken), _bits(state)
        if self.seen.setdefault(number, bits) != bits:
            raise InputError(
                f"step {number} came to another state than before, but a replay must repeat the training to "
                "the bit: use the checkpoints as they were written, the device, threads and libraries of the "
                "first time, torch.use_deterministic_algorithms(True), and a loss that is not random"
            )


def _sweep(job: _Job, asked: range) -> Way:
    """Through the training and back, for some of the queries."""
    course, first = job.course, job.window[0]
    before, device = job.steps, next(iter(job.start.params.values())).device
    way = job.kept.read(asked, device)
    if way is None:
        way = Way(course.total, _zeros(job, len(asked)), seen=job.seen)
        if course.total in job.replay.states:
            job.meet(job.replay.states[course.total]())
    else:
        job.seen.update(way.seen)
        job.tell(Resumed(course.total - way.step))
    way.seen, before = job.seen, before - way.steps
    mapped = len(asked) > 1 and _maps(course, job.start.params, job.per, job.replay.curvature)
    for begin in [*sorted((n for n in job.replay.states if first < n < way.step), reverse=True), first]:
        if begin < way.step:
            for _ in _back(job, way, begin, asked, mapped):
                way.steps = job.steps - before
                job.kept.write(asked, way)
    job.kept.write(asked, way, now=True)
    return way


def _back(job: _Job, way: Way, begin: int, asked: range, mapped: bool) -> Iterator[None]:
    """Back through the steps from `begin` on that are left; yields after each of them."""
    course, until, state = job.course, way.step, job.at(begin)
    with job.replay.slots_like(state, until - begin) as slots:
        for action in schedule(until - begin, job.replay.slots_for(state, until - begin)):
            step = begin + action.step
            if action.kind == "save":
                slots.put(action.slot, state)
            elif action.kind == "restore":
                state = slots.take(action.slot)
            elif action.kind == "advance":
                state = job.forward(state, step)
            else:
                if step == until - 1:
                    end = job.forward(state, until)
                    if way.adjoint is None:
                        way.end, way.adjoint = end, _adjoint_of_end(job, end, asked)
                ((epoch, rows),) = course.batches(step, step + 1)
                way.adjoint, made = pull(course, state, epoch, rows, way.adjoint, per=job.per, mapped=mapped,
                                         curvature=job.replay.curvature)  # fmt: skip
                _check_finite(way.adjoint, step)
                if step < job.window[1]:
                    _subtract(job, way.values, epoch, rows, made)
                way.step = step
                job.tell(1)
                yield


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
    nothing = [{name: v.new_zeros((len(asked), *v.shape)) for name, v in m.items()} for m in end.moments]
    return Adjoint(params, tuple(nothing))


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


def _maps(course: Course, params: Params, per: Per, curvature: Curvature) -> bool:
    """Whether the model's code can be mapped over queries."""
    u = {name: torch.zeros_like(value).expand(2, *value.shape) for name, value in params.items()}
    batch = _first_rows(course, next(iter(params.values())).device)
    losses = losses_of(course.loss, tokens=per == "token")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operation that cannot be mapped is looped over with a warning
        try:
            along_of(course.loss, per, curvature)(
                params, batch, torch.ones_like(losses(params, batch)), u, True
            )
        except (RuntimeError, UserWarning, InputError):
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
        """The training, the window, and a curvature that is not the exact one."""
        course = self.course
        how = {"normalize": course.normalize, "seed": course.seed, "weights": course.weights_digest}
        other = {} if self.replay.curvature == "hessian" else {"curvature": self.replay.curvature}
        return {"magic": {**course.training.settings(), **how, "window": list(self.window), **other}}

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
