import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from gradfn.model.fingerprint import model_fingerprint


@pytest.mark.parametrize(
    "kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool]
)
def test_any_single_value_changes_the_fingerprint(kind):
    layer = nn.Module()
    layer.register_buffer("weight", torch.ones(3, 5).to(kind))
    seen = {model_fingerprint(layer)}
    for position in range(15):
        changed = torch.ones(3, 5).to(kind)
        changed.view(-1)[position] = 0
        layer.weight = changed
        seen.add(model_fingerprint(layer))
    assert len(seen) == 16


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
def test_a_weight_of_the_other_sign_changes_the_fingerprint(kind):
    layer = nn.Module()
    layer.register_buffer("weight", torch.randn(4, 8).to(kind))
    before = model_fingerprint(layer)
    layer.weight.neg_()
    assert model_fingerprint(layer) != before


def naive_fingerprint(model):
    """Of one block a tensor, of 4 bytes a value."""
    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        words = np.frombuffer(values.numpy().tobytes(), "<i4").tolist()
        total = sum((2 * place + 1) * word for place, word in enumerate(words)) % 2**64
        digest.update(total.to_bytes(8, "little"))
    modules = [[name, type(one).__name__, one.extra_repr()] for name, one in model.named_modules()]
    digest.update(json.dumps([modules, None]).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_fingerprint_is_the_sum_that_it_says(kind):
    layer = nn.Linear(7, 5, dtype=kind)
    assert model_fingerprint(layer) == naive_fingerprint(layer)


def test_the_smallest_change_far_inside_a_large_weight():
    layer = nn.Linear(300, 500)
    before = model_fingerprint(layer)
    with torch.no_grad():
        layer.weight[400, 123] = torch.nextafter(layer.weight[400, 123], torch.tensor(9.0))
    assert model_fingerprint(layer) != before


def test_two_values_that_trade_places():
    layer = nn.Linear(300, 500)
    before = model_fingerprint(layer)
    with torch.no_grad():
        layer.weight[[0, 1]] = layer.weight[[1, 0]]
    assert model_fingerprint(layer) != before


def test_names_shapes_types_and_ties_enter_the_fingerprint():
    def two(tie=False, bias=False, shape=(4, 4), kind=torch.float32, **names):
        model = nn.Module()
        for name in names or ("a", "b"):
            model.add_module(name, nn.Linear(*shape, bias=bias, dtype=kind))
            model.get_submodule(name).weight.data.fill_(1)
        if tie:
            model.b.weight = model.a.weight
        return model_fingerprint(model)

    variants = [
        two(),
        two(tie=True),
        two(bias=True),
        two(shape=(2, 8)),
        two(kind=torch.float64),
        two(a=1, c=1),
    ]
    assert len(set(variants)) == len(variants)
    assert two() == two()


def test_only_saved_buffers_enter_the_fingerprint():
    norm = nn.BatchNorm1d(2)
    before = model_fingerprint(norm)
    norm.running_mean += 1
    assert model_fingerprint(norm) != before
    module = nn.Module()
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    before = model_fingerprint(module)
    module.scratch += 1
    assert model_fingerprint(module) == before


def test_memory_layout_does_not_enter_the_fingerprint():
    plain, turned = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
    turned.weight = nn.Parameter(plain.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()
    assert model_fingerprint(plain) == model_fingerprint(turned)


@pytest.mark.parametrize("value", [torch.zeros(0), torch.tensor(3.0), torch.ones(2, dtype=torch.complex64)])
def test_odd_tensors_have_a_fingerprint(value):
    module = nn.Module()
    module.register_buffer("x", value)
    assert len(model_fingerprint(module)) == 16


@pytest.mark.parametrize(("one", "other"), [
    (lambda: nn.LayerNorm(4), lambda: nn.LayerNorm(4, eps=1e-3)),
    (lambda: nn.Conv1d(2, 2, 3), lambda: nn.Conv1d(2, 2, 3, padding=1)),
    (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()), lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU())),
    (lambda: nn.GELU(), lambda: nn.GELU("tanh")),
])  # fmt: skip
def test_what_modules_do_beside_their_weights_enters_the_fingerprint(one, other):
    prints = []
    for make in (one, one, other):
        torch.manual_seed(0)
        prints.append(model_fingerprint(make()))
    assert prints[0] == prints[1] != prints[2]
