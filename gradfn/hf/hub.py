"""The Hugging Face hub: whether it answers, and silencing the output of its libraries."""

import contextlib
import errno
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradfn.errors import InputError, StorageError

__all__ = [
    "disk_fault",
    "hub_answers",
    "is_hub_name",
    "listing",
    "local",
    "offline",
    "quiet",
    "refuse_revision",
    "summary",
]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOLCK, errno.EMFILE, errno.ENFILE}
"""What is wrong with a machine, and not with the file that is read."""

_PATIENCE = 3.0
"""Seconds to wait for the hub; its client would retry for half a minute."""


def is_hub_name(path: str) -> bool:
    """Whether `path` could be a name on the hub: `name` or `owner/name`.

    >>> is_hub_name("EleutherAI/pythia-14m"), is_hub_name("./pythia-14m"), is_hub_name("a/b/c")
    (True, False, False)
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def hub_answers() -> bool:
    """Whether the hub answers one request within seconds; False in offline mode."""
    from huggingface_hub import constants, get_session

    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # whatever fails, the hub does not answer
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            answers.append(True)

    # In a thread, because the look-up of the host's name has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _PATIENCE)
    return bool(answers)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let the hub's libraries use only what they have cached.

    `datasets` has no argument for it, and both libraries read the environment only when they are imported.
    """
    import datasets.config
    import huggingface_hub.constants

    places: tuple[Any, Any] = (huggingface_hub.constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings from any library inside this context.

    Errors are raised as ever.
    """
    import tqdm.std

    # The libraries have switches, but none of them hides the bar of the GGUF reader.
    bar: Any = tqdm.std.tqdm
    make_bar, level = bar.__init__, logging.root.manager.disable

    def make_hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        make_bar(self, *args, **{**kwargs, "disable": True})

    try:
        bar.__init__ = make_hidden
        logging.disable(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bar.__init__ = make_bar
        logging.disable(level)


def summary(error: BaseException) -> str:
    """The first line of the error that caused an error, for use inside a sentence.

    >>> summary(ValueError("It broke.\\nThen more."))
    'It broke'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


def listing(folder: Path) -> str:
    """At most six names of what a folder holds, for use inside a sentence."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(names[:6]) or "nothing") + more


def disk_fault(error: BaseException) -> StorageError | None:
    """What failed on this machine, where an error of reading was caused by that and not by what is read.

    >>> disk_fault(OSError(errno.ENOSPC, "No space left on device"))
    StorageError(...No space left on device...)
    >>> disk_fault(ValueError("no JSON"))
    """
    cause: BaseException | None = error
    while cause is not None:
        full = "No space left on device" in str(cause) or "Disk quota exceeded" in str(cause)
        if full or (isinstance(cause, OSError) and cause.errno in _FULL):
            return StorageError(f"this machine failed ({summary(cause)}): free space there, or set TMPDIR")
        cause = cause.__cause__ or cause.__context__
    return None


def local(path: str | Path) -> Path:
    """A path of this machine, of which can be asked whether it exists.

    Raises:
        InputError: it is of a user who has no home here, too long, or in a folder that cannot be read.
    """
    try:
        place = Path(path).expanduser()
        place.exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else summary(error)
        raise InputError(f"{str(path)[:80]!r} cannot be looked for ({why}): check the path") from error
    return place


def refuse_revision(place: Path, revision: str | None) -> None:
    """Refuse a revision of what lies on this machine.

    >>> refuse_revision(Path("nowhere"), "main")
    """
    if revision is not None and place.exists():
        raise InputError(
            f"{place} lies on this machine and has no revisions, which only the hub has: leave out the "
            f"revision {revision!r}"
        )
