"""TransformerLens: the model in a TransformerBridge, by head, and what its blocks are called there."""

from typing import Any

from torch import nn

from gradfn.errors import InputError
from gradfn.model.heads import Heads
from gradfn.model.sites import View, find_sites

_INNER = "_original_component"
"""What a bridge calls the module that it is around."""
_HEADS = {"q": "rows", "k": "rows", "v": "rows", "o": "columns"}
_WEIGHTS = {"q": "W_Q", "k": "W_K", "v": "W_V", "o": "W_O", "in": "W_in", "out": "W_out", "gate": "W_gate"}
_ALONE = {"embed": "embed.W_E", "pos_embed": "pos_embed.W_pos", "unembed": "unembed.W_U"}


def view(bridge: Any, *, heads: bool = False) -> View:
    """A view of `bridge.original_model`, which is the model to attribute: what `View` is by default.

    The head is left out, as everywhere. So is a fused projection that the bridge has split into `q`, `k` and
    `v`: it keeps the fused weight, but no forward pass reads it.

    Args:
        bridge: a `TransformerBridge` of an HF model.
        heads: give every head's part of `W_Q`, `W_K`, `W_V` and `W_O` a block of its own.

    Raises:
        InputError: what is no such bridge; weights that were folded.
    """
    known = _components(bridge)
    left_out = [path for path, name in known.items() if name.endswith(".attn.qkv") or name == "unembed"]
    split: dict[str, Heads] = {}
    for path, name in known.items() if heads else ():
        side = _HEADS.get(name.rpartition(".attn.")[2])
        if side is not None:
            count = bridge.cfg.n_heads
            if side == "rows" and not name.endswith(".q"):
                count = getattr(bridge.cfg, "n_key_value_heads", None) or count
            split[path] = Heads(side, "(h d)", h=count)
    return View(exclude=left_out, heads=split or False)


def names(bridge: Any, view: View | None = None) -> dict[str, str]:
    """What TransformerLens calls the blocks of `bridge.original_model`; `blocks.0.attn.W_Q[1]` is a head.

    A block of gradfn is `[out, in]` with the bias as its last column, and `W_Q[1]` in TransformerLens is
    `[in, out]`; scores do not depend on that.

    Args:
        bridge: a `TransformerBridge` of an HF model.
        view: what the scores were made with.

    Returns:
        `{block: name}`, in the order of the blocks.

    Raises:
        InputError: what is no such bridge; weights that were folded.
    """
    known, found = _components(bridge), dict[str, str]()
    for site in find_sites(bridge.original_model, view):
        place, dot, own = known.get(site.path, site.path).rpartition(".")
        name = _ALONE.get(own, f"{place}{dot}{_WEIGHTS.get(own, own)}")
        found[site.block] = name + site.block.removeprefix(site.path)
    return found


def _components(bridge: Any) -> dict[str, str]:
    """Paths in the model of transformers, and what the bridge calls the component there."""
    model = getattr(bridge, "original_model", None)
    if not isinstance(model, nn.Module) or not isinstance(bridge, nn.Module):
        raise InputError(
            f"a {type(bridge).__name__} is no TransformerBridge around a model: make one with "
            "TransformerBridge.boot_transformers; a HookedTransformer is attributed as it is, see "
            "docs/bridges.md"
        )
    if getattr(bridge, "compatibility_mode", False):
        raise InputError(
            "the weights of this bridge were folded, so their gradients are not those of the model that was "
            "trained: attribute a bridge without enable_compatibility_mode()"
        )
    known: dict[int, str] = {}
    for path, module in bridge.named_modules(remove_duplicate=False):
        inner = getattr(module, _INNER, None)
        if _INNER not in path and isinstance(inner, nn.Module):
            known.setdefault(id(inner), path)
    return {path: known[id(module)] for path, module in model.named_modules() if id(module) in known}
