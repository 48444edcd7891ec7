"""Smooth trainings are told from rough ones, and scores of the former predict what masking does."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from gradfn.errors import InputError
from gradfn.evaluate import lds, random_subsets
from gradfn.model.params import params_of
from gradfn.random import normals
from gradfn.train import Training, metagradient, metasmoothness
from gradfn.train.course import Course


def one_step():
    """A step of SGD from 0: half the mean of the rows' y, each times its weight."""
    data = [{"y": torch.tensor(y).double()} for y in (1.0, 2.0, 4.0)]
    course = Course(lambda p, e: (p["w"] - e["y"]).square() / 2, data, Training(1, 3, 0.5, "sgd"))
    return course, {"w": torch.zeros(()).double()}


def test_a_step_of_sgd_is_linear_in_the_weights_and_its_square_is_not():
    course, start = one_step()
    v = torch.stack([torch.from_numpy(normals(3, "metasmoothness", 4, number)) for number in (0, 1)])
    way = v @ torch.tensor([1.0, 2.0, 4.0]).double() / 6  # what w changes by in each direction
    w, h = 7 / 6, 0.3
    linear = metasmoothness(
        course, start, course.data, lambda p, e: p["w"] + 0 * e["y"], h=h, directions=2, seed=4
    )
    assert linear.agreement == pytest.approx(1)
    assert linear.movement == pytest.approx(float((2 * h * way).abs().mean()) / w)
    assert (linear.curvature, linear.bend) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-12))
    square = metasmoothness(course, start, course.data, lambda p, e: p["w"].square() + 0 * e["y"], h=h,
                            directions=2, seed=4)  # fmt: skip
    bends, slopes = 2 * way.square(), (2 * (w + h * way) * way).abs()
    assert square.curvature == pytest.approx(float(bends.mean()))
    assert square.bend == pytest.approx(float(bends.mean() * h / slopes.mean()))


@pytest.mark.parametrize("how", [{"h": 0.0}, {"directions": 0}, {"queries": []}])
def test_refusals(how):
    course, start = one_step()
    with pytest.raises(InputError, match="give 1 or more of both, and an h above 0"):
        metasmoothness(course, start, how.pop("queries", course.data), **how)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "smooth"), [(0.05, True), (1.0, False)])
def test_scores_predict_masked_trainings_where_these_are_smooth(rate, smooth):
    torch.manual_seed(0)
    net, means = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double(), torch.randn(4, 8)

    def loss(params, example):
        return nn.functional.cross_entropy(functional_call(net, params, example["x"]), example["y"])

    classes = torch.randint(4, (170,))
    data = [{"x": (means[own] + torch.randn(8)).double(), "y": own} for own in classes]
    data, queries, start = data[:160], data[160:], params_of(net)
    course = Course(loss, data, Training(4, 20, rate, "sgd", momentum=0.9))
    values = metagradient(course, start, queries).values.float()
    subsets, losses = random_subsets(len(data), 30, fraction=0.95), []
    for kept in subsets:
        *_, last = replace(course, weights=kept.double()).steps(course.start(start))
        losses.append(course.row_losses(last.state.params, queries))
    found, how = (
        lds(values, subsets, torch.stack(losses)).mean().item(),
        metasmoothness(course, start, queries),
    )
    if smooth:
        assert found > 0.98
        assert (how.agreement, how.bend) == (pytest.approx(1, abs=0.01), pytest.approx(0, abs=0.3))
    else:
        assert found < 0.4
        assert how.agreement < 0.9
        assert how.bend > 1
