"""A row is the same in every batch: where padding would change it, batches have rows of one length."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import MeanOfTokens
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

import gradfn as gf
from gradfn.engine.batching import plan_batches
from gradfn.engine.check import equality
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import gather, pads, stream
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.testing.models import randomize
from gradfn.testing.strategies import squared_error

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


@pytest.mark.parametrize("key", ["input_ids", "signal"])
def test_of_a_model_of_ones_own_too(key):
    model = randomize(MeanOfTokens(), 0)
    rows = [
        {key: ids if key == "input_ids" else ids.double(), "y": torch.tensor(number % 2)}
        for number, ids in enumerate(texts([5, 9, 20, 9, 33]))
    ]

    def loss(params, row):
        return F.cross_entropy(functional_call(model, params, row[key][None]).logits[0], row["y"])

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


def batch_sizes(net, data, transform, monkeypatch, bytes_of_a_batch, loss=None):
    """How many rows each batch has where it may take so many bytes."""
    monkeypatch.setattr("gradfn.engine.batching.BATCH_BYTES", bytes_of_a_batch)
    engine = probe_engine(net, loss or squared_error(net), transform)
    return [len(numbers) for numbers, _ in stream(engine, data)]


def test_rows_without_tokens_share_a_batch_as_far_as_their_activations_allow(monkeypatch):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(0), nn.Linear(4 * 36, 2))
    data = [{"x": torch.randn(1, 8, 8), "y": torch.zeros(2)} for _ in range(8)]
    # Of a row a convolution gives 4 x 36 numbers and the last layer 2; the rest is the loss.
    few = batch_sizes(net, data, gf.project(2), monkeypatch, 3 * 4 * (4 * 36 + 64))
    assert max(few) in (2, 3)
    assert sum(few) == 8
    assert batch_sizes(net, data, gf.project(2), monkeypatch, 512 << 20) == [8]


def test_rows_with_large_results_share_a_batch_as_far_as_these_allow(monkeypatch):
    net = nn.Linear(50, 40, bias=False)
    data = [{"x": torch.randn(50), "y": torch.zeros(40)} for _ in range(6)]
    assert batch_sizes(net, data, gf.chain(), monkeypatch, 3 * 50 * 40 * 4) == [2, 2, 2]
    assert batch_sizes(net, data, gf.project(2), monkeypatch, 3 * 50 * 40 * 4) == [6]


@pytest.mark.parametrize("budget", [1, 7, 64, 10_000])
def test_batches_hold_every_row_once_within_the_budget(budget):
    lengths = np.random.default_rng(0).integers(0, 50, 200)
    batches = plan_batches(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(1, lengths[batch].max()) <= budget
    longest = [lengths[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_batches_are_as_full_as_they_can_be_without_rows_of_half_the_length():
    lengths = np.random.default_rng(1).integers(1, 50, 200)
    batches = plan_batches(lengths, 256)
    for batch, following in pairwise(batches):
        longest = lengths[batch].max()
        halved = lengths[following].max() <= longest // 2 and len(batch) * longest >= 256 / 16
        assert (len(batch) + 1) * longest > 256 or halved


def test_few_rows_of_mixed_lengths_are_not_mostly_padding():
    lengths = np.array([170, 120, 90, *[40, 35, 25, 20] * 3, *[12, 9, 5] * 3])
    batches = plan_batches(lengths, 4096)
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert len(batches) <= 4
    assert padded < 1.5 * lengths.sum() < len(lengths) * 170


def test_a_batch_has_at_most_so_many_rows():
    assert [len(batch) for batch in plan_batches(np.full(7, 3), 4096, most_rows=3)] == [3, 3, 1]


def test_equal_lengths_keep_their_order():
    assert [batch.tolist() for batch in plan_batches(np.full(5, 3), 6)] == [[0, 1], [2, 3], [4]]


def test_a_row_beyond_the_budget_is_alone():
    assert [batch.tolist() for batch in plan_batches(np.array([3, 100, 3]), 6)] == [[1], [0, 2]]


def test_no_rows_no_batches():
    assert plan_batches(np.zeros(0, np.int64), 8) == []


@pytest.mark.parametrize("budget", [0, -1])
def test_a_batch_needs_room(budget):
    with pytest.raises(InputError, match=f"at least 1 token, got a token batch size of {budget}"):
        plan_batches(np.array([1]), budget)
