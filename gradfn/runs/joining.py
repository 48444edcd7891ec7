"""One store of the rows of several, such as those of a dataset that has grown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from gradfn.errors import InputError
from gradfn.runs.gradients import open_gradients
from gradfn.runs.nearest import rows_digest
from gradfn.runs.provenance import DataSource, Provenance, compare
from gradfn.runs.rows import SEGMENT_BYTES
from gradfn.runs.visits import is_recorded
from gradfn.shown import brief
from gradfn.store import Overwrite, Store, check_disk, differing, in_words, open_writer

PARTS = "parts"
"""What the settings of joined rows have of the data: that of each store, in order."""
DOCUMENT, OFFSETS, NAMES = "rows/document", "tokens/offsets", "documents/id"
"""Of rows that are tokens: the number of the document, and of documents their first rows and names."""


def join_stores(
    run: str | Path,
    stores: Sequence[str | Path],
    *,
    overwrite: Overwrite = False,
    request: Mapping[str, Any] | None = None,
) -> Path:
    """Write the rows of several stores, one store after the other, to `RUN/store.h5`; a killed run resumes.

    Nothing is computed again: a dataset that grows needs gradients of its new rows alone. Rows keep their
    names. Where these are plain numbers from 0, as they are without a column of ids, they are counted on.

    Args:
        run: the run directory to write.
        stores: what `build` wrote, of one model, loss, transform and view, or what this function wrote.
        overwrite: see `build`.
        request: what asked for it, which the files record.

    Returns:
        The path of the store.

    Raises:
        InputError: fewer than two stores; they were made differently, of a training or as one mean; two of
            them hold the same rows, or two rows have one name.
        StorageError: the disk is full; what is complete is kept.

    >>> import tempfile
    >>> import torch
    >>> import gradfn as gf
    >>> net, (a, b, both) = torch.nn.Linear(1, 1, bias=False), (tempfile.mkdtemp() for _ in range(3))
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> _ = gf.build(a, net, [{"x": torch.tensor([1.0])}], loss=loss)
    >>> _ = gf.build(b, net, [{"x": torch.tensor([2.0])}], loss=loss)
    >>> _ = join_stores(both, [a, b])
    >>> gf.open_store(both).read("gradients/root").ravel(), gf.open_store(both).read("rows/id").tolist()
    (array([1., 2.], dtype=float32), ['0', '1'])
    """
    if len(stores) < 2:
        raise InputError("one store has nothing to be joined with: give two or more")
    opened = [open_gradients(path) for path in stores]
    if Path(run).resolve() in [store.path.parent for store in opened]:
        raise InputError(f"{run} is one of the stores: write what they give together to another directory")
    for store in opened:
        _refuse_unlike(opened[0], store)
    digests = [rows_digest(store) for store in opened]
    for number, digest in enumerate(digests):
        if (first := digests.index(digest)) < number:
            raise InputError(
                f"{opened[first].path} and {opened[number].path} hold the same rows: give each store once"
            )
    key = NAMES if NAMES in opened[0].header.index_arrays else "rows/id"
    names = _names(opened, key)
    starts = [0, *accumulate(store.rows for store in opened)]
    documents = [0, *accumulate(len(of_store) for of_store in names)]
    every = [name for of_store in names for name in of_store]
    about = [{**_data(store), "digest": digest} for store, digest in zip(opened, digests, strict=True)]
    data = DataSource(rows=documents[-1], further={PARTS: about})
    settings = replace(Provenance.of(opened[0]), data=data).settings()
    size = sum(file.stat().st_size for store in opened for file in store.files())
    check_disk(Path(run).absolute().parent, size, f"{starts[-1]:,} rows")
    with open_writer(
        run, "store", settings, starts[-1], overwrite, names={key: every}, request=request
    ) as writer:
        for store, first, document in zip(opened, starts, documents, strict=False):
            for start, stop, arrays in store.parts(store.names(), _rows_of_segment(store)):
                if not writer.missing([(first + start, first + stop)]):
                    continue
                if DOCUMENT in arrays:
                    arrays[DOCUMENT] = arrays[DOCUMENT] + document
                else:
                    arrays["rows/id"] = np.array(every[first + start : first + stop], object)
                writer.write(first + start, first + stop, _plain(arrays))
        return writer.finish(_index(opened, every, starts) if key == NAMES else None)


def _refuse_unlike(first: Store, other: Store) -> None:
    """Refuse stores whose rows cannot be compared with one query, or whose rows are of another kind."""
    sides = Provenance.of(first), Provenance.of(other)
    for store, made in zip((first, other), sides, strict=True):
        if is_recorded(made):
            raise InputError(
                f"{store.path} holds rows of a training, each at the parameters of its own step: give stores "
                "that build wrote"
            )
        if made.aggregation is not None:
            raise InputError(f"{store.path} holds one {made.aggregation} and no rows: build a store of rows")
    found = compare(*sides)
    plain: list[dict[str, Any]] = [
        {"loss": made.loss and made.loss.to_json(), "transform": {"chain": made.stages}} for made in sides
    ]
    found |= differing(*plain)
    if found:
        raise InputError(
            f"{other.path} was made otherwise than {first.path} ({in_words(found)}): build both with the "
            "same model and options"
        )


def _data(store: Store) -> dict[str, Any]:
    data = Provenance.of(store).data
    return data.to_json() if data else {}


def _names(stores: Sequence[Store], key: str) -> list[list[str]]:
    """The names of the rows of every store, or of their documents, of which no two are the same."""
    seen: dict[str, int] = {}
    names: list[list[str]] = []
    for number, store in enumerate(stores):
        own = (store.index_array(key) if key == NAMES else store.read(key)).tolist()
        if own == [str(row) for row in range(len(own))]:
            own = [str(sum(map(len, names)) + row) for row in range(len(own))]
        for name in own:
            if seen.get(name, number) != number:
                raise InputError(
                    f"{stores[seen[name]].path} and {store.path} both have a row {brief(name)}: build a "
                    "store of the new rows alone"
                )
            seen[name] = number
        names.append(own)
    return names


def _rows_of_segment(store: Store) -> int:
    row_bytes = sum(
        spec.stored_dtype.itemsize * int(np.prod(spec.shape)) for spec in store.header.arrays.values()
    )
    return max(1, SEGMENT_BYTES // max(1, row_bytes))


def _plain(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as a writer takes them: texts as lists."""
    return {name: array.tolist() if array.dtype.kind == "O" else array for name, array in arrays.items()}


def _index(stores: Sequence[Store], names: list[str], starts: Sequence[int]) -> dict[str, Any]:
    """What the index of a store of tokens says of its documents."""
    offsets = [store.index_array(OFFSETS)[:-1] + start for store, start in zip(stores, starts, strict=False)]
    return {OFFSETS: np.concatenate([*offsets, [starts[-1]]]), NAMES: names}
