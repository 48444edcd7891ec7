"""Every loss against its formula as torch writes it, one example at a time, and through the engine."""

import pytest
import torch
import torch.nn.functional as F
from matrices import score
from tiny import language_model
from torch import nn
from torch.func import functional_call
from transformers import FSMTConfig, FSMTForConditionalGeneration, LlamaConfig, LlamaForSequenceClassification

from gradfn.data import collate
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.methods import grad_dot
from gradfn.methods.scoring import dots
from gradfn.model.losses import _check, advantages, causal_lm_loss, model_loss, token_losses
from gradfn.model.params import params_of
from gradfn.testing import assert_blocks_close, naive_blocks, naive_causal_lm_loss
from gradfn.testing.strategies import randomize

MODEL, REFERENCE = language_model("llama"), language_model("gpt2")
ROWS = [
    {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    for ids, labels in [([1, 2, 3, 4], [-100, -100, 3, 4]), ([5, 6, 7], [5, 6, 7]), ([8, 9], [-100, -100])]
]


def cross_entropy(logits, targets, _):
    return F.cross_entropy(logits, targets, reduction="none")


def smoothed(logits, targets, _):
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.2)


def log_odds(logits, targets, _):
    p = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    return -torch.log(p / (1 - p))


def margin(logits, targets, _):
    rivals = [max(z for v, z in enumerate(row) if v != y) for row, y in zip(logits, targets, strict=True)]
    return torch.stack([*rivals, logits.new_zeros(())])[:-1] - logits.gather(1, targets[:, None])[:, 0]


def divergence(logits, targets, ids):
    theirs = REFERENCE(input_ids=ids[None], use_cache=False).logits[0][: len(ids) - 1]
    kept = theirs[-len(targets) :] if len(targets) else theirs[:0]
    return F.kl_div(logits.log_softmax(-1), kept.detach().softmax(-1), reduction="none").sum(-1)


KINDS = {
    "cross_entropy": (cross_entropy, {}),
    "label smoothing": (smoothed, {"label_smoothing": 0.2}),
    "log_odds": (log_odds, {"criterion": "log_odds"}),
    "margin": (margin, {"criterion": "margin"}),
    "kl": (divergence, {"criterion": "kl", "reference": REFERENCE}),
}


def by_formula(kind, reduction):
    formula = KINDS[kind][0]

    def loss(params, example):
        ids, targets = example["input_ids"], example["labels"][1:]
        logits = functional_call(MODEL, params, (), {"input_ids": ids[None], "use_cache": False}).logits[
            0, :-1
        ]
        supervised = targets != -100  # of the rows here, always the last positions
        values = formula(logits[supervised], targets[supervised], ids)
        weight = example.get("weight", torch.tensor(1.0))
        return weight * (values.sum() / (max(1, len(values)) if reduction == "mean" else 1))

    return loss


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_next_tokens_equal_their_formulas(kind, reduction, weighted):
    rows = [{**row, "weight": torch.tensor(w)} for row, w in zip(ROWS, (0.5, -2.0, 1.0), strict=True)]
    rows = rows if weighted else ROWS
    ours, formula = causal_lm_loss(MODEL, reduction, **KINDS[kind][1]), by_formula(kind, reduction)
    assert ours.fused_head == (kind == "cross_entropy")
    params = params_of(MODEL)
    want = torch.stack([formula(params, row) for row in rows])
    assert_blocks_close(ours.batched(collate(rows)).detach(), want, 1e-12)
    assert_blocks_close(torch.stack([ours(params, row) for row in rows]), want, 1e-12)
    assert_blocks_close(collect(MODEL, rows, loss=ours), naive_blocks(formula, MODEL, rows))


def test_the_divergence_of_a_model_from_itself_has_no_gradient():
    blocks = collect(MODEL, ROWS, loss=causal_lm_loss(MODEL, criterion="kl", reference=MODEL))
    assert all(float(G.abs().max()) < 1e-15 for G in blocks.values())


class Logits(nn.Module):
    """A linear map with HF's interface."""

    def __init__(self, classes):
        super().__init__()
        self.map = nn.Linear(3, classes).double()

    def forward(self, x):
        return type("Output", (), {"logits": self.map(x)})()


