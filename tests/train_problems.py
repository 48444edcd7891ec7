"""Models, losses, rows and trainings that the tests of training share."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.func import functional_call
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from gradfn.model.losses import causal_lm_loss
from gradfn.random import words
from gradfn.testing.strategies import randomize
from gradfn.train import (
    Training,
)

ROWS = 11


SETTINGS = {
    "sgd": Training(2, 4, 0.1, "sgd"),
    "decayed": Training(2, 4, 0.1, "sgd", weight_decay=0.1, momentum=0.5),
    "nesterov": Training(2, 4, 0.05, "sgd", momentum=0.9, nesterov=True, schedule="linear", warmup=2),
    "adam": Training(2, 4, 0.01, "adam", weight_decay=0.1, betas=(0.8, 0.95), eps=1e-4),
    "adamw": Training(2, 4, 0.01, "adamw", weight_decay=0.1, schedule="cosine", warmup=1),
    "clipped": Training(2, 4, 0.1, "sgd", momentum=0.5, weight_decay=0.1, max_grad_norm=0.7),
    "rooted": Training(2, 4, 0.01, "adamw", weight_decay=0.1, eps_root=1e-3, eps=1e-4, max_grad_norm=0.7),
    "muon": Training(2, 4, 0.02, "muon", momentum=0.9, nesterov=True, weight_decay=0.1, eps=1e-4),
}


OPTIMIZERS = pytest.mark.parametrize("training", SETTINGS.values(), ids=SETTINGS)
ELEMENTWISE = pytest.mark.parametrize(
    "training", [SETTINGS[n] for n in SETTINGS if n != "muon"], ids=[n for n in SETTINGS if n != "muon"]
)


def subsets(*sizes, rows=ROWS):
    """One mask a size, each of other rows."""
    masks = torch.zeros(len(sizes), rows, dtype=torch.bool)
    for number, size in enumerate(sizes):
        masks[number, torch.from_numpy(np.random.default_rng(number).permutation(rows)[:size])] = True
    return masks


def vectors(shape=(5,), classes=3):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(shape, generator=generator, dtype=torch.float64),
            "y": torch.randint(classes, (), generator=generator),
        }
        for _ in range(ROWS)
    ]


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(11, (3 + row % 4,), generator=generator)} for row in range(ROWS)]


def make_mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def make_convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()  # fmt: skip


def classification(net):
    def loss(params, example):
        return F.cross_entropy(functional_call(net, params, (example["x"][None],)), example["y"][None])

    return loss


def problem(kind):
    """What makes a model, the loss as a function of parameters, the naive loss of a module, and the rows."""
    if kind in ("mlp", "convnet"):
        make = make_mlp if kind == "mlp" else make_convnet
        data = vectors() if kind == "mlp" else vectors((2, 4, 4))
        return make, classification(make()), lambda m, e: F.cross_entropy(m(e["x"][None])[0], e["y"]), data

    def make():
        return randomize(language_model(kind), int(torch.randint(1000, ())))

    def naive(model, example):
        logits = model(input_ids=example["input_ids"][None]).logits[0]
        return F.cross_entropy(logits[:-1], example["input_ids"][1:])

    return make, causal_lm_loss(language_model(kind)), naive, sequences()


class RootedAdamW(torch.optim.Optimizer):
    """AdamW with a number inside the root, which `torch.optim` does not have."""

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        (b1, b2), rate = group["betas"], group["lr"]
        for p in group["params"]:
            state = self.state[p] or {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
            t, m, v = (
                state["t"] + 1,
                b1 * state["m"] + (1 - b1) * p.grad,
                b2 * state["v"] + (1 - b2) * p.grad**2,
            )
            self.state[p] = {"t": t, "m": m, "v": v}
            root = (v / (1 - b2**t) + group["eps_root"]).sqrt()
            p.mul_(1 - rate * group["decay"]).sub_(rate * m / (1 - b1**t) / (root + group["eps"]))


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for matrices that are no embedding or head, in their own type, and AdamW for the others."""

    def __init__(self, named, training):
        named = [*named]
        super().__init__([p for _, p in named], {"lr": training.learning_rate})
        apart = ("wte", "wpe", "embed", "head")
        inner = {n for n, p in named if p.ndim == 2 and not any(word in n for word in apart)}
        groups = [[p for n, p in named if (n in inner) is own] for own in (True, False)]
        rate, decay = training.learning_rate, training.weight_decay
        self.inner = [
            torch.optim.Muon(groups[0], rate, decay, training.momentum, training.nesterov,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups[1], rate, training.betas, training.eps, decay),
        ]  # fmt: skip

    def step(self):
        with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
            for each in self.inner:
                each.param_groups[0]["lr"] = self.param_groups[0]["lr"]
                each.step()


def torch_optimizer(model, training, steps):
    """What a person would write."""
    if training.optimizer == "muon":
        made = MuonAndAdamW(model.named_parameters(), training)
    elif training.optimizer == "sgd":
        made = torch.optim.SGD(model.parameters(), training.learning_rate, training.momentum,
                               weight_decay=training.weight_decay, nesterov=training.nesterov)  # fmt: skip
    elif training.eps_root:
        made = RootedAdamW(model.parameters(), {
            "lr": training.learning_rate, "betas": training.betas, "eps": training.eps,
            "decay": training.weight_decay, "eps_root": training.eps_root,
        })  # fmt: skip
    else:
        kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
        made = kind(model.parameters(), training.learning_rate, training.betas, training.eps,
                    training.weight_decay)  # fmt: skip
    if training.schedule == "linear":
        return made, get_linear_schedule_with_warmup(made, training.warmup, steps)
    if training.schedule == "cosine":
        return made, get_cosine_schedule_with_warmup(made, training.warmup, steps)
    return made, torch.optim.lr_scheduler.ConstantLR(made, 1.0)


def loop(make, naive, data, masks, seeds, training):
    """Models trained one at a time with `torch.optim`: parameters and the losses of the last epoch."""
    found, last = [], []
    for mask, seed in zip(masks, seeds, strict=True):
        torch.manual_seed(seed)
        model = make().requires_grad_()
        rows = mask.nonzero()[:, 0].numpy()
        steps = training.epochs * -(-len(rows) // training.batch_size)
        optimizer, schedule = torch_optimizer(model, training, steps)
        for epoch in range(training.epochs):
            losses = []
            order = rows[np.argsort(words(len(data), "order", seed, epoch)[rows])]
            for start in range(0, len(order), training.batch_size):
                batch = [naive(model, data[row]) for row in order[start : start + training.batch_size]]
                optimizer.zero_grad()
                torch.stack(batch).mean().backward()
                if training.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                optimizer.step()
                schedule.step()
                losses += [loss.item() for loss in batch]
            if epoch == training.epochs - 1:
                last.append(np.mean(losses))
        found.append({name: p.detach() for name, p in model.named_parameters()})
    return {name: torch.stack([one[name] for one in found]) for name in found[0]}, torch.tensor(last)


def assert_trained(trained, params, losses):
    assert not trained.diverged.any()
    torch.testing.assert_close(trained.losses, losses, rtol=1e-9, atol=1e-9)
    assert {*trained.params} == {*params}
    for name, value in params.items():
        torch.testing.assert_close(trained.params[name], value, rtol=1e-8, atol=1e-9)
