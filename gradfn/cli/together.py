"""A command that torchrun started in several processes: each does a part, the first joins and shows them."""

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradfn import statistics as kinds
from gradfn.cli.commands import BuildRequest, HessianRequest, RetrainRequest, ScoreRequest
from gradfn.cli.console import SPOKEN, console
from gradfn.cli.merge import merged_facts
from gradfn.cli.request import make
from gradfn.cli.sharding import check_sharded, hold_shard, return_memory
from gradfn.errors import InputError
from gradfn.model.sharded import END, Turns
from gradfn.report.progress import QUIET
from gradfn.report.tables import facts
from gradfn.runs.merge import SUMS, Joined, merge_run
from gradfn.runs.processes import TOGETHER, TURNS, Processes
from gradfn.runs.shards import FOLDER, Shard, TooManyShards, kind_name, shard_run, shards_of
from gradfn.statistics.fold import passes
from gradfn.store import remove_kind

SHOWN = ("csv", "jsonl", "parquet")
OTHERS_WAIT_S = 3.0
"""What is wrong for all processes the first one tells, and the others are ended before they tell it too."""


def run_together(made: Any, command: Callable[[Any], None], processes: Processes) -> None:
    """Run a command in all processes, and tell an error once."""
    try:
        if made.sharded:
            check_sharded(made)
            return_memory()
            TURNS.set(Turns())
        _check(made, processes)
        _share(made, command, processes)
    except (InputError, OSError, RuntimeError):
        if processes.rank:
            time.sleep(OTHERS_WAIT_S)
            print(f"gradfn: process {processes.rank} of {processes.count}:", file=sys.stderr)
        raise


def _check(made: Any, processes: Processes) -> None:
    """Refuse what one process must do, before anything is loaded."""
    if not isinstance(made, BuildRequest | HessianRequest | RetrainRequest | ScoreRequest):
        raise InputError(
            f"gradfn {made.COMMAND} is the work of one process: run it without torchrun (in several run "
            "build, hessian, score and retrain)"
        )
    if made.run is None:
        raise InputError("processes write their parts to a run directory: give RUN")
    if made.output.shard is not None:
        raise InputError("--shard is a part of one's own, and torchrun makes the parts: leave it out")
    if isinstance(made, ScoreRequest):
        made.table.check(made.output.overwrite)
        if made.method.training is not None:
            raise InputError(
                "scores of a --training go through its steps one by one: run them without torchrun"
            )
    counts = {shard.count for _, shard in _parts(made)}
    if counts and max(counts) > processes.count and not made.output.overwrite:
        raise InputError(
            f"{made.run} has the parts of {max(counts)} processes: start as many, or give `overwrite=True` "
            "to begin again"
        )


def _parts(made: Any) -> list[tuple[str, Shard]]:
    """The parts in the run of what the command writes, by kind.

    Raises:
        InputError: there are parts of another command, which would be joined with them.
    """
    own = {"hessian": SUMS, "scores": (*SUMS, "scores")}.get(made.WRITES, (made.WRITES,))
    found = shards_of(made.run)
    if others := [kind_name(kind) for kind in found if kind not in own]:
        raise InputError(
            f"{made.run} has parts of its {others[0]}, of another command: join them with gradfn merge, or "
            "write to another directory"
        )
    return [(kind, shard) for kind, shards in found.items() for shard in shards]


def _share(made: Any, command: Callable[[Any], None], processes: Processes) -> None:
    """Do this process's part, and in the first one what follows on all of them."""
    first, run, overwrite = processes.rank == 0, Path(made.run), made.output.overwrite
    there = (run / f"{made.WRITES}.h5").exists() and not overwrite
    processes.wait()  # so that all of them have looked
    for kind, shard in _parts(made) if first and overwrite else ():
        remove_kind(shard_run(run, shard), kind)
    processes.wait()
    times = 0 if there else passes(getattr(kinds, made.kind)()) if isinstance(made, HessianRequest) else 1
    joined = list[Joined]()
    for number in range(times):
        quiet = not first or number > 0 or isinstance(made, ScoreRequest)
        try:
            _do_part(made, command, processes, quiet=quiet)
        except TooManyShards as few:
            fewer = processes.first(few.parts)
            if fewer is None:
                return
            processes = fewer
            _do_part(made, command, processes, quiet=quiet)
        processes.wait()
        if first:
            joined = merge_run(run, overwrite=overwrite)
        processes.wait()
    if first and joined:
        console().print(facts(merged_facts(joined)))
        shutil.rmtree(run / FOLDER, ignore_errors=True)
    if not (there or isinstance(made, ScoreRequest)):
        return
    if first:
        command(made)
    elif TURNS.get() is not None:
        hold_shard(_here(made, processes))
    _end_turns()


def _do_part(made: Any, command: Callable[[Any], None], processes: Processes, *, quiet: bool) -> None:
    """Run the command for the part of a process, or hold a shard of the model for those that have one."""
    if processes.idle:
        hold_shard(_here(made, processes))
        return _end_turns()
    part = _here(made, processes, shard=str(processes.shard))
    silent, spoken = QUIET.set(processes.rank > 0 or made.quiet), SPOKEN.get()
    together = TOGETHER.set(processes)
    SPOKEN.set("nowhere" if quiet else spoken)
    try:
        command(part)
        _end_turns()
    finally:
        QUIET.reset(silent)
        SPOKEN.set(spoken)
        TOGETHER.reset(together)


def _here(made: Any, processes: Processes, **more: str) -> Any:
    """The request on this process's own device, without the files that the first one writes in the end."""
    given = {name: value for name, value in made.given.items() if name not in SHOWN}
    if made.model.device == "cuda":
        given["device"] = f"cuda:{processes.local}"
    return make(type(made), {**given, **more})


def _end_turns() -> None:
    """Run the model for the others until all processes are done with it."""
    if (turns := TURNS.get()) is not None:
        turns.take(END)
        turns.model = None
