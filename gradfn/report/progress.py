"""Progress: a bar on a terminal, plain lines elsewhere."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

QUIET: ContextVar[bool] = ContextVar("QUIET", default=False)
"""Whether nothing is to be shown."""
PLAIN_EVERY_S = 10.0
QUIET_BELOW_S = 2.0
RESUMED_WITHIN_S = 0.5
WIDE = 80
"""Columns of a terminal, below which only the share done and the time left are shown."""
CROWDED_AFTER_S, CROWDED_EVERY_S = 5.0, 30.0


@contextmanager
def progress_bar(label: str, total: int, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """A bar with the time left on a terminal; elsewhere a plain line every ten seconds."""
    if QUIET.get():
        yield lambda done: None
        return
    if sys.stderr.isatty():
        pace = _Pace(total)
        console = Console(stderr=True)
        name, done = TextColumn("{task.description}"), TaskProgressColumn()
        numbers = TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
        wide = (BarColumn(), done, numbers, TimeElapsedColumn()) if console.width >= WIDE else (done,)
        columns: tuple[ProgressColumn, ...] = (name, *wide, _TimeLeft(pace))
        with Progress(*columns, console=console, transient=True) as bar:
            task, crowd = bar.add_task(label, total=total), _Crowd(pace.start)

            def advance(done: int) -> None:
                pace.add(done, now := time.monotonic())
                bar.advance(task, done)
                if said := crowd.look(now):
                    bar.console.print(f"note: {said}")

            yield advance
        return
    lines = _PlainProgress(label, total, unit)
    yield lines
    lines.close()


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


class _Pace:
    """How far, and how long it will take at the speed so far.

    What is reported in the first moment was there already, of a run that resumes, and says nothing of speed.
    """

    def __init__(self, total: int):
        self.total, self.done, self.given, self.start = total, 0, 0, time.monotonic()

    def add(self, done: int, now: float) -> None:
        self.done += done
        if now - self.start < RESUMED_WITHIN_S:
            self.given += done

    def left(self, now: float) -> float | None:
        """Seconds left, or None where nothing is done yet."""
        made = self.done - self.given
        return (now - self.start) * (self.total - self.done) / made if made else None


class _TimeLeft(ProgressColumn):
    """The time left; rich's own column forgets batches that took longer than half a minute."""

    def __init__(self, pace: _Pace):
        super().__init__()
        self.pace = pace

    def render(self, task: Task) -> Text:
        """`eta 0:01:30`, as soon as anything is done."""
        left = self.pace.left(time.monotonic())
        return Text("eta -:--:--" if left is None else f"eta {datetime.timedelta(seconds=round(left))}")


class _PlainProgress:
    """Lines for logs: how far, how long it took, how long it will take."""

    def __init__(self, label: str, total: int, unit: str):
        self.label, self.unit, self.pace = label, unit, _Pace(total)
        self.last, self.crowd = self.pace.start, _Crowd(self.pace.start)

    def __call__(self, done: int) -> None:
        now, pace = time.monotonic(), self.pace
        pace.add(done, now)
        left = pace.left(now)
        if said := self.crowd.look(now):
            self._line(f"note: {said}")
        if now - self.last >= PLAIN_EVERY_S and left is not None and pace.done < pace.total:
            self.last = now
            self._line(f"{pace.done / pace.total:.0%}, {now - pace.start:.0f} s, about {left:.0f} s left")

    def close(self) -> None:
        elapsed = time.monotonic() - self.pace.start
        if elapsed >= QUIET_BELOW_S:
            self._line(f"{self.pace.done:,} {self.unit} in {elapsed:.1f} s")

    def _line(self, text: str) -> None:
        print(f"{self.label}: {text}", file=sys.stderr, flush=True)
