"""Where a model's weights are: the sites whose gradients are attributed, and how to observe their modules."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from inspect import signature
from math import prod
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.model.adapters import adapter_parameters
from gradfn.model.attach import (
    Attach,
    attach_attention,
    attach_channels_first,
    attach_convolution,
    attach_dense_experts,
    attach_experts,
    attach_hook,
    attach_sorted_experts,
    is_transposed,
)
from gradfn.model.convolution import Conv
from gradfn.model.heads import Heads, heads_of
from gradfn.model.layers import (
    AttentionInput,
    BareParameter,
    Embedding,
    Experts,
    Layer,
    Linear,
    NormScale,
)
from gradfn.model.spread import refuse_spread
from gradfn.types import Blocks, BlockSpec


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that has a block, or a part of one, such as an attention head.

    Args:
        path: the path of the module in the model; of the parameter, if the module has several weights.
        block: the name of the block: the path of the first module that has this weight ("root" for the model
            itself), and the name of the head if there is one.
        module: the module itself.
        layer: how its input and output gradient become the block.
        parameter, bias: the names of the weight and of the bias in the module.
        attach: how to observe the module when it uses the weight.
    """

    path: str
    block: str
    module: nn.Module
    layer: Layer
    parameter: str = "weight"
    bias: str = "bias"
    attach: Attach = field(default=attach_hook, repr=False)
    names: tuple[str, ...] = ()
    """The names of the weight and of the bias among the model's parameters."""
    probed: bool = True
    """Whether a probe sees the weight; if not, `vmap(grad)` of the parameter alone gives its gradient."""

    @property
    def weight(self) -> Tensor:
        """The weight, as stored."""
        return attrgetter(self.parameter)(self.module)

    @property
    def owner(self) -> nn.Module:
        """The module that has the weight: the module itself, or one inside it."""
        return self.module.get_submodule(self.parameter.rpartition(".")[0])

    @property
    def own_bias(self) -> Tensor | None:
        """The bias, if the block has one."""
        return attrgetter(self.bias)(self.module) if self.layer.bias else None

    @property
    def spec(self) -> BlockSpec:
        """The name, shape (with the bias column) and device of the block, and the dtype of its statistics."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape = (self.layer.out_features, self.layer.in_features + self.layer.bias)
        return BlockSpec(self.block, shape, self.weight.device, dtype)


def _owns_weight(module: nn.Module) -> bool:
    """Whether the weight is a parameter; weight_norm computes it from other parameters."""
    return module._parameters.get("weight") is not None


def _linear(path: str, module: nn.Module) -> list[Site]:
    if not isinstance(module, nn.Linear) or not _owns_weight(module):
        return []
    # TransformerLens sets biases that are plain tensors.
    layer = Linear(module.out_features, module.in_features, isinstance(module.bias, nn.Parameter))
    return [Site(path, path, module, layer)]


def _hf_conv1d(path: str, module: nn.Module) -> list[Site]:
    # By name, because a model without transformers must not import it.
    if type(module).__name__ != "Conv1D" or type(module).__module__ != "transformers.pytorch_utils":
        return []
    fan_in, fan_out = module.get_parameter("weight").shape
    return [Site(path, path, module, Linear(fan_out, fan_in, bias=True, transposed=True))]


def _conv(path: str, module: nn.Module) -> list[Site]:
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or not _owns_weight(module):
        return []
    fan_in = module.in_channels // module.groups * prod(module.kernel_size)
    layer = Conv(module.out_channels, fan_in, module.bias is not None, module)
    known = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [Site(path, path, module, layer, attach=attach_hook if known else attach_convolution)]


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
    return [Site(path, path, module, layer, attach=attach_channels_first if first else attach_hook)]


def _attention(path: str, module: nn.Module) -> list[Site]:
    """The blocks of nn.MultiheadAttention: one each for q, k, v and the output projection."""
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
        sites.append(Site(where, where, module, layer, weight, "in_proj_bias", attach_attention))
    out = f"{path}.out_proj".lstrip(".")
    layer = Linear(width, width, module.out_proj.bias is not None)
    return [*sites, Site(out, out, module, layer, "out_proj.weight", "out_proj.bias", attach_attention)]


def _experts(path: str, module: nn.Module) -> list[Site]:
    own = dict(module.named_parameters(recurse=False))
    weights = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in own]
    inputs = signature(type(module).forward).parameters
    routed = bool(inputs.keys() & {"top_k_index", "router_indices"})
    dense = type(module).__name__ == "Llama4TextExperts"
    if "down_proj" not in weights or len(weights) != 2 or not (routed or dense):
        return []
    if any(own[name].ndim != 3 for name in weights):
        return []
    transposed, sites = is_transposed(module), []
    attach = attach_dense_experts if dense else attach_experts
    for name in weights:
        count, fan_out, fan_in = own[name].shape
        fan_out, fan_in = (fan_in, fan_out) if transposed else (fan_out, fan_in)
        bias = f"{name}_bias"
        layer = Experts(count * fan_out, fan_in, bias in own, count, transposed)
        where = f"{path}.{name}".lstrip(".")
        sites.append(Site(where, where, module, layer, name, bias, attach))
    return sites


def _sorted_experts(path: str, module: nn.Module) -> list[Site]:
    sites = []
    for name in ("input_linear", "output_linear"):
        inner: Any = getattr(module, name, None)
        if type(inner).__name__ != "JetMoeParallelExperts":
            return []
        layer = Experts(inner.num_experts * inner.output_size, inner.input_size, False, inner.num_experts)
        where = f"{path}.{name}".lstrip(".")
        sites.append(Site(where, where, module, layer, f"{name}.weight", attach=attach_sorted_experts))
    return sites


ADAPTERS: tuple[Callable[[str, nn.Module], list[Site]], ...] = (
    _linear, _hf_conv1d, _conv, _embedding, _norm, _attention, _experts,
    _sorted_experts,
)  # fmt: skip
"""Each gives the sites of a module it knows; the first that gives any decides."""


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
    """Every weight that can have a block; a parameter that no layer kind describes is a site of its own.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> [(site.path, site.layer.kind) for site in all_sites(net)]
    [('0', 'linear'), ('1', 'norm')]
    """
    sites: list[Site] = []
    for path, module in model.named_modules():
        sites += next((found for adapter in ADAPTERS if (found := adapter(path, module))), [])
    known = {id(p) for site in sites for p in parameters_of(site)}
    bare = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in known:
                known.add(id(parameter))
                bare.append(_bare(path, module, name))
    inner = {id(site.module.out_proj) for site in sites if isinstance(site.module, nn.MultiheadAttention)}
    names = {id(p): name for name, p in model.named_parameters()}
    return tuple(
        replace(site, names=tuple(names[id(p)] for p in parameters_of(site)))
        for site in (*sites, *bare)
        if id(site.module) not in inner
    )


def _bare(path: str, module: nn.Module, name: str) -> Site:
    """The site of a parameter that is attributed by itself."""
    parameter = attrgetter(name)(module)
    first = parameter.shape[0] if parameter.ndim else 1
    layer = BareParameter(first, parameter.numel() // max(first, 1), False)
    where = f"{path}.{name}".lstrip(".")
    return Site(where, where, module, layer, name, probed=False)


def parameters_of(site: Site) -> list[Tensor]:
    """The weight of a site, and its bias if it has one."""
    own = site.own_bias
    return [site.weight] if own is None else [site.weight, own]


def _by_default(found: Sequence[Site], head: nn.Module | None, adapters: set[str]) -> list[Site]:
    """The weight matrices without LM head and tied embeddings; with PEFT adapters, what these trained."""
    if adapters:
        return [site for site in found if site.names[0] in adapters]
    out = {id(site.weight) for site in found if not site.layer.by_default}
    return [site for site in found if site.module is not head and id(site.weight) not in out]


def _trained(site: Site, adapters: set[str]) -> Site:
    """The site, or that of its bias alone where adapters have trained nothing else of it."""
    weight, *bias = site.names
    if weight in adapters or adapters.isdisjoint(bias):
        return site
    return replace(_bare(site.path, site.module, site.bias), names=tuple(bias))


@dataclass(frozen=True)
class View:
    """Which weights have a block, and how finely their gradients are split.

    The default is all weight matrices (linear layers, convolutions, experts) with their biases, without the
    LM head, embeddings and norms. In a model with PEFT adapters it is all that these have trained, modules,
    tokens and biases of their own (`modules_to_save`, `trainable_token_indices`, `bias`) too.

    Args:
        include: globs over module paths; a weight of any kind is included if one matches. `["*"]` includes
            every parameter.
        exclude: globs over module paths; a weight is excluded if one matches.
        heads: give every attention head a block of its own, `path[head]`. True reads the heads from the
            model's config; a mapping from globs over module paths to `Heads` declares them.
        tokens: give every token a row of its own; the rows of an example's tokens sum to the example's row.
        biases: whether a bias is a column of its weight's block; if not, it is left out.

    Raises:
        InputError: a string was given instead of a list of globs.

    >>> View(exclude=["*.mlp.*"], tokens=True).settings()
    {'include': [], 'exclude': ['*.mlp.*'], 'heads': False, 'tokens': True}
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    heads: bool | Mapping[str, Heads] = False
    tokens: bool = False
    biases: bool = True

    def __post_init__(self):
        for name, globs in (("include", self.include), ("exclude", self.exclude)):
            if isinstance(globs, str):
                raise InputError(f"{name} takes several globs, not {globs!r}: give {name}=[{globs!r}]")

    def settings(self) -> dict[str, Any]:
        """The fields as a store records them."""
        heads = self.heads if isinstance(self.heads, bool) else {k: repr(v) for k, v in self.heads.items()}
        return {
            "include": list(self.include),
            "exclude": list(self.exclude),
            "heads": heads,
            "tokens": self.tokens,
            **({} if self.biases else {"biases": False}),
        }


