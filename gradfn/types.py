"""The nouns that every other file speaks of: parameters, blocks of gradients, losses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""Parameters by name, detached."""

Blocks = dict[str, Tensor]
"""One tensor a weight, keyed by module path: `[rows, ...]`, row-aligned over all blocks."""

Example = Mapping[str, Tensor]
"""One example, without a batch dimension."""

Batch = Mapping[str, Tensor]
"""Examples stacked (and padded) along a leading batch dimension."""


@runtime_checkable
class LossFn(Protocol):
    """A pure loss of one example: `loss(params, example) -> scalar`.

    A loss may also offer `batched(batch) -> [batch]`, the same numbers for a padded batch in one
    forward; the probe engine uses it where it is there, and `vmap` of the loss where it is not.
    """

    def __call__(self, params: Params, example: Example) -> Tensor: ...


@runtime_checkable
class Data(Protocol):
    """Examples by row number: a list, `Documents`, a dataset in torch format."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Example: ...


class Rows(NamedTuple):
    """What an engine makes of a batch: per-example statistics and the losses they belong to."""

    values: Blocks | Tensor
    losses: Tensor


@dataclass(frozen=True)
class BlockSpec:
    """Name, shape `(out, in)`, device and dtype of the gradient of one weight, before any transform.

    >>> BlockSpec("mlp.0", (4, 3)).shape
    (4, 3)
    """

    name: str
    shape: tuple[int, int]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
