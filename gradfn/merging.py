"""Curvatures fitted in shards, and merging what array jobs wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradfn.curvature import Curvature, ekfac, kfac, second_moment, shampoo, tkfac
from gradfn.errors import InputError
from gradfn.fold import Additive, Sums, TwoPass, check_fit, fit_sums
from gradfn.layers import View
from gradfn.losses import causal_lm_loss
from gradfn.runs import Labels, Settings, fit_settings, load_curvature, write_curvature
from gradfn.sampling import check_drawn, sample_labels
from gradfn.shards import Shard, complete_shards, join_shards, refuse_gaps, shard_rows, shard_run, shards_of
from gradfn.store import Store, differing, open_store, open_writer
from gradfn.stream import TOKEN_BATCH_SIZE, Progress, lengths_of
from gradfn.transforms import Transform
from gradfn.types import Data, LossFn

SUMS = ("sums", "second_sums")
"""Kinds of store with the sums that the shards of a curvature made, in the first and second pass."""
BASIS = "basis"
"""The kind of store with what the first of two passes gave."""
FOLDS = (second_moment, kfac, ekfac, shampoo, tkfac)


def hessian_shard(
    run: str | Path,
    model: nn.Module,
    data: Data,
    fold: Any,
    transform: Transform | None = None,
    *,
    shard: Shard,
    labels: Labels = "data",
    seed: int = 0,
    loss: LossFn | None = None,
    view: View | None = None,
    partitions: int = 1,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    settings: Settings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write one part's sums of a curvature, for `merge_run` to add up and decompose.

    Of a fit in two passes (ekfac) the sums are the first pass's until these have been merged, and then the
    second's.

    Args:
        run: the run directory, common to all parts.
        shard: which part of the rows.
        fold, model, data, transform, labels, seed, loss, view, partitions, token_batch_size, settings,
            overwrite, progress: see `hessian`.

    Returns:
        Which pass the sums are of, 1 or 2.

    Raises:
        InputError: see `fit`; more shards than rows; the directory holds sums made otherwise.
    """
    known = fit_settings(model, data, fold, transform, labels, seed, loss, view, settings)
    _fold_named(str(fold))
    check_fit(fold, model, transform, loss=loss, view=view, partitions=partitions)
    if labels == "model":
        check_drawn(loss or causal_lm_loss(model))
    rows, number = shard_rows(lengths_of(data), shard), shard.number
    basis = _basis(run, known, overwrite) if isinstance(fold, TwoPass) else None
    if basis is not None:
        fold, known = fold.then(basis), {**known, "basis": basis.digest}
    one = fold.first if isinstance(fold, TwoPass) else fold
    kind = SUMS[basis is not None]
    with open_writer(
        shard_run(run, shard), kind, known, shard.count, overwrite, part=(number - 1, number)
    ) as writer:
        if writer.missing([(number - 1, number)]):
            if labels == "model":
                loss = loss or causal_lm_loss(model)
                data = sample_labels(loss, data, seed, rows=rows, token_batch_size=token_batch_size)
            sums = fit_sums(
                one, model, data, transform, rows=rows, loss=loss, view=view, partitions=partitions,
                token_batch_size=token_batch_size, progress=progress,
            )  # fmt: skip
            writer.write(number - 1, number, _sum_arrays(sums, rows))
        writer.finish()
    return 1 + (basis is not None)


def _basis(run: str | Path, settings: Settings, overwrite: bool) -> Curvature | None:
    """What a merged first pass gave; None before that, and where another one is to be replaced."""
    if not (Path(run) / f"{BASIS}.h5").exists():
        return None
    with open_store(run, BASIS) as store:
        unlike = differing(store.settings, settings)
    if unlike and not overwrite:
        shown = ", ".join(f"{key} is {a} there and {b} here" for key, (a, b) in [*unlike.items()][:4])
        raise InputError(
            f"the first pass in {run} was made otherwise ({shown}): add --overwrite to begin "
            "anew, or write to another directory"
        )
    return None if unlike else load_curvature(run, BASIS)


