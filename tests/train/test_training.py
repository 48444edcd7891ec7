from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.func import functional_call, vmap
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from gradfn.errors import InputError
from gradfn.model.losses import CausalLMLoss, causal_lm_loss, model_loss
from gradfn.model.params import params_of
from gradfn.random import words
from gradfn.testing.strategies import randomize
from gradfn.train.training import (
    Training,
    first_state,
    losses_of,
    make_step,
    make_trainer,
    stacked_losses,
    table_of,
    train,
    update,
)

ROWS = 11
SETTINGS = {
    "sgd": Training(2, 4, 0.1, "sgd"),
    "decayed": Training(2, 4, 0.1, "sgd", weight_decay=0.1, momentum=0.5),
    "nesterov": Training(2, 4, 0.05, "sgd", momentum=0.9, nesterov=True, schedule="linear", warmup=2),
    "adam": Training(2, 4, 0.01, "adam", weight_decay=0.1, betas=(0.8, 0.95), eps=1e-4),
    "adamw": Training(2, 4, 0.01, "adamw", weight_decay=0.1, schedule="cosine", warmup=1),
}
OPTIMIZERS = pytest.mark.parametrize("training", SETTINGS.values(), ids=SETTINGS)


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


def torch_optimizer(model, training, steps):
    """What a person would write."""
    if training.optimizer == "sgd":
        made = torch.optim.SGD(model.parameters(), training.learning_rate, training.momentum,
                               weight_decay=training.weight_decay, nesterov=training.nesterov)  # fmt: skip
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


@OPTIMIZERS
@pytest.mark.parametrize("sizes", [(6, 6, 6), (7, 4, 9)], ids=["alike", "unequal"])
@pytest.mark.parametrize("kind", ["mlp", "convnet", "gpt2", "gpt_neox"])
def test_stacked_training_is_the_loop_of_torch_optim(kind, training, sizes):
    make, loss, naive, data = problem(kind)
    masks, seeds = subsets(*sizes), [3, 1, 3]
    trainer = make_trainer(make, loss, data, training)
    assert trainer.looped is None
    assert_trained(trainer.train(masks, seeds), *loop(make, naive, data, masks, seeds, training))


@OPTIMIZERS
def test_the_pure_step_is_the_step_of_training(training):
    make, loss, _, data = problem("mlp")
    masks = subsets(6, 5)
    trainer = make_trainer(make, loss, data, training)
    state = first_state(trainer.initial([0, 1]), training, torch.tensor([4, 4]))
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


def test_a_trajectory_does_not_change_what_it_yielded():
    make, loss, _, data = problem("mlp")
    trainer = make_trainer(make, loss, data, SETTINGS["adam"])
    steps = trainer.trajectory(subsets(6, 6), [0, 1])
    first = next(steps)
    copy = first.state.params["0.weight"].clone()
    assert len(list(steps)) == 3
    assert torch.equal(first.state.params["0.weight"], copy)


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


def test_models_are_those_of_the_data_in_the_order_of_seed_and_epoch():
    make, loss, _, data = problem("mlp")
    masks = subsets(7, 7)
    steps = list(make_trainer(make, loss, data, SETTINGS["sgd"]).trajectory(masks, [5, 6]))
    assert len(steps) == 4
    for model in range(2):
        orders = [
            torch.cat([s.rows[model][s.weights[model] > 0] for s in steps[e : e + 2]]).tolist()
            for e in (0, 2)
        ]
        assert sorted(orders[0]) == sorted(orders[1]) == masks[model].nonzero()[:, 0].tolist()
        assert orders[0] != orders[1]
    assert [step.weights[0].sum().item() for step in steps] == pytest.approx([1.0] * 4)


def test_given_parameters_are_where_all_models_start():
    make, loss, _, data = problem("mlp")
    given = params_of(make())
    kept = {name: value.clone() for name, value in given.items()}
    trained = train(given, loss, data, subsets(6, 6), [0, 1], Training(1, 6, 1e-12, "sgd"))
    for name, value in kept.items():
        assert torch.equal(given[name], value)
        torch.testing.assert_close(trained.params[name], torch.stack([value, value]))


def test_a_diverged_model_is_counted_and_leaves_the_others_alone():
    data = [{"x": torch.tensor([1.0 if row < 8 else 1e30])} for row in range(ROWS)]

    def loss(params, example):
        return (params["w"] * example["x"] - 1).square().sum()

    masks = torch.ones(2, ROWS, dtype=torch.bool)
    masks[0, 8:] = False
    trained = train({"w": torch.ones(1)}, loss, data, masks, [0, 0], Training(3, 2, 0.1, "sgd"))
    assert trained.diverged.tolist() == [False, True]
    assert trained.params["w"][0].isfinite().all()


