"""Lowering: what of a chain runs on the factors, what inside the backward pass, and what after it.

    leading Krons  -> fused into one, applied to the factors before they meet
    then blocks    -> functions of one dense block, run while only that layer is alive
    then rows      -> run after the backward, on all blocks of an example
    a final sum    -> over the rows, inside the backward, where the blocks are the layer's whole gradient

Lowering never changes a result.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.transforms.chain import (
    BlockFn,
    Blockwise,
    Chain,
    Kronecker,
    Rowwise,
    Transform,
    refuse_idle,
    spec_of,
)
from gradfn.transforms.dot import Dot, SelfDot
from gradfn.transforms.normalize import UnitNormalize
from gradfn.transforms.row_sum import FactorSum, RowSum
from gradfn.types import Blocks, BlockSpec

DENSE_ELEMENTS = 1 << 24
"""Numbers of dense gradients of one layer to hold at a time in the backward: 64 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Share:
    """One block's share of a final dot product: the queries' block `[queries, out, in]`; whether to norm."""

    queries: Tensor
    unit: bool


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """What happens to one block.

    Args:
        kron: the fused leading Krons, for the factors.
        inside: functions of the dense block that run in the backward.
        behind: functions of the dense block that must wait until all uses of the weight are summed.
        dense: the block's shape behind the Krons, before `inside`.
        shape: what the backward delivers for one row.
        summed: the shape of what is summed over rows, where the chain ends in a sum; else of its end.
        share: the share of a final dot product, where that is all that runs inside: it may be had from the
            factors, without the dense block.
        total: whether the backward sums over the rows and delivers one.
        merged: whether it may do so first, all that runs inside being linear: no row's dense block is made.
        of_factors: what is made of the factors instead of the dense block, where a statistic is of them.
    """

    kron: Kron
    inside: tuple[BlockFn, ...]
    behind: tuple[BlockFn, ...]
    dense: tuple[int, ...]
    shape: tuple[int, ...]
    summed: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    share: Share | None = None
    total: bool = False
    merged: bool = False
    of_factors: FactorSum | None = None

    def with_matrices(self) -> "BlockPlan":
        """The same, with every map of the Kron written out as a matrix."""
        return replace(self, kron=self.kron.with_matrices(self.dtype, self.device))

    def within(self, G: Tensor) -> Tensor:
        """What runs in the backward on the dense block."""
        return _apply(self.inside, G)

    @property
    def rows_at_once(self) -> int:
        """How many rows' dense blocks to hold at a time, where only what is made of them is kept."""
        most = DENSE_ELEMENTS // max(1, prod(self.dense))
        return max(1, most) if self.inside else sys.maxsize


@dataclass(frozen=True, eq=False)
class Lowered:
    """A chain, lowered for the blocks of a model."""

    plans: dict[str, BlockPlan]
    rows: Callable[[Blocks], Blocks | Tensor]

    def finish(self, blocks: Blocks) -> Blocks | Tensor:
        """What remains after the backward."""
        return self.rows({name: _apply(self.plans[name].behind, G) for name, G in blocks.items()})


def _apply(functions: Iterable[BlockFn], G: Tensor) -> Tensor:
    return reduce(lambda value, function: function(value), functions, G)


@dataclass(frozen=True, eq=False)
class _Partial(Blockwise):
    """The block's share of a final `Dot` or `SelfDot`."""

    dot: Dot | SelfDot

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.dot.linear_shares

    def block(self, name: str, G: Tensor) -> Tensor:
        return self.dot.partial(name, G)


@dataclass(frozen=True, eq=False)
class _Total(Blockwise):
    """The sum over rows of one block, as one row."""

    summed: RowSum

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.summed.linear

    def block(self, name: str, G: Tensor) -> Tensor:
        return self.summed.of(name, G)[None]


def _only_row(blocks: Blocks) -> Blocks:
    return {name: value[0] for name, value in blocks.items()}


def _expanded(transform: Transform) -> tuple[Transform, ...]:
    """The stages of a chain; those that are themselves several stages are taken apart."""
    stages = transform.stages if isinstance(transform, Chain) else (transform,)
    parts = [part for stage in stages for part in (stage.stages() if hasattr(stage, "stages") else (stage,))]  # pyright: ignore
    return tuple(parts)


def _split(
    stages: tuple[Transform, ...],
) -> tuple[tuple[Transform, ...], Callable[[Blocks], Blocks | Tensor]]:
    """Part a chain at its first row stage; final dot products are summed block by block instead."""
    at = next((i for i, stage in enumerate(stages) if isinstance(stage, Rowwise)), len(stages))
    blocks, rows = stages[:at], stages[at:]
    match rows:
        case (Dot() | SelfDot() as last,):
            return (*blocks, _Partial(last)), last.finish
        case (UnitNormalize(), Dot() as last):
            unit = replace(last, unit=True)
            return (*blocks, _Partial(unit)), unit.finish
        case (RowSum() as last,):
            return (*blocks, _Total(last)), _only_row
        case (FactorSum() as last,):
            return (*blocks, last), _only_row
        case (first, *_, FactorSum() as last):
            raise InputError(
                f"{last.noun} is fitted from factors, so {first} cannot come before it: leave it out"
            )
        case (first, *rest) if rest:
            return blocks, _Behind(first, Chain(tuple(rest)))
    return blocks, Chain(rows)


