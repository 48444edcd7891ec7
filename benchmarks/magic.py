"""How well metagradients predict masked trainings, a smooth one and a rough one, as a Markdown table.

    python benchmarks/magic.py --subsets 40

The first 400 digits of scikit-learn, an MLP 64-24-10 with tanh in float64, batches of 40, 4 epochs of SGD
with momentum .9, and the next 20 digits as queries; or, with `--data clusters`, as many points of ten
Gaussian clusters that overlap. LDS is the mean over queries, of losses of trainings in which random rows have
weight 0, all else being equal (masked), or have no place (dropped). It is that of the exact derivatives
(hessian), and of those with the Gauss-Newton matrix. S, `|f''|` and bend are those of `metasmoothness` at
h = .1.
"""

import argparse
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.func import functional_call

from gradfn.evaluate import Retraining, lds, random_subsets, retrain
from gradfn.model.params import params_of
from gradfn.train import Replay, SplitLoss, Training, metagradient, metasmoothness
from gradfn.train.course import Course

FRACTIONS = (0.01, 0.05, 0.2)


def digits(count: int) -> list[dict[str, torch.Tensor]]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return [
        {"x": torch.tensor(a / 16.0), "y": torch.tensor(int(b))} for a, b in zip(x[:count], y, strict=False)
    ]


def clusters(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    means = 0.15 * torch.randn(10, 64, generator=generator).double()
    y = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 64, generator=generator).double() / 2**0.5
    return [{"x": means[own] + off, "y": own} for own, off in zip(y, noise, strict=True)]


DATA = {"digits": digits, "clusters": clusters}


def lines(rate: float, subsets: int, of: str) -> str:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()

    loss = SplitLoss(
        lambda params, example: functional_call(net, params, example["x"]),
        lambda z, example: nn.functional.cross_entropy(z, example["y"]),
    )
    rows = DATA[of](420)
    data, queries, start = rows[:400], rows[400:], params_of(net)
    course = Course(loss, data, Training(4, 40, rate, "sgd", momentum=0.9))
    values = {
        curvature: metagradient(course, start, queries, replay=Replay(curvature=curvature)).values.float()
        for curvature in ("hessian", "gauss_newton")
    }
    cells: dict[str, list[str]] = {curvature: [] for curvature in values}
    for removal in ("mask", "drop"):
        for fraction in FRACTIONS:
            kept = random_subsets(len(data), subsets, fraction=1 - fraction)
            asked = Retraining(start, loss, course.training, kept, removal=removal)
            with TemporaryDirectory() as folder:
                truth = retrain(folder, asked, data, queries)
            for curvature, own in values.items():
                cells[curvature].append(f"{lds(own, *truth.targets()).mean():.3f}")
    found = metasmoothness(course, start, queries, h=0.1)
    told = [f"{found.agreement:.3f}", f"{found.curvature:.2f}", f"{found.bend:.2f}"]
    return "\n".join(f"| {rate} | {name} | {' | '.join([*own, *told])} |" for name, own in cells.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--data", choices=DATA, default="digits")
    chosen = parser.parse_args()
    removed = [f"{fraction:.0%} {how}" for how in ("masked", "dropped") for fraction in FRACTIONS]
    print(f"| learning rate | curvature | {' | '.join(removed)} | S | \\|f''\\| | bend |")
    print("|---|---|" + "---:|" * (len(removed) + 3))
    for rate in (0.05, 0.5, 1.0):
        print(lines(rate, chosen.subsets, chosen.data), flush=True)


if __name__ == "__main__":
    main()
