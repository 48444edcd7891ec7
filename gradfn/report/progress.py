"""Progress: a bar on a terminal, plain lines elsewhere."""

import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from gradfn.data import Corpus
from gradfn.report.summaries import tokens_of
from gradfn.runs.shards import Shard
from gradfn.watch import Progress as Callback
from gradfn.watch import Resumed

QUIET: ContextVar[bool] = ContextVar("QUIET", default=False)
"""Whether nothing is to be shown."""
FIRST_AFTER_S, PLAIN_EVERY_S = 1.0, 10.0
QUIET_BELOW_S = 2.0
WIDE, WIDEST = 80, 120
"""Columns of a terminal, below which only the share done and the time left are shown, and no numbers."""
NAMED = 20
"""Cells for the time left, below which it stands there alone."""
CROWDED_AFTER_S, CROWDED_EVERY_S = 5.0, 30.0


@contextmanager
def progress_bar(
    label: str, total: int | None = None, unit: str = "tokens", *, then: str = "", longest: int = 0,
    timed: bool = True,
) -> Iterator[Callable[..., None]]:  # fmt: skip
    """A bar with the time left on a terminal; elsewhere a plain line after a second, and every ten seconds.

    Work inside other work has a bar, or lines, of its own, and counts for nothing in the speed of the other.

    Gives `progress(done, said)`: units done since the last call and, if that is told, how the work stands.

    Args:
        total: how many units there are; None: of work of which nothing is known but that it is under way.
        then: what comes after, for which the time left says nothing.
        longest: units of the longest row; rows that long come first, and nothing is done before they are.
        timed: whether units take about as long as each other, so that there is a time left to tell.
    """
    if QUIET.get():
        yield lambda done, said="": None
        return
    work = _Work(label, total, unit, then, longest, timed)
    outer = _SHOWN[-1] if _SHOWN else None
    shown = _Bar(work, outer) if sys.stderr.isatty() else _Lines(work)
    _SHOWN.append(shown)
    try:
        with shown.open():
            yield shown
    finally:
        _SHOWN.remove(shown)
        if outer is not None:
            outer.work.mark = time.monotonic()


def rows_bar(
    label: str, train: Corpus, shard: Shard | None = None, *, passes: int = 1, then: str = ""
) -> AbstractContextManager[Callback]:
    """A bar of the tokens of rows, or of a part of them, in so many passes; see `progress_bar`."""
    total = tokens_of(train, shard) * passes
    return progress_bar(label, total, then=then, longest=int(train.lengths.max()))


def crowded(switches: int, seconds: float, threads: int) -> bool:
    """Whether other programs want the cores on which our threads wait for each other.

    Each thread of a matrix product waits for the slowest, and one that the system has put aside is slow. On
    idle cores the system hardly ever does so.

    Args:
        switches: how often the system took the processor away (`ru_nivcsw`).

    >>> crowded(1000, 10.0, 2), crowded(1000, 10.0, 1), crowded(20, 10.0, 2)
    (True, False, False)
    """
    return threads > 1 and seconds >= CROWDED_AFTER_S and switches > CROWDED_EVERY_S * seconds


class _Crowd:
    """Says once that other programs slow the threads down."""

    def __init__(self, start: float):
        self.start, self.before, self.told = start, _switches(), False

    def look(self, now: float) -> str | None:
        """What to say, if anything."""
        import torch

        seconds, threads = now - self.start, torch.get_num_threads()
        if self.told or not crowded(_switches() - self.before, seconds, threads):
            return None
        self.told = True
        return (
            f"other programs use the cores, on which {threads} threads wait for each other: try --threads 1"
        )


def _switches() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass
class _Work:
    """What is done, how far it is, and the time left at the speed of this process; see `progress_bar`.

    Args:
        done: units, those of an earlier process among them.
        made: units of this process, in `spent` seconds up to `mark`.
        said: how it stands, such as a loss.
    """

    label: str
    total: int | None = None
    unit: str = "tokens"
    then: str = ""
    longest: int = 0
    timed: bool = True
    done: int = 0
    made: int = 0
    spent: float = 0.0
    said: str = ""
    start: float = field(default_factory=lambda: time.monotonic())
    mark: float = 0.0

    def __post_init__(self) -> None:
        self.mark = self.start

    def add(self, done: int, now: float, said: str = "") -> None:
        """Count units that are done by now, and how it stands."""
        self.done, self.said = self.done + done, said
        if not isinstance(done, Resumed):
            self.made, self.spent = self.made + done, self.spent + now - self.mark
        self.mark = now

    @property
    def left(self) -> float | None:
        """Seconds left, or None where nothing is done yet, or nothing says how long the rest takes."""
        known = self.timed and self.total is not None and self.made
        return self.spent * (self.total - self.done) / self.made if known else None  # pyright: ignore

    @property
    def next(self) -> str:
        """What the time left says nothing of: what comes then, and how it stands."""
        return "".join([f", then {self.then}" if self.then else "", f", {self.said}" if self.said else ""])

    def line(self, now: float) -> str:
        """How far it is, in words."""
        seconds = f"{now - self.start:.0f} s"
        if self.total is None:
            return seconds
        if self.left is not None:
            return f"{self.done / self.total:.0%}, {seconds}, about {self.left:.0f} s left{self.next}"
        rows = f", rows of up to {self.longest:,} {self.unit}" if self.longest else ""
        return f"{self.done:,} of {self.total:,} {self.unit}, {seconds}{rows}{self.next}"


