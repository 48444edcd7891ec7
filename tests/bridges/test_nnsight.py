"""A model in a wrapper of nnsight is attributed as the model itself, under its own names."""

from types import SimpleNamespace

import pytest
import torch
from bridged import imported
from tiny import make_tokenizer

import gradfn as gf
from gradfn.bridges.nnsight import module
from gradfn.errors import InputError
from gradfn.subject import refuse_wrapper
from gradfn.testing import models
from gradfn.testing.strategies import randomize

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", ["NNsight", "LanguageModel"])
def test_the_module_in_a_wrapper_is_the_model(kind):
    (nnsight,) = imported("nnsight")
    model = randomize(models._BUILDERS["gpt2"](8, 2, 2, "eager", (True, True), 1), 0)
    options = {"tokenizer": make_tokenizer()} if kind == "LanguageModel" else {}
    wrapper = getattr(nnsight, kind)(model, **options)
    assert module(wrapper) is model
    with pytest.raises(InputError, match=r"gf\.bridges\.nnsight\.module"):
        refuse_wrapper(wrapper)
    rows = gf.make_documents([[1, 2, 3], [4, 5]])
    scores = gf.score(module(wrapper), rows, rows, method=gf.grad_dot(), by_block=True)
    assert "transformer.h.0.mlp.c_fc" in scores.shares
    assert wrapper.transformer.h[0].mlp.c_fc.path.endswith("transformer.h.0.mlp.c_fc")


def test_what_is_around_no_module_is_refused():
    with pytest.raises(InputError, match="a SimpleNamespace is around no torch module"):
        module(SimpleNamespace(_module=3))
    assert isinstance(module(SimpleNamespace(_model=torch.nn.Linear(1, 1))), torch.nn.Linear)
