"""How well scores foretell what masking rows does to one training: LDS at removals of 1, 5 and 20 %.

    python benchmarks/masked.py --data DATA --out OUT [--cases digits-smooth ...]

DATA and OUT are those of `lds.py`, and so are the methods. For each case one model is trained, and methods
see it, or its checkpoints at the ends of epochs. The ground truth trains it again from the same weights, on
the same batches in the same order, with random rows masked: their losses have weight 0. That is what MAGIC
differentiates. It is deterministic, so a perfect score would reach 1. The last LDS is of models whose rows
came in other orders, three a subset, at 5 %: there the ceiling is below 1.

* digits-smooth, digits-rough: 400 digits, MLP 64-24-10 with tanh, float64, 4 epochs of batches of 40, SGD
  with momentum .9 at .05 and at .5; 20 queries.
* digits-logistic: 400 digits, logistic regression, float64, 5 epochs of batches of 40, SGD at .1: far from
  converged; 20 queries.
* verses-gpt: 300 verses of up to 48 tokens, the GPT-NeoX of `lds.py`, 4 epochs of batches of 25, AdamW at
  1e-3 with eps 1e-6 and a cosine schedule; 16 queries.

`trainings` is the processor time of a method, in units of that of the training. In-run values are of kind
"influence". SOURCE has 3 segments of the checkpoints.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lds import Case, Entry, Setting, Stack, entries, gpt, mlp, score, verses
from lds import digits as all_digits
from torch import Tensor, nn

import gradfn as gf
from gradfn.evaluate import Retraining, random_subsets, retrain
from gradfn.evaluate.comparison import ceiling_of, compare
from gradfn.methods.dynamics import Dynamics
from gradfn.methods.source import Checkpoint, source
from gradfn.model import blocks_of, find_sites, params_of
from gradfn.scores import Scores
from gradfn.subject import Subject
from gradfn.train import InRunTotals, State, Training, metagradient
from gradfn.train.course import Course, Taken, Valuing

FRACTIONS, OTHERS = (0.01, 0.05, 0.2), 3
SEGMENTS = 3


def tanh_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()


def digits(data: Path) -> list[dict[str, Tensor]]:
    rows = all_digits(data)[:420]
    return [{"x": row["x"].double(), "labels": row["labels"]} for row in rows]


def some_verses(data: Path) -> Any:
    return verses(data).select(range(316))


def sgd(epochs: int, rate: float, momentum: float = 0.9) -> Training:
    return Training(epochs, 40, rate, "sgd", momentum=momentum)


CASES = {
    "digits-smooth": Case(tanh_mlp, digits, 20, sgd(4, 0.05), 40, 1),
    "digits-rough": Case(tanh_mlp, digits, 20, sgd(4, 0.5), 40, 1),
    "digits-logistic": Case(lambda: mlp(64, 10).double(), digits, 20, sgd(5, 0.1, 0.0), 40, 1),
    "verses-gpt": Case(gpt, some_verses, 16, Training(4, 25, 1e-3, "adamw", eps=1e-6, schedule="cosine"),
                       30, 1, language=True),
}  # fmt: skip


class Run:
    """A training and its checkpoints."""

    def __init__(self, case: Case, data: Any):
        count = len(data) - case.queries
        some = data.select if case.language else lambda rows: data[rows.start : rows.stop]
        self.case, self.rows, self.queries = case, some(range(count)), some(range(count, len(data)))
        torch.manual_seed(0)
        self.model = case.make()
        self.loss, _ = case.losses(self.model)
        self.start = {name: value.detach().clone() for name, value in params_of(self.model).items()}
        self.course = Course(self.loss, self.rows, case.training)
        self.train()  # what is found out once
        begin = time.process_time()
        self.states, self.rates = self.train()
        self.seconds = time.process_time() - begin

    def train(self) -> tuple[list[State], list[float]]:
        """The states at the ends of epochs, and the sums of the learning rates of each."""
        states, rates, since = list[State](), list[float](), 0.0
        for taken in self.course.steps(self.course.start(self.start)):
            since += taken.learning_rate
            if int(taken.state.taken) % self.course.per_epoch == 0:
                kept = taken.state
                states.append(kept._replace(params=dict(kept.params),
                                            moments=tuple(dict(part) for part in kept.moments)))  # fmt: skip
                rates.append(since)
                since = 0.0
        return states, rates

    def setting(self) -> Setting:
        """What the methods of `lds.py` are given."""
        params = {name: torch.stack([state.params[name] for state in self.states]) for name in self.start}
        training, moments = self.case.training, None
        if training.optimizer != "sgd":
            moments = {name: torch.stack([second_moments(state, training)[name] for state in self.states])
                       for name in params}  # fmt: skip
        stacks = {
            "whole": Stack({name: value[-1:] for name, value in params.items()}, [1.0]),
            "path": Stack(params, self.rates, moments),
        }
        batch = 4096 if self.case.language else 256
        return Setting(self.case, self.rows, self.queries, self.model, stacks, batch)

    def at(self, state: State) -> Subject:
        """The model of a checkpoint, in a copy of its own."""
        model = deepcopy(self.model)
        model.load_state_dict(state.params, strict=False)
        return Subject(model, self.case.losses(model)[0])


def second_moments(state: State, training: Training) -> dict[str, Tensor]:
    """Adam's, bias-corrected."""
    share = 1 - training.betas[1] ** int(state.taken)
    return {name: value / share for name, value in state.moments[1].items()}


