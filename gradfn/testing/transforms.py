"""The laws of a transform, on which `lower` and the store rely."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.engine.reference import naive_blocks
from gradfn.testing.models import Draw, seeds
from gradfn.testing.naive import chain_difference, difference
from gradfn.testing.search import first, refute
from gradfn.testing.strategies import Problem, blocks, chains, check_kinds, problems, shapes_of
from gradfn.transforms import Kronecker, Transform, chain
from gradfn.types import Blocks

COPIES = 33
"""Copies of the rows: enough for a transform that works on 32 rows at a time to do so twice."""
Shapes = Mapping[str, tuple[int, int]]
Transforms = Transform | st.SearchStrategy[Transform] | Callable[[Shapes], "Transforms"]
"""A transform, a strategy of them, or a function of the blocks' shapes that gives either."""


@dataclass(frozen=True, eq=False)
class Applied:
    """A transform and the dense blocks that it is applied to."""

    transform: Transform
    blocks: Blocks
    seed: int = field(metadata={"shown": False})


@dataclass(frozen=True, eq=False)
class Lowered(Problem):
    """A problem, and a chain with the transform in it."""

    chain: Transform


def _drawn(draw: Draw, transforms: Transforms, shapes: Shapes) -> Transform:
    if isinstance(transforms, st.SearchStrategy):
        return draw(transforms)
    return transforms if isinstance(transforms, Transform) else _drawn(draw, transforms(shapes), shapes)


@st.composite
def _applied(draw: Draw, transforms: Transforms) -> Applied:
    drawn = draw(blocks())
    return Applied(_drawn(draw, transforms, shapes_of(drawn)), drawn, draw(seeds()))


@st.composite
def _lowered(draw: Draw, transforms: Transforms, kind: str) -> Lowered:
    """The transform between others that fit. Norms of rows may follow anything that gives blocks."""
    problem = draw(problems((kind,)))
    dense = naive_blocks(problem.reference, problem.model, problem.rows)
    before = draw(chains(shapes_of(dense), stages=("project", "adafactor", "adam"), max_stages=2))
    values = before(dense)
    assert isinstance(values, dict)
    transform = _drawn(draw, transforms, shapes_of(values))
    made, values = chain(before, transform), transform(values)
    if isinstance(values, dict):
        dense = all(G.ndim == 3 for G in values.values())
        behind = chains(shapes_of(values), max_stages=2) if dense else chains({}, stages=("unit_normalize",))
        made = chain(made, draw(behind))
    return Lowered(problem.model, problem.loss, problem.reference, problem.rows, made)


def _rows(values: Blocks | Tensor, rows: slice | list[int]) -> Blocks | Tensor:
    return {name: G[rows] for name, G in values.items()} if isinstance(values, dict) else values[rows]


def _finite(values: Blocks | Tensor) -> bool:
    parts = values.values() if isinstance(values, dict) else [values]
    return all(bool(G.isfinite().all()) for G in parts)


def _pure(case: Applied) -> str:
    before = {name: G.clone() for name, G in case.blocks.items()}
    first = case.transform(case.blocks)
    if wrong := difference(case.blocks, before, 0.0):
        return f"it changes the blocks it is given: {wrong}"
    if wrong := difference(case.transform(case.blocks), first, 0.0):
        return f"twice the same blocks give different rows: {wrong}"
    return ""


def _row_by_row(tolerance: float, case: Applied) -> str:
    together = case.transform(case.blocks)
    for row in range(len(next(iter(case.blocks.values())))):
        alone = case.transform({name: G[row : row + 1] for name, G in case.blocks.items()})
        if wrong := difference(alone, _rows(together, slice(row, row + 1)), tolerance):
            return f"rows are not independent: row {row} alone is not what it is among the others: {wrong}"
    try:
        none = case.transform({name: G[:0] for name, G in case.blocks.items()})
    except Exception as error:
        return f"of no rows it does not give no rows: {type(error).__name__}: {error}"
    if wrong := difference(none, _rows(together, slice(0)), tolerance):
        return f"of no rows it does not give no rows: {wrong}"
    many = case.transform({name: torch.cat([G] * COPIES) for name, G in case.blocks.items()})
    copies = [row for _ in range(COPIES) for row in range(len(next(iter(case.blocks.values()))))]
    if wrong := difference(many, _rows(together, copies), tolerance):
        return (
            f"rows are not independent: {COPIES} copies of them do not give {COPIES} times the same: {wrong}"
        )
    return ""


