"""Statistics fitted over data: `Fold(init, update, merge, finalize)`.

`merge` is associative and commutative, so chunking, resuming, sharding and mixing are one operation.
Folds accumulate in float64 on the CPU, whatever the model's dtype.
"""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.layers import View
from gradfn.losses import causal_lm_loss
from gradfn.probes import probe_engine
from gradfn.stream import TOKEN_BATCH_SIZE, Progress, stream
from gradfn.transforms import Adam, Transform, adam
from gradfn.types import Blocks, Data, LossFn

State = TypeVar("State")
Result = TypeVar("Result", covariant=True)


@runtime_checkable
class Fold(Protocol, Generic[State, Result]):
    """A statistic of the rows of blocks that any partition of the rows gives alike."""

    def init(self) -> State:
        """The state of no rows."""
        ...

    def update(self, state: State, blocks: Blocks) -> State:
        """The state after these rows too."""
        ...

    def merge(self, a: State, b: State) -> State:
        """The state of both sets of rows."""
        ...

    def finalize(self, state: State) -> Result:
        """What was wanted."""
        ...


@dataclass(frozen=True, eq=False)
class Sums:
    """A count of rows and sums over them, float64."""

    count: int
    blocks: Blocks


class _Additive:
    """Folds whose state is a count and sums: merging adds."""

    def init(self) -> Sums:
        """No rows."""
        return Sums(0, {})

    def merge(self, a: Sums, b: Sums) -> Sums:
        """Add counts and sums."""
        if not a.blocks or not b.blocks:
            return a if a.blocks else b
        return Sums(a.count + b.count, {name: a.blocks[name] + b.blocks[name] for name in a.blocks})

    def update(self, state: Sums, blocks: Blocks) -> Sums:
        """Add the rows' share."""
        count = len(next(iter(blocks.values())))
        share = {name: self.row_sum(G).double().cpu() for name, G in blocks.items()}
        return self.merge(state, Sums(count, share))

    def row_sum(self, G: Tensor) -> Tensor:
        """What is summed over the rows of one block."""
        raise NotImplementedError


def _refuse_empty(state: Sums) -> None:
    if not state.count:
        raise InputError("a statistic of no rows: give at least one example")


@dataclass(frozen=True)
class Mean(_Additive):
    """The mean (or sum) of the rows; see `mean` and `total`."""

    divide: bool = True

    def row_sum(self, G: Tensor) -> Tensor:
        """The plain sum."""
        return G.double().sum(0)

    def finalize(self, state: Sums) -> Blocks:
        """One row of float32 blocks, `{block: [1, ...]}`."""
        _refuse_empty(state)
        scale = state.count if self.divide else 1
        return {name: (total / scale).float()[None] for name, total in state.blocks.items()}


def mean() -> Mean:
    """The mean of the rows, `{block: [1, ...]}`.

    >>> import torch
    >>> fold = mean()
    >>> fold.finalize(fold.update(fold.init(), {"a": torch.tensor([[1.0], [3.0]])}))
    {'a': tensor([[2.]])}
    """
    return Mean()


def total() -> Mean:
    """The sum of the rows, `{block: [1, ...]}`.

    >>> import torch
    >>> fold = total()
    >>> fold.finalize(fold.update(fold.init(), {"a": torch.tensor([[1.0], [3.0]])}))
    {'a': tensor([[4.]])}
    """
    return Mean(divide=False)


@dataclass(frozen=True)
class AdamMoments(_Additive):
    """The second moment of the rows, elementwise; see `adam_moments`."""

    eps: float = 1e-8

    def row_sum(self, G: Tensor) -> Tensor:
        """The sum of squares."""
        return G.double().square().sum(0)

    def finalize(self, state: Sums) -> Adam:
        """The transform that divides by its root."""
        _refuse_empty(state)
        return adam({name: (total / state.count).float() for name, total in state.blocks.items()}, self.eps)


def adam_moments(eps: float = 1e-8) -> AdamMoments:
    """Fit Adam's second moment over data, `v = mean_b G_b²`; the result is the transform `adam(v, eps)`.

    >>> import torch
    >>> fold = adam_moments()
    >>> fold.finalize(fold.update(fold.init(), {"a": torch.tensor([[[1.0]], [[3.0]]])})).moments
    {'a': tensor([[5.]])}
    """
    return AdamMoments(eps)


def fit(
    fold: Fold[State, Result],
    model: nn.Module,
    data: Data,
    transform: Transform | None = None,
    *,
    loss: LossFn | None = None,
    view: View | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> Result:
    """Fit a statistic over the transformed per-example gradients of data.

    Args:
        fold: what to fit: `mean()`, `total()`, `adam_moments()`, or one of your own.
        model, data, transform, loss, view, token_batch_size, progress: see `collect`.

    Returns:
        What the fold's `finalize` gives.

    >>> import torch
    >>> net = nn.Linear(1, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> fit(mean(), net, [{"x": torch.ones(1)}, {"x": torch.zeros(1)}], loss=loss)
    {'root': tensor([[[0.5000]]])}
    """
    engine = probe_engine(model, loss or causal_lm_loss(model), transform, view=view)
    state = fold.init()
    for _, result in stream(engine, data, token_batch_size=token_batch_size, progress=progress):
        if not isinstance(result.values, dict):
            raise TypeError("a fold needs blocks: the transform must not end in scores")
        state = fold.update(state, result.values)
    return fold.finalize(state)