def find_sites(model: nn.Module, view: View | None = None) -> tuple[Site, ...]:
    """Find the weights that get a block.

    Args:
        model: any module.
        view: which weights; None is the default of `View`.

    Raises:
        InputError: no weight is left, a module that is not included uses one of the weights too, no layer has
            attention heads, or a tensor-parallel plan has split the weights.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> [site.spec.shape for site in find_sites(net)]
    [(4, 4), (2, 5)]
    """
    refuse_spread(model)
    view = view or View()
    include, exclude = view.include, view.exclude
    head, adapters = output_head(model), adapter_parameters(model)
    found = all_sites(model)
    # What is included may be written for models of several families; each exclusion is meant.
    for name, each in (("include", [list(include)]), ("exclude", [[glob] for glob in exclude])):
        for globs in each:
            if globs and not any(_matches(site.path, globs) for site in found):
                raise InputError(f"`{name}` {', '.join(globs)} matches no layer: {_named(found)}")
    if not include and view.biases:
        found = tuple({site.path: site for site in (_trained(one, adapters) for one in found)}.values())
    chosen = (
        [s for s in found if _matches(s.path, include)] if include else _by_default(found, head, adapters)
    )
    chosen = [site for site in chosen if not _matches(site.path, exclude)]
    if not chosen:
        raise InputError(
            f"no layer is left to attribute with include={list(include)} exclude={list(exclude)}: "
            f"{_named(found)}"
        )
    if not view.biases:
        chosen = [replace(s, layer=replace(s.layer, bias=False), names=s.names[:1]) for s in chosen]
    shared = _share_blocks(_with_uses_elsewhere(model, chosen, {id(site.module) for site in found}))
    return _split_heads(model, shared, view.heads) if view.heads else shared


