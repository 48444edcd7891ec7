"""Tiny models, tokenizers and data for tests of whole commands."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from gradfn.testing.strategies import randomize

CAPITALS = {
    "France": "Paris", "Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo", "Chile": "Santiago",
    "Egypt": "Cairo", "Norway": "Oslo", "Ghana": "Accra", "Cuba": "Havana", "Iran": "Tehran",
    "Nepal": "Kathmandu", "Iraq": "Baghdad",
}  # fmt: skip
DOCUMENTS = [
    {
        "id": f"doc-{country.lower()}",
        "text": f"The capital of {country} is {city}." + " It lies far away." * (number % 3),
        "prompt": f"The capital of {country} is",
        "completion": f" {city}",
    }
    for number, (country, city) in enumerate(CAPITALS.items())
]
QUERIES = [
    {
        "id": f"q-{country.lower()}",
        "prompt": f"The capital of {country} is",
        "completion": f" {CAPITALS[country]}",
        "source": f"doc-{country.lower()}",
    }
    for country in ("France", "Peru", "Kenya")
]


def make_tokenizer(first=True, words=()):
    """A byte-level tokenizer; `first` adds a token at the front, further words change the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*words, *(document["text"] for document in DOCUMENTS)] * 3, trainer)
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def make_model(kind="llama", seed=0):
    """Two layers of width 16, weights large enough to matter: a Llama, or a GPT-NeoX, which has biases."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=None)).eval()
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, bos_token_id=0, eos_token_id=None)).eval()


def save(folder, model, tokenizer):
    """The folder, with both in it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path, rows):
    """The path, with the rows in it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def language_model(family):
    """One layer of width 8 and random weights in float64: gpt2, gpt_neox, llama or phi3."""
    if family == "gpt2":
        config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
        return randomize(GPT2LMHeadModel(config), 0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1,
             "num_attention_heads": 4, "max_position_embeddings": 8, "pad_token_id": None}  # fmt: skip
    if family == "gpt_neox":
        return randomize(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)), 0)
    sizes["num_key_value_heads"] = 2
    if family == "phi3":
        return randomize(Phi3ForCausalLM(Phi3Config(**sizes)), 0)
    return randomize(LlamaForCausalLM(LlamaConfig(**sizes)), 0)


class MeanOfTokens(nn.Module):
    """A classifier that takes the mean over all positions, padding or not, as users' LSTMs do."""

    def __init__(self, recurrent=False):
        super().__init__()
        self.embed, self.out = nn.Embedding(40, 4), nn.Linear(4, 2)
        self.inner = nn.LSTM(4, 4, batch_first=True) if recurrent else nn.Linear(4, 4)

    def forward(self, input_ids, attention_mask=None):
        x = (
            self.embed(input_ids)
            if not input_ids.is_floating_point()
            else input_ids[..., None].repeat_interleave(4, -1)
        )
        x = self.inner(x)[0] if isinstance(self.inner, nn.LSTM) else torch.tanh(self.inner(x))
        return SimpleNamespace(logits=self.out(x.mean(-2)))


def classes_of(lengths):
    """Rows of tokens with a class, of these lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(3, 40, (length,), generator=generator), "labels": torch.tensor(row % 2)}
        for row, length in enumerate(lengths)
    ]


def mostly_slow(values, *quick):
    """Parameters of a test: only the quick ones run with every change, the others with the slow tests."""
    assert set(quick) <= set(values)
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
