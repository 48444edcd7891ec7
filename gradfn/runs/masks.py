"""Selective masks on disk, and projections that are read from runs."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.runs.curvatures import load_curvature, open_curvature
from gradfn.runs.gradients import GRADIENTS
from gradfn.runs.output import Output
from gradfn.runs.provenance import LossSource, Provenance, Settings, refuse_mismatch
from gradfn.statistics.mask import Dims, MaskReport, Watch, drawn_rows, fit_by_parts
from gradfn.store import Store, differing, in_words, open_store
from gradfn.transforms import Chain, Transform, chain
from gradfn.transforms.fitted import Principal, SelectedFlat, SelectedSides, principal, selected
from gradfn.transforms.projection import Loaders, is_number, parse_projection
from gradfn.types import Blocks

Mask = SelectedSides | SelectedFlat
Reports = Mapping[str, MaskReport]
FEWEST = 3
"""Rows to correlate over."""
OPTIMIZERS = ("Adam", "Adafactor")
"""Stages behind which gradients are whole."""


def check_stores(train: Store, query: Store) -> None:
    """Refuse stores of gradients to which no mask can be fitted.

    Raises:
        InputError: gradients that are not whole, or of tokens; fewer than three rows; another model, layers,
            loss or optimizer of the queries than of the rows.
    """
    for store in (train, query):
        _check_whole(store)
    if train.rows < FEWEST:
        raise InputError(
            f"{train.path} has {train.rows} rows, and a mask keeps correlations over them: build a store of "
            f"{FEWEST} or more"
        )
    what = f"the query gradients in {query.path}"
    refuse_mismatch(query, train, what)
    if differences := differing(_loss(query), _loss(train)):
        raise InputError(
            f"{what} are of another loss than those in {train.path} ({in_words(differences, str)}): build "
            "both with the same"
        )


def _check_whole(store: Store) -> None:
    """Refuse gradients of tokens, and those to which more was done than an optimizer does."""
    made = Provenance.of(store)
    for stage in made.stages:
        if (name := stage["transform"]) not in OPTIMIZERS:
            raise InputError(
                f"the gradients in {store.path} are behind {stage.get('projection', name)}, and a mask is "
                "fitted to whole ones: build them without a projection, a unit norm and a curvature"
            )
    if (made.layers or {}).get("tokens"):
        raise InputError(
            f"the gradients in {store.path} are of tokens, and a mask is fitted to those of rows: build them "
            "with `View(tokens=False)`"
        )


def _loss(store: Store) -> dict[str, Any]:
    """The loss that gradients are of, with the fingerprint of its reference instead of the path."""
    loss = Provenance.of(store).loss or LossSource()
    return {**loss.to_json(), "reference": loss.reference and loss.reference.fingerprint}


def stored_mask(
    train: Store, query: Store, dims: Dims, *, rows: int = 512, seed: int = 0, watch: Watch | None = None
) -> tuple[Mask, dict[str, MaskReport]]:
    """Fit a selective mask to stored gradients: `selective_mask` without the model.

    Of the same rows and queries it is the same mask, but for what rounding decides.

    Args:
        train, query: what `build` wrote of whole gradients; of queries, `reduce` too.
        dims, rows, seed, watch: see `selective_mask`.

    Raises:
        InputError: see `check_stores` and `fit_by_parts`.
    """
    check_stores(train, query)
    pairs = ((train, "rows"), (query, "queries"))
    sides = [(store, drawn_rows(store.rows, rows, seed, name)) for store, name in pairs]

    def gradients(names: list[str]) -> list[Blocks]:
        return [{name: _read_rows(store, name, drawn) for name in names} for store, drawn in sides]

    count = sum(len(drawn) for _, drawn in sides)
    return fit_by_parts(block_shapes(train), count, gradients, dims, seed=seed, watch=watch)


def block_shapes(store: Store) -> dict[str, tuple[int, ...]]:
    """The shapes `(out, in)` of stored blocks."""
    return {name.removeprefix(GRADIENTS): store.shape(name)[1:] for name in store.names(GRADIENTS)}


def _read_rows(store: Store, block: str, rows: list[int]) -> Float[Tensor, "rows out in"]:
    """Rows of a stored block in the order given; neighbours are read together."""
    known, places = np.unique(rows, return_inverse=True)
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    parts = [store.read(GRADIENTS + block, int(run[0]), int(run[-1]) + 1) for run in runs]
    return torch.from_numpy(np.concatenate(parts)[places])


def mask_run(
    run: str | Path,
    fit: Callable[[], tuple[Mask, Reports]],
    *,
    blocks: int,
    settings: Settings | Provenance,
    overwrite: bool = False,
) -> tuple[Mask, Reports]:
    """Fit a mask and write it to `RUN/mask.h5`, a row a block; one that was fitted alike is taken.

    Args:
        run: the run directory.
        fit: gives what `fit_mask` gives; called where there is no mask yet.
        blocks: how many blocks it will have.
        settings: what the gradients are made of: model, layers, transform; see `describe`.
        overwrite: replace a mask that was made otherwise.

    Raises:
        InputError: the directory holds a mask made otherwise.
    """
    made = Provenance.of(settings)
    with Output(run, overwrite=overwrite).open("mask", made, blocks) as writer:
        if not writer.complete:
            mask, reports = fit()
            if writer.missing([(0, blocks)]):  # a run may have ended between its segment and its index
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
        chosen = {
            name: tuple(
                torch.from_numpy(store.index_array(path))
                for side in (0, 1)
                if (path := f"mask/{name}/{side}") in store.header.index_arrays
            )
            for name in names
        }
    return selected(chosen, dict(zip(names, shapes, strict=True)), str(Path(run).resolve()))


def _principal(rest: str) -> Principal:
    size, colon, run = rest.partition(":")
    dims = size.split("x")
    if not (colon and run) or len(dims) != 2 or not all(map(is_number, dims)):
        raise InputError(
            f"'pca:{rest}' is no projection: give pca:64x64:RUN, where kfac or ekfac was fitted in RUN"
        )
    H = load_curvature(run)
    if any(one.left is None for one in H.values()):
        raise InputError(f"the {H.kind} in {run} has no Kronecker factors: fit kfac or ekfac for pca")
    return principal(H, (int(dims[0]), int(dims[1])), str(Path(run).resolve()))


def _selective(run: str) -> Mask:
    if not run:
        raise InputError("'selective' names no run: give selective:RUN, where `mask_run` wrote a mask")
    return load_mask(run)


LOADERS: Loaders = {"pca": _principal, "selective": _selective}
"""What `parse_projection` takes to read fitted projections from runs."""


def refuse_foreign(projection: Transform, before: Transform, subject: Settings | Provenance) -> None:
    """Refuse stages that were fitted on gradients made otherwise.

    Args:
        projection: what comes after `before`.
        before: the optimizer's normalisation.
        subject: what a run records of the model and its layers.

    Raises:
        InputError: naming what differs, with both values.
    """
    made, stages = Provenance.of(subject).by_row(), [*chain(before).stages]
    for stage in chain(projection).stages:
        if isinstance(stage, Principal | SelectedSides | SelectedFlat) and stage.path:
            opened = open_curvature if isinstance(stage, Principal) else open_mask
            wanted = replace(made, transform=chain(*stages).settings())
            with opened(stage.path) as store:
                what = "curvature" if isinstance(stage, Principal) else "mask"
                refuse_mismatch(store, wanted, f"the {what} in {stage.path}")
        stages.append(stage)


def projection_named(text: str, seed: int = 0) -> Chain:
    """The projection of a spelling, with those parts of it that are read from runs; see `parse_projection`.

    >>> projection_named("gaussian:8x8").stages[0]
    Project(dims=(8, 8), kind='gaussian', seed=0, nonzeros=1)
    """
    return parse_projection(text, seed, LOADERS)
