"""The linear datamodeling score: do scores predict the losses of models trained on parts of the data?"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import DRAWS, Estimate, correlation_estimate
from gradfn.evaluate.correlation import Correlation, check_finite, correlation
from gradfn.evaluate.subsets import FEWEST


def predicted(
    scores: Float[Tensor, "rows queries"], subsets: Bool[Tensor, "subsets rows"]
) -> Float[Tensor, "subsets queries"]:
    """What scores predict for models trained on subsets, `sum_{i in S} score(i, q)`: higher is a lower loss.

    Sums of the same numbers are exactly equal in any order, so that subsets that tie have one rank.

    >>> predicted(torch.tensor([[1.0], [2.0]]), torch.tensor([[True, False], [True, True]]))
    tensor([[1.],
            [3.]], dtype=torch.float64)
    """
    masks, rest = subsets.double(), scores.double()
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(2):
        # Rounded to multiples of a power of two, so large that all sums are exact in float64.
        size = rest.abs().sum(0).clamp_min(1e-290)
        step = size / torch.frexp(size).mantissa * 2.0**-52
        part = (rest / step).round() * step
        total, rest = total + masks @ part, rest - part
    return total


def lds(
    scores: Float[Tensor, "rows queries"],
    subsets: Bool[Tensor, "subsets rows"],
    losses: Float[Tensor, "subsets queries"],
    *,
    correlate: Correlation = "spearman",
) -> Float[Tensor, " queries"]:
    """Score an attribution against retrained models, query by query.

    `LDS(q) = corr_S(sum_{i in S} score(i, q), -loss_S(q))` over the subsets S. As everywhere, a row with a
    positive score is a proponent, so a subset with many proponents has a low loss.

    Args:
        scores: of every training row for every query.
        subsets: the rows that each model was trained on.
        losses: of every query, of the models trained on them; means over seeds are less noisy.
        correlate: "spearman" is the LDS as published; "pearson".

    Returns:
        float64 `[queries]`; their mean is the LDS. It is 0 for a query with the same score for all rows,
        or the same loss for all subsets.

    Raises:
        InputError: fewer than three subsets, other shapes, or numbers that are not finite.

    >>> subsets = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool()
    >>> scores = torch.tensor([[3.0], [1.0], [-1.0]])
    >>> lds(scores, subsets, -predicted(scores, subsets))
    tensor([1.], dtype=torch.float64)

    Source: Park et al., TRAK, arXiv:2303.14186, section 2 (definition 2.3).
    """
    _check(scores, subsets, losses)
    return correlation(_said(scores, subsets), -losses.double(), correlate)


def lds_estimate(
    scores: Float[Tensor, "rows queries"],
    subsets: Bool[Tensor, "subsets rows"],
    losses: Float[Tensor, "subsets queries"],
    *,
    correlate: Correlation = "spearman",
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The LDS, the mean over queries, with its 95 % bootstrap interval over subsets and queries.

    Args:
        scores, subsets, losses, correlate: see `lds`.
        draws, seed: of the bootstrap, see `correlation_estimate`.

    >>> subsets = torch.rand(20, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    >>> scores = torch.arange(18.0).reshape(9, 2)
    >>> lds_estimate(scores, subsets, -predicted(scores, subsets), draws=100).value
    1.0
    """
    _check(scores, subsets, losses)
    said = _said(scores, subsets)
    return correlation_estimate(said, -losses.double(), correlate, draws=draws, seed=seed)


def _said(scores: Tensor, subsets: Tensor) -> Tensor:
    """What scores predict, and 0 for a query whose rows all have one score: its sums are only rounding."""
    return torch.where(scores.amax(0) == scores.amin(0), 0.0, predicted(scores, subsets))


def _check(scores: Tensor, subsets: Tensor, losses: Tensor) -> None:
    shapes = [list(of.shape) for of in (scores, subsets, losses)]
    if scores.ndim != 2 or shapes[1:] != [[len(subsets), len(scores)], [len(subsets), scores.shape[1]]]:
        raise InputError(
            "expected scores [rows, queries], subsets [subsets, rows] and losses [subsets, queries], got "
            f"shapes {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if len(subsets) < FEWEST:
        raise InputError(f"a correlation needs {FEWEST} subsets or more, not {len(subsets)}: retrain on more")
    check_finite("scores", scores)
    check_finite("losses", losses)
