"""Hypothesis strategies: tiny random models, ragged data and chains of transforms, all in float64."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from gradfn.data import IGNORED
from gradfn.losses import CausalLMLoss
from gradfn.per_example import call
from gradfn.testing.naive import naive_causal_lm_loss
from gradfn.transforms import Chain, Transform, adafactor, adam, chain, project, unit_normalize
from gradfn.transforms.project import Distribution
from gradfn.types import Example, LossFn, Params

VOCAB = 13
CONTEXT = 16
Draw = Callable[..., Any]
"""Hypothesis's `DrawFn`, which cannot be checked at runtime."""

FAMILIES = ("gpt2", "gpt_neox", "llama")
DISTRIBUTIONS: tuple[Distribution, ...] = ("rademacher", "gaussian", "orthonormal")


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, a loss and data to attribute.

    Args:
        model: a module in float64.
        loss: the loss that an engine gets.
        reference: the same loss written plainly, for one unpadded example.
        rows: examples, ragged where they are token rows.
    """

    model: nn.Module
    loss: LossFn
    reference: Callable[[Params, Example], Tensor]
    rows: list[dict[str, Tensor]]


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


@st.composite
def token_rows(
    draw: Draw, vocab: int = VOCAB, *, min_rows: int = 1, max_rows: int = 5, max_length: int = 7
) -> list[dict[str, Tensor]]:
    """Ragged token rows with labels: all supervised, a completion only, scattered positions, or none.

    Args:
        vocab: token ids are below it.
        min_rows, max_rows: how many rows.
        max_length: tokens of a row, at most; at least 1.
    """
    rows = []
    for _ in range(draw(st.integers(min_rows, max_rows))):
        ids = torch.tensor(draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=max_length)))
        match draw(st.sampled_from(["all", "completion", "scattered", "none"])):
            case "all":
                ignored = torch.zeros(len(ids), dtype=torch.bool)
            case "completion":
                ignored = torch.arange(len(ids)) < draw(st.integers(0, len(ids)))
            case "scattered":
                ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
            case _:
                ignored = torch.ones(len(ids), dtype=torch.bool)
        rows.append({"input_ids": ids, "labels": ids.masked_fill(ignored, IGNORED)})
    return rows


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Tanh, nn.GELU, partial(nn.ReLU, inplace=False), partial(nn.LeakyReLU, 0.1),
)  # fmt: skip


@st.composite
def mlps(draw: Draw) -> nn.Sequential:
    """MLPs from 3 to 2 features: depth, width and biases at random; a hidden layer may come twice or be tied.

    "twice" calls one module two times; "tied" has two modules with one weight and one bias.
    """
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


@st.composite
def vector_rows(
    draw: Draw, features: int = 3, outputs: int = 2, *, min_rows: int = 1, max_rows: int = 6
) -> list[dict[str, Tensor]]:
    """Regression rows `{"x": [features] or [positions, features], "y": [outputs]}`; some inputs are zero."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    positions = draw(st.sampled_from([(), (1,), (3,)]))
    rows = []
    for zero in draw(st.lists(st.booleans(), min_size=min_rows, max_size=max_rows)):
        x = torch.randn((*positions, features), generator=generator, dtype=torch.float64)
        y = torch.randn((outputs,), generator=generator, dtype=torch.float64)
        rows.append({"x": x * (not zero), "y": y})
    return rows


def squared_error(model: nn.Module) -> LossFn:
    """A user's loss, `sum (f(x) - y)²`, summed over positions too.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> squared_error(net)({"weight": torch.ones(1, 1)}, {"x": torch.ones(1), "y": torch.zeros(1)})
    tensor(1.)
    """

    def loss(params: Params, example: Example) -> Tensor:
        return (call(model, params, example["x"]) - example["y"]).square().sum()

    return loss


@st.composite
def problems(draw: Draw, kinds: Sequence[str] = ("lm", "mlp"), *, min_rows: int = 1) -> Problem:
    """A model with its loss and data: language models, with and without the fused head, and MLPs.

    Args:
        kinds: any of "lm" and "mlp".
        min_rows: rows of data, at least.
    """
    if draw(st.sampled_from(kinds)) == "mlp":
        mlp = draw(mlps())
        loss = squared_error(mlp)
        return Problem(mlp, loss, loss, draw(vector_rows(min_rows=min_rows)))
    model, reduction = draw(language_models()), draw(st.sampled_from(["mean", "sum"]))
    loss = CausalLMLoss(model, reduction, fused_head=draw(st.booleans()))
    return Problem(model, loss, naive_causal_lm_loss(model, reduction), draw(token_rows(min_rows=min_rows)))


@st.composite
def chains(
    draw: Draw,
    shapes: Mapping[str, tuple[int, int]],
    *,
    stages: Sequence[str] = ("project", "adam", "adafactor", "unit_normalize"),
    max_stages: int = 4,
) -> Chain:
    """Chains of random stages, with random moments that fit, for blocks of these shapes.

    Args:
        shapes: `(out, in)` of every block, the bias column included.
        stages: what to draw from.
        max_stages: how many stages at most.
    """
    now = dict(shapes)
    made: list[Transform] = []
    for kind in draw(st.lists(st.sampled_from(stages), max_size=max_stages)):
        seed = draw(seeds())
        generator = torch.Generator().manual_seed(seed)
        if kind == "project":
            dim = draw(st.integers(1, 6))
            made.append(project(dim, draw(st.sampled_from(DISTRIBUTIONS)), seed))
            now = {name: (min(dim, out), min(dim, fan_in)) for name, (out, fan_in) in now.items()}
        elif kind == "unit_normalize":
            made.append(unit_normalize())
        else:
            moments = {
                name: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
                for name, shape in now.items()
            }
            made.append(adam(moments) if kind == "adam" else adafactor(moments))
    return chain(*made)


def shapes_of(blocks: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The shape of one row of every dense block.

    >>> shapes_of({"a": torch.zeros(7, 2, 3)})
    {'a': (2, 3)}
    """
    return {name: (G.shape[-2], G.shape[-1]) for name, G in blocks.items()}
