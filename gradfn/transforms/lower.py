"""Lowering: which stages of a chain run on the factors, which inside the backward pass, and which after it.

    leading Krons  -> fused into one, which acts on the factors before they are multiplied
    then blocks    -> functions of one dense block, which run while only that layer's gradient is in memory
    then rows      -> run after the backward pass, on all blocks of an example
    a final sum    -> over rows, inside the backward pass, if every block there is the whole gradient

Lowering never changes a result.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
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

Seen = list[list[tuple[Sequence[int], Sequence[int]]]]
"""For each stage the shape of every block before and after it."""
DENSE_ELEMENTS = 1 << 24
"""How many numbers of one layer's dense blocks the backward pass holds at a time: 64 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Share:
    """One block's share of a final dot product: the queries `[queries, out, in]`, and whether to norm."""

    queries: Tensor
    unit: bool


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The stages of a chain for one block.

    Args:
        kron: the leading Krons as one, for the factors.
        inside: functions of the dense block that run in the backward pass.
        behind: functions of the dense block that run when all uses of the weight are added up.
        dense: the shape of the block after `kron`, before `inside`.
        shape: what the backward pass delivers for one row.
        summed: the shape of what a final sum over rows adds up; without one, the shape at the chain's end.
        share: the block's share of a final dot product, if nothing else runs inside. The factors may give it
            without the dense block.
        linear: whether all functions inside are linear, so that parts of a gradient may be added up after
            them.
        reduces: whether the backward pass sums over rows and delivers one.
        reduces_first: whether it may sum before `inside`, so that no dense block of a row is needed.
        of_factors: the statistic to make of the factors instead of the dense block.
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
    linear: bool = True
    reduces: bool = False
    reduces_first: bool = False
    of_factors: FactorSum | None = None

    def with_matrices(self) -> "BlockPlan":
        """The same plan with every map of the Kron as a matrix."""
        return replace(self, kron=self.kron.with_matrices(self.dtype, self.device))

    def within(self, G: Tensor) -> Tensor:
        """Apply what runs in the backward pass on the dense block."""
        return _apply(self.inside, G)

    @property
    def rows_at_once(self) -> int:
        """How many rows' dense blocks the backward pass holds at a time, if functions inside reduce them."""
        most = DENSE_ELEMENTS // max(1, prod(self.dense))
        return max(1, most) if self.inside else sys.maxsize


@dataclass(frozen=True, eq=False)
class Lowered:
    """A chain that is lowered for the blocks of a model."""

    plans: dict[str, BlockPlan]
    rows: Callable[[Blocks], Blocks | Tensor]

    def finish(self, blocks: Blocks) -> Blocks | Tensor:
        """Apply what remains after the backward pass."""
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
class _ReduceRows(Blockwise):
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
    """The stages of a chain, with a stage that stands for several replaced by these."""
    stages = transform.stages if isinstance(transform, Chain) else (transform,)
    parts = [part for stage in stages for part in (stage.stages() if hasattr(stage, "stages") else (stage,))]  # pyright: ignore
    return tuple(parts)


