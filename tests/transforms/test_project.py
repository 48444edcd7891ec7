import pytest
import torch

from gradfn.errors import InputError
from gradfn.testing import assert_blocks_close
from gradfn.testing.strategies import DISTRIBUTIONS
from gradfn.transforms import project
from gradfn.transforms.project import random_matrix


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_block_is_multiplied_by_its_two_matrices(distribution):
    G = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    L = random_matrix(7, "mlp", "left", (4, 6), distribution)
    R = random_matrix(7, "mlp", "right", (4, 5), distribution)
    assert_blocks_close(project(4, distribution, 7)({"mlp": G})["mlp"], L @ G @ R.T, 1e-12)


def test_a_side_that_is_small_already_is_left_as_it_is():
    G = torch.randn(2, 3, 5, dtype=torch.float64)
    R = random_matrix(7, "mlp", "right", (4, 5))
    assert_blocks_close(project(4, seed=7)({"mlp": G})["mlp"], G @ R.T, 1e-12)
    assert torch.equal(project(5)({"mlp": G})["mlp"], G)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (13, 5)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_any_shape_can_be_drawn(distribution, shape):
    assert bool(random_matrix(0, "a", "left", shape, distribution).isfinite().all())


def test_projections_keep_the_blocks_dtype():
    assert project(2)({"a": torch.ones(1, 3, 3)})["a"].dtype == torch.float32


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    random_matrix(1, "a", "left", (4, 4), "gaussian")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("settings", "words"), [
    ((-1,), "must be 0 .* or more, not -1"),
])  # fmt: skip
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        project(*settings)
