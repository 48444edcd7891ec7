"""All that computes, on a second device: nothing mixes devices, and the numbers are those of the CPU.

Forward mode is not tested: for a device that it does not know PyTorch takes other ways, which mix devices.
"""

import copy

import elsewhere
import pytest
import torch
import torch.nn.functional as F
from tiny import language_model
from torch import nn
from torch.func import functional_call

import gradfn as gf
from gradfn.data import make_documents
from gradfn.model.params import params_of
from gradfn.testing.strategies import randomize
from gradfn.train import Training, metagradient, metasmoothness, train
from gradfn.train.course import Course, Valuing
from gradfn.train.watched import fast_values
from gradfn.transforms.joint import joint

DOCUMENTS = make_documents([[1, 2, 3, 4, 1], [2, 3, 1], [3, 1, 2, 2, 1, 4], [5, 4, 3, 1], [2, 2, 6]])
QUERIES = make_documents([[4, 1, 2], [3, 3, 1, 2]])


def sides(model):
    """The model on the CPU and on the other device."""
    other = copy.deepcopy(model).to(elsewhere.NAME)
    if hasattr(other, "tie_weights"):
        other.tie_weights()  # a device that PyTorch does not know gets new parameters
    return model, other


def assert_alike(one, other):
    """Numbers of both sides, in whatever they are in; those of the other side may have come back."""
    flat, others = (torch.utils._pytree.tree_leaves(value) for value in (one, other))
    assert len(flat) == len(others) > 0
    for a, b in zip(flat, others, strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(b.detach().cpu(), a.detach().cpu(), rtol=1e-9, atol=1e-12)


def of(family="gpt2"):
    return randomize(language_model(family), 0)


def test_tensors_of_two_devices_do_not_mix():
    there = torch.ones(3, device=elsewhere.NAME)
    with pytest.raises(RuntimeError, match="elsewhere:0 and cpu in aten"):
        there + torch.ones(3)
    assert_alike(torch.ones(3) * 2 + 1, there * 2 + torch.tensor(1.0))
    assert (there + there).device.type == elsewhere.NAME


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize(
    "transform", [None, gf.project(4), gf.chain(gf.project(4), gf.unit_normalize()), gf.project(16, "sjlt"),
                  gf.chain(joint(), gf.project(8))], ids=str
)  # fmt: skip
def test_gradients(family, transform):
    one, other = (gf.collect(model, DOCUMENTS, transform) for model in sides(of(family)))
    assert_alike(one, other)


def test_a_network_of_many_kinds_of_layers():
    net = randomize(nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
        nn.LayerNorm(3),
    ), 0)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(2, 4, 4, generator=generator).double(), "y": torch.tensor(n % 3)} for n in range(5)
    ]

    def loss_of(module):
        return lambda p, e: F.cross_entropy(functional_call(module, p, (e["x"][None],)), e["y"][None])

    assert_alike(*(gf.collect(model, data, gf.project(3), loss=loss_of(model)) for model in sides(net)))


@pytest.mark.parametrize("by", ["tokens", "heads"])
def test_views(by):
    view = gf.View(tokens=True) if by == "tokens" else gf.View(heads=True)
    assert_alike(*(gf.collect(model, DOCUMENTS, view=view) for model in sides(of())))


@pytest.mark.parametrize("fold", ["second_moment", "kfac", "ekfac", "shampoo", "eshampoo", "tkfac"])
def test_curvatures(fold):
    made = []
    for model in sides(of()):
        H, G = gf.fit(getattr(gf.statistics, fold)(), model, DOCUMENTS), gf.collect(model, DOCUMENTS)
        made.append(gf.transforms.precondition(H, 0.1)(G))
    assert_alike(*made)


METHODS = ("grad_dot", "grad_cosine", "less", "trackstar", "grass", "kfac", "relatif", "datainf")


@pytest.mark.parametrize("method", METHODS)
def test_methods(method):
    one, other = (gf.score(model, DOCUMENTS, QUERIES, method=method) for model in sides(of()))
    assert_alike(one.matrix, other.matrix)


def test_self_influence_and_labels():
    models = sides(of())
    assert_alike(*(gf.score(model, DOCUMENTS, None, method="kfac").matrix for model in models))
    drawn = [gf.statistics.sample_labels(gf.causal_lm_loss(model), DOCUMENTS) for model in models]
    assert_alike(*(dict(labelled[2]) for labelled in drawn))


def test_a_store_is_written_and_searched(tmp_path):
    found, fitted = [], []
    for name, model in zip(("one", "other"), sides(of()), strict=True):
        gf.build(tmp_path / name, model, DOCUMENTS, gf.project(4))
        found.append(gf.query(tmp_path / name, model, QUERIES).matrix)
        H = gf.runs.hessian(tmp_path / name, model, DOCUMENTS, gf.second_moment(), gf.project(4))
        fitted.append(gf.transforms.precondition(H, 0.1)(gf.collect(model, QUERIES, gf.project(4))))
    assert_alike(*found)
    assert_alike(*fitted)


TRAININGS = {
    "sgd": Training(2, 2, 0.05, "sgd", momentum=0.5, max_grad_norm=0.5),
    "adamw": Training(2, 2, 0.01, "adamw", eps=1e-4, weight_decay=0.1, schedule="cosine", warmup=1),
    "muon": Training(2, 2, 0.01, "muon", momentum=0.9, nesterov=True, eps=1e-4),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_and_back(name):
    made = []
    for model in sides(of()):
        start = {n: p.clone() for n, p in params_of(model).items()}
        course = Course(gf.causal_lm_loss(model), DOCUMENTS, TRAININGS[name])
        found = metagradient(course, start, QUERIES)
        made.append((found.values, found.end.params))
    assert_alike(*made)


def test_values_in_the_run():
    made = []
    for model in sides(of()):
        loss, start = gf.causal_lm_loss(model), dict(params_of(model))
        course = Course(loss, DOCUMENTS, TRAININGS["adamw"], valuing=Valuing(QUERIES, loss))
        with fast_values(course, model) as valued:
            made.append([one.values for one in valued.steps(valued.start(start))])
    assert_alike(*([torch.from_numpy(one) for one in values] for values in made))


def test_retraining_many_models_and_smoothness():
    masks = torch.ones(3, len(DOCUMENTS), dtype=torch.bool)
    masks[1, 0] = masks[2, 3] = False
    made = []
    for model in sides(of()):
        start = {n: p.clone() for n, p in params_of(model).items()}
        loss = gf.causal_lm_loss(model)
        trained = train(start, loss, DOCUMENTS, masks, [0, 0, 0], TRAININGS["adamw"], chunk=3)
        smooth = metasmoothness(Course(loss, DOCUMENTS, TRAININGS["sgd"]), start, QUERIES, directions=1)
        made.append((trained.params, trained.losses, torch.tensor(smooth.agreement)))
    assert_alike(*made)
