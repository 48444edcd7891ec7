from importlib import import_module

import pytest
import torch
from torch import nn
from torch.func import functional_call

from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.engine.reference import per_example_grads
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping
from gradfn.model.layers import Linear
from gradfn.model.losses import CausalLMLoss
from gradfn.model.params import params_of
from gradfn.model.sites import View, blocks_of, find_sites
from gradfn.statistics import ekfac
from gradfn.statistics.fold import fit
from gradfn.testing import assert_blocks_close, naive_blocks, naive_causal_lm_loss
from gradfn.testing.strategies import VOCAB, randomize, squared_error
from gradfn.transforms import Compress, adafactor, adam, chain, dot, project, unit_normalize
from gradfn.transforms.precondition import precondition
from gradfn.transforms.row_sum import RowSum

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def rows_of(count, *shape, outputs=2):
    return [{"x": random(*shape), "y": random(outputs)} for _ in range(count)]


def llama(tied=False, layers=1, width=8, dtype=torch.float64):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=12, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return randomize(LlamaForCausalLM(config), 0).to(dtype)


TOKENS = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in ([1, 2, 3, 4], [5, 6, 7])]


class Batched:
    """A loss that also comes batched: one forward of the model for the whole batch."""

    def __init__(self, model):
        self.model, self.one = model, squared_error(model)

    def __call__(self, params, example):
        return self.one(params, example)

    def batched(self, batch):
        output = self.model(batch["x"])
        return (
            (output - batch["y"].view(len(output), *[1] * (output.ndim - 2), -1)).square().flatten(1).sum(1)
        )


@pytest.mark.parametrize("transform", [
    chain(), project(2), unit_normalize(), chain(project(2), unit_normalize()),
    adafactor({"0": random(4, 4).square() + 0.1, "2": random(2, 5).square() + 0.1}),
    chain(adam({"0": random(4, 4).square() + 0.1, "2": random(2, 5).square() + 0.1}), project(2)),
    dot({"0": random(3, 4, 4), "2": random(3, 2, 5)}),
    chain(unit_normalize(), dot({"0": random(3, 4, 4), "2": random(3, 2, 5)})),
])  # fmt: skip
@pytest.mark.parametrize("batched", [True, False])
def test_every_kind_of_stage_on_a_batched_loss_and_under_vmap(transform, batched):
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0)
    loss, rows = Batched(model), rows_of(5, 3)
    engine = probe_engine(model, loss if batched else loss.one, transform)
    assert_blocks_close(engine(collate(rows)).values, transform(naive_blocks(loss.one, model, rows)))


def test_a_module_that_is_called_a_random_number_of_times_is_found_out_on_the_way():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    model = randomize(Twice(), 0)
    rows, transform = rows_of(3, 2), chain(unit_normalize(), dot({"layer": random(2, 2, 3)}))
    engine = probe_engine(model, Batched(model), transform)
    dense = naive_blocks(squared_error(model), model, rows)
    for _ in range(2):  # the second time without a retry
        assert_blocks_close(engine(collate(rows)).values, transform(dense))


def test_tied_linear_weights_give_one_block_with_both_uses():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight, second.bias = first.weight, first.bias
    model = randomize(nn.Sequential(first, nn.Tanh(), second), 0)
    rows = rows_of(3, 2)
    values = probe_engine(model, Batched(model))(collate(rows)).values
    assert list(values) == ["0"]
    assert_blocks_close(values, naive_blocks(squared_error(model), model, rows))


def test_plain_functional_call_on_a_repeated_module_leaves_the_model_whole():
    """torch's `functional_call` replaces the parameters of such a module twice and restores them once."""
    hidden = nn.Linear(2, 2)
    model = randomize(nn.Sequential(hidden, nn.Tanh(), hidden, nn.Linear(2, 2)), 0)
    before = list(model.parameters())

    def loss(params, example):
        return functional_call(model, params, (example["x"],)).square().sum()

    collect(model, rows_of(2, 2), loss=loss)
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in before]


def test_activations_in_place_are_no_obstacle():
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), 0)
    rows = rows_of(4, 3)
    expected = naive_blocks(squared_error(model), model, rows)
    for loss in (Batched(model), squared_error(model)):
        assert_blocks_close(probe_engine(model, loss)(collate(rows)).values, expected)


def test_inputs_by_keyword_are_seen():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(input=x)

    model, rows = randomize(Keyword(), 0), rows_of(2, 3)
    expected = naive_blocks(squared_error(model), model, rows)
    assert_blocks_close(probe_engine(model, Batched(model))(collate(rows)).values, expected)


class OverPositions(nn.Module):
    """A layer that sees positions where others see examples."""

    def __init__(self):
        super().__init__()
        self.place, self.out = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        places = torch.arange(2.0 * x.shape[-2], dtype=x.dtype).view(-1, 2)
        return self.out(x + self.place(places))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_module_whose_rows_are_not_examples_goes_through_the_definition(size):
    model, rows = randomize(OverPositions(), 0), rows_of(size, 3, 2)
    engine = probe_engine(model, Batched(model))
    assert_blocks_close(engine(collate(rows)).values, naive_blocks(squared_error(model), model, rows))
    assert [site.path for site in engine.sites if not site.probed] == (["place"] if size > 1 else [])


def test_under_vmap_a_module_may_see_what_it_likes():
    model, rows = randomize(OverPositions(), 0), rows_of(3, 3, 2)
    loss = squared_error(model)
    assert_blocks_close(probe_engine(model, loss)(collate(rows)).values, naive_blocks(loss, model, rows))


