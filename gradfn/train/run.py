"""A training on disk: checkpoints, and of every step the rows, the learning rate, the loss and the gradient.

    RUN/training.h5      the steps, joined from segments that end at checkpoints
    RUN/checkpoint-0     a model's folder before the first step
    RUN/checkpoint-100   the same after 100 steps, with the optimizer's state in it
    RUN/log.csv          the steps again, as text, a line as soon as one is taken

A checkpoint appears complete or not at all, and before the segment of its steps. A run that is killed goes on
behind its last segment, and ends with the same bits.
"""

import csv
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

import gradfn
from gradfn.errors import InputError
from gradfn.runs.provenance import DataSource, Provenance, Settings, ids_digest, loss_source
from gradfn.runs.scores import write_scores
from gradfn.scores import Columns
from gradfn.store import Span, check_disk, open_store, open_writer, storable
from gradfn.store.directory import check_place
from gradfn.store.file import disk_errors
from gradfn.store.folder import check_folder, create_folder
from gradfn.store.guard import refuse_links
from gradfn.store.writer import Writer
from gradfn.train.course import Course, Diverged, Taken
from gradfn.train.in_run import InRunTotals
from gradfn.train.optimizers import State
from gradfn.train.watched import Recording
from gradfn.types import Data, Rows
from gradfn.watch import Resumed

KIND, LOG, MARK = "training", "log.csv", "gradfn.json"
VALUES = "steps/values"
"""What each row of a step did to each validation loss; 0 for steps that were not valued."""
INRUN = "inrun"
"""The recipe of scores that are sums of these over the steps."""
COLUMNS = {
    "epoch": np.int64, "learning_rate": np.float64, "loss": np.float64, "gradient_norm": np.float64,
    "clip": np.float64, "tokens": np.int64, "seconds": np.float64, "validation_loss": np.float64,
}  # fmt: skip
"""What is known of every step, beside its rows; the validation only at checkpoints, and NaN elsewhere."""
FILLER = -1
"""What follows the rows of a batch that is smaller than others."""
SaveEvery = int | Literal["epoch"]
Progress = Callable[[int, str], None]
"""Called with the rows that were done, and the loss in words."""


@runtime_checkable
class Keeper(Protocol):
    """What writes a state into a folder, and reads it back to the bit; see `gradfn.train.checkpoints`."""

    def write(self, folder: Path, state: State) -> None:
        """Write the state into the folder, which is there and empty."""
        ...

    def read(self, folder: Path) -> State:
        """The state that was written."""
        ...


@dataclass(frozen=True, eq=False)
class Validation:
    """Rows whose loss is logged at every checkpoint.

    Args:
        data: the rows.
        settings: what is recorded of them.
    """

    data: Data
    settings: Settings


@dataclass(frozen=True, eq=False)
class Saving:
    """When a training makes checkpoints, and what it does there.

    Args:
        keeper: writes and reads them.
        every: the steps between them, or "epoch"; the first step has one before it, the last one after it.
        validation: rows whose loss is logged at each.
        recording: where the gradients of the rows go; what is recorded is on disk before a checkpoint is.
    """

    keeper: Keeper
    every: SaveEvery = "epoch"
    validation: Validation | None = None
    recording: Recording | None = None


class Trained(NamedTuple):
    """A training that is complete.

    Args:
        path: its index.
        steps: `{column: [steps]}`, see `COLUMNS`.
        rows: the rows of every step, `[steps, batch]`, filled with -1.
        checkpoints: their folders that are there, in the order of their steps.
        resumed: steps that an earlier process had taken.
    """

    path: Path
    steps: dict[str, np.ndarray]
    rows: np.ndarray
    checkpoints: list[Path]
    resumed: int


