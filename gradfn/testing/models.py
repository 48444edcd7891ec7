"""Hypothesis strategies: tiny random models in float64."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

VOCAB = 13
CONTEXT = 16
Draw = Callable[..., Any]
"""Hypothesis's `DrawFn`, which cannot be checked at runtime."""

FAMILIES = ("gpt2", "gpt_neox", "llama")


def seeds() -> st.SearchStrategy[int]:
    """Seeds of random generators."""
    return st.integers(0, 2**31 - 1)


def randomize(model: nn.Module, seed: int, scale: float = 0.4) -> nn.Module:
    """Give every parameter, biases and norms too, random values; eval mode, float64.

    >>> bool(randomize(nn.LayerNorm(3), 0).weight.std() > 0)
    True
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise * scale + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def _gpt2(width: int, heads: int, depth: int, attention: str, flags: tuple[bool, bool], _: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=width, n_layer=depth, n_head=heads,
        tie_word_embeddings=flags[0], bos_token_id=0, eos_token_id=0, attn_implementation=attention,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _gpt_neox(
    width: int, heads: int, depth: int, attention: str, flags: tuple[bool, bool], _: int
) -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=width + 4, max_position_embeddings=CONTEXT, tie_word_embeddings=flags[0],
        use_parallel_residual=flags[1], attention_bias=flags[1], bos_token_id=0, eos_token_id=0,
        attn_implementation=attention,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def _llama(
    width: int, heads: int, depth: int, attention: str, flags: tuple[bool, bool], kv_heads: int
) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width + 3, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=CONTEXT,
        tie_word_embeddings=flags[0], attention_bias=flags[1], mlp_bias=flags[1], pad_token_id=None,
        bos_token_id=0, eos_token_id=0, attn_implementation=attention,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return LlamaForCausalLM(config)


_BUILDERS = {"gpt2": _gpt2, "gpt_neox": _gpt_neox, "llama": _llama}


@st.composite
def language_models(draw: Draw, families: Sequence[str] = FAMILIES, *, attention: str = "sdpa") -> nn.Module:
    """Tiny causal LMs of 13 tokens: depth 1-2, width 4-8, 1-2 heads, tied or not, with and without biases.

    Args:
        families: any of "gpt2", "gpt_neox", "llama" (the last with fewer key-value heads at times).
        attention: transformers' attention implementation; "eager" passes through `vmap`.
    """
    heads = draw(st.integers(1, 2))
    kv_heads = draw(st.sampled_from([1, heads]))
    width = heads * draw(st.sampled_from([4, 2]) if heads == 2 else st.just(4))
    depth, flags = draw(st.integers(1, 2)), draw(st.tuples(st.booleans(), st.booleans()))
    model = _BUILDERS[draw(st.sampled_from(families))](width, heads, depth, attention, flags, kv_heads)
    return randomize(model, draw(seeds()))


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Tanh, nn.GELU, partial(nn.ReLU, inplace=False), partial(nn.LeakyReLU, 0.1),
)  # fmt: skip


@st.composite
def mlps(draw: Draw) -> nn.Sequential:
    """MLPs from 3 to 2 features: depth, width and biases at random; a hidden layer may come twice or be tied.

    The smallest is one linear layer.

    "twice" calls one module two times; "tied" has two modules with one weight and one bias.
    """
    if not draw(st.booleans()):
        return randomize(nn.Sequential(nn.Linear(3, 2, bias=draw(st.booleans()))), draw(seeds()), scale=0.7)  # pyright: ignore[reportReturnType]
    width, bias, make = draw(st.integers(1, 5)), draw(st.booleans()), draw(st.sampled_from(ACTIVATIONS))
    layers: list[nn.Module] = [nn.Linear(3, width, bias=draw(st.booleans())), make()]
    for kind in draw(st.lists(st.sampled_from(["plain", "twice", "tied"]), max_size=2)):
        hidden = nn.Linear(width, width, bias=bias)
        layers += [hidden, make()]
        if kind == "twice":
            layers += [hidden, make()]
        if kind == "tied":
            other = nn.Linear(width, width, bias=bias)
            other.weight, other.bias = hidden.weight, hidden.bias
            layers += [other, make()]
    layers.append(nn.Linear(width, 2, bias=draw(st.booleans())))
    return randomize(nn.Sequential(*layers), draw(seeds()), scale=0.7)  # pyright: ignore[reportReturnType]


CONVOLUTIONS = (
    {"kernel_size": 2},
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": 2, "stride": 2, "groups": 2},
    {"kernel_size": (1, 3), "dilation": (1, 2), "padding": (0, 2), "padding_mode": "circular"},
)


@st.composite
def convnets(draw: Draw) -> nn.Sequential:
    """From images `[2, 4, 4]` to 2 features: one or two convolutions, with or without a norm between them."""
    layers: list[nn.Module] = []
    for options in draw(st.lists(st.sampled_from(CONVOLUTIONS), min_size=1, max_size=2)):
        layers.append(nn.Conv2d(2, 2, **options))
        norm = draw(st.sampled_from([None, partial(nn.GroupNorm, 1, 2), partial(nn.BatchNorm2d, 2)]))
        layers += [norm()] if norm else []
        layers.append(nn.Tanh())
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(-3), nn.Linear(8, 2)]
    return randomize(nn.Sequential(*layers), draw(seeds()), scale=0.7)  # pyright: ignore[reportReturnType]


@st.composite
def encoders(draw: Draw) -> nn.Module:
    """Tiny BERTs that classify sequences (3 classes) or predict masked tokens."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=4, num_hidden_layers=1, num_attention_heads=draw(st.integers(1, 2)),
        intermediate_size=5, max_position_embeddings=CONTEXT, num_labels=3, pad_token_id=0,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    make = draw(st.sampled_from([BertForSequenceClassification, BertForMaskedLM]))
    return randomize(make(config), draw(seeds()))
