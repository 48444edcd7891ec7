"""How much two attributions agree on the rows that matter most."""

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.evaluate.correlation import check_finite
from gradfn.evaluate.mislabel import check_k


def top_overlap(
    a: Float[Tensor, "rows queries"], b: Float[Tensor, "rows queries"], k: int
) -> Float[Tensor, " queries"]:
    """The share of the k strongest proponents that two attributions have in common, query by query.

    `|A ∩ B| / k`. Of random scores it is `k / rows`. Equal scores stand in the order of their rows.

    Args:
        a, b: scores of the same rows for the same queries.
        k: how many proponents.

    Returns:
        float64 `[queries]`.

    Raises:
        InputError: k is not from 1 to the number of rows; scores that are not finite.

    >>> a = torch.tensor([[3.0], [2.0], [1.0]])
    >>> top_overlap(a, -a, 2)
    tensor([0.5000], dtype=torch.float64)
    """
    check_finite("scores", torch.stack([a, b]))
    check_k(k, len(a))
    return (_top(a, k) & _top(b, k)).sum(0).double() / k


def jaccard(
    a: Float[Tensor, "rows queries"], b: Float[Tensor, "rows queries"], k: int
) -> Float[Tensor, " queries"]:
    """The Jaccard index of the k strongest proponents, `|A ∩ B| / |A ∪ B|`, query by query.

    Args:
        a, b, k: see `top_overlap`.

    Returns:
        float64 `[queries]`.

    >>> a = torch.tensor([[3.0], [2.0], [1.0]])
    >>> jaccard(a, -a, 2)
    tensor([0.3333], dtype=torch.float64)
    """
    share = top_overlap(a, b, k)
    return share / (2 - share)


def _top(scores: Tensor, k: int) -> Tensor:
    """Which rows are among the k best of each query."""
    order = scores.argsort(dim=0, descending=True, stable=True)[:k]
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(0, order, True)
