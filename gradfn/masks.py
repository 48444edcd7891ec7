"""Selective masks on disk, and projections that are read from runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradfn.errors import InputError
from gradfn.runs import load_curvature, open_curvature, refuse_mismatch
from gradfn.selective import MaskReport
from gradfn.store import Store, open_store, open_writer
from gradfn.transforms import Chain, Transform, chain
from gradfn.transforms.fitted import Principal, SelectedFlat, SelectedSides, principal, selected
from gradfn.transforms.projection import Loaders, parse_projection

Mask = SelectedSides | SelectedFlat


Reports = Mapping[str, MaskReport]


def mask_run(
    run: str | Path,
    fit: Callable[[], tuple[Mask, Reports]],
    *,
    blocks: int,
    settings: Mapping[str, Any],
    overwrite: bool = False,
) -> tuple[Mask, Reports]:
    """Fit a mask and write it to `RUN/mask.h5`, a row a block; one that was fitted alike is taken.

    Args:
        run: the run directory.
        fit: gives what `fit_mask` gives; called where there is no mask yet.
        blocks: how many blocks it will have.
        settings: what the gradients are made of: model, layers, transform; see `runs.describe`.
        overwrite: replace a mask that was made otherwise.

    Raises:
        InputError: the directory holds a mask made otherwise.
    """
    with open_writer(run, "mask", settings, blocks, overwrite) as writer:
        if not writer.complete:
            mask, reports = fit()
            writer.write(0, blocks, _rows(mask, reports))
            writer.finish(
                {
                    f"mask/{name}/{side}": index.cpu().numpy()
                    for name, parts in mask.chosen.items()
                    for side, index in enumerate(parts)
                }
            )
    with open_mask(run) as store:
        columns = [store.read(f"blocks/{key}").tolist() for key in ("name", "kept", "random", "steps")]
    return load_mask(run), {name: MaskReport(*of) for name, *of in zip(*columns, strict=True)}


def _rows(mask: Mask, reports: Reports) -> dict[str, Any]:
    names = list(mask.chosen)
    return {
        "blocks/name": names,
        "blocks/shape": np.array([tuple(mask.shapes[name]) for name in names]),
        "blocks/kept": np.array([reports[name].kept for name in names]),
        "blocks/random": np.array([reports[name].random for name in names]),
        "blocks/steps": np.array([reports[name].steps for name in names]),
    }


def open_mask(run: str | Path) -> Store:
    """Open what `mask_run` wrote."""
    return open_store(run, "mask")


def load_mask(run: str | Path) -> Mask:
    """Read what `mask_run` wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    with open_mask(run) as store:
        names, shapes = store.read("blocks/name").tolist(), store.read("blocks/shape").tolist()
        fixed = store.header.fixed
        chosen = {
            name: tuple(
                torch.from_numpy(store.fixed(path))
                for side in (0, 1)
                if (path := f"mask/{name}/{side}") in fixed
            )
            for name in names
        }
    return selected(chosen, dict(zip(names, shapes, strict=True)), str(Path(run).resolve()))


def _principal(rest: str) -> Principal:
    size, colon, run = rest.partition(":")
    dims = size.split("x")
    if not colon or len(dims) != 2 or not all(part.isascii() and part.isdigit() for part in dims):
        raise InputError(
            f"'pca:{rest}' is no projection: give pca:64x64:RUN, where kfac or ekfac was fitted in RUN"
        )
    H = load_curvature(run)
    if any(one.left is None for one in H.values()):
        raise InputError(f"the {H.kind} in {run} has no Kronecker factors: fit kfac or ekfac for pca")
    return principal(H, (int(dims[0]), int(dims[1])), str(Path(run).resolve()))


LOADERS: Loaders = {"pca": _principal, "selective": load_mask}
"""What `parse_projection` takes to read fitted projections from runs."""


def refuse_foreign(projection: Transform, before: Transform, subject: Mapping[str, Any]) -> None:
    """Refuse stages that were fitted on gradients made otherwise.

    Args:
        projection: what comes after `before`.
        before: the optimizer's normalisation.
        subject: what a run records of the model and its layers.

    Raises:
        InputError: naming what differs, with both values.
    """
    stages = [*chain(before).stages]
    for stage in chain(projection).stages:
        if isinstance(stage, Principal | SelectedSides | SelectedFlat) and stage.path:
            opened = open_curvature if isinstance(stage, Principal) else open_mask
            layers = {**subject["layers"], "tokens": False}
            wanted = {**subject, "layers": layers, "transform": chain(*stages).settings()}
            with opened(stage.path) as store:
                what = "curvature" if isinstance(stage, Principal) else "mask"
                refuse_mismatch(store.settings, wanted, f"the {what} in {stage.path}")
        stages.append(stage)


def projection_named(text: str, seed: int = 0) -> Chain:
    """The projection of a spelling, with those parts of it that are read from runs; see `parse_projection`.

    >>> projection_named("gaussian:8x8").stages[0]
    Project(dims=(8, 8), kind='gaussian', seed=0, nonzeros=1)
    """
    return parse_projection(text, seed, LOADERS)
