"""What searching many rows for many queries costs: seconds, and the memory at the peak.

    python benchmarks/search.py --rows 20000 --queries 2000

A store of random gradients of 8 blocks of 16 x 16 numbers, and the scores of its rows, are written to a
temporary directory. Then each of these runs in a process of its own:

- `query`: the stored rows against all queries, and the best rows of each, as `gradfn query` does;
- `finished`: the best rows of scores that are there already, as `gradfn score RUN` does a second time;
- `best`: the best rows of scores in memory.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from gradfn.runs.scores import score_chunks, stored_scores
from gradfn.scores import Scores, extremes
from gradfn.store import open_store, open_writer
from gradfn.transforms import dot

BLOCKS, SIDE, SEGMENT, TOP = 8, 16, 2000, 10


def prepare(run: Path, rows: int, queries: int) -> None:
    """Write the store and the scores."""
    generator = np.random.default_rng(0)
    with open_writer(run, "store", {}, rows) as writer:
        for start, stop in writer.missing([(at, min(at + SEGMENT, rows)) for at in range(0, rows, SEGMENT)]):
            shape = stop - start, SIDE, SIDE
            writer.write(start, stop, {
                f"gradients/{block}": generator.standard_normal(shape, np.float32) for block in range(BLOCKS)
            })  # fmt: skip
        writer.finish()
    values = torch.from_numpy(generator.standard_normal((1, rows, queries), np.float32))
    Scores(values, [str(row) for row in range(rows)], [str(query) for query in range(queries)]).save(run)


def measured(run: Path, what: str, rows: int, queries: int) -> None:
    """Do one of the things, and print seconds and MiB."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    asked = {str(block): torch.randn(queries, SIDE, SIDE, generator=generator) for block in range(BLOCKS)}
    scores = torch.randn(rows, queries, generator=generator) if what == "best" else torch.zeros(0)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if what == "query":
        found = extremes(stored_scores(open_store(run), dot(asked)), TOP)
    elif what == "finished":
        found = extremes(score_chunks(run), TOP)
    else:
        found = extremes([scores], TOP)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check = int(found[0].rows.sum() + found[1].rows.sum())
    print(f"{what}: {seconds:.2f} s, {(after - before) / 1024:,.0f} MiB more at the peak, check {check}")


def main() -> None:
    """Prepare once, and measure each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--only", nargs=2, metavar=("RUN", "WHAT"))
    given = parser.parse_args()
    if given.only:
        measured(Path(given.only[0]), given.only[1], given.rows, given.queries)
        return
    with tempfile.TemporaryDirectory() as run:
        prepare(Path(run), given.rows, given.queries)
        for what in ("query", "finished", "best"):
            size = ["--rows", str(given.rows), "--queries", str(given.queries)]
            subprocess.run([sys.executable, __file__, *size, "--only", run, what], check=True)


if __name__ == "__main__":
    main()