@pytest.mark.parametrize(("task", "positions", "classes"), [
    ("classification", (), 4), ("masked_lm", (5,), 4), ("regression", (), 1), ("regression", (), 2),
])  # fmt: skip
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_of_logits_equal_torchs(task, positions, classes, reduction):
    model, generator = Logits(classes), torch.Generator().manual_seed(0)
    rows = []
    for _ in range(3):
        x = torch.randn(*positions, 3, generator=generator, dtype=torch.float64)
        if task == "regression":
            labels = torch.randn(classes, generator=generator, dtype=torch.float64)
        else:
            labels = torch.randint(0, classes, positions, generator=generator)
        if task == "masked_lm":
            labels[1] = -100
        rows.append({"x": x, "labels": labels})

    def formula(params, example):
        logits = functional_call(model, params, (example["x"],)).logits
        if task == "regression":
            return F.mse_loss(logits, example["labels"], reduction=reduction)
        if task == "classification":
            return F.cross_entropy(logits[None], example["labels"][None])
        return F.cross_entropy(logits, example["labels"], reduction=reduction)

    ours = model_loss(model, task, reduction)
    assert_blocks_close(collect(model, rows, loss=ours), naive_blocks(formula, model, rows), 1e-12)


def test_train_and_query_losses_may_differ():
    query_loss = causal_lm_loss(MODEL, "sum", criterion="log_odds")
    got = score(MODEL, ROWS, ROWS[:2], method=grad_dot(), query_loss=query_loss)
    rows = naive_blocks(naive_causal_lm_loss(MODEL), MODEL, ROWS)
    assert_blocks_close(got, dots(rows, naive_blocks(by_formula("log_odds", "sum"), MODEL, ROWS[:2])))


def test_advantages_are_rewards_less_their_groups_mean():
    assert advantages([1.0, 3.0, 5.0, 2.0], ["a", "b", "a", "b"]) == [-2.0, 0.5, 2.0, -0.5]
    assert advantages([], []) == []


def test_log_odds_of_the_certain_and_the_impossible_are_finite_in_float32():
    logits = torch.tensor([[60.0, 0.0, 0.0]])
    assert token_losses(logits, torch.tensor([0]), "log_odds").item() == pytest.approx(-59.307, abs=1e-3)
    assert token_losses(logits, torch.tensor([1]), "log_odds").item() == pytest.approx(60.0, abs=1e-3)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: _check("median", "cross_entropy", 0.0, None), "no reduction 'median': choose mean, sum"),
    (lambda: _check("mean", "hinge", 0.0, None), "'hinge': choose cross_entropy, log_odds, margin, kl"),
    (lambda: causal_lm_loss(MODEL, label_smoothing=1.0), "must be at least 0 and below 1, not 1.0"),
    (lambda: causal_lm_loss(MODEL, criterion="log_odds", label_smoothing=0.1), "is for cross_entropy"),
    (lambda: causal_lm_loss(MODEL, criterion="kl"), "needs a reference model"),
    (lambda: causal_lm_loss(MODEL, reference=MODEL), "needs a reference model"),
])  # fmt: skip
def test_losses_that_cannot_be_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_an_encoder_decoder_that_does_not_read_its_labels_is_refused():
    sides = {f"{side}_{size}": 2 for side in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    sizes = {"src_vocab_size": 20, "tgt_vocab_size": 20, "d_model": 8, **sides}
    config = FSMTConfig(langs=["en", "de"], encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes)
    with pytest.raises(InputError, match="FSMTForConditionalGeneration do not depend on its labels"):
        model_loss(FSMTForConditionalGeneration(config), "seq2seq_lm")


def test_a_decoder_that_classifies_finds_the_end_of_a_padded_text():
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, num_labels=3, pad_token_id=7,
    )  # fmt: skip
    model = randomize(LlamaForSequenceClassification(config), 0).double()
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(label)}
        for label, ids in enumerate(map(torch.tensor, ([1, 2, 3, 4, 5], [6, 3], [9, 8, 1])))
    ]
    loss = model_loss(model, "classification")
    together, alone = (collect(model, rows, loss=loss, token_batch_size=budget) for budget in (15, 1))
    assert_blocks_close(together, alone)
