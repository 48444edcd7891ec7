import pytest
import torch

from gradfn.errors import InputError
from gradfn.transforms import Dot, chain, dot, lower, unit_normalize
from gradfn.types import BlockSpec

ROWS = {"a": torch.tensor([[3.0, 4.0], [1.0, 0.0]]), "b": torch.tensor([[[0.0]], [[2.0]]])}


def test_scores_add_up_over_blocks():
    queries = {"a": torch.tensor([[1.0, 1.0]]), "b": torch.tensor([[[10.0]]])}
    assert dot(queries)(ROWS).tolist() == [[7.0], [21.0]]


def test_a_unit_dot_divides_by_the_rows_norm_over_all_blocks():
    unit = unit_normalize()(ROWS)
    assert torch.allclose(chain(unit_normalize(), dot(unit))(ROWS).diagonal(), torch.ones(2))


def test_queries_of_another_size_are_refused_with_the_block():
    with pytest.raises(InputError, match="block a has 3 numbers, a row's 2"):
        dot({"a": torch.ones(1, 3), "b": torch.ones(1, 1, 1)})(ROWS)


def test_queries_take_the_rows_dtype():
    assert dot({"a": torch.ones(1, 2).double()})({"a": torch.ones(1, 2)}).dtype == torch.float32


@pytest.mark.parametrize("weights", [None, {"a": torch.ones(1, 2, 3)}])
def test_a_weighted_norm_is_not_had_from_the_factors(weights):
    scores = Dot({"a": torch.ones(1, 2, 3)}, unit=True, weights=weights)
    assert (lower(scores, [BlockSpec("a", (2, 3))]).plans["a"].share is None) == (weights is not None)
