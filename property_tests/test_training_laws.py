"""Laws of training many models at once: together as alone, in any chunks, in any order."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from gradfn.testing.models import randomize
from gradfn.train import Training, make_trainer

ROWS = 9
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
DATA = [
    {"x": torch.randn(3, generator=torch.Generator().manual_seed(row)).double(), "y": torch.tensor(row % 2)}
    for row in range(ROWS)
]


MOMENTA = {"sgd": [0.0, 0.9], "adam": [0.0], "adamw": [0.0], "muon": [0.5, 0.9]}


def loss(params, example):
    return F.cross_entropy(functional_call(NET, params, (example["x"],)), example["y"])


def make_net():
    return randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), int(torch.randint(99, ())))


@st.composite
def cases(draw):
    """A trainer, subsets (of one size or not) and seeds."""
    optimizer = draw(st.sampled_from(["sgd", "adam", "adamw", "muon"]))
    training = Training(
        draw(st.integers(1, 3)), draw(st.integers(1, 3)), 0.05, optimizer,
        momentum=draw(st.sampled_from(MOMENTA[optimizer])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        schedule=draw(st.sampled_from(["constant", "linear", "cosine"])), warmup=draw(st.integers(0, 3)),
    )  # fmt: skip
    models = draw(st.integers(2, 5))
    sizes = draw(
        st.one_of(
            st.integers(3, ROWS).map(lambda size: [size] * models),
            st.lists(st.integers(3, ROWS), min_size=models, max_size=models),
        )
    )
    masks = torch.zeros(models, ROWS, dtype=torch.bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask[draw(st.permutations(range(ROWS)))[:size]] = True
    seeds = draw(st.lists(st.integers(0, 50), min_size=models, max_size=models))
    return make_trainer(make_net, loss, DATA, training), masks, seeds


def assert_same(a, b):
    torch.testing.assert_close(a.losses, b.losses, rtol=1e-9, atol=1e-10)
    for name, value in a.params.items():
        torch.testing.assert_close(value, b.params[name], rtol=1e-8, atol=1e-9)


@given(cases(), st.integers(1, 4))
def test_chunks_change_nothing(case, chunk):
    trainer, masks, seeds = case
    assert_same(trainer.train(masks, seeds, chunk=chunk), trainer.train(masks, seeds, chunk=len(seeds)))


@given(cases(), st.data())
def test_permuting_models_permutes_what_they_become(case, data):
    trainer, masks, seeds = case
    order = data.draw(st.permutations(range(len(seeds))))
    permuted, trained = trainer.train(masks[order], [seeds[m] for m in order]), trainer.train(masks, seeds)
    torch.testing.assert_close(permuted.losses, trained.losses[order], rtol=1e-9, atol=1e-10)
    for name, value in permuted.params.items():
        torch.testing.assert_close(value, trained.params[name][order], rtol=1e-8, atol=1e-9)


@given(cases())
def test_training_ends_where_its_trajectory_ends(case):
    trainer, masks, seeds = case
    steps = list(trainer.trajectory(masks, seeds))
    trained = trainer.train(masks, seeds)
    for name, value in steps[-1].state.params.items():
        torch.testing.assert_close(trained.params[name], value, rtol=1e-8, atol=1e-9)
    assert torch.equal(steps[-1].state.taken, steps[-1].state.total)
