"""Selective masks, against brute force and plain formulas."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import gradfn as gf
from gradfn.errors import InputError
from gradfn.statistics.mask import MaskSearch, correlations, fit_mask, selective_mask
from gradfn.transforms.fitted import selected


def blocks(rows, out, into, seed=0):
    return torch.randn(rows, out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(G, Q, index):
    """The mean correlation of inner products over some coordinates with those over all, by numpy."""
    G, Q = G.flatten(1).numpy(), Q.flatten(1).numpy()
    before, after = G @ Q.T, G[:, index] @ Q[:, index].T
    return np.mean([np.corrcoef(before[:, q], after[:, q])[0, 1] for q in range(len(Q))])


def test_correlations_are_those_of_numpy():
    a, b = torch.randn(2, 9, 4, dtype=torch.float64)
    expected = [np.corrcoef(a[:, q], b[:, q])[0, 1] for q in range(4)]
    torch.testing.assert_close(correlations(a, b), torch.tensor(expected, dtype=torch.float64))
    for constant in (1.0, 0.1, 0.3):  # the mean of equal numbers may be another one
        assert correlations(torch.full((20, 1), constant), torch.rand(20, 1)).tolist() == [0.0]
        assert correlations(torch.full((20, 1), constant), torch.full((20, 1), 0.7)).tolist() == [0.0]


def test_a_mask_of_equal_rows_keeps_nothing():
    rows = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(0)).expand(20, 30, 40)
    _, reports = fit_mask({"a": rows.contiguous()}, {"a": blocks(4, 30, 40).float()}, 9)
    assert reports["a"].kept == reports["a"].random == 0.0


@pytest.mark.parametrize("exponents", [(80, 80), (-80, -60), (80, -110)])
def test_a_mask_does_not_depend_on_the_scale(exponents):
    G, Q = (blocks(*shape).float() for shape in ((20, 3, 6), (4, 3, 6, 1)))
    plain, scaled = (fit_mask({"a": G * 2.0**a}, {"a": Q * 2.0**b}, 4) for a, b in ((0, 0), exponents))
    assert plain[1] == scaled[1]
    assert plain[0].settings() == scaled[0].settings()
    assert plain[1]["a"].kept > plain[1]["a"].random


def test_a_mask_without_training_reports_what_it_keeps():
    G, Q = blocks(40, 2, 5), blocks(6, 2, 5, 1)
    mask, reports = fit_mask({"a": G}, {"a": Q}, 4, search=MaskSearch(steps=0))
    assert reports["a"].kept == pytest.approx(kept(G, Q, mask.chosen["a"][0].tolist()))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_gradients_that_are_not_finite_have_no_mask(value, side):
    sides = blocks(9, 3, 3), blocks(2, 3, 3)
    sides[side][1, 2, 1] = value
    with pytest.raises(InputError, match="a gradient of mlp is NaN or infinite"):
        fit_mask(*({"mlp": G} for G in sides), 4)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_correlations_do_not_depend_on_the_scale(scale):
    a, b = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(correlations(a * scale, b * scale), correlations(a, b))


@pytest.mark.parametrize("seed", range(4))
def test_a_mask_of_the_whole_is_near_the_best_of_all_and_reports_what_it_keeps(seed):
    G, Q = blocks(40, 2, 5, seed), blocks(6, 2, 5, seed + 50)
    mask, reports = fit_mask({"a": G}, {"a": Q}, 4, seed=seed)
    found = mask.chosen["a"][0].tolist()
    every = [kept(G, Q, list(index)) for index in itertools.combinations(range(10), 4)]
    assert reports["a"].kept == pytest.approx(kept(G, Q, found))
    assert reports["a"].kept > np.quantile(every, 0.9)


def test_both_sides_are_chosen_together():
    G, Q = blocks(60, 6, 8), blocks(8, 6, 8, 1)
    strong = torch.zeros(6, 8, dtype=torch.float64)
    strong[torch.tensor([[1], [4]]), torch.tensor([0, 3, 7])] = 1.0
    G, Q = G * (strong + 0.05), Q * (strong + 0.05)
    mask, reports = fit_mask({"a": G}, {"a": Q}, (2, 3))
    assert [part.tolist() for part in mask.chosen["a"]] == [[1, 4], [0, 3, 7]]
    assert mask({"a": G})["a"].shape == (60, 2, 3)
    torch.testing.assert_close(mask({"a": G})["a"], G[:, [1, 4]][:, :, [0, 3, 7]])
    assert reports["a"].kept > 0.9 > reports["a"].random


def test_small_blocks_are_kept_whole():
    rows = {"a": blocks(9, 2, 2), "b": blocks(9, 4, 4)}
    mask, reports = fit_mask(rows, {name: G[:2] for name, G in rows.items()}, 8)
    assert mask.chosen["a"][0].tolist() == [0, 1, 2, 3]
    assert reports["a"].kept == 1.0
    assert len(mask.chosen["b"][0]) == 8


def test_the_seed_decides():
    rows = {"a": torch.ones(9, 3, 3) * torch.randn(9, 1, 1)}
    queries = {"a": rows["a"][:2]}
    first, again, other = (fit_mask(rows, queries, 3, seed=s)[0].settings()["mask"] for s in (0, 0, 1))
    assert first == again != other


def test_layers_that_do_not_fit_together_are_fitted_in_turns(monkeypatch):
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def loss(params, example):
        return functional_call(net, params, example["x"]).square().sum()

    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = [{"x": one} for one in x]
    whole = selective_mask(net, data, data[:4], 7, loss=loss)
    monkeypatch.setattr("gradfn.statistics.mask.free_memory", lambda device: 4 * 4 * 16 * 36)
    parts = selective_mask(net, data, data[:4], 7, loss=loss)
    assert whole[0].settings() == parts[0].settings()
    assert whole[1] == parts[1]
    monkeypatch.setattr("gradfn.statistics.mask.free_memory", lambda device: 4 * 4 * 16 * 20)
    with pytest.raises(InputError, match="use fewer rows"):
        selective_mask(net, data, data[:4], 7, loss=loss)


def test_the_engine_takes_a_mask_on_the_factors():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def loss(params, example):
        return functional_call(net, params, example["x"]).square().sum()

    data = [{"x": torch.randn(6, dtype=torch.float64)} for _ in range(4)]
    full = gf.collect(net, data, loss=loss)
    assert isinstance(full, dict)
    chosen = {name: (torch.tensor([0, 2]), torch.tensor([1, 5])) for name in full}
    mask = selected(chosen, {name: G.shape[1:] for name, G in full.items()})
    made = gf.collect(net, data, mask, loss=loss)
    assert isinstance(made, dict)
    for name, G in full.items():
        torch.testing.assert_close(made[name], G[:, [0, 2]][:, :, [1, 5]])


@pytest.mark.parametrize(("rows", "dims", "words"), [
    (2, 3, "3 rows or more"),
    (9, 0, "must have 1 or more coordinates"),
    (9, 99, "leaves nothing out"),
    (9, (0, 1), "must have 1 or more coordinates"),
])  # fmt: skip
def test_what_cannot_be_fitted_is_refused(rows, dims, words):
    with pytest.raises(InputError, match=words):
        fit_mask({"a": blocks(rows, 3, 3)}, {"a": blocks(2, 3, 3)}, dims)


def test_another_block_is_refused():
    mask = selected({"a": (torch.tensor([0]),)}, {"a": (2, 2)})
    with pytest.raises(InputError, match="no block b"):
        mask({"b": torch.ones(1, 2, 2)})
    with pytest.raises(InputError, match="for a block of 2 x 2, and this one has 2 x 3"):
        mask({"a": torch.ones(1, 2, 3)})
