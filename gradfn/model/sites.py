"""Where a model's weights are: the sites whose gradients are attributed, and how their modules are tapped."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from inspect import signature
from math import prod
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.model.heads import Heads, heads_of
from gradfn.model.layers import (
    AttentionInput,
    BareParameter,
    Conv,
    Embedding,
    Experts,
    Layer,
    Linear,
    NormScale,
)
from gradfn.types import Blocks, BlockSpec

Tap = Callable[..., Tensor]
"""`tap(weight name, x, y, ...) -> y`: puts the probes of one weight behind `y`."""

Attach = Callable[[nn.Module, Tap], Callable[[], None]]
"""Lets a module call its tap whenever it uses a weight; gives the function that undoes it."""


def attach_hook(module: nn.Module, tap: Tap) -> Callable[[], None]:
    """Tap a module whose output is its weight's: by a forward hook."""

    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], y: Any) -> Any:
        return tap("weight", args[0] if args else next(iter(named.values())), y)

    return module.register_forward_hook(hook, with_kwargs=True).remove


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that gets a block (or a part of it, an attention head's).

    Args:
        path: the module's path in the model (the parameter's, where a module has several weights).
        block: the name of its block: its own path ("root" for the model itself), or that of the first module
            with the same weight.
        module: the module itself.
        layer: how the block comes about.
        parameter, bias: the names of the weight and of the bias in the module.
        attach: how the module is tapped.
    """

    path: str
    block: str
    module: nn.Module
    layer: Layer
    parameter: str = "weight"
    bias: str = "bias"
    attach: Attach = field(default=attach_hook, repr=False)
    names: tuple[str, ...] = ()
    """The weight's name among the model's parameters, and the bias's."""
    probed: bool = True
    """Whether a probe sees it; otherwise its gradient is `vmap(grad)` of the parameter alone."""

    @property
    def weight(self) -> Tensor:
        """The weight, as stored."""
        return attrgetter(self.parameter)(self.module)

    @property
    def own_bias(self) -> Tensor | None:
        """The bias, where the block has one."""
        return attrgetter(self.bias)(self.module) if self.layer.bias else None

    @property
    def spec(self) -> BlockSpec:
        """The block's name, shape (bias column included), device and statistics dtype."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape = (self.layer.out_features, self.layer.in_features + self.layer.bias)
        return BlockSpec(self.block, shape, self.weight.device, dtype)


def _attach_channels_first(module: nn.Module, tap: Tap) -> Callable[[], None]:
    """Tap a normalisation over axis 1: its tap sees the features last."""
    return attach_hook(module, lambda name, x, y: tap(name, x, y.movedim(1, -1)).movedim(-1, 1))


def _attach_attention(module: Any, tap: Tap) -> Callable[[], None]:
    """Tap the functional projections inside nn.MultiheadAttention, which keeps the batch on axis 1."""
    own: dict[int, tuple[str, int]] = {}
    linear = F.linear
    width = module.embed_dim
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = module._parameters.get(name)
        if weight is not None:
            starts = (0, width, 2 * width) if name == "in_proj_weight" else (0,)
            own |= {weight[start].data_ptr(): (name, start) for start in starts}  # pyright: ignore
    own[module.out_proj.weight.data_ptr()] = ("out_proj.weight", 0)  # pyright: ignore

    def tapped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        found = own.get(weight.data_ptr())
        if found is None:
            return y
        name, start = found
        if name == "out_proj.weight":  # [tokens * batch, features]
            x, flat = x.unflatten(0, (-1, batch[0])), y.unflatten(0, (-1, batch[0]))
            return tap(name, x.movedim(1, 0), flat.movedim(1, 0)).movedim(0, 1).flatten(0, 1)
        batch[0] = x.shape[1]
        return tap(name, x.movedim(1, 0), y.movedim(1, 0), rows=(start, start + len(weight))).movedim(0, 1)

    batch = [1]
    forward = module.forward

    def patched(*args: Any, **named: Any) -> Any:
        with patch.object(F, "linear", tapped):
            return forward(*args, **named)

    module.forward = patched
    return lambda: delattr(module, "forward")


def _attach_experts(module: Any, tap: Tap) -> Callable[[], None]:
    """Tap HF's fused experts: the same sums as their forward's, with the rows of all experts side by side."""

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.flatten()
        tokens = torch.arange(len(hidden), device=hidden.device).repeat_interleave(top_k_index.shape[-1])
        real = chosen < module.num_experts  # some mixtures mark dropped tokens by one expert more
        order = chosen.masked_fill(~real, module.num_experts).argsort(stable=True)[: int(real.sum())]
        experts, tokens, weights = chosen[order], tokens[order], top_k_weights.flatten()[order]

        def apply(name: str, x: Tensor) -> Tensor:
            weight, bias = module.get_parameter(name), module._parameters.get(f"{name}_bias")
            parts = []
            for expert, part in zip(*_runs(experts, x), strict=True):
                own = weight[expert].T if getattr(module, "is_transposed", False) else weight[expert]
                parts.append(F.linear(part, own, None if bias is None else bias[expert]))
            return tap(name, x, torch.cat(parts), ragged=(tokens, experts, len(hidden)))

        if getattr(module, "has_gate", True):
            inner = apply("gate_up_proj", hidden[tokens])
            gate = getattr(module, "_apply_gate", None)
            if gate is None:
                first, second = inner.chunk(2, dim=-1)
                inner = module.act_fn(first) * second  # pyright: ignore[reportCallIssue]
            else:
                inner = gate(inner)
        else:
            inner = module.act_fn(apply("up_proj", hidden[tokens]))  # pyright: ignore[reportCallIssue]
        outer = apply("down_proj", inner) * weights[:, None]
        return torch.zeros_like(hidden).index_add(0, tokens, outer.to(hidden.dtype))

    module.forward = forward
    return lambda: delattr(module, "forward")


def _runs(experts: Tensor, x: Tensor) -> tuple[list[int], Sequence[Tensor]]:
    """The rows of `x` by expert; `experts` is sorted."""
    present, counts = experts.unique_consecutive(return_counts=True)
    return present.tolist(), x.split(counts.tolist())


def _owns_weight(module: nn.Module) -> bool:
    """Whether its weight is a parameter, not made of others as weight_norm makes it."""
    return module._parameters.get("weight") is not None


def _linear(path: str, module: nn.Module) -> list[Site]:
    if not isinstance(module, nn.Linear) or not _owns_weight(module):
        return []
    layer = Linear(module.out_features, module.in_features, module.bias is not None)
    return [Site(path, path, module, layer)]


def _hf_conv1d(path: str, module: nn.Module) -> list[Site]:
    # By name: transformers must not be imported to look at a model that does not use it.
    if type(module).__name__ != "Conv1D" or type(module).__module__ != "transformers.pytorch_utils":
        return []
    fan_in, fan_out = module.get_parameter("weight").shape
    return [Site(path, path, module, Linear(fan_out, fan_in, bias=True, transposed=True))]


def _conv(path: str, module: nn.Module) -> list[Site]:
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d) or not _owns_weight(module):
        return []
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    fan_in = module.in_channels // module.groups * prod(module.kernel_size)
    return [Site(path, path, module, Conv(module.out_channels, fan_in, module.bias is not None, module))]


def _embedding(path: str, module: nn.Module) -> list[Site]:
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
        return []
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    if (type(module).forward is not nn.Embedding.forward and not scaled) or not _owns_weight(module):
        return []
    scale: Any = getattr(module, "embed_scale", 1.0) if scaled else 1.0
    layer = Embedding(module.num_embeddings, module.embedding_dim, False, module.padding_idx, scale)
    return [Site(path, path, module, layer)]


CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def _norm(path: str, module: nn.Module) -> list[Site]:
    own = {name: p for name, p in module.named_parameters(recurse=False)}
    first = isinstance(module, CHANNEL_NORMS)
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    if not (first or named) or "weight" not in own or own.keys() - {"weight", "bias"}:
        return []
    layer = NormScale(own["weight"].numel(), 1, "bias" in own, module, first)
    return [Site(path, path, module, layer, attach=_attach_channels_first if first else attach_hook)]


def _attention(path: str, module: nn.Module) -> list[Site]:
    """q, k and v of nn.MultiheadAttention get a block each, as does the output projection."""
    if not isinstance(module, nn.MultiheadAttention):
        return []
    width, sites = module.embed_dim, []
    bias = module.in_proj_bias is not None
    for number, name in enumerate("qkv"):
        fused = module.in_proj_weight is not None
        weight = "in_proj_weight" if fused else f"{name}_proj_weight"
        fan_in = module.get_parameter(weight).shape[1]
        first = number * width
        rows = torch.arange(first, first + width)
        layer = AttentionInput(width, fan_in, bias, rows=rows, first=0 if fused else first)
        where = f"{path}.in_proj[{name}]".lstrip(".")
        sites.append(Site(where, where, module, layer, weight, "in_proj_bias", _attach_attention))
    out = f"{path}.out_proj".lstrip(".")
    layer = Linear(width, width, module.out_proj.bias is not None)
    return [*sites, Site(out, out, module, layer, "out_proj.weight", "out_proj.bias", _attach_attention)]


def _experts(path: str, module: nn.Module) -> list[Site]:
    own = dict(module.named_parameters(recurse=False))
    weights = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in own]
    fused = "down_proj" in weights and len(weights) == 2 and hasattr(module, "num_experts")
    routed = "top_k_index" in signature(type(module).forward).parameters
    if not fused or not routed or any(own[name].ndim != 3 for name in weights):
        return []
    transposed, sites = getattr(module, "is_transposed", False), []
    for name in weights:
        count, fan_out, fan_in = own[name].shape
        fan_out, fan_in = (fan_in, fan_out) if transposed else (fan_out, fan_in)
        bias = f"{name}_bias"
        layer = Experts(count * fan_out, fan_in, bias in own, count, transposed)
        where = f"{path}.{name}".lstrip(".")
        sites.append(Site(where, where, module, layer, name, bias, _attach_experts))
    return sites


ADAPTERS: tuple[Callable[[str, nn.Module], list[Site]], ...] = (
    _linear, _hf_conv1d, _conv, _embedding, _norm, _attention, _experts,
)  # fmt: skip
"""What turns a module into sites; the first that answers wins."""


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path or "root", pattern) for pattern in patterns)


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's LM head, where it has one (`get_output_embeddings` of HF models).

    >>> output_head(nn.Linear(2, 2)) is None
    True
    """
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None  # pyright: ignore[reportReturnType]


