"""Gradients from other programs as stores, and stores as files that other programs read."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

import gradfn
from gradfn.errors import InputError
from gradfn.runs.gradients import GRADIENTS, open_gradients
from gradfn.runs.rows import SEGMENT_BYTES
from gradfn.runs.scores import rows_that_fit
from gradfn.store import Overwrite, Store, check_disk, open_writer, storable
from gradfn.store.file import disk_errors
from gradfn.store.reader import steps
from gradfn.transforms import Transform
from gradfn.types import Blocks

IMPORTED = "imported"
"""What the settings have of rows that another program made."""
ID_COLUMNS, TEXT_COLUMNS = ("id", "_id", "row_id"), ("text", "prompt")


@dataclass(frozen=True)
class Imported(Transform):
    """What another program did to gradients, by its settings: it cannot be done here."""

    made: Mapping[str, Any]

    def settings(self) -> dict[str, object]:
        """Those that were imported."""
        return dict(self.made)

    def __call__(self, blocks: Blocks) -> Blocks:
        raise InputError(
            f"these gradients were made by {self.made.get('from')}, whose projections are its own: give "
            "queries that it made, imported too"
        )


# --- from Bergson


def import_bergson(index: str | Path, run: str | Path, *, overwrite: Overwrite = False) -> Path:
    """Write the gradients of an index of Bergson to `RUN/store.h5`; a killed run resumes where it was.

    Rows keep their numbers. A module is a block `[1, numbers]`, in the precision that it has on disk, but for
    bfloat16, which becomes float32. `find` searches the store; queries must come from the same program, for
    its projections are its own.

    Args:
        index: the folder with `info.json` and `gradients.bin`, of Bergson 2.
        run, overwrite: see `build`.

    Returns:
        The path of the store.

    Raises:
        InputError: the folder is no index, or one of tokens, or its file is not as long as it says.
        StorageError: the disk is full; what is complete is kept.
    """
    index = Path(index)
    there = _Index.of(index)
    ids, texts = _names(index, there.rows)
    matrix = there.open()
    settings = {
        "gradfn": gradfn.__version__, IMPORTED: there.about, "model": there.model,
        "data": {"rows": there.rows}, "layers": {"heads": False, "tokens": False},
        "transform": {"chain": there.stages},
    }  # fmt: skip
    row_bytes = max(1, matrix.nbytes // there.rows)
    check_disk(Path(run).absolute().parent, matrix.nbytes, f"{there.rows:,} rows")
    names = {"rows/id": ids}
    with open_writer(run, "store", settings, there.rows, overwrite, names=names) as writer:
        for start, stop in writer.missing(steps(there.rows, max(1, SEGMENT_BYTES // row_bytes))):
            part = _numbers(matrix[start:stop])
            blocks = {GRADIENTS + name: part[:, None, a:b] for name, (a, b) in there.columns().items()}
            beside = {"rows/id": ids[start:stop], "rows/text": texts[start:stop], "rows/zero": ~part.any(1)}
            writer.write(start, stop, {**blocks, **beside})
        return writer.finish()


@dataclass(frozen=True)
class _Index:
    """What an index of Bergson says of itself."""

    path: Path
    rows: int
    sizes: dict[str, int]
    dtype: str
    stages: list[dict[str, Any]]
    model: dict[str, Any]
    about: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> "_Index":
        if not (path / "info.json").is_file() or not (path / "gradients.bin").is_file():
            raise InputError(
                f"{path} is no index of Bergson: give the folder with info.json and gradients.bin in it"
            )
        try:
            info = json.loads((path / "info.json").read_text())
            rows, sizes = int(info["num_grads"]), {str(k): int(v) for k, v in info["grad_sizes"].items()}
            dtype = str(info["base_dtype"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path / 'info.json'} does not say num_grads, grad_sizes and base_dtype: make the index "
                "again with Bergson 2"
            ) from error
        if info.get("attribute_tokens"):
            raise InputError(f"{path} is an index of tokens, which is not imported: make one of rows")
        made = _yaml(path / "processor_config.yaml")
        step = _first_step(_yaml(path / "config.yaml"))
        prepared = step.get("preprocess_cfg") or {}
        stage = {"transform": "Imported", "from": "bergson", **made}
        unit = [{"transform": "UnitNormalize"}] if prepared.get("unit_normalize") else []
        asked = step.get("index_cfg") or {}
        name = f"{asked.get('model', '')}@{asked.get('revision') or 'main'}"
        # Its weights are not known here, so its name tells it from others.
        model = {"path": asked.get("model"), "fingerprint": name, "precision": asked.get("precision")}
        about = {"from": "bergson", "path": str(path.resolve()), "hessian": prepared.get("hessian_path")}
        return cls(path, rows, sizes, dtype, [stage, *unit], model, about)

    def columns(self) -> dict[str, tuple[int, int]]:
        """The columns of each module."""
        ends = np.cumsum([0, *self.sizes.values()]).tolist()
        return dict(zip(self.sizes, pairwise(ends), strict=True))

    def open(self) -> np.memmap:
        """The gradients, mapped into memory; bfloat16 as its bits."""
        kinds = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
        if self.dtype not in kinds:
            raise InputError(f"{self.path} has numbers of {self.dtype}: give float32, float16 or bfloat16")
        shape, dtype = (self.rows, sum(self.sizes.values())), np.dtype(kinds[self.dtype])
        size, file = shape[0] * shape[1] * dtype.itemsize, self.path / "gradients.bin"
        if not size or file.stat().st_size != size:
            raise InputError(
                f"{file} has {file.stat().st_size:,} bytes, and {shape[0]:,} rows of {shape[1]:,} numbers "
                f"would have {size:,}: make the index again"
            )
        return np.memmap(file, dtype, "r", shape=shape)


def _numbers(part: np.ndarray) -> np.ndarray:
    """Numbers that a store holds; bfloat16 is the upper half of float32."""
    return (part.astype(np.uint32) << 16).view(np.float32) if part.dtype == np.uint16 else np.array(part)


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        return dict(yaml.safe_load(path.read_text()) or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no YAML file of settings: make the index again, or delete it") from error


def _first_step(config: dict[str, Any]) -> dict[str, Any]:
    """What the command was given that made an index, as the first step of its record says."""
    every = (dict(given or {}) for step in config.get("steps") or [] for given in step.values())
    return next(every, {})


def _names(index: Path, rows: int) -> tuple[list[str], list[str]]:
    """Ids and texts of rows, as far as the dataset beside the index has them."""
    numbers, nothing = [str(row) for row in range(rows)], [""] * rows
    if not (index / "data.hf").is_dir():
        return numbers, nothing
    from datasets import Dataset, load_from_disk

    data = load_from_disk(str(index / "data.hf"))
    if not isinstance(data, Dataset) or len(data) != rows:
        return numbers, nothing
    columns = [next((name for name in known if name in data.column_names), None)
               for known in (ID_COLUMNS, TEXT_COLUMNS)]  # fmt: skip
    found = [None if name is None else storable(str(one) for one in data[name]) for name in columns]
    return found[0] or numbers, found[1] or nothing


# --- to other programs


def export_gradients(
    run: str | Path, path: str | Path, *, overwrite: bool = False, memory: int | None = None
) -> Path:
    """Write the gradients of a store to one file, a part of the rows at a time.

    Args:
        run: what `build` wrote.
        path: `.npy`: a matrix `[rows, numbers]` for `np.load(..., mmap_mode="r")`, with a `.json` beside it
            that has the columns `[first, last + 1]` and the shape of each block, and the names of rows; or
            `.parquet`: a column `gradients/BLOCK` for each block, lists of numbers, and ids and texts.
        overwrite: replace a file that is there.
        memory: bytes that rows take at a time; None: 256 MiB.

    Returns:
        The path of the file, which appears under its name complete or not at all.

    Raises:
        InputError: another ending, a file that is there, rows of several precisions in a matrix.
        StorageError: the disk is full or failed.

    >>> import tempfile
    >>> import torch
    >>> net, run = torch.nn.Linear(2, 1, bias=False), Path(tempfile.mkdtemp())
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> _ = gradfn.build(run, net, [{"x": torch.tensor([1.0, 2.0])}], loss=loss)
    >>> np.load(export_gradients(run, run / "g.npy"))
    array([[1., 2.]], dtype=float32)
    """
    path = Path(path)
    writers: dict[str, Callable[[Store, Path, int], None]] = {".npy": _write_npy, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise InputError(f"{path} should end in .npy or .parquet: give a name that does")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: give another name, or `overwrite=True`")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is no folder: make it, or give another name")
    with open_gradients(run) as store:
        numbers = sum(int(np.prod(store.shape(name)[1:])) for name in store.names(GRADIENTS))
        check_disk(path.parent, store.rows * numbers * 2, f"{store.rows:,} rows")
        partial = path.with_name(f".{path.name}.tmp")
        try:
            with disk_errors(path):
                writers[path.suffix](store, partial, rows_that_fit(store, memory))
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _write_npy(store: Store, path: Path, rows: int) -> None:
    names = store.names(GRADIENTS)
    dtypes = {np.dtype(store.header.arrays[name].dtype) for name in names}
    if len(dtypes) > 1:
        raise InputError("the blocks of this store differ in precision, and a matrix has one: write .parquet")
    shapes = {name.removeprefix(GRADIENTS): store.shape(name)[1:] for name in names}
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())]).tolist()
    columns = {
        name: {"columns": [ends[i], ends[i + 1]], "shape": shape}
        for i, (name, shape) in enumerate(shapes.items())
    }
    ids = store.read("rows/id").tolist() if "rows/id" in store.header.arrays else None
    matrix = np.lib.format.open_memmap(path, "w+", dtypes.pop(), (store.rows, ends[-1]))
    for start, stop, part in _parts(store, rows):
        matrix[start:stop] = part
    matrix.flush()
    about = path.with_name(path.name.removeprefix(".").removesuffix(".npy.tmp") + ".json")
    about.write_text(json.dumps({"blocks": columns, "ids": ids}))


def _parts(store: Store, rows: int) -> Iterator[tuple[int, int, Float[np.ndarray, "rows numbers"]]]:
    for start, stop, arrays in store.chunks(store.names(GRADIENTS), rows):
        yield start, stop, np.concatenate([array.reshape(stop - start, -1) for array in arrays.values()], 1)


def _write_parquet(store: Store, path: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [*store.names("rows"), *store.names(GRADIENTS)]
    writer = None
    try:
        for _, _, arrays in store.chunks(names, rows):
            columns = {name.removeprefix("rows/"): _column(pa, array) for name, array in arrays.items()}
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _column(pa: Any, array: np.ndarray) -> Any:
    """An array of rows as a column: texts, numbers, or lists of numbers."""
    if array.dtype == object:
        return pa.array([text.encode("utf-8", "replace").decode() for text in array.tolist()], pa.string())
    if array.ndim == 1:
        return pa.array(array)
    flat = pa.array(array.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:])))
