"""The errors a person sees as one sentence: what was expected, what came, what to do."""


class InputError(ValueError):
    """The input cannot be used as it is; the command line prints it and exits with status 2.

    >>> raise InputError("no file data.jsonl: give --dataset a path that exists")
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: no file data.jsonl: give --dataset a path that exists
    """


class StorageError(OSError):
    """The disk failed us (full, read-only, gone); the command line prints it and exits with status 1.

    >>> issubclass(StorageError, OSError)
    True
    """
