import pytest
import torch
from torch import nn

from gradfn.engine.reference import per_example_grads
from gradfn.model.params import params_of
from gradfn.testing import assert_blocks_close
from gradfn.testing.strategies import randomize, squared_error


def test_params_are_detached_views_of_the_models_own():
    net = nn.Linear(2, 1)
    params = params_of(net)
    assert not any(value.requires_grad for value in params.values())
    assert params["weight"].data_ptr() == net.weight.data_ptr()


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_grads_are_those_of_each_examples_own_loss(chunk_size):
    net = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "x": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "y": torch.randn(5, 2, generator=generator, dtype=torch.float64),
    }
    grads = per_example_grads(squared_error(net), params_of(net), batch, chunk_size=chunk_size)
    for row in range(5):
        loss = (net(batch["x"][row]) - batch["y"][row]).square().sum()
        expected = torch.autograd.grad(loss, list(net.parameters()))
        for name, value in zip(params_of(net), expected, strict=True):
            assert_blocks_close(grads[name][row], value, 1e-12)


def test_any_mapping_will_do_as_a_batch():
    from transformers import BatchEncoding

    grads = per_example_grads(
        lambda p, e: (p["w"] * e["x"]).sum(), {"w": torch.ones(2)}, BatchEncoding({"x": torch.eye(2)})
    )
    assert torch.equal(grads["w"], torch.eye(2))
