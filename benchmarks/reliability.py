"""What becomes of a run when something goes wrong, as a Markdown table.

    python benchmarks/reliability.py [--kills 100] [--seed 0] [--only kills,disk]

Commands run on the example inside the package. Each is disturbed, run again to its end, and compared bit for
bit with one that nobody disturbed: every array of every index, and every file of every checkpoint.
`gradfn verify` must find no damage in between and at the end. What does not hold is printed, and the exit
status is 1.

* kills: `kill -9`, half of them at a random time between start and usual end, half of them at a random change
  of a file: halfway in a write, or before a sync, a rename, a removal.
* disk: the nth change of a file fails, and all after it, as if the disk were full.
* small: a disk (tmpfs in a namespace of its own) that is too small for the run, and then is not; and files
  that may not grow past a limit (RLIMIT_FSIZE), which needs no rights.
* closed: a directory that may not be written, from the start or from the first segment on.
* damage: every file of a run is cut short, or has a bit flipped: `gradfn verify` names it and no other,
  `--repair` removes it, and the command makes it again.
* others: two writers of one run, readers while a run is written, a run that is moved, 64 open files, a clock
  that jumps, a file system without locks.
* malformed: 300 broken data sets, models, runs, options and configs, in one sentence with status 2.
"""

import argparse
import errno
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lab import (
    DATA,
    JOBS,
    LAB,
    Ended,
    Job,
    Started,
    apart,
    as_nobody,
    changes,
    chunks_of,
    command,
    content,
    damaged,
    example,
    failing_from,
    gradfn,
    grow_disk,
    jumping_clock,
    killed_at,
    left_over,
    on_small_disk,
    segments,
    warm_up,
    without_locks,
)

from gradfn.errors import InputError
from gradfn.store.verify import check_files, files_below


class Row(NamedTuple):
    """A line of the table: what was done, how often, how often all was as promised, what else is known."""

    fault: str
    tries: int
    held: int
    seen: str


class Usual(NamedTuple):
    """A command that nobody disturbs: what it makes, how long it takes, how often it changes a file, how much
    it writes."""

    content: dict[str, str]
    seconds: float
    changes: int
    size: int
    largest: int


@cache
def usual(job: Job) -> Usual:
    run = LAB / "usual"
    job.prepare(run)
    begun = time.monotonic()
    count = changes(run, job.of(run))
    seconds = time.monotonic() - begun
    sizes = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    made = Usual(content(run), seconds, count, sum(sizes), max(sizes))
    shutil.rmtree(run)
    return made


def problems(job: Job, run: Path, *, removed: bool = False) -> list[str]:
    """What is wrong after a disturbance, and after the same command again; none: all is as promised.

    Args:
        removed: whether files were removed, which an index then misses.
    """
    wrong = [f"after the fault: {one}" for one in damaged(run) if not (removed and " is missing: " in one)]
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


def small(asked: argparse.Namespace) -> Iterator[Row]:
    """Let the disk be too small for a run, and then let it grow."""
    chance = random.Random(asked.seed)
    trials = {
        True: Trials("a disk that is too small"),
        False: Trials("files that may not grow (RLIMIT_FSIZE)"),
    }
    for number in range(asked.disks):
        job = [one for one in JOBS if not one.before][number % sum(not one.before for one in JOBS)]
        run, share = LAB / f"small-{number}", chance.uniform(0.05, 0.95)

        def work(job: Job = job, run: Path = run, share: float = share) -> list[Any]:
            return _on_small_disk(job, run, share, mounted=True)

        def limited(job: Job = job, run: Path = run, share: float = share) -> list[Any]:
            return _on_small_disk(job, run, share, mounted=False)

        usual(job)
        for mounted, one in ((True, work), (False, limited)):
            ended = apart(one)
            if ended.result is None:
                trials[mounted].add(job.name, [ended.said[-600:]])
            elif ended.result[0] != "not allowed":
                trials[mounted].add(f"{job.name}, {share:.0%} of its size", ended.result[1])
            shutil.rmtree(run, ignore_errors=True)
    yield from (one.row("one sentence, status 1") for one in trials.values() if one.tries)


