import pytest
import torch
from torch import nn

from gradfn.errors import InputError
from gradfn.statistics import second_moment
from gradfn.statistics.fold import fit
from gradfn.statistics.moments import adam_moments, mean, total
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.testing.strategies import randomize, squared_error
from gradfn.transforms import Adam, dot, project, unit_normalize

MODEL = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0)
LOSS = squared_error(MODEL)
ROWS = [
    {"x": torch.full((3,), 0.1 * i, dtype=torch.float64), "y": torch.ones(2, dtype=torch.float64)}
    for i in range(5)
]
DENSE = naive_blocks(LOSS, MODEL, ROWS)


@pytest.mark.parametrize("fold", [mean(), total(), adam_moments()])
def test_a_statistic_of_no_rows_is_refused(fold):
    with pytest.raises(InputError, match="no rows"):
        fold.finalize(fold.init())
    with pytest.raises(InputError, match="no rows"):
        fit(fold, MODEL, [], loss=LOSS)


def test_the_mean_and_the_sum_of_transformed_rows():
    unit = unit_normalize()(DENSE)
    fitted = fit(mean(), MODEL, ROWS, unit_normalize(), loss=LOSS, token_batch_size=2)
    assert_blocks_close(fitted, {name: G.mean(0, keepdim=True) for name, G in unit.items()}, 1e-6)
    fitted = fit(total(), MODEL, ROWS, project(2), loss=LOSS, token_batch_size=2)
    assert_blocks_close(fitted, {n: G.sum(0, keepdim=True) for n, G in project(2)(DENSE).items()}, 1e-6)
    assert all(G.dtype == torch.float32 for G in fitted.values())


def test_adam_moments_are_the_transform_they_finalize_to():
    fitted = fit(adam_moments(eps=0.01), MODEL, ROWS, loss=LOSS)
    assert isinstance(fitted, Adam)
    assert fitted.eps == 0.01
    v = {name: G.square().mean(0) for name, G in DENSE.items()}
    assert_blocks_close(fitted.moments, v, 1e-6)
    assert_blocks_close(fitted(DENSE), {n: G / (v[n].sqrt() + 0.01) for n, G in DENSE.items()}, 1e-6)


def test_state_is_float64_on_the_cpu_whatever_comes():
    state = total().update(total().init(), {"a": torch.ones(3, 2, dtype=torch.bfloat16)})
    assert state.blocks["a"].dtype == torch.float64
    assert state.blocks["a"].device.type == "cpu"
    assert state.count == 3


def test_sums_know_the_coarsest_dtype_they_were_made_in():
    """float32's, of half precision too: a batch's sums are made in float32 or better."""
    fold, made = second_moment(), {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        made[dtype] = fold.update(fold.init(), {"a": torch.ones(3, 1, 2, dtype=dtype)})
    assert [state.dtype for state in made.values()] == [torch.float32, torch.float32, torch.float64]
    half, _, double = made.values()
    assert fold.merge(half, double).dtype == fold.merge(double, half).dtype == torch.float32
    assert fold.merge(fold.init(), double).dtype == fold.merge(double, double).dtype == torch.float64
    assert fold.update(double, {"a": torch.ones(1, 1, 2)}).dtype == torch.float32
    assert fold.add(fold.add(fold.init(), double), half).dtype == torch.float32


def test_a_transform_that_ends_in_scores_cannot_be_folded():
    with pytest.raises(TypeError, match="must not end in scores"):
        fit(mean(), MODEL, ROWS, dot(DENSE), loss=LOSS)


def test_a_gradient_that_is_not_finite_is_found_in_a_sum():
    net = nn.Linear(1, 1, bias=False)

    def loss(params, e):
        return torch.func.functional_call(net, params, (e["x"],)).sum().abs().sqrt()

    rows = [{"x": torch.ones(1)}, {"x": torch.zeros(1)}]
    with pytest.raises(InputError, match=r"a gradient among those of row 0, row 1 is NaN or infinite"):
        fit(mean(), net, rows, loss=loss)
