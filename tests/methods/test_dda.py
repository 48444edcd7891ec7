"""DDA is the mean over checkpoints less the base model's scores."""

import pytest
import torch
from torch import nn

import gradfn as gf


def subject(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(params, example):
        return (torch.func.functional_call(net, params, example["x"]) - example["y"]).square().sum()

    return gf.Subject(net, loss)


torch.manual_seed(9)
ROWS = [{"x": torch.randn(3).double(), "y": torch.randn(2).double()} for _ in range(7)]
TRAIN, QUERY = ROWS[:5], ROWS[5:]
BASE, STEPS = subject(0), [subject(1), subject(2), subject(3)]


def dots(one):
    g, q = (torch.cat([G.flatten(1) for G in gf.collect(one, side).values()], 1) for side in (TRAIN, QUERY))
    return g @ q.T


@pytest.mark.parametrize("debias", [1.0, 0.3, 0.0])
def test_it_is_a_mean_less_the_base(debias):
    got = gf.score(BASE, TRAIN, QUERY, method=gf.methods.dda(BASE, STEPS, debias=debias))
    want = torch.stack([dots(one) for one in STEPS]).mean(0) - debias * dots(BASE)
    torch.testing.assert_close(got.matrix.double(), want, rtol=1e-9, atol=1e-9)


def test_every_model_has_a_projection_of_its_own():
    made = gf.methods.dda(BASE, STEPS, gf.project(2))
    assert len({one.row_transform.stages[0].seed for _, one in made.parts}) == 4
    with pytest.raises(gf.InputError, match="there is no checkpoint"):
        gf.methods.dda(BASE, [])
