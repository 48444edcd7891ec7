"""From modules to factors: which weights get a block, and how a module's block is laid out.

A linear-like module has factors `x [batch, positions, in]` (its input) and `g [batch, positions, out]`
(the gradient at its output); its block is `G = sum_t g_t x_tᵀ`, `[out, in]` whatever the storage order.
A bias is the constant input 1, the last column of `G`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.types import Blocks, BlockSpec


@dataclass(frozen=True, eq=False)
class Site:
    """One module whose weight gets a block.

    Args:
        path: the module's path in the model.
        block: the name of its block: its own path ("root" for the model itself), or that of the first module
            with the same weight.
        module: the module itself.
        out_features, in_features: the size of its map, whatever the storage order.
        transposed: whether the weight is stored `[in, out]` (HF Conv1D).
    """

    path: str
    block: str
    module: nn.Module
    out_features: int
    in_features: int
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The module's weight, as stored."""
        return self.module.get_parameter("weight")

    @property
    def has_bias(self) -> bool:
        """Whether the block has a bias column."""
        return getattr(self.module, "bias", None) is not None

    @property
    def spec(self) -> BlockSpec:
        """The block's name, shape (bias column included), device and statistics dtype."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape = (self.out_features, self.in_features + self.has_bias)
        return BlockSpec(self.block, shape, self.weight.device, dtype)


def _linear(path: str, module: nn.Module) -> Site | None:
    if isinstance(module, nn.Linear):
        return Site(path, path or "root", module, module.out_features, module.in_features)
    return None


def _hf_conv1d(path: str, module: nn.Module) -> Site | None:
    # By name: transformers must not be imported to look at a model that does not use it.
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        fan_in, fan_out = module.get_parameter("weight").shape
        return Site(path, path or "root", module, int(fan_out), int(fan_in), transposed=True)
    return None


ADAPTERS: tuple[Callable[[str, nn.Module], Site | None], ...] = (_linear, _hf_conv1d)
"""What turns a module into a site; the first that answers wins."""


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's LM head, where it has one (`get_output_embeddings` of HF models).

    >>> output_head(nn.Linear(2, 2)) is None
    True
    """
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None  # pyright: ignore[reportReturnType]


def find_sites(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[Site, ...]:
    """Find the modules that get a block: all linear layers but the LM head, unless told otherwise.

    Args:
        model: any module.
        include: globs over module paths; only what matches one is taken (the LM head too, if it does).
        exclude: globs over module paths; what matches one is left out.

    Raises:
        InputError: nothing is left, or a chosen weight is also used by a module that has no site.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> [site.spec.shape for site in find_sites(net)]
    [(4, 4), (2, 5)]
    """
    head = output_head(model)
    found = [site for path, module in model.named_modules() if (site := _adapt(path, module))]
    chosen = [
        site
        for site in found
        if (_matches(site.path or "root", include) if include else site.module is not head)
        and not _matches(site.path or "root", exclude)
    ]
    if not chosen:
        paths = ", ".join(site.path for site in found[:8]) or "none"
        raise InputError(
            f"no linear layer is left to attribute with include={list(include)} exclude={list(exclude)}: "
            f"the model's linear layers are {paths}{', ...' if len(found) > 8 else ''}"
        )
    _refuse_shared_elsewhere(model, chosen)
    return _share_blocks(chosen)


def _adapt(path: str, module: nn.Module) -> Site | None:
    return next((site for adapter in ADAPTERS if (site := adapter(path, module))), None)


def _refuse_shared_elsewhere(model: nn.Module, sites: Sequence[Site]) -> None:
    """A weight's gradient is whole only when every module that uses it has a site."""
    ours = {id(site.module) for site in sites}
    weights = {id(site.weight): site.path for site in sites}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in weights and id(module) not in ours:
                site = weights[id(parameter)]
                raise InputError(
                    f"the weight of {site} is also {path}.{name}, which is not among the attributed layers, "
                    f"so its gradient would be incomplete: --exclude {site}"
                )


def _share_blocks(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Give modules with the same weight one block, named after the first of them."""
    first: dict[int, Site] = {}
    shared = []
    for site in sites:
        owner = first.setdefault(id(site.weight), site)
        if owner.module.bias is not site.module.bias:
            raise InputError(
                f"{owner.path} and {site.path} share a weight but not a bias: exclude one of them"
            )
        shared.append(replace(site, block=owner.block))
    return tuple(shared)


def blocks_of(sites: Sequence[Site], grads: dict[str, Tensor]) -> Blocks:
    """Lay per-example gradients of parameters `[rows, *parameter]` out as blocks `[rows, out, in (+ 1)]`.

    >>> net = nn.Linear(3, 2)
    >>> grads = {"weight": torch.zeros(5, 2, 3), "bias": torch.zeros(5, 2)}
    >>> blocks_of(find_sites(net), grads)["root"].shape
    torch.Size([5, 2, 4])
    """
    blocks = {}
    for site in sites:
        if (site.path or "root") != site.block:
            continue  # its gradient is in the block of the module that it shares the weight with
        prefix = f"{site.path}." if site.path else ""
        weight = grads[f"{prefix}weight"]
        weight = weight.mT if site.transposed else weight
        blocks[site.block] = (
            torch.cat([weight, grads[f"{prefix}bias"][..., None]], -1) if site.has_bias else weight
        )
    return blocks


def uncovered(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """Name the parameters that no block covers, with their sizes; nothing is skipped in silence.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> uncovered(net, find_sites(net))
    {'1.weight': 4, '1.bias': 4}
    """
    covered = {id(parameter) for site in sites for parameter in site.module.parameters(recurse=False)}
    return {name: p.numel() for name, p in model.named_parameters() if id(p) not in covered}
