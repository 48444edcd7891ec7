"""Tiny models and eight documents, one of them with nothing to supervise."""

import numpy as np
import pytest
from tiny import make_model

import gradfn as gf

TRANSFORMS = {
    "full": gf.chain(),
    "projected": gf.project(4),
    "gaussian unit": gf.chain(gf.project(3, "gaussian", seed=7), gf.unit_normalize()),
    "unit": gf.chain(gf.unit_normalize()),
}


@pytest.fixture(params=TRANSFORMS.values(), ids=TRANSFORMS)
def transform(request):
    return request.param


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request):
    return make_model(request.param).requires_grad_(False)


@pytest.fixture(scope="module")
def llama():
    return make_model().requires_grad_(False)


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 300, size).tolist() for size in (5, 3, 9, 1, 4, 7, 2, 6)]
    return gf.make_documents(rows, ids=[f"row {i}" for i in range(8)], texts=[f"text {i}" for i in range(8)])