class _Behind:
    """Stages behind one of whole rows: lowered once, for the blocks that it gives first."""

    def __init__(self, first: Transform, rest: Chain):
        self.first, self.rest = first, rest
        self.lowered: Lowered | None = None

    def __call__(self, blocks: Blocks) -> Blocks | Tensor:
        made = self.first(blocks)
        if not isinstance(made, dict):
            raise TypeError(f"{self.first} gives scores, which no stage comes behind")
        if self.lowered is None:
            self.lowered = lower(self.rest, [spec_of(name, G) for name, G in made.items()])
        plans = self.lowered.plans
        return self.lowered.finish(
            {name: plans[name].within(plans[name].kron(G)) for name, G in made.items()}
        )


def lower(transform: Transform, specs: Iterable[BlockSpec], shared: frozenset[str] = frozenset()) -> Lowered:
    """Lower a transform for blocks of the given names and shapes.

    Args:
        transform: a chain or a single transform.
        specs: the blocks of the model.
        shared: blocks whose weight is used more than once in a forward; their gradient is a sum over the
            uses, so only linear stages run in the backward and the rest waits behind it.

    >>> from gradfn.transforms import chain, project, unit_normalize
    >>> plan = lower(chain(project(4), unit_normalize()), [BlockSpec("mlp", (8, 9))]).plans["mlp"]
    >>> plan.kron.right.shape, plan.shape
    (torch.Size([4, 9]), (4, 4))
    """
    block_stages, rows = _split(_expanded(transform))
    acts = [False] * len(block_stages)
    plans = {spec.name: _plan(block_stages, spec, spec.name in shared, acts) for spec in specs}
    if plans:
        refuse_idle(block_stages, acts)
    return Lowered(plans, rows)


def _plan(stages: tuple[Transform, ...], spec: BlockSpec, shared: bool, acts: list[bool]) -> BlockPlan:
    """The plan of one block; `acts` notes which stages change its shape."""
    if stages and isinstance(stages[-1], FactorSum):
        return _factor_plan(stages[:-1], stages[-1], spec, acts)
    kron, inside, behind, is_linear = Kron(), [], [], True
    # An empty batch tells every stage's output shape without any work.
    G = torch.empty(0, *spec.shape, dtype=spec.dtype, device=spec.device)
    before, dense, shape = G.shape, spec.shape, spec.shape
    for number, stage in enumerate(stages):
        function, linear = _bind(stage, spec.name, G)
        before, G = G.shape, function(G)
        acts[number] |= G.shape != before
        is_linear &= linear
        if linear and isinstance(function, Kron) and not inside and not behind:
            kron, dense = function @ kron, tuple(G.shape[1:])
        elif behind or (shared and not linear):
            behind.append(function)
            continue
        else:
            inside.append(function)
        shape = tuple(G.shape[1:])
    last, share = stages[-1] if stages else None, None
    summed = before if isinstance(last, _Total) else G.shape
    if isinstance(last, _Partial) and len(inside) == 1 and not behind and last.dot.weights is None:
        share = _share(last.dot, spec, dense)
    total = isinstance(last, _Total) and not behind
    return BlockPlan(
        kron, tuple(inside), tuple(behind), dense, shape, tuple(summed[1:]), spec.dtype, spec.device, share,
        total, merged=total and is_linear,
    )  # fmt: skip


def _share(last: Dot | SelfDot, spec: BlockSpec, dense: tuple[int, ...]) -> Share:
    if isinstance(last, SelfDot):
        return Share(torch.empty(0, *dense, dtype=spec.dtype, device=spec.device), unit=True)
    queries = last.queries[spec.name].to(spec.device, spec.dtype)
    return Share(queries.view(len(queries), *dense), last.unit)


def _factor_plan(
    stages: tuple[Transform, ...], last: FactorSum, spec: BlockSpec, acts: list[bool]
) -> BlockPlan:
    """A statistic of the factors: only Krons may come before it."""
    kron, (out, into) = Kron(), spec.shape
    for number, stage in enumerate(stages):
        if not isinstance(stage, Kronecker):
            raise InputError(
                f"{last.noun} is fitted from factors, so {stage} cannot come before it: leave it out"
            )
        one, before = stage.kron(replace(spec, shape=(out, into))), (out, into)
        out, into = one(torch.empty(out, into, device=spec.device, dtype=spec.dtype)).shape
        kron, acts[number] = one @ kron, acts[number] or (out, into) != before
    x, g = (torch.empty(0, 1, size, device=spec.device, dtype=spec.dtype) for size in (into, out))
    size = tuple(last.of(x, g, x[..., 0]).shape)
    return BlockPlan(
        kron, (), (), (out, into), size, (out, into), spec.dtype, spec.device, total=True, of_factors=last
    )


def _bind(stage: Transform, name: str, G: Tensor) -> tuple[BlockFn, bool]:
    """A stage as a function of one block, and whether it is linear."""
    if isinstance(stage, Kronecker):
        return stage.kron(spec_of(name, G)), True
    if isinstance(stage, Blockwise):
        return stage.bind(spec_of(name, G)), stage.linear
    raise TypeError(f"{stage} is neither a Kronecker, a Blockwise nor a Rowwise transform")
