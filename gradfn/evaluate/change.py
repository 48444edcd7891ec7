"""Predicted and real changes of query losses, where the weights of training rows change."""

from collections.abc import Sequence
from math import isfinite, nan
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import DRAWS, Estimate, counts_of_draws, middle


def step_weights(
    scores: Float[Tensor, "rows queries"], steps: Sequence[float], *, together: bool = False
) -> Float64[Tensor, "models rows"]:
    """The weights to train at for a test of steps: all 1, then `1 - s u` for each query and each s.

    Rows may be tokens, see `padded_weights`.

    u is the direction of a query's scores, scaled to a root mean square of 1, so that s is how far weights
    move in the mean. Masking a share f of the rows moves them by `sqrt(f)`.

    Args:
        scores: positive = proponent, so the loss rises with s.
        steps: the sizes, each once.
        together: one direction for all queries, that of the sum of their scores.

    Raises:
        InputError: no steps, the same twice, or one that is 0 or not finite; a direction without length.

    >>> step_weights(torch.tensor([[1.0], [-1.0]]), [0.1])
    tensor([[1.0000, 1.0000],
            [0.9000, 1.1000]], dtype=torch.float64)
    """
    if not steps or len(set(steps)) < len(steps) or not all(isfinite(s) and s for s in steps):
        raise InputError(f"the steps {[*steps]} must be finite and not 0, each once: give others")
    if not bool(scores.isfinite().all()):
        raise InputError("the scores in whose direction to step hold NaN or infinity: score again")
    along = scores.double().sum(1, keepdim=True) if together else scores.double()
    size = along.square().mean(0).sqrt()
    if not bool((size > 0).all()):
        raise InputError(
            f"query {int(size.argmin())} has a score of 0 for all rows, so there is no direction to step in: "
            "leave it out"
        )
    moved = torch.stack([1 - s * u for u in (along / size).T for s in steps])
    return torch.cat([torch.ones_like(moved[:1]), moved])


def padded_weights(
    weights: Float64[Tensor, "models all"], lengths: Int64[Tensor, " rows"]
) -> Float64[Tensor, "models rows tokens"]:
    """Weights of tokens, those of one row after those of another, as a training takes them; 1 behind a row.

    >>> padded_weights(torch.tensor([[0.1, 0.2, 0.3]]).double(), torch.tensor([1, 2]))
    tensor([[[0.1000, 1.0000],
             [0.2000, 0.3000]]], dtype=torch.float64)
    """
    made = torch.ones(len(weights), len(lengths), int(lengths.max()), dtype=torch.float64)
    made[:, _inside(lengths)] = weights
    return made


def flat_weights(
    weights: Float64[Tensor, "models rows tokens"], lengths: Int64[Tensor, " rows"]
) -> Float64[Tensor, "models all"]:
    """The other way round.

    >>> flat_weights(torch.tensor([[[0.1, 1.0], [0.2, 0.3]]]).double(), torch.tensor([1, 2]))
    tensor([[0.1000, 0.2000, 0.3000]], dtype=torch.float64)
    """
    return weights[:, _inside(lengths)]


def _inside(lengths: Tensor) -> Bool[Tensor, "rows tokens"]:
    return torch.arange(int(lengths.max())) < lengths[:, None]


class Changes(NamedTuple):
    """Changes of query losses, `[models, queries]`, in units of the loss.

    Args:
        size: how far the weights of each model moved, in the root mean square over rows, `[models]`.
        predicted: `-<score, w - w0>`.
        real: the loss less that at w0.
        of_all: whether w0 is a model of all rows, which is left out; else it is the mean over the models of
            one size.
    """

    size: Float64[Tensor, " models"]
    predicted: Float64[Tensor, "models queries"]
    real: Float64[Tensor, "models queries"]
    of_all: bool

    def of_size(self, size: float) -> "Changes":
        """The same of models that moved so far."""
        own = self.size == size
        return self._replace(size=self.size[own], predicted=self.predicted[own], real=self.real[own])


