"""PEFT adapters in whole models, where the package is."""

import pytest
import torch
from tiny import language_model

from gradfn.engine.stream import collect
from gradfn.model.losses import causal_lm_loss
from gradfn.model.sites import View, find_sites
from gradfn.testing import assert_blocks_close, naive_blocks, naive_causal_lm_loss
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
    try:
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    except ValueError as error:  # a transformers that wants a newer peft than there is
        pytest.skip(str(error))
    model = model.double().eval()
    assert {site.path.split(".")[-2] for site in find_sites(model)} == {"lora_A", "lora_B"}
    assert causal_lm_loss(model).fused_head
    want = naive_blocks(naive_causal_lm_loss(model), model, ROWS, View())
    assert_blocks_close(collect(model, ROWS), want)
