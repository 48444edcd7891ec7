"""Rows that are tuples and losses of outputs give what a plain loop over rows gives."""

import sys

import pytest
import torch
import torch.nn.functional as F

import gradfn as gf
from gradfn.bridges.supervised import Rows, SupervisedLoss, attributed, package, rows_of
from gradfn.errors import InputError


def test_scores_are_products_of_plain_gradients(problem):
    made = attributed(problem.net, problem.train, F.cross_entropy, gf.grad_dot())
    rows, queries = problem.gradients(*problem.train.tensors), problem.gradients(*problem.queries)
    torch.testing.assert_close(made.scores(rows_of(problem.queries)), queries @ rows.T)
    torch.testing.assert_close(made.self_influence(), rows.square().sum(1))
    torch.testing.assert_close(made.self_influence(rows_of(problem.queries)), queries.square().sum(1))


def test_checkpoints_are_summed_with_their_weights(problem):
    shift, expected = {"a": 0.0, "b": 0.3}, 0.0

    def load(net, name):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += shift[name]
        return 0.5 if name == "a" else None

    before = [parameter.clone() for parameter in problem.net.parameters()]
    made = attributed(problem.net, problem.train, F.cross_entropy, gf.grad_dot(), ["a", "b"], load)
    scores = made.scores(rows_of(problem.queries))
    assert all(map(torch.equal, before, problem.net.parameters()))
    for name, weight in (("a", 0.5), ("b", 1.0)):
        load(problem.net, name)
        rows, queries = problem.gradients(*problem.train.tensors), problem.gradients(*problem.queries)
        expected = expected + weight * queries @ rows.T
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_of_a_batch_is_that_of_each_row(problem, reduction):
    loss = SupervisedLoss(problem.net, torch.nn.CrossEntropyLoss(reduction=reduction))
    rows = Rows(problem.train)
    batch = gf.data.collate([rows[row] for row in range(len(rows))])
    alone = [loss(dict(problem.net.named_parameters()), rows[row]) for row in range(len(rows))]
    torch.testing.assert_close(loss.batched(batch), torch.stack(alone))


def test_a_cosine_of_a_row_with_itself_is_one(problem):
    made = attributed(problem.net, problem.train, F.cross_entropy, gf.grad_cosine())
    torch.testing.assert_close(made.self_influence(), torch.ones(len(problem.train)).double())


def test_a_method_by_its_name_is_fitted_once(problem, monkeypatch):
    made = attributed(problem.net, problem.train, F.cross_entropy, "ekfac")
    whole = made.scores(rows_of(problem.queries))
    fits = []
    monkeypatch.setattr("gradfn.bridges.supervised.over_checkpoints", lambda *a, **k: fits.append(a))
    halves = [made.scores(rows_of([part[at] for part in problem.queries])) for at in (range(3), range(3, 6))]
    torch.testing.assert_close(torch.cat(halves), whole)
    assert not fits


def test_what_other_packages_give_is_taken(problem):
    batches = torch.utils.data.DataLoader(problem.train, batch_size=7)
    assert len(rows_of(batches)) == len(problem.train)
    assert rows_of({"x": torch.ones(2, 3), "labels": [0, 1]})[1]["labels"] == 1
    assert Rows([{"x": [1.0, 2.0]}])[0]["x"].shape == (2,)
    assert [*Rows([{"input_ids": [1, 2], "idx": 3, "text": "a b", "labels": 0}])[0]] == [
        "input_ids",
        "labels",
    ]


def test_what_does_not_fit_is_refused(problem):
    with pytest.raises(InputError, match="give rows that are tuples"):
        Rows([torch.ones(2)])[0]
    with pytest.raises(InputError, match="give as many inputs as labels"):
        rows_of((torch.ones(3, 2), torch.zeros(2)))
    with pytest.raises(InputError, match="give both, or neither"):
        attributed(problem.net, problem.train, F.cross_entropy, "ekfac", ["a"])
    for name, remedy in (("trackstar", "gf.trackstar"), ("less", "gf.grad_cosine")):
        with pytest.raises(InputError, match=remedy):
            attributed(problem.net, problem.train, F.cross_entropy, name)


@pytest.mark.parametrize("name", ["quanda", "captum"])
def test_a_package_that_is_missing_is_told(name, monkeypatch, problem):
    for module in (name, f"{name}.influence"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {name}"):
        package(name)
    made = {"quanda": gf.bridges.quanda.Explainer, "captum": gf.bridges.captum.Influence}[name]
    with pytest.raises(InputError, match=f"pip install {name}"):
        made(problem.net, problem.train, loss_fn=F.cross_entropy)
