"""`gradfn score --method source`: back through the checkpoints of a training, a segment at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gradfn.cli.attribution import Job, Weighted, over_time, show_joined
from gradfn.cli.commands import ScoreRequest
from gradfn.cli.inputs import Loaded, at_checkpoint, recorded
from gradfn.cli.options import MethodOptions
from gradfn.errors import InputError
from gradfn.hf.optimizer_state import load_optimizer_state
from gradfn.methods.dynamics import Dynamics
from gradfn.methods.grad_dot import grad_dot
from gradfn.methods.source import Checkpoint, Segment, cut, fit_curvature, shares_of
from gradfn.model.fingerprint import model_fingerprint
from gradfn.report.progress import rows_bar
from gradfn.report.rankings import ShownQueries
from gradfn.report.rows import Ranked
from gradfn.runs.curvatures import load_curvature, write_curvature
from gradfn.runs.output import Output
from gradfn.runs.provenance import describe
from gradfn.runs.scores import read_part
from gradfn.statistics import Curvature
from gradfn.store.guard import refuse_links
from gradfn.subject import Subject
from gradfn.train.optimizers import dynamics_of
from gradfn.train.spec import Training
from gradfn.transforms import Transform
from gradfn.transforms.precondition import digest_of
from gradfn.types import Blocks, Rows

SOURCE = "source"
SEGMENTS = 3
OPTIONS = ("segments", "optimizer", "normalize")
"""Those of a training that source goes through."""
WHOLE = ("projection", "projection_dim", "optimizer_state", "unit_normalize", "hessian_path", "shard",
         "reward_column", "advantage_column")  # fmt: skip


def of_training(
    method: MethodOptions,
    checkpoints: Sequence[str],
    rates: Sequence[float],
    training: Training,
    *,
    segments: int | None = None,
    normalize: Any = "rows",
) -> MethodOptions:
    """The options of source that a training answers.

    Args:
        method: what was asked for.
        checkpoints: paths, in the order of the training, none of them before the first step.
        rates: of each checkpoint, the sum of the learning rates of the steps that it stands for, those behind
            the one before it, say; of steps whose gradient was clipped, times the factor.
        training: the optimizer, with its schedule.
        segments: how many; None: those of `method`.
        normalize: what a step took the mean over.
    """
    return replace(
        method, name=SOURCE, checkpoints=tuple(checkpoints), checkpoint_weights=tuple(rates),
        segments=segments or method.segments, optimizer=dynamics_of(training), normalize=normalize,
    )  # fmt: skip


def check_source(request: ScoreRequest, name: str) -> None:
    """Refuse, before anything is loaded, what source cannot go through, and its options elsewhere."""
    method = request.method
    if name != SOURCE:
        if given := request.gave(*OPTIONS):
            raise InputError(f"{given} is of --method {SOURCE}, not of {name}: leave it out")
        return
    if request.gave("damping"):
        raise InputError(
            "source takes no inverse, and the length of the training bounds what small eigenvalues do: leave "
            "out --damping"
        )
    if given := request.gave(*WHOLE):
        raise InputError(f"source takes whole gradients of all rows as they are: leave out {given}")
    if request.gave("query_path"):
        raise InputError("source follows the queries themselves back from the end: give them with --query")
    if not method.checkpoints or method.checkpoint_weights is None:
        raise InputError(
            "source goes through a training: give its --checkpoints, and as --checkpoint-weights the sum of "
            "the learning rates of the steps that each stands for"
        )
    if not min(method.checkpoint_weights) > 0:
        raise InputError(
            "--checkpoint-weights of source are sums of learning rates: give numbers above 0, and no "
            "checkpoint that no step leads to"
        )
    _check_order(method.checkpoints)
    cut(method.checkpoints, _count(method))


def _check_order(checkpoints: Sequence[str]) -> None:
    """Refuse checkpoints twice, and those of one name whose numbers fall."""
    if len({*map(str, map(Path.resolve, map(Path, checkpoints)))}) < len(checkpoints):
        raise InputError("source goes through each checkpoint once: give none of the --checkpoints twice")
    stems = [path.rstrip("0123456789") for path in checkpoints]
    numbers = [path[len(stem) :] for path, stem in zip(checkpoints, stems, strict=True)]
    for one, other in pairwise(range(len(stems))):
        alike = stems[one] == stems[other] and numbers[one] and numbers[other]
        if alike and int(numbers[one]) > int(numbers[other]):
            raise InputError(
                f"{checkpoints[other]} comes after {checkpoints[one]}: give --checkpoints in the order of "
                "the training"
            )


@dataclass(frozen=True, eq=False)
class _Stop:
    """A checkpoint: its number from 1, a function that loads it, and the steps that it stands for."""

    number: int
    load: Callable[[], Loaded]
    point: Checkpoint


def score_source(job: Job, loaded: Loaded, weighted: Weighted) -> tuple[ShownQueries, Ranked | None]:
    """Score the rows at every checkpoint against queries that went back to it, and join the scores."""
    plain = replace(job.recipe, method=lambda problem: grad_dot(), curvature=False)
    job, method = replace(job, recipe=plain), job.request.method
    dynamics = replace(method.optimizer or Dynamics(), normalize=method.normalize)
    stops = _stops(job, loaded, weighted, dynamics)
    end = job.prepare(loaded, None)
    adjoint: Callable[[], list[Blocks]] = cache(lambda: dynamics.begin(end.queries.gradients))
    made, resumed, way = dict[int, Rows](), 0, [describe(loaded.subject, job.train, None).to_json()["model"]]
    for number, own in reversed([*enumerate(cut(stops, _count(method)), 1)]):
        segment = _segment(job, number, own, dynamics)
        way = [*way, {"curvature": digest_of(segment.curvature), "rate": segment.rate}]
        passed = cache(partial(_back, segment, dynamics, adjoint))
        for stop in own:
            known = {"source": {**dynamics.settings(), "way": way}}
            rows, there = _score(job, stop, passed, known)
            made[stop.number] = Rows(rows.values * (stop.point.rate / segment.rate), rows.losses)
            resumed += there
        adjoint = cache(partial(_before, passed))
    shares = shares_of(loaded.subject, job.train, dynamics)[:, None].float()
    results = [made[stop.number] for stop in stops]
    parts = over_time(weighted, [one.values * shares for one in results])  # pyright: ignore
    scores: Any = parts if job.request.layers.by == "time" else torch.stack([*parts.values()]).sum(0)
    return show_joined(job, weighted, end.shown, end.columns, Rows(scores, results[-1].losses), resumed)


def _back(segment: Segment, dynamics: Dynamics, adjoint: Callable[[], list[Blocks]]) -> list[Blocks]:
    return segment.back(dynamics, adjoint())


def _before(passed: Callable[[], list[Blocks]]) -> list[Blocks]:
    return passed()[:-1]


def _count(method: MethodOptions) -> int:
    """The number of segments."""
    return min(SEGMENTS, len(method.checkpoints or ())) if method.segments is None else method.segments


def _stops(job: Job, loaded: Loaded, weighted: Weighted, dynamics: Dynamics) -> list[_Stop]:
    """The checkpoints; refuses what does not fit before the first is scored."""
    at, stops = lru_cache(1)(lambda path: at_checkpoint(loaded, path, job.request.model)), list[_Stop]()
    for number, (path, rate) in enumerate(weighted, 1):
        load = partial(at, str(path))
        scale = None if dynamics.optimizer == "sgd" else partial(_scale, str(path))
        point = Checkpoint(lambda load=load: load().subject, rate, scale)
        point.load() if scale is None else point.steps()
        stops.append(_Stop(number, load, point))
    return stops


def _scale(path: str, subject: Subject) -> Transform:
    return load_optimizer_state(path, subject.model, subject.view)


def _segment(job: Job, number: int, stops: Sequence[_Stop], dynamics: Dynamics) -> Segment:
    """A segment, with a curvature that is fitted, or read where the run has it."""
    request, points, last = job.request, [stop.point for stop in stops], stops[-1].load()
    labels: Any = request.fit.labels if request.gave("labels") else "model"

    def fitted() -> Curvature:
        with last.multiplying():
            return fit_curvature(points, job.train, dynamics, labels=labels, seed=request.seed,
                                 partitions=request.fit.partitions)  # fmt: skip

    if request.run is None:
        return Segment(points, fitted())
    place = Path(request.run) / f"segment-{number}"
    refuse_links(place)
    known = {"hessian": {"kind": "EK-FAC of a segment", "labels": labels, "seed": request.seed},
             "segment": [{"model": model_fingerprint(stop.load().model), "rate": stop.point.rate}
                         for stop in stops],
             "source": dynamics.settings(), **last.settings(), **recorded(request)}  # fmt: skip
    made = describe(points[-1].load(), job.train, None).merged(known)
    with Output(place, overwrite=job.overwrite).open("hessian", made, 1) as writer:
        if not writer.complete:
            write_curvature(writer, fitted())
    return Segment(points, load_curvature(place))


def _score(
    job: Job, stop: _Stop, passed: Callable[[], list[Blocks]], known: dict[str, Any]
) -> tuple[Rows, int]:
    """Scores of raw rows at a checkpoint, and how many were there already."""
    run = job.request.run
    part = None if run is None else str(Path(run) / f"checkpoint-{stop.number}")
    one = stop.load()
    prepared = job.prepare(one, part, first=False)
    queries = replace(prepared.queries, make=lambda: passed()[-1])
    prepared = replace(prepared, queries=queries, settings=prepared.settings.merged(known))
    with one.multiplying(), rows_bar("scores", job.train) as progress:
        if part is None:
            return prepared.scorer()(prepared.train, progress=progress), 0
        refuse_links(Path(part))
        resumed = prepared.write(part, progress).resumed
        return read_part(part)[0], resumed
