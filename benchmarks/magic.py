"""How well metagradients predict masked trainings, a smooth one and a rough one, as a Markdown table.

    python benchmarks/magic.py --subsets 40

The first 400 digits of scikit-learn, an MLP 64-24-10 with tanh in float64, batches of 40, 4 epochs of SGD
with momentum .9, and the next 20 digits as queries. LDS is the mean over queries, of losses of trainings in
which random rows have weight 0, all else being equal (masked), or have no place (dropped). S, `|f''|` and
bend are those of `metasmoothness` at h = .1.
"""

import argparse
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.func import functional_call

from gradfn.evaluate import Retraining, lds, random_subsets, retrain
from gradfn.model.params import params_of
from gradfn.train import Training, metagradient, metasmoothness
from gradfn.train.course import Course

FRACTIONS = (0.01, 0.05, 0.2)


def digits(count: int) -> list[dict[str, torch.Tensor]]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return [
        {"x": torch.tensor(a / 16.0), "y": torch.tensor(int(b))} for a, b in zip(x[:count], y, strict=False)
    ]


def line(rate: float, subsets: int) -> str:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()

    def loss(params, example):
        return nn.functional.cross_entropy(functional_call(net, params, example["x"]), example["y"])

    rows = digits(420)
    data, queries, start = rows[:400], rows[400:], params_of(net)
    course = Course(loss, data, Training(4, 40, rate, "sgd", momentum=0.9))
    values = metagradient(course, start, queries).values.float()
    cells = []
    for removal in ("mask", "drop"):
        for fraction in FRACTIONS:
            kept = random_subsets(len(data), subsets, fraction=1 - fraction)
            asked = Retraining(start, loss, course.training, kept, removal=removal)
            with TemporaryDirectory() as folder:
                truth = retrain(folder, asked, data, queries)
            cells.append(f"{lds(values, *truth.targets()).mean():.3f}")
    found = metasmoothness(course, start, queries, h=0.1)
    cells += [f"{found.agreement:.3f}", f"{found.curvature:.2f}", f"{found.bend:.2f}"]
    return f"| {rate} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=40)
    chosen = parser.parse_args()
    removed = [f"{fraction:.0%} {how}" for how in ("masked", "dropped") for fraction in FRACTIONS]
    print(f"| learning rate | {' | '.join(removed)} | S | \\|f''\\| | bend |")
    print("|---|" + "---:|" * (len(removed) + 3))
    for rate in (0.05, 0.5):
        print(line(rate, chosen.subsets), flush=True)


if __name__ == "__main__":
    main()
