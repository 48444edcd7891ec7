import numpy as np
import pytest
import torch

from gradfn.errors import InputError
from gradfn.linalg.maps import DENSE, Select, Sketch, random_map, random_matrix
from gradfn.testing import assert_blocks_close
from gradfn.transforms import chain, compress, joint, project
from gradfn.transforms.lower import lower
from gradfn.types import BlockSpec


@pytest.mark.parametrize("kind", DENSE)
def test_a_block_is_multiplied_by_its_two_matrices(kind):
    G = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    L = random_matrix(7, "mlp", "left", (4, 6), kind)
    R = random_matrix(7, "mlp", "right", (4, 5), kind)
    assert_blocks_close(project(4, kind, 7)({"mlp": G})["mlp"], L @ G @ R.T, 1e-12)


def test_a_side_that_is_small_already_is_left_as_it_is():
    G = torch.randn(2, 3, 5, dtype=torch.float64)
    R = random_matrix(7, "mlp", "right", (4, 5))
    assert_blocks_close(project(4, seed=7)({"mlp": G})["mlp"], G @ R.T, 1e-12)
    assert torch.equal(project(5)({"mlp": G})["mlp"], G)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_parts_of_a_large_matrix_are_drawn_apart(kind, monkeypatch):
    monkeypatch.setattr("gradfn.linalg.maps.DRAW_ELEMENTS", 2 * 64)
    assert len(random_matrix(0, "a", "left", (6, 64), kind).unique(dim=0)) == 6


def test_a_mask_scales_the_bias_like_other_coordinates():
    mask = Select(torch.tensor([2, 0]), 3, 10.0)
    assert mask.with_one(torch.tensor([[3.0, 4.0]])).tolist() == [[10.0, 30.0]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (13, 5)])
@pytest.mark.parametrize("kind", DENSE)
def test_any_shape_can_be_drawn(kind, shape):
    assert bool(random_matrix(0, "a", "left", shape, kind).isfinite().all())


def test_projections_keep_the_blocks_dtype():
    assert project(2)({"a": torch.ones(1, 3, 3)})["a"].dtype == torch.float32


def test_drawing_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    random_matrix(1, "a", "left", (4, 4), "gaussian")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: project(-1), "must be 0 .* or more, not -1"),
    (lambda: project((0, 4)), "0 x 4 numbers: give 1 or more"),
    (lambda: compress(0), "to 0 numbers: give 1 or more"),
    (lambda: compress(9, "sjlt", nonzeros=2), "cannot have 2 nonzeros a column: give a divisor"),
    (lambda: compress(8, "mask", nonzeros=2), "mask has no number of nonzeros"),
    (lambda: project((99, 99))({"a": torch.ones(1, 3, 3)}), "rademacher:99x99 makes no block smaller"),
    (lambda: compress(9)({"a": torch.ones(1, 3, 3)}), "sjlt:9 makes no block smaller"),
    (lambda: project((4, 2))({"a": torch.ones(1, 3, 3)}), "4x2 is larger than the left .* give 3 or fewer"),
    (lambda: project((2, 9))({"a": torch.ones(1, 3, 3), "b": torch.ones(1, 8, 8)}),
     "rademacher:2x9 is larger than the right side of every block, of which the largest has 8 numbers"),
    (lambda: lower(project((4, 2)), [BlockSpec("a", (3, 3))]), "4x2 is larger than the left side"),
    (lambda: lower(chain(project((4, 2)), joint()), [BlockSpec("a", (3, 3))]), "larger than the left side"),
])  # fmt: skip
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_a_side_that_stays_as_it_is_may_be_named():
    assert project((3, 2))({"a": torch.ones(1, 3, 3)})["a"].shape == (1, 3, 2)


@pytest.mark.parametrize("dims", [(4,), (2, 3, 4)])
def test_a_projection_has_two_sides(dims):
    with pytest.raises(InputError, match="a dimension for each of two sides"):
        project(dims)


def test_dimensions_may_be_any_integers():
    assert project(np.int64(4)) == project(4)
    assert project((np.int32(4), 2)) == project((4, 2))


def test_one_block_that_is_small_already_does_not_refuse_the_others():
    made = project((4, 4), "mask")({"a": torch.ones(1, 3, 3), "b": torch.ones(1, 3, 9)})
    assert made["a"].shape == (1, 3, 3)
    assert made["b"].shape == (1, 3, 4)


def test_the_parts_of_an_sjlt_have_signs_and_shifts_of_their_own():
    sketch = random_map("sjlt", 0, "mlp", "left", (8, 64), nonzeros=2)
    assert isinstance(sketch, Sketch)
    (signs, shifts), (others, starts) = sketch.parts
    assert not torch.equal(signs, others)
    assert not torch.equal(shifts, starts)
