"""What joining the parts of many workers costs, and what 1e9 rows of a 70B model take, as Markdown tables.

    python benchmarks/scale.py --workers 10 100 1000 --segments 4

Workers are played one after the other: each writes its segments (of `--rows` rows of 64 numbers) as a shard
does, and then all are joined, and searched. Times are seconds of this machine. The arithmetic below it uses
the sizes that gradfn writes; throughputs are given and not measured.
"""

import argparse
import resource
import tempfile
import time

import numpy as np
import torch

from gradfn.runs.shards import Shard, join_shards, shard_rows, shard_run
from gradfn.scores import extremes
from gradfn.store import open_store, open_writer

NUMBERS = 64


def play(workers: int, segments: int, rows: int) -> dict[str, float]:
    """Write the parts of all workers, join them, and search what they make."""
    total = workers * segments * rows
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        for number in range(1, workers + 1):
            shard = Shard(number, workers)
            part = shard_rows(np.ones(total), shard)
            with open_writer(
                shard_run(folder, shard), "store", {}, total, part=(part.start, part.stop)
            ) as writer:
                for first in range(part.start, part.stop, rows):
                    values = np.random.default_rng(first).standard_normal((rows, NUMBERS)).astype(np.float32)
                    writer.write(first, first + rows, {"gradients/all": values})
                writer.finish()
        written = time.perf_counter()
        path = join_shards(folder, "store")
        joined = time.perf_counter()
        query = torch.ones(NUMBERS, 1)
        with open_store(path) as store:
            chunks = (torch.from_numpy(part["gradients/all"]) @ query
                      for _, _, part in store.chunks(["gradients/all"], 65_536))  # fmt: skip
            extremes(chunks, 10)
        searched = time.perf_counter()
        return {
            "workers": workers, "files": workers * segments, "rows": total, "write": written - begin,
            "join": joined - written, "search": searched - joined,
            "index, KiB": path.stat().st_size / 1024,
        }  # fmt: skip


def table(lines: list[dict[str, float]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(lines[0]) + " |")
    print("|" + "---:|" * len(lines[0]))
    for line in lines:
        print("| " + " | ".join(f"{v:,.0f}" if v == int(v) else f"{v:,.3g}" for v in line.values()) + " |")


def arithmetic(rows: float, tokens: float, parameters: float, workers: int, rate: float) -> None:
    """Bytes and hours of a job. `rate` is tokens a second of a worker, forward and backward."""
    days = rows * tokens / (rate * workers) / 86_400
    operations = 6 * parameters * rows * tokens
    print(f"\n{rows:.0e} rows of {tokens:,.0f} tokens, {parameters:.0e} parameters, {workers:,} workers:\n")
    print(f"- {operations:.1e} operations; {days:,.1f} days at {rate:,.0f} tokens a second each")
    print(f"- scores of 100 queries: {rows * 100 * 4 / 1e12:,.1f} TB")
    for name, numbers in (
        ("16 x 16 a layer, 560 layers", 256 * 560),
        ("8,192 in all", 8192),
        ("512 in all", 512),
    ):
        size, seconds = rows * numbers * 2, days * 86_400
        each, hours = size / workers / seconds / 1e6, size / 1e9 / 3600
        print(f"- gradients in 16 bit, {name}: {size / 1e12:,.1f} TB, {each:,.2f} MB a second a worker, "
              f"{hours:,.1f} hours to read at 1 GB a second")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--segments", type=int, default=4, help="of each worker")
    parser.add_argument("--rows", type=int, default=64, help="of a segment")
    options = parser.parse_args()
    table([play(workers, options.segments, options.rows) for workers in options.workers])
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")
    arithmetic(1e9, 512, 70e9, 1000, 400)


if __name__ == "__main__":
    main()
