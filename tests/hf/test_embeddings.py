"""Embeddings are plain means of states, one text at a time."""

import pytest
import torch
from tiny import make_model, make_tokenizer, save
from transformers import AutoModel, BertConfig, BertModel, T5Config, T5Model

from gradfn.errors import InputError
from gradfn.hf.embeddings import embeddings

TEXTS = ["The capital of Peru is Lima.", "Lima", "", "The sea is blue. " * 40, "Lima is far", "Cairo is far"]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_texts_are_embedded_as_if_each_were_alone(tmp_path, kind):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=300, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
                        num_attention_heads=2, max_position_embeddings=32)  # fmt: skip
    tokenizer = make_tokenizer(first=False)
    save(tmp_path, make_model() if kind == "llama" else BertModel(config), tokenizer)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    found = embeddings(tmp_path, TEXTS, precision="fp64")
    for text, one in zip(TEXTS, found, strict=True):
        ids = tokenizer(text)["input_ids"][: model.config.max_position_embeddings]
        if not ids:
            assert not one.any()
            continue
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(one, mean / mean.norm(), rtol=1e-10, atol=1e-12)


def test_what_embeds_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder nowhere with an embedding model"):
        embeddings("nowhere", ["a"])
    sizes = {"vocab_size": 300, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 1, "num_heads": 2}
    save(tmp_path, T5Model(T5Config(**sizes)), make_tokenizer())
    with pytest.raises(InputError, match="maps texts to texts"):
        embeddings(tmp_path, ["a"])
