"""Descent on data: the weights of rows that lower a validation loss most, by metagradients."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from gradfn.errors import InputError
from gradfn.train.course import Course, row_weights
from gradfn.train.magic import metagradient
from gradfn.train.step import losses_of
from gradfn.types import Data, Example, LossFn, Params

Rule = Literal["sign", "gradient"]
"""How far a weight moves: each as far as the others, or in proportion to its derivative."""


class Descended(NamedTuple):
    """A training at some weights of its rows, on the way to better ones.

    Args:
        step: how many steps the weights have taken.
        weights: of the rows, their mean is that of the first ones. They are all that the next step needs.
        loss: the mean loss of the validation rows behind this training.
        params: the end of this training.
    """

    step: int
    weights: Float64[Tensor, " rows"]
    loss: float
    params: Params


def descend(
    course: Course,
    start: Params,
    validation: Data,
    validation_loss: LossFn | None = None,
    *,
    steps: int,
    rate: float = 0.1,
    rule: Rule = "sign",
    groups: Int64[Tensor, " rows"] | None = None,
) -> Iterator[Descended]:
    """Train, differentiate the validation loss in the weights of the rows, move the weights, and again.

        v_i = -dL/dw_i less its mean over rows
        d_i = sign v_i                           or, of rule "gradient", v_i divided by its mean size
        w  <- max(0, w + rate (d - mean d)),     then scaled to the sum that it had

    The sum is held, because it acts as a learning rate. A step costs a training and a metagradient of one
    query. The weights are the whole state: to go on from a step, give `replace(course, weights=weights)`.

    Args:
        course: the training; descent begins at its weights, 1 unless it has others.
        start: the parameters before it.
        validation: rows whose mean loss is lowered. Their loss falls faster than that of rows held out, so
            keep some.
        validation_loss: of such a row; None: the loss of the course.
        steps: of the weights; one training more is yielded, the first at the weights given.
        rate: how far a weight moves in a step, at most (rule "sign") or on average.
        rule: see above. "sign" needs no scale, and is not led by single rows.
        groups: the number of the source of each row, from 0: rows of one source have one weight, of which
            the derivative is their mean. None: each row has its own.

    Yields:
        `Descended`, `steps + 1` times; a training that is not asked for is not made.

    Raises:
        InputError: no validation rows, a rate that is not above 0, groups that are not one number a row,
            weights of visits or tokens; whatever `metagradient` refuses.

    >>> from gradfn.train import Training
    >>> def loss(p, e):
    ...     return (p["w"] - e["y"]).square() / 2
    >>> data = [{"y": torch.tensor(float(y))} for y in (1, 9)]  # the second is wrong
    >>> course = Course(loss, data, Training(1, 2, 0.5, "sgd"))
    >>> for made in descend(course, {"w": torch.zeros(())}, [{"y": torch.tensor(1.0)}], steps=2, rate=0.25):
    ...     print(made.weights.tolist(), round(made.loss, 3))
    [1.0, 1.0] 1.125
    [1.25, 0.75] 0.5
    [1.5, 0.5] 0.125

    Source: Optimizing ML training with metagradients, arXiv:2503.13751, section 3.
    """
    rows = len(course.data)
    weights = torch.ones(rows).double() if course.weights is None else course.weights.double().cpu()
    if not len(validation):
        raise InputError("there are no validation rows: give one or more")
    if not 0 < rate < float("inf") or rule not in get_args(Rule) or steps < 0:
        raise InputError(
            f"{steps} steps at a `rate` of {rate} by the rule {rule!r}: give 0 steps or more, a rate above "
            f"0, and one of {', '.join(get_args(Rule))}"
        )
    if weights.shape != (rows,):
        raise InputError("weights of visits or of tokens cannot be moved: give one number a row")
    if groups is not None and (groups.shape != (rows,) or int(groups.min()) < 0):
        raise InputError(
            f"expected `groups` of {rows} numbers from 0 on, one a row, got {list(groups.shape)}"
        )
    own = torch.arange(rows) if groups is None else groups.cpu()
    return _steps(
        course, start, _mean_of(course, validation, validation_loss), weights, steps, rate, rule, own
    )


def _steps(
    course: Course,
    start: Params,
    mean: LossFn,
    weights: Tensor,
    steps: int,
    rate: float,
    rule: Rule,
    groups: Tensor,
) -> Iterator[Descended]:
    def told(step: int, params: Params) -> Descended:
        with torch.no_grad():
            return Descended(step, weights, float(mean(params, {})), params)

    for step in range(steps):
        made = metagradient(replace(course, weights=weights), start, [{"rows": torch.zeros(())}], mean)
        yield told(step, made.end.params)
        weights = _moved(weights, made.values[:, 0], rate, rule, groups)
    *_, last = replace(course, weights=weights).steps(course.start(start))
    yield told(steps, last.state.params)


def _moved(weights: Tensor, values: Tensor, rate: float, rule: Rule, groups: Tensor) -> Tensor:
    """The weights after a step: minus derivatives are the `values`."""
    sizes = groups.bincount().clamp_min(1)
    v = (torch.zeros(len(sizes)).double().index_add(0, groups, values) / sizes)[groups]
    v = v - v.mean()
    d = v.sign() if rule == "sign" else v / v.abs().mean().clamp_min(torch.finfo(v.dtype).tiny)
    moved = (weights + rate * (d - d.mean())).clamp_min(0)
    return moved * (weights.sum() / moved.sum())


def _mean_of(course: Course, validation: Data, loss: LossFn | None) -> LossFn:
    """The mean loss of the validation rows, as the loss of one query that is not looked at."""
    asked = course if loss is None else replace(course, loss=loss, normalize="rows")
    rows = np.arange(len(validation))
    shares, losses = row_weights(asked.loss, validation, rows, asked.normalize), losses_of(asked.loss)

    def mean(params: Params, example: Example) -> Tensor:
        device = next(iter(params.values())).device
        parts = [
            losses(params, batch) @ shares[places].to(device, next(iter(params.values())).dtype)
            for places, batch in asked.parts(rows, device, validation)
        ]
        return torch.stack(parts).sum()

    return mean
