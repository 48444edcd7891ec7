"""The options of `gradfn retrain`: on which rows models are retrained, and with which weights."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gradfn.cli.request import found, option
from gradfn.cli.values import sizes
from gradfn.errors import InputError

Seeding = Literal["shared", "independent"]
Removal = Literal["drop", "mask"]

_FRACTION = "Share of the rows that a subset keeps; several with commas, each with as many --subsets."
_REMOVE = "Instead of subsets at random: all rows, all but each query's so many best, and controls: 10,20."
_REMOVAL = (
    "drop: what is left is packed into batches, so there are fewer steps. mask: rows outside a subset keep "
    "their places and have weight 0; batches, schedule and order are those of gradfn train --seed, as "
    "metagradients have it."
)
_SEEDING = "Whether all subsets have the same seeds, or every model one of its own."


def shares(text: str) -> tuple[float, ...]:
    """Numbers with commas between.

    >>> shares("0.99,0.95")
    (0.99, 0.95)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--fraction {text} are not numbers: give 0.99,0.95, say") from None


@dataclass(frozen=True)
class SubsetOptions:
    """Which subsets models are retrained on."""

    PANEL: ClassVar[str] = "Subsets"
    subsets: int | None = option(None, "How many subsets.", shown="50; with --leave-out 1, one a row")
    fraction: tuple[float, ...] | None = option(None, _FRACTION, parse=shares, commas=True, shown="0.5")
    leave_out: int | None = option(None, "Instead of a share: rows to leave out; 1 leaves each out once.")
    remove_top: tuple[int, ...] | None = option(None, _REMOVE, parse=sizes, commas=True)
    scores: str | None = option(None, "For --remove-top: the run of scores that says which.", file=found)
    removal: Removal = option("drop", _REMOVAL)
    seeds: int = option(2, "Models of each subset, whose losses are averaged.")
    seeding: Seeding = option("shared", _SEEDING)
