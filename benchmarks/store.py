"""What a store costs beside what the disk and numpy can do: writing, exact search, an index of FAISS, memory.

    python benchmarks/store.py --rows 200000 --numbers 1024

Rows are random, around a few hundred centres, so that there is something for cells to find. In one process,
side by side and in turn, with the median of the ratios:

- `write`: a segment of the store, synced, against `dd` of as many bytes, synced. A store has digests and
  checksums, which `dd` has not;
- `search`: the exact search for the 10 highest and lowest rows of so many queries, against the product with a
  memory-mapped array, a part at a time, and the same choice of rows.

Then each index is made and searched, in a process of its own, as is the exact search: seconds, recall@10 of
both sides, the size on disk, and the memory at the peak beyond that at the start. Of a search this counts the
pages of files that are mapped into memory, which the system takes back where it needs them; they are told.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradfn.methods.inner_product import InnerProduct
from gradfn.runs.nearest import Faiss, find, open_index
from gradfn.scores import extremes, recall
from gradfn.store import Store, open_store, open_writer
from gradfn.transforms import chain, dot, unit_normalize

BLOCKS, TOP, CENTRES, PART = 4, 10, 256, 20_000
SIZES = ("building", "searching", "mapped", "size")
METHOD = InnerProduct(chain(unit_normalize()), chain(unit_normalize()))


def part_of(start: int, stop: int, numbers: int, dtype: str) -> np.ndarray:
    """Some rows, a function of their numbers."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, numbers), np.float32)
    generator = np.random.default_rng([1, start])
    which = generator.integers(0, CENTRES, stop - start)
    noise = generator.standard_normal((stop - start, numbers), np.float32)
    return (centres[which] + noise).astype(dtype)


def blocks_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows as blocks of a store."""
    parts = np.split(rows, BLOCKS, axis=1)
    return {f"gradients/{number}": np.ascontiguousarray(part)[:, None] for number, part in enumerate(parts)}


def prepare(folder: Path, rows: int, numbers: int, dtype: str) -> None:
    """Write the store, and the same numbers as a plain array."""
    plain = np.lib.format.open_memmap(folder / "rows.npy", "w+", dtype, (rows, numbers))
    with open_writer(folder / "store", "store", {"transform": {"chain": []}}, rows) as writer:
        for start in range(0, rows, PART):
            stop = min(start + PART, rows)
            plain[start:stop] = part = part_of(start, stop, numbers, dtype)
            writer.write(start, stop, blocks_of(part))
        writer.finish()
    plain.flush()


def asked(queries: int, numbers: int) -> torch.Tensor:
    """Queries that are like some rows."""
    return torch.from_numpy(part_of(10**9, 10**9 + queries, numbers, "float32"))


def as_queries(vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Queries as blocks."""
    return {str(number): part[:, None] for number, part in enumerate(vectors.chunk(BLOCKS, 1))}


def plain_search(path: Path, queries: np.ndarray) -> list[np.ndarray]:
    """The best rows by a product with a memory-mapped array, a part at a time."""
    rows, best = np.load(path, mmap_mode="r"), []
    for _ in range(2):
        best.append([np.empty((0, len(queries)), np.float32), np.empty((0, len(queries)), np.int64)])
    for start in range(0, len(rows), PART):
        scores = rows[start : start + PART].astype(np.float32, copy=False) @ queries.T
        numbers = np.broadcast_to(np.arange(start, start + len(scores))[:, None], scores.shape)
        for sign, own in zip((1, -1), best, strict=True):
            both = [np.concatenate(pair) for pair in ((own[0], scores), (own[1], numbers))]
            order = np.argpartition(-sign * both[0], TOP, axis=0)[:TOP]
            own[:] = [np.take_along_axis(values, order, 0) for values in both]
    return [own[1] for own in best]


def seconds(what: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def compared(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    """Print the median of ratios of two calls that take turns."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    a, b = (sorted(times)[rounds // 2] for times in zip(*pairs, strict=True))
    print(f"{name}: {a:.3f} s against {b:.3f} s, ratio {ratios[rounds // 2]:.2f} "
          f"(from {ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip


def compare_writing(folder: Path, numbers: int, dtype: str, rounds: int) -> None:
    """A segment against `dd`; the ratio of speeds is the inverse of that of times."""
    rows = part_of(0, PART, numbers, dtype)
    blocks, source = blocks_of(rows), folder / "source"
    rows.tofile(source)
    turns = iter(range(10**6))

    def ours() -> None:
        with open_writer(folder / f"w{next(turns)}", "store", {}, PART) as writer:
            writer.write(0, PART, blocks)

    def theirs() -> None:
        command = ["dd", f"if={source}", f"of={folder / f'd{next(turns)}'}", "bs=1M", "conv=fsync"]
        subprocess.run(command, check=True, capture_output=True)

    compared(f"write {rows.nbytes / 2**20:.0f} MiB, store against dd", ours, theirs, rounds)


def compare_search(folder: Path, numbers: int, queries: int, rounds: int) -> None:
    """The exact search against numpy."""
    store, vectors = open_store(folder / "store"), asked(queries, numbers)
    scorer = InnerProduct(chain(), chain())
    found = find(store, scorer, as_queries(vectors), TOP)
    plain = plain_search(folder / "rows.npy", vectors.numpy())
    same = [
        set(one[:, 0].tolist()) == set(best.rows[0].tolist()) for one, best in zip(plain, found, strict=True)
    ]
    compared(
        f"search {queries} queries, store against a memory-mapped array (same rows: {all(same)})",
        lambda: find(store, scorer, as_queries(vectors), TOP),
        lambda: plain_search(folder / "rows.npy", vectors.numpy()), rounds,
    )  # fmt: skip


def memory(what: str) -> int:
    """Bytes that the system says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(what))) << 10


