"""The rows of a store with the largest scores: by comparing all of them, or by an index of FAISS.

An index of FAISS finds the largest inner products. Every score of an `InnerProduct` is one, `<A z, B q>`, of
a row that went through `A` and a query that went through `B` (`InnerProduct.sides`). The index holds `A z`,
and its scores are those of the exact search. The rows with the lowest scores are what it finds for `-B q`.

An index lies beside the store, in a folder whose name tells all that changes it. It is made of parts, each a
file of FAISS with some of the rows, so that neither making nor reading it takes much memory.
"""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.methods.inner_product import InnerProduct
from gradfn.runs.gradients import GRADIENTS, blocks_of
from gradfn.runs.scores import READ_BYTES, rows_that_fit, stored_scores
from gradfn.scores import TopK, extremes
from gradfn.store import Store, check_disk
from gradfn.store.directory import locked
from gradfn.store.file import read_header
from gradfn.store.folder import create_folder
from gradfn.store.guard import refuse_links
from gradfn.transforms import Transform, chain, joint
from gradfn.transforms.joint import JOINT
from gradfn.types import Blocks

FORMAT = 1
MANIFEST = "index.json"
FEWEST_ROWS, ROWS_A_CELL = 65_536, 256
"""Rows to train an index on: at least so many, and for each cell of an IVF as many as FAISS looks at."""
CELLS, CANDIDATES = 16, 64
"""Unless told otherwise one of so many cells of an IVF is visited, and so many rows of a graph are."""
STRAIGHT = {"OPQMatrix", "RandomRotationMatrix", "RemapDimensionsTransform"}
"""What may stand in front of an index: rotations, which change no inner product."""
WHOLE = ("IndexNSG", "IndexNNDescent", "IndexIDMap", "IndexRowwiseMinMax")
"""Indexes of FAISS that rows cannot be added to part by part."""

Watch = Callable[[int], Any]


@dataclass(frozen=True)
class Faiss:
    """Which index of FAISS to search, and with how much effort.

    Args:
        factory: what FAISS calls a factory string: "Flat", "IVF1024,SQfp16", "IVF4096,PQ64", "HNSW32".
        nprobe: how many cells of an IVF a search visits, or how many rows it follows in a graph (`efSearch`);
            more find more of the best rows, and take longer. None: a sixteenth of the cells, 8 at least, or
            64 rows.
        seed: of the rows that the index is trained on.

    >>> Faiss("IVF1024,SQfp16", nprobe=64)
    Faiss(factory='IVF1024,SQfp16', nprobe=64, seed=0)
    """

    factory: str
    nprobe: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.nprobe is not None and self.nprobe < 1:
            raise InputError(f"`nprobe` must be 1 or more, not {self.nprobe}")


def find(
    store: Store,
    method: InnerProduct,
    queries: Blocks,
    k: int,
    *,
    index: Faiss | None = None,
    memory: int | None = None,
    progress: Watch | None = None,
) -> tuple[TopK, TopK]:
    """The `k` highest and the `k` lowest rows of a store for gradients of queries.

    Args:
        store: what `build` wrote.
        method: of rows as they are stored.
        queries: `{block: [queries, ...]}`, after the method's `query_transform`.
        k: how many; fewer are returned where there are fewer rows.
        index: an index of FAISS, made if it is not there; None: all rows are compared.
        memory: bytes that rows which are read take at a time, or a part of an index that is made; None: 256
            MiB. Making an index takes up to twice as much, beside the centres of its cells.
        progress: called with the rows done, where an index is made.

    Returns:
        Proponents and opponents, `[dampings * queries, k]` each. Scores are as exact as the rows in the
        index. A place for which it found no row has the row -1 and an infinite score of the other sign.

    Raises:
        InputError: an index that cannot hold these rows, or a method without one; see `open_index`.

    >>> import tempfile
    >>> import gradfn as gf
    >>> net, run = torch.nn.Linear(2, 1, bias=False), tempfile.mkdtemp()
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> data = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> _ = gf.build(run, net, data, loss=loss)
    >>> asked = {"root": torch.tensor([[[1.0, -1.0]]])}
    >>> proponents, opponents = find(gf.open_store(run), gf.grad_dot(), asked, 1, index=Faiss("Flat"))
    >>> proponents.rows, proponents.scores, opponents.rows, opponents.scores
    (tensor([[0]]), tensor([[1.]]), tensor([[1]]), tensor([[-2.]]))
    """
    if k < 1:
        raise InputError(f"top must be 1 or more, not {k}")
    if index is None:
        return extremes(stored_scores(store, method.against(queries), memory=memory), k)
    _, ask = method.sides()
    made = open_index(store, method, index, memory=memory, progress=progress)
    return made.nearest(_vectors(_in_order(store, ask(queries))), k)