def _split(
    stages: tuple[Transform, ...],
) -> tuple[tuple[Transform, ...], Callable[[Blocks], Blocks | Tensor]]:
    """Split a chain before its first row stage; a final dot product or sum becomes a stage of each block."""
    at = next((i for i, stage in enumerate(stages) if isinstance(stage, Rowwise)), len(stages))
    blocks, rows = stages[:at], stages[at:]
    match rows:
        case (Dot() | SelfDot() as last,):
            return (*blocks, _Partial(last)), last.finish
        case (UnitNormalize(), Dot() as last):
            unit = replace(last, unit=True)
            return (*blocks, _Partial(unit)), unit.finish
        case (RowSum() as last,):
            return (*blocks, _ReduceRows(last)), _only_row
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
    """Stages after one of whole rows: lowered at the first call, for the blocks that it gives."""

    def __init__(self, first: Transform, rest: Chain):
        self.first, self.rest = first, rest
        self.lowered: Lowered | None = None

    def __call__(self, blocks: Blocks) -> Blocks | Tensor:
        made = self.first(blocks)
        if not isinstance(made, dict):
            raise TypeError(f"{self.first} gives scores, so no stage can follow it")
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
        shared: blocks whose weight is used more than once in a forward pass. Their gradient is a sum over
            the uses, so only linear stages run inside the backward pass.

    >>> from gradfn.transforms import chain, project, unit_normalize
    >>> plan = lower(chain(project(4), unit_normalize()), [BlockSpec("mlp", (8, 9))]).plans["mlp"]
    >>> plan.kron.right.shape, plan.shape
    (torch.Size([4, 9]), (4, 4))
    """
    block_stages, rows = _split(_expanded(transform))
    seen: Seen = [[] for _ in block_stages]
    plans = {spec.name: _plan(block_stages, spec, spec.name in shared, seen) for spec in specs}
    refuse_idle(block_stages, seen)
    return Lowered(plans, rows)


def _plan(stages: tuple[Transform, ...], spec: BlockSpec, shared: bool, seen: Seen) -> BlockPlan:
    """The plan of one block; `seen` notes its shape before and after each stage."""
    if stages and isinstance(stages[-1], FactorSum):
        return _factor_plan(stages[:-1], stages[-1], spec, seen)
    kron, inside, behind, all_linear, inside_linear = Kron(), [], [], True, True
    # An empty batch gives the output shape of every stage at no cost.
    G = torch.empty(0, *spec.shape, dtype=spec.dtype, device=spec.device)
    before, dense, shape = G.shape, spec.shape, spec.shape
    for number, stage in enumerate(stages):
        function, linear = _bind(stage, spec.name, G)
        before, G = G.shape, function(G)
        seen[number].append((before[1:], G.shape[1:]))
        all_linear &= linear
        if linear and isinstance(function, Kron) and not inside and not behind:
            kron, dense = function @ kron, tuple(G.shape[1:])
        elif behind or (shared and not linear):
            behind.append(function)
            continue
        else:
            inside.append(function)
            inside_linear &= linear
        shape = tuple(G.shape[1:])
    last, share = stages[-1] if stages else None, None
    summed = before if isinstance(last, _ReduceRows) else G.shape
    if isinstance(last, _Partial) and len(inside) == 1 and not behind and last.dot.weights is None:
        share = _share(last.dot, spec, dense)
    reduces = isinstance(last, _ReduceRows) and not behind
    return BlockPlan(
        kron, tuple(inside), tuple(behind), dense, shape, tuple(summed[1:]), spec.dtype, spec.device, share,
        inside_linear, reduces, reduces and all_linear,
    )  # fmt: skip


def _share(last: Dot | SelfDot, spec: BlockSpec, dense: tuple[int, ...]) -> Share:
    if isinstance(last, SelfDot):
        return Share(torch.empty(0, *dense, dtype=spec.dtype, device=spec.device), unit=True)
    queries = last.queries[spec.name].to(spec.device, spec.dtype)
    return Share(queries.view(len(queries), *dense), last.unit)


def _factor_plan(stages: tuple[Transform, ...], last: FactorSum, spec: BlockSpec, seen: Seen) -> BlockPlan:
    """The plan of a statistic of the factors, which only Krons may precede."""
    kron, (out, into) = Kron(), spec.shape
    for number, stage in enumerate(stages):
        if not isinstance(stage, Kronecker):
            raise InputError(
                f"{last.noun} is fitted from factors, so {stage} cannot come before it: leave it out"
            )
        one, before = stage.kron(replace(spec, shape=(out, into))), (out, into)
        out, into = one(torch.empty(out, into, device=spec.device, dtype=spec.dtype)).shape
        kron = one @ kron
        seen[number].append((before, (out, into)))
    x, g = (torch.empty(0, 1, size, device=spec.device, dtype=spec.dtype) for size in (into, out))
    size = tuple(last.of(x, g, x[..., 0]).shape)
    return BlockPlan(
        kron, (), (), (out, into), size, (out, into), spec.dtype, spec.device, reduces=True, of_factors=last
    )


def _bind(stage: Transform, name: str, G: Tensor) -> tuple[BlockFn, bool]:
    """A stage as a function of one block, and whether it is linear."""
    if isinstance(stage, Kronecker):
        return stage.kron(spec_of(name, G)), True
    if isinstance(stage, Blockwise):
        return stage.bind(spec_of(name, G)), stage.linear
    raise TypeError(f"{stage} is neither a Kronecker, a Blockwise nor a Rowwise transform")
