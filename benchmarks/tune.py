"""Is a method that was chosen by a few retrained models among the best? What `gradfn tune` relies on.

    python benchmarks/tune.py --data DATA --out OUT [--cases digits-logistic ...] [--halves 8 16] [--draws 20]

For a case of benchmarks/lds.py, methods that look at one model are scored once. Then, many times, a few of
the retrained halves are drawn, with two seeds each; a method and a damping are chosen by them, and the LDS of
the choice on all other halves, at all seeds, is compared with that of the method that is best there. `regret`
is the mean of how much lower the choice is, and `within .03` how often it is no more than this. OUT keeps the
ground truth of benchmarks/lds.py.
"""

import argparse
import time
from pathlib import Path

import torch
from lds import CASES, Entry, entries, ground_truth, score, setting_of

from gradfn.evaluate.lds import lds
from gradfn.evaluate.truth import Truth
from gradfn.evaluate.tuning import recommend
from gradfn.random import choice
from gradfn.scores import Scores

CLOSE = 0.03
NAMES = ("grad_dot", "grad_cosine", "kfac", "ekfac", "logra", "trackstar", "relatif", "datainf")
"""The candidates of `gradfn tune` that look at one model with whole blocks."""


def part_of(truth: Truth, halves: torch.Tensor, seeds: int) -> Truth:
    """Some of the halves, each with its first models."""
    first = truth.seeds.unique()[:seeds]
    return truth.of_models(torch.isin(truth.numbers, halves) & torch.isin(truth.seeds, first))


def best_lds(run: Scores, subsets: torch.Tensor, losses: torch.Tensor) -> dict[str, float]:
    """The LDS of a run at each of its dampings."""
    return {
        name: float(lds(values, subsets, losses).mean())
        for name, values in zip(run.dampings, run.values, strict=True)
    }


def run_case(name: str, data: Path, out: Path, halves: list[int], draws: int) -> None:
    """Print the table of a case."""
    torch.manual_seed(0)
    case = CASES[name]
    rows, queries, truth = ground_truth(name, case, case.read(data), out, "shared")
    setting = setting_of(case, rows, queries)
    asked = [one for one in entries(setting) if one.name in NAMES]
    trak = [one for one in entries(setting) if one.recipe == "trak"][:1]
    asked += [Entry("trak", "trak", one.projection, one.dampings) for one in trak]
    runs = []
    for entry in asked:
        start = time.perf_counter()
        values, _ = score(setting, entry)
        dampings = tuple(map(str, entry.dampings))
        ids = [str(row) for row in range(values.shape[1])], [str(query) for query in range(values.shape[2])]
        runs.append(Scores(values, *ids, dampings, name=entry.name))
        told = best_lds(runs[-1], *truth.targets())
        print(f"{entry.name}: LDS {max(told.values()):.3f}, {time.perf_counter() - start:.1f} s", flush=True)
    every = truth.numbers.unique()
    print(
        f"\n| {name}: halves | regret | within {CLOSE} | most often chosen | best |\n|---|---:|---:|---|---|"
    )
    for count in halves:
        regrets, names, bests = [], [], []
        for draw in range(draws):
            drawn = torch.from_numpy(choice(count, len(every), "tune", draw).astype("int64"))
            found = recommend(runs, part_of(truth, every[drawn], 2), seed=draw)
            subsets, losses = truth.of_models(~torch.isin(truth.numbers, every[drawn])).targets()
            told = {run.name: best_lds(run, subsets, losses) for run in runs}
            best = max(told, key=lambda one: max(told[one].values()))
            chosen = found.ranked[0]
            regrets.append(max(told[best].values()) - told[chosen.name][chosen.damping])
            names.append(chosen.name)
            bests.append(best)
        regret = torch.tensor(regrets)
        often, first = (max(set(of), key=of.count) for of in (names, bests))
        close = float((regret <= CLOSE).double().mean())
        print(f"| {count} | {float(regret.mean()):.3f} | {close:.0%} | {often} | {first} |", flush=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["digits-logistic", "digits-mlp"])
    parser.add_argument("--halves", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--draws", type=int, default=20)
    given = parser.parse_args()
    for name in given.cases:
        run_case(name, given.data, given.out, given.halves, given.draws)


if __name__ == "__main__":
    main()
