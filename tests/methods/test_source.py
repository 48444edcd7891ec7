"""SOURCE against exact derivatives, and what its functions of a curvature are in their limits."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import language_model
from torch import nn

import gradfn as gf
from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.exact import gauss_newton_product, outputs_and_loss
from gradfn.methods.dynamics import Dynamics, parse_dynamics
from gradfn.methods.source import Checkpoint, Segment, Source, cut, fit_curvature, source
from gradfn.model.params import params_of
from gradfn.statistics.curvature import Curvature, dense_spectrum
from gradfn.subject import Subject, row_weights
from gradfn.train import Training
from gradfn.train.course import Course
from gradfn.train.optimizers import dynamics_of

ROWS, WIDTH, STEPS, ETA = 24, 6, 120, 0.2


def make_rows(count, seed, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator).double() * torch.logspace(0, -1.5, width).double()
    y = x @ torch.ones(width).double() + 0.1 * torch.randn(count, generator=generator).double()
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


DATA, QUERIES = make_rows(ROWS, 0), make_rows(4, 1)
X, Y = (torch.stack([row[key] for row in DATA]) for key in "xy")
H = X.mT @ X / ROWS
CURVATURE = Curvature("hessian", {"root": dense_spectrum(H)}, ROWS)


def subject_at(weight):
    net = nn.Linear(WIDTH, 1, bias=False).double()
    net.weight.data = weight[None].clone()

    def loss(params, example):
        return (torch.func.functional_call(net, params, example["x"])[0] - example["y"]).square() / 2

    return Subject(net, loss)


def gradients(weight, rows=DATA):
    x, y = (torch.stack([row[key] for row in rows]) for key in "xy")
    return x * (x @ weight - y)[:, None]


def trained(momentum=0.0, nesterov=False, decay=0.0):
    """The weights before every step of full-batch descent and after the last, and the exact scores."""
    w, b, path = torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double(), []
    dw, db = torch.zeros(2, ROWS, WIDTH).double()  # derivatives in the weights of rows
    for _ in range(STEPS):
        path.append(w)
        push = gradients(w) / ROWS + dw @ H + decay * dw
        g = gradients(w).mean(0) + decay * w
        b, db = momentum * b + g, momentum * db + push
        w = w - ETA * (g + momentum * b if nesterov else b)
        dw = dw - ETA * (push + momentum * db if nesterov else db)
    return [*path, w], -dw @ gradients(w, QUERIES).mT


def scores_of(path, segments, each, dynamics, curvature=CURVATURE):
    """SOURCE's with `each` checkpoints a segment, each after the steps that it stands for, rows by hand."""
    count = segments * each
    steps = STEPS // count
    points = [Checkpoint(subject_at(path[(n + 1) * steps - (steps == 1)]), ETA * steps) for n in range(count)]
    method = Source([Segment(part, curvature) for part in cut(points, segments)], dynamics)
    scores = torch.zeros(ROWS, len(QUERIES)).double()
    for segment, met in method.back({"root": gradients(path[-1], QUERIES)[:, None]}):
        for one in segment.checkpoints:
            rows = gradients(one.load().model.weight.detach()[0])
            scores = scores + rows @ met["root"][:, 0].mT * one.rate / segment.rate / ROWS
    return scores


def error(got, exact):
    return float((got - exact).norm() / exact.norm())


PATH, EXACT = trained()
POWERS = Dynamics(learning_rate=ETA)
BACK = {"root": gradients(PATH[-1], QUERIES)[:, None]}


def meets(dynamics, *segments):
    """The sum of what rows meet in segments `(rate, curvature)` at one checkpoint, `[queries, width]`."""
    parts = [Segment([Checkpoint(subject_at(PATH[0]), rate)], curvature) for rate, curvature in segments]
    return sum(met["root"] for _, met in Source(parts, dynamics).back(BACK))[:, 0]


def test_more_segments_and_checkpoints_come_closer_to_the_exact_derivative():
    cuts = ((1, 1), (1, 6), (3, 2), (STEPS, 1))
    errors = [error(scores_of(PATH, *cut, Dynamics()), EXACT) for cut in cuts]
    assert errors == pytest.approx([0.1696, 0.2713, 0.0651, 0.0028], rel=0.05)
    end = gradients(PATH[-1]) @ torch.linalg.pinv(H) @ BACK["root"][:, 0].mT / ROWS
    assert error(end, EXACT) == pytest.approx(1.05, rel=0.05)


