"""Every kind of layer, once and called twice, under random chains and both forms of a loss."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from gradfn.testing import check_layer
from tests.engine.test_conformance import CASES


def inputs(shape):
    """The shape itself, or a strategy of token ids."""
    if shape[0] != "ids":
        return shape
    size = shape[1]
    return st.lists(st.integers(0, 5), min_size=size, max_size=size).map(torch.tensor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_holds_the_laws_of_layers(case):
    chosen = CASES[case]
    many = settings.default.max_examples // 2
    check_layer(
        chosen.make, inputs(chosen.shape), probed=chosen.probed, max_examples=many,
        tolerance=max(1e-8, chosen.tolerance),
    )  # fmt: skip
