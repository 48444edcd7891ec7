"""Chains compose, and lowering them onto a model's factors changes no result."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gradfn.engine.engine import Engine, probe_engine
from gradfn.engine.stream import collect
from gradfn.model.sites import find_sites
from gradfn.testing import assert_blocks_close, chains, mlps, naive_blocks, seeds, vector_rows
from gradfn.testing.strategies import shapes_of, squared_error
from gradfn.transforms import adam, chain, dot, lower, project, unit_normalize
from gradfn.types import BlockSpec

SHAPES = {"a": (3, 4), "b": (2, 2)}


def random_blocks(seed, shapes=SHAPES, rows=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def in_two_uses(lowered, blocks, seed):
    """What an engine does with a weight used twice: the plan of each use on its own share, then the sum."""
    share = random_blocks(seed)
    parts = []
    for part in (share, {name: G - share[name] for name, G in blocks.items()}):
        done = {}
        for name, G in part.items():
            done[name] = lowered.plans[name].kron(G)
            for function in lowered.plans[name].inside:
                done[name] = function(done[name])
        parts.append(done)
    return lowered.finish({name: parts[0][name] + parts[1][name] for name in blocks})


def specs(shapes=SHAPES):
    return [BlockSpec(name, shape, dtype=torch.float64) for name, shape in shapes.items()]


@given(chains(SHAPES), chains(SHAPES), chains(SHAPES))
def test_chains_are_associative_with_an_identity(a, b, c):
    assert chain(chain(a, b), c).stages == chain(a, chain(b, c)).stages == (*a.stages, *b.stages, *c.stages)
    assert chain(chain(), a).stages == chain(a, chain()).stages == a.stages


@given(chains(SHAPES), seeds())
def test_a_chain_applies_its_stages_one_by_one(transform, seed):
    blocks = expected = random_blocks(seed)
    for stage in transform.stages:
        expected = stage(expected)
    assert_blocks_close(transform(blocks), expected)
    assert chain()(blocks) is blocks


@given(chains(SHAPES), seeds(), st.booleans())
def test_lowering_equals_the_stages_one_by_one(transform, seed, shared):
    blocks = random_blocks(seed)
    lowered = lower(transform, specs(), frozenset(SHAPES) if shared else frozenset())
    inside = {}
    for name, G in blocks.items():
        plan = lowered.plans[name]
        inside[name] = plan.kron(G)
        for function in plan.inside:
            inside[name] = function(inside[name])
        assert inside[name].shape[1:] == plan.shape
    assert_blocks_close(lowered.finish(inside), transform(blocks))


@given(chains(SHAPES), seeds(), seeds(), seeds(), st.booleans())
def test_the_uses_of_a_shared_weight_add_up(transform, seed, other, queries, scored):
    blocks = random_blocks(seed)
    if scored:
        transform = chain(transform, dot(transform(random_blocks(queries, rows=2))))
    lowered = lower(transform, specs(), frozenset(SHAPES))
    assert_blocks_close(in_two_uses(lowered, blocks, other), transform(blocks), 1e-8)


@given(chains(SHAPES, stages=("project", "adafactor"), max_stages=3))
def test_leading_krons_become_one(transform):
    for plan in lower(transform, specs()).plans.values():
        assert not plan.inside
        assert not plan.behind


@given(st.data(), mlps(), vector_rows(min_rows=2))
def test_an_engine_that_ends_in_scores_equals_dots_of_dense_gradients(data, model, rows):
    loss = squared_error(model)
    dense = naive_blocks(loss, model, rows)
    transform = data.draw(chains(shapes_of(dense)))
    queries = transform({name: G[:2] for name, G in dense.items()})
    expected = sum(G.flatten(1) @ queries[name].flatten(1).T for name, G in transform(dense).items())
    assert_blocks_close(collect(model, rows, chain(transform, dot(queries)), loss=loss), expected)


def nonlinear_stage(shapes):
    """A stage that is not linear per block: the unit norm inside a score."""
    return unit_normalize(), dot({name: torch.ones(1, *shape).double() for name, shape in shapes.items()})


@given(st.sampled_from(["twice", "tied"]), seeds(), vector_rows(min_rows=2))
def test_what_is_not_linear_waits_for_all_uses_of_a_weight(kind, seed, rows):
    torch.manual_seed(seed)
    first, second = torch.nn.Linear(3, 3).double(), torch.nn.Linear(3, 3).double()
    if kind == "tied":
        second.weight, second.bias = first.weight, first.bias
    head = torch.nn.Linear(3, 2).double()
    model = torch.nn.Sequential(first, torch.nn.Tanh(), first if kind == "twice" else second, head)
    loss = squared_error(model)
    dense = naive_blocks(loss, model, rows)
    transform = chain(*nonlinear_stage(shapes_of(dense)))
    assert_blocks_close(collect(model, rows, transform, loss=loss), transform(dense))


def test_every_site_of_a_tied_weight_counts_from_the_first_call():
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other.weight, other.bias = layer.weight, layer.bias
    model = torch.nn.Sequential(layer, other)
    engine = Engine(model, squared_error(model), chain(), find_sites(model))
    assert engine.facts.shared == {"0"}


@given(seeds(), seeds())
def test_a_projection_behind_adam_sees_the_dense_block(seed, key):
    blocks, moments = random_blocks(seed), {n: G[0].square() + 0.1 for n, G in random_blocks(key).items()}
    transform = chain(adam(moments), project(2, seed=key))
    plan = lower(transform, specs()).plans["a"]
    G = blocks["a"]
    for function in plan.inside:
        G = function(G)
    by_hand = project(2, seed=key)({"a": blocks["a"] / (moments["a"].sqrt() + 1e-8)})["a"]
    assert len(plan.inside) == 2
    assert_blocks_close(G, by_hand)


def test_probe_engine_without_a_transform_is_the_identity_chain():
    model = torch.nn.Linear(2, 1)
    assert probe_engine(model, squared_error(model)).transform == chain()