@pytest.mark.parametrize(
    "how",
    [{}, {"weight_decay": 0.05}, {"momentum": 0.9}, {"momentum": 0.8, "nesterov": True},
     {"momentum": 0.5, "weight_decay": 0.05}],
)  # fmt: skip
def test_a_segment_a_step_is_exact(how):
    path, exact = trained(how.get("momentum", 0.0), how.get("nesterov", False), how.get("weight_decay", 0.0))
    assert error(scores_of(path, STEPS, 1, replace(POWERS, **how)), exact) < 1e-12


def test_the_scale_of_the_curvature_decides():
    scaled = Curvature("hessian", {"root": CURVATURE["root"].filtered(lambda x: 512 * x)}, ROWS)
    assert error(scores_of(PATH, 3, 2, Dynamics(), scaled), EXACT) > 10 * error(
        scores_of(PATH, 3, 2, Dynamics()), EXACT
    )


def test_scores_of_the_library_are_those_by_hand():
    points = [Checkpoint(subject_at(PATH[20 * n]), ETA * 20) for n in range(1, 7)]
    method = Source([Segment(part, CURVATURE) for part in cut(points, 3)])
    got = gf.score(subject_at(PATH[-1]), DATA, QUERIES, method=method).matrix
    torch.testing.assert_close(got, scores_of(PATH, 3, 2, Dynamics()), check_dtype=False)
    assert method.settings()["source"]["segments"][0]["rates"] == [4.0, 4.0]
    with pytest.raises(InputError, match="give examples"):
        method.scorer(subject_at(PATH[-1]), None)
    with pytest.raises(InputError, match="no shares of blocks"):
        method.scorer(subject_at(PATH[-1]), QUERIES, by_block=True)


# --- limits and laws of the functions


def test_an_endless_training_is_the_influence_function_and_a_short_one_is_tracin():
    queries = BACK["root"][:, 0]
    torch.testing.assert_close(meets(Dynamics(), (1e7, CURVATURE)), queries @ torch.linalg.pinv(H))
    torch.testing.assert_close(meets(Dynamics(), (1e-9, CURVATURE)), queries * 1e-9)


@pytest.mark.parametrize(
    "dynamics",
    [Dynamics(), Dynamics(momentum=0.5), POWERS, replace(POWERS, momentum=0.9),
     replace(POWERS, momentum=0.8, nesterov=True, weight_decay=0.1)],
)  # fmt: skip
def test_splitting_a_segment_changes_nothing(dynamics):
    whole, parts = 24 * ETA, [(8 * ETA, CURVATURE), (16 * ETA, CURVATURE)]
    torch.testing.assert_close(meets(dynamics, *parts), meets(dynamics, (whole, CURVATURE)))


def test_momentum_of_small_steps_is_a_longer_training():
    slow = Dynamics(momentum=0.9, learning_rate=1e-3)
    got, flow = (meets(one, (5.0, CURVATURE)) for one in (slow, replace(slow, learning_rate=None)))
    assert error(got, flow) < 0.01
    torch.testing.assert_close(flow, meets(Dynamics(), (50.0, CURVATURE)))


@pytest.mark.parametrize("dynamics", [Dynamics(), POWERS, replace(POWERS, momentum=0.9)])
def test_what_would_diverge_or_is_flat_is_finite(dynamics):
    x = torch.tensor([0.0, 1e-30, 1.0, 1 / ETA, 100.0]).double()
    made = dynamics.propagator(x, 50 * ETA)
    assert bool(made.isfinite().all())
    rate = 50 * ETA / (1 - dynamics.momentum)
    assert made[0, -1, -1] == pytest.approx(rate, rel=0.2 if dynamics.states == 2 else 1e-9)
    assert made[-1, -1].tolist()[-2:] == pytest.approx([0.0, 0.01])


# --- an optimizer that scales


def scaled_by(v):
    return lambda subject: gf.adam({"root": v}, eps=0.0)