def _on_small_disk(job: Job, run: Path, share: float, *, mounted: bool) -> list[Any]:
    """Run a command on a disk with a share of the room that it needs, and then with enough."""
    if mounted:
        try:
            on_small_disk(run, max(1 << 16, int(share * usual(job).size)))
        except OSError:
            return ["not allowed", []]
        ended = command(*job.of(run))
        grow_disk(run, 1 << 30)
    else:
        limit = max(1 << 12, int(share * usual(job).largest))
        bounds = limit, resource.RLIM_INFINITY

        def limited() -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, bounds)
            return gradfn(*job.of(run))

        ended = apart(limited)
    full = any(words in ended.sentence for words in ("free some space", "free space"))
    told = (ended.status == 1 and full) or ended.status == 0
    return ["done", [*([] if told else [f"status {ended.status}: {ended.said[-600:]}"]), *problems(job, run)]]


def closed(asked: argparse.Namespace) -> Iterator[Row]:
    """Let a directory be closed to writing, from the start or from the first segment on."""
    first, later = (
        Trials("a directory that is closed"),
        Trials("a directory that is closed while it is written"),
    )
    for job in (one for one in JOBS if not one.before):
        run = LAB / "closed" / job.name.replace(" ", "-")
        run.parent.mkdir(exist_ok=True)
        run.parent.chmod(0o555)
        ended = apart(lambda job=job, run=run: as_nobody() or gradfn(*job.of(run)))
        told = ended.status == 2 and "may not be written to by this user" in ended.sentence
        first.add(job.name, [] if told and not run.exists() else [f"{ended.status}: {ended.said[-500:]}"])
        run.parent.chmod(0o777)
        ended = failing_from(run, min(8, usual(job).changes), errno.EACCES, job.of(run))
        told = ended.status == 1 and "make the place writable" in ended.sentence
        wrong = [] if told else [f"status {ended.status}: {ended.said[-500:]}"]
        later.add(job.name, wrong + problems(job, run))
        shutil.rmtree(run, ignore_errors=True)
    yield first.row("one sentence, status 2, nothing made")
    yield later.row("one sentence, status 1")


def damage(asked: argparse.Namespace) -> Iterator[Row]:
    """Damage every file of a run in turn."""
    chance = random.Random(asked.seed)
    cuts, flips, mended = (
        Trials("a file that is cut short"),
        Trials("a flipped bit"),
        Trials("`verify --repair`"),
    )
    for job in (one for one in JOBS if one.name in ("build", "hessian", "score", "retrain", "train")):
        run = LAB / "damaged"
        ended = command(*job.of(run))
        assert ended.status == 0, ended.said
        for path in files_below(run):
            whole, places = path.read_bytes(), _places(path)
            for trials in (cuts, flips, flips):
                content = bytearray(whole)
                if trials is cuts:
                    del content[chance.randrange(len(content)) :]
                else:
                    start, size = chance.choice(places)
                    content[start + chance.randrange(size)] ^= 1 << chance.randrange(8)
                path.write_bytes(content)
                named = {str(one.path) for one in check_files(run) if one.wrong}
                trials.add(f"{path.relative_to(run)} of {job.name}", _unlike(named, path, run))
            path.write_bytes(whole)
        for path in chance.sample(paths := files_below(run), min(4, len(paths))):
            path.write_bytes(path.read_bytes()[:-1])
            ended = command("verify", run, "--repair")
            wrong = [] if ended.status == 0 else [f"status {ended.status}: {ended.said[-500:]}"]
            mended.add(f"{path.relative_to(run)} of {job.name}", wrong + problems(job, run, removed=True))
        shutil.rmtree(run)
    yield cuts.row("named by `gradfn verify`")
    yield flips.row("named by `gradfn verify`")
    yield mended.row("the command makes it again")


def _places(path: Path) -> list[tuple[int, int]]:
    """Where the content of a file lies, `(offset, bytes)`: in HDF5 some bytes between are of no meaning."""
    if path.suffix != ".h5":
        return [(0, path.stat().st_size)]
    return chunks_of(path) or [(path.read_bytes().index(b"manifest"), 8)]  # an index that only links


def _unlike(named: set[str], path: Path, run: Path) -> list[str]:
    """What is wrong with the names of damaged files; an index may be named for its segment."""
    others = {one for one in named - {str(path)} if Path(one).parent != run}
    return [] if str(path) in named and not others else [f"named were {sorted(named) or 'none'}"]


