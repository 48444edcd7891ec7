"""Arrays as a store holds them: numbers as they are, strings as UTF-8 of one width."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from gradfn.errors import InputError

Values = np.ndarray | Sequence[str]
TEXT_CHARACTERS = 4096
"""Characters of a text that are stored, enough to recognise it; strings in a store have one width."""


@dataclass(frozen=True)
class ArraySpec:
    """The numpy dtype of an array (`|S<bytes>` for strings, as UTF-8) and its shape.

    >>> ArraySpec("<f4", (16, 16)).stored_dtype
    dtype('float32')
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype in the file; strings have one width, because checksums do not cover any other kind."""
        dtype = np.dtype(self.dtype)
        return h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype

    def wider(self, other: "ArraySpec") -> "ArraySpec":
        """Return the spec that holds both, where they differ in the width of their strings only."""
        a, b = np.dtype(self.dtype), np.dtype(other.dtype)
        return other if a.kind == b.kind == "S" and a.itemsize < b.itemsize else self

    def fits(self, other: "ArraySpec") -> bool:
        """Say whether one array can hold the rows of both."""
        return self.shape == other.shape and self.wider(other) == other.wider(self)

    def __str__(self) -> str:
        dtype = np.dtype(self.dtype)
        return f"{'strings' if dtype.kind == 'S' else dtype} {list(self.shape)}"


def joined_specs(
    known: Mapping[str, ArraySpec], new: Mapping[str, ArraySpec], where: Path
) -> dict[str, ArraySpec]:
    """Return specs of a row that hold the rows of both.

    Raises:
        InputError: the segments have other arrays, or arrays of other shapes or dtypes.
    """
    for name in [*known, *new]:
        before, now = known.get(name), new.get(name)
        if before is None or now is None or not before.fits(now):
            raise InputError(
                f"{where} does not fit the segments before it, where {name!r} is {before or 'absent'} a row "
                f"and not {now or 'absent'}: give every slice of rows the same arrays"
            )
    return {name: spec.wider(new[name]) for name, spec in known.items()}


def as_array(name: str, values: Values) -> np.ndarray:
    """Return what HDF5 can hold with a checksum: numbers as they are, strings as UTF-8 of one width.

    Raises:
        InputError: values of another type, or a string that ends in NUL.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "biufc":
        return values
    texts = np.array(values, dtype=object)
    if wrong := {type(text).__name__ for text in texts.ravel() if not isinstance(text, str)}:
        raise InputError(
            f"{name!r} holds {min(wrong)}: a store takes numpy arrays of numbers, or lists of str"
        )
    # Lone surrogates come out of real JSON files and have no strict utf-8.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts.ravel()]
    if any(text.endswith(b"\0") for text in encoded):
        raise InputError(f"{name!r} has a string that ends in NUL, which HDF5 strings cannot hold: strip it")
    width = max(map(len, encoded), default=0)
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(width, 1))).reshape(texts.shape)


def decoded(array: np.ndarray) -> np.ndarray:
    """Undo `as_array`: strings come back as Python strings in an object array."""
    if array.dtype.kind != "S":
        return array
    texts = [text.decode("utf-8", "surrogatepass") for text in array.ravel()]
    return np.array(texts, dtype=object).reshape(array.shape)


def storable(texts: Iterable[str]) -> list[str]:
    """Texts as a store holds them: their first 4096 characters, without the NULs that HDF5 would end in.

    >>> storable(["a\\0b\\0", "c" * 5000])[0], len(storable(["c" * 5000])[0])
    ('a\\x00b', 4096)
    """
    return [text[:TEXT_CHARACTERS].rstrip("\0") for text in texts]


def check_array_names(names: Iterable[str]) -> None:
    """Refuse names that are not HDF5 paths, or that are an array and a group of arrays at once."""
    names = list(names)
    groups = {name[:i] for name in names for i, letter in enumerate(name) if letter == "/"}
    for name in names:
        if not name or {"", "."} & set(name.split("/")) or name in groups or names.count(name) > 1:
            raise InputError(
                f"{name!r} cannot name an array of a store: give each a path of its own, like 'rows/id'"
            )
