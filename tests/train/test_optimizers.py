from math import cos, pi

import pytest
import torch
from train_problems import OPTIMIZERS

from gradfn.train import State, Training, first_state, learning_rate, make_step, update
from gradfn.train.optimizers import clipped, update_in_place


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


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torchs(nesterov, monkeypatch):
    """Which orthogonalises in bfloat16; here in the type of the parameters, as a derivative needs."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    training = Training(2, 1, 0.02, "muon", momentum=0.9, nesterov=nesterov, weight_decay=0.3, eps=1e-4)
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 3), "b": (3, 5), "embed": (4, 3), "bias": (4,), "kernel": (2, 3, 2)}

    def draw():
        return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}

    params = draw()
    own = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    matrices, rest = [own["a"], own["b"]], [own["embed"], own["bias"], own["kernel"]]
    optimizers = [
        torch.optim.Muon(matrices, 0.02, 0.3, 0.9, nesterov, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, 0.02, eps=1e-4, weight_decay=0.3),
    ]
    state = first_state(params, training, torch.tensor(3))
    stacked = first_state(
        {n: p.expand(2, *p.shape) for n, p in params.items()}, training, torch.full((2,), 3)
    )
    for _ in range(3):
        grads = draw()
        for name, p in own.items():
            p.grad = grads[name].clone()
        for optimizer in optimizers:
            optimizer.step()
        state = update(training, state, grads)
        stacked = update(training, stacked, {n: g.expand(2, *g.shape) for n, g in grads.items()})
        for name, p in own.items():
            torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(stacked.params[name][1], state.params[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_the_learning_rate_rises_over_the_warmup_and_then_follows_the_schedule(schedule, warmup):
    training = Training(1, 1, 0.1, "sgd", schedule=schedule, warmup=warmup)
    rates = learning_rate(training, torch.arange(6), torch.tensor(5))
    assert rates[:warmup].tolist() == pytest.approx([0.1 * step / warmup for step in range(warmup)])
    left = [(5 - step) / max(1, 5 - warmup) for step in range(warmup, 6)]
    shapes = {"constant": lambda x: 1, "linear": lambda x: x, "cosine": lambda x: (1 - cos(pi * x)) / 2}
    assert rates[warmup:].tolist() == pytest.approx([0.1 * shapes[schedule](x) for x in left])


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_stacked_models_are_clipped_each_by_its_own_norm(scale):
    training = Training(1, 1, 0.1, "sgd", max_grad_norm=0.5)
    generator = torch.Generator().manual_seed(0)
    grads = {"w": torch.randn(2, 4, 3, generator=generator).double(), "b": torch.randn(2, 4).double()}
    grads = {name: g * torch.tensor([1.0, scale]).view(2, *[1] * (g.ndim - 1)) for name, g in grads.items()}
    got = clipped(training, grads, stacked=True)
    for model in range(2):
        leaves = [torch.nn.Parameter(torch.zeros(4, 3)), torch.nn.Parameter(torch.zeros(4))]
        leaves = [leaf.double().detach().requires_grad_() for leaf in leaves]
        for leaf, g in zip(leaves, grads.values(), strict=True):
            leaf.grad = g[model].clone()
        torch.nn.utils.clip_grad_norm_(leaves, 0.5)
        for leaf, g in zip(leaves, got.values(), strict=True):
            torch.testing.assert_close(g[model], leaf.grad)


@pytest.mark.parametrize("training", [
    Training(1, 1, 0.1, "adam", max_grad_norm=1.0), Training(1, 1, 0.1, "sgd", max_grad_norm=1e-7),
    Training(1, 1, 0.1, "adamw", eps_root=1e-8, max_grad_norm=1.0),
])  # fmt: skip
def test_a_gradient_of_0_has_finite_derivatives(training):
    def moved(g):
        state = first_state({"w": torch.ones(2).double()}, training, torch.tensor(2))
        return update(training, update(training, state, {"w": g}), {"w": g}).params["w"].sum()

    zero = torch.zeros(2, dtype=torch.float64)
    assert torch.autograd.functional.jacobian(moved, zero).isfinite().all()
    assert torch.autograd.functional.hessian(moved, zero).isfinite().all()
