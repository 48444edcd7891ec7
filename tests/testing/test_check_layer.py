"""A module whose gradient the engine does not see rightly is refused, with its smallest case."""

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from gradfn.errors import InputError
from gradfn.testing import BrokenLawError, chain_difference, check_layer, difference
from gradfn.transforms import project

IDS = st.lists(st.integers(0, 5), min_size=4, max_size=4).map(torch.tensor)


@pytest.mark.parametrize(("make", "inputs"), [
    (lambda: nn.Linear(3, 2), (3,)),
    (lambda: nn.Linear(3, 3, bias=False), (2, 3)),
    (lambda: nn.Embedding(6, 3), IDS),
    (lambda: nn.Conv1d(2, 4, 3, groups=2, padding=1), (2, 5)),
    (lambda: nn.LayerNorm(4), (3, 4)),
], ids=["linear", "no bias", "embedding", "convolution", "norm"])  # fmt: skip
def test_layers_that_hold(make, inputs):
    check_layer(make, inputs, max_examples=5)


class Crosstalk(nn.Linear):
    """Subtracts the mean over the batch, so that a row's loss depends on the others."""

    def forward(self, x):
        y = super().forward(x)
        return y - y.mean(0) / 2


class Forgotten(nn.Linear):
    """A layer that says it is linear and is not: the probe sees an input that the weight never saw."""

    def forward(self, x):
        return super().forward(x.tanh())


@pytest.mark.parametrize("make", [lambda: Crosstalk(3, 2), lambda: Forgotten(3, 2)])
def test_a_broken_layer_is_refused(make):
    with pytest.raises(
        BrokenLawError, match=r"probe of root does not give the naive gradient|is not a loop of autograd"
    ) as e:
        check_layer(make, (3,), max_examples=5)
    assert "module: Linear(3, 2)" in str(e.value)
    assert "rows 1:" in str(e.value)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(InputError, match="the module has no parameters"):
        check_layer(nn.Tanh, (3,))


def test_what_cancels_is_rounding_and_what_does_not_is_compared():
    dense = {"a": torch.tensor([[[1e3], [-1e3]]], dtype=torch.float64)}
    seed = next(s for s in range(99) if not project((1, 1), seed=s)(dense)["a"].any())  # both signs alike
    off = {"a": torch.full((1, 1, 1), 1e-11, dtype=torch.float64)}
    assert difference(off, project((1, 1), seed=seed)(dense))
    assert not chain_difference(off, project((1, 1), seed=seed), dense)
    other = next(s for s in range(99) if project((1, 1), seed=s)(dense)["a"].any())
    assert "off by 2e+03" in chain_difference(off, project((1, 1), seed=other), dense)
