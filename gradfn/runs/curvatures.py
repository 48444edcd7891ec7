"""Curvatures on disk: fitted, mixed, read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.runs.output import Output, RunOptions, output_of
from gradfn.runs.provenance import DataSource, Provenance, Settings, describe, refuse_mismatch
from gradfn.statistics import Curvature, mix, mixing_coefficient
from gradfn.statistics.fold import check_fit, fit
from gradfn.statistics.labels import check_drawn, sample_labels
from gradfn.store import Store, Writer, open_store
from gradfn.subject import Subject
from gradfn.transforms import Transform
from gradfn.types import Data

CURVATURE = "curvature/"
Labels = Literal["data", "model"]
SHARED = ("version", "model", "layers", "transform", "tokenizer", "processor", "masking", "loss")
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
    **options: Unpack[RunOptions],
) -> Curvature:
    """Fit a curvature and write it to `RUN/hessian.h5`; what is there is taken if it was made alike.

    Args:
        run: the run directory.
        fold: `second_moment()`, `kfac()`, `ekfac()`, `shampoo()`, `eshampoo()` or `tkfac()`.
        labels: "data", or "model" for labels drawn from the model with `seed`; see `sample_labels`.
        model, data, transform, partitions: see `fit`.
        options: see `build`; of a shard there are sums, which `hessian_shard` writes.

    Raises:
        InputError: see `fit`; the directory holds a curvature made otherwise; a shard.
    """
    output, subject = output_of(run, model, options)
    if output.shard is not None:
        raise InputError("a shard has sums and no curvature: write them with `hessian_shard`, then merge")
    asked = Asked(subject, data, fold, transform, labels, seed, partitions)
    with output.open("hessian", asked.made.merged(output.settings), 1) as writer:
        if writer.complete:
            return load_curvature(run)
        curvature: Curvature = fit(
            fold, subject, asked.labelled(), transform, partitions=partitions, progress=output.progress
        )
        write_curvature(writer, curvature)
    return curvature


@dataclass(frozen=True, eq=False)
class Asked:
    """A curvature that is asked for, whole or in shards. What cannot be fitted is refused; see `hessian`."""

    subject: Subject
    data: Data
    fold: Any
    transform: Transform | None
    labels: Labels
    seed: int
    partitions: int

    def __post_init__(self) -> None:
        check_fit(self.fold, self.subject, self.transform, partitions=self.partitions)
        if self.labels == "model":
            check_drawn(self.subject.loss)

    @property
    def made(self) -> Provenance:
        """What the curvature depends on."""
        seed = self.seed if self.labels == "model" else None
        how = {"kind": str(self.fold), "labels": self.labels, "seed": seed}
        return describe(self.subject, self.data, self.transform).merged({"hessian": how})

    def labelled(self, rows: range | None = None) -> Data:
        """The data; where labels are the model's, with these on some rows, or on all."""
        if self.labels == "data":
            return self.data
        loss, size = self.subject.loss, self.subject.token_batch_size
        return sample_labels(loss, self.data, self.seed, rows=rows, token_batch_size=size)


def mix_runs(
    run: str | Path,
    query: str | Path,
    train: str | Path,
    *,
    coefficient: float | None = None,
    components: int = 1000,
    settings: Settings | Provenance | None = None,
    overwrite: bool = False,
) -> tuple[Curvature, float]:
    """Mix two curvatures on disk, `H = a H_query + (1 - a) H_train`, to `RUN/hessian.h5`; returns it and `a`.

    Args:
        coefficient: a; None means TrackStar's, see `mixing_coefficient`.
        components: TrackStar's number of directions to count less.
        settings, overwrite: see `build`.

    Raises:
        InputError: they were fitted on different models, layers or projections.
    """
    with open_curvature(query) as a, open_curvature(train) as b:
        refuse_mismatch(a, b, f"the curvature in {query}")
        sides = Provenance.of(a), Provenance.of(b)
    H_query, H_train = load_curvature(query), load_curvature(train)
    weight = mixing_coefficient(H_query, H_train, components) if coefficient is None else coefficient
    mixed = mix(H_query, H_train, weight)
    parts = {"query": H_query.digest, "train": H_train.digest, "coefficient": weight}
    prints = "+".join(str(side.data and side.data.fingerprint) for side in sides)
    made = Provenance(
        **{key: getattr(sides[1], key) for key in SHARED},
        hessian={"kind": f"mix of {H_query.kind}", **parts},
        data=DataSource(fingerprint=prints),
    )
    with Output(run, overwrite=overwrite).open("hessian", made.merged(settings), 1) as writer:
        if not writer.complete:
            write_curvature(writer, mixed)
    return mixed, weight


def write_curvature(writer: Writer, curvature: Curvature, beside: Mapping[str, Any] | None = None) -> None:
    """Write one row that names the statistic, the arrays of every block beside it, and others given."""
    arrays: dict[str, Any] = {"blocks": list(curvature), **(beside or {})}
    for name, one in curvature.items():
        parts = {"left": one.left, "right": one.right, "values": one.values}
        if one.sides is not None:
            parts |= {"left_values": one.sides[0], "right_values": one.sides[1]}
        arrays |= {f"{CURVATURE}{name}/{key}": v.cpu().numpy() for key, v in parts.items() if v is not None}
    if writer.missing([(0, 1)]):
        writer.write(0, 1, {"fit/kind": [curvature.kind], "fit/rows": np.array([curvature.rows])})
    writer.finish(arrays)


def open_curvature(run: str | Path) -> Store:
    """Open what `hessian` or `mix_runs` wrote.

    Raises:
        InputError: also where the file holds something else.
    """
    store = open_store(run, "hessian")
    if "fit/kind" not in store.header.arrays:
        raise InputError(
            f"{store.path} holds {store.header.kind}, not a curvature: give a run that hessian or mix wrote"
        )
    return store


def load_curvature(run: str | Path, kind: str = "hessian") -> Curvature:
    """Read what `hessian` or `mix_runs` wrote.

    Args:
        run: the run directory.
        kind: "hessian", or "basis" for what the first pass of a fit in shards gave.

    Raises:
        InputError: there is none, or it is damaged.
    """
    with open_store(run, kind) as store:
        arrays = set(store.header.index_arrays)

        def part(name: str, key: str) -> Tensor | None:
            path = f"{CURVATURE}{name}/{key}"
            return torch.from_numpy(store.index_array(path)) if path in arrays else None

        spectra = {}
        for name in store.index_array("blocks").tolist():
            left, right, values = (part(name, key) for key in ("left", "right", "values"))
            sides = part(name, "left_values"), part(name, "right_values")
            assert right is not None
            assert values is not None
            both = None if sides[0] is None or sides[1] is None else (sides[0], sides[1])
            spectra[name] = Spectrum(left, right, values, both)
        return Curvature(str(store.read("fit/kind")[0]), spectra, int(store.read("fit/rows")[0]))


def curvature_for(path: str, wanted: Settings | Provenance, dampings: Sequence[Damping]) -> Curvature:
    """Read a curvature for gradients that were made as `wanted` says, which can be damped so.

    Raises:
        InputError: it is of another model, layers or transform, or cannot have one of the dampings.
    """
    with open_curvature(path) as store:
        refuse_mismatch(store, Provenance.of(wanted).by_row(), f"the curvature in {path}")
    H = load_curvature(path)
    for damping in dampings:
        next(iter(H.values())).power(-1.0, damping)
    return H
