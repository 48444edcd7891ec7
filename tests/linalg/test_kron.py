import pickle

import pytest
import torch

from gradfn.linalg.kron import Kron, apply_side, compose_sides, dense_side

D = torch.tensor([2.0, 3.0], dtype=torch.float64)
M = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


@pytest.mark.parametrize("side", [None, D, M])
def test_every_kind_of_side_acts_as_its_matrix(side):
    v = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    assert torch.allclose(apply_side(side, v), v @ dense_side(side, 2).double().T)


@pytest.mark.parametrize(("after", "before"), [
    (None, None), (None, D), (D, None), (D, D), (M, D), (M, None),
    (torch.arange(3.0).double(), M), (EYE + 1, EYE * 2),
])  # fmt: skip
def test_composed_sides_multiply_as_matrices(after, before):
    middle = 2 if before is None or before.ndim == 1 else len(before)
    expected = dense_side(after, middle).double() @ dense_side(before, 2).double()
    assert torch.allclose(dense_side(compose_sides(after, before), 2).double(), expected)


def test_composing_diagonals_stays_diagonal():
    fused = Kron(D, None) @ Kron(D, D)
    assert fused.left is not None
    assert fused.left.tolist() == [4.0, 9.0]
    assert fused.right is D


def test_left_acts_on_rows_and_right_on_columns():
    G = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Kron(torch.tensor([1.0, 10.0]), None)(G).tolist() == [[1.0, 2.0], [30.0, 40.0]]
    assert Kron(None, torch.tensor([1.0, 10.0]))(G).tolist() == [[1.0, 20.0], [3.0, 40.0]]


def test_a_power_keeps_the_dtype_and_is_taken_in_float64():
    kron = Kron(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([4.0]))
    root = kron.power(0.5)
    assert root.left.dtype == root.right.dtype == torch.float32
    assert torch.allclose(root.left @ root.left, kron.left, atol=1e-6)
    assert root.right.tolist() == [2.0]


def test_a_kron_pickles():
    again = pickle.loads(pickle.dumps(Kron(D, M)))
    assert torch.equal(again.left, D)
    assert torch.equal(again.right, M)
