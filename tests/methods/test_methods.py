import torch

from gradfn.methods import grad_cosine, grad_dot
from gradfn.transforms import UnitNormalize, chain, project

ROWS = {"a": torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]])}


def test_grad_dot_does_the_same_to_both_sides_and_nothing_more():
    assert grad_dot() == grad_dot(chain())
    method = grad_dot(project(4, seed=3))
    assert method.row_transform == method.query_transform == chain(project(4, seed=3))


def test_grad_cosine_ends_in_the_unit_norm_on_both_sides():
    method = grad_cosine(project(4, seed=3))
    assert method.row_transform == method.query_transform == chain(project(4, seed=3), UnitNormalize())
    assert grad_cosine().row_transform(ROWS)["a"].norm(dim=-1).flatten().tolist() == [1.0, 0.0]


def test_methods_compare_by_their_settings():
    assert grad_cosine(project(4)) == grad_cosine(project(4))
    assert grad_cosine(project(4)) != grad_cosine(project(4, seed=1))
    assert grad_cosine() != grad_dot()
