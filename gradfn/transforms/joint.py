"""All blocks of a row as one: what a global projection or one curvature of everything acts on."""

from dataclasses import dataclass

import torch

from gradfn.transforms.chain import Rowwise
from gradfn.types import Blocks

JOINT = "all"
"""The name of the one block."""


@dataclass(frozen=True)
class Joint(Rowwise):
    """`{block: [rows, ...]} -> {"all": [rows, 1, numbers]}`; see `joint`."""

    def __str__(self) -> str:
        return "joint"

    def settings(self) -> dict[str, object]:
        """The stage as it is spelled."""
        return {"transform": "Joint", "projection": "joint"}

    def __call__(self, blocks: Blocks) -> Blocks:
        return {JOINT: torch.cat([G.flatten(1) for G in blocks.values()], 1)[:, None]}


def joint() -> Joint:
    """Lay all blocks of a row end to end, as one block.

    Stages behind it see the whole gradient: `chain(joint(), project(512))` is a global projection, and a
    `second_moment` one joint matrix.

    >>> joint()({"a": torch.ones(5, 2, 3), "b": torch.ones(5, 4)})["all"].shape
    torch.Size([5, 1, 10])
    """
    return Joint()