def in_run(run: Run) -> Tensor:
    ids = [str(row) for row in range(len(run.rows))], [str(query) for query in range(len(run.queries))]
    course = replace(run.course, valuing=Valuing(run.queries, run.loss, "influence"))
    fold = InRunTotals(*ids)
    totals = fold.init()
    taken: Taken
    for taken in course.steps(course.start(run.start)):
        assert taken.values is not None
        totals = fold.update(totals, torch.from_numpy(taken.rows), torch.from_numpy(taken.values))
    return fold.finalize(totals).matrix


def by_source(run: Run) -> Tensor:
    training = run.case.training
    adaptive = training.optimizer != "sgd"

    def scale_of(state: State) -> Callable[[Subject], Any] | None:
        if not adaptive:
            return None
        moments = {name: value[None] for name, value in second_moments(state, training).items()}

        def scale(subject: Subject) -> Any:
            blocks = blocks_of(find_sites(subject.model, subject.view), moments)
            return gf.adam({name: v[0] for name, v in blocks.items()}, eps=training.eps)

        return scale

    points = [
        Checkpoint(run.at(state), rate, scale_of(state))
        for state, rate in zip(run.states, run.rates, strict=True)
    ]
    constant = training.schedule == "constant" and not training.warmup and not adaptive
    dynamics = Dynamics(training.optimizer, training.momentum, weight_decay=training.weight_decay,
                        learning_rate=training.learning_rate if constant else None)  # fmt: skip
    labels = "model" if run.case.language else "data"
    method = source(points, run.rows, segments=SEGMENTS, dynamics=dynamics, labels=labels)
    end = run.at(run.states[-1])
    return gf.score(end.model, run.rows, run.queries, method=method, loss=end.loss).matrix


def magic(run: Run) -> Tensor:
    return metagradient(run.course, run.start, run.queries).values.float()


def scored(run: Run) -> Iterator[tuple[str, tuple[str, ...], Tensor, float]]:
    """Every method: its name, dampings, scores `[dampings, rows, queries]`, and its cost in trainings."""
    setting, ways = run.setting(), {"in-run": in_run, "SOURCE": by_source, "MAGIC": magic}
    todo: list[tuple[str, Entry | None]] = [(entry.name, entry) for entry in entries(setting)]
    score(setting, next(iter(entries(setting))))  # what is found out once
    for name, entry in [*todo, *((name, None) for name in ways)]:
        begin = time.process_time()
        if entry is None:
            values, dampings = ways[name](run)[None], ("none",)
        else:
            values, dampings = score(setting, entry)[0], tuple(str(d) for d in entry.dampings)
        yield name, dampings, values.float(), (time.process_time() - begin) / run.seconds


def run_case(name: str, folder: Path, out: Path) -> None:
    run = Run(CASES[name], CASES[name].read(folder))
    case, ids = run.case, ([str(row) for row in range(len(run.rows))],
                           [str(query) for query in range(len(run.queries))])  # fmt: skip
    found = [*scored(run)]
    runs = [Scores(values, *ids, dampings, name=method) for method, dampings, values, _ in found]
    cells: dict[str, list[str]] = {method: [] for method, *_ in found}
    asked = [(f"{fraction:.0%}", fraction, 0, 1) for fraction in FRACTIONS] + [("other", 0.05, 1, OTHERS)]
    heads = list[str]()
    for head, fraction, seed, seeds in asked:
        subsets = random_subsets(len(run.rows), case.subsets, 1 - fraction)
        retraining = Retraining(run.start, run.loss, case.training, subsets, seeds=seeds, seed=seed,
                                removal="mask")  # fmt: skip
        truth = retrain(out / f"masked-{name}-{head.rstrip('%')}", retraining, run.rows, run.queries)
        told = compare(runs, *truth.targets())
        for one in told.runs:
            cells[one.name].append(f"{one.lds.value:.3f} [{one.lds.low:.2f}, {one.lds.high:.2f}]")
        ceiling = ceiling_of(truth, told.queries, 0) if seeds > 1 else None
        heads.append(head if ceiling is None else f"5%, other orders (ceiling {ceiling.value:.3f})")
    print(f"\n### {name}: {case.subsets} subsets, {len(told.queries)} of {len(run.queries)} queries, "
          f"a training takes {run.seconds:.2f} s\n")  # fmt: skip
    print(f"| method | {' | '.join(heads)} | trainings |\n|---|{'---|' * len(heads)}---:|")
    for method, _, _, cost in found:
        print(f"| {method} | {' | '.join(cells[method])} | {cost:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="where the data lie")
    parser.add_argument("--out", type=Path, required=True, help="where ground truths go")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.cases:
        run_case(name, given.data, given.out)


if __name__ == "__main__":
    main()
