"""Labels drawn from the model: reproducible, independent of batches, of the right distribution."""

import pytest
import torch
from tiny import MeanOfTokens, classes_of, language_model, make_model
from torch import nn

from gradfn import InputError, causal_lm_loss, fit, model_loss
from gradfn.model.sites import View
from gradfn.statistics import second_moment
from gradfn.statistics.labels import sample_labels
from gradfn.testing.strategies import randomize


def documents(rows=5, vocabulary=11):
    generator = torch.Generator().manual_seed(1)
    out = []
    for i in range(rows):
        ids = torch.randint(vocabulary, (3 + i % 4,), generator=generator)
        labels = ids.clone()
        labels[: 1 + i % 2] = -100
        out.append({"input_ids": ids, "labels": labels})
    return out


@pytest.mark.parametrize("fused", [True, False])
def test_drawn_where_given_and_independent_of_batches(fused):
    model, data = language_model("llama"), documents()
    loss = causal_lm_loss(model)
    loss = loss if fused else loss.with_whole_logits()
    one, many = (sample_labels(loss, data, seed=3, token_batch_size=size) for size in (1, 8192))
    other = sample_labels(loss, data, seed=4)
    for i, example in enumerate(data):
        assert torch.equal(one[i]["labels"], many[i]["labels"])
        assert torch.equal(one[i]["input_ids"], example["input_ids"])
        assert torch.equal(one[i]["labels"] == -100, example["labels"] == -100)
    assert any(not torch.equal(many[i]["labels"], other[i]["labels"]) for i in range(len(data)))
    assert any(not torch.equal(many[i]["labels"], data[i]["labels"]) for i in range(len(data)))


def test_the_frequency_of_a_token_is_its_probability():
    model = language_model("gpt2")
    ids = torch.tensor([3, 4])
    rows = [{"input_ids": ids, "labels": torch.tensor([-100, 4])}] * 4000
    drawn = sample_labels(causal_lm_loss(model), rows, seed=0)
    counts = torch.stack([drawn[i]["labels"][1] for i in range(4000)]).bincount(minlength=11)
    p = model(input_ids=ids[None]).logits[0, 0].softmax(-1).detach()
    assert ((counts / 4000 - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()


class Head(nn.Module):
    """Logits `W x`; what `model_loss` needs of a classifier or a regression."""

    def __init__(self, classes=3):
        super().__init__()
        self.linear = nn.Linear(2, classes, bias=False)

    def forward(self, x):
        return type("Output", (), {"logits": self.linear(x)})()


def true_fisher(model, xs):
    """`1/N sum_b (diag(p) - p pᵀ) ⊗ x xᵀ` of a linear softmax model."""
    p = (xs @ model.linear.weight.T).softmax(-1).detach()
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return sum(torch.kron(h, torch.outer(x, x)) for h, x in zip(H, xs, strict=True)) / len(xs)


def test_sampled_fisher_converges_at_the_monte_carlo_rate():
    torch.manual_seed(0)
    model, xs = Head().double(), torch.randn(4, 2).double()
    loss, exact = model_loss(model, "classification"), true_fisher(model, xs)
    errors = []
    for repeats in (16, 256):
        data = [{"x": x, "labels": torch.tensor(0)} for _ in range(repeats) for x in xs]
        runs = []
        for seed in range(12):
            H = fit(second_moment(), model, sample_labels(loss, data, seed), loss=loss)
            runs.append((H["linear"].dense() - exact).square().sum())
        errors.append(torch.stack(runs).mean().sqrt())
    assert 2.5 < errors[0] / errors[1] < 6.5  # sqrt(256 / 16) = 4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_regression_draws_make_the_gauss_newton_matrix(reduction):
    """`-log p` is the squared error, so the Fisher is the Gauss-Newton matrix `2/k I ⊗ E[x xᵀ]`."""
    torch.manual_seed(0)
    model, x = Head(2).double(), torch.randn(2).double()
    loss = model_loss(model, "regression", reduction=reduction)
    data = sample_labels(loss, [{"x": x, "labels": torch.zeros(2).double()}] * 20000, seed=1)
    H = fit(second_moment(), model, data, loss=loss)["linear"].dense()
    scale = 1.0 if reduction == "mean" else 2.0
    exact = scale * torch.kron(torch.eye(2).double(), torch.outer(x, x))
    assert (H - exact).abs().max() < 0.05 * exact.max()


def test_encoder_decoders_go_on_reading_the_given_tokens():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
                      decoder_start_token_id=0, pad_token_id=0)  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    row = {
        "input_ids": torch.tensor([3, 4]),
        "attention_mask": torch.ones(2).long(),
        "labels": torch.tensor([5, 6, 7]),
    }
    drawn = sample_labels(model_loss(model, "seq2seq_lm"), [row], seed=2)[0]
    assert drawn["decoder_input_ids"].tolist() == [0, 5, 6]
    assert drawn["labels"].shape == (3,)
    fitted = fit(second_moment(), model, [drawn] * 2, loss=model_loss(model, "seq2seq_lm"),
                 view=View(include=("decoder.block.0.layer.0.SelfAttention.q",)))  # fmt: skip
    assert len(fitted) == 1


@pytest.mark.parametrize("recurrent", [False, True])
def test_where_padding_changes_a_row_labels_and_their_fisher_are_those_of_unpadded_rows(recurrent):
    model, data = randomize(MeanOfTokens(recurrent), 0), classes_of([5, 60] + [6, 7] * 20)
    loss = model_loss(model, "classification")
    padded, alone = (sample_labels(loss, data, seed=3, token_batch_size=size) for size in (8192, 1))
    assert [padded[i]["labels"] for i in range(len(data))] == [alone[i]["labels"] for i in range(len(data))]
    view = View(include=("out",))
    found, want = (
        fit(second_moment(), model, drawn, loss=loss, view=view, token_batch_size=size)["out"].dense()
        for drawn, size in ((padded, 8192), (alone, 1))
    )
    torch.testing.assert_close(found, want)


def test_only_likelihoods_have_labels_to_draw():
    model = make_model()
    for loss in (causal_lm_loss(model, criterion="log_odds"), causal_lm_loss(model, label_smoothing=0.1)):
        with pytest.raises(InputError, match="plain cross-entropy"):
            sample_labels(loss, [])
