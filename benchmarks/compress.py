"""What projections cost: time and memory against dimension, FactGraSS against LoGra, stacked retraining.

    python benchmarks/compress.py [--jobs maps factors engine retrain] [--repeats 7]

* `maps`: a batch of 64 flattened gradients of n numbers to k, for every kind of map; milliseconds and bytes a
  row, the map's own bytes, and the slopes of the logarithm of time against those of n and of k. `copy` reads
  and writes the n numbers into memory that is there already: what an sjlt cannot beat.
* `factors`: one linear layer, from its input and output gradient to the compressed gradient of every example
  (8 of 256 tokens): LoGra (gaussian:AxA) against FactGraSS (mask:2Ax2A > sjlt:AA), k = AA. The layer's own
  forward and the gradient of its input, which both need anyhow, are beside them.
* `engine`: the same two through the whole engine: GPT-2-shaped blocks of width 768 and 2,048, all linear
  layers, against the forward and activations' backward alone (p = 1).
* `retrain`: the digits MLP (64-128-64-10), 220 models on halves of 1,200 rows, SGD with momentum, at batches
  of 10, 16 and 50: stacked against one after the other with torch.optim, and the largest difference of a
  parameter between models trained together and alone.

The sides alternate within a repeat, figures are medians; a ratio is the median of ratios within repeats.
"""

import argparse
import ctypes
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from math import log
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gradfn as gf
from gradfn.evaluate.subsets import random_subsets
from gradfn.linalg.kron import apply_side
from gradfn.linalg.maps import random_map
from gradfn.model.layers import Linear
from gradfn.train import Training, train
from gradfn.transforms import compress, lower, project
from gradfn.types import BlockSpec

ROWS = 64
KINDS = ("gaussian", "rademacher", "mask", "sjlt", "fjlt")
Sides = Mapping[str, Callable[[], Any]]


def alternate(sides: Sides, repeats: int) -> dict[str, list[float]]:
    """Seconds of every side in every repeat, after a first round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if repeat:
                found[name].append(time.perf_counter() - start)
    return found


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def peak_bytes(run: Callable[[], Any]) -> int:
    """By how much a run raises the memory of the process."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 16)  # larger blocks go back to the system when they are freed
    run()
    libc.malloc_trim(0)
    reset.write_text("5")

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) << 10

    before = read("VmRSS")
    run()
    return max(0, read("VmHWM") - before)


def map_bytes(made: Any) -> int:
    """Bytes of the tensors that a map holds."""
    if isinstance(made, Tensor):
        return made.numel() * made.element_size()
    parts = vars(made).values() if hasattr(made, "__dict__") else made if isinstance(made, tuple) else ()
    return sum(map_bytes(part) for part in parts)


def slope(xs: list[int], ys: list[float]) -> float:
    """The slope of a line through logarithms."""
    logs = [(log(x), log(y)) for x, y in zip(xs, ys, strict=True)]
    mean = [statistics.mean(values) for values in zip(*logs, strict=True)]
    below = sum((x - mean[0]) ** 2 for x, _ in logs)
    return sum((x - mean[0]) * (y - mean[1]) for x, y in logs) / below


def job_maps(repeats: int) -> None:
    print("\n| map | n | k | ms a row | of a copy | map's bytes |\n|---|---|---|---|---|---|")
    sizes, widths = (1 << 14, 1 << 16, 1 << 18, 1 << 20), (512, 2048, 8192)
    plan = [(n, 2048) for n in sizes] + [(1 << 18, k) for k in widths if k != 2048]
    seen: dict[str, dict[tuple[int, int], float]] = {kind: {} for kind in KINDS}
    for n, k in plan:
        v, room = torch.randn(ROWS, n), torch.empty(ROWS, n)
        sides: dict[str, Callable[[], Any]] = {"copy": lambda room=room, v=v: room.copy_(v)}
        maps = {}
        for kind in KINDS:
            if kind in ("gaussian", "rademacher") and n * k > 1 << 30:
                continue  # 4 GiB of matrix
            maps[kind] = random_map(kind, 0, "block", "flat", (k, n), dtype=torch.float32)
            sides[kind] = lambda made=maps[kind], v=v: apply_side(made, v)
        found = alternate(sides, repeats)
        for kind, made in maps.items():
            each = 1e3 * statistics.median(found[kind]) / ROWS
            seen[kind][n, k] = each
            cells = (
                kind, f"{n:,}", f"{k:,}", f"{each:.3f}", f"{ratio(found[kind], found['copy']):.2f}",
                f"{map_bytes(made):,}",
            )  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)
    paper = {"gaussian": "n k", "rademacher": "n k", "mask": "k", "sjlt": "n", "fjlt": "n log n"}
    print("\n| map | on paper | slope in n | slope in k | bytes a row |")
    print("|---|---|---|---|---|")
    v = torch.randn(ROWS, 1 << 16)
    for kind, times in seen.items():
        by_n = sorted((n, t) for (n, k), t in times.items() if k == 2048)
        by_k = sorted((k, t) for (n, k), t in times.items() if n == 1 << 18)
        slopes = [slope([x for x, _ in some], [t for _, t in some]) for some in (by_n, by_k)]
        made = random_map(kind, 0, "block", "flat", (2048, 1 << 16), dtype=torch.float32)  # pyright: ignore
        peak = peak_bytes(lambda made=made: apply_side(made, v)) // ROWS
        print(f"| {kind} | {paper[kind]} | {slopes[0]:.2f} | {slopes[1]:.2f} | {peak:,} |")


