"""The search of Bergson over the rows of `benchmarks/store.py`, run with the Python that has Bergson.

    PYTHON benchmarks/store_peer.py FOLDER INDEX THREADS

The queries are `FOLDER/queries.npy`. `FOLDER/peer` is an index of Bergson with the rows of `FOLDER/rows.npy`,
made here if it is missing. Printed as JSON: seconds to make the index of FAISS, to open what is there, for
the first search and for the next ones, and the rows that were found.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TOP, BLOCKS = 10, 4


def prepare(folder: Path) -> Path:
    """Write an index as Bergson does, once."""
    from bergson.gradients import GradientProcessor  # pyright: ignore[reportMissingImports]

    index, rows = folder / "peer", np.load(folder / "rows.npy", mmap_mode="r")
    if not (index / "info.json").exists():
        index.mkdir()
        with (index / "gradients.bin").open("wb") as file:
            for start in range(0, len(rows), 20_000):
                file.write(rows[start : start + 20_000].tobytes())
        GradientProcessor().save(index)
        sizes = {str(number): rows.shape[1] // BLOCKS for number in range(BLOCKS)}
        info = {"num_grads": len(rows), "grad_sizes": sizes, "base_dtype": str(rows.dtype)}
        (index / "info.json").write_text(json.dumps(info))
    return index


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it returns; what it prints is not shown."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        value = what()
    return time.perf_counter() - start, value


def main() -> None:
    """Search the highest rows by cosine."""
    from bergson.config.config import FaissConfig  # pyright: ignore[reportMissingImports]
    from bergson.query.attributor import Attributor  # pyright: ignore[reportMissingImports]

    folder, factory = Path(sys.argv[1]), sys.argv[2]
    threads = int(sys.argv[3])
    torch.set_num_threads(threads)
    config = None
    if factory != "exact":
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(threads)
        if not hasattr(faiss, "GpuIndex"):  # it asks for a class that only the build for GPUs has
            faiss.GpuIndex = type("GpuIndex", (), {})
        config = FaissConfig(index_factory=factory, mmap_index=True)
    index, vectors = prepare(folder), torch.from_numpy(np.load(folder / "queries.npy"))
    queries = {str(number): part for number, part in enumerate(vectors.chunk(BLOCKS, 1))}

    def opened() -> Attributor:
        return Attributor(index, unit_norm=True, faiss_cfg=config)

    made = timed(opened)[0] if config is not None else 0.0
    opening, attributor = timed(opened)
    first, found = timed(lambda: attributor.search(dict(queries), TOP))
    again = sorted(timed(lambda: attributor.search(dict(queries), TOP))[0] for _ in range(3))[1]
    rows = next(value for value in found if not value.is_floating_point()).tolist()
    print(json.dumps({"made": made, "opening": opening, "first": first, "again": again, "rows": rows}))


if __name__ == "__main__":
    main()
