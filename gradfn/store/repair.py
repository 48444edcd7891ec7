"""Removing the damaged files of a run, so that the command that made them computes only these again."""

import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from gradfn.errors import InputError
from gradfn.store.directory import locked, segments_of
from gradfn.store.file import OPEN, disk_errors, place_of, read_header
from gradfn.store.folder import sealed_in
from gradfn.store.reader import request_beside
from gradfn.store.verify import Checked

TRAINING = "training"
"""The kind of store of which a segment ends at every checkpoint."""


def repair(run: str | Path, found: Sequence[Checked]) -> list[Path]:
    """Remove the damaged files of a run, and return their paths; either all of them or none.

    A damaged checkpoint goes with the record of its steps, which the training takes again.

    Args:
        run: the run directory.
        found: of `check_files`.

    Raises:
        InputError: a file cannot be made again from what the run records, is no damaged one, or the run is
            being written.
        StorageError: the system does not let it be removed.

    >>> import tempfile
    >>> import numpy as np
    >>> from gradfn.store import open_writer
    >>> from gradfn.store.verify import check_files
    >>> run = Path(tempfile.mkdtemp())
    >>> with open_writer(run, "store", {}, rows=2, request={"command": "build"}) as writer:
    ...     writer.write(0, 1, {"loss": np.zeros(1)})
    ...     writer.write(1, 2, {"loss": np.ones(1)})
    >>> segment = run / "segments/store-0000000001-0000000002.h5"
    >>> _ = segment.write_bytes(segment.read_bytes()[:-9])
    >>> [path.name for path in repair(run, [*check_files(run)])]
    ['store-0000000001-0000000002.h5']
    """
    if not Path(run).is_dir():
        raise InputError(f"{run} is one file: give the directory of the run to repair it")
    lost = {one.resolve(): one for one in reversed([_lost(one) for one in found if one.wrong])}
    paths = list(dict.fromkeys(path for one in reversed(lost.values()) for path in _removed(one)))
    with ExitStack() as locks:
        for folder, kind in dict.fromkeys(map(_place, paths)):
            locks.enter_context(locked(folder, kind))
        for path in paths:
            with disk_errors(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return paths


def _lost(one: Checked) -> Path:
    """The file that is to be removed, or is missing already."""
    if one.lost is None:
        raise InputError(f"{one.path} cannot be repaired, and nothing was removed: {one.wrong}")
    return one.lost


def _place(path: Path) -> tuple[Path, str]:
    """The run directory of a file or a checkpoint, and the kind of what it holds."""
    return (path.parent, TRAINING) if path.suffix != ".h5" else place_of(path)


def _removed(lost: Path) -> list[Path]:
    """What is removed so that a lost file is made again: records before what they are of."""
    checkpoint = sealed_in(lost)
    beside = lost if checkpoint is None else checkpoint.parent / f"{TRAINING}.h5"
    request = request_beside(beside)
    if not request:
        raise InputError(
            f"{lost} is damaged, and no other file of the run says what made it, so nothing was removed: "
            "run the command that made it again, with `overwrite=True`"
        )
    if checkpoint is not None:
        return [*_steps_to(checkpoint), checkpoint]
    folder, kind = place_of(lost)
    if kind == "store" and _is_recorded(folder):
        raise InputError(
            f"{lost} is damaged, and holds rows that were recorded during a training, so nothing was "
            "removed: run the command that made it again, with `overwrite=True`"
        )
    return [lost] if lost.exists() else []


def _steps_to(checkpoint: Path) -> list[Path]:
    """The segments of a training that end at a checkpoint; of the first, that which begins there."""
    step = int(checkpoint.name.rpartition("-")[2])
    spans = {path: tuple(map(int, re.findall(r"\d{10,}", path.name)))
             for path in segments_of(checkpoint.parent, TRAINING)}  # fmt: skip
    return [path for path, (start, stop) in spans.items() if (stop if step else start) == step]


def _is_recorded(folder: Path) -> bool:
    """Whether a store holds the rows that a training recorded, whose number was not known before."""
    for path in segments_of(folder, "store"):
        try:
            return read_header(path).rows == OPEN
        except InputError:
            continue
    return False
