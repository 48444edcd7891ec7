"""Where faults are made: commands in processes of their own, what they wrote, and calls that fail.

The first process imports everything once. Every command is a fork of it, so that one takes a second or two.
"""

import ctypes
import fcntl
import hashlib
import io
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAB = Path(tempfile.mkdtemp(prefix="gradfn-lab-"))
LAB.chmod(0o755)
os.environ |= {"HF_HOME": str(LAB / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

import h5py  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402, F401

import gradfn.train.kept as kept_module  # noqa: E402
from gradfn import example  # noqa: E402
from gradfn.cli import main  # noqa: E402
from gradfn.store import file as file_module  # noqa: E402
from gradfn.store import open_store  # noqa: E402
from gradfn.store.verify import check_files  # noqa: E402

CALLS = ("fsync", "replace", "link", "unlink", "rmdir", "mkdir")
"""What changes files, beside writing."""
TIMES = re.compile("seconds$")
"""Arrays that say how long something took, which is never the same twice."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        status: the exit status; of one that was killed the signal, negative.
        said: what it printed.
        result: what its work returned; None: it was killed.
    """

    status: int
    said: str
    result: Any

    @property
    def sentence(self) -> str:
        """The sentence of a command that was refused; "" where there is another number of lines."""
        lines = [line for line in self.said.splitlines() if line.startswith("gradfn: ")]
        return lines[0] if len(lines) == 1 and "Traceback" not in self.said else ""


def apart(work: Callable[[], Any], kill_after: float | None = None) -> Ended:
    """Do some work in a process of its own, which may be killed after some seconds."""
    with tempfile.TemporaryFile() as said:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(read)
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
            _work(work, write)
        os.close(write)
        if kill_after is not None and not select.select([read], [], [], kill_after)[0]:
            os.kill(child, signal.SIGKILL)
        with open(read, "rb") as pipe:
            result = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return Ended(status, said.read().decode(errors="replace"), json.loads(result) if result else None)


def _work(work: Callable[[], Any], write: int) -> None:
    """The life of a child; what it returns goes through the pipe."""
    status = 1
    try:
        result = work()
        status = result if type(result) is int else 0
        os.write(write, json.dumps(result).encode())
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def gradfn(*arguments: Any) -> int:
    """Run a command in this process; its exit status."""
    sys.argv = ["gradfn", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def command(*arguments: Any, kill_after: float | None = None) -> Ended:
    """Run a command in a process of its own."""
    return apart(lambda: gradfn(*arguments), kill_after)


class Started:
    """Some work in a process of its own that goes on beside this one; when the context ends, so has it."""

    ended: Ended

    def __init__(self, work: Callable[[], Any]):
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        self.child = os.fork()
        if self.child == 0:
            for stream in (1, 2):
                os.dup2(self.said.fileno(), stream)
            _work(work, os.open(os.devnull, os.O_WRONLY))

    def __enter__(self) -> "Started":
        return self

    def runs(self) -> bool:
        """Whether it still goes on."""
        return os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def __exit__(self, *_: object) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        self.said.seek(0)
        self.ended = Ended(status, self.said.read().decode(errors="replace"), None)


# --- commands


@dataclass(frozen=True)
class Job:
    """A command that writes a run.

    Args:
        name: in the table.
        arguments: of the command; RUN stands for its run.
        before: commands that come first, and are not disturbed.
    """

    name: str
    arguments: tuple[Any, ...]
    before: tuple[tuple[Any, ...], ...] = ()

    def prepare(self, run: Path) -> None:
        """Do what comes first; once, and then by a copy."""
        if not self.before:
            return
        ready = LAB / f"before-{self.name.replace(' ', '-')}"
        if not ready.exists():
            for arguments in self.before:
                ended = command(*_of(arguments, ready))
                assert ended.status == 0, ended.said
        shutil.copytree(ready, run, symlinks=True)

    def of(self, run: Path) -> list[Any]:
        """The arguments for a run."""
        return _of(self.arguments, run)


def _of(arguments: tuple[Any, ...], run: Path) -> list[Any]:
    return [str(one).replace("RUN", str(run)) for one in arguments]


CPU = ("--device", "cpu", "--threads", 1)
DATA = ("--model", example.MODEL, "--dataset", example.CORPUS, "--split", "train[:24]", *CPU)
SMALL = ("--token-batch-size", 8)  # of which 64 are a segment
ASK = ("--query", example.QUERIES, "--query-split", "train[:2]")
STEPS = ("--epochs", 2, "--batch-size", 4, "--save-every", 4)
SHARDS = [
    (name, "RUN", *DATA, *SMALL, "--shard", f"{number}/2")
    for name in ("build", "hessian")
    for number in (1, 2)
]
JOBS = (
    Job("build", ("build", "RUN", *DATA, *SMALL)),
    Job("hessian", ("hessian", "RUN", *DATA, "--method", "ekfac")),
    Job("score", ("score", "RUN", *DATA, *ASK, *SMALL, "--method", "logra")),
    Job("retrain", ("retrain", "RUN", *DATA, *ASK, "--subsets", 4, "--seeds", 1, "--epochs", 1)),
    Job("train", ("train", "RUN", *DATA, *STEPS)),
    Job("merge", ("merge", "RUN"), tuple(SHARDS)),
    Job("train --record", ("train", "RUN", *DATA, *STEPS, "--record", "RUN/recorded")),
    Job("score --method magic",
        ("score", "RUN/scores", "--training", "RUN", *ASK, "--method", "magic", *CPU),
        (("train", "RUN", *DATA, *STEPS),)),
)  # fmt: skip


# --- what a run holds


def content(run: Path) -> dict[str, str]:
    """Digests of all that a run holds: every array, and every file of checkpoints; but of no times."""
    found = {}
    for path in sorted(run.rglob("*.h5")):
        if path.parent.name != "segments":
            found |= {f"{path.relative_to(run)} {name}": value for name, value in _arrays(path).items()}
    for path in sorted(run.glob("checkpoint-*/*")):
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(run.glob("*.csv")):
        found[path.name] = str([_untimed(line) for line in path.read_text().splitlines()])
    return found


def _untimed(line: str) -> list[str]:
    cells = line.split(",")
    return cells[:7] + cells[8:]  # the seconds of a step


def _arrays(path: Path) -> dict[str, str]:
    if "shards" in path.parts:
        return {"": hashlib.sha256(path.read_bytes()).hexdigest()}
    store = open_store(path)
    arrays = {name: store.read(name) for name in store.names()}
    arrays |= {name: store.index_array(name) for name in store.header.index_arrays}
    return {name: _digest(array) for name, array in arrays.items() if not TIMES.search(name)}


def _digest(array: Any) -> str:
    content = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
    return f"{array.dtype} {array.shape} {hashlib.sha256(content).hexdigest()}"


def chunks_of(path: Path) -> list[tuple[int, int]]:
    """Where the data of the arrays of a file lies: `(offset, bytes)`."""
    found: list[tuple[int, int]] = []

    def visit(_: str, one: Any) -> None:
        if not isinstance(one, h5py.Dataset):
            return
        if not one.chunks and (offset := one.id.get_offset()) is not None:
            found.append((offset, one.nbytes))
        if one.chunks:
            chunks = (one.id.get_chunk_info(number) for number in range(one.id.get_num_chunks()))
            found.extend((chunk.byte_offset, chunk.size) for chunk in chunks)

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def damaged(run: Path) -> list[str]:
    """What `gradfn verify` says is wrong with a run, if it is one."""
    return [one.wrong for one in check_files(run) if one.wrong] if [*run.rglob("*.h5")] else []


def left_over(run: Path) -> list[str]:
    """Files of a process that is gone."""
    hidden = (str(path.relative_to(run)) for path in run.rglob(".*"))
    return [name for name in hidden if not name.endswith(".lock")]


def segments(run: Path) -> int:
    """How many segments a run has."""
    return len([*run.rglob("segments/*.h5")])


# --- calls that change files


def at_each_change(run: Path, reached: Callable[[int, Callable[[], Any] | None], None]) -> Callable[[], int]:
    """Call `reached` before each call that changes a file of a run, with its number; gives their count.

    Of a write it is given also what writes the first half.
    """
    numbers, count = itertools.count(1), 0

    def one(half: Callable[[], Any] | None = None) -> None:
        nonlocal count
        count = next(numbers)
        reached(count, half)

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            view = memoryview(data).cast("B")
            one(lambda: super(Raw, self).write(view[: len(view) // 2]))
            return super().write(view)

    class Sink(file_module._Sink, Raw):
        pass

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **options: Any) -> Any:
            if _is_below(run, args[0]):
                one()
            return call(*args, **options)

        return changed

    for name in CALLS:
        setattr(os, name, before(getattr(os, name)))
    file_module._Sink = Sink  # pyright: ignore[reportAttributeAccessIssue]
    kept_module.SECONDS = 0.0
    return lambda: count


def _is_below(run: Path, named: Any) -> bool:
    path = os.readlink(f"/proc/self/fd/{named}") if isinstance(named, int) else os.fspath(named)
    return not os.path.isabs(path) or path.startswith(str(run))


def killed_at(run: Path, number: int, arguments: list[Any]) -> Ended:
    """Run a command that is killed just before it changes a file for the nth time, or halfway in a write."""

    def reached(count: int, half: Callable[[], Any] | None) -> None:
        if count == number:
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        at_each_change(run, reached)
        return gradfn(*arguments)

    return apart(work)


def failing_from(run: Path, number: int, code: int, arguments: list[Any], times: int = 1 << 30) -> Ended:
    """Run a command whose nth change of a file fails, and those after it, as on a disk that is full."""

    def reached(count: int, half: Callable[[], Any] | None) -> None:
        if number <= count < number + times:
            if half is not None:
                half()
            raise OSError(code, os.strerror(code))

    def work() -> int:
        at_each_change(run, reached)
        return gradfn(*arguments)

    return apart(work)


def changes(run: Path, arguments: list[Any]) -> int:
    """How often a command changes files of its run."""

    def work() -> list[int]:
        count = at_each_change(run, lambda *_: None)
        return [gradfn(*arguments), count()]

    ended = apart(work)
    assert ended.result is not None, ended.said
    assert ended.result[0] == 0, ended.said
    return ended.result[1]


def warm_up() -> None:
    """Import here what commands import, so that a fork need not."""
    torch.set_num_threads(1)
    said, sys.stdout = sys.stdout, io.StringIO()
    try:
        gradfn("score", *DATA, *ASK, "--method", "ekfac", "--quiet")
        gradfn("train", LAB / "warm", *DATA, "--epochs", 1, "--batch-size", 24, "--quiet")
    finally:
        sys.stdout = said


# --- a disk, and a system


CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def on_small_disk(run: Path, size: int) -> None:
    """Give this process a disk of so many bytes at the place of a run, which no other process sees.

    Raises:
        OSError: this machine does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    run.mkdir(parents=True, exist_ok=True)
    alone = CLONE_NEWNS | (0 if os.getuid() == 0 else CLONE_NEWUSER)
    for call in (
        lambda: libc.unshare(alone),
        lambda: libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None),  # what is mounted here stays here
        lambda: libc.mount(b"tmpfs", str(run).encode(), b"tmpfs", 0, f"size={size}".encode()),
    ):
        if call() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def grow_disk(run: Path, size: int) -> None:
    """Make the disk of this process larger."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(run).encode(), b"tmpfs", 0x20, f"size={size}".encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def as_nobody() -> None:
    """Give up the rights of root, which no permission stops."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def jumping_clock(chance: random.Random) -> None:
    """Let the time of day jump by up to a year, back or forth, at each look at it."""
    real = time.time
    time.time = lambda: real() + chance.uniform(-3e7, 3e7)


def without_locks(run: Path, code: int) -> None:
    """Let the file system of a run have no locks."""
    real = fcntl.flock

    def flock(file: Any, how: int) -> None:
        if _is_below(run, file if isinstance(file, int) else file.fileno()):
            raise OSError(code, os.strerror(code))
        real(file, how)

    fcntl.flock = flock
