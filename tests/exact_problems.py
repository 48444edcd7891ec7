"""A small network, its rows, and dense matrices that exact products are compared with."""

import torch
from torch import nn
from torch.func import jacrev

import gradfn as gf
from gradfn.engine.reference import naive_grads
from gradfn.model.params import call
from gradfn.testing.strategies import randomize, squared_error

EXACT = {"rtol": 1e-9, "atol": 1e-12}


NET = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0)


PARAMS = gf.model.params_of(NET)


LOSS = squared_error(NET)


SIZE = sum(p.numel() for p in PARAMS.values())


def rows_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [{"x": draw(3), "y": draw(2), "class": torch.tensor(i % 2)} for i in range(count)]


ROWS = rows_of(7)


TOKENS = [
    {"input_ids": torch.tensor([1, 2, 3, 4, 5])},
    {"input_ids": torch.tensor([6, 7])},
    {"input_ids": torch.tensor([3, 1, 2])},
]
WEIGHTED = [
    {**row, "labels": torch.where(torch.arange(len(row["input_ids"])) < 2, -100, row["input_ids"]),
     "weight": torch.tensor(0.5 + i, dtype=torch.float64)} for i, row in enumerate(TOKENS)
]  # fmt: skip


def flat(v):
    return torch.cat([value.flatten(1) for value in v.values()], 1)


def unflat(matrix, like):
    parts = matrix.split([p.numel() for p in like.values()], 1)
    return {n: part.reshape(-1, *p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}


def dense(product, params):
    """The product's matrix, all columns asked for at once."""
    size = sum(p.numel() for p in params.values())
    return flat(product(unflat(torch.eye(size, dtype=torch.float64), params)))


def one(vector, params):
    return {name: value[0] for name, value in unflat(vector[None], params).items()}


def flat_params(params):
    return flat({name: p[None] for name, p in params.items()})[0]


def dense_fisher(loss, model, rows):
    g = flat(naive_grads(loss, model, rows))
    return g.T @ g / len(rows)


def dense_hessian(loss, params, rows):
    def mean(w):
        return sum(loss(one(w, params), row) for row in rows) / len(rows)

    return jacrev(jacrev(mean))(flat_params(params))


def outputs(params, example):
    return call(NET, params, example["x"])


def half_square(z, example):
    return (z - example["y"]).square().sum() / 2


def randoms(count, params=PARAMS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = sum(p.numel() for p in params.values())
    return unflat(torch.randn(count, size, generator=generator, dtype=torch.float64), params)


H = dense_fisher(LOSS, NET, ROWS)
