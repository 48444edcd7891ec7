"""Metagradients of adapters on a frozen model, and of rows that hold several documents."""

from dataclasses import replace

import pytest
import torch
from tiny import language_model

from gradfn.data import make_documents
from gradfn.model.losses import causal_lm_loss
from gradfn.random import normals
from gradfn.testing.strategies import randomize
from gradfn.train import Training, metagradient
from gradfn.train.course import Course

ROWS = [[1, 2, 3, 4], [4, 5, 6, 7, 8], [2, 2, 3]]
TRAINING = Training(1, 2, 0.05, "adamw", eps=1e-2, weight_decay=0.1)


def normal(size, key="v"):
    return torch.from_numpy(normals(size, "test", key))


def slope(course, start, queries, v, h=1e-5):
    """Minus the central difference of the queries' losses along v in the weights."""

    def end(weights):
        *_, last = replace(course, weights=weights).steps(course.start(start))
        return course.row_losses(last.state.params, queries)

    return -(end(1 + h * v) - end(1 - h * v)) / (2 * h)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_on_a_frozen_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query_key_value", "dense"], init_lora_weights=False)
    model = randomize(peft.get_peft_model(language_model("gpt_neox"), config), 0)
    start = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert start
    assert all("lora_" in name for name in start)
    data = make_documents(ROWS)
    course, v = Course(causal_lm_loss(model), data, TRAINING), normal(3)
    made = metagradient(course, start, data)
    assert list(made.start) == list(start)
    torch.testing.assert_close(v @ made.values, slope(course, start, data, v), rtol=0, atol=1e-8)
    assert made.values.abs().max() > 1e-6


def test_a_token_at_a_boundary_belongs_to_the_document_that_it_begins():
    model = language_model("gpt2")
    packed = make_documents([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1]])  # the first holds two documents of three
    course = Course(causal_lm_loss(model), packed, replace(TRAINING, batch_size=1))
    start = {name: p.detach() for name, p in model.named_parameters()}
    queries = make_documents([[4, 5, 6]])
    tokens = metagradient(course, start, queries, per="token").values[:, 0]
    unlearned = make_documents(
        [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1]], labels=[[1, 2, 3, -100, 5, 6], [7, 8, 9, 1]]
    )
    without = metagradient(replace(course, data=unlearned), start, queries, per="token").values[:, 0]
    assert tokens[3] != 0
    assert without[3] == 0
    assert bool((without[[1, 2, 4, 5]] != 0).all())
