"""A folder of files, such as a checkpoint: it appears complete or not at all, with digests of its files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from gradfn.errors import InputError, LostFileError, StorageError
from gradfn.store.file import disk_errors, sync_directory, system_error
from gradfn.store.guard import refuse_links

DIGESTS = "digests.json"
"""The file in a folder that names the others, with the digest of each."""


def create_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder of files that appears as `path` complete and on disk, or not at all.

    One that is there already is removed before.

    Raises:
        StorageError: the disk is full or failed, whatever the writing library makes of it.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with disk_errors(path):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _fill(partial, fill)
            files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
            digests = {file.relative_to(partial).as_posix(): digest_of(file) for file in files}
            text = json.dumps({**digests, "": _digest_of(digests)}, indent=1)
            (partial / DIGESTS).write_text(text, encoding="utf-8")
            for file in [*files, partial / DIGESTS]:
                with file.open("rb+") as content:
                    os.fsync(content.fileno())
            for folder in {file.parent for file in files}:
                sync_directory(folder)
            if path.exists():
                shutil.rmtree(path)
            os.replace(partial, path)
            sync_directory(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(partial: Path, fill: Callable[[Path], None]) -> None:
    """Write the files; a disk that is full comes out of C++ and Rust as errors of many kinds."""
    try:
        fill(partial)
    except (OSError, InputError):
        raise
    except Exception as error:
        if (fault := system_error(error)) is None:
            raise
        raise fault from error


def digest_of(path: Path) -> str:
    """The digest of a file's bytes."""
    digest = sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _digest_of(digests: dict[str, Any]) -> str:
    """The digest of digests, which stands below them."""
    return sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def sealed_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that has digests, these last; of another folder none.

    Raises:
        InputError: the folder, or its file of digests, is a symbolic link.
    """
    if (folder / DIGESTS).exists():
        refuse_links(folder, folder / DIGESTS)
        yield from (folder / name for name in _digests(folder, broken={}))
        yield folder / DIGESTS


def sealed_in(file: Path) -> Path | None:
    """The folder with digests that a file lies in; None: there is none, or it is a file of HDF5."""
    folders = file.parents if file.suffix != ".h5" else ()
    return next((folder for folder in folders if (folder / DIGESTS).exists()), None)


def _digests(folder: Path, broken: dict[str, str] | None = None) -> dict[str, str]:
    """What a folder's file of digests says; `broken` where it cannot be read."""
    try:
        found = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        whole = found.pop("") == _digest_of(found)
        texts = all(isinstance(digest, str) for digest in found.values())
        leads_out = any(name.startswith("/") or ".." in PurePosixPath(name).parts for name in found)
        if whole and texts and not leads_out:
            return found
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    if broken is not None:
        return broken
    raise _lost(folder / DIGESTS, "is damaged (it is no list of digests)")


def check_sealed(folder: Path, file: Path) -> None:
    """Compare a file with the digest in its folder; the file of digests is only read.

    Raises:
        InputError: it is missing, or not what was written.
    """
    digests = _digests(folder)
    if file == folder / DIGESTS:
        return
    if not file.is_file() or file.resolve() != folder.resolve() / file.relative_to(folder):  # a link
        raise _lost(file, "is missing")
    if digest_of(file) != digests.get(file.relative_to(folder).as_posix()):
        raise _lost(file, "is damaged (its data is not what was written)")


def check_folder(folder: Path) -> None:
    """Compare every file of a folder with its digest, if it has any.

    Raises:
        InputError: naming the first that is missing, or not what was written.
        StorageError: the system does not let it be read.
    """
    try:
        for file in sealed_files(folder):
            check_sealed(folder, file)
    except OSError as error:
        raise StorageError(f"cannot read {folder} ({error}): make it readable and try again") from error


def _lost(file: Path, what: str) -> LostFileError:
    return LostFileError(f"{file} {what}: give the run to gradfn verify --repair", file)
