"""A row is the same in every batch: where padding would change it, batches have rows of one length."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DogeConfig,
    DogeForCausalLM,
    FNetConfig,
    FNetForMaskedLM,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    YosoConfig,
    YosoForMaskedLM,
)

from gradfn.engine.check import equality
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import gather, pads
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.testing.models import randomize

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DECODER = {**SIZES, "bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
    "long_factor": [4.0, 6.0, 8.0, 16.0], "original_max_position_embeddings": 16,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
MODELS = {
    "longrope": lambda: Phi3ForCausalLM(Phi3Config(
        **DECODER, num_key_value_heads=1, original_max_position_embeddings=16, rope_parameters=LONGROPE,
    )),
    "dynamic": lambda: LlamaForCausalLM(LlamaConfig(**{
        **DECODER, "max_position_embeddings": 16, "rope_parameters": DYNAMIC,
    })),
    "choosy": lambda: DogeForCausalLM(DogeConfig(**DECODER, num_key_value_heads=1, keep_window_size=8)),
    "yoso": lambda: YosoForMaskedLM(YosoConfig(**SIZES)),
    "fnet": lambda: FNetForMaskedLM(FNetConfig(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
}  # fmt: skip
PADDED = ("llama", "bert")


def texts(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 40, (length,), generator=generator) for length in lengths]


def case(kind):
    """An engine, and rows of which one is much shorter and some are beyond the window of 16."""
    model = randomize(MODELS[kind](), 0)
    causal = "CausalLM" in type(model).__name__
    masks = not causal and kind != "fnet"
    rows = [
        {"input_ids": ids, "labels": ids, **({"attention_mask": torch.ones_like(ids)} if masks else {})}
        for ids in texts([5, 9, 20, 9, 33])
    ]
    return probe_engine(model, causal_lm_loss(model) if causal else model_loss(model, "masked_lm")), rows


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_a_stream_equal_each_row_alone(kind):
    engine, rows = case(kind)
    want = [naive_blocks(engine.loss, engine.model, [row]) for row in rows]
    assert_blocks_close(gather(engine, rows).values, {n: torch.cat([w[n] for w in want]) for n in want[0]})
    assert pads(engine, rows) == (kind in PADDED)
    assert equality(engine, [rows[0], rows[4]])[0].error < 1e-9


class Mean(nn.Module):
    """A classifier of sequences that takes the mean over all positions, padding or not."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(40, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x) if not x.is_floating_point() else x[..., None].expand(*x.shape, 4)
        return self.out(torch.tanh(self.inner(x)).mean(-2))


@pytest.mark.parametrize("key", ["input_ids", "signal"])
def test_of_a_model_of_ones_own_too(key):
    model = randomize(Mean(), 0)
    rows = [
        {key: ids if key == "input_ids" else ids.double(), "y": torch.tensor(number % 2)}
        for number, ids in enumerate(texts([5, 9, 20, 9, 33]))
    ]

    def loss(params, row):
        return F.cross_entropy(functional_call(model, params, row[key][None])[0], row["y"])

    engine = probe_engine(model, loss)
    want = [naive_blocks(loss, model, [row]) for row in rows]
    assert_blocks_close(gather(engine, rows).values, {n: torch.cat([w[n] for w in want]) for n in want[0]})


def test_two_rows_are_compared_once(monkeypatch):
    engine, rows = case("llama")
    gather(engine, rows)
    monkeypatch.setattr("gradfn.engine.stream.padding_changes_rows", None)
    gather(engine, rows)
    gather(probe_engine(engine.model, causal_lm_loss(engine.model)), rows)


def test_padding_that_makes_a_row_nan_is_found():
    sizes = {**DECODER, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4, "num_labels": 2}
    model = randomize(Gemma2ForSequenceClassification(Gemma2Config(**sizes)), 0)
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(1)}
        for ids in texts([5, 20])
    ]
    engine = probe_engine(model, model_loss(model, "classification"))
    assert not pads(engine, rows)
    want = [naive_blocks(engine.loss, model, [row]) for row in rows]
    got = gather(engine, rows).values
    assert_blocks_close(got, {n: torch.cat([w[n] for w in want]) for n in want[0]}, 1e-5)