def test_a_weight_that_is_used_past_its_module_goes_through_the_definition():
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.lent, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(torch.tanh(x @ self.lent.weight.T + self.lent.bias))

    model, rows = randomize(Past(), 0), rows_of(2, 3)
    for loss in (squared_error(model), Batched(model)):
        engine = probe_engine(model, loss, unit_normalize())
        want = unit_normalize()(naive_blocks(squared_error(model), model, rows))
        assert_blocks_close(engine(collate(rows)).values, want)
        assert [site.path for site in engine.sites if not site.probed] == ["lent"]


def test_a_loss_that_depends_on_no_attributed_layer_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(InputError, match="does not depend on any attributed layer"):
        probe_engine(model, lambda p, e: e["x"].sum())({"x": torch.ones(3, 2)})


def test_a_layer_that_the_loss_does_not_reach_has_zero_rows():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)}).double()

    class OfOnePart(Batched):
        def __call__(self, params, example):
            used = {name.removeprefix("used."): p for name, p in params.items() if name.startswith("used.")}
            return self.one(used, example)

    loss = OfOnePart(model["used"])
    values = probe_engine(model, loss)(collate(rows_of(3, 2, outputs=1))).values
    assert bool(values["used"].any())
    assert values["unused"].shape == (3, 1, 3)
    assert not bool(values["unused"].any())


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_own_gradient_is_right(tied):
    """With the fused head, too: its weight is used without calling its module."""
    model = llama(tied=tied)
    views = [View(include=["*"]), View(include=["*embed*", "lm_head"])]
    for view in views if tied else [*views, View(include=["lm_head"])]:
        want = naive_blocks(naive_causal_lm_loss(model), model, TOKENS, view)
        assert_blocks_close(collect(model, TOKENS, view=view), want)


@pytest.mark.parametrize("transform", [chain(), project(4)])
def test_a_bf16_model_gives_float32_statistics_close_to_those_of_fp32(transform):
    exact = llama(layers=2, dtype=torch.float32)
    coarse = llama(layers=2, dtype=torch.float32).to(torch.bfloat16)
    want, got = (collect(model, TOKENS, transform) for model in (exact, coarse))
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == torch.float32
        cosine = torch.cosine_similarity(got[name].flatten(1), want[name].flatten(1))
        assert float(cosine.min()) > 0.98, name
        assert torch.allclose(got[name].flatten(1).norm(dim=1), want[name].flatten(1).norm(dim=1), rtol=0.2)


def test_the_engine_equals_the_definition_it_documents():
    model, rows = randomize(nn.Sequential(nn.Linear(3, 2), nn.GELU(), nn.Linear(2, 2)), 0), rows_of(4, 3)
    loss, transform = squared_error(model), chain(project(3), unit_normalize())
    definition = blocks_of(find_sites(model), per_example_grads(loss, params_of(model), collate(rows)))
    assert_blocks_close(probe_engine(model, loss, transform)(collate(rows)).values, transform(definition))


def test_the_models_own_hooks_stay_and_see_the_plain_output():
    model, rows, seen = randomize(nn.Sequential(nn.Linear(3, 2)), 0), rows_of(2, 3), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    probe_engine(model, Batched(model))(collate(rows))
    assert {*seen} == {(2, 2), (2,)}  # of the batch, and of an example alone
    assert len(model[0]._forward_hooks) == 1


def test_the_engine_runs_where_gradients_are_off():
    with torch.no_grad():
        values = collect(llama(), TOKENS, project(2))
    assert all(bool(G.any()) for G in values.values())


def test_fused_loss_needs_no_gradient_of_the_parameters():
    model = llama()
    probe_engine(model, CausalLMLoss(model, fused_head=True))(collate(TOKENS))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("end", ["rows", "sum"])
def test_dense_blocks_of_rows_are_made_a_few_at_a_time(rotated, end, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    batch, loss, made = collate(rows_of(7, 6, 4)), Batched(net), []
    H = fit(ekfac(), net, rows_of(9, 6, 4), loss=loss)
    first = precondition(H, -1.0, Damping(0.1)) if rotated else Compress(5)
    last = [RowSum(lambda name, G: G.square().sum(0))] if end == "sum" else []
    whole = probe_engine(net, loss, chain(first, *last))(batch).values
    contract = Linear.contract

    def noting(layer, kept, g, kron, tokens):
        made.append(len(g))
        return contract(layer, kept, g, kron, tokens)

    monkeypatch.setattr(import_module("gradfn.transforms.lower"), "DENSE_ELEMENTS", 5 * 5 * 3)
    engine = probe_engine(net, loss, chain(first, *last))
    engine.verify(batch)
    monkeypatch.setattr(Linear, "contract", noting)
    parts = engine(batch).values
    assert sum(made) == 2 * 7
    assert 1 < max(made) < 7
    for name, G in whole.items():
        assert_blocks_close(parts[name], G, 1e-12)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.inner(x)[0])


def test_weight_matrices_that_are_left_out_are_said_with_their_share():
    with pytest.warns(UserWarning, match=r"91% of the weight matrices of Recurrent are left out.*include"):
        probe_engine(Recurrent(), lambda params, example: params["out.bias"].sum())
    probe_engine(Recurrent(), lambda params, example: params["out.bias"].sum(), view=View(include=["*"]))
