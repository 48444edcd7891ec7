"""A padding token that is none of the model's tokens: the mask alone says what is padding."""

import json

import pytest
import torch
import transformers

import gradfn as gf
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.testing.strategies import randomize

SIZES = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
DECODED = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
CASES = {
    "Llama": ("classification", {**SIZES, "intermediate_size": 20}),
    "GPT2": ("classification", {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}),
    "Roberta": ("masked_lm", {**SIZES, "intermediate_size": 20, "max_position_embeddings": 64}),
    "T5": ("seq2seq_lm", {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1,
                          "num_heads": 2, "decoder_start_token_id": 0}),
    "Bart": ("seq2seq_lm", {"vocab_size": 40, "d_model": 16, **DECODED}),
}  # fmt: skip
HEADS = {
    "classification": "SequenceClassification",
    "masked_lm": "MaskedLM",
    "seq2seq_lm": "ConditionalGeneration",
}


def rows_for(task):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 40, (length,), generator=generator) for length in (5, 9, 20, 9)]
    labels = {"classification": lambda ids: torch.tensor(1), "masked_lm": lambda ids: ids}
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids),
         "labels": labels.get(task, lambda ids: ids[: len(ids) // 2])(ids)}
        for ids in texts
    ]  # fmt: skip


@pytest.mark.parametrize(("family", "pad"), [
    ("Llama", None), ("Llama", -1), ("Llama", 40), ("GPT2", 40), ("Roberta", None), ("Roberta", 40),
    ("T5", -1), ("Bart", 40),
])  # fmt: skip
def test_rows_are_those_of_each_row_alone(tmp_path, family, pad):
    task, sizes = CASES[family]
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = randomize(getattr(transformers, f"{family}For{HEADS[task]}")(config), 0)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, "pad_token_id": pad}))
    loaded = gf.load_model(tmp_path, task, precision="fp64")
    rows, loss = rows_for(task), gf.model_loss(loaded, task)
    want = [naive_blocks(loss, loaded, [row]) for row in rows]
    found = gf.collect(loaded, rows, loss=loss)
    assert_blocks_close(found, {name: torch.cat([one[name] for one in want]) for name in found})
    if family == "Llama":
        ids = rows[0]["input_ids"][None]
        pooled = model.double().score(model.model(ids).last_hidden_state[:, -1])
        torch.testing.assert_close(loss.logits({"input_ids": ids}), pooled)
