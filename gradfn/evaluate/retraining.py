"""Which models are retrained: on which rows, with which weights and seeds."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.subsets import check_subsets
from gradfn.random import words
from gradfn.train import Start, Training
from gradfn.train.step import Removal
from gradfn.types import LossFn

MOST_SEEDS = 1000
"""What the seeds of models have room for."""
Seeding = Literal["shared", "independent"]
"""Whether the k-th models of all subsets have one seed, or every model a seed of its own."""


@dataclass(frozen=True, eq=False)
class Retraining:
    """Which models to retrain, and what is recorded of them.

    Args:
        start: what makes a model (called once a model, seeded), or the parameters that all start from.
        loss: of a row in training, and of a query if that has no other.
        training: optimizer, schedule, batches.
        subsets: which rows to train on, see `random_subsets`.
        query_loss: of a query; None: `loss`.
        margin_loss: minus the margin of a query's right class, which is recorded too; None: that of a
            `model_loss` of classification, and of other losses there is none.
        seeds: models of each subset.
        seed: of them all, see `model_seed`.
        seeding: "shared": the k-th models of all subsets have one seed, so that subsets differ in their rows
            and not in what chance adds. "independent": every model has a seed of its own, as in most
            published ground truths; ceilings and scores are lower.
        chunk: how many models train together, which changes no result; None: what fits.
        removal: "drop": the rows of a subset are packed into batches of their own, so there are fewer steps.
            "mask": all rows keep their places, and those outside a subset have weight 0. Batches,
            denominators, schedule and order are those of the training on all rows, which is what
            metagradients differentiate. The k-th models (k = 0, 1, ..) then have the seed `seed + k`, and so
            the order of `Course(seed=seed + k)`.
        weights: with "mask", what the losses of the rows of each subset are multiplied by, float64
            `[subsets, rows]`; or the parts of their tokens, `[subsets, rows, tokens]`, as many as the longest
            row has, of a loss that is told apart by token; None: 1.

    Raises:
        InputError: a subset without rows; no seeds, more than there is room for, or too large a seed; another
            seeding or removal; weights that are not one finite number a row, or of rows that are dropped.

    >>> halves = torch.tensor([[True, False], [False, True]])
    >>> start, training = {"w": torch.ones(1)}, Training(1, 1, 0.1)
    >>> Retraining(start, lambda p, e: p["w"].sum(), training, halves, seeds=2).models().seeds
    tensor([0, 1, 0, 1])
    """

    start: Start
    loss: LossFn
    training: Training
    subsets: Bool[Tensor, "subsets rows"]
    query_loss: LossFn | None = None
    margin_loss: LossFn | None = None
    seeds: int = 1
    seed: int = 0
    seeding: Seeding = "shared"
    chunk: int | None = None
    removal: Removal = "drop"
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "subsets", self.subsets.cpu())
        check_subsets(self.subsets)
        for name, choices in (("seeding", get_args(Seeding)), ("removal", get_args(Removal))):
            if getattr(self, name) not in choices:
                raise InputError(f"no `{name}` {getattr(self, name)!r}: choose {' or '.join(choices)}")
        if self.weights is not None:
            _check_weights(self.weights, self.subsets, self.removal)
        if not 1 <= self.seeds < MOST_SEEDS:
            raise InputError(
                f"there can be 1 to {MOST_SEEDS - 1} seeds a subset, not {self.seeds}: ask for others"
            )
        if abs(self.seed) >= 1 << 53:
            raise InputError(f"the seed {self.seed} is too large for seeds of models: give one below 2^53")

    def models(self) -> "Models":
        """The models of all subsets, those of one side by side."""
        numbers = torch.arange(len(self.subsets)).repeat_interleave(self.seeds)
        replicates = list(range(self.seeds)) * len(self.subsets)
        keys = [
            self.seed + replicate
            if self.removal == "mask" and self.seeding == "shared"
            else model_seed(self.seed, replicate, number if self.seeding == "independent" else None)
            for number, replicate in zip(numbers.tolist(), replicates, strict=True)
        ]
        weights, chosen = self.weights, self.subsets[numbers]
        if weights is not None:
            weights = weights.cpu()[numbers] * (chosen if weights.ndim == 2 else chosen[..., None])
        return Models(chosen, numbers, torch.tensor(keys), weights)


def _check_weights(weights: Tensor, subsets: Tensor, removal: Removal) -> None:
    if removal == "drop":
        raise InputError("rows that are dropped have no `weights`: give `removal='mask'`, or no weights")
    if weights.shape[:2] != subsets.shape or weights.ndim not in (2, 3):
        raise InputError(
            f"`weights` are one weight a row of each of the {len(subsets)} subsets, {[*subsets.shape]}, or "
            f"one a token of them, and got {[*weights.shape]}: give others"
        )
    if not bool(weights.isfinite().all()):
        raise InputError("`weights` hold NaN or infinity: give finite numbers")


class Models(NamedTuple):
    """What models are trained on, and how they are seeded; see `Truth`."""

    subsets: Tensor
    numbers: Tensor
    seeds: Tensor
    weights: Tensor | None = None

    def part(self, begin: int, end: int) -> dict[str, Tensor]:
        """What is known of some of the models."""
        return {name: of_all[begin:end] for name, of_all in self._asdict().items() if of_all is not None}

    def placed(self, removal: Removal) -> tuple[Tensor, Tensor | None]:
        """Which rows have a place in a training, and their weights."""
        if removal == "drop":
            return self.subsets, None
        weights = self.subsets.double() if self.weights is None else self.weights
        return torch.ones_like(self.subsets), weights


def model_seed(seed: int, replicate: int, subset: int | None = None) -> int:
    """The seed of the `replicate`-th model of every subset, or of one subset alone.

    Models that share it start alike and see the rows that they have in the same order (common random
    numbers). The seed of a subset alone is the first word drawn by the key ("model", seed, subset,
    replicate), without its last bit.

    >>> model_seed(7, 1), model_seed(7, 1, subset=0) == model_seed(7, 1, subset=1)
    (7001, False)
    """
    if subset is None:
        return seed * MOST_SEEDS + replicate
    return int(words(1, "model", seed, subset, replicate)[0] >> 1)
