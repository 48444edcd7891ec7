"""The probe engine equals a loop of plain autograd, whatever the model, the loss, the chain and the batch."""

import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.engine.reference import per_example_grads
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.model.losses import CausalLMLoss, head_is_plain
from gradfn.model.params import params_of
from gradfn.model.sites import blocks_of, find_sites
from gradfn.testing import (
    Problem,
    assert_blocks_close,
    chains,
    language_models,
    mlps,
    naive_blocks,
    naive_causal_lm_loss,
    problems,
    recorded_shapes,
    seeds,
    token_rows,
    vector_rows,
)
from gradfn.testing.strategies import VOCAB, shapes_of, squared_error
from gradfn.transforms import chain, project


def naive(problem: Problem, rows=None):
    return naive_blocks(problem.reference, problem.model, problem.rows if rows is None else rows)


@given(problems())
def test_the_engine_equals_a_loop_of_autograd(problem):
    engine = probe_engine(problem.model, problem.loss)
    rows = engine(collate(problem.rows))
    assert all(site.probed for site in engine.sites)  # nothing went through vmap(grad) in its stead
    assert_blocks_close(rows.values, naive(problem))
    params = params_of(problem.model)
    losses = torch.stack([problem.reference(params, row) for row in problem.rows])
    assert_blocks_close(rows.losses, losses)


@given(st.data(), problems())
def test_the_engine_equals_the_chain_applied_to_dense_gradients(data, problem):
    dense = naive(problem)
    transform = data.draw(chains(shapes_of(dense)))
    rows = probe_engine(problem.model, problem.loss, transform)(collate(problem.rows))
    assert_blocks_close(rows.values, transform(dense))


@given(mlps(), vector_rows())
def test_vmap_of_grad_equals_the_loop_for_mlps(model, rows):
    loss = squared_error(model)
    grads = per_example_grads(loss, params_of(model), collate(rows))
    assert_blocks_close(blocks_of(find_sites(model), grads), naive_blocks(loss, model, rows))


@given(language_models(attention="eager"), token_rows(), st.sampled_from(["mean", "sum"]))
def test_vmap_of_grad_equals_the_loop_and_the_engine_for_language_models(model, rows, reduction):
    loss, batch = CausalLMLoss(model, reduction), collate(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap is slow for some kernels, and says so
        grads = per_example_grads(loss, params_of(model), batch)
    by_definition = blocks_of(find_sites(model), grads)
    assert_blocks_close(by_definition, naive_blocks(naive_causal_lm_loss(model, reduction), model, rows))
    assert_blocks_close(probe_engine(model, loss)(batch).values, by_definition)


@given(language_models(), token_rows(min_rows=2), st.sampled_from(["mean", "sum"]))
def test_the_fused_head_changes_nothing(model, rows, reduction):
    fused, plain = (
        probe_engine(model, CausalLMLoss(model, reduction, fused_head=flag), chain(project(3)))(collate(rows))
        for flag in (True, False)
    )
    assert_blocks_close(fused.values, plain.values)
    assert_blocks_close(fused.losses, plain.losses)


@given(language_models())
def test_the_head_of_these_architectures_is_plain(model):
    assert head_is_plain(model)


@given(st.data(), problems(min_rows=2))
def test_permuting_the_batch_permutes_the_rows(data, problem):
    order = data.draw(st.permutations(range(len(problem.rows))))
    engine = probe_engine(problem.model, problem.loss, project(3))
    straight = engine(collate(problem.rows)).values
    permuted = engine(collate([problem.rows[i] for i in order])).values
    assert_blocks_close(permuted, {name: G[list(order)] for name, G in straight.items()})


@given(problems(("lm",)), st.integers(0, 5), seeds())
def test_neither_the_amount_nor_the_tokens_of_padding_matter(problem, more, seed):
    batch = collate(problem.rows)
    lengths = torch.tensor([len(row["input_ids"]) for row in problem.rows])
    ids = torch.nn.functional.pad(batch["input_ids"], (0, more))
    noise = torch.randint(0, VOCAB, ids.shape, generator=torch.Generator().manual_seed(seed))
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    labels = torch.nn.functional.pad(batch["labels"], (0, more), value=-100)
    engine = probe_engine(problem.model, problem.loss, project(3))
    padded = engine({"input_ids": torch.where(padding, noise, ids), "labels": labels}).values
    assert_blocks_close(padded, project(3)(naive(problem)))


@given(st.data(), problems(min_rows=2))
def test_splitting_a_batch_does_not_change_a_row(data, problem):
    at = data.draw(st.integers(1, len(problem.rows) - 1))
    engine = probe_engine(problem.model, problem.loss, project(3))
    parts = [engine(collate(rows)).values for rows in (problem.rows[:at], problem.rows[at:])]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert_blocks_close(together, engine(collate(problem.rows)).values)


@given(problems(), st.integers(1, 40))
def test_the_token_budget_changes_neither_rows_nor_their_order(problem, budget):
    got = collect(problem.model, problem.rows, loss=problem.loss, token_batch_size=budget)
    assert_blocks_close(got, naive(problem))


@given(language_models(), token_rows())
def test_without_labels_every_token_of_the_row_itself_is_supervised(model, rows):
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    labelled = [{**row, "labels": row["input_ids"]} for row in bare]
    assert_blocks_close(collect(model, bare), naive_blocks(naive_causal_lm_loss(model), model, labelled))


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        Counter(len(module._forward_hooks) for module in model.modules()),
    )


