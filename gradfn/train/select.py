"""Which rows of a batch to train on, and how much, by what they do to a validation loss."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gradfn.errors import InputError


def select(
    values: Float[Tensor, " rows"], gram: Float[Tensor, "rows rows"] | None = None, *, k: int
) -> Int64[Tensor, " k"]:
    """The rows that lower a validation loss most together: greedy, each given those before it.

        next = argmax_i  values_i - sum_{j chosen} gram_ij

    Args:
        values: of each row alone, `eta <g_val, g_i>`: a column of what `Values.step` or `in_run` gives.
        gram: what the row gains less for each other row, `eta² <g_i, H g_j>`; with the identity for H,
            `eta² Values.gram()`. None: rows do not interfere, so these are the k largest values.
        k: how many rows.

    Returns:
        Their numbers, in the order in which they were chosen; of equal ones the first. A pure function, which
        `vmap` maps.

    Raises:
        InputError: a k that is not between 1 and the number of rows.

    >>> alike = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    >>> select(torch.tensor([3.0, 2.9, 1.0]), alike, k=2)
    tensor([0, 2])

    Source: GREATS, NeurIPS 2024, algorithm 1.
    """
    if not 1 <= k <= len(values):
        raise InputError(f"{k} of {len(values)} rows cannot be selected: give a k from 1 to {len(values)}")
    gains, places, chosen = values, torch.arange(len(values), device=values.device), list[Tensor]()
    for _ in range(k):
        best = (gains == gains.max()).to(torch.int8).argmax()
        chosen.append(best)
        if gram is not None:
            gains = gains - gram.index_select(0, best.reshape(1))[0]
        gains = torch.where(places == best, -torch.inf, gains)
    return torch.stack(chosen)


def reweight(values: Float[Tensor, "*axes rows"]) -> Float[Tensor, "*axes rows"]:
    """Weights in proportion to what is positive in the values, with the sum 1: `max(v, 0) / sum max(v, 0)`.

    Args:
        values: of rows; the last axis is theirs.

    Returns:
        Weights of the rows' losses; all 0 where no row has a positive value.

    >>> reweight(torch.tensor([3.0, -1.0, 1.0]))
    tensor([0.7500, 0.0000, 0.2500])

    Source: Learning to reweight examples, arXiv:1803.09050, equations 8 and 9.
    """
    kept = values.clamp_min(0)
    total = kept.sum(-1, keepdim=True)
    return kept / torch.where(total > 0, total, 1)
