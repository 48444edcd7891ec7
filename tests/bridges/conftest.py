"""A small classifier in float64, its training rows and queries, as torch has them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from gradfn.testing.strategies import randomize

ROWS, QUERIES, CLASSES = 24, 6, 3


@pytest.fixture
def problem():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS + QUERIES, 5, generator=draw, dtype=torch.float64)
    labels = torch.arange(ROWS + QUERIES) % CLASSES
    net = randomize(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), 1)
    return SimpleNamespace(
        net=net,
        train=TensorDataset(inputs[:ROWS], labels[:ROWS]),
        queries=(inputs[ROWS:], labels[ROWS:]),
        gradients=lambda inputs, labels, net=net: gradients(net, inputs, labels),
    )


def gradients(net, inputs, labels):
    """The gradient of each row's loss in all parameters, one row at a time."""
    made = []
    for x, y in zip(inputs, labels, strict=True):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[None]), y[None]).backward()
        made.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    return torch.stack(made)
