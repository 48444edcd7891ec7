"""PEFT adapters and bitsandbytes layers, where these packages are."""

import pytest
import torch
from tiny import language_model
from torch import nn

from gradfn.layers import View, find_sites
from gradfn.losses import causal_lm_loss
from gradfn.stream import collect
from gradfn.testing import assert_blocks_close, naive_blocks, naive_causal_lm_loss
from gradfn.testing.strategies import squared_error
from gradfn.transforms import chain, project, unit_normalize

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROWS = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3, 4], [5, 6, 7])]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_of_a_model_with_adapters_the_adapters_are_attributed(family):
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(
        r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    model = peft.get_peft_model(language_model(family), config).double().eval()
    assert all(".lora_A." in site.path or ".lora_B." in site.path for site in find_sites(model))
    loss = causal_lm_loss(model)
    assert loss.fused_head
    for transform in (chain(), chain(project(1), unit_normalize())):
        want = transform(naive_blocks(naive_causal_lm_loss(model), model, ROWS, View()))
        assert_blocks_close(collect(model, ROWS, transform, loss=loss), want)
    base = find_sites(model, View(include=["*.base_layer"]))
    assert len(base) == len(targets)


def test_adapters_that_transformers_put_in_are_found_too():
    peft = pytest.importorskip("peft")
    model = language_model("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model = model.double().eval()
    assert {site.path.split(".")[-2] for site in find_sites(model)} == {"lora_A", "lora_B"}
    assert causal_lm_loss(model).fused_head
    want = naive_blocks(naive_causal_lm_loss(model), model, ROWS, View())
    assert_blocks_close(collect(model, ROWS), want)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_quantised_layers_have_the_gradient_of_the_weight_that_they_stand_for(kind):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    if kind == "Linear4bit":
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to("cpu")
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(64, 3)).requires_grad_(False)
    rows = [{"x": torch.randn(5, 64), "y": torch.zeros(3)} for _ in range(3)]

    class Batched:
        def __call__(self, params, example):
            return self.batched({key: value[None] for key, value in example.items()})[0]

        def batched(self, batch):
            return model(batch["x"]).square().flatten(1).sum(1)

    with torch.no_grad():  # the map that the layer is, read off the unit vectors
        bias = layer(torch.zeros(1, 64))[0]
        weight = (layer(torch.eye(64)) - bias).T
    stands_for = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), model[2])
    with torch.no_grad():
        stands_for[0].weight.copy_(weight)
        stands_for[0].bias.copy_(bias)
    got = collect(model, rows, loss=Batched())
    want = naive_blocks(squared_error(stands_for), stands_for, rows)
    for name in want:
        cosine = torch.cosine_similarity(got[name].flatten(1), want[name].flatten(1))
        assert float(cosine.min()) > 0.999, name