def all_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every weight that can have a block; parameters that no layer kind knows stand for themselves.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> [(site.path, type(site.layer).__name__) for site in all_sites(net)]
    [('0', 'Linear'), ('1', 'Scale')]
    """
    sites = [site for path, module in model.named_modules() for site in _adapt(path, module)]
    known = {id(p) for site in sites for p in _parameters(site)}
    bare = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in known:
                known.add(id(parameter))
                first = parameter.shape[0] if parameter.ndim else 1
                layer = BareParameter(first, parameter.numel() // max(first, 1), False)
                where = f"{path}.{name}".lstrip(".")
                bare.append(Site(where, where, module, layer, name, probed=False))
    inner = {id(site.module.out_proj) for site in sites if isinstance(site.module, nn.MultiheadAttention)}
    names = {id(p): name for name, p in model.named_parameters()}
    return tuple(
        replace(site, names=tuple(names[id(p)] for p in _parameters(site)))
        for site in (*sites, *bare)
        if id(site.module) not in inner
    )


def _adapt(path: str, module: nn.Module) -> list[Site]:
    return next((sites for adapter in ADAPTERS if (sites := adapter(path, module))), [])


def _parameters(site: Site) -> list[Tensor]:
    own = site.own_bias
    return [site.weight] if own is None else [site.weight, own]


def _is_default(site: Site, head: nn.Module | None, adapters: bool) -> bool:
    """Weight matrices but the LM head and embeddings; of a model with PEFT adapters, these alone."""
    if adapters and "lora_" not in site.path:
        return False
    return isinstance(site.layer, Linear | Conv | Experts) and site.module is not head


@dataclass(frozen=True)
class View:
    """Which gradients to look at, and how finely.

    Unless told otherwise: all weight matrices (linear layers, convolutions, experts) with their biases, but
    neither the LM head nor embeddings nor norms; of a model with PEFT adapters, the adapters alone.

    Args:
        include: globs over module paths; what matches one is taken, whatever it is: `"*"` is everything.
        exclude: globs over module paths; what matches one is left out.
        heads: give every attention head a block of its own, `path[head]`: True finds the heads by the model's
            config, a mapping from globs over module paths declares them.
        tokens: give every token a row of its own; its rows sum to the example's.

    Raises:
        InputError: one glob instead of a list of them.

    >>> View(exclude=["*.mlp.*"], tokens=True).settings()
    {'include': [], 'exclude': ['*.mlp.*'], 'heads': False, 'tokens': True}
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    heads: bool | Mapping[str, Heads] = False
    tokens: bool = False

    def __post_init__(self):
        for name, globs in (("include", self.include), ("exclude", self.exclude)):
            if isinstance(globs, str):
                raise InputError(f"{name} takes several globs, not {globs!r}: give {name}=[{globs!r}]")

    def settings(self) -> dict[str, Any]:
        """What a store records of it."""
        heads = self.heads if isinstance(self.heads, bool) else {k: repr(v) for k, v in self.heads.items()}
        return {
            "include": list(self.include),
            "exclude": list(self.exclude),
            "heads": heads,
            "tokens": self.tokens,
        }


