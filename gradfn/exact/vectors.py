"""Vectors of parameters: `{name: [k, *parameter]}`, row-aligned like blocks, and `k = 1` for a single one."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.model.sites import Site
from gradfn.types import Blocks, Params

Product = Callable[[Params], Params]
"""A symmetric linear map of vectors, `{name: [k, *parameter]}` to the same, row by row."""


def as_matrix(v: Params) -> Float[Tensor, "k n"]:
    """All parameters of each vector as one row, float32 or better.

    >>> as_matrix({"a": torch.zeros(1, 2, 2), "b": torch.ones(1, 1)})
    tensor([[0., 0., 0., 0., 1.]])
    """
    flat = torch.cat([value.detach().flatten(1) for value in v.values()], 1)
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def as_vectors(matrix: Float[Tensor, "k n"], like: Params) -> Params:
    """The inverse of `as_matrix`, with names, shapes and dtypes of other vectors.

    >>> as_vectors(torch.arange(3.0)[None], {"a": torch.zeros(1, 2), "b": torch.ones(1, 1)})
    {'a': tensor([[0., 1.]]), 'b': tensor([[2.]])}
    """
    parts = matrix.split([prod(value.shape[1:]) for value in like.values()], 1)
    return {
        name: part.reshape(len(matrix), *value.shape[1:]).to(value.dtype)
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def on_matrix(
    product: Product, like: Params, noun: str
) -> Callable[[Float[Tensor, "k n"]], Float[Tensor, "k n"]]:
    """A product as a function of the rows of a matrix.

    Args:
        product: the function of vectors.
        like: any vectors of it, for names, shapes and dtypes.
        noun: what to call it in a message.

    Raises:
        InputError: when called, if the result is not finite.

    >>> on_matrix(lambda v: {"a": v["a"] * 2}, {"a": torch.zeros(1, 2)}, "product")(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    def apply(matrix: Tensor) -> Tensor:
        given = product(as_vectors(matrix, like))
        result = as_matrix({name: given[name] for name in like}).to(matrix)
        if not bool(torch.isfinite(result).all()):
            raise InputError(
                f"the {noun} gave NaN or infinite numbers: check the loss, or compute in float64"
            )
        return result

    return apply


def params_of_blocks(sites: Sequence[Site], blocks: Blocks) -> Params:
    """Blocks `[k, out, in (+ 1)]` laid out as vectors `{name: [k, *parameter]}`; the inverse of `blocks_of`.

    With it, a preconditioner M of blocks preconditions vectors:
    `lambda v: params_of_blocks(sites, M(blocks_of(sites, v)))`.

    Args:
        sites: from `find_sites`, without heads.
        blocks: as `blocks_of` lays them out.

    Raises:
        InputError: a site has no block here, or its block is only a part of a parameter: a head, a part of
            nn.MultiheadAttention, the experts of a mixture.

    >>> from gradfn.model.sites import blocks_of, find_sites
    >>> sites = find_sites(torch.nn.Linear(3, 2))
    >>> v = {"weight": torch.ones(5, 2, 3), "bias": torch.zeros(5, 2)}
    >>> {name: value.shape for name, value in params_of_blocks(sites, blocks_of(sites, v)).items()}
    {'weight': torch.Size([5, 2, 3]), 'bias': torch.Size([5, 2])}
    """
    params: Params = {}
    for site in sites:
        if site.names[0] in params:  # of a shared weight
            continue
        layer = site.layer
        if not layer.is_whole:
            raise InputError(
                f"the block {site.block} is not the whole of one weight, so the parameter cannot be made of "
                f"it: exclude {site.path} from the view, and do not split by head"
            )
        if site.block not in blocks:
            raise InputError(f"there is no block {site.block}: give the blocks of all {len(sites)} sites")
        G = blocks[site.block]
        weight = G[..., :-1] if layer.bias else G
        params[site.names[0]] = layer.unblock(weight, site.weight.shape)
        if layer.bias:
            params[site.names[1]] = G[..., -1]
    return params
