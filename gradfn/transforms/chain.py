"""Transforms of gradient blocks, and their composition.

A transform is a value that can be called on `{block: [rows, out, in]}`, compared and printed. There are three
kinds: a `Kronecker` acts on the factors of a gradient, a `Blockwise` on one dense block, and a `Rowwise` on
all blocks of an example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.types import Blocks, BlockSpec

BlockFn = Callable[[Tensor], Tensor]
"""A function of one dense block `[rows, out, in]`."""


class Transform:
    """A pure function of gradient blocks: a frozen dataclass whose fields are its settings."""

    def __call__(self, blocks: Blocks) -> Blocks | Tensor:
        raise NotImplementedError

    def settings(self) -> dict[str, object]:
        """The name and the fields as a store records them; a digest stands for tensors."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # pyright: ignore[reportArgumentType]
        return {"transform": type(self).__name__, **values}


def _plain(value: object) -> object:
    """The value, or a digest of a tensor or of a dict of tensors."""
    if isinstance(value, Tensor):
        return digest({"": value})
    if isinstance(value, dict) and all(isinstance(item, Tensor) for item in value.values()):
        return digest(value)
    return value


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of named tensors: their names and values.

    >>> digest({"a": torch.ones(2)}) == digest({"a": torch.ones(2)}) != digest({"b": torch.ones(2)})
    True
    """
    hash_ = sha256()
    for name, value in tensors.items():
        hash_.update(name.encode())
        hash_.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hash_.hexdigest()[:16]


class Kronecker(Transform):
    """`G -> L G Rᵀ` in every block, with the two sides from `kron`."""

    def kron(self, spec: BlockSpec) -> Kron:
        """The map of one block."""
        raise NotImplementedError

    def __call__(self, blocks: Blocks) -> Blocks:
        made = {name: self.kron(spec_of(name, G))(G) for name, G in blocks.items()}
        refuse_idle([self], [[(G.shape[1:], made[name].shape[1:]) for name, G in blocks.items()]])
        return made


class Blockwise(Transform):
    """A function of each dense block `[rows, out, in] -> [rows, ...]`."""

    linear: ClassVar[bool] = False
    """Whether the function is linear, so that it may be applied to the parts of a sum."""

    def block(self, name: str, G: Tensor) -> Tensor:
        """Apply the function to one block. A subclass has this method or `bind`."""
        return self.bind(spec_of(name, G))(G)

    def bind(self, spec: BlockSpec) -> BlockFn:
        """The function of one block, with everything it needs prepared."""
        return lambda G: self.block(spec.name, G)

    def __call__(self, blocks: Blocks) -> Blocks:
        made = {name: self.block(name, G) for name, G in blocks.items()}
        refuse_idle([self], [[(G.shape[1:], made[name].shape[1:]) for name, G in blocks.items()]])
        return made


class Rowwise(Transform):
    """A function of all blocks of each row."""


def refuse_idle(
    stages: Sequence[Transform], seen: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]]
) -> None:
    """Refuse a projection to given dimensions that makes no block smaller, or never one of its sides.

    Args:
        stages: those that acted.
        seen: for each of them the shape of every block before and after it.

    Raises:
        InputError: names the projection.
    """
    for stage, shapes in zip(stages, seen, strict=True):
        if not getattr(stage, "strict", False) or not shapes:
            continue
        if all(tuple(before) == tuple(after) for before, after in shapes):
            raise InputError(
                f"{stage} makes no block smaller, because no block is larger than its dimensions: give "
                "smaller dimensions, or leave it out"
            )
        dims: Any = getattr(stage, "dims", ())
        sides = dims if len(set(dims)) > 1 else ()  # AxA is short for "sides up to A stay"
        for axis, dim in enumerate(sides):
            largest = max(before[axis] for before, _ in shapes)
            if dim > largest:
                raise InputError(
                    f"{stage} is larger than the {('left', 'right')[axis]} side of every block, of which the "
                    f"largest has {largest:,} numbers: give {largest:,} or fewer"
                )


def spec_of(name: str, G: Tensor) -> BlockSpec:
    """Describe a dense block `[rows, out, in]`.

    >>> spec_of("mlp", torch.zeros(7, 2, 3)).shape
    (2, 3)
    """
    return BlockSpec(name, (G.shape[-2], G.shape[-1]), G.device, G.dtype)


@dataclass(frozen=True)
class Chain(Transform):
    """Stages applied one after the other; build it with `chain`."""

    stages: tuple[Transform, ...] = ()

    def __call__(self, blocks: Blocks) -> Blocks | Tensor:
        for stage in self.stages:
            blocks = stage(blocks)  # pyright: ignore[reportAssignmentType]
        return blocks

    def settings(self) -> dict[str, object]:
        """The settings of every stage, in order."""
        return {"chain": [stage.settings() for stage in self.stages]}


def chain(*transforms: Transform) -> Chain:
    """Compose transforms left to right; nested chains are flattened, so composition is associative.

    `chain()` is the identity: the full gradient.

    >>> from gradfn.transforms import project, unit_normalize
    >>> chain(chain(project(4)), unit_normalize()) == chain(project(4), unit_normalize())
    True
    """
    stages: list[Transform] = []
    for transform in transforms:
        stages.extend(transform.stages if isinstance(transform, Chain) else [transform])
    return Chain(tuple(stages))