def find_sites(model: nn.Module, view: View | None = None) -> tuple[Site, ...]:
    """Find the weights that get a block.

    Args:
        model: any module.
        view: which; None is the default of `View`.

    Raises:
        InputError: nothing is left, a chosen weight is used where it has no block too, or there are no heads.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> [site.spec.shape for site in find_sites(net)]
    [(4, 4), (2, 5)]
    """
    view = view or View()
    include, exclude = view.include, view.exclude
    head, adapters = output_head(model), hasattr(model, "peft_config")
    found = all_sites(model)
    chosen = [
        site
        for site in found
        if (_matches(site.path, include) if include else _is_default(site, head, adapters))
        and not _matches(site.path, exclude)
    ]
    if not chosen:
        paths = ", ".join(site.path or "root" for site in found[:8]) or "none"
        raise InputError(
            f"no layer is left to attribute with include={list(include)} exclude={list(exclude)}: "
            f"the model's layers are {paths}{', ...' if len(found) > 8 else ''}"
        )
    _refuse_shared_elsewhere(model, chosen)
    shared = _share_blocks(chosen)
    return _split_heads(model, shared, view.heads) if view.heads else shared


def _refuse_shared_elsewhere(model: nn.Module, sites: Sequence[Site]) -> None:
    """A weight's gradient is whole only when every module that uses it has a site."""
    ours = {id(site.module) for site in sites}
    weights = {id(site.weight): site.path or "root" for site in sites}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) not in weights or id(module) in ours:
                continue
            if isinstance(module, NotCalled):
                continue
            site, other = weights[id(parameter)], f"{path}.{name}"
            raise InputError(
                f"the weight of {site} is also {other}, which is not among the attributed layers, so its "
                f"gradient would be incomplete: --include {path} too, or --exclude {site}"
            )


