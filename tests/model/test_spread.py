"""Models whose parameters are DTensors: run where they can be, and else refused in a sentence."""

import copy

import pytest
import torch
from alone import alone
from tiny import make_model
from torch import nn

import gradfn as gf
from gradfn.model.spread import class_of, own_part, sharding, whole

IDS = [{"input_ids": torch.tensor(row)} for row in ([1, 5, 9, 2, 7], [3, 4, 8])]


@pytest.fixture(scope="module", autouse=True)
def group():
    with alone():
        yield


@pytest.fixture(scope="module")
def plain():
    return make_model().double()


@pytest.fixture(scope="module")
def sharded(plain):
    return gf.model.shard_model(copy.deepcopy(plain))


@pytest.fixture(scope="module")
def planned(plain):
    """A model of which a tensor-parallel plan has split a layer over devices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = copy.deepcopy(plain)
    parallelize_module(
        model, init_device_mesh("cpu", (1,)), {"model.layers.0.mlp.up_proj": ColwiseParallel()}
    )
    return model


@pytest.mark.parametrize(
    "use",
    [
        lambda model: gf.collect(model, IDS, loss=lambda params, example: torch.zeros(())),
        lambda model: gf.tap(model).__enter__(),
        lambda model: gf.model.find_sites(model),
    ],
    ids=["collect", "tap", "find_sites"],
)
def test_a_tensor_parallel_plan_is_refused(planned, use):
    with pytest.raises(
        gf.InputError, match=r"LlamaForCausalLM are DTensors that a tensor-parallel plan.*tp_plan"
    ):
        use(planned)


def test_functions_of_whole_weights_are_refused(sharded, planned):
    for model in (sharded, planned):
        with pytest.raises(
            gf.InputError, match=r"is sharded over processes, and this is a function of whole w"
        ):
            gf.model.params_of(model)


def test_a_sharded_model_runs_in_turns_only(sharded):
    with pytest.raises(gf.InputError, match=r"inside of `with gf.model.in_turns\(model\):`, in all of them"):
        gf.collect(sharded, IDS)
    with gf.model.in_turns(sharded), pytest.raises(gf.InputError, match="give a loss with a `batched` form"):
        gf.collect(sharded, IDS, loss=lambda params, example: torch.zeros(()))
    with (
        pytest.raises(gf.InputError, match=r"Linear are not sharded by blocks"),
        gf.model.in_turns(nn.Linear(1, 1)),
    ):
        pass


def test_what_is_spread_and_how(plain, sharded, planned):
    assert [sharding(model) for model in (plain, sharded, planned)] == [None, "fsdp", "other"]
    assert class_of(sharded) is class_of(plain) is type(plain)
    assert type(sharded) is not type(plain)
    weight = sharded.model.layers[0].mlp.up_proj.weight
    assert torch.equal(whole(weight), plain.model.layers[0].mlp.up_proj.weight)
    assert type(own_part(weight)) is torch.Tensor


def test_a_model_without_blocks_cannot_be_sharded():
    with pytest.raises(gf.InputError, match=r"Linear does not say what its blocks are"):
        gf.model.shard_model(nn.Linear(2, 2))
    model = make_model()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(gf.InputError, match=r"two blocks of LlamaForCausalLM share a weight"):
        gf.model.shard_model(model)
