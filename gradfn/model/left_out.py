"""What of a model no block covers."""

from collections.abc import Sequence

from torch import nn

from gradfn.model.layers import BareParameter
from gradfn.model.sites import Site, all_sites, parameters_of


def uncovered(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """The parameters that no block covers, with their sizes.

    >>> from gradfn.model.sites import find_sites
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> uncovered(net, find_sites(net))
    {'1.weight': 4, '1.bias': 4}
    """
    covered = {id(parameter) for site in sites for parameter in parameters_of(site)}
    return {name: p.numel() for name, p in model.named_parameters() if id(p) not in covered}


def dropped_matrices(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """The weight matrices of no known kind that no block covers, with their sizes.

    A table of positions, whose first axis is 1, is none.

    >>> from gradfn.model.sites import find_sites
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 2))
    >>> dropped_matrices(net, find_sites(net))
    {'1.weight_ih_l0': 24, '1.weight_hh_l0': 12}
    """
    left = uncovered(model, sites).keys()
    return {
        site.path: site.weight.numel()
        for site in all_sites(model)
        if isinstance(site.layer, BareParameter)
        and {*site.names} <= left
        and site.weight.ndim > 1
        and len(site.weight) > 1
    }
