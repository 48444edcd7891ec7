"""Curvatures fitted in shards, and merging what array jobs wrote."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import nn

from gradfn.engine.stream import lengths_of
from gradfn.errors import InputError
from gradfn.runs.curvatures import Asked, Labels, load_curvature, write_curvature
from gradfn.runs.output import Output, RunOptions, output_of
from gradfn.runs.provenance import Provenance
from gradfn.runs.shards import (
    complete_shards,
    join_shards,
    joinable_shards,
    refuse_gaps,
    shard_rows,
    shards_of,
    whole_request,
)
from gradfn.runs.visits import join_recorded, recorded_shards
from gradfn.statistics import Curvature, ekfac, eshampoo, kfac, second_moment, shampoo, tkfac
from gradfn.statistics.fold import Additive, FoldState, TwoPass, fit_sums
from gradfn.store import Store, Writer, differing, in_words, open_store, open_writer, remove_kind
from gradfn.store.guard import refuse_links
from gradfn.store.verify import check_file
from gradfn.subject import Subject
from gradfn.transforms import Transform
from gradfn.types import Data

SUMS = ("sums", "second_sums")
"""Kinds of store with the sums that the shards of a curvature made, in the first and second pass."""
SUMMED = "fit/sums"
"""Where a merged curvature keeps which sums it is of."""
BASIS = "basis"
"""The kind of store with what the first of two passes gave."""
FOLDS = (second_moment, kfac, ekfac, shampoo, eshampoo, tkfac)


def hessian_shard(
    run: str | Path,
    model: nn.Module | Subject,
    data: Data,
    fold: Any,
    transform: Transform | None = None,
    *,
    labels: Labels = "data",
    seed: int = 0,
    partitions: int = 1,
    **options: Unpack[RunOptions],
) -> int:
    """Write one part's sums of a curvature, for `merge_run` to add up and decompose.

    Of a fit in two passes (ekfac) the sums are the first pass's until these have been merged, and then the
    second's.

    Args:
        run: the run directory, common to all parts.
        fold, model, data, transform, labels, seed, partitions, options: see `hessian`; `shard`, the part of
            the rows, must be given.

    Returns:
        Which pass the sums are of, 1 or 2.

    Raises:
        InputError: see `fit`; no shard, more than rows; the directory holds sums made otherwise.
    """
    output, subject = output_of(run, model, options)
    if (shard := output.shard) is None:
        raise InputError("sums are of a shard: give `shard=Shard(I, N)`, or call hessian for all rows")
    _fold_named(str(fold))
    asked = Asked(subject, data, fold, transform, labels, seed, partitions)
    made, number = asked.made.merged(output.settings), shard.number
    rows = shard_rows(lengths_of(data), shard)
    basis = _basis(output, made) if isinstance(fold, TwoPass) else None
    if basis is not None:
        fold, made = fold.then(basis), replace(made, basis=basis.digest)
    one = fold.first if isinstance(fold, TwoPass) else fold
    kind = SUMS[basis is not None]
    with output.open(kind, made, shard.count, part=(number - 1, number)) as writer:
        if writer.missing([(number - 1, number)]):
            if basis is None:  # second sums would be of another first pass
                remove_kind(output.folder, SUMS[1])
            sums = fit_sums(
                one, subject, asked.labelled(rows), transform, rows=rows, partitions=partitions,
                progress=output.progress,
            )  # fmt: skip
            writer.write(number - 1, number, _sum_arrays(sums, rows))
        writer.finish()
    return 1 + (basis is not None)


def _basis(output: Output, made: Provenance) -> Curvature | None:
    """What a merged first pass gave; None before that, and where another one is to be replaced."""
    if not (Path(output.run) / f"{BASIS}.h5").exists():
        return None
    with open_store(output.run, BASIS) as store:
        unlike = differing(store.settings, made.settings())
    if unlike and not output.overwrite:
        raise InputError(
            f"the first pass in {output.run} was made with other settings ({in_words(unlike)}): give "
            "`overwrite=True` to begin again, or write to another directory"
        )
    return None if unlike else load_curvature(output.run, BASIS)


def _sum_arrays(sums: FoldState, rows: range) -> dict[str, np.ndarray]:
    """Sums over a part as one row of a store."""
    blocks = {f"{SUMS[0]}/{name}": total[None].cpu().numpy() for name, total in sums.blocks.items()}
    shapes = {f"shapes/{name}": np.array([shape]) for name, shape in sums.shapes.items()}
    rounding = torch.tensor([torch.finfo(sums.dtype).eps], dtype=sums.dtype).numpy()
    return {"rows/count": np.array([sums.count]), "rows/span": np.array([[rows.start, rows.stop]]),
            "rows/rounding": rounding, **blocks, **shapes}  # fmt: skip


def _read_sums(store: Store) -> FoldState:
    def read(prefix: str) -> dict[str, np.ndarray]:
        return {n.removeprefix(prefix): store.read(n, *store.span)[0] for n in store.names(prefix)}

    blocks = {name: torch.from_numpy(total) for name, total in read(f"{SUMS[0]}/").items()}
    shapes = {name: tuple(map(int, shape)) for name, shape in read("shapes/").items()}
    count, rounded = int(store.read("rows/count", *store.span)[0]), store.names("rows/rounding")
    # Sums of earlier versions do not say in which precision they were made: they are read as float64.
    rounding = store.read("rows/rounding", *store.span) if rounded else np.zeros(1)
    return FoldState(count, blocks, shapes, torch.from_numpy(rounding).dtype)


def _fold_named(name: str) -> Any:
    """The statistic that the settings of a fitted curvature name."""
    known = {str(make()): make() for make in FOLDS}
    if name not in known:
        names = ", ".join(make.__name__ for make in FOLDS)
        raise InputError(f"{name} is not fitted in shards: choose one of {names}, or leave out the shard")
    return known[name]


@dataclass(frozen=True)
class Joined:
    """What `merge_run` made.

    Args:
        kind: "store", "scores", "hessian", another kind of store; "basis" for the first of two passes, after
            which every shard is to be run once more.
        path: the index file.
        shards: how many parts it was made of.
    """

    kind: str
    path: Path
    shards: int


def merge_run(run: str | Path, *, overwrite: bool = False) -> list[Joined]:
    """Join what the parts of array jobs wrote, `RUN/shards/I-of-N`, to what one process would have written.

    The parts at each of several checkpoints, `RUN/checkpoint-K/shards/I-of-N`, are joined too, and first.
    Everything is checked before anything is written, but for the data of each segment, which is checked
    before it is taken, and whether the disk has room; it may be repeated.

    Args:
        overwrite: replace what is in the run and was made otherwise, without shards, or of shards that have
            been made again since.

    Raises:
        InputError: there are no shards; some are missing, incomplete, overlap, or were made differently; what
            is there was not made of them.
        StorageError: the disk is full or failed.
    """
    checkpoints = sorted(Path(run).glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    refuse_links(*checkpoints)
    plans = [plan for path in [*checkpoints, Path(run)] if (plan := _planned(path, overwrite)) is not None]
    if not plans:
        raise InputError(
            f"{run} has no shards: write them with `shard=Shard(I, N)` of build, score_run, hessian_shard or "
            "retrain"
        )
    return [joined for plan in plans for joined in _carried_out(plan, overwrite)]


def merge_fit(run: str | Path, *, overwrite: bool = False) -> Path:
    """Join the sums of a curvature alone, and leave what other parts there are; see `merge_run`.

    Returns:
        The path of the curvature, or of the first of two passes.
    """
    plan = _planned(Path(run), overwrite, SUMS)
    if plan is None:
        raise InputError(f"{run} has no sums of a curvature: write them with hessian_shard")
    (joined,) = _carried_out(plan, overwrite)
    return joined.path


@dataclass(frozen=True, eq=False)
class _Fit:
    """A curvature, or the first of two passes to one, and the sums that it is made of."""

    kind: str
    made: Provenance
    fold: Additive[Curvature]
    stores: Sequence[Store]

    def curvature(self) -> Curvature:
        state = self.fold.init()
        for store in self.stores:
            state = self.fold.add(state, _read_sums(store))
        return self.fold.finalize(state)

    def digest(self) -> str:
        """16 hex digits that tell these sums from others."""
        digest = hashlib.sha256()
        for store in self.stores:
            for name in store.names():
                digest.update(f"{name} ".encode() + store.read(name, *store.span).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Plan:
    """What there is to join in one run directory: how many parts of each kind, a curvature to fit, and what
    the processes of a training recorded."""

    run: Path
    counts: dict[str, int]
    fit: _Fit | None
    recorded: Sequence[Store] = ()


def _planned(run: Path, overwrite: bool, only: Sequence[str] | None = None) -> _Plan | None:
    """What is to be done in a run directory; None where it has no parts. Refuses all that will not do.

    Args:
        only: the kinds of parts to join; None: all.
    """
    kinds = [kind for kind in shards_of(run) if only is None or kind in only]
    if not kinds:
        return None
    recorded = recorded_shards(run) if "store" in kinds else []
    # The first sums come first: where they are unlike, second ones lack for that reason.
    sums = {kind: complete_shards(run, kind) for kind in SUMS if kind in kinds}
    counts = {
        kind: len(joinable_shards(run, kind, overwrite=overwrite))
        for kind in kinds
        if kind not in SUMS and not (recorded and kind == "store")
    }
    for kind, stores in sums.items():
        for path in [path for store in stores for path in store.files()]:
            check_file(path)
        spans = [store.read("rows/span", *store.span)[0] for store in stores]
        refuse_gaps(run, kind, [(int(a), int(b)) for a, b in spans], _rows_of(stores[0]))
    fit = _fit_of(run, sums.get(SUMS[0], []), sums.get(SUMS[1], [])) if sums else None
    if fit is not None and not overwrite:
        _refuse_other_fit(run, fit)
    return _Plan(run, counts, fit, recorded)


def _rows_of(store: Store) -> int:
    """How many rows the sums of all shards are of."""
    data = Provenance.of(store).data
    assert data is not None
    assert data.rows is not None
    return data.rows


def _fit_of(run: Path, firsts: Sequence[Store], seconds: Sequence[Store]) -> _Fit:
    """The curvature that the sums are for; of the first of two passes, what the second needs."""
    if not firsts:
        return _second_fit(run, seconds)
    made = Provenance.of(firsts[0])
    fold = _fold_of(made)
    if not isinstance(fold, TwoPass):
        return _Fit("hessian", made, fold, firsts)
    first = _Fit(BASIS, made, fold.first, firsts)
    if not seconds:
        return first
    # What the second pass was given counts, and on another machine the same sums may give another rounding.
    basis = _merged_basis(run, made) or first.curvature()
    if differing(seconds[0].settings, replace(made, basis=basis.digest).settings()):
        raise InputError(
            f"the second pass of the shards of {run} was made after another first pass: run all shards again "
            "with `overwrite=True`, then merge"
        )
    return _Fit("hessian", made, fold.then(basis), seconds)


def _second_fit(run: Path, seconds: Sequence[Store]) -> _Fit:
    """The curvature of a second pass alone: once the first is merged, its shards may be deleted."""
    second = Provenance.of(seconds[0])
    made = replace(second, basis=None)
    basis = _merged_basis(run, made)
    if basis is None or basis.digest != second.basis:
        raise InputError(
            f"the second pass of the shards of {run} was made after a first pass that is not in "
            f"{run / BASIS}.h5: put that back, or run all shards again with `overwrite=True`, then merge"
        )
    return _Fit("hessian", made, _fold_of(made).then(basis), seconds)


def _fold_of(made: Provenance) -> Any:
    """The statistic that sums are of."""
    assert made.hessian is not None
    return _fold_named(made.hessian["kind"])


def _merged_basis(run: Path, made: Provenance) -> Curvature | None:
    """What the first pass gave, where it was merged and made alike."""
    if not (run / f"{BASIS}.h5").exists():
        return None
    with open_store(run, BASIS) as store:
        return None if differing(store.settings, made.settings()) else load_curvature(run, BASIS)


def _refuse_other_fit(run: Path, fit: _Fit) -> None:
    """Refuse a curvature in the run that is not of these sums."""
    if not Writer(run, fit.kind, fit.made.settings(), 1).complete:
        return
    with open_store(run, fit.kind) as there:
        digest = str(there.index_array(SUMMED)[0]) if SUMMED in there.header.index_arrays else None
    if digest is None:
        raise InputError(
            f"the curvature in {run} is of a run without shards: give `overwrite=True` to take that of the "
            "shards"
        )
    if digest != fit.digest():
        raise InputError(
            f"the {fit.kind} in {run} is not of the sums of its shards, which were made again: give "
            "`overwrite=True` to take these"
        )


def _carried_out(plan: _Plan, overwrite: bool) -> Iterator[Joined]:
    for kind, count in plan.counts.items():
        yield Joined(kind, join_shards(plan.run, kind, overwrite=overwrite), count)
    if plan.recorded:
        path = join_recorded(plan.run, plan.recorded, overwrite=overwrite)
        yield Joined("store", path, len(plan.recorded))
    if (fit := plan.fit) is not None:
        with open_writer(
            plan.run, fit.kind, fit.made.settings(), 1, overwrite, request=whole_request(fit.stores[0])
        ) as writer:
            if not writer.complete:
                write_curvature(writer, fit.curvature(), {SUMMED: [fit.digest()]})
        yield Joined(fit.kind, plan.run / f"{fit.kind}.h5", len(fit.stores))
