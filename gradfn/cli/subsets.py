"""The options of `gradfn retrain`: on which rows models are retrained, and with which weights."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gradfn.cli.request import found, option
from gradfn.cli.values import sizes
from gradfn.errors import InputError

Seeding = Literal["shared", "independent"]
Removal = Literal["drop", "mask"]

_STEP = (
    "Instead of subsets: train at weights 1 - s u of the rows, or tokens, u the direction of a query's "
    "--scores of them (root mean square 1), for each s: 0.05,0.1."
)
_TOGETHER = (
    "Of --remove-top and --step: one removal or direction for all queries, by the sum of their scores."
)
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
    return _numbers("--fraction", text, "0.99,0.95")


def step_sizes(text: str) -> tuple[float, ...]:
    """The same of --step.

    >>> step_sizes("0.1,-0.1")
    (0.1, -0.1)
    """
    return _numbers("--step", text, "0.05,0.1")


def _numbers(option: str, text: str, such: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text} are not numbers: give {such}, say") from None


@dataclass(frozen=True)
class SubsetOptions:
    """Which subsets models are retrained on."""

    PANEL: ClassVar[str] = "Subsets"
    subsets: int | None = option(None, "How many subsets.", shown="50; with --leave-out 1, one a row")
    fraction: tuple[float, ...] | None = option(None, _FRACTION, parse=shares, commas=True, shown="0.5")
    leave_out: int | None = option(None, "Instead of a share: rows to leave out; 1 leaves each out once.")
    remove_top: tuple[int, ...] | None = option(None, _REMOVE, parse=sizes, commas=True)
    step: tuple[float, ...] | None = option(None, _STEP, parse=step_sizes, commas=True)
    scores: str | None = option(None, "Of --remove-top and --step: the run of scores.", file=found)
    together: bool = option(False, _TOGETHER)
    controls: int = option(5, "Of --remove-top: removals of random rows, of each size.")
    removal: Removal | None = option(None, _REMOVAL, shown="drop; with --step, mask")
    seeds: int = option(2, "Models of each subset, whose losses are averaged.")
    seeding: Seeding = option("shared", _SEEDING)

    @property
    def removed_by(self) -> Removal:
        """What becomes of rows outside a subset."""
        return self.removal or ("drop" if self.step is None else "mask")
