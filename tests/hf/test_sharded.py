"""Models loaded in shards are those that are loaded whole, weights, buffers and fingerprint."""

import json
import shutil

import pytest
import torch
from alone import alone
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import gradfn as gf
from gradfn.hf.sharded import load_sharded
from gradfn.model.spread import whole

SIZES = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0,
         "eos_token_id": None}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group():
    with alone():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Llama with tied embeddings and a scaled rope in several files, and a NeoX with renamed weights."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    config = LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(folder / "tied", max_shard_size="2KB")
    assert len([*(folder / "tied").glob("*.safetensors")]) > 2
    make_model("neox").save_pretrained(folder / "neox")
    assert "embed_out.weight" in load_file(folder / "neox/model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["tied", "neox"])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_a_model_in_shards_is_the_whole_one(saved, name, precision):
    model, other = (
        load_sharded(saved / name, precision=precision),
        gf.load_model(saved / name, precision=precision),
    )
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(whole(mine[key]), theirs[key]) for key in mine)
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(other.named_buffers()).keys()
    for key, value in other.named_buffers():
        assert torch.equal(buffers[key], value), key
    with gf.model.in_turns(model):
        assert gf.model.model_fingerprint(model) == gf.model.model_fingerprint(other)
        ids = torch.tensor([[1, 5, 9, 2]])
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def _without(folder, name):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _cut(folder, name):
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name][:-1].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _as_bin(folder, _):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _config(folder, values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


NAME = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"


@pytest.mark.parametrize(
    ("change", "of", "words"),
    [
        (_without, NAME, r"lacks weights of GPTNeoXForCausalLM, such as .*h_to_4h.weight \(1 in all\)"),
        (_cut, NAME, r"has .*h_to_4h.weight of shape \[23, 16\], and its model one of \[24, 16\]"),
        (_as_bin, "", r"has no model.safetensors, of which --fsdp reads a part: save it again"),
        (
            _config,
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "is quantised",
        ),
        (_config, {"num_hidden_layers": 1}, r"has weights that GPTNeoXForCausalLM has no place for"),
    ],
    ids=["lacking", "cut", "bin", "quantised", "left over"],
)
def test_what_cannot_be_loaded_in_shards_is_refused(saved, tmp_path, change, of, words):
    folder = tmp_path / "neox"
    shutil.copytree(saved / "neox", folder)
    change(folder, of)
    with pytest.raises(gf.InputError, match=words):
        load_sharded(folder)


def test_experts_that_were_saved_one_by_one_and_adapters_are_refused(tmp_path, saved):
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).save_pretrained(tmp_path / "mixture")
    with pytest.raises(gf.InputError, match=r"is put together when it is loaded"):
        load_sharded(tmp_path / "mixture")
    (tmp_path / "lora").mkdir()
    adapter = {"base_model_name_or_path": str(saved / "neox"), "peft_type": "LORA"}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(gf.InputError, match=r"is an adapter, which cannot be loaded in shards"):
        load_sharded(tmp_path / "lora")


def test_without_a_group_of_processes_it_is_refused(saved, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(
        gf.InputError, match=r"start them with torchrun, and call torch.distributed.init_proc"
    ):
        load_sharded(saved / "neox")
