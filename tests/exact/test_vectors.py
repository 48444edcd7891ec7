import pytest
import torch
from exact_problems import NET, randoms
from tiny import language_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import gradfn as gf
from gradfn.exact import (
    params_of_blocks,
)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    "net",
    [
        NET,
        Shared(),
        nn.Sequential(nn.Linear(3, 4, bias=False), Conv1D(2, 4)),
        nn.Sequential(nn.Conv2d(4, 6, (2, 3), groups=2), nn.GroupNorm(2, 6), nn.Embedding(5, 3)),
    ],
    ids=["linear", "shared", "transposed", "others"],
)
def test_params_of_blocks_undoes_blocks_of(net):
    sites = gf.model.find_sites(net, gf.View(include=["*"]))
    v = randoms(3, gf.model.params_of(net))
    assert {name for site in sites for name in site.names} == v.keys()
    back = params_of_blocks(sites, gf.model.blocks_of(sites, v))
    assert back.keys() == v.keys()
    for name, value in v.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0)


def test_parts_of_parameters_have_no_way_back_and_are_named():
    model = language_model("llama")
    view = gf.View(include=["*q_proj"], heads=True)
    sites = gf.model.find_sites(model, view)
    with pytest.raises(gf.InputError, match=r"layers\.0\.self_attn\.q_proj\[0\].*do not split by head"):
        params_of_blocks(sites, gf.model.blocks_of(sites, randoms(1, gf.model.params_of(model))))
    attention = nn.MultiheadAttention(4, 2)
    sites = gf.model.find_sites(attention)
    with pytest.raises(gf.InputError, match=r"in_proj\[q\]"):
        params_of_blocks(sites, gf.model.blocks_of(sites, randoms(1, gf.model.params_of(attention))))
    with pytest.raises(gf.InputError, match="no block 2"):
        params_of_blocks(gf.model.find_sites(NET), {"0": torch.zeros(1, 4, 4)})