def test_a_scaling_that_is_a_number_is_a_learning_rate():
    at, v = subject_at(PATH[0]), torch.full((1, WIDTH), 4.0).double()
    half = Curvature("hessian", {"root": CURVATURE["root"].filtered(lambda x: x / 2)}, ROWS)
    got = Segment([Checkpoint(at, 3.0, scaled_by(v))], half).back(Dynamics("adamw"), [BACK])
    plain = Segment([Checkpoint(at, 1.5)], CURVATURE).back(Dynamics(), [BACK])
    for mine, theirs in zip(got, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_scaling_is_exact_with_a_dense_curvature():
    s, decay, P = 3.0, 0.1, torch.linspace(0.5, 2.0, WIDTH).double()
    point = Checkpoint(subject_at(PATH[0]), s, scaled_by(P.pow(-2)[None]))
    Ht = dense_spectrum(P.sqrt()[:, None] * H * P.sqrt())
    segment = Segment([point], Curvature("hessian", {"root": Ht}, ROWS))
    dynamics = Dynamics("adamw", weight_decay=decay)
    step = P.diag() @ H + decay * torch.eye(WIDTH).double()  # the displacement shrinks at this rate
    S = torch.linalg.matrix_exp(-s * step)
    F = torch.linalg.solve(step, (torch.eye(WIDTH).double() - S) @ P.diag())
    (before, met), q = segment.back(dynamics, [BACK]), BACK["root"][:, 0]
    torch.testing.assert_close(before["root"][:, 0], q @ S, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(met["root"][:, 0], q @ F, atol=1e-10, rtol=1e-8)


def test_a_curvature_is_fitted_behind_the_scaling():
    P = torch.linspace(0.5, 2.0, WIDTH).double()
    point = Checkpoint(subject_at(PATH[0]), 1.0, scaled_by(P.pow(-2)[None]))
    made = fit_curvature([point], DATA, Dynamics("adamw"), fold=gf.second_moment(), labels="data")
    rows = gradients(PATH[0]) * P.sqrt()
    torch.testing.assert_close(made["root"].dense(), rows.mT @ rows / ROWS)
    basis = fit_curvature([point], DATA, Dynamics("adamw"), labels="data")["root"]
    squares = (rows @ basis.right).square().mean(0)  # one row: its P is factored to the bit
    torch.testing.assert_close(basis.values[0], torch.where(basis.values[0] > 0, squares, 0.0))


# --- fits


def test_curvatures_of_checkpoints_are_weighed_by_their_rates():
    points = [Checkpoint(subject_at(PATH[0]), 1.0), Checkpoint(lambda: subject_at(PATH[60]), 3.0)]
    made = fit_curvature(points, DATA, Dynamics(), fold=gf.second_moment(), labels="data")
    rows = [gradients(PATH[step]) for step in (0, 60)]
    mean = (rows[0].mT @ rows[0] + 3 * rows[1].mT @ rows[1]) / (4 * ROWS)
    torch.testing.assert_close(made["root"].dense(), mean)


LANGUAGE = language_model("gpt2")
VIEW = gf.View(include=("*c_proj",))
LENGTHS = (3, 8, 5, 6)


def documents(times=1):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(11, (length,), generator=generator).tolist() for length in LENGTHS]
    return make_documents(rows * times)


def objective_trace(reduction, normalize):
    """The trace of the Gauss-Newton matrix of what a step of gradient descent minimises."""
    loss, data, found = gf.causal_lm_loss(LANGUAGE, reduction), documents(), 0.0
    names = [name for name in params_of(LANGUAGE) if "c_proj" in name]
    params = {name: params_of(LANGUAGE)[name] for name in names}
    shares = row_weights(loss, data, np.arange(len(data)), normalize)
    for row, share in enumerate(shares.tolist()):
        product = gauss_newton_product(*outputs_and_loss(loss), params, [data[row]])
        for name, value in params.items():
            zeros = {n: p.new_zeros(value.numel(), *p.shape) for n, p in params.items()}
            basis = torch.eye(value.numel()).double().view(-1, *value.shape)
            made = product({**zeros, name: basis})[name]
            found += share * float(made.flatten(1).trace())
    return found


@pytest.mark.parametrize(("reduction", "normalize"), [("mean", "rows"), ("mean", "tokens"), ("sum", "rows")])
def test_a_fitted_curvature_has_the_scale_of_the_objective(reduction, normalize):
    subject = Subject(LANGUAGE, gf.causal_lm_loss(LANGUAGE, reduction), view=VIEW)
    made = fit_curvature([Checkpoint(subject, 1.0)], documents(150), Dynamics(normalize=normalize))
    trace = sum(float(one.values.sum()) for one in made.values())
    assert trace == pytest.approx(objective_trace(reduction, normalize), rel=0.08)


def test_summed_and_averaged_losses_of_tokens_are_one_objective():
    scores = []
    for reduction in ("mean", "sum"):
        subject = Subject(LANGUAGE, gf.causal_lm_loss(LANGUAGE, reduction), gf.causal_lm_loss(LANGUAGE), VIEW)
        method = source([Checkpoint(subject, 2.0)], documents(), segments=1,
                        dynamics=Dynamics(normalize="tokens"))  # fmt: skip
        scores.append(gf.score(subject, documents(), documents(), method=method).matrix)
    torch.testing.assert_close(*scores)
    by_token = replace(subject, view=replace(VIEW, tokens=True))
    tokens = gf.score(by_token, documents(), documents(), method=method)
    summed = torch.zeros(len(LENGTHS), len(LENGTHS)).index_add(0, tokens.documents, tokens.matrix.float())
    torch.testing.assert_close(summed, scores[1].float())


# --- what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Source([]), "give one or more"),
        (lambda: Segment([], CURVATURE), "one checkpoint or more"),
        (lambda: Checkpoint(subject_at(PATH[0]), 0.0), "a sum above 0, not 0.0"),
        (lambda: cut([1], 2), "between 1 and the number of checkpoints, 1, not 2"),
        (lambda: Source([Segment([Checkpoint(subject_at(PATH[0]), 1.0)], CURVATURE)], Dynamics("adam")),
         "adam scales gradients: give `scale`"),
        (lambda: Dynamics("lion"), "no optimizer 'lion'"),
        (lambda: Dynamics("adam", weight_decay=0.1), "train with adamw"),
        (lambda: Dynamics("adamw", momentum=0.9), "settings of sgd"),
        (lambda: Dynamics(momentum=1.0), "momentum must be at least 0 and below 1"),
        (lambda: parse_dynamics("sgd:speed=1"), "no setting 'speed'"),
        (lambda: parse_dynamics("sgd:momentum=fast"), "'momentum=fast' is no setting"),
        (lambda: meets(Dynamics(), (1.0, Curvature("hessian", {}, 0))), "no curvature for root"),
        (lambda: source([Checkpoint(subject_at(PATH[0]), 1.0)], DATA, segments=1), "use the data's"),
        (lambda: source([Checkpoint(subject_at(PATH[0]), 1.0)], DATA, segments=1, fold=gf.mean()),
         "is no curvature"),
        (lambda: source([Checkpoint(subject_at(PATH[0]), 1.0)], [{"weight": torch.ones(())}], segments=1),
         "rows with weights of their own"),
    ],
)  # fmt: skip
def test_what_has_no_sense_is_refused(make, words):
    with pytest.raises(InputError, match=re.escape(words)):
        make()


