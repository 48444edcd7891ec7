"""SOURCE is exact where it must be, a sum over segments, linear in queries, blind to bases and order."""

from dataclasses import replace

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn

import gradfn as gf
from gradfn.methods import Checkpoint
from gradfn.methods.dynamics import Dynamics
from gradfn.methods.source import Segment, Source
from gradfn.statistics.curvature import Curvature, dense_spectrum
from gradfn.subject import Subject
from gradfn.testing import seeds
from gradfn.train import Training, metagradient
from gradfn.train.course import Course
from gradfn.train.optimizers import dynamics_of

ROWS, WIDTH = 5, 3
RATES = st.floats(0.05, 0.9)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_of(seed, count=ROWS, basis=None):
    """Rows of a linear regression whose Hessian has 1 for its largest eigenvalue."""
    x = normal(seed, count, WIDTH)
    x = x / (torch.linalg.matrix_norm(x, 2) / count**0.5)
    y = x @ normal(seed + 1, WIDTH) + 0.3 * normal(seed + 2, count)
    x = x if basis is None else x @ basis.mT
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def curvature_of(data):
    x = torch.stack([row["x"] for row in data])
    return Curvature("hessian", {"root": dense_spectrum(x.mT @ x / len(data))}, len(data))


def subject_at(weight):
    net = nn.Linear(WIDTH, 1, bias=False).double()
    net.weight.data = weight.reshape(1, WIDTH).clone()

    def loss(params, e):
        off = torch.func.functional_call(net, params, e["x"])[0] - e["y"]
        return off.square() / 2

    return Subject(net, loss)


def pushing(subject):
    """The same, but the loss of a row with a `push` is linear in the weights: its gradient stays."""

    def loss(params, e):
        along = torch.func.functional_call(subject.model, params, e["x"])[0]
        return torch.where(e["push"], along * e["y"], (along - e["y"]).square() / 2)

    return replace(subject, loss=loss)


@st.composite
def dynamics(draw, exact=None):
    """Of SGD: as powers of its step, or (not exact) as an exponential."""
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    exact = draw(st.booleans()) if exact is None else exact
    return Dynamics(
        momentum=momentum, nesterov=momentum > 0 and draw(st.booleans()),
        weight_decay=draw(st.sampled_from([0.0, 0.05])), learning_rate=draw(RATES) if exact else None,
    )  # fmt: skip


@st.composite
def trainings(draw):
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    return Training(
        draw(st.integers(1, 6)), ROWS, draw(RATES), "sgd", momentum=momentum,
        nesterov=momentum > 0 and draw(st.booleans()), weight_decay=draw(st.sampled_from([0.0, 0.05])),
    )  # fmt: skip


def segment(rate, at, curvature):
    return Segment([Checkpoint(subject_at(at), rate)], curvature)


def meets(dynamics, segments, queries):
    """What a row meets in each segment, from the last one to the first, `[segments, queries, width]`."""
    back = Source(segments, dynamics).back({"root": queries[:, None]})
    return torch.stack([met["root"][:, 0] for _, met in back])


@given(trainings(), seeds())
def test_a_segment_a_step_is_the_metagradient(training, seed):
    data, queries, start = rows_of(seed), rows_of(seed + 3, 2), normal(seed + 6, 1, WIDTH)
    course = Course(subject_at(start).loss, data, training)
    states = [
        start,
        *(taken.state.params["weight"] for taken in course.steps(course.start({"weight": start}))),
    ]
    segments = [segment(training.learning_rate, at, curvature_of(data)) for at in states[:-1]]
    scores = gf.score(
        subject_at(states[-1]), data, queries, method=Source(segments, dynamics_of(training))
    ).matrix
    exact = metagradient(course, {"weight": start}, queries).values
    torch.testing.assert_close(scores, exact, rtol=1e-9, atol=1e-10 * float(exact.abs().max()))


@given(trainings(), seeds(), st.integers(0, 6))
def test_one_segment_is_the_metagradient_of_rows_that_push_steadily(training, seed, at):
    """Whichever the one checkpoint is: the gradients of such rows are the same at all."""
    push = torch.arange(ROWS) < 2
    data = [{**row, "push": own} for row, own in zip(rows_of(seed), push, strict=True)]
    queries, start = [{**row, "push": push[-1]} for row in rows_of(seed + 3, 2)], normal(seed + 6, 1, WIDTH)
    course = Course(pushing(subject_at(start)).loss, data, training)
    states = [
        start,
        *(taken.state.params["weight"] for taken in course.steps(course.start({"weight": start}))),
    ]
    H = sum(row["x"][:, None] * row["x"] for row in data[2:]) / ROWS
    point = Checkpoint(
        pushing(subject_at(states[at % len(states)])), training.epochs * training.learning_rate
    )
    whole = Segment([point], Curvature("hessian", {"root": dense_spectrum(H)}, ROWS))
    method = Source([whole], dynamics_of(training))
    scores = gf.score(pushing(subject_at(states[-1])), data, queries, method=method).matrix[:2]
    exact = metagradient(course, {"weight": start}, queries).values[:2]
    torch.testing.assert_close(scores, exact, rtol=1e-9, atol=1e-10 * float(exact.abs().max()))


