"""What the batches of default options cost, before and after they are bounded and cut by length.

    python benchmarks/batches.py --before FOLDER [--jobs conv mbconv chat-24 chats] [--repeats 5]

FOLDER holds an earlier revision of gradfn, as `git worktree add FOLDER 47ac91b` makes it. Each side runs in a
process of its own, one thread, random weights, and the two alternate. Jobs:

* `conv`: `gf.score` of 100 images of 3 x 224 x 224, 4 of them the queries, by a net of four convolutions;
* `mbconv`: the same of 40 images by a net like EfficientNet: ten inverted bottlenecks with squeeze and
  excitation, of 16 to 192 channels;
* `chat-24`: 24 rows whose lengths have a heavy tail, by GPT-NeoX (6 layers x width 128, vocabulary 4,096):
  `gf.score` against 4 queries, and `gf.build` with a projection to 16 x 16;
* `chats`: the same with 5,000 rows and 1 layer x width 32.

Memory is the peak resident memory beyond that before the call. Tokens are those that the model is given,
padding and the engine's own checks included. Times are processor seconds; a ratio is the median of the
repeats' ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from engine import peak_rss, reset_peak
from torch import Tensor, nn
from torch.func import functional_call

import gradfn as gf

JOBS = {"conv": 100, "mbconv": 40, "chat-24": 24, "chats": 5000}
"""Rows of each."""
HERE = Path(__file__).resolve()


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int):
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width // 4, 1), nn.SiLU(),
            nn.Conv2d(width // 4, width, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def convolved(given: int, width: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(given, width, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.SiLU()]


class Bottleneck(nn.Module):
    """An inverted bottleneck: widen, depthwise convolution, squeeze and excitation, narrow."""

    def __init__(self, given: int, width: int, stride: int):
        super().__init__()
        wide = 4 * given
        self.inner = nn.Sequential(
            *convolved(given, wide, 1), *convolved(wide, wide, 3, stride, wide), Excited(wide),
            *convolved(wide, width, 1)[:2],
        )  # fmt: skip
        self.short = given == width and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x if self.short else self.inner(x)


def image_net(job: str) -> nn.Module:
    if job == "conv":
        widths = ((3, 16), (16, 32), (32, 64), (64, 64))
        stages = [layer for given, width in widths for layer in convolved(given, width, 3, 2)]
    else:
        widths = [16, 24, 24, 40, 40, 80, 80, 112, 112, 192, 192]
        strides = (2, 1, 2, 1, 2, 1, 1, 1, 2, 1)
        pairs = zip(widths[:-1], widths[1:], strides, strict=True)
        stages = [*convolved(3, 16, 3, 2), *(Bottleneck(a, b, s) for a, b, s in pairs)]
    width = 64 if job == "conv" else 192
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def measured(call) -> dict[str, float]:
    """Processor seconds, and MiB at the peak beyond those before."""
    before, start = reset_peak(), time.process_time()
    call()
    return {"seconds": time.process_time() - start, "MiB": (peak_rss() - before) / 2**20}


def score_images(job: str) -> dict[str, dict[str, float]]:
    net, generator = image_net(job), torch.Generator().manual_seed(1)

    def loss(params, example):
        logits = functional_call(net, params, (example["x"][None],))
        return nn.functional.cross_entropy(logits, example["labels"][None])

    images = [
        {"x": torch.randn(3, 224, 224, generator=generator), "labels": torch.tensor(n % 10)}
        for n in range(JOBS[job])
    ]
    return {"score": measured(lambda: gf.score(net, images, images[:4], method=gf.grad_dot(), loss=loss))}


def chats(job: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    import transformers as hf

    layers, width = (6, 128) if job == "chat-24" else (1, 32)
    config = hf.GPTNeoXConfig(
        vocab_size=4096, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=1024,
    )  # fmt: skip
    lengths = np.random.default_rng(0).lognormal(4.0, 1.0, JOBS[job]).clip(8, 1024).astype(int)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 4096, (length,), generator=generator) for length in lengths.tolist()]
    return hf.GPTNeoXForCausalLM(config).eval(), [{"input_ids": i, "labels": i} for i in ids]


def read_chats(job: str) -> dict[str, dict[str, float]]:
    model, rows = chats(job)
    given = [0]
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: given.__setitem__(0, given[0] + inputs[0].numel())
    )
    found = {"real": {"tokens": sum(len(row["input_ids"]) for row in rows)}}
    with tempfile.TemporaryDirectory() as folder:
        calls = {
            "score": lambda: gf.score(model, rows, rows[:4], method=gf.grad_dot(gf.project(16))),
            "build": lambda: gf.build(folder, model, rows, gf.project(16)),
        }
        for name, call in calls.items():
            given[0] = 0
            found[name] = {**measured(call), "tokens": given[0]}
    return found


def run(folder: Path, job: str) -> dict[str, dict[str, float]]:
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE), "--run", job]
    return json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="an earlier revision of gradfn")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", choices=JOBS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        job = score_images if "conv" in asked.run else read_chats
        print(json.dumps(job(asked.run)))
        return
    if asked.before is None:
        parser.error("give --before, a folder with an earlier revision")
    sides = [asked.before.resolve(), HERE.parents[1]]
    for job in asked.jobs:
        pairs = []
        for repeat in range(asked.repeats):
            order = sides[:: -1 if repeat % 2 else 1]
            pairs.append({side: run(side, job) for side in order})
        for call, kinds in pairs[0][sides[0]].items():
            for kind in kinds:
                before, after = ([pair[side][call][kind] for pair in pairs] for side in sides)
                ratios = [b / a for a, b in zip(before, after, strict=True)]
                print(
                    f"{job} {call} {kind}: {median(before):,.2f} -> {median(after):,.2f}, ratio "
                    f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
