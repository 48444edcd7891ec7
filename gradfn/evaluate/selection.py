"""Choosing a damping, or any other variant, on queries other than those that are reported."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradfn.errors import InputError
from gradfn.random import choice


class Halves(NamedTuple):
    """Queries to choose a variant on, and queries to report it on: numbers, ascending and disjoint."""

    choose: Tensor
    report: Tensor


def halves(queries: int, *, seed: int = 0) -> Halves:
    """Divide queries at random into two halves. If their number is odd, the reported half has one more.

    Args:
        queries: how many there are.
        seed: of the random choice.

    Raises:
        InputError: fewer than two queries.

    >>> [len(half) for half in halves(5)]
    [2, 3]
    """
    if queries < 2:
        raise InputError(
            f"a variant is chosen on some queries and reported on others, so {queries} are too few: "
            "give more queries, or one variant"
        )
    choose = torch.from_numpy(choice(queries // 2, queries, "halves", seed).astype("int64"))
    others = torch.ones(queries, dtype=torch.bool)
    others[choose] = False
    return Halves(choose, others.nonzero()[:, 0])


def chosen(each: Float[Tensor, "variants queries"], choose: Int[Tensor, " part"]) -> int:
    """The variant with the highest mean over the queries to choose on, the first of equals.

    Args:
        each: a number a variant and query, higher being better: their `lds`, say.
        choose: the queries to choose on, see `halves`.

    >>> chosen(torch.tensor([[0.1, 0.9], [0.2, 0.0]]), torch.tensor([0]))
    1
    """
    return int(each[:, choose].mean(1).argmax())
