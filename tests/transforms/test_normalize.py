import pytest
import torch

from gradfn.errors import InputError
from gradfn.testing import assert_blocks_close
from gradfn.transforms import adafactor, adam, unit_normalize
from gradfn.transforms.normalize import inverse_norms, norms

V = torch.tensor([[1.0, 4.0, 9.0], [2.0, 8.0, 1.0]], dtype=torch.float64)
G = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(2, 2, 3)


def test_adam_divides_each_number_by_its_own_root():
    expected = G / (V.sqrt() + 0.5)
    assert_blocks_close(adam({"a": V}, eps=0.5)({"a": G})["a"], expected, 1e-12)


def test_adafactor_divides_by_the_rank_1_estimate():
    r, c = V.mean(1), V.mean(0)
    estimate = r[:, None] * c[None] / r.mean()
    assert_blocks_close(adafactor({"a": V})({"a": G})["a"], G / estimate.sqrt(), 1e-12)


def test_adafactor_takes_the_row_and_column_means_alone():
    of_means = adafactor({"a": (V.mean(1), V.mean(0))}, eps=0.25)
    assert_blocks_close(of_means({"a": G}), adafactor({"a": V}, eps=0.25)({"a": G}), 1e-12)
    with pytest.raises(InputError, match=r"moment of a has shape \(3, 2\), its gradient \(2, 3\)"):
        adafactor({"a": (V.mean(0), V.mean(1))})({"a": G})


def test_adafactor_records_its_numbers_in_the_settings():
    one, same, other = (adafactor({"a": v}).settings() for v in (V, V.clone(), V + 1))
    assert one == same != other


def test_adafactor_equals_adam_where_the_moment_has_rank_1():
    v = torch.tensor([1.0, 3.0]).double()[:, None] * torch.tensor([2.0, 1.0, 5.0]).double()
    assert_blocks_close(adafactor({"a": v})({"a": G}), adam({"a": v}, eps=0.0)({"a": G}), 1e-12)


@pytest.mark.parametrize("make", [adam, adafactor])
def test_a_missing_or_misshapen_moment_is_refused_with_the_blocks_name(make):
    with pytest.raises(InputError, match=r"no second moment for b: it has a"):
        make({"a": V})({"b": G})
    with pytest.raises(InputError, match=r"moment of a has shape \(3, 2\), its gradient \(2, 3\)"):
        make({"a": V.T})({"a": G})


@pytest.mark.parametrize("make", [adam, adafactor])
def test_a_moment_of_zero_does_not_give_nan(make):
    assert bool(make({"a": torch.zeros(2, 3)})({"a": torch.zeros(1, 2, 3)})["a"].isfinite().all())


def test_the_norm_is_that_of_all_blocks_together():
    blocks = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[[4.0]]])}
    unit = unit_normalize()(blocks)
    assert torch.allclose(unit["a"], torch.tensor([[0.6]]))
    assert torch.allclose(unit["b"], torch.tensor([[[0.8]]]))


def test_a_zero_row_stays_zero_and_the_others_do_not_notice():
    blocks = {"a": torch.tensor([[0.0, 0.0], [3.0, 4.0]])}
    assert torch.allclose(unit_normalize()(blocks)["a"], torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert inverse_norms(torch.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-36, 1e-22, 1e-14, 1.0, 1e15, 1e25, 1e36])
def test_norms_are_right_where_squares_leave_the_range_of_float32(scale):
    v = torch.randn(3, 50) * scale
    v[1] = 0
    torch.testing.assert_close(norms(v), v.double().norm(dim=1).float())
    blocks = {"a": v[:, :20], "b": v[:, 20:]}
    unit = torch.cat(list(unit_normalize()(blocks).values()), 1)
    torch.testing.assert_close(unit.norm(dim=1), torch.tensor([1.0, 0.0, 1.0]))
