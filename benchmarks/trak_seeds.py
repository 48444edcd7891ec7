"""What it gains TRAK that each checkpoint has a projection of its own.

    python benchmarks/trak_seeds.py --out OUT [--cases digits-logistic ...] [--seeds 10]

Ground truth and models are those of benchmarks/lds.py, of which OUT may hold the former: 5 models trained on
halves of their own, or one model at 5 points of its training. The damping is the default. Each seed of the
projections gives two scores of the same models: all have the projection of this seed, or each has another
one, made of this seed as `gf.methods` makes it. The table has the LDS over all queries, mean and standard
deviation over seeds, and the same of the difference.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from lds import CASES, CHECKPOINTS, Entry, Setting, Stack, ground_truth, score, setting_of

import gradfn as gf
from gradfn.evaluate import lds
from gradfn.runs.masks import projection_named
from gradfn.transforms import reseeded
from gradfn.transforms.projection import lenient

PROJECTIONS = ("rademacher:16x16", "rademacher:4x4")
"""The default, and one with fewer numbers, whose noise is larger."""


def of_five(stack: Stack) -> Stack:
    first = {name: value[:CHECKPOINTS] for name, value in stack.params.items()}
    return Stack(first, [1 / CHECKPOINTS] * CHECKPOINTS)


def measured(setting: Setting, stack: str, projection: str, seed: int, truth: tuple) -> tuple[float, float]:
    """The LDS with one projection for all, and with one for each."""
    first = reseeded(lenient(projection_named(projection)), seed)
    entry = Entry("trak", "trak", first, (gf.Damping(),), stack)
    entries = (replace(entry, own_seeds=False), entry)
    one, each = (float(lds(score(setting, entry)[0][0], *truth).mean()) for entry in entries)
    return one, each


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where ground truths go")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["digits-logistic", "digits-mlp-adam"])
    parser.add_argument("--seeds", type=int, default=10, help="of projections")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    print("| case | models | projection | one for all | one each | difference | seeds that gain |")
    print("|---|---|---|---:|---:|---:|---:|")
    for name in asked.cases:
        case = CASES[name]
        rows, queries, truth = ground_truth(name, case, case.read(asked.out), asked.out, "shared")
        setting = setting_of(case, rows, queries)
        setting = replace(setting, stacks={key: of_five(value) for key, value in setting.stacks.items()})
        for stack, projection in ((s, p) for s in ("halves", "path") for p in PROJECTIONS):
            drawn = range(asked.seeds)
            pairs = [measured(setting, stack, projection, seed, truth.targets()) for seed in drawn]
            one, each = zip(*pairs, strict=True)
            gains = [b - a for a, b in pairs]
            cells = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in (one, each, gains)]
            gained = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
            print("|", " | ".join([name, stack, projection, *cells, gained]), "|", flush=True)


if __name__ == "__main__":
    main()