NotCalled = nn.modules.linear.NonDynamicallyQuantizableLinear
"""The output projection of nn.MultiheadAttention, which only lends it its weight."""


def _share_blocks(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Give modules with the same weight one block, named after the first; biases of their own apart."""
    groups: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        part = site.path if isinstance(site.layer, AttentionInput) else ""
        groups.setdefault((id(site.weight), part), []).append(site)
    shared = []
    for site in sites:
        part = site.path if isinstance(site.layer, AttentionInput) else ""
        group = groups[id(site.weight), part]
        site = replace(site, block=group[0].path or "root")
        if all(other.own_bias is group[0].own_bias for other in group) or not site.layer.bias:
            shared.append(site)
        else:
            shared += [replace(site, layer=replace(site.layer, bias=False)), _bias_alone(site)]
    return tuple(shared)


def _bias_alone(site: Site) -> Site:
    """The site whose block is the bias column alone, `path[bias]`."""
    if not isinstance(site.layer, Linear):
        raise InputError(f"the bias of {site.path} cannot have a block of its own: --exclude {site.path}")
    none = torch.zeros(0, dtype=torch.long)
    path = site.path or "root"
    return replace(site, block=f"{path}[bias]", layer=replace(site.layer, columns=none, in_features=0))


def _split_heads(
    model: nn.Module, sites: Sequence[Site], declared: bool | Mapping[str, Heads]
) -> tuple[Site, ...]:
    """Give each attention head of the sites a site of its own; sites without heads stay as they are."""
    split, any_split = [], False
    for site in sites:
        if isinstance(declared, bool):
            found = heads_of(model, site.path)
        else:
            found = next((h for glob, h in declared.items() if fnmatchcase(site.path, glob)), None)
        if found is None:
            split.append(site)
            continue
        if not isinstance(site.layer, Linear):
            raise InputError(f"{site.path} is not a linear layer, so it has no attention heads")
        any_split = True
        split += _heads_of_site(site, site.layer, found)
    if not any_split:
        raise InputError(
            "no attention heads were found: declare them, "
            "heads={'*.q_proj': gf.model.Heads('rows', '(h d)', h=8)}"
        )
    return tuple(split)


def _heads_of_site(site: Site, layer: Linear, heads: Heads) -> list[Site]:
    width = layer.out_features if heads.side == "rows" else layer.in_features
    parts = []
    for name, index in heads.parts(width, site.path).items():
        if heads.side == "rows":
            rows = index if layer.rows is None else layer.rows[index]
            part = replace(layer, rows=rows, out_features=len(index))
        else:
            part = replace(layer, columns=index, in_features=len(index), bias=False)
        parts.append(replace(site, block=f"{site.block}[{name}]", layer=part))
    if heads.side == "columns" and layer.bias:
        parts.append(_bias_alone(site))
    return parts


def blocks_of(sites: Sequence[Site], grads: dict[str, Tensor]) -> Blocks:
    """Lay per-example gradients of parameters `[rows, *parameter]` out as blocks `[rows, out, in (+ 1)]`.

    >>> net = nn.Linear(3, 2)
    >>> grads = {"weight": torch.zeros(5, 2, 3), "bias": torch.zeros(5, 2)}
    >>> blocks_of(find_sites(net), grads)["root"].shape
    torch.Size([5, 2, 4])
    """
    blocks: Blocks = {}
    for site in sites:
        if site.block not in blocks:  # of a shared weight, the gradient is whole
            weight, *bias = (grads[name] for name in site.names)
            blocks[site.block] = site.layer.block(weight, bias[0] if bias and site.layer.bias else None)
    return blocks


def uncovered(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """Name the parameters that no block covers, with their sizes; nothing is skipped in silence.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> uncovered(net, find_sites(net))
    {'1.weight': 4, '1.bias': 4}
    """
    covered = {id(parameter) for site in sites for parameter in _parameters(site)}
    return {name: p.numel() for name, p in model.named_parameters() if id(p) not in covered}