def changes(
    scores: Float[Tensor, "rows queries"],
    weights: Float64[Tensor, "models rows"],
    losses: Float[Tensor, "models queries"],
) -> Changes:
    """What scores predict for models trained at other weights of rows, and what came.

    Args:
        scores: positive = proponent.
        weights: of the rows, 1 and 0 where rows were removed.
        losses: of every query, of the models trained at them.

    Raises:
        InputError: other shapes, or no model but that of all rows.

    >>> weights = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).double()
    >>> made = changes(torch.tensor([[2.0], [3.0]]), weights, torch.tensor([[5.0], [7.5]]))
    >>> made.predicted, made.real
    (tensor([[3.]], dtype=torch.float64), tensor([[2.5000]], dtype=torch.float64))
    """
    shapes = [[*of.shape] for of in (scores, weights, losses)]
    if shapes[1:] != [[len(weights), len(scores)], [len(weights), scores.shape[1]]]:
        raise InputError(
            "expected scores [rows, queries], weights [models, rows] and losses [models, queries], got "
            f"shapes {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    full = (weights == 1).all(1)
    if bool(full.all()):
        raise InputError("all models have the rows at weight 1, so nothing changes: retrain at other weights")
    size = (weights - 1).square().mean(1).sqrt().round(decimals=6)[~full]  # rounded, so that sizes are equal
    predicted, real = -((weights[~full] - 1) @ scores.double()), losses.double()[~full]
    if bool(full.any()):
        return Changes(size, predicted, real - losses.double()[full].mean(0), True)
    for one in size.unique():
        own = size == one
        predicted[own] -= predicted[own].mean(0)
        real[own] -= real[own].mean(0)
    return Changes(size, predicted, real, False)


class Agreement(NamedTuple):
    """How predicted changes agree with real ones, over models and queries; NaN where nothing is predicted.

    Args:
        slope: of the line through 0 that fits the real changes best: 1 where the sizes are right.
        correlation: Pearson's.
    """

    slope: Estimate
    correlation: Estimate


def agreement(found: Changes, *, draws: int = DRAWS, seed: int = 0) -> Agreement:
    """Slope and correlation of changes, with 95 % bootstrap intervals over models and queries.

        slope = sum p r / sum p²,   correlation = cov(p, r) / sqrt(var(p) var(r))

    Args:
        found: the changes p and r, with at least two of them.
        draws, seed: of the bootstrap, which draws models and queries anew, both with replacement. A single
            model is in every draw, and so is a single query.

    >>> one = Changes(torch.ones(2).double(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(),
    ...     torch.tensor([[2.0, 4.0], [6.0, 8.0]]).double(), True)
    >>> agreement(one).slope.value, round(agreement(one).correlation.value, 6)
    (2.0, 1.0)
    """
    models, queries = found.real.shape
    generator = torch.Generator().manual_seed(seed)
    lines, columns = (
        torch.cat([torch.ones(n, 1), counts_of_draws(n, draws, generator)], 1).double()
        for n in (models, queries)
    )

    def mean(values: Tensor) -> Tensor:
        return ((values.T @ lines) * columns).sum(0) / found.real.numel()

    p, r = found.predicted, found.real
    pp, pr, rr = mean(p * p), mean(p * r), mean(r * r)
    slope = torch.where(pp > 0, pr / pp, nan)
    spread = (pp - mean(p).square()) * (rr - mean(r).square())
    related = torch.where(spread > 0, (pr - mean(p) * mean(r)) / spread.clamp_min(0).sqrt(), nan)
    return Agreement(*(_estimate(values) for values in (slope, related.clamp(-1, 1))))


def _estimate(values: Tensor) -> Estimate:
    """The first value, and the middle of the others where it is known."""
    drawn = values[1:][values[1:].isfinite()]
    if not bool(values[0].isfinite()) or not len(drawn):
        return Estimate(nan, nan, nan)
    return Estimate(float(values[0]), *middle(drawn))
