"""Whether files hold what was written: every array against the digest of its bytes."""

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PurePath
from typing import NamedTuple

import h5py

from gradfn.errors import InputError, LostFileError, StorageError
from gradfn.store.arrays import ArraySpec
from gradfn.store.columns import column_of
from gradfn.store.directory import files_of, segment_name
from gradfn.store.file import Header, Sums, foreign, get_header, reading
from gradfn.store.folder import DIGESTS, check_sealed, sealed_files, sealed_in
from gradfn.store.guard import check_heaps, linked_hard, own_dataset, refuse_links
from gradfn.store.reader import Store, steps

PART_BYTES = 1 << 26
NESTED = re.compile(r"shards|\d+-of-\d+|(checkpoint|hessian)-\d+")
"""Names of folders in a run directory that are runs of their own, or hold them."""


def check_file(path: Path) -> Header:
    """Read a whole file, and return its header.

    Files of before format 3 have checksums alone, which take a piece that zeros have overwritten for zeros.

    Raises:
        InputError: it is missing, damaged, or was not written by gradfn.
        StorageError: the system does not let it be read.
    """
    with reading(path) as file:
        header = get_header(file)
        count = header.stop - header.start
        own = {} if header.segments else header.arrays
        for name, spec in own.items():
            _check_array(file, path, header, name, ArraySpec(spec.dtype, (count, *spec.shape)))
        for name, spec in header.index_arrays.items():
            _check_array(file, path, header, name, spec)
        if header.segments and count == header.rows:
            check_heaps(path)
            for name, spec in header.arrays.items():
                _check_links(file, header, name, spec)
        return header


def _check_array(file: h5py.File, path: Path, header: Header, name: str, spec: ArraySpec) -> None:
    column_of(file, path, header, name, spec)
    shape, found = spec.shape or (1,), Sums() if header.format > 3 else sha256()
    dataset = own_dataset(file, name, shape, spec.stored_dtype)
    row_bytes = max(1, dataset.nbytes // max(1, shape[0]))
    for start, stop in steps(shape[0], max(1, PART_BYTES // row_bytes)):
        found.update(dataset[start:stop])
    if header.digests.get(name, found.hexdigest()) != found.hexdigest():
        raise ValueError(f"digest of {name}")


def _check_links(file: h5py.File, header: Header, name: str, spec: ArraySpec) -> None:
    """Refuse an index that shows other tools something else than the segments."""
    wanted = {(segment_name(header.kind, *span), name) for span in header.segments}
    if 0 in (header.rows, *spec.shape):
        return
    links = {(one.file_name, one.dset_name) for one in linked_hard(file, name).virtual_sources()}
    if links != wanted:
        raise ValueError(f"{name} is of other segments")


class Checked(NamedTuple):
    """What was found of a file.

    Args:
        path: the file.
        header: of an .h5 file, where that can be read.
        wrong: what is wrong, in one sentence; "": nothing.
        lost: the file that is damaged or missing, which may be another; None: something else is wrong.
    """

    path: Path
    header: Header | None = None
    wrong: str = ""
    lost: Path | None = None


def files_below(run: str | Path) -> list[Path]:
    """Every file of a run directory, and of those in it: shards, checkpoints.

    Raises:
        InputError: there is none.
    """
    run = Path(run)
    if run.is_file() and run.suffix != ".h5":
        raise foreign(run)
    folders = [run, *(path.parent for path in sorted(run.rglob("segments")))]
    refuse_links(*(path for path in sorted(run.rglob("*")) if NESTED.fullmatch(path.name)))
    paths = [path for folder in dict.fromkeys(folders) for path in files_of(folder)]
    if run.is_file():
        return [run]
    paths += [file for digests in sorted(run.rglob(DIGESTS)) for file in sealed_files(digests.parent)]
    if not paths:
        raise InputError(f"{run} holds no run: give the directory of a run, or an .h5 file in it")
    return paths


def check_files(run: str | Path) -> Iterator[Checked]:
    """Check the files of a run directory, and of those in it; of an index also that its files are its own.

    Args:
        run: the run directory, or an .h5 file.

    Raises:
        InputError: there is no such run.

    >>> import tempfile
    >>> import numpy as np
    >>> from gradfn.store import open_writer
    >>> run = tempfile.mkdtemp()
    >>> with open_writer(run, "store", {}, rows=1) as writer:
    ...     writer.write(0, 1, {"loss": np.zeros(1)})
    >>> [(one.path.name, one.wrong) for one in check_files(run)]
    [('store-0000000000-0000000001.h5', '')]
    """
    for path in files_below(run):
        try:
            if path != Path(run):
                refuse_links(path.parent, path)
            header = _check(path)
            if header and path != Path(run):
                _check_place(path, header)
        except (InputError, StorageError) as error:
            yield Checked(path, wrong=str(error), lost=getattr(error, "path", None))
        else:
            yield Checked(path, header)


def _check(path: Path) -> Header | None:
    """Check a file, and return its header if it has one."""
    if (folder := sealed_in(path)) is not None:
        check_sealed(folder, path)
        return None
    header = check_file(path)
    if header.segments:
        Store(path.resolve(), header).verify()
    return header


def _check_place(path: Path, header: Header) -> None:
    """Refuse a file that lies whole in the place of another.

    Raises:
        LostFileError: its name is of other rows or of another kind than what is in it.
    """
    name = segment_name(header.kind, header.start, header.stop)
    wanted = PurePath(name).name if path.parent.name == "segments" else f"{header.kind}.h5"
    if path.name != wanted:
        raise LostFileError(
            f"{path} holds what belongs to {wanted}: delete it and run the command that made it again", path
        )