def pullback(width: int, transform: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """From a layer's input and output gradient to its transformed gradients, as the engine does it."""
    plan = lower(transform, [BlockSpec("layer", (width, width))]).plans["layer"]
    layer = Linear(width, width, False)
    return lambda x, g: plan.within(layer.contract(layer.save_input(x, plan.kron.right), g, plan.kron, False))


def job_factors(repeats: int) -> None:
    print(
        "\n| width | k | LoGra, ms | FactGraSS, ms | FactGraSS / LoGra | layer's forward and backward, ms |"
    )
    print("|---|---|---|---|---|---|")
    for width in (768, 1024, 2048, 4096):
        x, g, weight = torch.randn(8, 256, width), torch.randn(8, 256, width), torch.randn(width, width)
        for side in (16, 32, 64):
            logra = pullback(width, project((side, side), "gaussian"))
            k = side * side
            fact = pullback(width, gf.chain(project((2 * side, 2 * side), "mask"), compress(k)))
            sides: Sides = {
                "logra": lambda f=logra, x=x, g=g: f(x, g),
                "fact": lambda f=fact, x=x, g=g: f(x, g),
                "layer": lambda x=x, g=g, weight=weight: (x @ weight.T, g @ weight),
            }
            found = alternate(sides, repeats)
            told = [1e3 * statistics.median(found[name]) for name in ("logra", "fact", "layer")]
            print(f"| {width:,} | {k:,} | {told[0]:.1f} | {told[1]:.1f} | "
                  f"{ratio(found['fact'], found['logra']):.2f} | {told[2]:.0f} |", flush=True)  # fmt: skip


class Net(nn.Module):
    """Two feed-forward blocks of a transformer, for whole-engine figures."""

    def __init__(self, width: int):
        super().__init__()
        blocks = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                                nn.Linear(4 * width, width)) for _ in range(2)]  # fmt: skip
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Squares:
    """A loss with a batched form."""

    def __init__(self, model: nn.Module):
        self.model = model

    def batched(self, batch: Any) -> Tensor:
        return self.model(batch["x"]).square().mean((1, 2))

    def __call__(self, params: Any, example: Any) -> Tensor:
        return functional_call(self.model, params, (example["x"][None],)).square().mean()


def job_engine(repeats: int) -> None:
    print("\n| width | k | LoGra / floor | FactGraSS / floor | FactGraSS / LoGra | floor, s |")
    print("|---|---|---|---|---|---|")
    for width in (768, 2048):
        model = Net(width)
        batch = {"x": torch.randn(4, 256, width)}
        for side in (32, 64):
            chains = {
                "floor": project((1, 1), "mask"),
                "logra": project((side, side), "gaussian"),
                "fact": gf.chain(project((2 * side, 2 * side), "mask"), compress(side * side)),
            }
            engines = {name: gf.probe_engine(model, Squares(model), made) for name, made in chains.items()}
            sides: Sides = {name: (lambda e=engine, b=batch: e(b)) for name, engine in engines.items()}
            found = alternate(sides, repeats)
            both = [ratio(found[name], found["floor"]) for name in ("logra", "fact")]
            print(f"| {width:,} | {side * side:,} | {both[0]:.3f} | {both[1]:.3f} | "
                  f"{ratio(found['fact'], found['logra']):.3f} | {statistics.median(found['floor']):.2f} |",
                  flush=True)  # fmt: skip


def digits() -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:1200] / 16, dtype=torch.float32), torch.tensor(y[:1200])
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], x, y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def one_by_one(count: int, subsets: Tensor, training: Training, x: Tensor, y: Tensor) -> None:
    """The usual way: a module, an optimizer and a loop for every model."""
    for number in range(count):
        torch.manual_seed(number)
        model, rows = mlp(), subsets[number].nonzero()[:, 0]
        optimizer = torch.optim.SGD(model.parameters(), training.learning_rate, training.momentum)
        for _ in range(training.epochs):
            for part in rows[torch.randperm(len(rows))].split(training.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()


def job_retrain(repeats: int) -> None:
    data, x, y = digits()
    subsets, seeds, net = random_subsets(1200, 220, seed=0), list(range(220)), mlp()

    def loss(params: Any, example: Any) -> Tensor:
        logits = functional_call(net, params, (example["x"][None],))
        return F.cross_entropy(logits, example["labels"][None])

    print("\n| batch | epochs | stacked, s | one by one, s | times | stacked and alone differ by |")
    print("|---|---|---|---|---|---|")
    for batch, epochs in ((10, 2), (16, 3), (50, 8)):
        training = Training(epochs, batch, 0.05, "sgd", momentum=0.9)
        sides: Sides = {
            "stacked": lambda t=training: train(mlp, loss, data, subsets, seeds, t),
            "loop": lambda t=training: one_by_one(220, subsets, t, x, y),
        }
        found = alternate(sides, repeats)
        told = [statistics.median(found[name]) for name in ("stacked", "loop")]
        together = train(mlp, loss, data, subsets[:4], seeds[:4], training).params
        alone = [train(mlp, loss, data, subsets[i : i + 1], [i], training).params for i in range(4)]
        apart = max(float((together[n][i] - alone[i][n][0]).abs().max()) for n in together for i in range(4))
        times = ratio(found["loop"], found["stacked"])
        print(
            f"| {batch} | {epochs} | {told[0]:.1f} | {told[1]:.1f} | {times:.1f} | {apart:.1e} |", flush=True
        )


JOBS: dict[str, Callable[[int], None]] = {
    "maps": job_maps, "factors": job_factors, "engine": job_engine, "retrain": job_retrain,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    for name in asked.jobs:
        JOBS[name](asked.repeats if name != "retrain" else min(asked.repeats, 3))


if __name__ == "__main__":
    main()