@example(Dynamics(), 13, 13, 5e-324)
@given(dynamics(), st.integers(1, 20), st.integers(1, 20), st.floats(0.0, 30.0))
def test_steps_after_steps_are_all_of_them(dynamics, first, second, x):
    """`S` and `F` of two parts make those of the whole, also where x is 0 or steps would diverge."""
    rate = dynamics.learning_rate or 0.1
    one, two, both = (
        nn.functional.pad(
            dynamics.propagator(torch.tensor(x, dtype=torch.float64), steps * rate), (0, 0, 0, 1)
        )
        for steps in (first, second, first + second)
    )
    for made in (one, two, both):
        made[-1, -1] = 1.0
    torch.testing.assert_close(one @ two, both, rtol=1e-9, atol=1e-12)


@given(dynamics(), st.lists(st.integers(1, 9), min_size=2, max_size=4), seeds())
def test_cutting_a_segment_anywhere_adds_up(dynamics, parts, seed):
    rate, H, queries = dynamics.learning_rate or 0.1, curvature_of(rows_of(seed)), normal(seed + 3, 2, WIDTH)
    at = normal(seed + 4, WIDTH)
    cut = meets(dynamics, [segment(steps * rate, at, H) for steps in parts], queries)
    whole = meets(dynamics, [segment(sum(parts) * rate, at, H)], queries)
    torch.testing.assert_close(cut.sum(0), whole[0], rtol=1e-9, atol=1e-12)


@given(dynamics(), seeds(), st.floats(-3, 3), st.floats(-3, 3))
def test_scores_are_linear_in_the_gradients_of_queries(dynamics, seed, a, b):
    rate = dynamics.learning_rate or 0.1
    segments = [segment(n * rate, normal(seed, WIDTH), curvature_of(rows_of(seed + n))) for n in (4, 2, 7)]
    p, q = normal(seed + 8, 2, WIDTH), normal(seed + 9, 2, WIDTH)
    one, two, both = (meets(dynamics, segments, queries) for queries in (p, q, a * p + b * q))
    torch.testing.assert_close(a * one + b * two, both, rtol=1e-9, atol=1e-11)


@given(dynamics(), seeds(), st.permutations(range(ROWS)))
def test_a_rotation_changes_no_score_and_rows_keep_theirs_in_any_order(dynamics, seed, order):
    basis, rate = torch.linalg.qr(normal(seed + 7, WIDTH, WIDTH))[0], dynamics.learning_rate or 0.1
    ends = normal(seed + 8, 3, WIDTH)

    def scores(basis, order):
        data = [rows_of(seed, basis=basis)[row] for row in order]
        queries, at = rows_of(seed + 3, 2, basis), ends @ basis.mT
        segments = [segment(n * rate, w, curvature_of(data)) for n, w in zip((3, 5), at, strict=False)]
        return gf.score(subject_at(at[2]), data, queries, method=Source(segments, dynamics)).matrix

    plain, other = scores(torch.eye(WIDTH).double(), range(ROWS)), scores(basis, order)
    torch.testing.assert_close(other, plain[order], rtol=1e-9, atol=1e-10 * float(plain.abs().max()))


@given(dynamics(exact=False), seeds(), st.integers(0, 2))
def test_steps_of_no_length_add_nothing(dynamics, seed, place):
    H, at, queries = curvature_of(rows_of(seed)), normal(seed + 4, WIDTH), normal(seed + 3, 2, WIDTH)
    segments = [segment(2.0, at, H), segment(3.0, at, H)]
    plain = meets(dynamics, segments, queries).flip(0)
    more = meets(dynamics, [*segments[:place], segment(1e-12, at, H), *segments[place:]], queries).flip(0)
    torch.testing.assert_close(more[[n for n in range(3) if n != place]], plain, rtol=1e-9, atol=1e-11)
    assert more[place].abs().max() < 1e-10 * queries.abs().max()


@given(dynamics(exact=False), st.floats(1e-6, 100.0), st.floats(0.01, 50.0))
def test_what_is_forgotten_and_what_is_learned_make_one(dynamics, x, s):
    """`S + x F = 1`: at a steady push, weights go from what they were to `push / x`."""
    S, F = dynamics.propagator(torch.tensor(x, dtype=torch.float64), s)[0]
    assume(float(S) > 0)
    torch.testing.assert_close(S + x * F, torch.ones(()).double(), rtol=1e-9, atol=1e-12)


@given(dynamics(exact=False), st.floats(0.0, 5.0), st.floats(1.0, 5.0))
def test_an_exponential_is_what_small_steps_come_to(flow, x, s):
    small = replace(flow, learning_rate=1e-4)
    expected, found = (
        one.propagator(torch.tensor(x, dtype=torch.float64), s)[-1, -2:] for one in (flow, small)
    )
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.02)
