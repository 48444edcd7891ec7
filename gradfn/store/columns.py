"""Reading some rows of the arrays of a file, and checking that they are what was written.

Numbers lie in one piece. Large parts of it are mapped into memory, so that reading them costs no copy.
Every 256 KiB have a checksum (XXH3, which a core computes about as fast as it reads memory). It is compared
each time they are read. Texts, and all arrays of files before format 4, are compressed and checksummed by
HDF5.
"""

import errno
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from xxhash import xxh3_64_hexdigest

from gradfn.store.arrays import ArraySpec
from gradfn.store.file import BLOCK, DIGITS, Header, explained, reading
from gradfn.store.guard import own_dataset

POPULATE_READ = 22
"""Of `madvise`, Linux 5.14: read the pages now, and say so if that fails."""
MAPPED_BYTES = 1 << 20
"""Less is copied: a map costs more than the copy, and an open file as long as its rows are used."""


@dataclass(frozen=True)
class Filtered:
    """An array that HDF5 decompresses and checks."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows.

        Raises:
            InputError: the file is damaged or gone.
            StorageError: the system does not let it be read.
        """
        with reading(self.path) as file:
            return own_dataset(file, self.name, self.shape, self.dtype)[start:stop]


@dataclass(frozen=True)
class Mapped:
    """An array that lies in one piece, with checksums."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    sums: str

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows, see `Filtered.rows`: pages of the file or a copy, of which a change stays in memory."""
        shape = (stop - start, *self.shape[1:])
        row, size = (self.dtype.itemsize * int(np.prod(of)) for of in (self.shape[1:], self.shape))
        first, last = start * row, stop * row
        begin, end = first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, size)
        if first == last:
            return np.empty(shape, self.dtype)
        with explained(self.path):
            blocks = self._bytes(begin, end)
            for place in range(begin, end, BLOCK):
                digits = DIGITS * (place // BLOCK)
                found = xxh3_64_hexdigest(blocks[place - begin : place - begin + BLOCK])
                if found != self.sums[digits : digits + DIGITS]:
                    raise ValueError("checksum of numbers")
        flat = np.frombuffer(blocks, np.uint8, last - first, first - begin)
        return np.require(flat.view(self.dtype), requirements="A").reshape(shape)

    def _bytes(self, begin: int, end: int) -> memoryview:
        """Some bytes of the array, mapped into memory if they are many."""
        place = self.offset + begin
        page = place - place % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            # Memory behind the end of a file kills the process that reads it.
            if os.fstat(file.fileno()).st_size < self.offset + end:
                raise ValueError("truncated file")
            if end - begin < MAPPED_BYTES:
                file.seek(place)
                copied = bytearray(file.read(end - begin))
                if len(copied) < end - begin:
                    raise ValueError("truncated file")
                return memoryview(copied)
            content = mmap.mmap(file.fileno(), self.offset + end - page, access=mmap.ACCESS_COPY, offset=page)
        if sys.platform == "linux":
            with _read_errors():
                content.madvise(POPULATE_READ)
        return memoryview(content)[place - page :]


Column = Filtered | Mapped
"""An array of a file."""


def column_of(file: h5py.File, path: Path, header: Header, name: str, spec: ArraySpec) -> Column:
    """An array of an open file, which may be closed before rows are read.

    Args:
        file, path, header: the file.
        name: of the array.
        spec: the dtype, and the shape with the rows.

    Raises:
        ValueError: it is not what the header says, or lies elsewhere.
    """
    shape, dtype = spec.shape or (1,), spec.stored_dtype
    dataset = own_dataset(file, name, shape, dtype)
    if header.format < 4 or dtype.kind == "S" or 0 in shape:
        return Filtered(path, name, shape, dtype)
    offset, sums = dataset.id.get_offset(), header.digests.get(name, "")
    if offset is None or len(sums) != DIGITS * -(-dataset.nbytes // BLOCK):
        raise ValueError(f"{name} is not what the header says")
    return Mapped(path, offset, shape, dtype, sums)


@contextmanager
def _read_errors() -> Iterator[None]:
    """Pages that cannot be read are an error here, and would kill the process later."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EFAULT, errno.EIO):
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