# --- against retraining


@pytest.mark.slow
def test_rows_are_ranked_as_retraining_does_where_the_influence_function_does_not():
    """Two epochs of a small network, far from converged; 30 trainings with rows masked."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    means = 0.7 * torch.randn(4, 8).double()

    def rows(count):
        y = torch.randint(4, (count,))
        return [{"x": means[own] + torch.randn(8).double(), "y": own} for own in y]

    def at(params):
        other = copy.deepcopy(net)
        other.load_state_dict(params)
        return Subject(other, lambda p, e: nn.functional.cross_entropy(
            torch.func.functional_call(other, p, e["x"]), e["y"]))  # fmt: skip

    data, queries, start = rows(160), rows(10), {n: p.clone() for n, p in params_of(net).items()}
    course = Course(at(start).loss, data, Training(2, 20, 0.05, "sgd"))
    states = [{**taken.state.params} for taken in course.steps(course.start(start))]
    points = [Checkpoint(at(states[step]), 0.2) for step in range(3, 16, 4)]
    method = source(points, data, segments=2, dynamics=dynamics_of(course.training), labels="data")
    influence = gf.influence(gf.fit(gf.ekfac(), at(states[-1]), data))
    subsets, losses = gf.evaluate.random_subsets(len(data), 30, fraction=0.8), []
    for kept in subsets:
        *_, last = replace(course, weights=kept.double()).steps(course.start(start))
        losses.append(course.row_losses(last.state.params, queries))
    found = []
    for one in (method, influence):
        scores = gf.score(at(states[-1]), data, queries, method=one).matrix.float()
        found.append(float(gf.evaluate.lds(scores, subsets, torch.stack(losses)).mean()))
    assert found[0] > 0.97
    assert found[1] < 0.9