@OPTIMIZERS
def test_a_parameter_may_be_a_number_or_empty(training):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.nothing = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(0, 3))
            self.double()

        def forward(self, x):
            return self.scale * x[:, :3] + self.nothing.sum()

    masks, seeds, data = subsets(5, 5, 7), [0, 1, 2], vectors()
    found = loop(
        Scaled, lambda m, e: F.cross_entropy(m(e["x"][None])[0], e["y"]), data, masks, seeds, training
    )
    assert_trained(train(Scaled, classification(Scaled()), data, masks, seeds, training), *found)


def test_losses_that_cannot_be_mapped_over_are_trained_in_a_loop():
    make, loss, naive, data = problem("mlp")

    def awkward(params, example):
        return loss(params, example) if bool(example["x"].sum() < 100) else loss(params, example) * 0

    masks = subsets(6, 5)
    trainer = make_trainer(make, awkward, data, SETTINGS["adam"])
    assert "data-dependent" in trainer.looped
    assert_trained(trainer.train(masks, [0, 1]), *loop(make, naive, data, masks, [0, 1], SETTINGS["adam"]))


def test_models_with_attention_masks_are_trained_whether_they_stack_or_not():
    model = language_model("gpt2")
    data = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in sequences()]
    labelled = [{**row, "labels": row["input_ids"]} for row in data]
    loss = model_loss(model, "masked_lm")
    params = params_of(model)
    table = table_of(labelled)
    many, _ = stacked_losses(loss, params, table.take(torch.tensor([0, 3])))
    both = {name: torch.stack([value, value * 0.9]) for name, value in params.items()}
    made = many(both, table.take(torch.tensor([[0, 3], [1, 2]])))
    one = losses_of(loss)
    for m, rows in enumerate(([0, 3], [1, 2])):
        wanted = one({name: value[m] for name, value in both.items()}, table.take(torch.tensor(rows)))
        torch.testing.assert_close(made[m], wanted)


def test_a_loss_is_computed_by_its_batched_form_at_other_parameters():
    model = language_model("gpt_neox")
    loss = CausalLMLoss(model, fused_head=True)
    params = {name: value * 1.1 for name, value in params_of(model).items()}
    batch = table_of(sequences()).take(torch.arange(5))
    each = torch.stack([loss(params, sequence) for sequence in sequences()[:5]])
    torch.testing.assert_close(losses_of(loss)(params, batch), each)


def test_a_table_takes_no_more_padding_than_its_rows_need():
    table = table_of(sequences())
    assert table.take(torch.tensor([0, 4]))["input_ids"].shape == (2, 3)
    assert table.take(torch.tensor([[0, 3]]))["labels"].tolist()[0][0][3:] == [-100] * 3