class _TimeLeft(ProgressColumn):
    """The time left and what follows, in so many cells; rich's own forgets batches of over half a minute."""

    def __init__(self, cells: int):
        super().__init__(Column(no_wrap=True))
        self.cells = cells

    def render(self, task: Task) -> Text:
        """`eta 0:01:30`, as soon as anything is done."""
        work: _Work = task.fields["work"]
        left = "-:--:--" if work.left is None else str(datetime.timedelta(seconds=round(work.left)))
        follows = work.next if self.cells >= NAMED else ""
        text = Text(f"eta {left}{follows}" if work.timed and work.total is not None else "")
        text.truncate(self.cells, overflow="ellipsis")
        return text


class _Bar:
    """A bar on a terminal; inside other work it is one more line below the bar of that."""

    def __init__(self, work: _Work, outer: "_Bar | _Lines | None"):
        self.work, self.crowd = work, _Crowd(work.start)
        self.bar = outer.bar if isinstance(outer, _Bar) else None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Show it, and remove it at the end."""
        if self.bar is not None:
            with self._task(self.bar):
                yield
            return
        console = Console(stderr=True)
        with (
            Progress(*_columns(console.width), console=console, transient=True) as self.bar,
            self._task(self.bar),
        ):
            yield

    @contextmanager
    def _task(self, bar: Progress) -> Iterator[None]:
        self.task = bar.add_task(self.work.label, total=self.work.total, work=self.work)
        yield
        bar.remove_task(self.task)

    def __call__(self, done: int, said: str = "") -> None:
        assert self.bar is not None
        self.work.add(done, now := time.monotonic(), said)
        self.bar.advance(self.task, done)
        if slow := self.crowd.look(now):
            self.bar.console.print(f"note: {slow}")


class _Number(ProgressColumn):
    """What is done of the whole, as `part` says it; nothing where the whole is not known."""

    def __init__(self, part: str):
        super().__init__(Column(no_wrap=True))
        self.part = part

    def render(self, task: Task) -> Text:
        """The text."""
        return Text("" if task.total is None else self.part.format(task=task, work=task.fields["work"]))


def _columns(width: int) -> list[ProgressColumn]:
    """What a bar says on a terminal of a width: always the share done and the time left."""
    name = TextColumn(
        "{task.description}",
        table_column=Column(no_wrap=True, overflow="ellipsis", max_width=max(8, width - 18)),
    )
    share, elapsed = _Number("{task.percentage:>3.0f}%"), TimeElapsedColumn(Column(no_wrap=True))
    if width < WIDE:
        return [name, share, _TimeLeft(max(11, width - 22))]
    numbers = [_Number("{task.completed:,.0f}/{task.total:,.0f} {work.unit}")] if width >= WIDEST else []
    bar = BarColumn(30 if numbers else 10)
    return [name, bar, share, *numbers, elapsed, _TimeLeft(width - 34)]


class _Lines:
    """Lines for logs: how far, how long it took, how long it will take."""

    def __init__(self, work: _Work):
        self.work, self.crowd, self.ended = work, _Crowd(work.start), threading.Event()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Print lines from a thread, since a batch may take minutes, and one at the end."""
        threading.Thread(target=self._tell, daemon=True).start()
        try:
            yield
        finally:
            self.ended.set()
        work, seconds = self.work, time.monotonic() - self.work.start
        if seconds >= QUIET_BELOW_S:
            self._line(f"{work.done:,} {work.unit} in {seconds:.1f} s" if work.total else f"{seconds:.1f} s")

    def _tell(self) -> None:
        pause = FIRST_AFTER_S
        while not self.ended.wait(min(pause, threading.TIMEOUT_MAX)):
            pause = PLAIN_EVERY_S
            if _SHOWN[-1:] == [self]:  # else what is done inside is told of
                self._line(self.work.line(time.monotonic()))

    def __call__(self, done: int, said: str = "") -> None:
        self.work.add(done, now := time.monotonic(), said)
        if slow := self.crowd.look(now):
            self._line(f"note: {slow}")

    def _line(self, text: str) -> None:
        print(f"{self.work.label}: {text}", file=sys.stderr, flush=True)


_SHOWN: list[_Bar | _Lines] = []
"""What is under way, the innermost last."""
