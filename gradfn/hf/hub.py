"""The Hugging Face hub: is it there, and how its libraries keep quiet."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["hub_answers", "is_hub_name", "listing", "offline", "quiet", "summary"]

_PATIENCE = 3.0
"""Seconds to wait for the hub; its own client would retry for half a minute."""


def is_hub_name(path: str) -> bool:
    """Whether the hub could know `path`: `name` or `owner/name`.

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

    # Looking up the name of the host obeys no timeout, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _PATIENCE)
    return bool(answers)


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let the hub's libraries use only what they have cached.

    `datasets` has no argument for it, and both libraries read their environment once, on import.
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
    """No progress bars, log lines or warnings, from any library; what was set before is restored.

    Errors are not lost: what fails raises, and the caller says it in one sentence.
    """
    import tqdm.std

    # The libraries have switches of their own, but the bar of the GGUF reader obeys none of them.
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
    """The first line of what an error goes back to, for use inside a sentence.

    >>> summary(ValueError("It broke.\\nThen more."))
    'It broke'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


def listing(folder: Path) -> str:
    """What a folder holds, for use inside a sentence: at most six names."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (", ".join(names[:6]) or "nothing") + more
