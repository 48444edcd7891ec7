"""Lowering: what of a chain runs on the factors, what inside the backward pass, and what after it.

    leading Krons  -> fused into one, applied to the factors before they meet
    then blocks    -> functions of one dense block, run while only that layer is alive
    then rows      -> run after the backward, on all blocks of an example

Lowering never changes a result.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from gradfn.kron import Kron
from gradfn.transforms.chain import Blockwise, Chain, Kronecker, Rowwise, Transform, spec_of
from gradfn.transforms.dot import Dot
from gradfn.transforms.normalize import UnitNormalize
from gradfn.types import Blocks, BlockSpec

BlockFn = Callable[[Tensor], Tensor]
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
        share: the share of a final dot product, where that is all that runs inside: it may be had from the
            factors, without the dense block.
    """

    kron: Kron
    inside: tuple[BlockFn, ...]
    behind: tuple[BlockFn, ...]
    dense: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    share: Share | None = None

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
    """The block's share of a final `Dot`; linear as long as no norm is asked for."""

    dot: Dot

    @property
    def linear(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.dot.unit

    def block(self, name: str, G: Tensor) -> Tensor:
        return self.dot.partial(name, G)


def _split(
    stages: tuple[Transform, ...],
) -> tuple[tuple[Transform, ...], Callable[[Blocks], Blocks | Tensor]]:
    """Part a chain at its first row stage; final dot products are summed block by block instead."""
    at = next((i for i, stage in enumerate(stages) if isinstance(stage, Rowwise)), len(stages))
    blocks, rows = stages[:at], stages[at:]
    match rows:
        case (Dot() as last,):
            return (*blocks, _Partial(last)), last.finish
        case (UnitNormalize(), Dot() as last):
            unit = replace(last, unit=True)
            return (*blocks, _Partial(unit)), unit.finish
    return blocks, Chain(rows)


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
    stages = transform.stages if isinstance(transform, Chain) else (transform,)
    block_stages, rows = _split(stages)
    return Lowered({spec.name: _plan(block_stages, spec, spec.name in shared) for spec in specs}, rows)


def _plan(stages: tuple[Transform, ...], spec: BlockSpec, shared: bool) -> BlockPlan:
    kron, inside, behind = Kron(), [], []
    # An empty batch tells every stage's output shape without any work.
    G = torch.empty(0, *spec.shape, dtype=spec.dtype, device=spec.device)
    dense = shape = spec.shape
    for stage in stages:
        function, linear = _bind(stage, spec.name, G)
        G = function(G)
        if linear and isinstance(function, Kron) and not inside and not behind:
            kron, dense = function @ kron, tuple(G.shape[1:])
        elif behind or (shared and not linear):
            behind.append(function)
            continue
        else:
            inside.append(function)
        shape = tuple(G.shape[1:])
    last, share = stages[-1] if stages else None, None
    if isinstance(last, _Partial) and len(inside) == 1 and not behind:
        queries = last.dot.queries[spec.name].to(spec.device, spec.dtype)
        share = Share(queries.view(len(queries), *dense), last.dot.unit)
    return BlockPlan(kron, tuple(inside), tuple(behind), dense, shape, spec.dtype, spec.device, share)


def _bind(stage: Transform, name: str, G: Tensor) -> tuple[BlockFn, bool]:
    """A stage as a function of one block, and whether it is linear."""
    if isinstance(stage, Kronecker):
        return stage.kron(spec_of(name, G)), True
    if isinstance(stage, Blockwise):
        return (lambda value: stage.block(name, value)), stage.linear
    raise TypeError(f"{stage} is neither a Kronecker, a Blockwise nor a Rowwise transform")
