"""gradfn behind Captum's interface gives what Captum's TracInCP gives, in float64."""

import pytest
import torch
from bridged import imported
from torch import nn

import gradfn as gf
from gradfn.errors import InputError
from gradfn.testing.strategies import randomize

(influence,) = imported("captum.influence")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pair(problem, tmp_path):
    """TracInCP and gradfn at the same two checkpoints, with learning rates of their own."""
    rates, paths = {}, []
    for number, rate in enumerate((0.1, 0.03)):
        path = tmp_path / f"{number}.pt"
        torch.save(randomize(problem.net, number).state_dict(), path)
        rates[str(path)] = rate
        paths.append(str(path))

    def load(net, path):
        net.load_state_dict(torch.load(path, weights_only=True))
        return rates[path]

    theirs = influence.TracInCP(
        problem.net, problem.train, paths, load, loss_fn=nn.CrossEntropyLoss(reduction="none"), batch_size=5
    )
    ours = gf.bridges.captum.Influence(
        problem.net, problem.train, nn.CrossEntropyLoss(), checkpoints=paths, checkpoints_load_func=load
    )
    return theirs, ours


def test_influence_is_that_of_tracincp(pair, problem):
    theirs, ours = pair
    expected = theirs.influence(problem.queries)
    assert expected.dtype == torch.float64
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours.influence(problem.queries), expected, rtol=1e-10, atol=1e-12)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*problem.queries), batch_size=4)
    torch.testing.assert_close(ours.influence(loader), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("proponents", [True, False])
def test_the_best_rows_are_those_of_tracincp(pair, problem, proponents):
    theirs, ours = (one.influence(problem.queries, k=4, proponents=proponents) for one in pair)
    assert ours._fields == theirs._fields
    torch.testing.assert_close(ours.indices, theirs.indices)
    torch.testing.assert_close(ours.influence_scores, theirs.influence_scores, rtol=1e-10, atol=1e-12)


def test_self_influence_is_that_of_tracincp(pair, problem):
    theirs, ours = pair
    torch.testing.assert_close(ours.self_influence(), theirs.self_influence(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.self_influence(problem.queries), theirs.self_influence(problem.queries))


def test_it_is_a_data_influence_of_any_method(problem):
    ours = gf.bridges.captum.Influence(problem.net, problem.train, nn.CrossEntropyLoss(), method="ekfac")
    assert isinstance(ours, influence.DataInfluence)
    assert ours.get_name() == "Influence"
    assert ours.influence(problem.queries).shape == (6, 24)
    with pytest.raises(InputError, match="unpack_inputs"):
        ours.influence(problem.queries, unpack_inputs=False)


def test_a_network_of_images_has_the_same_numbers(tmp_path):
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(9, 1, 6, 6, generator=draw).double(), torch.arange(9) % 3
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    train = torch.utils.data.TensorDataset(images, labels)
    torch.save(randomize(net, 0).state_dict(), path := str(tmp_path / "net.pt"))

    def load(net, path):
        net.load_state_dict(torch.load(path, weights_only=True))
        return 1.0

    theirs = influence.TracInCP(net, train, [path], load, loss_fn=nn.CrossEntropyLoss(reduction="none"))
    ours = gf.bridges.captum.Influence(
        net, train, nn.CrossEntropyLoss(), view=gf.View(include=["*"]), checkpoints=[path],
        checkpoints_load_func=load,
    )  # fmt: skip
    expected = theirs.influence((images[:2], labels[:2]))
    torch.testing.assert_close(ours.influence((images[:2], labels[:2])), expected)
