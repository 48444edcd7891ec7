"""Laws of derivatives through a training: those of real trainings, by rows and visits, whatever is kept."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from gradfn.model.params import params_of
from gradfn.testing.models import randomize
from gradfn.train import Replay, Training, metagradient
from gradfn.train.course import Course

ROWS = 7
NET = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0)
DATA = [
    {"x": torch.randn(3, generator=torch.Generator().manual_seed(row)).double(), "y": torch.tensor(row % 2)}
    for row in range(ROWS)
]
START = {name: value.clone() for name, value in params_of(NET).items()}
MOMENTA = {"sgd": [0.0, 0.9], "adam": [0.0], "adamw": [0.0], "muon": [0.5]}


def loss(params, example):
    return F.cross_entropy(functional_call(NET, params, (example["x"],)), example["y"])


@st.composite
def courses(draw):
    """Trainings of a few steps; their eps keeps Adam's steps smooth in the weights."""
    optimizer = draw(st.sampled_from([*MOMENTA]))
    momentum = draw(st.sampled_from(MOMENTA[optimizer]))
    training = Training(
        draw(st.integers(2, 3)), draw(st.integers(3, ROWS)), 0.02, optimizer, momentum=momentum,
        nesterov=bool(momentum) and draw(st.booleans()), eps=1e-2,
        weight_decay=draw(st.sampled_from([0.0, 0.3])),
        schedule=draw(st.sampled_from(["constant", "linear", "cosine"])),
        max_grad_norm=draw(st.sampled_from([None, 0.05])),
        eps_root=0.0 if optimizer == "sgd" else draw(st.sampled_from([0.0, 1e-3])),
    )  # fmt: skip
    weights = draw(st.sampled_from([None, torch.linspace(0.2, 1.4, ROWS).double()]))
    return Course(loss, DATA, training, seed=draw(st.integers(0, 9)), weights=weights)


def ends(course, weights):
    *_, last = replace(course, weights=weights).steps(course.start(START))
    return course.row_losses(last.state.params, DATA[:2])


@given(courses(), st.integers(0, 99))
def test_values_are_what_real_trainings_lose(course, seed):
    made = metagradient(course, START, DATA[:2])
    at = torch.ones(ROWS).double() if course.weights is None else course.weights
    v, h = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed)).double(), 1e-6
    change = (ends(course, at + h * v) - ends(course, at - h * v)) / (2 * h)
    torch.testing.assert_close(-(v @ made.values), change, rtol=1e-5, atol=1e-7)


@given(courses(), st.integers(2, 5))
def test_states_that_are_kept_and_visits_change_nothing(course, slots):
    whole = metagradient(course, START, DATA[:2])
    few = metagradient(course, START, DATA[:2], per="visit", replay=Replay(slots=slots))
    torch.testing.assert_close(few.values.sum(0), whole.values, rtol=1e-12, atol=1e-14)
    alone = metagradient(course, START, DATA[1:2], replay=Replay(slots=slots))
    torch.testing.assert_close(alone.values[:, 0], whole.values[:, 1], rtol=1e-9, atol=1e-12)
    cut = course.total // 2
    parts = [metagradient(course, START, DATA[:2], window=part).values for part in ((0, cut), (cut, None))]
    torch.testing.assert_close(sum(parts), whole.values, rtol=1e-9, atol=1e-12)