def others(asked: argparse.Namespace) -> Iterator[Row]:
    """What the system does: other processes, moves, limits, clocks, locks."""
    job = JOBS[0]
    yield _writers(job, asked.writers)
    yield _readers(job, asked.writers)
    chance = random.Random(asked.seed)
    moved = Trials("a run that is moved between kill and resumption")
    for number in range(asked.writers):
        run, there = LAB / "before", LAB / "moved" / str(number)
        killed_at(run, chance.randint(usual(job).changes // 2, usual(job).changes), job.of(run))
        there.parent.mkdir(exist_ok=True)
        run.rename(there)
        moved.add(f"number {number}", problems(job, there))
    yield moved.row("every path in it is relative")
    for name, prepare in _systems(chance).items():
        trials = Trials(name)
        for one in JOBS:
            run = LAB / "system"
            one.prepare(run)
            ended = apart(lambda one=one, run=run, prepare=prepare: prepare(run) or gradfn(*one.of(run)))
            wrong = [] if ended.status == 0 else [f"status {ended.status}: {ended.said[-600:]}"]
            trials.add(one.name, wrong + problems(one, run))
            shutil.rmtree(run)
        yield trials.row("the same bits")


def _systems(chance: random.Random) -> dict[str, Callable[[Path], None]]:
    few = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return {
        "`ulimit -n 64`": lambda _: resource.setrlimit(resource.RLIMIT_NOFILE, (64, few)),
        "a clock that jumps": lambda _: jumping_clock(chance),
        "a file system without locks (ENOLCK)": lambda run: without_locks(run, errno.ENOLCK),
        "a file system without locks (ENOSYS)": lambda run: without_locks(run, errno.ENOSYS),
    }


def _writers(job: Job, count: int) -> Row:
    """Start a command while the same command writes the run."""
    trials, chance = Trials("a second writer of one run"), random.Random(0)
    for number in range(count):
        run = LAB / "shared"
        with Started(lambda run=run: gradfn(*job.of(run))) as first:
            time.sleep(chance.uniform(0.1, 0.9) * usual(job).seconds)
            second = command(*job.of(run))
        fine = [one.status for one in (first.ended, second)]
        told = all(
            one.status == 0 or "another run is writing" in one.sentence for one in (first.ended, second)
        )
        wrong = [] if told and 0 in fine else [f"{fine}: {first.ended.said[-300:]} {second.said[-300:]}"]
        trials.add(f"number {number}", wrong + problems(job, run))
        shutil.rmtree(run)
    return trials.row("one sentence, status 2, or it finds the run complete")


def _readers(job: Job, count: int) -> Row:
    """Read a run again and again while it is written."""
    trials, seen = Trials("a reader of a run that is being written"), 0
    expected = usual(job).content
    for _ in range(count):
        run, wrong = LAB / "read", []
        with Started(lambda run=run: gradfn(*job.of(run))) as writer:
            while writer.runs():
                seen += 1
                wrong += damaged(run)
                try:
                    made = content(run)
                    wrong += [f"{name} differs" for name, value in made.items() if expected[name] != value]
                except InputError as error:
                    wrong += [] if "unfinished" in str(error) else [str(error)]
        trials.add("while it is written", wrong + problems(job, run))
        shutil.rmtree(run)
    return trials.row(f"read {seen} times: whole rows, or one sentence")


def malformed(asked: argparse.Namespace) -> Iterator[Row]:
    """Give commands what is broken."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from malformed import Given
    from malformed import malformed as make

    store, trials, refused = LAB / "healthy", Trials("a malformed input"), 0
    assert command("build", store, *DATA).status == 0
    given = Given(example.MODEL, example.CORPUS, store)
    for number in range(asked.inputs):
        folder = LAB / f"malformed-{number}"
        folder.mkdir()
        case = make(number, given, folder)
        ended = command(*case.arguments)
        refused += ended.status == 2
        fine = (ended.status == 2 and ended.sentence and not (folder / "run").exists()) or (
            ended.status == 0 and not case.surely
        )
        trials.add(case.what, [] if fine else [f"status {ended.status}: {ended.said[-500:]}"])
        shutil.rmtree(folder)
    yield trials.row(
        f"{refused} refused in one sentence with status 2, the others could be read all the same"
    )


FAULTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "kills": kills, "disk": disk, "small": small, "closed": closed, "damage": damage, "others": others,
    "malformed": malformed,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how often a command is killed")
    parser.add_argument("--writes", type=int, default=12, help="changes of a command that fail, at most")
    parser.add_argument("--disks", type=int, default=18, help="disks that are too small")
    parser.add_argument("--writers", type=int, default=6, help="second writers, readers and moved runs")
    parser.add_argument("--inputs", type=int, default=300, help="malformed inputs")
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
