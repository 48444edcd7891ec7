"""The options of a search in a store."""

from dataclasses import dataclass
from typing import ClassVar

from gradfn.cli.request import option
from gradfn.errors import InputError

_INDEX = (
    "Search an index of FAISS, by its factory string: Flat, IVF1024,SQfp16, IVF4096,PQ64, HNSW32. It is made "
    "beside the store where it is not there."
)
_RERANK = (
    "Rank so many candidates anew by whole gradients, of each query on both sides; the store finds them."
)
_NPROBE = "Of an index: cells (IVF) or rows (HNSW) that a search visits; more find more, and take longer."


@dataclass(frozen=True)
class SearchOptions:
    """How the best rows of a store are found."""

    PANEL: ClassVar[str] = "Search"
    index: str | None = option(None, _INDEX, shown="compare all rows")
    nprobe: int | None = option(None, _NPROBE, shown="a sixteenth of the cells, or 64 rows")
    rerank: int | None = option(None, _RERANK)
    check: bool = option(False, "Compare with all rows: the share of the best ones that are found.")

    def check_given(self) -> None:
        """Refuse, before any work, options of an index without one."""
        if self.index is None and self.nprobe is not None:
            raise InputError("--nprobe is of an index: give --index, or leave it out")
        if self.index is None and self.rerank is None and self.check:
            raise InputError("--check is of --index or --rerank, and this search is exact: leave it out")
