"""Progress: a bar on a terminal, plain lines elsewhere."""

import datetime
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

PLAIN_EVERY_S = 10.0
QUIET_BELOW_S = 2.0
RESUMED_WITHIN_S = 0.5


@contextmanager
def progress_bar(label: str, total: int, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """A bar with the time left on a terminal; elsewhere a plain line every ten seconds."""
    if sys.stderr.isatty():
        pace = _Pace(total)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                   TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit), TimeElapsedColumn(),
                   _TimeLeft(pace))  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)

            def advance(done: int) -> None:
                pace.add(done, time.monotonic())
                bar.advance(task, done)

            yield advance
        return
    lines = _PlainProgress(label, total, unit)
    yield lines
    lines.close()


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
        self.last = self.pace.start

    def __call__(self, done: int) -> None:
        now, pace = time.monotonic(), self.pace
        pace.add(done, now)
        left = pace.left(now)
        if now - self.last >= PLAIN_EVERY_S and left is not None and pace.done < pace.total:
            self.last = now
            self._line(f"{pace.done / pace.total:.0%}, {now - pace.start:.0f} s, about {left:.0f} s left")

    def close(self) -> None:
        elapsed = time.monotonic() - self.pace.start
        if elapsed >= QUIET_BELOW_S:
            self._line(f"{self.pace.done:,} {self.unit} in {elapsed:.1f} s")

    def _line(self, text: str) -> None:
        print(f"{self.label}: {text}", file=sys.stderr, flush=True)