@given(st.data(), problems(("lm", "mlp")), st.sampled_from([None, ValueError, InputError]))
def test_the_model_is_left_as_it_was_also_after_an_error(data, problem, error):
    parameters, modules = list(problem.model.parameters()), list(problem.model.modules())
    for parameter, flag in zip(
        parameters,
        data.draw(st.lists(st.booleans(), min_size=len(parameters), max_size=len(parameters))),
        strict=True,
    ):
        parameter.requires_grad_(flag)
    for module, flag in zip(
        modules, data.draw(st.lists(st.booleans(), min_size=len(modules), max_size=len(modules))), strict=True
    ):
        module.training = flag
    values = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    before = state_of(problem.model)

    def failing(params, example):
        problem.loss(params, example)
        raise error("on purpose")

    if error is None:
        probe_engine(problem.model, problem.loss)(collate(problem.rows))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap is slow for some kernels, and says so
            with pytest.raises(error, match="on purpose"):
                probe_engine(problem.model, failing)(collate(problem.rows))
    assert state_of(problem.model) == before
    assert all(torch.equal(p, values[name]) for name, p in problem.model.named_parameters())


def test_the_training_mode_of_the_model_does_not_matter():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)).double()
    loss, rows = squared_error(model), [{"x": torch.ones(3).double(), "y": torch.zeros(1).double()}] * 4
    model.train()
    trained = collect(model, rows, loss=loss)
    assert_blocks_close(trained, collect(model.eval(), rows, loss=loss))


BATCH, TOKENS = 3, 15


def shapes_during(model, transform, fused):
    """The shapes of all tensors made while the engine runs on a batch whose sizes occur nowhere else."""
    ids = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    engine = probe_engine(model, CausalLMLoss(model, fused_head=fused), transform)
    with recorded_shapes() as shapes:
        engine({"input_ids": ids, "labels": ids})
    return shapes


def dense_shapes(model):
    return {(BATCH, *site.spec.shape) for site in find_sites(model)}


@given(language_models(), st.sampled_from(["rademacher", "gaussian", "orthonormal"]))
def test_a_projecting_chain_never_makes_a_dense_gradient(model, distribution):
    shapes = shapes_during(model, chain(project(2, distribution)), fused=True)
    assert (BATCH, 2, 2) in shapes
    for dense in dense_shapes(model):
        assert dense not in shapes
        assert (BATCH, dense[1], dense[2] - 1) not in shapes
    assert dense_shapes(model) & shapes_during(model, None, fused=True), "the full gradient would be seen"


@given(language_models())
def test_the_fused_head_never_makes_the_logits_nor_their_gradient(model):
    tile = (3, 4)

    def logits_like(shapes):
        return {s for s in shapes if s[-1:] == (VOCAB,) and torch.Size(s[:-1]).numel() > 2 * TOKENS}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradfn.model.losses._tile", lambda device: tile)
        shapes = shapes_during(model, chain(project(2)), fused=True)
    assert tile in shapes
    assert not logits_like(shapes)
    assert logits_like(shapes_during(model, chain(project(2)), fused=False)), "the logits would be seen"
