"""The faster attention is the stock attention, in values and gradients, and only where it applies."""

import pytest
import torch
import torch.nn.functional as F

from gradfn.engine import attention
from gradfn.engine.attention import fast_attention


def _gradients(q, k, v, go, **options):
    out = F.scaled_dot_product_attention(q, k, v, **options)
    return (out, *torch.autograd.grad(out, (q, k, v), go))


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_stock_attention(tokens, scale, monkeypatch):
    monkeypatch.setattr(attention, "BAND", 32)
    monkeypatch.setattr(attention, "BAND_ELEMENTS", 32 * 100 * 4)  # groups of 4 of the 6 heads, or more
    generator = torch.Generator().manual_seed(tokens)
    # As models make them: heads are a transposed view.
    q, k, v = (
        torch.randn(2, tokens, 3, 8, dtype=torch.float64, generator=generator)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    )
    go = torch.randn(2, 3, tokens, 8, dtype=torch.float64, generator=generator)
    stock = _gradients(q, k, v, go, is_causal=True, scale=scale)
    with fast_attention():
        ours = _gradients(q, k, v, go, is_causal=True, scale=scale)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_large_logits_stay_finite():
    q = (30 * torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    go = torch.ones(1, 2, 40, 8)
    with fast_attention():
        grads = _gradients(q, q * 1.5, q + 1, go, is_causal=True)
    assert all(bool(torch.isfinite(value).all()) for value in grads)


@pytest.mark.parametrize(
    "options",
    [{}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool)}, {"is_causal": True, "dropout_p": 1.0}],
    ids=["full", "masked", "dropout"],
)
def test_other_attention_is_left_alone(options, monkeypatch):
    monkeypatch.setattr(attention._CausalAttention, "apply", lambda *_: pytest.fail("not ours to compute"))
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    with fast_attention():
        out = F.scaled_dot_product_attention(q, q, q, **options)
    assert out.shape == q.shape


def test_it_is_gone_afterwards():
    stock = F.scaled_dot_product_attention
    with pytest.raises(RuntimeError, match="boom"), fast_attention():
        raise RuntimeError("boom")
    assert F.scaled_dot_product_attention is stock
