"""Models quantised by bitsandbytes: their gradients are those of the weights that their bits stand for."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradfn as gf
from gradfn.methods.exact_solve import ExactSolve, Solver

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # in peft
)
ROWS = [{"input_ids": torch.randint(1, 40, (size,), generator=torch.Generator().manual_seed(size))}
        for size in (5, 9, 9, 14)]  # fmt: skip


@pytest.fixture(scope="module", params=[4, 8])
def saved(request, tmp_path_factory):
    """A folder with a quantised base, and one with an adapter of it."""
    import peft
    from transformers import BitsAndBytesConfig

    folder = tmp_path_factory.mktemp(f"bits-{request.param}")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, initializer_range=0.3, attention_bias=True,
                         bos_token_id=0, eos_token_id=None)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    how = {f"load_in_{request.param}bit": True}
    how |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if request.param == 4 else {}
    base = LlamaForCausalLM.from_pretrained(
        folder / "plain", quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32, device_map="cpu"
    )
    base.save_pretrained(folder / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, lora)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    return folder


def quantised_layers(model):
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {path: module for path, module in model.named_modules() if isinstance(module, kinds)}


def dequantised(model):
    """The same with plain layers, whose weights come from bitsandbytes' own functions."""
    for path, old in quantised_layers(model).items():
        if isinstance(old, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(old.weight.data, old.weight.quant_state)
        else:
            weight = bnb.functional.int8_vectorwise_dequant(old.weight.data, old.weight.SCB)
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        new.weight = nn.Parameter(weight.float(), requires_grad=False)
        new.bias = old.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    return model


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_gradients_and_scores_are_those_of_the_dequantised_model(saved, name):
    model, plain = gf.load_model(saved / name), dequantised(gf.load_model(saved / name))
    assert quantised_layers(model)
    assert not quantised_layers(plain)
    got, want = gf.collect(model, ROWS), gf.collect(plain, ROWS)
    assert got.keys() == want.keys()
    assert ("lora_A" in next(iter(got))) == (name == "adapter")
    for key in got:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5 * float(want[key].abs().max()))
    one, two = (gf.score(each, ROWS, ROWS[:2], method="grad_dot").matrix for each in (model, plain))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))
    unquantised = gf.collect(gf.load_model(saved / "plain"), ROWS)
    if name == "base":
        assert any((got[key] - unquantised[key]).abs().max() > 1e-2 * want[key].abs().max() for key in got)


def test_a_row_does_not_depend_on_its_batch(saved):
    model = gf.load_model(saved / "base")
    alone, together = (gf.collect(model, ROWS, token_batch_size=size) for size in (1, 1000))
    for key in alone:
        torch.testing.assert_close(
            alone[key], together[key], rtol=1e-3, atol=1e-4 * float(alone[key].abs().max())
        )


def test_scales_are_in_the_fingerprint(saved):
    fingerprint = gf.model.model_fingerprint
    model = gf.load_model(saved / "base")
    before = fingerprint(model)
    assert fingerprint(gf.load_model(saved / "base")) == before
    layer = next(iter(quantised_layers(model).values()))
    (layer.weight.SCB if hasattr(layer.weight, "SCB") else layer.weight.quant_state.absmax).add_(1)
    assert fingerprint(model) != before


def test_solving_in_quantised_weights_is_refused(saved):
    model = gf.load_model(saved / "base")
    solve = ExactSolve("cg", gf.Subject(model), ROWS, 0.1, Solver())
    with pytest.raises(gf.InputError, match=r"is quantised, and cg differentiates with respect to it"):
        solve({})
