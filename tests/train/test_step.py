from dataclasses import replace

import torch
from tiny import language_model
from torch import nn
from torch.func import functional_call, vmap
from train_problems import OPTIMIZERS, SETTINGS, problem, sequences, subsets

from gradfn.model.losses import CausalLMLoss
from gradfn.model.params import params_of
from gradfn.testing.strategies import randomize
from gradfn.train import (
    first_state,
    losses_of,
    make_step,
    make_trainer,
    table_of,
    update,
)
from gradfn.train.stacked import stacked_params


@OPTIMIZERS
def test_the_pure_step_is_the_step_of_training(training):
    make, loss, _, data = problem("mlp")
    masks = subsets(6, 5)
    trainer = make_trainer(make, loss, data, training)
    state = first_state(stacked_params(make, [0, 1]), training, torch.tensor([4, 4]))
    for step in trainer.trajectory(masks, [0, 1]):
        before, state = state, vmap(make_step(loss, training))(
            state, trainer.table.take(step.rows), step.weights
        )  # fmt: skip
        for made, wanted in zip(
            torch.utils._pytree.tree_leaves(state), torch.utils._pytree.tree_leaves(step.state), strict=True
        ):
            torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-12)
        assert not torch.equal(before.params["0.weight"], state.params["0.weight"]) or training.warmup
    assert state.taken.tolist() == [4, 4]


def test_a_step_without_weights_leaves_the_state():
    training = replace(SETTINGS["adamw"], warmup=0)
    make, loss, _, data = problem("mlp")
    state = first_state(params_of(make()), training, torch.tensor(5))
    batch = table_of(data).take(torch.arange(4))
    step = make_step(loss, training)
    moved = step(state, batch, torch.full((4,), 0.25).double())
    again = step(moved, batch, torch.zeros(4).double())
    assert again.taken == moved.taken == 1
    assert all(torch.equal(again.params[name], value) for name, value in moved.params.items())
    assert all(torch.equal(again.moments[1][name], value) for name, value in moved.moments[1].items())


@OPTIMIZERS
def test_a_masked_step_without_weights_is_a_step_with_a_gradient_of_0(training):
    make, loss, _, data = problem("mlp")
    state = first_state(params_of(make()), training, torch.tensor(5))
    batch = table_of(data).take(torch.arange(4))
    step = make_step(loss, training, removal="mask")
    moved = step(state, batch, torch.full((4,), 0.25).double())
    none = {name: torch.zeros_like(p) for name, p in moved.params.items()}
    leaves = torch.utils._pytree.tree_leaves
    masked = step(moved, batch, torch.zeros(4).double())
    torch.testing.assert_close(leaves(masked), leaves(update(training, moved, none)), rtol=0, atol=0)
    nearly = step(moved, batch, torch.full((4,), 1e-13).double())
    torch.testing.assert_close(leaves(masked), leaves(nearly), rtol=0, atol=1e-9)


@OPTIMIZERS
def test_two_steps_are_twice_differentiable_in_the_weights(training):
    training = replace(training, warmup=0)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    params = params_of(randomize(net, 0))
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(3, 2, dtype=torch.float64, generator=generator)}

    def loss(params, example):
        return functional_call(net, params, (example["x"],)).square().sum()

    step = make_step(loss, training)

    def trained(first, second):
        state = first_state(params, training, torch.tensor(4))
        state = step(step(state, batch, first), batch, second)
        return torch.cat([value.flatten() for value in state.params.values()])

    weights = [torch.tensor(w, dtype=torch.float64, requires_grad=True)
               for w in ([0.2, 0.5, 0.3], [0.1, 0.4, 0.6])]  # fmt: skip
    assert torch.autograd.gradcheck(trained, weights)
    assert torch.autograd.gradgradcheck(trained, weights)


def test_a_loss_is_computed_by_its_batched_form_at_other_parameters():
    model = language_model("gpt_neox")
    loss = CausalLMLoss(model, fused_head=True)
    params = {name: value * 1.1 for name, value in params_of(model).items()}
    batch = table_of(sequences()).take(torch.arange(5))
    each = torch.stack([loss(params, sequence) for sequence in sequences()[:5]])
    torch.testing.assert_close(losses_of(loss)(params, batch), each)
