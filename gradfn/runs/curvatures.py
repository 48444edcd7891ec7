"""Curvatures on disk: fitted, mixed, read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from gradfn.engine.stream import Progress
from gradfn.linalg.spectrum import Spectrum
from gradfn.runs.gradients import Settings, describe, merged, refuse_mismatch
from gradfn.statistics import Curvature, mix, mixing_coefficient
from gradfn.statistics.fold import check_fit, fit
from gradfn.statistics.labels import check_drawn, sample_labels
from gradfn.store import Overwrite, Store, Writer, open_store, open_writer
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.transforms import Transform
from gradfn.types import Data

CURVATURE = "curvature/"
Labels = Literal["data", "model"]
SHARED = ("gradfn", "model", "layers", "transform", "tokenizer", "processor", "masking", "loss")
"""What a mix records of its training side; what of it must agree, agrees in both."""


def hessian(
    run: str | Path,
    model: nn.Module | Subject,
    data: Data,
    fold: Any,
    transform: Transform | None = None,
    *,
    labels: Labels = "data",
    seed: int = 0,
    partitions: int = 1,
    settings: Settings | None = None,
    overwrite: Overwrite = False,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Curvature:
    """Fit a curvature and write it to `RUN/hessian.h5`; what is there is taken if it was made alike.

    Args:
        run: the run directory.
        fold: `second_moment()`, `kfac()`, `ekfac()`, `shampoo()` or `tkfac()`.
        labels: "data", or "model" for labels drawn from the model with `seed`; see `sample_labels`.
        model, data, transform, partitions, progress, options: see `fit`.
        settings, overwrite: see `build`.

    Raises:
        InputError: see `fit`; the directory holds a curvature made otherwise.
    """
    subject = subject_of(model, **options)
    known = fit_settings(subject, data, fold, transform, labels, seed, settings)
    check_fit(fold, subject, transform, partitions=partitions)
    if labels == "model":
        check_drawn(subject.loss)
    with _curvature_writer(run, known, overwrite) as writer:
        if writer.complete:
            return load_curvature(run)
        if labels == "model":
            data = sample_labels(subject.loss, data, seed, token_batch_size=subject.token_batch_size)
        curvature: Curvature = fit(fold, subject, data, transform, partitions=partitions, progress=progress)
        write_curvature(writer, curvature)
    return curvature


def fit_settings(
    subject: Subject, data: Data, fold: Any, transform: Transform | None, labels: Labels, seed: int,
    settings: Settings | None,
) -> dict[str, Any]:  # fmt: skip
    """What a fitted curvature depends on."""
    known = describe(subject, data, transform)
    how = {"kind": str(fold), "labels": labels, "seed": seed if labels == "model" else None}
    return merged({**known, "hessian": how}, settings)


def mix_runs(
    run: str | Path,
    query: str | Path,
    train: str | Path,
    *,
    coefficient: float | None = None,
    components: int = 1000,
    overwrite: bool = False,
) -> tuple[Curvature, float]:
    """Mix two curvatures on disk, `H = a H_query + (1 - a) H_train`, to `RUN/hessian.h5`; returns it and `a`.

    Args:
        coefficient: a; None means TrackStar's, see `mixing_coefficient`.
        components: TrackStar's number of directions to count less.

    Raises:
        InputError: they were fitted on different models, layers or projections.
    """
    with open_curvature(query) as a, open_curvature(train) as b:
        refuse_mismatch(a.settings, b.settings, f"the curvature in {query}")
        sides = a.settings, b.settings
    H_query, H_train = load_curvature(query), load_curvature(train)
    weight = mixing_coefficient(H_query, H_train, components) if coefficient is None else coefficient
    mixed = mix(H_query, H_train, weight)
    parts = {"query": H_query.digest, "train": H_train.digest, "coefficient": weight}
    shared = {key: sides[1][key] for key in SHARED if key in sides[1]}
    prints = "+".join(str(side["data"]["fingerprint"]) for side in sides)
    known = {
        **shared,
        "hessian": {"kind": f"mix of {H_query.kind}", **parts},
        "data": {"fingerprint": prints},
    }
    with _curvature_writer(run, known, overwrite) as writer:
        if not writer.complete:
            write_curvature(writer, mixed)
    return mixed, weight


def _curvature_writer(run: str | Path, settings: Settings, overwrite: Overwrite) -> Any:
    return open_writer(run, "hessian", settings, 1, overwrite)


def write_curvature(writer: Writer, curvature: Curvature, beside: Mapping[str, Any] | None = None) -> None:
    """One row that says what there is, and the arrays of every block beside it, with others given."""
    fixed: dict[str, Any] = {"blocks": list(curvature), **(beside or {})}
    for name, one in curvature.items():
        parts = {"left": one.left, "right": one.right, "values": one.values}
        if one.sides is not None:
            parts |= {"left_values": one.sides[0], "right_values": one.sides[1]}
        fixed |= {f"{CURVATURE}{name}/{key}": v.cpu().numpy() for key, v in parts.items() if v is not None}
    if writer.missing([(0, 1)]):
        writer.write(0, 1, {"fit/kind": [curvature.kind], "fit/rows": np.array([curvature.rows])})
    writer.finish(fixed)


def open_curvature(run: str | Path) -> Store:
    """Open what `hessian` or `mix_runs` wrote."""
    return open_store(run, "hessian")


def load_curvature(run: str | Path, kind: str = "hessian") -> Curvature:
    """Read what `hessian` or `mix_runs` wrote.

    Args:
        run: the run directory.
        kind: "hessian", or "basis" for what the first pass of a fit in shards gave.

    Raises:
        InputError: there is none, or it is damaged.
    """
    with open_store(run, kind) as store:
        fixed = set(store.header.fixed)

        def part(name: str, key: str) -> Tensor | None:
            path = f"{CURVATURE}{name}/{key}"
            return torch.from_numpy(store.fixed(path)) if path in fixed else None

        spectra = {}
        for name in store.fixed("blocks").tolist():
            left, right, values = (part(name, key) for key in ("left", "right", "values"))
            sides = part(name, "left_values"), part(name, "right_values")
            assert right is not None
            assert values is not None
            both = None if sides[0] is None or sides[1] is None else (sides[0], sides[1])
            spectra[name] = Spectrum(left, right, values, both)
        return Curvature(str(store.read("fit/kind")[0]), spectra, int(store.read("fit/rows")[0]))
