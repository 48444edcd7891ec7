import pickle

import pytest
import torch

from gradfn.transforms import Chain, adam, chain, dot, lower, project, unit_normalize
from gradfn.types import BlockSpec

SPEC = BlockSpec("a", (4, 5))


def test_transforms_are_values():
    made = chain(project(4, "gaussian", seed=2), unit_normalize())
    assert made == chain(project(4, "gaussian", seed=2), unit_normalize())
    assert made != chain(project(4, "gaussian", seed=3), unit_normalize())
    assert pickle.loads(pickle.dumps(made)) == made
    assert repr(made.stages[0]) == "Project(dims=(4, 4), kind='gaussian', seed=2, nonzeros=1)"
    assert hash(made) == hash(chain(project(4, "gaussian", seed=2), unit_normalize()))


def test_projecting_to_0_is_the_full_gradient():
    assert chain(project(0), unit_normalize()) == chain(unit_normalize())


def test_settings_are_plain_and_tell_tensors_apart():
    one, other = (adam({"a": torch.full((2, 2), value)}) for value in (1.0, 2.0))
    assert chain(project(4), one).settings() == {
        "chain": [
            {"transform": "Project", "projection": "rademacher:4x4", "seed": 0},
            {"transform": "Adam", "moments": one.settings()["moments"], "eps": 1e-8},
        ]
    }
    assert isinstance(one.settings()["moments"], str)
    assert one.settings() != other.settings()
    assert one.settings() == adam({"a": torch.ones(2, 2)}).settings()


def test_lowering_puts_every_stage_where_it_may_run():
    moments = {"a": torch.ones(2, 2)}
    queries = {"a": torch.ones(3, 2, 2)}
    plan = lower(chain(project(3), project(2), adam(moments), unit_normalize(), dot(queries)), [SPEC]).plans[
        "a"
    ]
    assert plan.kron.left.shape == (2, 4)
    assert plan.kron.right.shape == (2, 5)
    assert len(plan.inside) == 2
    assert plan.shape == (4,)  # three queries and the squared norm
    assert not plan.behind


def test_what_is_not_linear_waits_behind_a_shared_weight():
    final = chain(project(2), unit_normalize(), dot({"a": torch.ones(3, 2, 2)}))
    shared = lower(final, [SPEC], frozenset({"a"})).plans["a"]
    assert shared.shape == (2, 2)
    assert not shared.inside
    assert len(shared.behind) == 1
    linear = lower(chain(project(2), dot({"a": torch.ones(3, 2, 2)})), [SPEC], frozenset({"a"})).plans["a"]
    assert linear.shape == (3,)
    assert not linear.behind


def test_a_single_transform_lowers_as_a_chain_of_one():
    assert lower(project(2), [SPEC]).plans["a"].shape == lower(Chain((project(2),)), [SPEC]).plans["a"].shape


def test_something_else_in_a_chain_is_refused():
    from gradfn.transforms import Transform

    class Nothing(Transform):
        def __repr__(self):
            return "Nothing()"

    with pytest.raises(TypeError, match=r"Nothing\(\) is neither"):
        lower(chain(Nothing()), [SPEC])
