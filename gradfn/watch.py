"""Who watches long work: nobody, or a command, which shows how far it is."""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

Item = TypeVar("Item")
Progress = Callable[[int], None]
"""Called with the number of tokens (or rows, or blocks) done since the last call."""
Watch = Callable[..., AbstractContextManager[Progress]]
"""`watch(what, total, unit, **how)` gives a context with a progress callback; see `report.progress`."""


class Resumed(int):
    """Work that an earlier process has done, which says nothing of speed."""


def _unwatched(what: str, total: int | None = None, unit: str = "", **how: Any) -> Any:
    return nullcontext(lambda done: None)


WATCH: ContextVar[Watch] = ContextVar("WATCH", default=_unwatched)
"""Who is told of work that begins."""


def watched(what: str, items: Collection[Item], unit: str, **how: Any) -> Iterator[Item]:
    """The items, one after the other; who watches is told when each is done.

    >>> [2 * item for item in watched("doubles", [1, 2], "numbers")]
    [2, 4]
    """
    with WATCH.get()(what, len(items), unit, **how) as progress:
        for item in items:
            yield item
            progress(1)
