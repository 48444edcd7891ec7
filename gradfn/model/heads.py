"""Attention heads: which rows or columns of a projection's weight belong to which head.

A head has rows of the query, key and value projections, and columns of the output projection. In
grouped-query attention there are fewer key and value heads than query heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import einops
import torch
from torch import Tensor, nn

from gradfn.errors import InputError


@dataclass(frozen=True, init=False)
class Heads:
    """How the rows or columns of a weight split into attention heads.

    Args:
        side: "rows" (query, key, value) or "columns" (the output projection).
        pattern: the axis in einops's notation, with `h` for the heads: "(h d)", "(qkv h d)" as in GPT-2, or
            "(h qkv d)" as in GPT-NeoX. Patterns that are joined by "+" follow one another along the axis, and
            number their heads: "(h1 d) + (h2 d) + (h3 d)".
        sizes: the sizes of the pattern's axes. One of them may be left out.

    >>> Heads("rows", "(h qkv d)", h=2, qkv=3).parts(12, "c_attn")["1"]
    tensor([ 6,  7,  8,  9, 10, 11])
    >>> list(Heads("rows", "(h1 d) + (h2 d)", h1=2, h2=1, d=4).parts(12, "qk"))
    ['0.0', '0.1', '1.0']
    """

    side: str
    pattern: str
    sizes: Mapping[str, int]

    def __init__(self, side: str, pattern: str, **sizes: int):
        if side not in ("rows", "columns"):
            raise InputError(f"heads split rows or columns, not {side!r}")
        for field, value in (("side", side), ("pattern", pattern), ("sizes", sizes)):
            object.__setattr__(self, field, value)

    def parts(self, width: int, path: str) -> dict[str, Tensor]:
        """The indices of every head along an axis of `width`, by the head's name.

        Raises:
            InputError: the pattern does not fit the width.
        """
        patterns = [part.strip() for part in self.pattern.split("+")]
        if len(patterns) == 1:
            return {str(i): index for i, index in enumerate(self._split(patterns[0], "h", 0, width, path))}
        parts, start = {}, 0
        for number, pattern in enumerate(patterns):
            axis = f"h{number + 1}"
            size = self.sizes.get(axis, 0) * self.sizes.get("d", 0)
            for i, index in enumerate(self._split(pattern, axis, start, start + size, path)):
                parts[f"{number}.{i}"] = index
            start += size
        if start != width:
            raise InputError(f"the heads {self.pattern!r} of {path} cover {start} of its {width} {self.side}")
        return parts

    def _split(self, pattern: str, axis: str, start: int, stop: int, path: str) -> Tensor:
        names = pattern.strip("()").split()
        rest = " ".join(name for name in names if name != axis)
        sizes = {name: size for name, size in self.sizes.items() if name in names}
        try:
            return einops.rearrange(torch.arange(start, stop), f"{pattern} -> {axis} ({rest})", **sizes)
        except einops.EinopsError as error:
            raise InputError(
                f"{path} has {stop - start} {self.side}, which do not split as {pattern!r} with {dict(sizes)}"
            ) from error


_QUERY = ("q_proj", "self.query", "attention.query", "SelfAttention.q", "EncDecAttention.q", "q_lin")
_KEY_VALUE = (
    "k_proj", "v_proj", "self.key", "self.value", "attention.key", "attention.value", "SelfAttention.k",
    "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v", "k_lin", "v_lin",
)  # fmt: skip
_OUTPUT = (
    "o_proj", "attn.out_proj", "self_attn.out_proj", "encoder_attn.out_proj", "attention.out_proj",
    "attention.output.dense", "attention.dense",
    "self_attn.dense", "attn.c_proj", "SelfAttention.o", "EncDecAttention.o", "attention.out_lin",
    "self_attention.dense",
)  # fmt: skip
_FUSED = {
    "gpt2": ("attn.c_attn", "(qkv h d)"), "imagegpt": ("attn.c_attn", "(qkv h d)"),
    "decision_transformer": ("attn.c_attn", "(qkv h d)"),
    "gpt_neox": ("attention.query_key_value", "(h qkv d)"),
    "bloom": ("self_attention.query_key_value", "(h qkv d)"),
}  # fmt: skip
"""The fused projection of a model type, and the layout of its rows, which its name does not tell."""
_GROUPED = ("phi3", "phi4_multimodal")
"""The model types whose `qkv_proj` has all queries, then all keys, then all values."""


def _ends(path: str, names: tuple[str, ...]) -> bool:
    return path.endswith(tuple(f".{name}" for name in names))


def _nearest_config(model: nn.Module, path: str) -> tuple[Any, int | None]:
    """The config of the innermost module around a layer that has one with heads, and the number of heads.

    A model with an image part and a text part has a config for each.
    """
    modules = [model]
    for name in path.split("."):
        inner = modules[-1]._modules.get(name)
        if inner is None:
            break
        modules.append(inner)
    configs = [config for m in reversed(modules) if (config := getattr(m, "config", None)) is not None]
    configs += [c.get_text_config() for c in configs[-1:] if hasattr(c, "get_text_config")]
    for config in configs:
        for name in ("num_attention_heads", "n_head", "num_heads", "n_heads"):
            if isinstance(count := getattr(config, name, None), int):
                return config, count
    return None, None


def heads_of(model: nn.Module, path: str) -> Heads | None:
    """The heads of one layer, from its name and the model's config; None if it has no heads.

    Raises:
        InputError: the layout of a fused projection is not known.
    """
    config, count = _nearest_config(model, path)
    if count is None:
        return None
    path = f".{path}"
    if ".decoder." in path and isinstance(own := getattr(config, "decoder_attention_heads", None), int):
        count = own
    grouped = getattr(config, "num_key_value_heads", None) or count
    if _ends(path, _QUERY):
        return Heads("rows", "(h d)", h=count)
    if _ends(path, _KEY_VALUE):
        return Heads("rows", "(h d)", h=grouped)
    if _ends(path, _OUTPUT):
        return Heads("columns", "(h d)", h=count)
    kind = getattr(config, "model_type", "")
    if _ends(path, ("c_attn", "query_key_value")):
        name, pattern = _FUSED.get(kind, ("?", ""))
        if not _ends(path, (name,)):
            raise InputError(f"how {path[1:]} splits into heads is not known: declare it with heads={{...}}")
        return Heads("rows", pattern, h=count, qkv=3)
    if _ends(path, ("qkv_proj",)):
        if kind not in _GROUPED:
            raise InputError(f"how {path[1:]} splits into heads is not known: declare it with heads={{...}}")
        width = getattr(config, "head_dim", None) or config.hidden_size // count
        return Heads("rows", "(h1 d) + (h2 d) + (h3 d)", h1=count, h2=grouped, h3=grouped, d=width)
    return None
