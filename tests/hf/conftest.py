"""Tiny models and tokenizers, made here, so that no test needs a network."""

import shutil

import huggingface_hub.constants
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CORPUS = [
    "The capital of France is Paris.",
    "The capital of Algeria is Algiers.\nIt lies on the sea.",
    "What is the capital of Peru? Lima",
] * 20


def make_tokenizer(kind):
    """A byte-level tokenizer that adds `nothing`, `bos` or `bos+eos`; `metaspace` adds bos and a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace" else None))
    special, alphabet = ["<unk>", "<s>", "</s>"], []
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind != "nothing":
        template = "<s> $A </s>" if kind == "bos+eos" else "<s> $A"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


KINDS = ["nothing", "bos", "bos+eos", "metaspace"]


@pytest.fixture(scope="session")
def tokenizers():
    return {kind: make_tokenizer(kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def neox_folder(tmp_path_factory, tokenizers):
    """A GPT-NeoX of two layers, embeddings not tied, with a tokenizer that adds nothing."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return save(GPTNeoXForCausalLM(config), tokenizers["nothing"], tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizers):
    """A Llama of one layer, input and output embeddings tied, with a tokenizer that adds a first token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return save(LlamaForCausalLM(config), tokenizers["bos"], tmp_path_factory.mktemp("llama"))


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory, llama_folder):
    """The tied Llama as a GGUF file with its tokenizer inside, alone in a folder."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _write_llama_settings(writer, model.config)
    _write_vocabulary(writer, PreTrainedTokenizerFast.from_pretrained(llama_folder))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves what the rotation pairs
            weight = weight.reshape(2, 2, 8, 32).swapaxes(1, 2).reshape(32, 32)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_llama_settings(writer, config):
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _write_vocabulary(writer, tokenizer):
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<unk>", "<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses connections, whatever this machine can reach."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def copy(neox_folder, tmp_path):
    return shutil.copytree(neox_folder, tmp_path / "copy")
