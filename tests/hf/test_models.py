import hashlib
import inspect
import io
import json
import logging
import shutil
import socket
import time
import warnings

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from gradfn.errors import InputError
from gradfn.hf import hub, models
from gradfn.hf.models import (
    context_length,
    load_model,
    load_tokenizer,
    tokenizer_fingerprint,
)
from gradfn.model.fingerprint import model_fingerprint


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses connections, whatever this machine can reach."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


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


def test_tokenizer_inside_gguf(gguf_file, llama_folder):
    text = "The capital of France is Paris."
    expected = load_tokenizer(llama_folder)(text, add_special_tokens=False).input_ids
    for path in (gguf_file, gguf_file.parent):
        assert load_tokenizer(path)(text, add_special_tokens=False).input_ids == expected


def test_tokenizer_beside_gguf_comes_first(gguf_file, neox_folder, tmp_path):
    shutil.copy(gguf_file, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(neox_folder / name, tmp_path)
    expected = tokenizer_fingerprint(load_tokenizer(neox_folder))
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == expected
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / gguf_file.name)) == expected


def test_a_tokenizer_round_trip(llama_folder):
    tokenizer = load_tokenizer(str(llama_folder))
    ids = tokenizer("The capital of Peru").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "The capital of Peru"


def test_loading_is_silent(gguf_file, neox_folder, capfd, caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in (gguf_file, neox_folder):
            load_model(path)
            load_tokenizer(path)
    assert capfd.readouterr() == ("", "")
    assert not caught
    assert not caplog.records


def test_quiet_puts_back_what_it_found():
    from tqdm.auto import tqdm

    before = tqdm.__init__, logging.root.manager.disable, warnings.filters[:]
    with hub.quiet():
        assert tqdm([1]).disable
        assert not logging.getLogger("transformers").isEnabledFor(logging.WARNING)
    assert (tqdm.__init__, logging.root.manager.disable, warnings.filters[:]) == before
    assert not tqdm([1], file=io.StringIO()).disable


def test_quiet_puts_it_back_after_an_error():
    from tqdm.auto import tqdm

    before = tqdm.__init__, logging.root.manager.disable
    with pytest.raises(KeyError), hub.quiet():
        raise KeyError
    assert (tqdm.__init__, logging.root.manager.disable) == before


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def copy(neox_folder, tmp_path):
    return shutil.copytree(neox_folder, tmp_path / "copy")


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds no model: .* but it holds notes.txt; give the folder"):
        load_model(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="it holds nothing"):
        load_model(tmp_path)


def test_a_crowded_folder_is_not_listed_in_full(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(InputError, match=r"holds 0.txt, 1.txt, .*, 5.txt and 3 more;"):
        load_model(tmp_path)


def test_config_without_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no model"):
        load_model(copy)


def test_weights_without_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"the model .*copy' cannot be loaded \("):
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
        InputError, match=r"lacks weights of GPTNeoXForCausalLM, \S*layers.2\S* first of \d+, which"
    ):
        load_model(copy)


def test_a_model_of_another_kind(copy):
    edit_config(copy, model_type="vit")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(copy)


