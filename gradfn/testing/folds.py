"""The laws of a fold: any partition of the rows, in any order, gives the same statistic."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from gradfn.statistics.fold import Fold
from gradfn.testing.models import Draw
from gradfn.testing.naive import difference
from gradfn.testing.search import first, refute
from gradfn.testing.strategies import blocks
from gradfn.types import Blocks


@dataclass(frozen=True, eq=False)
class Parted:
    """Rows of blocks, cut in three chunks (of at least one row), and an order of the chunks."""

    fold: Fold[Any, Any]
    blocks: Blocks
    cuts: tuple[int, int]
    order: tuple[int, int, int]

    def chunks(self) -> list[Blocks]:
        """The rows of each chunk."""
        first, second = self.cuts
        spans = (slice(0, first), slice(first, second), slice(second, None))
        return [{name: G[span] for name, G in self.blocks.items()} for span in spans]


@st.composite
def _parted(draw: Draw, fold: Any, rows: st.SearchStrategy[Blocks]) -> Parted:
    drawn = draw(rows)
    if copies := draw(st.sampled_from([1, 24])) - 1:  # a fold may take some rows at a time
        drawn = {name: torch.cat([G, *[G] * copies]) for name, G in drawn.items()}
    count = len(next(iter(drawn.values())))
    first = draw(st.integers(1, count - 2))
    fold = draw(fold) if isinstance(fold, st.SearchStrategy) else fold
    order = draw(st.permutations(range(3)))
    return Parted(fold, drawn, (first, draw(st.integers(first + 1, count - 1))), tuple(order))


def _leaves(value: Any, path: str = "result") -> dict[str, Any]:
    """Every tensor and plain value inside dataclasses, mappings and sequences, by its path."""
    if isinstance(value, dict):
        parts = {f"{path}[{key!r}]": item for key, item in value.items()}
    elif isinstance(value, tuple | list):
        parts = {f"{path}[{i}]": item for i, item in enumerate(value)}
    elif is_dataclass(value) and not isinstance(value, type):
        parts = {f"{path}.{field.name}": getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, np.ndarray):
        return {path: torch.from_numpy(value)}
    else:
        return {path: value}
    return {name: leaf for inner, item in parts.items() for name, leaf in _leaves(item, inner).items()}


def _unlike(got: Any, want: Any, tolerance: float) -> str:
    got, want = _leaves(got), _leaves(want)
    if list(got) != list(want):
        return f"it has {list(got)} instead of {list(want)}"
    for path, expected in want.items():
        if isinstance(expected, Tensor) and isinstance(got[path], Tensor):
            if wrong := difference({path: got[path]}, {path: expected}, tolerance):
                return wrong
        elif isinstance(expected, float):
            if not abs(got[path] - expected) <= tolerance * abs(expected) + 1e-13:
                return f"{path}: {got[path]} instead of {expected}"
        elif got[path] != expected:
            return f"{path}: {got[path]} instead of {expected}"
    return ""


def _chunking(case: Parted) -> tuple[Any, Any]:
    fold = case.fold
    return reduce(fold.update, case.chunks(), fold.init()), fold.update(fold.init(), case.blocks)


def _states(case: Parted) -> list[Any]:
    chunks = case.chunks()
    return [case.fold.update(case.fold.init(), chunks[i]) for i in case.order]


def _merging(case: Parted) -> tuple[Any, Any]:
    return reduce(case.fold.merge, _states(case)), case.fold.update(case.fold.init(), case.blocks)


def _associative(case: Parted) -> tuple[Any, Any]:
    (a, b, c), (d, e, f), merge = _states(case), _states(case), case.fold.merge
    return merge(a, merge(b, c)), merge(merge(d, e), f)


def _commutative(case: Parted) -> tuple[Any, Any]:
    (a, b, _), (d, e, _) = _states(case), _states(case)
    return case.fold.merge(b, a), case.fold.merge(d, e)


def _neutral(before: bool) -> Callable[[Parted], tuple[Any, Any]]:
    def law(case: Parted) -> tuple[Any, Any]:
        fold = case.fold
        state, same = (fold.update(fold.init(), case.blocks) for _ in range(2))
        return fold.merge(fold.init(), state) if before else fold.merge(state, fold.init()), same

    return law


def _untouched(use: Callable[[Fold, Any, Any, Blocks], Any], which: int = 0) -> Callable[[Parted], Any]:
    """A law: one of two states, each of one chunk, must not change when it is used."""

    def law(case: Parted) -> tuple[Any, Any]:
        (a, b, _), (c, d, _) = _states(case), _states(case)
        use(case.fold, a, b, case.blocks)
        return (a, c) if which == 0 else (b, d)

    return law


_LAWS: dict[str, Callable[[Parted], tuple[Any, Any]]] = {
    "chunks one after the other are not all rows at once": _chunking,
    "chunks merged are not all rows at once": _merging,
    "merge is not associative": _associative,
    "merge is not commutative": _commutative,
    "merge(init(), state) is not the state": _neutral(before=True),
    "merge(state, init()) is not the state": _neutral(before=False),
    "update changes the state it is given": _untouched(lambda fold, a, b, rows: fold.update(a, rows)),
    "merge changes the first state": _untouched(lambda fold, a, b, rows: fold.merge(a, b)),
    "merge changes the second state": _untouched(lambda fold, a, b, rows: fold.merge(a, b), which=1),
    "finalize changes the state it is given": _untouched(lambda fold, a, b, rows: fold.finalize(a)),
}


def _rows_untouched(case: Parted) -> str:
    before = {name: G.clone() for name, G in case.blocks.items()}
    case.fold.update(case.fold.init(), case.blocks)
    wrong = difference(case.blocks, before, 0.0)
    return f"update changes the rows it is given: {wrong}" if wrong else ""


def _broken(tolerance: float, name: str, case: Parted) -> str:
    got, want = (case.fold.finalize(state) for state in _LAWS[name](case))
    wrong = _unlike(got, want, tolerance)
    return f"{name}: {wrong}" if wrong else ""


def check_fold(fold: Any, *, rows: st.SearchStrategy[Blocks] | None = None, tolerance: float = 1e-6) -> None:
    """Check that a statistic depends only on the rows, not on how they are cut or in which order they come.

    Then chunks, resumed runs and shards all give the same. States are compared by the result of `finalize`.

    Args:
        fold: a fold, or a strategy of folds.
        rows: a strategy of arguments for `update`, three rows or more; None is dense blocks of any shape.
        tolerance: relative to the largest number of each tensor; most results are float32.

    Raises:
        BrokenLawError: naming the law, with the smallest case that breaks it.

    >>> from gradfn.statistics.moments import adam_moments
    >>> check_fold(adam_moments())
    """
    laws = [_rows_untouched, *(partial(_broken, tolerance, name) for name in _LAWS)]
    cases = _parted(fold, blocks(min_rows=3, max_rows=6) if rows is None else rows)
    refute("check_fold", partial(first, laws), cases)
