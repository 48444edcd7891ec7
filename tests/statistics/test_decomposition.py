import pytest
import torch
from torch import nn

import gradfn as gf
from gradfn.engine.engine import probe_engine
from gradfn.errors import InputError
from gradfn.linalg import spectrum
from gradfn.statistics import ekfac, eshampoo, kfac, second_moment, shampoo, tkfac
from gradfn.statistics.fold import fit_sums, state_bytes
from gradfn.transforms import chain, unit_normalize
from gradfn.transforms.joint import joint


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def loss_of(net):
    return lambda params, e: torch.func.functional_call(net, params, e["x"]).square().sum()


def rows():
    return [{"x": torch.randn(4, dtype=torch.float64)} for _ in range(5)]


@pytest.mark.parametrize("fold", [second_moment, kfac, ekfac, shampoo, eshampoo])
def test_eigenvalues_that_do_not_converge(net, monkeypatch, fold):
    def fails(matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(spectrum, "eigh_float64", fails)
    words = r"^the eigenvalues of the curvature of 0 do not converge: exclude that layer"
    with pytest.raises(InputError, match=words):
        gf.fit(fold(), net, rows(), loss=loss_of(net))


@pytest.mark.parametrize("before", [chain(), chain(unit_normalize()), chain(joint())])
@pytest.mark.parametrize("fold", [second_moment, shampoo])
def test_the_memory_told_is_that_of_the_sums(net, before, fold):
    whole = chain(before, fold().stage())
    engine = probe_engine(net, loss_of(net), whole)
    sums = fit_sums(fold(), net, rows(), before, loss=loss_of(net))
    kept = {name: total.numel() * 8 for name, total in sums.blocks.items()}  # and a batch's, as wide
    assert state_bytes(fold(), engine) == {name: 2 * size for name, size in kept.items()}


def test_a_joint_curvature_that_does_not_fit_is_refused(net, monkeypatch):
    monkeypatch.setattr("gradfn.memory.free_memory", lambda device: 1 << 20)
    wide = nn.Sequential(nn.Linear(150, 150), nn.Linear(150, 2))
    data = [{"x": torch.ones(150)}]
    monkeypatch.setattr(type(second_moment()), "few_numbers", 1 << 20)
    with pytest.raises(InputError, match=r"the sums of SecondMoment take \d+\.\d GiB and 0\.0 GiB are free"):
        gf.fit(second_moment(), wide, data, joint(), loss=loss_of(wide))


@pytest.mark.parametrize("fold", [kfac, tkfac, ekfac])
def test_layers_that_read_the_same_input_are_decomposed_once(monkeypatch, fold):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, out, dtype=torch.float64) for out in (3, 2, 2))

        def forward(self, x):
            return torch.cat([self.q(x), self.k(x), self.v(x)])

    net, data, solved, eigh = Reads(), rows(), [], spectrum.eigh_float64
    monkeypatch.setattr(
        spectrum, "eigh_float64", lambda matrix: (solved.append(len(matrix)), eigh(matrix))[1]
    )
    H = gf.fit(fold(), net, data, loss=loss_of(net))
    shared = fold is not tkfac  # whose A is weighted by the layer's own output gradient
    assert solved.count(5) == (1 if shared else 3)
    for name in ("q", "k", "v"):
        alone = gf.fit(fold(), net, data, loss=loss_of(net), view=gf.View(include=[name]))
        torch.testing.assert_close(H[name].dense(), alone[name].dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lower_triangle_is_read_and_the_matrix_left_alone(dtype):
    torch.manual_seed(0)
    x = torch.randn(20, 12, dtype=dtype)
    whole = x.T @ x
    given = whole.tril() + torch.randn(12, 12, dtype=dtype).triu(1)
    for matrix in (given, given.mT.contiguous().mT):  # by rows and by columns in memory
        before = matrix.clone()
        values, vectors = spectrum.eigh(matrix)
        assert torch.equal(matrix, before)
        made = vectors.double() @ torch.diag(values) @ vectors.double().T
        torch.testing.assert_close(made, whole.tril().double() + whole.tril(-1).T.double(), rtol=0, atol=2e-5)