def test_foreign_code_is_not_run(copy):
    edit_config(copy, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (copy / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="comes with code of its own: read it, then allow trust_remote_code"):
        load_model(copy)


def test_two_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"holds 2 .gguf files: give the path of one of a.gguf, b.gguf"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_a_file_that_is_no_gguf(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=r"a.gguf does not start as a GGUF file does"):
            load(tmp_path)


def test_a_cut_gguf(gguf_file, tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf_file.read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(tmp_path / "a.gguf")


def test_a_file_of_another_kind(neox_folder):
    with pytest.raises(
        InputError, match=r"model.safetensors is no model: expected a .gguf file or the folder"
    ):
        load_model(neox_folder / "model.safetensors")


@pytest.mark.parametrize("path", ["no/such/folder", "./nowhere", "/nowhere", "a.gguf", "~/nowhere", ""])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_does_not_exist(path, load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gradfn.hf.models.hub_answers", lambda: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="no file or folder here has this name; check the path"):
        load(path or "x/y/z")


def test_a_path_object_is_never_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.setattr("gradfn.hf.models.hub_answers", lambda: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="check the path"):
        load_model(tmp_path.relative_to(tmp_path) / "gpt2")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_hub_name_without_a_hub(no_hub, load, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(
        InputError, match=r"not among the cached downloads, and the hub does not answer; give"
    ):
        load("gradfn-tests/no-such-model")
    assert time.perf_counter() - start < 5
    assert capfd.readouterr() == ("", "")


def test_a_hub_that_accepts_but_never_answers(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        monkeypatch.setattr(hub, "_PATIENCE", 0.2)
        start = time.perf_counter()
        assert not hub.hub_answers()
        assert time.perf_counter() - start < 2


def test_a_cached_download_needs_no_hub(no_hub, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--gradfn-tests--tiny"
    shutil.copytree(llama_folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.chdir(tmp_path)
    expected = model_fingerprint(load_model(llama_folder))
    assert model_fingerprint(load_model("gradfn-tests/tiny")) == expected
    assert len(load_tokenizer("gradfn-tests/tiny")) == len(load_tokenizer(llama_folder))


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
        models._check_attention("flash_attention_3", precision, torch.device(device))


def test_a_kernel_that_can_run_there():
    models._check_attention("flash_attention_2", "bf16", torch.device("cuda:1"))


def test_a_kernel_in_the_place_of_another_is_refused(neox_folder):
    model = load_model(neox_folder, attention="eager")
    with pytest.raises(InputError, match="m has no sdpa attention, only eager: use that, or leave it out"):
        models._refuse_other_attention(model, "m", "sdpa")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_here(neox_folder, device):
    with pytest.raises(InputError, match=f"device '{device}' cannot be used here .*: try --device cpu"):
        load_model(neox_folder, device=device)


def test_a_model_without_a_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        InputError, match=r"copy holds no tokenizer, only config.json, .*tokenizer.save_pretrained"
    ):
        load_tokenizer(copy)


def test_a_broken_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"the tokenizer .* cannot be loaded"):
        load_tokenizer(copy)


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


def test_tokenizer_fingerprints(tokenizers, tmp_path):
    prints = {kind: tokenizer_fingerprint(tokenizer) for kind, tokenizer in tokenizers.items()}
    assert len(set(prints.values())) == len(prints)
    tokenizers["bos"].save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(again) == prints["bos"]
    again.pad_token = "</s>"
    assert again(["a b c", "a"], truncation=True, max_length=2, padding="max_length").input_ids[0][0] == 1
    assert json.loads(again.backend_tokenizer.to_str())["truncation"] is not None
    assert tokenizer_fingerprint(again) == prints["bos"]
    again.add_tokens(["<new>"])
    assert tokenizer_fingerprint(again) != prints["bos"]


def test_context_lengths(neox_folder, llama_folder):
    assert context_length(load_model(neox_folder)) == 64
    assert context_length(load_model(llama_folder)) == 128
    assert context_length(nn.Linear(1, 1)) is None


SIZES = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip


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
        r"lacks weights of BertForSequenceClassification, classifier.bias first of 2, which would be random"
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
        InputError, match=r"lacks weights of .*, classifier\..*bias first of 1, which would be"
    ):
        load_model(folder, "classification")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
def test_an_adapter_among_the_weights_of_a_model_is_refused(tmp_path):
    folder, _ = adapted(tmp_path, ["classifier"])
    for file in (tmp_path / "base").iterdir():
        shutil.copy(file, folder)
    words = "holds an adapter and the weights model.safetensors, and either could be meant: move the adapter"
    with pytest.raises(InputError, match=words):
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
