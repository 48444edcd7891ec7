"""Brittleness: how the loss of a query changes without the rows that a method holds responsible."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import Estimate, grid_estimate, mean_estimate
from gradfn.evaluate.subsets import FEWEST, random_subsets, without_top

CONTROLS = 5
"""The default number of random removals of each size."""
_HALF = math.log(2)
"""The loss of an answer of probability 1/2."""


def brittleness_subsets(
    scores: Float[Tensor, "rows queries"],
    ks: Sequence[int],
    *,
    controls: int = CONTROLS,
    seed: int = 0,
    together: bool = False,
) -> Bool[Tensor, "subsets rows"]:
    """The subsets to train on for a test of brittleness; `removals` reads them.

    The first has all rows. Then come the subsets without a query's k best proponents, in the order of queries
    and, for each query, of `ks`. Then come those without k random rows, `controls` of them for each k.

    Args:
        scores: positive = proponent.
        ks: how many rows to remove, each once.
        controls: how many random removals of each size, three or more.
        seed: of the random removals.
        together: remove the best proponents of all queries, by the sum of their scores, and not of each.

    Raises:
        InputError: the same k twice, or a k of no rows or of all; fewer than three controls.

    >>> brittleness_subsets(torch.tensor([[3.0], [1.0], [2.0], [0.0]]), [2], controls=3).sum(1)
    tensor([4, 2, 2, 2, 2])
    """
    if len(set(ks)) < len(ks):
        raise InputError(f"the numbers of rows to remove, {list(ks)}, have one twice: give each once")
    if controls < FEWEST:
        raise InputError(f"`controls` must be {FEWEST} or more, not {controls}, for their spread is measured")
    removed = without_top(scores.double().sum(1, keepdim=True) if together else scores, ks)
    random = [random_subsets(len(scores), controls, leave_out=k, seed=seed) for k in ks]
    return torch.cat([torch.ones(1, len(scores), dtype=torch.bool), removed, *random])


class Removal(NamedTuple):
    """Losses without k rows: the best ones of each query, or of all, `[queries]`; or random ones `[controls,
    queries]`."""

    k: int
    top: Tensor
    random: Tensor


def removals(
    subsets: Bool[Tensor, "subsets rows"],
    losses: Float[Tensor, "subsets queries"],
    *,
    together: bool = False,
) -> tuple[Float[Tensor, " queries"], list[Removal]]:
    """The losses of the full model, and those of each number of rows removed.

    Args:
        subsets: from `brittleness_subsets`.
        losses: of every query, of the models trained on these subsets.
        together: as in `brittleness_subsets`.

    Raises:
        InputError: the subsets are not from `brittleness_subsets`.

    >>> subsets = brittleness_subsets(torch.tensor([[3.0], [1.0], [2.0], [0.0]]), [2], controls=3)
    >>> full, (two,) = removals(subsets, torch.tensor([[0.5], [9.0], [1.0], [2.0], [3.0]]))
    >>> full, two.k, two.top, two.random.T
    (tensor([0.5000]), 2, tensor([9.]), tensor([[1., 2., 3.]]))
    """
    missing = (~subsets).sum(1)
    ks = list(dict.fromkeys(missing[missing > 0].tolist()))
    queries = losses.shape[1]
    removed = 1 if together else queries
    end = 1 + removed * len(ks)
    if not ks or missing[:end].tolist() != [0, *ks * removed]:
        raise InputError(
            f"the {len(subsets)} subsets are not those of a test of brittleness (all rows, then each query's "
            "best ones removed, then random ones): make them with `brittleness_subsets`"
        )
    rest, missing = losses[end:], missing[end:]
    tops = losses[1:end].reshape(removed, len(ks), queries).unbind(1)
    return losses[0], [
        Removal(k, top[0] if together else top.diagonal(), rest[missing == k])
        for k, top in zip(ks, tops, strict=True)
    ]


class Brittleness(NamedTuple):
    """Means over queries: the rise of the loss, the rise by chance, and how often the first is larger.

    `more` is the first less the second, and `in_errors` is that in units of the standard error over random
    removals, `s sqrt(1 + 1 / controls)`: how far one more random removal would lie from the mean of the
    others, s being the standard deviation of their mean loss. (The mean of a removal for each query varies
    less, so the number is rather too small there.) `lost` and `lost_by_chance` are the shares of answers of
    probability 1/2 or more that fall below it.

    Intervals are over queries; those with random removals in them are over these too. They do
    not include the randomness of the one full model, which changes all rises alike.
    """

    rise: Estimate
    by_chance: Estimate
    above_chance: Estimate
    more: Estimate
    in_errors: Estimate
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
            of one token, without label smoothing), so that answers can be lost. For classes see `flips`.

    Raises:
        InputError: no random removals to compare with.

    >>> removal = Removal(2, torch.tensor([1.5]), torch.tensor([[0.5], [0.7]]))
    >>> found = brittleness(torch.tensor([0.5]), removal)
    >>> round(found.rise.value, 3), round(found.by_chance.value, 3), found.above_chance.value
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
    more, error = grid_estimate(top - random), float(random.mean(1).std()) * (1 + 1 / len(random)) ** 0.5
    in_errors = Estimate(*(value / error if error else math.nan for value in more))
    return Brittleness(
        mean_estimate(top - full), grid_estimate(random - full), grid_estimate((top > random).double()),
        more, in_errors, lost, by_chance,
    )  # fmt: skip


def _check_controls(removal: Removal) -> None:
    if not len(removal.random):
        raise InputError(
            f"no model was trained without {removal.k} random rows, with which to compare: train on all "
            "subsets of `brittleness_subsets`"
        )


class Flips(NamedTuple):
    """Which share of the full model's right predictions turns wrong without k rows.

    Intervals are those of `Brittleness`.

    Args:
        right: how many predictions of the full model are right.
        flipped: the share that is wrong without the best rows; None if none was right.
        flipped_by_chance: the same without random rows, the mean over controls.
    """

    right: int
    flipped: Estimate | None
    flipped_by_chance: Estimate | None


def flips(full: Float[Tensor, " queries"], removal: Removal) -> Flips:
    """How often a prediction turns wrong without the query's best proponents, and without random rows.

    A prediction is right if the margin `z_y - max_{v != y} z_v`, the mean over a subset's seeds, is above 0.

    Args:
        full: the queries' margins of the model of all rows.
        removal: their margins without k rows; see `removals`, which takes margins too.

    Raises:
        InputError: no random removals to compare with.

    >>> removal = Removal(2, torch.tensor([-1.0, 1.0, -2.0]), torch.tensor([[1.0, 1.0, 1.0]]))
    >>> found = flips(torch.tensor([2.0, 1.0, -1.0]), removal)
    >>> found.right, found.flipped.value, found.flipped_by_chance.value
    (2, 0.5, 0.0)

    Source: Ilyas et al., Datamodels, arXiv:2202.00622, section 4.
    """
    _check_controls(removal)
    right = full > 0
    if not right.any():
        return Flips(0, None, None)
    wrong, by_chance = removal.top[right] <= 0, removal.random[:, right] <= 0
    return Flips(int(right.sum()), mean_estimate(wrong.double()), grid_estimate(by_chance.double()))


def all_flips(
    margins: Float[Tensor, "subsets queries"] | None,
    subsets: Bool[Tensor, "subsets rows"],
    sizes: int,
    *,
    together: bool = False,
) -> list[Flips | None]:
    """What becomes of predictions, for each number of rows removed; None where there are no classes."""
    if margins is None:
        return [None] * sizes
    full, parts = removals(subsets, margins, together=together)
    return [flips(full, part) for part in parts]
