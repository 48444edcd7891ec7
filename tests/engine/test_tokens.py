"""Gradients of single tokens: each the gradient of the weight as that token alone uses it."""

from importlib import import_module

import pytest
import torch
from tiny import language_model
from torch import nn

from gradfn.data import collate, make_documents, offsets_of
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.model.layers import Embedding, Linear
from gradfn.model.losses import causal_lm_loss
from gradfn.model.sites import View
from gradfn.statistics.fold import fit
from gradfn.statistics.moments import mean
from gradfn.testing import assert_blocks_close
from gradfn.transforms import Compress, chain, dot, project, unit_normalize
from gradfn.transforms.row_sum import RowSum

DOCUMENTS = make_documents([[1, 2, 3, 4], [5, 6], [7, 8, 9]])
TOKENS = View(include=["*.h.*", "*.layers.*"], tokens=True)


def by_hand(model, path, row):
    """Autograd of one example with respect to a change of the weight that one token alone sees."""
    module, loss = model.get_submodule(path), causal_lm_loss(model).with_whole_logits()
    grads = []
    for token in range(len(row["input_ids"])):
        change = torch.zeros(module.weight.shape, dtype=torch.float64, requires_grad=True)
        shift = torch.zeros(module.bias.shape if module.bias is not None else 1, dtype=torch.float64)
        shift.requires_grad_()

        def hook(module, args, y, token=token, change=change, shift=shift):
            here = torch.zeros(y.shape[1], 1, dtype=torch.float64)
            here[token] = 1
            moved = args[0] @ (change if type(module).__name__ == "Conv1D" else change.T)
            return y + here * (moved + shift if module.bias is not None else moved)

        handle = module.register_forward_hook(hook)
        total = loss.batched({key: value[None] for key, value in row.items()}).sum()
        handle.remove()
        weight, bias = torch.autograd.grad(total, [change, shift], allow_unused=True, materialize_grads=True)
        weight = weight.T if type(module).__name__ == "Conv1D" else weight
        grads.append(weight if module.bias is None else torch.cat([weight, bias[:, None]], 1))
    return torch.stack(grads)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_row_is_the_gradient_of_the_weight_as_one_token_uses_it(family):
    model = language_model(family)
    tokens = collect(model, DOCUMENTS, view=View(tokens=True))
    for path, G in tokens.items():
        want = torch.cat([by_hand(model, path, DOCUMENTS[i]) for i in range(3)])
        assert_blocks_close({path: G}, {path: want})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("transform", [chain(), chain(project(2))])
@pytest.mark.parametrize("heads", [False, True])
def test_tokens_sum_to_the_example(family, transform, heads):
    model = language_model(family)
    include = ["*.h.*", "*.layers.*", "*embed*", "*wte*", "*wpe*", "*norm*", "*ln_f*", "lm_head"]
    tokens = collect(model, DOCUMENTS, transform, view=View(include, tokens=True, heads=heads))
    whole = collect(model, DOCUMENTS, transform, view=View(include, heads=heads))
    offsets = offsets_of(DOCUMENTS.lengths)
    summed = {
        name: torch.stack([G[offsets[i] : offsets[i + 1]].sum(0) for i in range(3)])
        for name, G in tokens.items()
    }
    assert_blocks_close(summed, whole)


def test_tokens_compose_with_rows_and_scores():
    model = language_model("llama")
    plain = collect(model, DOCUMENTS, view=TOKENS)
    queries = collect(model, DOCUMENTS, view=View(TOKENS.include))
    for transform in (
        chain(project(2), unit_normalize()),
        chain(unit_normalize(), dot(queries)),
        dot(queries),
    ):
        assert_blocks_close(collect(model, DOCUMENTS, transform, view=TOKENS), transform(plain))


@pytest.mark.parametrize("unit", [False, True])
def test_scores_of_tokens_from_factors_are_those_of_dense_blocks(unit, monkeypatch):
    model = language_model("gpt2")
    everything = View(include=["*"], tokens=True)
    queries = collect(model, DOCUMENTS, view=View(include=["*"]))
    transform = chain(*([unit_normalize()] if unit else []), dot(queries))
    got = collect(model, DOCUMENTS, transform, view=everything)
    for kind in (Linear, Embedding):
        monkeypatch.setattr(kind, "prefers_factors", lambda *_: False)
    assert_blocks_close(got, collect(model, DOCUMENTS, transform, view=everything))


def test_batches_and_padding_do_not_matter_to_tokens():
    model = language_model("gpt_neox")
    assert_blocks_close(
        collect(model, DOCUMENTS, project(2), view=TOKENS, token_batch_size=1),
        collect(model, DOCUMENTS, project(2), view=TOKENS, token_batch_size=1000),
    )


def test_layers_without_tokens_are_refused_by_name():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 1)

        def forward(self, ids):
            return self.out(self.embed(ids).mean(-2))

    model = Pooled().double()

    def loss(params, example):
        return torch.func.functional_call(model, params, example["input_ids"]).sum()

    with pytest.raises(InputError, match="out has no gradient of each token: add 'out' to `exclude`"):
        probe_engine(model, loss, view=View(tokens=True))({"input_ids": torch.ones(2, 3, dtype=torch.long)})


def test_rows_without_tokens_are_refused():
    with pytest.raises(InputError, match="have no tokens"):
        collect(
            nn.Linear(2, 1),
            [{"x": torch.ones(2)}],
            loss=lambda p, e: p["weight"].sum(),
            view=View(tokens=True),
        )


@pytest.mark.parametrize("end", ["rows", "sum"])
def test_dense_blocks_of_tokens_are_made_a_few_at_a_time(end, monkeypatch):
    model, made = language_model("gpt_neox"), []
    last = [RowSum(lambda name, G: G.square().sum(0))] if end == "sum" else []
    transform = chain(Compress(5), *last)
    whole = probe_engine(model, causal_lm_loss(model), transform, view=TOKENS)(
        collate(list(DOCUMENTS))
    ).values
    contract = Linear.contract

    def noting(layer, kept, g, kron, tokens):
        made.append(g.shape[1])
        return contract(layer, kept, g, kron, tokens)

    monkeypatch.setattr(import_module("gradfn.transforms.lower"), "DENSE_ELEMENTS", 8 * 9 * 3)
    engine, batch = probe_engine(model, causal_lm_loss(model), transform, view=TOKENS), collate([*DOCUMENTS])
    engine.verify(batch)
    monkeypatch.setattr(Linear, "contract", noting)
    parts = engine(batch).values
    assert max(made) == 1
    for name, G in whole.items():
        assert_blocks_close(parts[name], G, 1e-12)


def test_a_mean_over_tokens_is_divided_by_their_number():
    model = language_model("llama")
    rows = collect(model, DOCUMENTS, project(2), view=TOKENS)
    want = {name: G.mean(0, keepdim=True) for name, G in rows.items()}
    assert_blocks_close(fit(mean(), model, DOCUMENTS, project(2), view=TOKENS), want, 1e-6)