def _dtype(case: Applied) -> str:
    """Most models are float32, but the other laws are checked in float64, where rounding hides nothing."""
    for dtype in (torch.float64, torch.float32):
        try:
            made = case.transform({name: G.to(dtype) for name, G in case.blocks.items()})
        except RuntimeError as error:
            return f"it does not take blocks in {dtype}: {error}: use .to(G) of what it holds"
        for G in made.values() if isinstance(made, dict) else [made]:
            if G.dtype != dtype:
                return f"of blocks in {dtype} it gives {G.dtype}: end with .to(G)"
    return ""


def _zero_is_finite(case: Applied) -> str:
    zeros = {name: torch.zeros_like(G) for name, G in case.blocks.items()}
    return "" if _finite(case.transform(zeros)) else "a gradient of zero gives numbers that are not finite"


def _linear(tolerance: float, case: Applied) -> str:
    T = case.transform
    if not (isinstance(T, Kronecker) or getattr(T, "linear", False)):
        return ""
    generator = torch.Generator().manual_seed(case.seed)
    other = {
        name: torch.randn(G.shape, generator=generator, dtype=G.dtype) for name, G in case.blocks.items()
    }
    mixed = T({name: 2 * G - 3 * other[name] for name, G in case.blocks.items()})
    one, two = T(case.blocks), T(other)
    assert isinstance(one, dict)
    assert isinstance(two, dict)
    wrong = difference(mixed, {name: 2 * G - 3 * two[name] for name, G in one.items()}, tolerance)
    return f"it says that it is linear, but T(2 G - 3 H) is not 2 T(G) - 3 T(H): {wrong}" if wrong else ""


def _settings(case: Applied) -> str:
    T = case.transform
    if not is_dataclass(T) or not T.__dataclass_params__.frozen:  # pyright: ignore[reportAttributeAccessIssue]
        return f"{type(T).__name__} is not a frozen dataclass, so its settings are not its fields"
    try:
        before = json.dumps(T.settings(), sort_keys=True)
    except TypeError as error:
        return f"its settings cannot be stored: {error}: hold plain values and tensors, or write settings()"
    T(case.blocks)
    after = json.dumps(T.settings(), sort_keys=True)
    return "" if before == after else f"using it changes its settings: {before} became {after}"


def _lowering(tolerance: float, case: Lowered) -> str:
    dense = naive_blocks(case.reference, case.model, case.rows)
    got = probe_engine(case.model, case.loss, case.chain)(collate(case.rows)).values
    wrong = chain_difference(got, case.chain, dense, tolerance)
    return (
        f"lowered into the backward it gives other rows than applied to dense blocks: {wrong}"
        if wrong
        else ""
    )


def check_transform(
    transform: Transforms, *, kinds: Sequence[str] = ("mlp", "lm"), tolerance: float = 1e-8
) -> None:
    """Check that a transform may be used anywhere in a chain.

    The laws: it is pure, and the result of a row depends on no other row. A gradient of zero gives finite
    numbers. Rows have the dtype of the blocks. A `Kronecker`, or a transform with `linear = True`, is linear.
    The settings can be stored. And with the transform in a chain with others, `probe_engine` gives the same
    as the chain applied to naive gradients.

    Args:
        transform: a transform that fits blocks of any shape, or a strategy of such transforms; or a function
            of `{block: (out, in)}` that gives either, for one that is fitted to the blocks.
        kinds: the models to try the engine on, see `problems`.
        tolerance: relative to the largest number of a block.

    Raises:
        BrokenLawError: naming the law, with the smallest case that breaks it.
        InputError: no such kind.

    >>> from gradfn.transforms import project
    >>> check_transform(project(2), kinds=("mlp",))
    """
    laws = (
        _zero_is_finite, _pure, _settings, _dtype, partial(_row_by_row, tolerance),
        partial(_linear, tolerance),
    )  # fmt: skip
    check_kinds(kinds)
    refute("check_transform", partial(first, laws), _applied(transform))
    for kind in kinds:
        few = 25 if kind == "mlp" else 8  # language models are slow to build
        refute("check_transform", partial(_lowering, tolerance), _lowered(transform, kind), few)
