"""Whether a training is smooth in the weights of its rows, so that a derivative says what a removal does."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gradfn.errors import InputError
from gradfn.random import normals
from gradfn.train.course import Course
from gradfn.types import Data, LossFn, Params
from gradfn.watch import WATCH

Verdict = Literal["smooth", "between", "rough"]
"""Whether derivatives predict what removals do: they do, for part of it, or they do not."""


@dataclass(frozen=True)
class Smoothness:
    """How smooth a training is at steps of size h in the weights of its rows; see `metasmoothness`.

    Args:
        agreement: S, from -1 to 1: how far the parameters go on in the direction that they took. 1: smooth.
        curvature: the mean of `|f''|` over queries and directions, f the loss of a query.
        bend: the mean of `|f''| h` over that of `|f'|`: how much the derivative changes on the way.
        movement: `|theta_2 - theta_0|_1 / |theta_0 - start|_1`, how far the parameters moved beside how far
            the training moves them.
        h: the size of a step.
    """

    agreement: float
    curvature: float
    bend: float
    movement: float
    h: float

    @property
    def verdict(self) -> Verdict:
        """In a word: rough where the derivative changes by its own size on the way.

        >>> Smoothness(agreement=0.8, curvature=25.0, bend=1.7, movement=0.3, h=0.1).verdict
        'rough'
        """
        if self.agreement < 0.9 or not self.bend <= 1:
            return "rough"
        return "smooth" if self.agreement >= 0.97 and self.bend <= 0.5 else "between"


class _Seen(NamedTuple):
    """What one direction shows."""

    agreement: Tensor
    curvature: Tensor
    slope: Tensor
    movement: Tensor


def metasmoothness(
    course: Course,
    start: Params,
    queries: Data,
    query_loss: LossFn | None = None,
    *,
    h: float = 0.2,
    directions: int = 3,
    seed: int = 0,
) -> Smoothness:
    """Whether metagradients of a training may be trusted, by 1 + 2 trainings for each direction.

    With `theta_k` the end of the training at the weights `1 + k h v`, `v ~ N(0, I)` over the rows:

        S = sum_j sign(theta_1 - theta_0)_j sign(theta_2 - theta_1)_j d_j / |d|_1,    d = |theta_2 - theta_0|
        f' = (f_2 - f_0) / 2h,    f'' = (f_2 - 2 f_1 + f_0) / h²,    f_k the loss of a query at theta_k

    S alone can mislead: at a small h every training looks smooth. Masking a fraction f of the rows is a step
    of about `h = sqrt(f)`, so give the h of the removals that are asked about.

    Args:
        course: the training, at its own weights, 1 unless it has others.
        start: the parameters before it.
        queries: examples, each a query.
        query_loss: of such an example; None: the loss of the course.
        h: see above; .2 is for removals of 4 %.
        directions: v's, of which means are taken.
        seed: of the directions.

    Raises:
        InputError: an h that is not above 0, fewer than one direction, no queries.

    >>> from gradfn.train import Training
    >>> def loss(p, e):
    ...     return (p["w"] - e["y"]).square() / 2
    >>> data = [{"y": torch.tensor(float(y)).double()} for y in (1, 3)]
    >>> course, start = Course(loss, data, Training(1, 2, 0.5, "sgd")), {"w": torch.zeros(()).double()}
    >>> found = metasmoothness(course, start, data)
    >>> round(found.agreement, 3), round(found.movement, 3)  # one step of SGD is linear in the weights
    (1.0, 0.066)

    Source: MAGIC, arXiv:2504.16430; Optimizing ML training with metagradients, arXiv:2503.13751, section 4.
    """
    if not 0 < h < float("inf") or directions < 1 or not len(queries):
        raise InputError(
            f"{len(queries)} queries and {directions} directions at h = {h}: give 1 or more of both, and "
            "an h above 0"
        )
    rows = len(course.data)
    weights = torch.ones(1, rows, 1, dtype=torch.float64) if course.placed is None else course.placed
    asked = course if query_loss is None else replace(course, loss=query_loss, normalize="rows")

    def end(weights: Tensor) -> tuple[Tensor, Tensor]:
        state = course.start(start)
        for taken in replace(course, weights=weights).steps(state):
            state = taken.state
            told(1)
        return _flat(state.params), asked.row_losses(state.params, queries)

    seen = []
    with WATCH.get()("trainings", (1 + 2 * directions) * course.total, "steps") as told:
        first = end(weights)
        for number in range(directions):
            v = torch.from_numpy(normals(rows, "metasmoothness", seed, number))[:, None]
            seen.append(_compare(h, first, end(weights + h * v), end(weights + 2 * h * v)))
    agreement, curvature, slope, movement = (torch.stack(part).mean() for part in zip(*seen, strict=True))
    whole = (first[0] - _flat(start)).abs().sum()
    return Smoothness(
        float(agreement), float(curvature), float(curvature * h / slope), float(movement / whole), h
    )


def _compare(h: float, *ends: tuple[Tensor, Tensor]) -> _Seen:
    """One direction, by the parameters and the losses at 0, h and 2 h."""
    (p0, f0), (p1, f1), (p2, f2) = ends
    moved = (p2 - p0).abs()
    same = (p1 - p0).sign() * (p2 - p1).sign()
    return _Seen(
        (same * moved).sum() / moved.sum(),
        ((f2 - 2 * f1 + f0) / h**2).abs().mean(),
        ((f2 - f0) / (2 * h)).abs().mean(),
        moved.sum(),
    )


def _flat(params: Params) -> Tensor:
    return torch.cat([value.detach().double().cpu().flatten() for _, value in sorted(params.items())])
