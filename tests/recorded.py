"""A small problem whose training is recorded, and the rows that a recording must have."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gradfn as gf

ROWS = 13


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 3))


def rows_of_numbers(rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 5, generator=generator)
    return [{"x": one, "y": torch.tensor(number % 3)} for number, one in enumerate(x)]


def loss_of(net):
    def loss(params, e):
        out = torch.func.functional_call(net, params, e["x"][None])
        return F.cross_entropy(out, e["y"][None])

    return loss


def batches(epoch, size, data):
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch)).tolist()
    return [order[start : start + size] for start in range(0, len(data), size)]


def train(
    net, data, rec=None, *, epochs=2, size=3, accumulation=1, lr=0.1, start=0, optimizer=None, after=None
):
    """A plain loop, with a recorder or without; `after(step)` is called at the end of each step."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    step = 0
    for epoch in range(epochs):
        micro = batches(epoch, size, data)
        for window in [micro[i : i + accumulation] for i in range(0, len(micro), accumulation)]:
            if step < start:
                step += 1
                continue
            for rows in window:
                x, y = (torch.stack([data[row][key] for row in rows]) for key in "xy")
                losses = F.cross_entropy(net(x), y, reduction="none")
                losses = losses if rec is None else rec.loss(losses, rows)
                (losses.mean() / len(window)).backward()
                if rec is not None and accumulation > 2:
                    rec.substep()
            optimizer.step()
            optimizer.zero_grad()
            if rec is not None:
                rec.step(epoch=epoch)
            step += 1
            if after is not None:
                after(step, optimizer)
    return optimizer


def read(run, *names):
    with gf.open_store(run) as store:
        found = store.read_all(names or store.names())
    return found if len(names) != 1 else found[names[0]]


def contents(run):
    """The bytes of every file of a run."""
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(Path(run).rglob("*.h5"))}


def built(tmp_path, net, data, transform=None, **options):
    """The rows of `build` at the weights that the model has now, in the order of the data."""
    gf.build(tmp_path / "built", net, data, transform, overwrite=True, **options)
    return read(tmp_path / "built")
