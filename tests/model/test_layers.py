import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.model.layers import ExpertRouting, Experts, Linear
from gradfn.model.left_out import uncovered
from gradfn.model.sites import View, blocks_of, find_sites, output_head


class TinyLM(nn.Module):
    """An embedding, two layers and a head, tied or not."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.body = nn.Embedding(5, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.out = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.head


def paths(model, view=None):
    return [site.path for site in find_sites(model, view)]


def test_all_linear_layers_but_the_head_are_attributed():
    model = TinyLM()
    assert output_head(model) is model.head
    assert paths(model) == ["body.0", "out"]


@pytest.mark.parametrize(("include", "exclude", "expected"), [
    (["body.*"], [], ["body.0", "body.1"]),
    (["*"], [], ["embed", "body.0", "body.1", "out", "head"]),
    (["head"], [], ["head"]),
    ([], ["body.*"], ["out"]),
    (["*"], ["h?ad", "out", "embed"], ["body.0", "body.1"]),
])  # fmt: skip
def test_globs_choose_modules(include, exclude, expected):
    assert paths(TinyLM(), View(include, exclude)) == expected


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_one_glob_in_place_of_a_list_of_them_is_refused(which):
    with pytest.raises(InputError, match=f"{which} takes several globs"):
        View(**{which: "mlp*"})


@pytest.mark.parametrize(
    "view", [View(["no"]), View(["no", "n"]), View(exclude=["no"]), View(["*"], ["head", "body"])]
)
def test_a_glob_that_matches_nothing_is_refused_with_the_layers_there_are(view):
    with pytest.raises(
        InputError, match=r"clude` [\w, ]+ matches no layer: .*embed, body\.0, body\.1, out, head"
    ):
        find_sites(TinyLM(), view)


def test_globs_that_leave_nothing_are_refused_with_the_layers_there_are():
    with pytest.raises(InputError, match=r"include=\['out'\].*embed, body\.0, body\.1, out, head"):
        find_sites(TinyLM(), View(["out"], ["o*"]))


def test_a_model_without_weight_matrices_is_refused_unless_told_otherwise():
    with pytest.raises(InputError, match="the model's layers are root"):
        find_sites(nn.LayerNorm(3))
    assert paths(nn.LayerNorm(3), View(include=["*"])) == [""]


def test_a_tied_head_has_one_block_with_the_embedding_and_is_refused_without_it():
    model = TinyLM(tied=True)
    assert paths(model) == ["body.0", "out"]
    blocks = [(site.path, site.block) for site in find_sites(model, View(include=["embed", "head"]))]
    assert blocks == [("embed", "embed"), ("head", "embed")]
    with pytest.raises(
        InputError, match=r"head is also embed\.weight.*add embed to `include`, or head to `exclude`"
    ):
        find_sites(model, View(include=["head"]))


def test_a_second_head_that_is_tied_to_an_embedding_is_out_by_default():
    net = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)])
    net[2].weight = net[0].weight
    assert paths(net) == ["1"]


def test_blocks_are_out_by_in_with_the_bias_last_whatever_the_storage():
    linear, conv, bare = nn.Linear(3, 2), Conv1D(2, 3), nn.Linear(3, 2, bias=False)
    model = nn.ModuleDict({"linear": linear, "conv": conv, "bare": bare})
    grads = {name: torch.randn(4, *p.shape) for name, p in model.named_parameters()}
    sites = find_sites(model)
    assert [site.spec.shape for site in sites] == [(2, 4), (2, 4), (2, 3)]
    blocks = blocks_of(sites, grads)
    assert torch.equal(blocks["linear"][:, :, :3], grads["linear.weight"])
    assert torch.equal(blocks["conv"][:, :, :3], grads["conv.weight"].mT)
    assert torch.equal(blocks["conv"][:, :, 3], grads["conv.bias"])
    assert torch.equal(blocks["bare"], grads["bare.weight"])


def test_the_model_itself_may_be_the_layer():
    net = nn.Linear(3, 2)
    assert [site.block for site in find_sites(net)] == ["root"]
    assert list(blocks_of(find_sites(net), {"weight": torch.ones(1, 2, 3), "bias": torch.ones(1, 2)})) == [
        "root"
    ]


def test_statistics_are_float32_or_better():
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        (site,) = find_sites(nn.Linear(2, 2).to(dtype))
        assert site.spec.dtype == wanted


def test_tied_layers_share_the_block_of_the_first():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    sites = find_sites(nn.Sequential(first, second))
    assert [(site.path, site.block) for site in sites] == [("0", "0"), ("1", "0")]
    assert list(blocks_of(sites, {"0.weight": torch.zeros(1, 3, 3)})) == ["0"]


def test_the_biases_of_a_shared_weight_have_blocks_of_their_own():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    shapes = {site.block: site.spec.shape for site in find_sites(nn.Sequential(first, second))}
    assert shapes == {"0": (3, 3), "0[bias]": (3, 1), "1[bias]": (3, 1)}


def test_excluding_one_of_two_tied_layers_is_refused():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    with pytest.raises(InputError, match=r"weight of 0 is also 1\.weight"):
        find_sites(nn.Sequential(first, second), View(exclude=["1"]))


def test_uncovered_names_every_parameter_without_a_block():
    model = TinyLM()
    assert uncovered(model, find_sites(model)) == {
        "embed.weight": 20, "body.1.weight": 4, "body.1.bias": 4, "head.weight": 20,
    }  # fmt: skip
    assert uncovered(nn.Linear(2, 2), find_sites(nn.Linear(2, 2))) != {}
    net = nn.Linear(2, 2)
    assert uncovered(net, find_sites(net)) == {}


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_norms_from_factors_are_right_where_products_of_four_leave_float32(size):
    x, g = (torch.randn(2, 3, n, generator=torch.Generator().manual_seed(n)) * size for n in (4, 5))
    got = Linear(5, 4, False).score(x, g, Kron(), torch.zeros(1, 5, 4), True, False)[:, -1]
    torch.testing.assert_close(
        got, (g.double().mT @ x.double()).flatten(1).norm(dim=1).float(), atol=0, rtol=1e-4
    )


def test_diagonals_scale_the_rows_of_each_expert_and_the_bias():
    routing = ExpertRouting(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 0]), 2)
    layer = Experts(6, 4, True, 2, routing=routing)
    x, g = (torch.randn(4, n, generator=torch.Generator().manual_seed(n)) for n in (4, 3))
    left, right = torch.arange(1.0, 7.0), torch.arange(1.0, 6.0)
    plain, scaled = (layer.contract(x, g, kron, False) for kron in (Kron(), Kron(left, right)))
    assert plain.shape == (2, 6, 5)
    torch.testing.assert_close(scaled, left[:, None] * plain * right)