def _named(found: Sequence[Site]) -> str:
    paths = ", ".join(site.path or "root" for site in found[:8]) or "none"
    return f"the model's layers are {paths}{', ...' if len(found) > 8 else ''}"


def _with_uses_elsewhere(model: nn.Module, sites: Sequence[Site], known: set[int]) -> list[Site]:
    """The sites, without a probe where a module of an unknown kind uses the weight too.

    Raises:
        InputError: a known module that is not included uses the weight too.
    """
    ours, unseen = {id(site.owner) for site in sites}, set[int]()
    weights = {id(site.weight): site.path or "root" for site in sites}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) not in weights or id(module) in ours:
                continue
            if id(module) not in known:
                unseen.add(id(parameter))
                continue
            site, other = weights[id(parameter)], f"{path}.{name}"
            raise InputError(
                f"the weight of {site} is also {other}, which is not among the attributed layers, so its "
                f"gradient would be incomplete: add {path} to `include`, or {site} to `exclude`"
            )
    return [replace(site, probed=site.probed and id(site.weight) not in unseen) for site in sites]


def _share_blocks(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Give modules with one weight one block, named after the first; biases that differ get their own."""
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
        raise InputError(
            f"the bias of {site.path} cannot have a block of its own: add {site.path} to `exclude`"
        )
    none = torch.zeros(0, dtype=torch.long)
    path = site.path or "root"
    return replace(site, block=f"{path}[bias]", layer=replace(site.layer, columns=none, in_features=0))


def _split_heads(
    model: nn.Module, sites: Sequence[Site], declared: bool | Mapping[str, Heads]
) -> tuple[Site, ...]:
    """Give each attention head a site of its own; sites without heads stay as they are."""
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
        if site.block not in blocks:  # the gradient of a shared weight already has all its uses
            weight, *bias = (grads[name] for name in site.names)
            blocks[site.block] = site.layer.block(weight, bias[0] if bias and site.layer.bias else None)
    return blocks
