"""A run directory: the names of its files, the lock of its only writer, and removing what is there."""

import fcntl
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradfn.errors import InputError
from gradfn.store.file import Span, disk_errors, sync_directory
from gradfn.store.guard import refuse_links


def index_path(run: str | Path, kind: str = "store") -> Path:
    """The path of the index of a run, given the run directory or the .h5 file itself.

    >>> index_path("runs/facts.h5").as_posix()
    'runs/facts.h5'
    """
    return Path(run) / f"{kind}.h5" if Path(run).is_dir() else Path(run)


def check_place(run: str | Path) -> None:
    """Refuse a run directory that cannot be made or written.

    Raises:
        InputError: naming the file or the link to nothing that is in its way, or the folder that is closed.

    >>> check_place("runs/new")
    """
    run = Path(run)
    there = next(path for path in (run, *run.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise InputError(f"{there} is no folder, so {run} cannot be a run directory: give another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{there} may not be written to by this user: give another run directory")


def segment_name(kind: str, start: int, stop: int) -> str:
    """The path of a segment below its run directory.

    >>> segment_name("store", 0, 5)
    'segments/store-0000000000-0000000005.h5'
    """
    return f"segments/{kind}-{start:010d}-{stop:010d}.h5"


def segments_of(run: Path, kind: str) -> list[Path]:
    """The segments of one kind that a run has, in the order of their rows."""
    pattern = re.compile(rf"{kind}-\d{{10,}}-\d{{10,}}\.h5")
    return sorted(path for path in (run / "segments").glob("*.h5") if pattern.fullmatch(path.name))


def files_of(run: Path) -> list[Path]:
    """The files of a run directory, of whatever kinds: segments, then indexes."""
    return [*sorted(run.glob("segments/*.h5")), *sorted(run.glob("*.h5"))]


def refuse_linked(run: Path, kind: str) -> None:
    """Refuse a run directory of which files of a kind are symbolic links, and so another's."""
    refuse_links(run / "segments", run / f".{kind}.lock", run / f"{kind}.h5", *segments_of(run, kind))


def uncovered(start: int, stop: int, done: Iterable[Span]) -> Iterator[Span]:
    """Yield the parts of rows `start` to `stop` that no span of `done` (sorted, disjoint) covers."""
    for first, last in done:
        if first >= stop:
            break
        if first > start:
            yield start, first
        start = max(start, last)
    if start < stop:
        yield start, stop


def remove_leftovers(run: Path, kind: str) -> None:
    """Remove the temporary files of runs that were killed."""
    for path in [*(run / "segments").glob(f".{kind}-*.h5.tmp"), run / f".{kind}.h5.tmp"]:
        path.unlink(missing_ok=True)


def remove_all(run: Path, kind: str) -> None:
    """Remove what a run of this kind wrote; the index first, so that it never joins what is gone."""
    for path in [run / f"{kind}.h5", *segments_of(run, kind)]:
        path.unlink(missing_ok=True)


def remove_kind(run: str | Path, kind: str) -> None:
    """Remove every file of one kind from a run directory, if there are any.

    Raises:
        InputError: it is being written.
        StorageError: the disk failed.

    >>> import tempfile
    >>> import numpy as np
    >>> run = tempfile.mkdtemp()
    >>> from gradfn.store import open_writer
    >>> with open_writer(run, "store", {}, rows=1) as writer:
    ...     writer.write(0, 1, {"loss": np.zeros(1)})
    >>> remove_kind(run, "store")
    >>> [path.name for path in Path(run).iterdir()], [*Path(run, "segments").iterdir()]
    (['segments'], [])
    """
    run, lock = Path(run), lock_path(run, kind)
    if not (lock.exists() or _holds(run, kind)):
        return
    refuse_linked(run, kind)
    with locked(run, kind), disk_errors(run):
        remove_leftovers(run, kind)
        remove_all(run, kind)
        lock.unlink()


def lock_path(run: str | Path, kind: str) -> Path:
    """The file that the only writer of a kind locks."""
    return Path(run) / f".{kind}.lock"


def _holds(run: Path, kind: str) -> bool:
    """Whether there are files of this kind."""
    return (run / f"{kind}.h5").exists() or bool(segments_of(run, kind))


@contextmanager
def opened(run: Path, kind: str) -> Iterator[None]:
    """Make a run directory and hold its lock; an error before anything is written leaves no trace of it."""
    made = [path for path in (run / "segments", run, *run.parents) if not path.exists()]
    with disk_errors(run):
        (run / "segments").mkdir(parents=True, exist_ok=True)
        sync_directory(run)
    with locked(run, kind):
        try:
            yield
        except Exception:
            if not _holds(run, kind):
                lock_path(run, kind).unlink(missing_ok=True)
            for path in made:
                with suppress(OSError):  # it holds what others wrote
                    path.rmdir()
            raise


@contextmanager
def locked(run: Path, kind: str) -> Iterator[None]:
    """Hold the lock of the only writer of this kind; the system releases it when the process dies."""
    path = lock_path(run, kind)
    with disk_errors(run):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            raise BlockingIOError  # its last holder removed it
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"another run is writing the {kind} of {run}: wait for it to end, or write to another directory"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{run} cannot be locked ({error.strerror}): write to it from one process only", stacklevel=4
        )
    try:
        yield
    finally:
        os.close(handle)
