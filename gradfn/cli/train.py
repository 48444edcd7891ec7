"""`gradfn train`: a model whose training is known from end to end."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradfn.cli.commands import ScoreRequest, TrainRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import (
    Loaded,
    anchored,
    check_run,
    check_trained,
    checked,
    load_as_asked,
    load_documents,
    load_model_and_rows,
    recorded,
)
from gradfn.cli.request import command_line
from gradfn.cli.stages import load_stages, projection_of
from gradfn.data import Corpus
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import pads
from gradfn.errors import InputError
from gradfn.hf.datasets import load_split
from gradfn.model.params import params_of
from gradfn.report.progress import progress_bar
from gradfn.report.summaries import (
    Facts,
    batches_facts,
    device_facts,
    gradients_line,
    resumed_facts,
    scores_facts,
)
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.train.checkpoints import Checkpoints, take_params
from gradfn.train.course import Course, Valuing
from gradfn.train.optimizers import State
from gradfn.train.run import INRUN, Saving, Trained, Validation, spans_of, train_run, write_values
from gradfn.train.stacked import check_start
from gradfn.train.watched import Recording, check_rows_run, fast_values
from gradfn.transforms import Chain, chain

NAMED = 5
"""Checkpoints that are named at most."""


def run_train(request: TrainRequest) -> None:
    """Load, train, report."""
    check_run(request.run)
    check_trained(request)
    request = checked(request, "training needs a model and a dataset")
    options, training = request.training, request.training.training()
    projection = _projection(request)
    others = _validation_rows(options.validation, options.validation_split, "validation")
    queries = _validation_rows(options.values, options.values_split, "values")
    loaded, rows = load_model_and_rows(request)
    if hasattr(loaded.model, "peft_config"):
        raise InputError(f"{loaded.name} has adapters, and whole models are trained: merge them into it")
    check_start(params_of(loaded.model), loaded.subject.loss)
    validation = None if others is None else _validation(loaded, others, request)
    with loaded.multiplying():
        padded = pads(probe_engine(loaded.model, loaded.subject.loss), rows)
    course = Course(
        loaded.subject.loss, rows, training, seed=request.seed, normalize=options.normalize,
        token_batch_size=request.model.token_batch_size, pads=padded,
        valuing=None if queries is None else _valuing(loaded, queries, request),
    )  # fmt: skip
    recording = None if projection is None else _recording(loaded, course, projection, request)
    with (
        loaded.multiplying(),
        nullcontext(course) if queries is None else fast_values(course, loaded.model) as course,
    ):
        lines = _first_facts(loaded, course, request)
        if recording is not None:
            how = gradients_line(recording.options.get("transform") or chain())
            lines.append(("record", f"{request.recording.record}, {how}"))
        console().print(facts([*lines, *batches_facts(padded)]))
        keeper = _keeper(loaded, course, request)
        _train(loaded, course, Saving(keeper, options.save_every, validation, recording), request)


def _train(loaded: Loaded, course: Course, saving: Saving, request: TrainRequest) -> None:
    """Train, and report."""
    known = {key: value for key, value in loaded.settings().items() if key != "layers"}
    more: dict[str, Any] = {"init": {"kind": "random" if request.training.from_scratch else "given"}}
    if (path := request.training.values) is not None:
        more["values"] = {"query": {"path": anchored(path), "split": request.training.values_split}}
    overwrite, rows = request.output.overwrite, len(course.data)
    with progress_bar("training", course.training.epochs * rows, "rows") as progress:
        trained = train_run(
            request.run, course, lambda: _start(course, loaded.model), saving,
            settings={**known, **recorded(request), **more}, overwrite=overwrite, progress=progress,
        )  # fmt: skip
        scores = course.valuing and write_values(request.run, course, overwrite=overwrite)
    console().print(facts(_last_facts(trained, course, request)))
    if scores and course.valuing is not None:
        shown = command_line(ScoreRequest, {"run": request.run, "method": INRUN})
        console().print(facts([*scores_facts(scores, rows, len(course.valuing.data)), ("next", shown)]))


def _projection(request: TrainRequest) -> Chain | None:
    """What recorded rows are projected by; None: no rows are recorded.

    Raises:
        InputError: options of rows without --record, or a run that rows cannot be recorded to.
    """
    rows = request.recording.record
    if rows is None:
        if given := request.gave("record_normalize", "record_dtype", "projection", "projection_dim",
                                 "unit_normalize", "include", "exclude", "no_biases"):  # fmt: skip
            raise InputError(
                f"{given} is of the rows that are recorded: say where to with --record, or leave it out"
            )
        return None
    check_run(rows)
    check_rows_run(Path(rows), Path(request.run), overwrite=request.output.overwrite)
    masks = request.model.task == "masked_lm"
    return projection_of(request.gradients, request.seed, "rademacher:16x16", masks=masks)


def _recording(loaded: Loaded, course: Course, projection: Chain, request: TrainRequest) -> Recording:
    """Where and how rows are recorded."""
    asked = request.recording
    transform = load_stages(loaded, projection, None).query_side(request.gradients.unit_normalize)
    made = Recording(Path(str(asked.record)), loaded.model, {
        "transform": transform, "view": loaded.subject.view, "normalize": asked.record_normalize,
        "dtype": getattr(torch, asked.record_dtype),
    })  # fmt: skip
    with loaded.multiplying():
        made.check(course)
    return made


def _start(course: Course, model: nn.Module) -> State:
    """The state before the first step, which has the model's parameters."""
    state = course.start(params_of(model))
    take_params(model)
    return state


