"""Statistics fitted over data: `Fold(init, update, merge, finalize)`.

`merge` is associative and commutative, so chunking, resuming, sharding and mixing are one operation.
A batch's sums are made in float32 or better, whatever the model's dtype, and kept in float64 (the covariances
of factors: float32 or better).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Generic, Protocol, TypeVar, Unpack, runtime_checkable

import numpy as np
import torch
from torch import nn

from gradfn.engine.engine import Engine, probe_engine
from gradfn.engine.stream import Progress, collect, lengths_of, stream
from gradfn.errors import InputError
from gradfn.memory import check_memory, release_memory
from gradfn.model.sites import Site
from gradfn.subject import TOKEN_BATCH_SIZE, Subject, SubjectOptions, subject_of
from gradfn.transforms import Dot, Rowwise, Transform, chain
from gradfn.types import Blocks, Data

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
class FoldState:
    """A count of rows and sums over them.

    Args:
        shapes: the shape `(out, in)` of each block they were made of.
        dtype: what the sums of a batch were made in, the coarsest of all: it tells their rounding, for they
            may be kept in a wider one.
    """

    count: int
    blocks: Blocks
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The one that rounds most.

    >>> coarser(torch.float64, torch.float32)
    torch.float32
    """
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _coarsest(blocks: Blocks) -> torch.dtype:
    return coarser(*{value.dtype for value in blocks.values()})


class Additive(Generic[Result]):
    """Folds whose state is a count of rows and sums over them: merging adds.

    `stage` says what is summed. It ends a chain, so the sums are made inside the backward pass, while one
    layer's gradients are alive; `update` makes the same sums of blocks at hand.
    """

    accumulator: ClassVar[torch.dtype] = torch.float64
    """What sums are kept in, or the dtype of the gradients where that is wider."""
    gives_curvature: ClassVar[bool] = False
    """Whether what comes out is a curvature, which one fitted before may stand in for."""

    def stage(self) -> Transform:
        """The transform of rows to sums, a chain that ends in `RowSum` or `FactorSum`."""
        raise NotImplementedError

    def finalize(self, state: FoldState) -> Result:
        """What was wanted, of the sums."""
        raise NotImplementedError

    def wants_rows(self, shapes: Mapping[str, tuple[int, ...]], count: int) -> bool:
        """Whether `of_rows` costs less than sums do, for so many rows of blocks of these shapes."""
        return False

    def of_rows(self, blocks: Blocks) -> Result:
        """What was wanted, of all rows at once."""
        raise NotImplementedError

    def init(self) -> FoldState:
        """No rows."""
        return FoldState(0, {})

    def merge(self, a: FoldState, b: FoldState) -> FoldState:
        """Add counts and sums."""
        if not a.blocks or not b.blocks:
            return a if a.blocks else b
        if a.blocks.keys() != b.blocks.keys():
            raise InputError(
                f"sums over {len(a.blocks)} blocks and over {len(b.blocks)} others do not add up: make both "
                "of the same layers"
            )
        blocks = {name: a.blocks[name] + b.blocks[name] for name in a.blocks}
        return FoldState(a.count + b.count, blocks, a.shapes, coarser(a.dtype, b.dtype))

    def update(self, state: FoldState, blocks: Blocks) -> FoldState:
        """Add the rows' share."""
        count = len(next(iter(blocks.values())))
        share = self.stage()(blocks)
        assert isinstance(share, dict)
        shapes = {name: tuple(G.shape[1:]) for name, G in blocks.items()}
        return self.merge(state, FoldState(count, self._wide(share), shapes, _coarsest(share)))

    def _wide(self, share: Blocks) -> Blocks:
        return {n: v.to(torch.promote_types(v.dtype, self.accumulator), copy=True) for n, v in share.items()}

    def add(self, state: FoldState, share: FoldState) -> FoldState:
        """Like `merge`, in the memory of `state`, which is given up; block by block out of `share`."""
        if not state.blocks:
            return FoldState(share.count, self._wide(share.blocks), share.shapes, share.dtype)
        for name in state.blocks:
            state.blocks[name].add_(share.blocks.pop(name))
        return FoldState(
            state.count + share.count, state.blocks, state.shapes, coarser(state.dtype, share.dtype)
        )


def refuse_empty(state: FoldState) -> None:
    """Refuse a statistic of no rows."""
    if not state.count:
        raise InputError("a statistic of no rows: give at least one example")


@runtime_checkable
class TwoPass(Protocol, Generic[Result]):
    """A statistic that needs another one first, from a pass of its own."""

    @property
    def first(self) -> Additive[Any]:
        """What is fitted first."""
        ...

    def then(self, fitted: Any) -> Additive[Result]:
        """What is fitted next, given that."""
        ...


