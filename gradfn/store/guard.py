"""What keeps a damaged file, or a run directory from somebody else, from doing harm."""

import mmap
from itertools import accumulate
from pathlib import Path

import h5py
import numpy as np

from gradfn.errors import InputError

HEAP, HEAP_HEADER, OBJECT_HEADER = b"GCOL\1\0\0\0", 16, 16
HEAP_BYTES = 16 << 20
"""Where the settings of a file lie, which are written first."""


def refuse_links(*paths: Path) -> None:
    """Refuse symbolic links in a run directory: what is read and removed there must be the run's own.

    Raises:
        InputError: naming the first link.
    """
    for path in paths:
        if path.is_symlink():
            raise InputError(
                f"{path} is a symbolic link, and the files of a run must be its own: put what it points to "
                "in its place"
            )


def check_heaps(path: Path, within: int | None = None) -> None:
    """Refuse a file in whose heaps HDF5 would loop for ever: they have no checksum, and other files none.

    Args:
        path: of a file, complete.
        within: the bytes to look at; None: all.

    Raises:
        ValueError: a heap is not one.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.find(HEAP, 0, within or len(content))
        while start >= 0:
            end = start + int.from_bytes(content[start + 8 : start + HEAP_HEADER], "little")
            place = start + HEAP_HEADER
            while place + OBJECT_HEADER <= end:
                number = int.from_bytes(content[place : place + 2], "little")
                size = int.from_bytes(content[place + 8 : place + OBJECT_HEADER], "little")
                # The free space, which is number 0, counts its header in.
                place += OBJECT_HEADER + -(-size // 8) * 8 if number else size
                if number == size == 0 or place > end:
                    raise ValueError("checksum of the heap")
            start = content.find(HEAP, start + len(HEAP), within or len(content))


def text_of(file: h5py.File, name: str) -> str:
    """An attribute of an open file, which must be a text.

    Raises:
        ValueError: it is another thing, or damaged.
    """
    attribute = file.attrs.get_id(name)
    kind = h5py.check_string_dtype(attribute.dtype)
    if kind is None or attribute.shape != ():
        raise ValueError(f"{name} is no text")
    if kind.length is None:  # formats 1 and 2
        check_heaps(Path(file.filename), HEAP_BYTES)
    value = file.attrs[name]
    return value.decode() if isinstance(value, bytes) else str(value)


def linked_hard(file: h5py.File, name: str) -> h5py.Dataset:
    """An array of the file, which no link on the way to it leads out of.

    Raises:
        ValueError: one does, or it is no array.
    """
    way = accumulate(name.strip("/").split("/"), "{}/{}".format)  # every group, and the array
    if any(not isinstance(file.get(path, getlink=True), h5py.HardLink) for path in way):
        raise ValueError(f"{name} lies elsewhere")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{name} is no array")
    return dataset


def own_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """An array that lies in the file itself, as the header says.

    Slicing past the end of a shorter one would silently give fewer rows, and a file from somebody else may
    point to any other file that the reader may read.

    Raises:
        ValueError: it is another one, or lies elsewhere.
    """
    dataset = linked_hard(file, name)
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} lies elsewhere")
    if (dataset.shape, dataset.dtype) != (shape, dtype):
        raise ValueError(f"{name} is not what the header says")
    return dataset