def _keeper(loaded: Loaded, course: Course, request: TrainRequest) -> Checkpoints:
    """What writes and reads checkpoints."""
    reads, options = loaded.reads, replace(request.model, revision=None)
    files = reads.processor if reads.tokenizer is None or reads.numbers else reads.tokenizer
    return Checkpoints(
        loaded.model, course.training, files, lambda path: load_as_asked(path, options, reads.task)
    )


def _validation_rows(path: str | None, split: str | None, option: str) -> Any | None:
    """The dataset of an option, loaded before the model so that a wrong path fails at once."""
    if path is not None:
        return load_split(path, split, argument=f"{option}_split")[0]
    if split is not None:
        raise InputError(f"--{option}-split is of the rows of --{option}, and none are given: leave it out")
    return None


def _validation(loaded: Loaded, rows: Any, request: TrainRequest) -> Validation:
    """The rows whose loss is logged, without the weights that training rows have."""
    path = str(request.training.validation)
    columns = replace(request.data, reward_column=None, advantage_column=None)
    try:
        data = load_documents(loaded, rows, columns, path)
    except InputError as error:
        raise InputError(f"in --validation: {error}") from error
    if not data.supervised.any():
        raise InputError(f"no row of {path} has anything to predict: give --validation other rows")
    known = {"path": anchored(path), "fingerprint": data.fingerprint(), "rows": len(data)}
    return Validation(data, known)


def _valuing(loaded: Loaded, rows: Any, request: TrainRequest) -> Valuing:
    """What the rows of each step are valued by: queries, as `gradfn score` reads them."""
    options = request.training
    try:
        data = load_documents(loaded, rows, request.data, str(options.values), query=True)
    except InputError as error:
        raise InputError(f"in --values: {error}") from error
    if not data.supervised.all():
        raise InputError("a row of --values has nothing to predict: leave it out")
    return Valuing(data, loaded.subject.query_loss, options.values_kind, options.values_every)


# --- what is said


def _first_facts(loaded: Loaded, course: Course, request: TrainRequest) -> Facts:
    options, training, rows = request.training, course.training, course.data
    assert isinstance(rows, Corpus)
    numbers = sum(p.numel() for p in loaded.model.parameters())
    init = "new" if options.from_scratch else "its own"
    schedule = "" if training.schedule == "constant" else f", {training.schedule} schedule"
    warmup = f", {count(training.warmup, 'step')} of warmup" if training.warmup else ""
    saved = len(spans_of(course, options.save_every)) + 1
    return [
        *loaded.notes,
        *device_facts(loaded.model, loaded.products),
        ("model", f"{loaded.name} ({count(numbers, 'parameter')}, all trained, from {init} weights, "
                  "dropout off)"),
        ("train", f"{count(len(rows), 'row')}, {count(int(rows.lengths.sum()), 'token')}"),
        ("training", f"{count(training.epochs, 'epoch')} of {training.optimizer}, batches of "
                     f"{training.batch_size}, learning rate {training.learning_rate:g}{schedule}{warmup}"),
        ("steps", f"{course.total:,}, with {count(saved, 'checkpoint')}"),
        *(() if course.valuing is None else [("values", _way(course.valuing))]),
    ]  # fmt: skip


def _way(valuing: Valuing) -> str:
    """How the values of rows are found."""
    way = "from one backward pass a step for all queries"
    if valuing.probes is None:
        way = "by forward mode, a pass a query, since probes do not see every parameter"
    return f"{valuing.kind}, of {count(len(valuing.data), 'query')}, {way}"


def _last_facts(trained: Trained, course: Course, request: TrainRequest) -> Facts:
    steps, last = trained.steps, course.per_epoch
    losses, seconds, tokens = steps["loss"], steps["seconds"].sum(), int(steps["tokens"].sum())
    told = [("training", f"{trained.path} [{count(len(losses), 'step')}]")]
    if trained.resumed == len(losses):
        told.append(("complete", "all steps were there already, and none was taken again"))
    else:
        told += resumed_facts(trained.resumed, "step")
    told.append(
        ("loss", f"{losses[0]:.4g} at the first step, {losses[-last:].mean():.4g} over the last epoch")
    )
    found = steps["validation_loss"][np.isfinite(steps["validation_loss"])]
    if len(found):
        told.append((
            "validation", f"{found[0]:.4g} at the first checkpoint, {found[-1]:.4g} at the last, "
                          f"{found.min():.4g} at the best",
        ))  # fmt: skip
    told.append(("time", f"{seconds:.1f} s of steps, {tokens / seconds:,.0f} tokens/s"))
    names = [path.name for path in trained.checkpoints]
    shown = names if len(names) <= NAMED else [*names[:2], "...", names[-1]]
    told.append(("checkpoints", f"{request.run}/: {', '.join(shown)} [{len(names)}]"))
    return [*told, *_next_facts(request)]


def _next_facts(request: TrainRequest) -> Facts:
    """A command that scores the training rows at the checkpoints, with their learning rates as weights."""
    options = request.training
    query: dict[str, Any] = {"self": True}
    if options.validation is not None:
        query = {"query": options.validation, "query_split": options.validation_split}
    given = {"training": request.run, **query, "method": "tracin"}
    given = {name: value for name, value in given.items() if value is not None}
    return [("next", command_line(ScoreRequest, given))]
