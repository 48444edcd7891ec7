"""Gradients on disk: of every row, or their mean; and reading them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Unpack, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import Progress, lengths_of
from gradfn.errors import InputError
from gradfn.methods.inner_product import EngineScorer
from gradfn.runs.output import Output, RunOptions, output_of
from gradfn.runs.provenance import Provenance, Settings, describe
from gradfn.runs.rows import RunRows, Summary, unprobed, unsupervised, write_rows
from gradfn.statistics.fold import sums_of
from gradfn.statistics.moments import mean, total
from gradfn.store import Store, open_store
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.transforms import Transform, UnitNormalize, chain
from gradfn.types import Blocks, Data

Aggregation = Literal["mean", "sum"]
GRADIENTS = "gradients/"


def build(
    run: str | Path,
    model: nn.Module | Subject,
    data: Data,
    transform: Transform | None = None,
    **options: Unpack[RunOptions],
) -> Summary:
    """Write the transformed gradient of every row to `RUN/store.h5`; a killed run resumes where it was.

    By token (`View(tokens=True)`), the rows of the file are tokens: `rows/document` and `rows/position` say
    which, and `tokens/offsets` where each document's start.

    Args:
        run: the run directory.
        model, data, transform: see `collect`.
        options: `settings`, `overwrite`, `shard` and `progress`, see `gradfn.runs.output.Output`; of a bare
            model `loss`, `view` and `token_batch_size` too, see `Subject`.

    Raises:
        InputError: the directory holds a store made otherwise; a loss is not finite; more shards than rows.
        StorageError: the disk is full; what is complete is kept.
    """
    output, subject = output_of(run, model, options)
    transform = transform or chain()
    made = describe(subject, data, transform).merged(output.settings)
    rows = RunRows(output, "store", made, data, subject.view.tokens)

    def scorer() -> EngineScorer:
        engine = probe_engine(subject.model, subject.loss, transform, view=subject.view)
        return EngineScorer(engine, subject.token_batch_size)

    return write_rows(rows, scorer, _gradient_arrays, subject.token_batch_size)


def reduce(
    run: str | Path,
    model: nn.Module | Subject,
    data: Data,
    transform: Transform | None = None,
    *,
    aggregation: Aggregation = "mean",
    settings: Settings | Provenance | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Summary:
    """Write the mean or sum of the rows' transformed gradients to `RUN/store.h5`, a store of one row.

    Args:
        aggregation: "mean" or "sum" over rows, of the transformed gradients.
        run, model, data, transform, settings, overwrite, progress, options: see `build`; there are no shards.

    Raises:
        InputError: the directory holds a store made otherwise; no rows; a view by token; a loss not finite.
    """
    if aggregation not in get_args(Aggregation):
        raise InputError(f"no aggregation {aggregation!r}: choose {' or '.join(get_args(Aggregation))}")
    subject = subject_of(model, **options)
    if subject.view.tokens:
        raise InputError("gradients are reduced by example or by head, not by token: use build for tokens")
    transform, size = transform or chain(), subject.token_batch_size
    made = describe(subject, data, transform).merged({"aggregation": aggregation}).merged(settings)
    fold = mean() if aggregation == "mean" else total()
    engine = probe_engine(subject.model, subject.loss, chain(transform, fold.stage()), view=subject.view)
    with Output(run, overwrite=overwrite).open("store", made, 1) as writer:
        if writer.missing([(0, 1)]):
            sums, losses = sums_of(fold, engine, data, token_batch_size=size, progress=progress)
            blocks = fold.finalize(sums)
            count = len(data) if aggregation == "mean" else 1
            zero = torch.stack([(block == 0).all() for block in blocks.values()]).all()
            beside = {"rows/id": [aggregation], "rows/text": [f"{aggregation} of {len(data)} rows"],
                      "rows/length": np.array([int(lengths_of(data).sum())]),
                      "rows/loss": np.array([losses / count]), "rows/zero": zero[None].numpy()}  # fmt: skip
            writer.write(0, 1, {**_gradient_arrays(blocks), **beside})
        path = writer.finish()
    silent = unsupervised(data, range(len(data)))
    return Summary(path, 1, silent, silent, 0, unprobed(engine))


def _gradient_arrays(values: Blocks | Tensor) -> dict[str, np.ndarray]:
    if not isinstance(values, dict):
        raise TypeError("a store holds gradients: the transform must not end in scores")
    return {GRADIENTS + name: value.numpy() for name, value in values.items()}


def open_gradients(run: str | Path) -> Store:
    """Open a store of gradients, `open_store` for what `build` and `reduce` write.

    Raises:
        InputError: also where the file holds something else.
    """
    store = open_store(run)
    if not store.names(GRADIENTS) or "transform" not in store.settings:
        raise InputError(
            f"{store.path} holds {store.header.kind}, not gradients and how they were made: "
            "give a store that build or reduce wrote"
        )
    return store


def read_gradients(store: Store, start: int = 0, stop: int | None = None) -> Blocks:
    """Read rows of a store as blocks."""
    arrays = store.read_all(store.names(GRADIENTS), start, stop)
    return blocks_of(arrays)


def blocks_of(arrays: Mapping[str, np.ndarray]) -> Blocks:
    """Arrays of a store as blocks; numbers of 16 bits as float32, in which products are summed.

    >>> blocks_of({"gradients/mlp": np.ones((1, 2), np.float16)})["mlp"].dtype
    torch.float32
    """
    blocks = {name.removeprefix(GRADIENTS): torch.from_numpy(array) for name, array in arrays.items()}
    return {name: block.float() if block.dtype == torch.float16 else block for name, block in blocks.items()}


def ends_in_unit_norm(transform: Transform) -> bool:
    """Whether a chain's last stage is the unit norm.

    >>> from gradfn.transforms import unit_normalize
    >>> ends_in_unit_norm(chain(unit_normalize()))
    True
    """
    stages = chain(transform).stages
    return bool(stages) and isinstance(stages[-1], UnitNormalize)