# --- an index that is open


@dataclass(frozen=True, eq=False)
class OpenIndex:
    """An index on disk, of which FAISS maps the files into memory."""

    path: Path
    settings: Faiss
    parts: Sequence[Any] = field(repr=False)

    def nearest(self, vectors: Float[Tensor, "queries n"], k: int) -> tuple[TopK, TopK]:
        """The rows with the highest and with the lowest inner products; see `find`."""
        highest, lowest = self._best(vectors, k), self._best(-vectors, k)
        return highest, TopK(-lowest.scores, lowest.rows)

    def _best(self, vectors: Float[Tensor, "queries n"], k: int) -> TopK:
        """The rows with the highest inner products; equal ones stand in the order of their rows."""
        scores, rows, first = [], [], 0
        for part in self.parts:
            values, numbers = part.search(vectors.numpy(), min(k, part.ntotal))
            scores.append(np.where(numbers < 0, -np.inf, values))
            rows.append(np.where(numbers < 0, -1, numbers + first))
            first += part.ntotal
        values, numbers = np.concatenate(scores, 1), np.concatenate(rows, 1)
        order = np.lexsort((numbers, -values))[:, :k]
        best = (np.take_along_axis(of_all, order, 1) for of_all in (values, numbers))
        return TopK(*(torch.from_numpy(of_best) for of_best in best))


def open_index(
    store: Store,
    method: InnerProduct,
    index: Faiss,
    *,
    memory: int | None = None,
    progress: Watch | None = None,
) -> OpenIndex:
    """Open the index of a store; it is made if it is not there, or the store has other rows by now.

    Args:
        store, method, index, memory, progress: see `find`.

    Raises:
        InputError: the method has no one index (`InnerProduct.sides`); FAISS does not know the factory
            string, or makes no inner products of it; it has more cells than there are rows; it takes no rows
            part by part; another process is making it.
        StorageError: the disk is full or failed.
    """
    rows, _ = method.sides()
    empty = empty_index(store, index)
    how = {"format": FORMAT, "factory": index.factory, "seed": index.seed, "rows": chain(rows).settings()}
    words = re.sub("[^A-Za-z0-9]+", "_", index.factory)[:40]
    kind = f"faiss-{words}-{_digest(how)}"
    path = store.path.parent / f"{kind}-{rows_digest(store)}"
    refuse_links(path)
    if not _complete(path):
        with locked(path.parent, "faiss"):
            if not _complete(path):  # another process may have made it
                _make(path, store, rows, empty, index, memory or READ_BYTES, how, progress)
                for old in path.parent.glob(f"{kind}-*"):  # of rows that the store had before
                    if old != path:
                        shutil.rmtree(old, ignore_errors=True)
    refuse_links(*path.iterdir())
    return OpenIndex(path, index, [_read(path / name, index.nprobe) for name in _sizes(path)])


def rows_digest(store: Store) -> str:
    """16 hex digits that tell the gradients of a store from others: of its files and what is in them."""
    parts: list[Any] = [store.rows]
    for path in store.files():
        header = read_header(path)
        own = {name: value for name, value in header.digests.items() if name.startswith(GRADIENTS)}
        stat = path.stat()  # files of older formats have no digests
        parts.append([header.start, header.stop, own or [stat.st_size, stat.st_mtime_ns]])
    return _digest(parts)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _complete(path: Path) -> bool:
    """Whether an index is there, and its files are as long as they were."""
    if not (path / MANIFEST).is_file():
        return False
    return all(
        (path / name).is_file() and (path / name).stat().st_size == size
        for name, size in _sizes(path).items()
    )


