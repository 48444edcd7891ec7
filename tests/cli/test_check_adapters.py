"""Folders of PEFT adapters and of quantised models, where their libraries are installed."""

import json
import re
import shutil

import h5py
import pytest
import torch
from tiny import DOCUMENTS, make_model, make_tokenizer, save
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import gradfn as gf
from gradfn.hf import models

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.utils.cpp_extension.*"),
]


def naive_scores(model, names):
    """Inner products of the query's gradient with every document's, a plain `autograd.grad` each."""
    tokens = make_tokenizer()
    params = {name: p.detach().clone().requires_grad_(name in names) for name, p in model.named_parameters()}

    def gradient(text, completion=None):
        (document,) = gf.text_query(tokens, text, completion)
        logits = functional_call(model, params, (document["input_ids"][None],)).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, document["labels"][1:])
        return torch.autograd.grad(loss, [params[name] for name in names])

    query = gradient(ASK[1], ASK[3])
    rows = [gradient(document["text"]) for document in DOCUMENTS]
    return torch.tensor(
        [[sum(float((a * b).sum()) for a, b in zip(row, query, strict=True))] for row in rows]
    )


def scores_of(run):
    with h5py.File(run / "scores.h5") as file:
        return torch.from_numpy(file["scores"][:, 0])


def assert_close(got, want, tolerance):
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


# --- PEFT adapters


@pytest.fixture(scope="module")
def adapter(folder, model):
    """LoRA on two kinds of layers; the folder holds the adapter and no tokenizer."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    wrapped.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_of_an_adapter_the_adapter_alone_is_checked(ok, adapter, corpus):
    out = ok("check", adapter, "--dataset", corpus, "--precision", "fp64")
    assert "model.layers.*.self_attn.q_proj.lora_A.default x 2" in out
    assert "linear: not an adapter" in out
    assert re.search(r"equal to \d\.\de-1\d in all 8 blocks", " ".join(out.split()))


def test_the_scores_of_an_adapter_are_inner_products_of_its_own_gradients(ok, adapter, corpus, tmp_path):
    ok("score", tmp_path, "--model", adapter, "--dataset", corpus, *ASK, "--projection-dim", 0,
       "--precision", "fp64")  # fmt: skip
    model = gf.load_model(adapter, precision="fp64")
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 8
    assert_close(scores_of(tmp_path), naive_scores(model, names), 1e-5)


def test_an_adapter_without_a_tokenizer_has_its_bases(adapter, model):
    assert sorted(gf.load_tokenizer(adapter).get_vocab()) == sorted(gf.load_tokenizer(model).get_vocab())


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (
            "/nowhere/base",
            "is an adapter whose base is missing: no model '/nowhere/base': .*; check the path",
        ),
        (None, "names no base_model_name_or_path: save the adapter again"),
    ],
)
def test_an_adapter_whose_base_is_missing(command, adapter, tmp_path, base, words):
    lost = shutil.copytree(adapter, tmp_path / "lost")
    config = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    result = command("check", lost)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert re.search(words, result.err), result.err


def test_an_adapter_with_a_broken_config(command, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    result = command("check", tmp_path)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "adapter_config.json is not JSON" in result.err


# --- quantised models


@pytest.fixture(scope="module", params=[4, 8], ids=["4 bits", "8 bits"])
def quantised(request, folder):
    """A model with bitsandbytes' layers; 8-bit ones want a width that is large enough for their kernels."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain = save(folder / "plain", make_model(), make_tokenizer())
    if request.param == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                    bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.float32)
    return save(folder / f"quantised{request.param}", model, make_tokenizer()), request.param


def dequantised(path):
    """The same model with plain linear layers of the weights that the quantised ones stand for."""
    import bitsandbytes as bnb

    model = gf.load_model(path)
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.double() * module.weight.SCB.double()[:, None] / 127
        else:
            continue
        plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = nn.Parameter(weight)
        model.set_submodule(name, plain)
    return model.double()


def test_a_quantised_model_is_checked(command, quantised, corpus):
    path, bits = quantised
    result = command("check", path, "--dataset", corpus)
    assert result.status == 0
    assert "not compared: autograd has no gradient of quantised weights" in " ".join(result.out.split())
    assert "linear: probe" in result.out
    assert result.err.count("\n") <= (bits == 8)  # bitsandbytes says, once, that it casts to fp16


def test_the_scores_of_a_quantised_model_are_those_of_the_weights_it_stands_for(
    command, quantised, corpus, tmp_path
):
    path, bits = quantised
    result = command("score", tmp_path, "--model", path, "--dataset", corpus, *ASK, "--projection-dim", 0)
    assert result.status == 0, result.err
    model = dequantised(path)
    names = [name for name, _ in model.named_parameters() if "_proj." in name]
    assert len(names) == 14
    # 8-bit layers round their inputs too, to 1 part in 127.
    assert_close(scores_of(tmp_path), naive_scores(model, names), 1e-4 if bits == 4 else 0.1)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_what_is_not_quantised_has_the_precision_asked_for(quantised, precision):
    model = gf.load_model(quantised[0], precision=precision)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {kind}
    assert sum(not p.is_floating_point() for p in model.parameters()) == 14


def test_what_a_library_repeats_is_said_once(caplog):
    models.say_once("gradfn.test")
    models.say_once("gradfn.test")
    logger = models.logging.getLogger("gradfn.test")
    for message in ("a", "b", "a"):
        logger.warning(message)
    assert [record.getMessage() for record in caplog.records] == ["a", "b"]