def search_alone(
    folder: Path, factory: str, numbers: int, queries: int, limit: int, nprobe: int | None
) -> None:
    """Make an index, if there is one, and search, with nothing else in the process; print JSON."""
    import faiss  # noqa: F401  # its libraries are in memory before

    store, vectors = open_store(folder / "store"), asked(queries, numbers)
    unit = as_queries(torch.nn.functional.normalize(vectors))
    _warm(store, unit)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted
    before = memory("VmRSS")
    index = None if factory == "exact" else Faiss(factory, None if factory == "Flat" else nprobe)
    made = 0.0 if index is None else seconds(lambda: open_index(store, METHOD, index, memory=limit))
    building = memory("VmHWM") - before
    Path("/proc/self/clear_refs").write_text("5")
    before, mapped = memory("VmRSS"), memory("RssFile")
    held = None if index is None else open_index(store, METHOD, index)  # or its pages are given back
    took = seconds(lambda: find(store, METHOD, unit, TOP, index=index, memory=limit))
    if held is not None:
        held.nearest(vectors, TOP)
    searching, mapped = memory("VmHWM") - before, memory("RssFile") - mapped
    found = find(store, METHOD, unit, TOP, index=index, memory=limit)
    exact = find(store, METHOD, unit, TOP, memory=limit)

    def once_more() -> object:  # an index stays open, as an Attributor does
        return held.nearest(vectors, TOP) if held else find(store, METHOD, unit, TOP, memory=limit)

    again = sorted(seconds(once_more) for _ in range(3))
    size = 0 if held is None else sum(file.stat().st_size for file in held.path.iterdir())
    shares = [recall(one, other) for one, other in zip(found, exact, strict=True)]
    sizes = {"building": building, "searching": searching, "mapped": mapped, "size": size}
    rows = found[0].rows.tolist()
    print(
        json.dumps({"made": made, "took": took, "again": again[1], "recall": shares, "rows": rows, **sizes})
    )


def beside_peer(python: str, folder: Path, factory: str, got: dict[str, Any], threads: int) -> None:
    """The same index and queries in Bergson, in a process of its own: the proponents alone."""
    script = Path(__file__).with_name("store_peer.py")
    command = [python, str(script), str(folder), factory, str(threads)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    theirs = json.loads(done.stdout.splitlines()[-1])
    shared = [len({*a} & {*b}) / TOP for a, b in zip(got["rows"], theirs["rows"], strict=True)]
    ours, first = got["took"], theirs["opening"] + theirs["first"]
    print(
        f"  beside Bergson: made {got['made']:.1f} s against {theirs['made']:.1f}; opened and searched "
        f"{ours:.3f} s against {first:.3f} ({ours / first:.2f}); searched again {got['again']:.3f} s "
        f"against {theirs['again']:.3f} ({got['again'] / theirs['again']:.2f}); "
        f"{sum(shared) / len(shared):.3f} of its rows are ours", flush=True,
    )  # fmt: skip


def _warm(store: Store, queries: dict[str, torch.Tensor]) -> None:
    """Load what the first search would load."""
    rows = {
        name.removeprefix("gradients/"): torch.zeros(2, *store.shape(name)[1:])
        for name in store.names("gradients")
    }
    extremes([dot(queries)(rows)], 1)  # pyright: ignore


def main() -> None:
    """Prepare once, compare, and measure each index in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--numbers", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float32")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--index", nargs="*", default=["Flat", "IVF1024,SQfp16", "IVF1024,PQ64", "HNSW32"])
    parser.add_argument(
        "--nprobe", type=int, help="of an IVF, or `efSearch` of a graph; Bergson takes 10, 16"
    )
    parser.add_argument("--memory", type=int, default=256, help="MiB, see gradfn query --memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the store is written; a temporary one")
    parser.add_argument("--peer", help="the Python of an environment with Bergson, to compare with it")
    parser.add_argument("--only", nargs=2, metavar=("FOLDER", "INDEX"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.only:
        folder, factory = given.only
        search_alone(
            Path(folder), factory, given.numbers, given.queries[-1], given.memory << 20, given.nprobe
        )
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        place = Path(folder)
        prepare(place, given.rows, given.numbers, given.dtype)
        compare_writing(place, given.numbers, given.dtype, given.rounds)
        for queries in given.queries:
            compare_search(place, given.numbers, queries, given.rounds)
        for factory in ["exact", *given.index]:
            how = [f"--{name}={getattr(given, name)}" for name in ("numbers", "memory", "threads")]
            how += [f"--nprobe={given.nprobe}"] if given.nprobe else []
            how += ["--queries", str(given.queries[-1]), "--only", folder, factory]
            done = subprocess.run(
                [sys.executable, __file__, *how], check=True, capture_output=True, text=True
            )
            got = json.loads(done.stdout.splitlines()[-1])
            mib = {name: f"{got[name] / 2**20:,.0f} MiB" for name in SIZES}
            high, low = got["recall"]
            print(
                f"{factory}: made in {got['made']:.1f} s with {mib['building']}, {mib['size']} on disk; "
                f"{given.queries[-1]} queries in {got['took']:.3f} s with {mib['searching']}, mapped "
                f"{mib['mapped']}; recall@{TOP} {high:.3f} highest, {low:.3f} lowest", flush=True,
            )  # fmt: skip
            if given.peer:
                np.save(place / "queries.npy", asked(given.queries[-1], given.numbers).numpy())
                beside_peer(given.peer, place, factory, got, given.threads)


if __name__ == "__main__":
    main()
