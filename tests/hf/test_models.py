import inspect
import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from gradfn.errors import InputError
from gradfn.hf import context_length, load_model, load_tokenizer, models
from gradfn.model.fingerprint import model_fingerprint

SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


def adapted(folder, modules_to_save, seed=0):
    """A folder with an adapter of a base without a head, and what both together said when they were saved."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    whole = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    whole.bert.save_pretrained(folder / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["query"], init_lora_weights=False, modules_to_save=modules_to_save
    )
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model(input_ids=torch.tensor([[1, 5, 6]])).logits


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_a_folder(neox_folder, as_path):
    model = load_model(as_path(neox_folder))
    ours, theirs = model.state_dict(), AutoModelForCausalLM.from_pretrained(neox_folder).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
def test_precision(neox_folder, precision):
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[
        precision
    ]
    assert {parameter.dtype for parameter in load_model(neox_folder, precision=precision).parameters()} == {
        kind
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_tied_weights_stay_tied(llama_folder, precision):
    model = load_model(llama_folder, precision=precision)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_home_is_expanded(neox_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(neox_folder.parent))
    assert context_length(load_model(f"~/{neox_folder.name}")) == 64


@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_gguf_equals_the_saved_folder(gguf_file, llama_folder, tmp_path, folder):
    model = load_model(gguf_file.parent if folder else gguf_file)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model_fingerprint(model) == model_fingerprint(load_model(llama_folder))
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert model_fingerprint(again) == model_fingerprint(model)
    assert not hasattr(again.config, "quantization_config")
    batch = torch.arange(8)[None]
    assert torch.equal(model(batch).logits, again(batch).logits)


def test_gguf_beside_weights_is_not_used(gguf_file, neox_folder, tmp_path):
    folder = shutil.copytree(neox_folder, tmp_path / "both")
    shutil.copy(gguf_file, folder)
    assert type(load_model(folder)).__name__ == "GPTNeoXForCausalLM"


def test_gguf_in_another_precision(gguf_file):
    assert {parameter.dtype for parameter in load_model(gguf_file, precision="bf16").parameters()} == {
        torch.bfloat16
    }


def test_loading_is_silent(gguf_file, neox_folder, capfd, caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in (gguf_file, neox_folder):
            load_model(path)
            load_tokenizer(path)
    assert capfd.readouterr() == ("", "")
    assert not caught
    assert not caplog.records


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_config_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no model"):
        load_model(copy)


def test_weights_without_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"the model .*copy' has no config\.json"):
        load_model(copy)


def test_cut_weights(copy):
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(copy)


def test_weights_of_another_size(copy):
    edit_config(copy, hidden_size=32)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(copy)


def test_missing_weights_are_not_made_up(copy):
    edit_config(copy, num_hidden_layers=3)
    with pytest.raises(
        InputError, match=r"lacks weights of GPTNeoXForCausalLM, such as \S*layers.2\S* \(\d+ in all\), which"
    ):
        load_model(copy)


def test_a_model_of_another_kind(copy):
    edit_config(copy, model_type="vit")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(copy)


def test_foreign_code_is_not_run(copy):
    edit_config(copy, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (copy / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(
        InputError, match="comes with code of its own: read it, then give trust_remote_code=True"
    ):
        load_model(copy)


def test_unknown_precision(neox_folder):
    with pytest.raises(InputError, match="unknown precision 'int4': use one of fp32, bf16, fp16, fp64"):
        load_model(neox_folder, precision="int4")


def test_products_are_no_dtype(neox_folder):
    with pytest.raises(InputError, match="unknown precision 'tf32': use one of fp32, bf16, fp16, fp64"):
        load_model(neox_folder, precision="tf32")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(neox_folder, attention):
    assert load_model(neox_folder, attention=attention).config._attn_implementation == attention


def test_an_unknown_attention(neox_folder):
    with pytest.raises(InputError, match=r"unknown attention 'flash': use one of sdpa, eager, flash_atten"):
        load_model(neox_folder, attention="flash")


def test_a_kernel_that_the_model_does_not_have(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"cannot have sdpa attention here \(Bloom[^.]* not support") as told:
        load_model(tmp_path, attention="sdpa")
    assert str(told.value).endswith("yet): use another, or leave it out")


@pytest.mark.parametrize(("device", "precision"), [("cpu", "bf16"), ("cpu", "fp32"), ("cuda", "fp32")])
def test_a_kernel_that_cannot_run_there(device, precision):
    words = f"flash_attention_3 runs on CUDA in bf16 or fp16, not on {device} in {precision}: use sdpa"
    with pytest.raises(InputError, match=words):
        models.check_attention("flash_attention_3", precision, torch.device(device))


def test_a_kernel_that_can_run_there():
    models.check_attention("flash_attention_2", "bf16", torch.device("cuda:1"))


def test_a_kernel_in_the_place_of_another_is_refused(neox_folder, monkeypatch):
    """transformers takes another kernel without an error for some models."""
    eager = AutoModelForCausalLM.from_pretrained(neox_folder, attn_implementation="eager")
    monkeypatch.setattr(models, "load_pretrained", lambda *args, **options: (eager, {"missing_keys": []}))
    monkeypatch.setattr(models, "adapter_of", lambda *args: None)
    with pytest.raises(InputError, match=r"neox.* has no sdpa attention, only eager: use that, or leave it"):
        load_model(neox_folder, "causal_lm", attention="sdpa")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_here(neox_folder, device):
    with pytest.raises(InputError, match=rf"device '{device}' cannot be used here .*: use device='cpu'"):
        load_model(neox_folder, device=device)


def test_context_lengths(neox_folder, llama_folder):
    assert context_length(load_model(neox_folder)) == 64
    assert context_length(load_model(llama_folder)) == 128
    assert context_length(nn.Linear(1, 1)) is None


def test_the_length_that_t5_records_is_no_limit():
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, n_positions=4, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    assert config.n_positions == 4
    assert context_length(model) is None
    ids = torch.full((1, 9), 5)
    assert model(input_ids=ids, labels=ids).logits.shape[1] == 9


@pytest.mark.parametrize("family", ["Roberta", "Bert", "MPNet", "Electra"])
def test_the_context_is_as_long_as_the_model_can_read(family):
    config = getattr(transformers, f"{family}Config")(**SIZES, max_position_embeddings=20, pad_token_id=1)
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    length = context_length(model)
    assert length == (18 if family in ("Roberta", "MPNet") else 20)
    model(input_ids=torch.full((1, length), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, length + 1), 5))


loads_modules = pytest.mark.skipif(
    "AuxiliaryTrainingWrapper" not in inspect.getsource(transformers.integrations.peft),
    reason="this transformers leaves the modules of an adapter's own as they are",
)


@loads_modules
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_brings_the_head_that_its_base_lacks(tmp_path):
    folder, logits = adapted(tmp_path, ["classifier"])
    found = [load_model(folder, "classification", precision="fp64") for _ in range(2)]
    for model in found:
        made = model(input_ids=torch.tensor([[1, 5, 6]])).logits
        torch.testing.assert_close(made, logits.double(), rtol=1e-5, atol=1e-6)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    same, other = map(model_fingerprint, found)
    assert same == other
    for name in ("classifier.modules_to_save.default.weight", "bert.embeddings.word_embeddings.weight"):
        before = model_fingerprint(other := found[1])
        other.get_parameter(name).data[0, 0] += 1
        assert model_fingerprint(other) != before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_without_the_head_that_its_base_lacks_is_refused(tmp_path):
    folder, _ = adapted(tmp_path, None)
    words = (
        r"lacks weights of BertForSequenceClassification, such as classifier.bias \(2 in all\), which would"
    )
    with pytest.raises(InputError, match=words):
        load_model(folder, "classification")


@loads_modules
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_that_lacks_its_own_head_is_refused(tmp_path):
    folder, _ = adapted(tmp_path, ["classifier"])
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.endswith("classifier.bias")}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"lacks weights of .*, such as classifier\..*bias \(1 in all\), which would be"
    ):
        load_model(folder, "classification")


def test_a_replaced_module_that_is_tied_to_one_in_use():
    model = nn.Module()
    model.emb, model.head = nn.Module(), nn.Linear(2, 3, bias=False)
    model.emb.original_module = nn.Linear(2, 3, bias=False)
    model.emb.modules_to_save = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})
    model.head.weight = model.emb.original_module.weight
    before = model_fingerprint(model)
    model.head.weight.data[0, 0] += 1
    assert model_fingerprint(model) != before


def test_the_task_chooses_the_head(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    config = transformers.BertConfig(**sizes, num_labels=3)
    for task, made in (
        ("classification", transformers.BertForSequenceClassification(config)),
        ("masked_lm", transformers.BertForMaskedLM(config)),
    ):
        made.save_pretrained(tmp_path / task)
        loaded = load_model(tmp_path / task, task)
        assert type(loaded) is type(made)
        assert model_fingerprint(loaded) == model_fingerprint(made)
    words = r"lacks weights of BertForSequenceClassification, .* with its head for classification"
    with pytest.raises(InputError, match=words):
        load_model(tmp_path / "masked_lm", "classification")
    with pytest.raises(InputError, match="no task 'vision': choose causal_lm, masked_lm, seq2seq_lm, class"):
        load_model(tmp_path / "masked_lm", "vision")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_among_the_weights_of_a_model_is_refused(tmp_path):
    folder, _ = adapted(tmp_path, ["classifier"])
    for file in (tmp_path / "base").iterdir():
        shutil.copy(file, folder)
    words = "holds an adapter and also the weights model.safetensors, so it is ambiguous: move the adapter"
    with pytest.raises(InputError, match=words):
        load_model(folder, "classification")


def changed(folder, file, **values):
    """The fingerprint of the model in a folder after values in a file of it have changed."""
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **values}))
    return model_fingerprint(load_model(folder))


def test_what_a_config_says_beside_the_weights_is_in_the_fingerprint(copy, llama_folder, tmp_path):
    llama = shutil.copytree(llama_folder, tmp_path / "llama_copy")
    before = model_fingerprint(load_model(copy)), model_fingerprint(load_model(llama))
    rope = {"rope_theta": 9, "rope_type": "default"}
    other = [
        changed(copy, "config.json", num_attention_heads=1),
        changed(copy, "config.json", num_attention_heads=2, hidden_act="relu"),
        changed(copy, "config.json", hidden_act="gelu", layer_norm_eps=1e-3),
        changed(llama, "config.json", rms_norm_eps=1e-3),
        changed(llama, "config.json", rms_norm_eps=1e-6, rope_parameters=rope),
    ]  # fmt: skip
    assert len({*before, *other}) == 7
    same = {
        "use_cache": False,
        "transformers_version": "4.0.0",
        "_name_or_path": "elsewhere",
        "dtype": "bfloat16",
    }
    assert changed(copy, "config.json", layer_norm_eps=1e-5, **same) == before[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_what_an_adapter_says_beside_its_weights_is_in_the_fingerprint(neox_folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(neox_folder)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["dense"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    before = model_fingerprint(load_model(tmp_path))
    assert before == model_fingerprint(load_model(tmp_path))
    assert changed(tmp_path, "adapter_config.json", inference_mode=False, peft_version="0.1") == before
    assert changed(tmp_path, "adapter_config.json", lora_alpha=200) != before
    assert changed(tmp_path, "adapter_config.json", lora_alpha=2, use_rslora=True) != before


TIED = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
         "num_attention_heads": 2, "tie_word_embeddings": True}  # fmt: skip


def saved(folder, make, config, **values):
    """A model in a folder, with other values in its config afterwards."""
    make(config).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **values}))
    return folder


@pytest.mark.parametrize(("make", "config", "task", "words"), [
    (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, "causal_lm",
     "was saved as LlamaForSequenceClassification, not as a LlamaForCausalLM for causal_lm: give a model"),
    (transformers.LlamaForTokenClassification, transformers.LlamaConfig, "causal_lm", "was saved as LlamaF"),
    (transformers.LlamaForTokenClassification, transformers.LlamaConfig, "classification", "was saved as "),
    (transformers.BertForMaskedLM, transformers.BertConfig, "causal_lm", "was saved as BertForMaskedLM, n"),
    (transformers.BertForTokenClassification, transformers.BertConfig, "masked_lm", "lacks weights of Ber"),
])  # fmt: skip
def test_a_model_with_another_head_is_refused(tmp_path, make, config, task, words):
    with pytest.raises(InputError, match=words):
        load_model(saved(tmp_path, make, config(**TIED)), task)


def test_weights_that_have_no_place_are_refused(tmp_path):
    llama = transformers.LlamaForCausalLM, transformers.LlamaConfig(**TIED)
    fewer = saved(tmp_path / "fewer", *llama, num_hidden_layers=1)
    words = (
        r"has weights that LlamaForCausalLM has no place for, such as model.layers.1.\S+ \(9 in all\): give a"
    )
    with pytest.raises(InputError, match=words):
        load_model(fewer)
    head = transformers.LlamaForSequenceClassification, transformers.LlamaConfig(**TIED)
    with pytest.raises(InputError, match=r"no place for, such as score.weight \(1 in all\)"):
        load_model(saved(tmp_path / "head", *head, architectures=None), "causal_lm")


def test_a_body_may_have_a_pooler_that_its_head_does_not_read(tmp_path):
    made = saved(tmp_path, transformers.BertForPreTraining, transformers.BertConfig(**TIED))
    assert type(load_model(made, "masked_lm")) is transformers.BertForMaskedLM


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_whose_base_has_code_of_its_own(tmp_path, monkeypatch):
    folder, _ = adapted(tmp_path, ["classifier"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    auto = {"AutoConfig": "mine.Mine", "AutoModelForSequenceClassification": "mine.Model"}
    text = json.dumps({**config, "model_type": "mine", "auto_map": auto})
    (tmp_path / "base" / "config.json").write_text(text)
    (tmp_path / "base" / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(
        InputError, match="comes with code of its own: read it, then give trust_remote_code=True"
    ):
        load_model(folder, "classification")
    assert not (tmp_path / "ran").exists()