def train_run(
    run: str | Path,
    course: Course,
    start: Callable[[], State],
    saving: Saving,
    *,
    settings: Settings | Provenance | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train a model and write its checkpoints, and what is known of its steps, to a run directory.

    Args:
        run: the directory. A training that was begun there with the same settings goes on.
        course: the training.
        start: gives the state before the first step, see `Course.start`; not called where a run goes on.
        saving: when it makes checkpoints, and how.
        settings: what to record besides, such as the model's fingerprint.
        overwrite: replace a training that is there.
        progress: called after every step.

    Raises:
        InputError: the run was made with other settings, has checkpoints of another program, or lacks the one
            to go on from; a loss is not finite, with the checkpoint that is kept.
        StorageError: the disk is full or failed; what is complete is kept.
    """
    run, spans = Path(run), spans_of(course, saving.every)
    made = _describe(course, saving).merged(settings)
    names = {"rows/id": storable(_names(course.data))}
    check_place(run)
    _refuse_foreign(run)
    with open_writer(
        run, KIND, made.settings(), course.total, overwrite, names=names, request=made.request
    ) as writer:
        missing = writer.missing(spans)
        if not writer.done:
            _remove(run)
        done = course.total - sum(stop - begin for begin, stop in missing)
        if progress is not None and done:
            progress(Resumed(sum(len(rows) for _, rows in course.batches(0, done))), "")
        with ExitStack() as recorded:
            if saving.recording is not None:
                step = writer.done[-1][1] if writer.done else 0  # the rows of a span made again are there
                begun = saving.recording.begin(course, step, made, overwrite=overwrite)
                course = recorded.enter_context(begun)
            if not writer.complete:
                with _log(run, writer) as line:
                    _take(_Job(run, course, saving, progress), writer, missing, start, line)
                writer.finish(names)
                _write_log(run, writer)
    return open_training(run)._replace(resumed=done)


def spans_of(course: Course, save_every: SaveEvery) -> list[Span]:
    """The steps between checkpoints, `(first, behind the last)`.

    >>> from gradfn.train import Training
    >>> course = Course(lambda p, e: p["w"], [{}] * 5, Training(2, 2, 0.1))
    >>> spans_of(course, "epoch"), spans_of(course, 4)
    ([(0, 3), (3, 6)], [(0, 4), (4, 6)])
    """
    size = course.per_epoch if save_every == "epoch" else save_every
    if size < 1:
        raise InputError(f"`save_every` must be 1 step or more, not {size}")
    return [(first, min(first + size, course.total)) for first in range(0, course.total, size)]


def checkpoint_path(run: str | Path, step: int) -> Path:
    """Where the checkpoint after so many steps is.

    >>> checkpoint_path("run", 100).as_posix()
    'run/checkpoint-100'
    """
    return Path(run) / f"checkpoint-{step}"


def open_training(run: str | Path) -> Trained:
    """Read what `train_run` wrote.

    Raises:
        InputError: the run is absent, unfinished or damaged.
    """
    with open_store(run, KIND) as store:
        if store.header.kind != KIND:
            raise InputError(
                f"{store.path} holds {store.header.kind}, and no training: give a training's run"
            )
        steps = {name: store.read(f"steps/{name}") for name in COLUMNS}
        rows = store.read("steps/rows")
        return Trained(store.path, steps, rows, checkpoints_of(store.path.parent), 0)


def checkpoints_of(run: Path) -> list[Path]:
    """The folders of checkpoints in a directory, in the order of their steps."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps before a checkpoint.

    >>> step_of(Path("run/checkpoint-100"))
    100
    """
    return int(checkpoint.name.removeprefix("checkpoint-"))


def write_values(run: str | Path, course: Course, *, overwrite: bool = False) -> Path:
    """Write the sums of the rows' values over all steps of a training to `RUN/scores.h5`, as scores.

    Where there are several epochs, the file has the sum over each of them beside the whole, as shares.

    Args:
        run: of `train_run`, complete, with a course that has `valuing`.
        course: the training.
        overwrite: replace scores that are there.

    Raises:
        InputError: the training is unfinished, or valued no rows.
    """
    valuing = course.valuing
    if valuing is None:
        raise InputError(f"the training of {run} valued no rows: give it `valuing`")
    names = _names(valuing.data)
    fold, losses, shares = InRunTotals(_names(course.data), names), np.zeros(len(course.data)), {}
    with open_store(run, KIND) as store:
        for start, _, part in store.chunks(["steps/rows", "steps/losses", VALUES], course.per_epoch):
            real = part["steps/rows"] >= 0
            numbers, values = torch.from_numpy(part["steps/rows"][real]), torch.from_numpy(part[VALUES][real])
            np.add.at(losses, numbers.numpy(), part["steps/losses"][real])
            summed = fold.update(fold.init(), numbers, values)
            shares[f"epoch {start // course.per_epoch + 1}"] = summed.values.float()
        made = Provenance.of(store)
    how = {"recipe": INRUN, "method": made.further["values"], "query": made.further["values"]["query"]}
    means = torch.from_numpy(losses) / course.training.epochs
    columns = Columns(names, list(getattr(valuing.data, "texts", ())))
    values = shares if len(shares) > 1 else shares["epoch 1"]
    return write_scores(run, course.data, Rows(values, means), columns,
                        settings=made.merged(how), overwrite=overwrite)  # fmt: skip


# --- the steps


@dataclass(frozen=True, eq=False)
class _Job:
    """What taking steps needs."""

    run: Path
    course: Course
    saving: Saving
    progress: Progress | None


def _take(
    job: _Job, writer: Writer, missing: list[Span], start: Callable[[], State], line: Callable[..., None]
) -> None:
    """Take the steps that are missing, and write each span with its checkpoint."""
    state = None
    for begin, stop in missing:
        if state is None or int(state.taken) != begin:
            state = start() if begin == 0 else _resume(job, begin)
        if begin == 0:
            _save(job, state)
        state, arrays = _span(job, state, stop, line)
        if job.course.recorded is not None:
            job.course.recorded.recorder.flush()
        _save(job, state)
        writer.write(begin, stop, arrays)


def _save(job: _Job, state: State) -> None:
    """Write the checkpoint of a state."""
    path = checkpoint_path(job.run, int(state.taken))
    size = sum(v.numel() * v.element_size() for part in (state.params, *state.moments) for v in part.values())
    check_disk(job.run, size, f"the weights and moments of {path.name}")
    create_folder(path, lambda folder: job.saving.keeper.write(folder, state))


def _resume(job: _Job, step: int) -> State:
    """The state of the checkpoint after so many steps."""
    path = checkpoint_path(job.run, step)
    if not path.exists():
        raise InputError(
            f"{path} is gone, from which the training would go on: put it back, or give `overwrite=True` to "
            "begin again"
        )
    check_folder(path)
    state = job.saving.keeper.read(path)
    if int(state.taken) != step or int(state.total) != job.course.total:
        raise InputError(
            f"{path} is not of step {step} of this training: give `overwrite=True` to begin again"
        )
    return state


def _span(
    job: _Job, state: State, stop: int, line: Callable[..., None]
) -> tuple[State, dict[str, np.ndarray]]:
    """The state after some steps, and what is known of each of them."""
    course, begin, mark = job.course, int(state.taken), time.perf_counter()
    batch = course.training.batch_size
    arrays: dict[str, Any] = {f"steps/{name}": np.zeros(stop - begin, kind) for name, kind in COLUMNS.items()}
    arrays["steps/rows"] = np.full((stop - begin, batch), FILLER, np.int64)
    arrays["steps/losses"] = np.full((stop - begin, batch), np.nan)
    if course.valuing is not None:
        arrays[VALUES] = np.zeros((stop - begin, batch, len(course.valuing.data)), np.float32)
    steps = course.steps(state, stop)
    del state
    try:
        for place, taken in enumerate(steps):
            seconds, mark = time.perf_counter() - mark, time.perf_counter()
            last = place == stop - begin - 1
            known = _known(job, taken, seconds, last, begin + place + 1)
            for name in COLUMNS:
                arrays[f"steps/{name}"][place] = known[name]
            arrays["steps/rows"][place, : len(taken.rows)] = taken.rows
            arrays["steps/losses"][place, : len(taken.rows)] = taken.losses
            if taken.values is not None:
                arrays[VALUES][place, : len(taken.rows)] = taken.values
            line(begin + place + 1, known)
            if job.progress is not None:
                job.progress(len(taken.rows), f"loss {taken.loss:.4g}")
            if last:
                return taken.state, arrays
            del taken  # the next step is to empty its state
    except Diverged as error:
        raise Diverged(f"{error} ({checkpoint_path(job.run, begin)} is kept)") from error
    raise AssertionError("a span has at least one step")


def _known(job: _Job, taken: Taken, seconds: float, last: bool, step: int) -> dict[str, Any]:
    """What is known of a step, by column; behind the last of a span, weights are finite or refused."""
    validation = float("nan")
    if last:
        if not all(bool(value.isfinite().all()) for value in taken.state.params.values()):
            raise Diverged(f"a weight is not finite after step {step}: give a lower `learning_rate`")
        if job.saving.validation is not None:
            validation = job.course.mean_loss(taken.state.params, job.saving.validation.data)
    return {
        "epoch": taken.epoch, "learning_rate": taken.learning_rate, "loss": taken.loss,
        "gradient_norm": taken.norm, "clip": taken.clip, "tokens": taken.tokens, "seconds": seconds,
        "validation_loss": validation,
    }  # fmt: skip


# --- files


def _line(step: int, known: Mapping[str, Any]) -> list[Any]:
    """A line of the log; there is no text where there is no number."""
    return [step, *("" if value != value else value for value in (known[name] for name in COLUMNS))]


def _write_log(run: Path, writer: Writer) -> None:
    """Write the log of the steps that are complete."""
    path = run / LOG
    refuse_links(path)
    partial = path.with_name(f".{LOG}.tmp")
    with disk_errors(path):
        with partial.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["step", *COLUMNS])
            for begin, stop in writer.done:
                read = writer.stored.read_all([f"steps/{name}" for name in COLUMNS], begin, stop)
                for place in range(stop - begin):
                    known = {name: read[f"steps/{name}"][place].item() for name in COLUMNS}
                    lines.writerow(_line(begin + place + 1, known))
        partial.replace(path)


@contextmanager
def _log(run: Path, writer: Writer) -> Iterator[Callable[..., None]]:
    """The log of the steps that are complete, to which further lines are added."""
    _write_log(run, writer)
    with disk_errors(run / LOG), (run / LOG).open("a", newline="", encoding="utf-8", buffering=1) as file:
        lines = csv.writer(file, lineterminator="\n")
        yield lambda step, known: lines.writerow(_line(step, known))


def _refuse_foreign(run: Path) -> None:
    """Refuse a directory with checkpoints that no training of gradfn wrote: a new one would replace them."""
    for path in checkpoints_of(run):
        refuse_links(path)
        if not (path / MARK).is_file():
            raise InputError(
                f"{path} is no checkpoint of a training by gradfn, which would be replaced: give another "
                "directory"
            )


def _remove(run: Path) -> None:
    """Remove the checkpoints of an earlier training, or of one that was killed before its first segment."""
    with disk_errors(run):
        for path in checkpoints_of(run):
            shutil.rmtree(path)


def _names(data: Data) -> list[str]:
    ids = getattr(data, "ids", None)
    return [str(row) for row in range(len(data))] if ids is None else list(ids)


def _describe(course: Course, saving: Saving) -> Provenance:
    """What the training depends on."""
    fingerprint = getattr(course.data, "fingerprint", None)
    how = {
        "normalize": course.normalize,
        "save_every": saving.every,
        "token_batch_size": course.token_batch_size,
    }
    validation = saving.validation
    more: dict[str, Any] = {} if validation is None else {"validation": dict(validation.settings)}
    if course.weights is not None:
        more["weights"] = course.weights_digest
    if (valuing := course.valuing) is not None:
        digest = getattr(valuing.data, "fingerprint", lambda: None)()
        asked = {
            "fingerprint": digest,
            "rows": len(valuing.data),
            "loss": loss_source(valuing.loss).to_json(),
        }
        more["values"] = {"kind": valuing.kind, "every": valuing.every, "query": asked}
    return Provenance(
        version=gradfn.__version__,
        data=DataSource(fingerprint=None if fingerprint is None else fingerprint(), rows=len(course.data),
                        ids=ids_digest(course.data)),
        loss=loss_source(course.loss),
        training={**course.training.settings(), **how},
        seed=course.seed,
        further=more,
    )  # fmt: skip
