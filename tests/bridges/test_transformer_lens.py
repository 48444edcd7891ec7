"""A model in a TransformerBridge has the scores of the model itself, under TransformerLens's names."""

import copy

import pytest
import torch
from bridged import imported
from tiny import make_tokenizer

import gradfn as gf
from gradfn.bridges import transformer_lens
from gradfn.errors import InputError
from gradfn.subject import refuse_wrapper
from gradfn.testing import models
from gradfn.testing.strategies import randomize

pytestmark = pytest.mark.filterwarnings("ignore")
DOCUMENTS = gf.make_documents([[1, 2, 3, 4], [5, 6, 7], [8, 9, 1, 2, 5]])


@pytest.fixture
def bridged(request, tmp_path):
    """A model, and a bridge around a copy of it."""
    (lens,) = imported("transformer_lens.model_bridge")
    family, tied = request.param
    made = models._BUILDERS[family](8, 2, 2, "eager", (tied, True), 1)
    model = randomize(made, 0)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    inner = copy.deepcopy(model)
    boot = lens.TransformerBridge.boot_transformers
    return model, boot(str(tmp_path), hf_model=inner, device="cpu", dtype=torch.float64)


def scored(model, view):
    return gf.score(model, DOCUMENTS, DOCUMENTS, method=gf.grad_dot(), view=view, by_block=True)


FAMILIES = [("gpt2", True), ("gpt2", False), ("llama", False), ("gpt_neox", False)]


@pytest.mark.parametrize("bridged", FAMILIES, indirect=True)
def test_scores_are_those_of_the_model_itself(bridged):
    model, bridge = bridged
    expected = scored(model, gf.View())
    found = scored(bridge.original_model, transformer_lens.view(bridge))
    # The rotary embedding of a bridged GPT-NeoX has float32 in it.
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-5, atol=1e-6)
    names = transformer_lens.names(bridge, transformer_lens.view(bridge))
    assert [*names] == [*found.shares]
    assert {"blocks.0.attn.W_Q", "blocks.1.mlp.W_out"} <= {*names.values()}
    known = {*dict(bridge.tl_named_parameters())}
    assert {*names.values()} <= known


@pytest.mark.parametrize("bridged", [("llama", False)], indirect=True)
def test_heads_are_those_of_the_model_itself(bridged):
    model, bridge = bridged
    view = transformer_lens.view(bridge, heads=True)
    expected, found = scored(model, gf.View(heads=True)), scored(bridge.original_model, view)
    names = {name: block for block, name in transformer_lens.names(bridge, view).items()}
    for lens, own in (("W_Q[1]", "q_proj[1]"), ("W_K[0]", "k_proj[0]"), ("W_O[1]", "o_proj[1]")):
        theirs = expected.shares[f"model.layers.1.self_attn.{own}"]
        torch.testing.assert_close(found.shares[names[f"blocks.1.attn.{lens}"]], theirs)


@pytest.mark.parametrize("bridged", [("gpt2", True)], indirect=True)
def test_what_cannot_be_attributed_is_refused(bridged):
    model, bridge = bridged
    with pytest.raises(InputError, match=r"give bridge\.original_model"):
        refuse_wrapper(bridge)
    with pytest.raises(InputError, match="is no TransformerBridge"):
        transformer_lens.view(model)
    bridge.enable_compatibility_mode()
    with pytest.raises(InputError, match="weights of this bridge were folded"):
        transformer_lens.view(bridge)


def test_weights_by_head_that_are_parameters_of_their_own():
    """As a HookedTransformer has them, of versions before 4."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.W_Q, self.W_O = (torch.nn.Parameter(torch.randn(2, *s).double()) for s in ((6, 3), (3, 6)))

        def forward(self, x):
            return torch.einsum("bpd,hde,hef->bpf", x, self.W_Q, self.W_O)

    net = torch.nn.Sequential(torch.nn.Embedding(10, 6), Attention(), torch.nn.Linear(6, 10)).double()

    def loss(params, example):
        logits = torch.func.functional_call(net, params, example["input_ids"][None])[0]
        return torch.nn.functional.cross_entropy(logits[:-1], example["input_ids"][1:])

    view = gf.View(include=["1.*"])
    scores = gf.score(net, DOCUMENTS, DOCUMENTS, method=gf.grad_dot(), loss=loss, view=view, by_block=True)
    for name in ("1.W_Q", "1.W_O"):
        gradients = []
        for row in range(3):
            net.zero_grad()
            loss(dict(net.named_parameters()), DOCUMENTS[row]).backward()
            gradients.append(net.get_parameter(name).grad.flatten())
        rows = torch.stack(gradients)
        torch.testing.assert_close(scores.shares[name][0], rows @ rows.T)


def test_a_bias_that_is_no_parameter_is_none_of_the_block():
    """As TransformerLens gives one to the head."""
    net = torch.nn.Linear(3, 2).double()
    del net._parameters["bias"]
    net.bias = torch.ones(2).double()

    def loss(params, example):
        return torch.func.functional_call(net, params, example["x"]).square().sum()

    rows = [{"x": torch.arange(3.0).double() + row} for row in range(2)]
    (block,) = gf.collect(net, rows, gf.chain(), loss=loss).values()
    expected = torch.stack([2 * torch.outer(net(row["x"]), row["x"]) for row in rows])
    torch.testing.assert_close(block, expected)
