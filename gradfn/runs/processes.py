"""Processes that torchrun started, which do one job: each a part of it, and the first what joins the parts.

The parts are those of an array job (`gradfn.runs.shards`), so a job that was killed goes on like one, and its
numbers are the same. Processes only wait for one another; what they made goes through the run directory.
"""

import os
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from gradfn.errors import InputError
from gradfn.model.sharded import WAIT, Turns
from gradfn.runs.curvatures import Asked, Labels, load_curvature
from gradfn.runs.merge import hessian_shard, merge_fit
from gradfn.runs.output import RunOptions, output_of
from gradfn.runs.shards import Shard
from gradfn.statistics import Curvature
from gradfn.statistics.fold import passes
from gradfn.store import Writer
from gradfn.subject import Subject
from gradfn.transforms import Transform
from gradfn.types import Data

PATIENCE = timedelta(days=30)
"""How long a process waits for another one, which may have more to do, or be dead: then torchrun ends all."""


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is.

    Args:
        rank: from 0.
        count: of all machines.
        local: from 0, on its own machine.
        group: of `torch.distributed`, where they are not all that torchrun started.
        idle: it has no part, and only holds its shard of the model.
    """

    rank: int
    count: int
    local: int
    group: Any = None
    idle: bool = False

    @property
    def shard(self) -> Shard:
        """The part of the job that is this process's."""
        return Shard(self.rank + 1, self.count)

    def first(self, parts: int) -> "Processes | None":
        """The first so many of the processes, where there are no more parts; None: this one is none of them.

        All of them must call this. Those that share one copy of a model all go on, some without a part.
        """
        if TURNS.get() is not None:
            return replace(self, count=parts, idle=self.rank >= parts)
        group = torch.distributed.new_group([*range(parts)], PATIENCE, "gloo")
        return replace(self, count=parts, group=group) if self.rank < parts else None

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            RuntimeError: another process has ended.
        """
        turns = TURNS.get()
        if not torch.distributed.is_initialized():
            several = "cpu:gloo,cuda:nccl" if turns is not None and torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(several, timeout=PATIENCE)
        torch.distributed.barrier(self.group) if turns is None else turns.take(WAIT)


TURNS: ContextVar[Turns | None] = ContextVar("TURNS", default=None)
"""The turns of processes that share one copy of a model; None: each has a whole one."""
TOGETHER: ContextVar[Processes | None] = ContextVar("TOGETHER", default=None)
"""The processes that do this job; None: this one alone."""


def started() -> Processes | None:
    """What torchrun says of this process; None where it did not start it, or started no other."""
    rank, count, local = (int(os.environ.get(name, -1)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Processes(rank, count, local) if count > 1 and min(rank, local) >= 0 else None


def hessian_together(
    run: str | Path,
    model: nn.Module | Subject,
    data: Data,
    fold: Any,
    transform: Transform | None = None,
    *,
    labels: Labels = "data",
    seed: int = 0,
    partitions: int = 1,
    **options: Unpack[RunOptions],
) -> Curvature:
    """Fit a curvature with all processes, which each sum over their part of the rows; see `hessian`.

    The first process adds up the sums in the order of the parts, so what comes out is the same each time.

    Args:
        run, model, data, fold, transform, labels, seed, partitions, options: see `hessian`; the same in all
            processes of `TOGETHER`, which must all call this.
    """
    processes = TOGETHER.get()
    assert processes is not None
    output, subject = output_of(run, model, options)
    settings = Asked(subject, data, fold, transform, labels, seed, partitions).made.merged(output.settings)
    how: Any = {**options, "labels": labels, "seed": seed, "partitions": partitions, "shard": processes.shard}
    if (progress := output.progress) is not None:  # parts have about as many tokens each
        how["progress"] = lambda done: progress(type(done)(done * processes.count))
    if not _is_there(Path(run), settings.settings(), output.overwrite):
        for _ in range(passes(fold)):
            hessian_shard(run, model, data, fold, transform, **how)
            processes.wait()
            if processes.rank == 0:
                merge_fit(run, overwrite=bool(output.overwrite))
            processes.wait()
    return load_curvature(run)


def _is_there(run: Path, settings: Any, overwrite: Any) -> bool:
    """Whether the run has this curvature; refuses another one, unless it is to be replaced."""
    try:
        return Writer(run, "hessian", settings, 1).complete and overwrite is not True
    except InputError:
        if overwrite:
            return False
        raise