def sums_of(
    fold: Additive[Any],
    engine: Engine,
    data: Data,
    *,
    rows: range | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> tuple[FoldState, float]:
    """The sums of a fold over data, and the sum of the losses.

    Args:
        engine: one that ends in the fold's stage.
        rows: which rows; None means all.
        data, token_batch_size, progress: see `collect`.
    """
    state, losses, lengths, shapes = fold.init(), 0.0, lengths_of(data), {}
    batches = stream(engine, data, rows=rows, token_batch_size=token_batch_size, progress=progress)
    for numbers, result in batches:
        assert isinstance(result.values, dict)
        count = int(lengths[numbers].sum()) if engine.view.tokens else len(numbers)
        shapes = shapes or _summed_shapes(engine)
        state = fold.add(state, FoldState(count, dict(result.values), shapes, _coarsest(result.values)))
        losses += float(result.losses.double().sum())
    return state, losses


def _stages_by_row(transform: Transform) -> tuple[Transform, ...]:
    """The stages from the first that needs all blocks of a row, but the last, the sum itself."""
    stages = chain(transform).stages[:-1]
    at = next((i for i, stage in enumerate(stages) if isinstance(stage, Rowwise)), len(stages))
    return stages[at:]


def _summed_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The shape of a row of every block that is summed."""
    blocks = {
        name: torch.empty(0, *plan.summed, dtype=plan.dtype, device=plan.device)
        for name, plan in engine.lowered().plans.items()
    }
    summed = chain(*_stages_by_row(engine.transform))(blocks)
    assert isinstance(summed, dict)
    return {name: tuple(G.shape[1:]) for name, G in summed.items()}


def state_bytes(fold: Additive[Any], engine: Engine) -> dict[str, int]:
    """What each block's sums take in memory: those of a batch and those kept."""
    plans = engine.lowered().plans
    if _stages_by_row(engine.transform):  # the blocks that are summed are others than the layers'
        dtype = next(iter(plans.values())).dtype
        rows = {n: torch.empty(0, *s, dtype=dtype, device="meta") for n, s in _summed_shapes(engine).items()}
        share: Any = fold.stage()(rows)
        wide = torch.promote_types(dtype, fold.accumulator).itemsize
        return {name: total.numel() * (total.element_size() + wide) for name, total in share.items()}
    kept = {name: torch.promote_types(plan.dtype, fold.accumulator).itemsize for name, plan in plans.items()}
    return {name: prod(plan.shape) * (plan.dtype.itemsize + kept[name]) for name, plan in plans.items()}


def _partitions(fold: Additive[Any], engine: Engine, count: int) -> list[list[Site]]:
    """The sites in `count` parts of about equal memory, in the model's order; uses of a weight together."""
    by_row = _stages_by_row(engine.transform)
    if by_row and count == 1:
        return [list(engine.sites)]
    if by_row:
        raise InputError(f"{by_row[0]} needs all blocks of a row at once: fit in one pass (partitions=1)")
    sizes = state_bytes(fold, engine)
    if not 1 <= count <= len(sizes):
        raise InputError(f"{count} partitions of {len(sizes)} blocks: choose between 1 and {len(sizes)}")
    own = np.array(list(sizes.values()))
    middles = np.cumsum(own) - own / 2
    part = {name: int(middle * count / own.sum()) for name, middle in zip(sizes, middles, strict=True)}
    parts = [[site for site in engine.sites if part[site.block] == i] for i in range(count)]
    return [sites for sites in parts if sites]


def _refuse_too_large(fold: Additive[Any], engine: Engine, parts: Sequence[Sequence[Site]]) -> None:
    """Refuse sums that would not fit in memory, before the pass."""
    sizes = state_bytes(fold, engine)
    blocks = [{site.block for site in sites} for sites in parts]
    parted = len(parts) > 1  # in one pass all of them are held, also those that are no layer's
    most = max(sum(sizes[name] for name in names) for names in blocks) if parted else sum(sizes.values())
    check_memory(
        most, f"the sums of {type(fold).__name__}",
        "fit them in several passes (`partitions=4`), or project the gradients (`gf.project(32)`)",
        next(engine.model.parameters()).device,
    )  # fmt: skip


def check_fit(
    fold: Additive[Any] | TwoPass[Any],
    model: nn.Module | Subject,
    transform: Transform | None = None,
    *,
    partitions: int = 1,
    **options: Unpack[SubjectOptions],
) -> None:
    """Refuse what a fit of these would refuse, before any data is looked at; see `fit`."""
    first, subject = fold.first if isinstance(fold, TwoPass) else fold, subject_of(model, **options)
    whole = chain(transform or chain(), first.stage())
    engine = probe_engine(subject.model, subject.loss, whole, view=subject.view)
    engine.lowered()
    _partitions(first, engine, partitions)


def fit_sums(
    fold: Additive[Any],
    model: nn.Module | Subject,
    data: Data,
    transform: Transform | None = None,
    *,
    rows: range | None = None,
    partitions: int = 1,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> FoldState:
    """The sums that a statistic is made of, `fold.finalize` left out; those of parts of the rows add up.

    Args:
        fold: of one pass.
        rows: which rows of the data; None means all.
        model, data, transform, partitions, progress, options: see `fit`.

    >>> import torch
    >>> net = nn.Linear(1, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> data = [{"x": torch.full((1,), x)} for x in (1.0, 2.0, 4.0)]
    >>> from gradfn.statistics import mean
    >>> a, b = (fit_sums(mean(), net, data, rows=rows, loss=loss) for rows in (range(1), range(1, 3)))
    >>> mean().merge(a, b).blocks
    {'root': tensor([[7.]], dtype=torch.float64)}
    """
    subject, whole = subject_of(model, **options), chain(transform or chain(), fold.stage())
    engine = probe_engine(subject.model, subject.loss, whole, view=subject.view)
    parts = _partitions(fold, engine, partitions)
    _refuse_too_large(fold, engine, parts)
    state = fold.init()
    for sites in parts:
        one = Engine(subject.model, engine.loss, whole, sites, engine.view)
        size = subject.token_batch_size
        sums, _ = sums_of(fold, one, data, rows=rows, token_batch_size=size, progress=progress)
        dtype = coarser(state.dtype, sums.dtype)
        state = FoldState(sums.count, state.blocks | sums.blocks, state.shapes | sums.shapes, dtype)
    release_memory()  # sums are decomposed in large pieces
    return state


def passes(fold: Any) -> int:
    """How many times a fit goes over the data.

    >>> from gradfn.statistics import mean
    >>> passes(mean())
    1
    """
    return 2 if isinstance(fold, TwoPass) else 1


def fit(
    fold: Fold[State, Result] | Additive[Result] | TwoPass[Result],
    model: nn.Module | Subject,
    data: Data,
    transform: Transform | None = None,
    *,
    partitions: int = 1,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Result:
    """Fit a statistic over the transformed per-example gradients of data.

    Args:
        fold: what to fit: `mean()`, `total()`, `adam_moments()`, `second_moment()`, `kfac()`, `ekfac()`,
            `shampoo()`, `eshampoo()`, `tkfac()`, or one of your own.
        partitions: fit the blocks in so many passes over the data, each with its share of them, so that
            fewer sums are held at a time; it changes no result.
        model, data, transform, progress, options: see `collect`.

    Returns:
        What the fold's `finalize` gives.

    Raises:
        InputError: no rows, a loss that is not finite, sums that do not fit in memory, partitions of
            what needs all blocks of a row at once (`unit_normalize`, `joint`).

    >>> import torch
    >>> net = nn.Linear(1, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> from gradfn.statistics import mean
    >>> fit(mean(), net, [{"x": torch.ones(1)}, {"x": torch.zeros(1)}], loss=loss)
    {'root': tensor([[[0.5000]]])}
    """
    subject = subject_of(model, **options)
    if any(isinstance(stage, Dot) for stage in chain(transform or chain()).stages):
        raise TypeError("a fold needs blocks: the transform must not end in scores")

    def run(fold: Additive[Any]) -> Any:
        if partitions == 1 and not subject.view.tokens and len(data):
            whole = chain(transform or chain(), fold.stage())
            engine = probe_engine(subject.model, subject.loss, whole, view=subject.view)
            if fold.wants_rows(_summed_shapes(engine), len(data)):
                rows = collect(subject, data, transform, progress=progress)
                assert isinstance(rows, dict)
                device = next(subject.model.parameters()).device
                return fold.of_rows({name: G.to(device) for name, G in rows.items()})
        sums = fit_sums(fold, subject, data, transform, partitions=partitions, progress=progress)
        return fold.finalize(sums)

    if isinstance(fold, Additive):
        return run(fold)
    if isinstance(fold, TwoPass):
        return run(fold.then(run(fold.first)))
    if partitions != 1:
        raise InputError(f"{type(fold).__name__} is fitted in one pass: leave out partitions")
    engine = probe_engine(subject.model, subject.loss, transform, view=subject.view)
    state = fold.init()
    for _, result in stream(engine, data, token_batch_size=subject.token_batch_size, progress=progress):
        assert isinstance(result.values, dict)
        state = fold.update(state, result.values)
    return fold.finalize(state)
