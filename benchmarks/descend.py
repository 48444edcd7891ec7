"""What descent on data finds: rows with flipped labels, and the sources of a small language model's rows.

    python benchmarks/descend.py --data DATA

Digits: the first 400 of scikit-learn, a fifth of the labels flipped, an MLP 64-24-10 with tanh in float64,
4 epochs of batches of 40, SGD .05 with momentum .9; 200 digits validate, and 797 are held out.

Sources: 360 rows of 32 tokens, a third each of English verses, Spanish ones, and English ones with their
words shuffled, for a GPT-NeoX (2 layers x width 64), 4 epochs of batches of 24, AdamW 3e-3; 64 English
verses validate, and 512 are held out. Each source has one weight. DATA is what `selection.py` says.

Both are Markdown tables with a line a step; the sum of the weights is held.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from magic import digits
from selection import HELD_OUT, TOKENS, VOCABULARY, Rows
from torch import Tensor, nn
from torch.func import functional_call

import gradfn as gf
from gradfn.data import make_documents
from gradfn.model.params import params_of
from gradfn.train import Training, descend
from gradfn.train.course import Course

SOURCES = ("English", "Spanish", "shuffled")


def flipped(steps: int, rate: float) -> None:
    torch.manual_seed(0)
    rows = digits(1397)
    data, validation, held_out = rows[:400], rows[400:600], rows[600:]
    wrong = torch.rand(400) < 0.2
    turns = torch.randint(1, 10, (400,))
    data = [
        {"x": row["x"], "y": (row["y"] + turn) % 10 if bad else row["y"]}
        for row, turn, bad in zip(data, turns, wrong, strict=True)
    ]
    net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    x, y = (torch.stack([row[key] for row in held_out]) for key in ("x", "y"))

    def loss(params: Any, example: Any) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, params, example["x"]), example["y"])

    course = Course(loss, data, Training(4, 40, 0.05, "sgd", momentum=0.9))
    print("| step | validation loss | held-out loss | accuracy | weight: flipped | clean |")
    print("|---:|---:|---:|---:|---:|---:|")
    for made in descend(course, params_of(net), validation, steps=steps, rate=rate):
        with torch.no_grad():
            z = functional_call(net, made.params, x)
        held = float(nn.functional.cross_entropy(z, y)), float((z.argmax(1) == y).double().mean())
        weights = float(made.weights[wrong].mean()), float(made.weights[~wrong].mean())
        print(f"| {made.step} | {made.loss:.3f} | {held[0]:.3f} | {held[1]:.1%} "
              f"| {weights[0]:.2f} | {weights[1]:.2f} |", flush=True)  # fmt: skip


def sources(data: Path | None, steps: int, rate: float) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    rows = Rows(data)
    each = 120
    chosen = torch.cat([(rows.kind == kind).nonzero()[:each, 0] for kind in range(3)])
    train, groups = make_documents(rows.train[chosen].tolist()), rows.kind[chosen]
    validation, held_out = (make_documents(part.tolist()) for part in (rows.validation[:64], rows.held_out))
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval()
    course = Course(gf.causal_lm_loss(model), train, Training(4, 24, 3e-3, eps=1e-6))
    start = {name: value.clone() for name, value in params_of(model).items()}
    print(f"\n| step | validation loss | held-out loss ({HELD_OUT} rows) | weight: "
          f"{' | '.join(SOURCES)} | s |\n|---:|---:|---:|" + "---:|" * 4)  # fmt: skip
    begin = time.process_time()
    for made in descend(course, start, validation, steps=steps, rate=rate, groups=groups):
        held = course.mean_loss(made.params, held_out)
        weights = [f"{float(made.weights[groups == kind][0]):.2f}" for kind in range(3)]
        print(f"| {made.step} | {made.loss:.3f} | {held:.3f} | {' | '.join(weights)} "
              f"| {time.process_time() - begin:.0f} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="the folder of the verses; the example's rows without it")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    flipped(given.steps, given.rate)
    sources(given.data, given.steps, given.rate)


if __name__ == "__main__":
    main()
