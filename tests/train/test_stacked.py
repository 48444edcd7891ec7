import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from train_problems import (
    SETTINGS,
    assert_trained,
    classification,
    loop,
    make_mlp,
    problem,
    sequences,
    subsets,
    vectors,
)

from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.model.params import params_of
from gradfn.train import (
    losses_of,
    make_trainer,
    stacked_losses,
    table_of,
    train,
)


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


OWN = nn.Linear(5, 1).double()


def vector(params, example):
    return params["weight"] * example["x"]


@pytest.mark.parametrize(("loss", "says"), [
    (vector, r"one number an example, not of shape \[5\]: reduce it"),
    (lambda p, e: vector(p, e)[:1], r"one number an example, not of shape \[1\]"),
    (lambda p, e: (vector(p, e).sum(), e["x"]), "one number an example, a tensor, and not a tuple"),
    (lambda p, e: vector(p, e).sum() * 1j, "one number an example, and not complex"),
    (lambda p, e: OWN(e["x"]).sum(), "the loss does not depend on its `params`: .*functional_call"),
    (lambda p, e: vector(p, e).sum().detach(), "the loss does not depend on its `params`"),
    (lambda p, e: vector(p, e).argmax(), "the loss does not depend on its `params`"),
    (lambda p, e: 1.0, "one number an example, a tensor, and not a float"),
])  # fmt: skip
def test_a_loss_that_is_no_number_or_no_function_of_the_parameters_is_refused(loss, says):
    with pytest.raises(InputError, match=says):
        train({"weight": torch.ones(5).double()}, loss, vectors(), subsets(6), [0], SETTINGS["sgd"])


def test_rows_that_are_no_examples_are_refused():
    tuples = [(row["x"], 1) for row in vectors()]
    numbers = [{**row, "y": 1} for row in vectors()]
    start = {"weight": torch.ones(5).double()}
    for rows, says in (
        (tuples, "row 0 is a tuple: give each example as a dict"),
        (numbers, "'y' is a int, not"),
    ):
        with pytest.raises(InputError, match=says):
            train(start, lambda p, e: vector(p, e).sum(), rows, subsets(6), [0], SETTINGS["sgd"])
