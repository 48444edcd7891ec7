import pytest
import torch
import torch.nn.functional as F
from tiny import MeanOfTokens, classes_of
from torch import nn
from train_problems import (
    OPTIMIZERS,
    ROWS,
    SETTINGS,
    assert_trained,
    classification,
    loop,
    problem,
    subsets,
    vectors,
)

from gradfn.errors import InputError
from gradfn.model.losses import model_loss
from gradfn.model.params import params_of
from gradfn.testing.strategies import randomize
from gradfn.train import (
    Training,
    make_trainer,
    train,
)


@OPTIMIZERS
@pytest.mark.parametrize("sizes", [(6, 6, 6), (7, 4, 9)], ids=["alike", "unequal"])
@pytest.mark.parametrize("kind", ["mlp", "convnet", "gpt2", "gpt_neox"])
def test_stacked_training_is_the_loop_of_torch_optim(kind, training, sizes):
    make, loss, naive, data = problem(kind)
    masks, seeds = subsets(*sizes), [3, 1, 3]
    trainer = make_trainer(make, loss, data, training)
    assert trainer.looped is None
    assert_trained(trainer.train(masks, seeds), *loop(make, naive, data, masks, seeds, training))


def test_a_trajectory_does_not_change_what_it_yielded():
    make, loss, _, data = problem("mlp")
    trainer = make_trainer(make, loss, data, SETTINGS["adam"])
    steps = trainer.trajectory(subsets(6, 6), [0, 1])
    first = next(steps)
    copy = first.state.params["0.weight"].clone()
    assert len(list(steps)) == 3
    assert torch.equal(first.state.params["0.weight"], copy)


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


@pytest.mark.parametrize(("masks", "seeds", "says"), [
    (subsets(3, 5), [0, 1], "a batch of 4 is larger than the smallest subset, of 3 rows"),
    (subsets(0, 5), [0, 1], "subset 0 has no rows"),
    (subsets(5, 5), [0], "of the 11 rows for each of the 1 seeds, got 2"),
    (subsets(5, rows=9), [0], "of 9 rows"),
])  # fmt: skip
def test_subsets_that_do_not_fit_are_refused(masks, seeds, says):
    make, loss, _, data = problem("mlp")
    with pytest.raises(InputError, match=says):
        train(make, loss, data, masks, seeds, SETTINGS["sgd"])


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_no_models_is_refused(chunk):
    make, loss, _, data = problem("mlp")
    with pytest.raises(InputError, match=f"chunk must be 1 or more models at a time, not {chunk}"):
        train(make, loss, data, subsets(6), [0], SETTINGS["sgd"], chunk=chunk)


def test_where_padding_changes_a_row_models_train_on_unpadded_rows():
    def make():
        return randomize(MeanOfTokens(), int(torch.randint(1000, ())))

    def naive(model, row):
        return F.cross_entropy(model(row["input_ids"][None]).logits[0], row["labels"])

    data, masks = classes_of([5, 9, 33, 9, 5, 20, 7, 5, 9, 6, 40]), subsets(6, 5)
    trainer = make_trainer(make, model_loss(make(), "classification"), data, SETTINGS["adam"])
    assert trainer.looped == "padding would change their rows"
    assert_trained(trainer.train(masks, [0, 1]), *loop(make, naive, data, masks, [0, 1], SETTINGS["adam"]))
