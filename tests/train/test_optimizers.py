from math import cos, pi

import pytest
import torch
from train_problems import OPTIMIZERS

from gradfn.train import State, Training, first_state, learning_rate, make_step, update
from gradfn.train.optimizers import update_in_place


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_is_differentiable_where_a_gradient_is_zero(optimizer):
    training = Training(1, 1, 0.1, optimizer, eps=0.5)

    def loss(params, example):
        return (params["w"] * example["x"]).sum()

    step, params = make_step(loss, training), {"w": torch.ones(2, dtype=torch.float64)}
    batch = {"x": torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)}

    def moved(weights):
        state = first_state(params, training, torch.tensor(2))
        return step(step(state, batch, weights), batch, weights).params["w"].sum()

    weights = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moved, weights)
    assert torch.autograd.gradgradcheck(moved, weights)
    slope = torch.autograd.functional.jacobian(
        lambda g: update(training, first_state(params, training, torch.tensor(2)), {"w": g}).params["w"],
        torch.zeros(2, dtype=torch.float64),
    )
    torch.testing.assert_close(slope.diagonal(), torch.full((2,), -0.1 / 0.5, dtype=torch.float64))


@OPTIMIZERS
def test_the_step_in_place_is_the_pure_one(training):
    generator = torch.Generator().manual_seed(0)

    def draw():
        return {
            "w": torch.randn(2, 4, 3, generator=generator, dtype=torch.float64),
            "b": torch.randn(2, 4, generator=generator, dtype=torch.float64),
        }

    params = draw()
    pure = in_place = first_state(params, training, torch.tensor([5, 5]))
    for _ in range(3):
        grads = draw()
        grads["w"] = grads["w"].mT.contiguous().mT  # the layout of a linear layer's gradients
        pure = update(training, pure, grads)
        in_place = update_in_place(training, in_place, {name: g.clone() for name, g in grads.items()})
        torch.testing.assert_close(in_place, pure, rtol=1e-12, atol=1e-13)
        in_place = State({n: p.clone() for n, p in in_place.params.items()}, *in_place[1:])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_the_learning_rate_rises_over_the_warmup_and_then_follows_the_schedule(schedule, warmup):
    training = Training(1, 1, 0.1, "sgd", schedule=schedule, warmup=warmup)
    rates = learning_rate(training, torch.arange(6), torch.tensor(5))
    assert rates[:warmup].tolist() == pytest.approx([0.1 * step / warmup for step in range(warmup)])
    left = [(5 - step) / max(1, 5 - warmup) for step in range(warmup, 6)]
    shapes = {"constant": lambda x: 1, "linear": lambda x: x, "cosine": lambda x: (1 - cos(pi * x)) / 2}
    assert rates[warmup:].tolist() == pytest.approx([0.1 * shapes[schedule](x) for x in left])
