import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from gradfn.data import collate
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.model import losses
from gradfn.model.losses import (
    CausalLMLoss,
    causal_lm_loss,
    head_is_plain,
    linear_cross_entropy,
    shifted_labels,
    token_losses,
)
from gradfn.model.params import params_of
from gradfn.testing import assert_blocks_close, naive_blocks, naive_causal_lm_loss
from gradfn.testing.strategies import VOCAB, randomize

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def hf_model(kind, seed=0, **more):
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    return randomize(transformers.AutoModelForCausalLM.from_config(config), seed)


class ScaledLogits(transformers.LlamaForCausalLM):
    """A Llama whose logits are doubled on the way out."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2.0 * output.logits
        return output


ROWS = [
    {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    for ids, labels in [
        ([1, 2, 3, 4], [-100, -100, 3, 4]),
        ([5, 6], [5, 6]),
        ([7], [7]),
        ([8, 9], [-100, -100]),
    ]
]


def test_labels_stand_where_they_are_predicted():
    labels = torch.tensor([[1, 2, -100], [3, -100, 4]])
    assert shifted_labels(labels).tolist() == [[2, -100, -100], [-100, 4, -100]]


def test_token_losses_are_those_of_torch_in_float32_or_better():
    logits, targets = torch.randn(3, 5, 7, dtype=torch.bfloat16), torch.randint(0, 7, (3, 5))
    targets[0, 2] = -100
    ours = token_losses(logits, targets)
    theirs = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    assert ours.dtype == torch.float32
    assert float(ours[0, 2]) == 0
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [0, 1, 6])
def test_the_chunked_head_equals_torch_in_value_and_gradient(monkeypatch, positions, bias):
    monkeypatch.setattr(losses, "_tile", lambda device: (4, 4))  # 6 rows, 9 columns: whole tiles and a part
    head = randomize(nn.Linear(3, 9, bias=bias), 0).requires_grad_(False)
    x = torch.randn(positions, 3, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.arange(positions), torch.rand(positions, dtype=torch.float64)
    ours = linear_cross_entropy(x, head.weight, head.bias, targets)
    theirs = F.cross_entropy(head(x), targets, reduction="none")
    assert_blocks_close(ours.detach(), theirs.detach(), 1e-12)
    (got,) = torch.autograd.grad((ours * weights).sum(), x)
    (want,) = torch.autograd.grad((theirs * weights).sum(), x)
    assert_blocks_close(got, want, 1e-12)


def test_the_chunked_head_does_not_overflow():
    x = torch.full((1, 1), 1e4)
    assert linear_cross_entropy(x, torch.tensor([[1.0], [-1.0]]), None, torch.tensor([0])).tolist() == [0.0]


def test_the_chunked_head_is_right_in_half_precision_and_a_large_vocabulary():
    """Even when the sum of exponentials, up to the size of the vocabulary, is beyond float16."""
    x = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.rand(100_000, 4, generator=torch.Generator().manual_seed(0)).half()
    (got,) = torch.autograd.grad(linear_cross_entropy(x, weight, None, torch.tensor([0])).sum(), x)
    want = weight.float().mean(0) - weight[0].float()
    assert_blocks_close(got[0].float(), want, 1e-2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fused", [True, False])
def test_batched_losses_equal_the_definition_on_each_row(reduction, fused):
    model = hf_model("Llama")
    loss = CausalLMLoss(model, reduction, fused_head=fused)
    naive = naive_causal_lm_loss(model, reduction)
    expected = torch.stack([naive(params_of(model), row) for row in ROWS])
    assert_blocks_close(loss.batched(collate(ROWS)).detach(), expected, 1e-12)
    assert_blocks_close(torch.stack([loss(params_of(model), row) for row in ROWS]), expected, 1e-12)
    assert expected[2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rows", [[ROWS[2]], [ROWS[3]], [ROWS[2], ROWS[2]]])
def test_a_batch_with_nothing_to_supervise_has_zero_gradients(rows):
    blocks = collect(hf_model("Llama"), rows)
    assert not any(bool(G.any()) for G in blocks.values())


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "Mistral", "Qwen2"])
def test_plain_heads_are_found_plain(kind):
    assert causal_lm_loss(hf_model(kind)).fused_head


NOT_PLAIN = [
    ("Granite", {"logits_scaling": 4.0}),
    ("Cohere", {"logit_scale": 0.25}),
    ("Gemma2", {"head_dim": 4, "final_logit_softcapping": 1.0}),
    ("Gemma2", {"head_dim": 4, "final_logit_softcapping": 30.0}),
]


@pytest.mark.parametrize(("kind", "more"), NOT_PLAIN)
def test_heads_that_scale_or_cap_are_not_plain_and_still_right(kind, more):
    model = hf_model(kind, **more)
    assert not head_is_plain(model)
    assert_blocks_close(collect(model, ROWS), naive_blocks(naive_causal_lm_loss(model), model, ROWS))


def test_a_cap_that_hardly_shows_is_still_right():
    """Small logits are nearly what they would be without the cap; nearly is not enough."""
    config = transformers.Gemma2Config(**SIZES, head_dim=4)
    model = randomize(transformers.Gemma2ForCausalLM(config), 0, scale=0.05)
    assert_blocks_close(collect(model, ROWS), naive_blocks(naive_causal_lm_loss(model), model, ROWS))


def test_a_wrapper_that_scales_logits_is_not_plain_and_still_right():
    model = randomize(ScaledLogits(transformers.LlamaConfig(**SIZES)), 0)
    assert not head_is_plain(model)
    assert_blocks_close(collect(model, ROWS), naive_blocks(naive_causal_lm_loss(model), model, ROWS))


def test_a_model_without_a_head_is_not_plain():
    assert not head_is_plain(nn.Linear(2, 2))


def test_a_context_shorter_than_the_trial_is_no_obstacle():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=4, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    assert head_is_plain(randomize(transformers.GPT2LMHeadModel(config), 0))


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes, is_causal=False)), "is_causal=True"),
        (lambda sizes: BertLMHeadModel(BertConfig(**sizes)), "is_decoder=True"),
        (lambda sizes: Gemma3ForCausalLM(Gemma3TextConfig(
            **sizes, num_key_value_heads=1, head_dim=8, use_bidirectional_attention=True,
        )), "use_bidirectional_attention=False"),
    ],
)  # fmt: skip
def test_a_model_that_reads_later_tokens_is_no_causal_lm(make, setting):
    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    model = make(sizes).train()
    with pytest.raises(InputError, match=f"later tokens.*set {setting} in its config"):
        causal_lm_loss(model)
    assert all(module.training for module in model.modules())


def test_a_decoder_of_an_encoder_type_is_a_causal_lm():
    config = BertConfig(vocab_size=40, hidden_size=16, num_attention_heads=2, is_decoder=True)
    assert causal_lm_loss(BertLMHeadModel(config).eval()).reduction == "mean"