@pytest.mark.parametrize(("changes", "says"), [
    ({"epochs": 0}, "epochs must be 1 or more"), ({"batch_size": 0}, "batch_size must be"),
    ({"learning_rate": 0.0}, "learning_rate must be above 0"), ({"eps": 0.0}, "eps must be"),
    ({"learning_rate": float("nan")}, "learning_rate"), ({"betas": (0.9, 1.0)}, "betas must be"),
    ({"learning_rate": float("inf")}, "learning_rate must be above 0, and finite, not inf"),
    ({"weight_decay": float("inf")}, "weight_decay must be 0 or more, and finite, not inf"),
    ({"eps": float("inf")}, "eps must be above 0, and finite, not inf"),
    ({"weight_decay": -1.0}, "weight_decay"), ({"warmup": -1}, "warmup must be"),
    ({"momentum": 0.9}, "momentum is of sgd"), ({"optimizer": "sgd", "nesterov": True}, "nesterov"),
    ({"optimizer": "sgd", "momentum": 1.0}, "momentum must be"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        replace(Training(1, 1, 0.1), **changes)


@pytest.mark.parametrize(("masks", "seeds", "says"), [
    (subsets(3, 5), [0, 1], "a batch of 4 is larger than the smallest subset, of 3 rows"),
    (subsets(0, 5), [0, 1], "subset 0 leaves everything out"),
    (subsets(5, 5), [0], "subsets are one a seed"), (subsets(5, rows=9), [0], "of 9 rows"),
])  # fmt: skip
def test_subsets_that_do_not_fit_are_refused(masks, seeds, says):
    make, loss, _, data = problem("mlp")
    with pytest.raises(InputError, match=says):
        train(make, loss, data, masks, seeds, SETTINGS["sgd"])


@pytest.mark.parametrize(("layer", "says"), [
    (nn.BatchNorm1d(7), "1 is a BatchNorm.*GroupNorm"), (nn.Dropout(0.5), "1 is a Dropout that is on")
])  # fmt: skip
def test_layers_that_mix_rows_or_are_random_are_refused(layer, says):
    net = nn.Sequential(nn.Linear(5, 7), layer, nn.Linear(7, 3)).double()
    with pytest.raises(InputError, match=says):
        train(lambda: net, classification(net), vectors(), subsets(6), [0], SETTINGS["sgd"])


def test_a_random_loss_is_refused():
    def noisy(params, example):
        return (params["weight"] * F.dropout(example["x"], 0.5)).sum()

    with pytest.raises(InputError, match="the loss is random"):
        train({"weight": torch.ones(5).double()}, noisy, vectors(), subsets(6), [0], SETTINGS["sgd"])


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_random_loss_that_cannot_be_mapped_over_is_refused(start):
    def noisy(params, example):
        x = example["x"] if bool(example["x"].sum() < 100) else example["x"] * 0
        return (params["weight"] * F.dropout(x, 0.5)).sum()

    weight = torch.full((5,), start, dtype=torch.float64)
    with pytest.raises(InputError, match="the loss is random"):
        train({"weight": weight}, noisy, vectors(), subsets(6), [0], SETTINGS["sgd"])


def test_a_loss_with_random_numbers_of_its_own_is_refused():
    drawn = np.random.default_rng(0)

    def noisy(params, example):
        return (params["weight"] * example["x"]).sum() * drawn.random()

    with pytest.raises(InputError, match="the loss is random"):
        train({"weight": torch.ones(5).double()}, noisy, vectors(), subsets(6), [0], SETTINGS["sgd"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_parameters_that_lose_the_steps_are_refused(dtype):
    def loss(params, example):
        return (params["weight"] * example["x"]).sum()

    given = {"bias": torch.ones(1), "weight": torch.ones(5, dtype=dtype)}
    with pytest.raises(InputError, match=f"weight is {str(dtype)[6:]}, .*in fp32"):
        make_trainer(given, loss, vectors(), SETTINGS["sgd"])
    with pytest.raises(InputError, match=r"0\.weight is bfloat16"):
        make_trainer(lambda: make_mlp().bfloat16(), classification(make_mlp()), vectors(), SETTINGS["sgd"])


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_no_models_is_refused(chunk):
    make, loss, _, data = problem("mlp")
    with pytest.raises(InputError, match=f"chunk must be 1 or more models at a time, not {chunk}"):
        train(make, loss, data, subsets(6), [0], SETTINGS["sgd"], chunk=chunk)


@pytest.mark.parametrize(("row", "says"), [
    (0, "row 0 has no 'y', which row 1 has"), (4, "row 4 has no 'y', which row 0 has"),
])  # fmt: skip
def test_rows_that_lack_a_key_are_named(row, says):
    data = vectors()
    del data[row]["y"]
    with pytest.raises(InputError, match=says):
        table_of(data)


def test_a_start_of_other_parameters_than_the_loss_has_is_refused():
    loss, data = causal_lm_loss(language_model("gpt2")), sequences()
    wider = language_model("gpt2")
    wider.transformer.ln_f = nn.LayerNorm(9)
    with pytest.raises(InputError, match=r"ln_f\.weight is \[9\] in the start and \[8\] in the model"):
        make_trainer(lambda: wider, loss, data, SETTINGS["adam"])
    with pytest.raises(InputError, match="is absent in the start and"):
        make_trainer(lambda: nn.ModuleDict(), loss, data, SETTINGS["adam"])
    given = {**params_of(language_model("gpt2")), "more": torch.ones(1)}
    with pytest.raises(InputError, match=r"more is \[1\] in the start and absent in the model"):
        make_trainer(given, loss, data, SETTINGS["adam"])


def test_some_parameters_of_the_model_of_the_loss_can_be_given():
    model = language_model("gpt2")
    given = {name: p for name, p in params_of(model).items() if "mlp" in name}
    trained = train(given, causal_lm_loss(model), sequences(), subsets(6), [0], SETTINGS["adam"])
    assert {*trained.params} == {*given}


def test_buffers_that_differ_from_seed_to_seed_are_refused():
    def make():
        net = make_mlp()
        net.register_buffer("features", torch.randn(3))
        return net

    with pytest.raises(InputError, match="the buffer features differs from seed to seed"):
        make_trainer(make, classification(make_mlp()), vectors(), SETTINGS["sgd"])


def test_buffers_are_those_of_the_model_of_the_loss():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.net = make_mlp()
            self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

        def forward(self, x):
            return self.net(x) * self.scale

    data, training = vectors(), SETTINGS["sgd"]

    def losses(start, of_loss):
        loss = classification(Scaled(of_loss))
        return train(lambda: Scaled(start), loss, data, subsets(6), [0], training).losses

    assert torch.equal(losses(1.0, 2.0), losses(2.0, 2.0))
    assert not torch.equal(losses(1.0, 2.0), losses(1.0, 1.0))


def test_a_loss_that_is_no_number_is_refused():
    def vector(params, example):
        return params["weight"] * example["x"]

    with pytest.raises(InputError, match=r"one number an example, not of shape \[5\]"):
        train({"weight": torch.ones(5).double()}, vector, vectors(), subsets(6), [0], SETTINGS["sgd"])


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows"):
        make_trainer({"w": torch.ones(1)}, lambda p, e: p["w"].sum(), [], SETTINGS["sgd"])
