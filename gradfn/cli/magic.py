"""`gradfn score --training RUN --method magic`: back through a training that a run recorded, exactly."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

import gradfn
from gradfn.cli.commands import ScoreRequest
from gradfn.cli.inputs import load_as_asked
from gradfn.cli.request import flag, slots_of
from gradfn.cli.trained import Recorded
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import pads
from gradfn.errors import InputError
from gradfn.methods.attribution import Attribution
from gradfn.methods.recipes import Problem, Recipe
from gradfn.store.guard import refuse_links
from gradfn.subject import Subject
from gradfn.train.checkpoints import Checkpoints
from gradfn.train.course import Course
from gradfn.train.magic import Magic
from gradfn.train.optimizers import State
from gradfn.train.replay import Replay
from gradfn.types import Data

MAGIC = "magic"
FOLDER = "replay"
"""What is kept in a run until its scores are there, to go on after a kill."""
OWN = ("steps", "replay_slots", "curvature")
WITHOUT = (
    "include", "exclude", "no_biases", "self", "query_path", "group_column", "against", "shard",
    "checkpoints", "checkpoint_weights",
)  # fmt: skip
"""Options that do not belong to a group of which none does, and that mean nothing here."""


def check_magic(request: ScoreRequest, trained: Recorded | None) -> None:
    """Refuse what going back through a training cannot do, before anything is loaded.

    Raises:
        InputError: naming the option, or what the training lacks.
    """
    if request.method.name != MAGIC:
        if given := request.gave(*OWN):
            raise InputError(f"{given} is of --method {MAGIC}: leave it out")
        return
    slots = slots_of(ScoreRequest)
    for name in request.given:
        if name in WITHOUT or slots[name].owner in ("gradients", "curvature", "fit", "solver"):
            raise InputError(
                f"{flag(name)} does not go with --method {MAGIC}, which takes whole gradients of all weights "
                "through the training: leave it out"
            )
    if request.layers.by_block:
        raise InputError(f"--method {MAGIC} is of all weights together: use --by example, or token")
    if trained is None:
        raise InputError(
            f"--method {MAGIC} goes back through a training: give the run of gradfn train with --training"
        )
    if (slots_given := request.method.replay_slots) is not None and slots_given < 1:
        raise InputError(f"--replay-slots must be 1 or more, not {slots_given}")
    first, stop = request.method.steps or (0, None)
    if not first < (trained.total if stop is None else stop) <= trained.total:
        raise InputError(
            f"--steps {first}:{'' if stop is None else stop} is no part of a training of {trained.total} "
            "steps: give its first step, from 0, and the one behind its last"
        )
    check_repeats(trained)


def check_repeats(trained: Recorded) -> None:
    """Refuse a training that this program would not take in the same way."""
    if trained.request.model.precision == "tf32":
        raise InputError(
            f"{trained.run} was trained with --precision tf32, in whose products derivatives drown: train "
            "again with fp32"
        )
    if trained.made.version != gradfn.__version__:
        raise InputError(
            f"{trained.run} was trained by gradfn {trained.made.version}, and this is {gradfn.__version__}, "
            "whose steps may round otherwise: use that version, or train again"
        )


def with_magic(recipe: Recipe, request: ScoreRequest, trained: Recorded) -> Recipe:
    """The recipe whose method knows the training."""

    def method(problem: Problem) -> Attribution:
        course = course_of(trained, problem.subject, problem.train)
        states, resume = states_of(trained, course, request), None
        if request.run is not None:
            resume = Path(request.run) / FOLDER
            refuse_links(resume)
        replay = Replay(request.method.replay_slots, states=states, resume=resume,
                        curvature=request.method.curvature)  # fmt: skip
        return Magic(course, states[0]().params, request.method.steps or (0, None), replay)

    return replace(recipe, method=method)


def course_of(trained: Recorded, subject: Subject, rows: Data) -> Course:
    """The training as it was.

    Raises:
        InputError: its steps took other rows.
    """
    asked = trained.request
    course = Course(
        subject.loss, rows, asked.training.training(), seed=asked.seed, normalize=asked.training.normalize,
        token_batch_size=asked.model.token_batch_size,
        pads=pads(probe_engine(subject.model, subject.loss), rows),
    )  # fmt: skip
    for step, (known, (_, batch)) in enumerate(zip(trained.done.rows, course.batches(), strict=True), 1):
        if not np.array_equal(known[known >= 0], batch):
            raise InputError(
                f"step {step} of the training in {trained.run} took other rows than its seed says: train "
                "again"
            )
    return course


def remove_kept(run: str | None) -> None:
    """Delete what was kept to go on, once the scores are there."""
    if run is not None:
        shutil.rmtree(Path(run) / FOLDER, ignore_errors=True)


def states_of(trained: Recorded, course: Course, request: ScoreRequest) -> dict[int, Callable[[], State]]:
    """What reads the states of a training from its checkpoints, by the steps before them.

    Raises:
        InputError: that before the first step is gone.
    """
    options, task = replace(request.model, revision=None), str(request.model.task)
    trained.checkpoint(0)
    keeper = Checkpoints(nn.Module(), course.training, None, lambda path: load_as_asked(path, options, task))
    return {step: partial(keeper.read, path) for step, path in trained.checkpoints.items()}
