"""What becomes of a run when something goes wrong, as a Markdown table.

    python benchmarks/reliability.py [--kills 100] [--seed 0] [--only kills,disk]

Commands run on the example inside the package. Each is disturbed, run again to its end, and compared bit for
bit with one that nobody disturbed: every array of every index, and every file of every checkpoint.
`gradfn verify` must find no damage in between and at the end. What does not hold is printed, and the exit
status is 1.

* kills: `kill -9`, half of them at a random time between start and usual end, half of them at a random change
  of a file: halfway in a write, or before a sync, a rename, a removal.
* disk: the nth change of a file fails, and all after it, as if the disk were full.
"""

import argparse
import errno
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lab import (
    JOBS,
    LAB,
    Ended,
    Job,
    changes,
    command,
    content,
    damaged,
    failing_from,
    killed_at,
    left_over,
    segments,
    warm_up,
)


class Row(NamedTuple):
    """A line of the table: what was done, how often, how often all was as promised, what else is known."""

    fault: str
    tries: int
    held: int
    seen: str


class Usual(NamedTuple):
    """A command that nobody disturbs: what it makes, its seconds, and how often it changes a file."""

    content: dict[str, str]
    seconds: float
    changes: int


@cache
def usual(job: Job) -> Usual:
    run = LAB / "usual"
    job.prepare(run)
    begun = time.monotonic()
    count = changes(run, job.of(run))
    made = Usual(content(run), time.monotonic() - begun, count)
    shutil.rmtree(run)
    return made


def problems(job: Job, run: Path) -> list[str]:
    """What is wrong after a disturbance, and after the same command again; none: all is as promised."""
    wrong = [f"after the fault: {one}" for one in damaged(run)]
    again = command(*job.of(run))
    if again.status:
        return [*wrong, f"the command again ended with status {again.status}: {again.said[-600:]}"]
    made, expected = content(run), usual(job).content
    unlike = [name for name in {**expected, **made} if made.get(name) != expected.get(name)]
    return [
        *wrong,
        *(f"{name} differs" for name in unlike),
        *(f"after the command again: {one}" for one in damaged(run)),
        *(f"{name} is left over" for name in left_over(run)),
    ]


class Trials:
    """Tries of one kind: how many, and how many were as promised."""

    def __init__(self, fault: str):
        self.fault, self.tries, self.held = fault, 0, 0

    def add(self, what: str, wrong: list[str]) -> None:
        self.tries += 1
        self.held += not wrong
        for one in wrong:
            print(f"{self.fault}, {what}: {one}", file=sys.stderr, flush=True)

    def row(self, seen: str = "") -> Row:
        return Row(self.fault, self.tries, self.held, seen)


def kills(asked: argparse.Namespace) -> Iterator[Row]:
    """Kill each command in turn, and run it again."""
    chance = random.Random(asked.seed)
    each = [asked.kills // len(JOBS) + (number < asked.kills % len(JOBS)) for number in range(len(JOBS))]
    for job, count in zip(JOBS, each, strict=True):
        trials, kept = Trials(f"`kill -9` of {job.name}"), 0
        for number in range(count):
            run = LAB / f"killed-{job.name.replace(' ', '-')}-{number}"
            job.prepare(run)
            before = segments(run)
            ended, when = killed(job, run, number, chance)
            kept += segments(run) > before
            wrong = [] if ended.status == -9 else [f"it was not killed: {ended.status} {ended.said[-300:]}"]
            trials.add(when, wrong + problems(job, run))
            shutil.rmtree(run)
        yield trials.row(f"{kept} with segments to keep")


def killed(job: Job, run: Path, number: int, chance: random.Random) -> tuple[Ended, str]:
    """A command that was killed, and when."""
    if number % 2:
        change = chance.randint(1, usual(job).changes)
        return killed_at(run, change, job.of(run)), f"at change {change} of {usual(job).changes}"
    while True:  # it may have been faster than usual
        seconds = chance.uniform(0, usual(job).seconds)
        ended = command(*job.of(run), kill_after=seconds)
        if ended.status == -9:
            return ended, f"after {seconds:.2f} s"
        shutil.rmtree(run)
        job.prepare(run)


def disk(asked: argparse.Namespace) -> Iterator[Row]:
    """Let the disk be full from the nth change of a file on."""
    chance = random.Random(asked.seed)
    for job in JOBS:
        trials = Trials(f"a full disk in {job.name}")
        count = usual(job).changes
        for change in sorted(chance.sample(range(1, count + 1), min(count, asked.writes))):
            run = LAB / f"full-{change}"
            job.prepare(run)
            ended = failing_from(run, change, errno.ENOSPC, job.of(run))
            told = "No space left on device" in ended.sentence and ended.status == 1
            wrong = [] if told or ended.status == 0 else [f"status {ended.status}: {ended.said[-600:]}"]
            trials.add(f"at change {change} of {count}", wrong + problems(job, run))
            shutil.rmtree(run, ignore_errors=True)
        yield trials.row("one sentence, status 1")


FAULTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {"kills": kills, "disk": disk}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how often a command is killed")
    parser.add_argument("--writes", type=int, default=12, help="changes of a command that fail, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(FAULTS), help=f"some of {','.join(FAULTS)}")
    asked = parser.parse_args()
    try:
        warm_up()
        print("| fault | tries | as promised | |\n| --- | ---: | ---: | --- |", flush=True)
        rows = []
        for name in asked.only.split(","):
            for row in FAULTS[name](asked):
                rows.append(row)
                print(f"| {row.fault} | {row.tries} | {row.held} | {row.seen} |", flush=True)
    finally:
        shutil.rmtree(LAB)
    sys.exit(any(row.held < row.tries for row in rows))


if __name__ == "__main__":
    main()
