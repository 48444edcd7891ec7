"""The errors a person sees as one sentence: what was expected, what came, what to do."""

from pathlib import Path


class InputError(ValueError):
    """The input cannot be used as it is; the command line prints it and exits with status 2.

    >>> raise InputError("no file data.jsonl: give --dataset a path that exists")
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: no file data.jsonl: give --dataset a path that exists
    """


class LostFileError(InputError):
    """A file of a run is missing, damaged or unfinished; other files of the run may say what made it.

    Args:
        message: the sentence.
        path: of the file.

    >>> LostFileError("run/store.h5 is missing", Path("run/store.h5")).path.name
    'store.h5'
    """

    def __init__(self, message: str, path: Path):
        super().__init__(message)
        self.path = path


class StorageError(OSError):
    """The disk failed us (full, read-only, gone); the command line prints it and exits with status 1.

    >>> issubclass(StorageError, OSError)
    True
    """