def _sum_arrays(sums: Sums, rows: range) -> dict[str, np.ndarray]:
    """Sums over a part as one row of a store."""
    blocks = {f"{SUMS[0]}/{name}": total[None].cpu().numpy() for name, total in sums.blocks.items()}
    shapes = {f"shapes/{name}": np.array([shape]) for name, shape in sums.shapes.items()}
    return {"rows/count": np.array([sums.count]), "rows/span": np.array([[rows.start, rows.stop]]),
            **blocks, **shapes}  # fmt: skip


def _read_sums(store: Store) -> Sums:
    def read(prefix: str) -> dict[str, np.ndarray]:
        return {n.removeprefix(prefix): store.read(n, *store.span)[0] for n in store.names(prefix)}

    blocks = {name: torch.from_numpy(total) for name, total in read(f"{SUMS[0]}/").items()}
    shapes = {name: tuple(map(int, shape)) for name, shape in read("shapes/").items()}
    return Sums(int(store.read("rows/count", *store.span)[0]), blocks, shapes)


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

    Everything is checked before anything is written; it may be repeated.

    Args:
        overwrite: replace what is in the run and was made otherwise, or without shards.

    Raises:
        InputError: there are no shards; some are missing, incomplete, overlap, or were made differently.
        StorageError: the disk is full or failed.
    """
    kinds = {kind: len(complete_shards(run, kind)) for kind in shards_of(run)}
    if not kinds:
        raise InputError(f"{run} has no shards: write them with --shard I/N of build, score or hessian")
    joined = [Joined(kind, join_shards(run, kind, overwrite=overwrite), count)
              for kind, count in kinds.items() if kind not in SUMS]  # fmt: skip
    return [*joined, *([_merge_sums(run, SUMS[1] in kinds, overwrite)] if SUMS[0] in kinds else [])]


def _merge_sums(run: str | Path, again: bool, overwrite: bool) -> Joined:
    """Add up the sums of a curvature and decompose; of the first of two passes, what the second needs."""
    stores = complete_shards(run, SUMS[0])
    settings, count = stores[0].settings, len(stores)
    fold = _fold_named(settings["hessian"]["kind"])
    if not isinstance(fold, TwoPass):
        _finished(run, "hessian", settings, fold, stores, overwrite)
        return Joined("hessian", Path(run) / "hessian.h5", count)
    basis = _finished(run, BASIS, settings, fold.first, stores, overwrite and not again)
    if not again:
        return Joined(BASIS, Path(run) / f"{BASIS}.h5", count)
    seconds = complete_shards(run, SUMS[1])
    if differing(seconds[0].settings, {**settings, "basis": basis.digest}):
        raise InputError(
            f"the second pass of the shards of {run} was made after another first pass: run all shards again "
            "with --overwrite, then merge"
        )
    _finished(run, "hessian", settings, fold.then(basis), seconds, overwrite)
    return Joined("hessian", Path(run) / "hessian.h5", len(seconds))


def _finished(
    run: str | Path, kind: str, settings: Settings, fold: Additive[Curvature], stores: Sequence[Store],
    overwrite: bool,
) -> Curvature:  # fmt: skip
    """The curvature of the parts' sums, written where it is not there already."""
    spans = [store.read("rows/span", *store.span)[0] for store in stores]
    refuse_gaps(run, stores[0].header.kind, [(int(a), int(b)) for a, b in spans], settings["data"]["rows"])
    with open_writer(run, kind, settings, 1, overwrite) as writer:
        if writer.complete:
            return load_curvature(run, kind)
        state = fold.init()
        for store in stores:
            state = fold.add(state, _read_sums(store))
        curvature = fold.finalize(state)
        write_curvature(writer, curvature)
    return curvature
