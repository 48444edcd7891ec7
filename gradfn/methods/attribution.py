"""What every attribution method is: something that yields scores of training rows for queries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradfn.engine.stream import Progress
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping
from gradfn.subject import Subject
from gradfn.types import Blocks, Data, Rows

Queries = Data | Blocks | None
"""Query examples; or their gradients, `{block: [queries, ...]}`; or None: each row against itself."""


@runtime_checkable
class Scorer(Protocol):
    """Scores of rows for the queries that it was made for."""

    def __call__(self, train: Data, rows: range | None = None, *, progress: Progress | None = None) -> Rows:
        """Score rows.

        Args:
            train: training examples.
            rows: which of them; None means all.
            progress: called with the tokens done.

        Returns:
            `values [rows, dampings * queries]`, the queries of one damping after those of another, or by
            block `{block: the same}`, which sum to them; `losses [rows]`. Positive = proponent.
        """
        ...


@runtime_checkable
class Attribution(Protocol):
    """Anything that yields scores of training rows for queries.

    An inner product of gradients in the geometry of a curvature is one case (`InnerProduct`), a sum over
    checkpoints another (`Joined`). One of your own needs these two methods and a tuple of dampings, and goes
    wherever a method goes: `gf.score`, a recipe, `gradfn score --method FILE.py:NAME`.
    """

    @property
    def damping(self) -> tuple[Damping | None, ...]:
        """What scores come for, one after the other; `(None,)` where nothing is damped."""
        ...

    def scorer(self, subject: Subject, query: Queries, *, by_block: bool = False) -> Scorer:
        """Make the function that scores rows for these queries.

        Args:
            subject: the model, losses and view.
            query: the queries.
            by_block: whether to give each block's share of a score.

        Raises:
            InputError: queries, or a view, that this attribution cannot have.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """All that the scores depend on beside subject, rows and queries, as plain JSON values."""
        ...


Combine = Callable[[Sequence[Rows], Sequence[float]], Tensor]
"""Scores `[rows, queries]` and losses of every part, and the parts' weights, to scores."""


def weighted_sum(parts: Sequence[Rows], weights: Sequence[float]) -> Tensor:
    """`sum_m w_m score_m`."""
    terms = [weight * one.values for one, weight in zip(parts, weights, strict=True)]  # pyright: ignore
    return torch.stack(terms).sum(0)


def best_query(parts: Sequence[Rows], weights: Sequence[float]) -> Tensor:
    """The largest of a row's scores over the queries, `[rows, 1]`: LESS selects rows for any of its tasks."""
    return weighted_sum(parts, weights).amax(1, keepdim=True)


def times_doubt(parts: Sequence[Rows], weights: Sequence[float]) -> Tensor:
    """TRAK's: the mean score times the mean of `1 - p`, where the loss is minus the log of the odds of p.

    Of a row that the model is sure of, `1 - p` may be too small for float32, and the product not.
    """
    if not sum(weights) > 0:
        raise InputError("trak takes means over checkpoints: give weights with a sum above 0")
    scores = weighted_sum(parts, weights)
    terms = [weight * one.losses.double().sigmoid() for one, weight in zip(parts, weights, strict=True)]
    return (scores.double() * (torch.stack(terms).sum(0) / sum(weights))[:, None]).to(scores)


@dataclass(frozen=True, eq=False)
class Joined:
    """One attribution made of several, each of a checkpoint (or a segment of training) of its own.

    Args:
        parts: the attributions, each with the subject that it is of; None is the subject that is scored.
        weights: one a part; None means `1 / number of parts`.
        combine: how the parts' scores become one, see `weighted_sum`.

    >>> import gradfn as gf
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> both = Joined([(None, gf.grad_dot()), (None, gf.grad_dot())], weights=[1.0, 0.5])
    >>> data = [{"x": torch.tensor([1.0, 2.0])}]
    >>> gf.score(net, data, data, method=both, loss=loss).matrix
    tensor([[7.5000]])
    """

    parts: Sequence[tuple[Subject | None, Attribution]]
    weights: Sequence[float] | None = None
    combine: Combine = weighted_sum

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("nothing to join: give one attribution or more")
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise InputError(
                f"{len(self.weights)} weights for {len(self.parts)} attributions: give one for each"
            )

    @property
    def damping(self) -> tuple[Damping | None, ...]:
        """Those of the parts, which must agree."""
        (first, *others) = (one.damping for _, one in self.parts)
        if any(other != first for other in others):
            raise InputError("attributions of different dampings cannot be joined: give all the same")
        return first

    def scorer(self, subject: Subject, query: Queries, *, by_block: bool = False) -> Scorer:
        """See `Attribution`; gradients of queries belong to one model, so these must be examples."""
        if by_block:
            raise InputError("joined scores are not told apart by block: score each part by itself")
        if isinstance(query, dict) and any(own is not None for own, _ in self.parts):
            raise InputError("gradients of queries are of one model: give the query examples themselves")
        scorers = [one.scorer(own or subject, query) for own, one in self.parts]
        weights = self.weights or [1 / len(self.parts)] * len(self.parts)

        def score(train: Data, rows: range | None = None, *, progress: Progress | None = None) -> Rows:
            made = [scorer(train, rows, progress=progress) for scorer in scorers]
            return Rows(self.combine(made, weights), made[-1].losses)

        return score

    def settings(self) -> dict[str, Any]:
        """Those of the parts, and how they are joined."""
        weights = None if self.weights is None else list(self.weights)
        parts = [one.settings() for _, one in self.parts]
        return {"joined": parts, "weights": weights, "combine": self.combine.__name__}
