"""Brittleness: what becomes of a query when the rows that a method holds responsible are taken away."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import Estimate, grid_estimate, mean_estimate
from gradfn.evaluate.subsets import random_subsets, without_top

CONTROLS = 5
"""Random removals of each size, unless told."""
_HALF = math.log(2)
"""The loss of an answer of probability 1/2."""


def brittleness_subsets(
    scores: Float[Tensor, "rows queries"], ks: Sequence[int], *, controls: int = CONTROLS, seed: int = 0
) -> Bool[Tensor, "subsets rows"]:
    """The subsets that a test of brittleness is trained on; `removals` reads them.

    All rows; then all but each query's k best proponents, `1 + query * len(ks) + k's place`; then all but k
    random ones, so many times for each k.

    Args:
        scores: positive = proponent.
        ks: how many rows to remove, each once.
        controls: random removals of each size, three or more.
        seed: of these.

    Raises:
        InputError: a k twice, or one that leaves everything in or out; fewer than three controls.

    >>> brittleness_subsets(torch.tensor([[3.0], [1.0], [2.0], [0.0]]), [2], controls=3).sum(1)
    tensor([4, 2, 2, 2, 2])
    """
    if len(set(ks)) < len(ks):
        raise InputError(f"the numbers of rows to remove have one twice, {list(ks)}: give each once")
    removed = without_top(scores, ks)
    random = [random_subsets(len(scores), controls, leave_out=k, seed=seed) for k in ks]
    return torch.cat([torch.ones(1, len(scores), dtype=torch.bool), removed, *random])


class Removal(NamedTuple):
    """Losses without k rows: each query's best ones `[queries]`, or random ones `[controls, queries]`."""

    k: int
    top: Tensor
    random: Tensor


def removals(
    subsets: Bool[Tensor, "subsets rows"], losses: Float[Tensor, "subsets queries"]
) -> tuple[Float[Tensor, " queries"], list[Removal]]:
    """The losses of the full model, and those of each number of rows removed.

    Args:
        subsets: what `brittleness_subsets` gave.
        losses: of every query, of the models trained on them.

    Raises:
        InputError: the subsets are others.

    >>> subsets = brittleness_subsets(torch.tensor([[3.0], [1.0], [2.0], [0.0]]), [2], controls=3)
    >>> full, (two,) = removals(subsets, torch.tensor([[0.5], [9.0], [1.0], [2.0], [3.0]]))
    >>> full, two.k, two.top, two.random.T
    (tensor([0.5000]), 2, tensor([9.]), tensor([[1., 2., 3.]]))
    """
    missing = (~subsets).sum(1)
    ks = list(dict.fromkeys(missing[missing > 0].tolist()))
    queries = losses.shape[1]
    end = 1 + queries * len(ks)
    if not ks or missing[:end].tolist() != [0, *ks * queries]:
        raise InputError(
            f"the {len(subsets)} subsets are not all rows, each query's best ones removed, and random ones "
            "removed: make them with gradfn retrain --remove-top"
        )
    rest, missing = losses[end:], missing[end:]
    by_query = losses[1:end].reshape(queries, len(ks), queries)
    return losses[0], [
        Removal(k, by_query[:, place].diagonal(), rest[missing == k]) for place, k in enumerate(ks)
    ]


class Brittleness(NamedTuple):
    """Means over queries: the rise of the loss, that by chance, and the share of controls that it is above.

    `lost` and `lost_by_chance` are the shares of answers of probability 1/2 or more that fall below it.

    Intervals are over queries, those by chance and above it over queries and random removals. The trained
    models are given: what the one full model and its seeds do to all rises alike is in no interval.
    """

    rise: Estimate
    by_chance: Estimate
    above_chance: Estimate
    lost: Estimate | None
    lost_by_chance: Estimate | None


def brittleness(
    full: Float[Tensor, " queries"], removal: Removal, *, probabilities: bool = False
) -> Brittleness:
    """How much more a query loses without its best proponents than without as many random rows.

    `rise(q) = loss_{-top k(q)}(q) - loss(q)`; by chance the same with k random rows, its mean over controls.

    Args:
        full: the queries' losses of the model of all rows.
        removal: their losses without k rows.
        probabilities: the loss is minus the log-probability of the whole answer (a sum over its tokens, or
            of one token, without label smoothing), so that answers can be lost; see `flips` for classes.

    Raises:
        InputError: no random removals to compare with.

    >>> told = brittleness(torch.tensor([0.5]), Removal(2, torch.tensor([1.5]), torch.tensor([[0.5], [0.7]])))
    >>> round(told.rise.value, 3), round(told.by_chance.value, 3), told.above_chance.value
    (1.0, 0.1, 1.0)

    Source: Ilyas et al., Datamodels, arXiv:2202.00622, section 4.
    """
    _check_controls(removal)
    full, top, random = full.double(), removal.top.double(), removal.random.double()
    lost, by_chance = None, None
    sure = full <= _HALF
    if probabilities and sure.any():
        lost = mean_estimate((top > _HALF)[sure].double())
        by_chance = grid_estimate((random > _HALF)[:, sure].double())
    return Brittleness(
        mean_estimate(top - full), grid_estimate(random - full), grid_estimate((top > random).double()),
        lost, by_chance,
    )  # fmt: skip


def _check_controls(removal: Removal) -> None:
    if not len(removal.random):
        raise InputError(
            f"no model was trained without {removal.k} random rows, to compare with: make some with gradfn "
            "retrain --remove-top"
        )


class Flips(NamedTuple):
    """Of the queries that the full model gets right, the shares that it gets wrong without k rows.

    Intervals are those of `Brittleness`.

    Args:
        right: how many there are.
        flipped: without the best rows; None where no query is right.
        flipped_by_chance: without random ones, the mean over controls.
    """

    right: int
    flipped: Estimate | None
    flipped_by_chance: Estimate | None


def flips(full: Float[Tensor, " queries"], removal: Removal) -> Flips:
    """How often a prediction turns wrong without the query's best proponents, and without random rows.

    It is right where the margin `z_y - max_{v != y} z_v`, in the mean over a subset's seeds, is above 0.

    Args:
        full: the queries' margins of the model of all rows.
        removal: their margins without k rows; see `removals`, which takes margins too.

    Raises:
        InputError: no random removals to compare with.

    >>> told = flips(torch.tensor([2.0, 1.0, -1.0]), Removal(2, torch.tensor([-1.0, 1.0, -2.0]),
    ...                                                      torch.tensor([[1.0, 1.0, 1.0]])))
    >>> told.right, told.flipped.value, told.flipped_by_chance.value
    (2, 0.5, 0.0)

    Source: Ilyas et al., Datamodels, arXiv:2202.00622, section 4.
    """
    _check_controls(removal)
    right = full > 0
    if not right.any():
        return Flips(0, None, None)
    wrong, by_chance = removal.top[right] <= 0, removal.random[:, right] <= 0
    return Flips(int(right.sum()), mean_estimate(wrong.double()), grid_estimate(by_chance.double()))