def _sizes(path: Path) -> dict[str, int]:
    """The files of an index and their sizes."""
    sizes = json.loads((path / MANIFEST).read_text())["files"]
    if not all(re.fullmatch(r"\d+\.faiss", name) for name in sizes):
        raise InputError(f"{path / MANIFEST} names files that are no parts of an index: delete {path}")
    return sizes


def _read(path: Path, nprobe: int | None) -> Any:
    """A part of an index, mapped into memory as far as its kind can be."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        try:
            part = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
        except RuntimeError:  # cells of an IVF are mapped in another way
            part = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise InputError(f"{path} is damaged ({_reason(error)}): delete {path.parent}") from error
    _set_effort(part, nprobe)
    return part


def _set_effort(index: Any, nprobe: int | None) -> None:
    """How many cells are visited, or how many rows of a graph are followed."""
    import faiss

    space, ivf = faiss.ParameterSpace(), faiss.try_extract_index_ivf(index)
    if ivf is not None:
        space.set_index_parameter(index, "nprobe", nprobe or max(8, ivf.nlist // CELLS))
    elif any(hasattr(kind, "hnsw") for kind in _inside(index)):
        space.set_index_parameter(index, "efSearch", nprobe or CANDIDATES)
    elif nprobe is not None:
        raise InputError(
            "`nprobe` is how many cells (IVF) or rows (HNSW) a search visits, and this index compares all "
            "rows: leave it out"
        )


def _inside(index: Any) -> Iterator[Any]:
    """An index, and those that it wraps."""
    import faiss

    while index is not None:
        kind: Any = faiss.downcast_index(index)
        yield kind
        index = getattr(kind, "base_index", None) or (kind.index if hasattr(kind, "chain") else None)


# --- making one


def empty_index(store: Store, index: Faiss) -> Any:
    """An index of FAISS without rows, for those of a store.

    Raises:
        InputError: all that can be seen to be wrong before a row is read; see `open_index`.
    """
    import faiss

    text, rows = index.factory, store.rows
    width = sum(int(np.prod(store.shape(name)[1:])) for name in store.names(GRADIENTS))
    try:
        empty = faiss.index_factory(width, text, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(
            f"FAISS has no index {text!r} of inner products of {width:,} numbers ({_reason(error)}): give "
            "Flat, 'IVF1024,SQfp16' or HNSW32, say"
        ) from error
    kinds = [*_inside(empty)]
    front = [kind.chain.at(i) for kind in kinds if hasattr(kind, "chain") for i in range(kind.chain.size())]
    for stage in map(faiss.downcast_VectorTransform, front):
        if type(stage).__name__ not in STRAIGHT:
            raise InputError(
                f"{text!r} begins with a {type(stage).__name__}, which changes inner products: leave it out, "
                "or rotate with OPQ"
            )
    if any(type(kind).__name__.startswith(WHOLE) for kind in kinds):
        raise InputError(f"{text!r} takes all rows at once, and a store is read in parts: give HNSW32, say")
    _set_effort(empty, index.nprobe)
    ivf = faiss.try_extract_index_ivf(empty)
    if ivf is not None:
        if ivf.nlist > rows:
            raise InputError(
                f"{text!r} has {ivf.nlist:,} cells for {rows:,} rows: give fewer cells than rows, or Flat"
            )
        ivf.cp.min_points_per_centroid = 1  # few rows a cell are the user's choice
        kinds.append(faiss.downcast_index(ivf))
    for kind in kinds:
        if hasattr(kind, "do_polysemous_training"):
            kind.do_polysemous_training = False  # of a search that is not used, and slow
    return empty


def _make(
    path: Path,
    store: Store,
    rows: Transform,
    empty: Any,
    index: Faiss,
    memory: int,
    how: dict[str, Any],
    progress: Watch | None,
) -> None:
    """Train an index on some rows, and write all of them, part by part."""
    size = _row_bytes(empty)
    check_disk(path.parent, store.rows * size, f"{store.rows:,} rows of an index {index.factory!r}")
    _train(store, rows, empty, index, memory)
    most = max(1, memory // (2 * size))  # FAISS makes room for twice as many

    def fill(folder: Path) -> None:
        sizes = {}
        for number, part in enumerate(_parts(store, rows, empty, most, memory, progress)):
            name = f"{number}.faiss"
            sizes[name] = _write(part, folder / name)
        text = json.dumps({"index": asdict(index), "files": sizes, "how": how}, indent=1)
        (folder / MANIFEST).write_text(text)

    create_folder(path, fill)


def _parts(
    store: Store, rows: Transform, empty: Any, most: int, memory: int, progress: Watch | None
) -> Iterator[Any]:
    """Copies of an empty index with at most so many of the rows each."""
    import faiss

    part = faiss.clone_index(empty)
    for vectors in _read_vectors(store, rows, memory // 4, most):
        if part.ntotal and part.ntotal + len(vectors) > most:
            yield part
            part = faiss.clone_index(empty)
        part.add(vectors)
        if progress:
            progress(len(vectors))
    yield part


def _write(part: Any, path: Path) -> int:
    """Write a part; the size of its file."""
    import faiss

    try:
        faiss.write_index(part, str(path))
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, _reason(error)) from error  # FAISS does not tell why it could not write
    return path.stat().st_size


def _train(store: Store, rows: Transform, empty: Any, index: Faiss, memory: int) -> None:
    """Let an index learn its cells and codes from rows that a seed chooses."""
    import faiss

    if empty.is_trained:
        return
    ivf = faiss.try_extract_index_ivf(empty)
    wanted = max(FEWEST_ROWS, ROWS_A_CELL * (0 if ivf is None else ivf.nlist))
    fit = max(1 if ivf is None else ivf.nlist, memory // (8 * empty.d))  # FAISS copies them
    count = min(store.rows, wanted, fit)
    chosen = np.sort(np.random.default_rng(index.seed).choice(store.rows, count, replace=False))
    sample, start = np.empty((count, empty.d), np.float32), 0
    for vectors in _read_vectors(store, rows, memory // 4):
        first, last = np.searchsorted(chosen, [start, start + len(vectors)])
        sample[first:last] = vectors[chosen[first:last] - start]
        start += len(vectors)
    try:
        empty.train(sample)
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot train {index.factory!r} on {count:,} rows ({_reason(error)}): give fewer cells or "
            "shorter codes"
        ) from error


def _row_bytes(index: Any) -> int:
    """About how many bytes a row of an index takes."""
    graph = sum(5 * kind.hnsw.nb_neighbors(0) for kind in _inside(index) if hasattr(kind, "hnsw"))
    try:
        return index.sa_code_size() + 8 + graph
    except RuntimeError:  # of some graphs
        return 4 * index.d + 8 + graph


def _read_vectors(
    store: Store, rows: Transform, memory: int, most: int | None = None
) -> Iterator[Float[np.ndarray, "part n"]]:
    """All rows as vectors, a part at a time."""
    step = rows_that_fit(store, memory)
    for _, _, arrays in store.parts(store.names(GRADIENTS), min(step, most or step)):
        yield _vectors(rows(blocks_of(arrays))).numpy()


def _in_order(store: Store, blocks: Blocks) -> Blocks:
    """Queries with their blocks in the order of the store's."""
    names = [name.removeprefix(GRADIENTS) for name in store.names(GRADIENTS)]
    if {*names} != blocks.keys():
        raise InputError(
            f"the queries have the blocks {', '.join(sorted(blocks)[:6])}, and the rows "
            f"{', '.join(sorted(names)[:6])}: make both from the same layers"
        )
    return {name: blocks[name] for name in names}


def _vectors(blocks: Any) -> Float[Tensor, "rows n"]:
    return joint()(blocks)[JOINT][:, 0].float().cpu().contiguous()


def _reason(error: RuntimeError) -> str:
    """What FAISS says is wrong, without the place in its code."""
    return str(error).strip().splitlines()[0].rsplit(": ", 1)[-1]
