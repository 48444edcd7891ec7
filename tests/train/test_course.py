"""One model, step by step: a loop of `torch.optim`, whatever the micro-batches, a function of the seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import language_model
from torch import nn
from train_problems import OPTIMIZERS, ROWS, SETTINGS, classification, make_mlp, problem, torch_optimizer

from gradfn.data import collate, make_documents
from gradfn.engine.stream import labelled
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss
from gradfn.model.params import params_of
from gradfn.runs.provenance import Provenance
from gradfn.subject import row_weights
from gradfn.testing.strategies import randomize
from gradfn.train import Training, first_state, in_run, make_trainer, update
from gradfn.train.course import Course, Diverged, Valuing
from gradfn.train.watched import Recording

CLIPPED = replace(SETTINGS["adamw"], max_grad_norm=0.1)


def documents(lengths=(3, 6, 4, 5, 3, 7, 4, 5, 6, 3, 4)):
    generator = torch.Generator().manual_seed(0)
    return make_documents([torch.randint(11, (length,), generator=generator).tolist() for length in lengths])


def copy(taken):
    moments = tuple(dict(part) for part in taken.state.moments)
    return taken._replace(state=taken.state._replace(params=dict(taken.state.params), moments=moments))


def run(course, params):
    return [copy(taken) for taken in course.steps(course.start(dict(params)))]


def loop(course, model, naive):
    """What a person would write: the losses, and the model after every step."""
    training, losses, params = course.training, [], []
    optimizer, schedule = torch_optimizer(model.requires_grad_(), training, course.total)
    for _, rows in course.batches():
        optimizer.zero_grad()
        loss = torch.stack([naive(model, course.data[int(row)]) for row in rows]).mean()
        loss.backward()
        if training.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        params.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return losses, params


@OPTIMIZERS
@pytest.mark.parametrize("kind", ["mlp", "llama"])
def test_training_is_the_loop_of_torch_optim(kind, training):
    make, loss, naive, data = problem(kind)
    if (
        training.optimizer == "adamw"
    ):  # a small eps makes large numbers of the rounding of gradients that are 0
        training = replace(training, eps=1e-4)
    course, model = Course(loss, data, training, seed=3), make()
    taken = run(course, params_of(model))
    losses, params = loop(course, model, naive)
    torch.testing.assert_close([one.loss for one in taken], losses, rtol=1e-12, atol=1e-12)
    for one, expected in zip(taken, params, strict=True):
        torch.testing.assert_close(one.state.params, expected, rtol=1e-12, atol=1e-12)
    assert all((one.clip < 1) == (one.norm > (training.max_grad_norm or 1e9)) for one in taken)


@pytest.mark.parametrize("size", [1, 8, 16])
@pytest.mark.parametrize("normalize", ["rows", "tokens"])
def test_accumulation_changes_nothing(size, normalize):
    model = randomize(language_model("llama"), 0)
    how = {"seed": 1, "normalize": normalize}
    whole = Course(causal_lm_loss(model), documents(), CLIPPED, **how)
    parts = replace(whole, token_batch_size=size)
    for a, b in zip(run(whole, params_of(model)), run(parts, params_of(model)), strict=True):
        assert (a.rows == b.rows).all()
        assert (a.loss, a.norm) == pytest.approx((b.loss, b.norm), rel=1e-12)
        torch.testing.assert_close(a.state.params, b.state.params, rtol=1e-10, atol=1e-12)


def test_rows_that_padding_would_change_are_not_padded():
    model = randomize(language_model("llama"), 0)
    course = Course(causal_lm_loss(model), documents(), SETTINGS["sgd"], pads=False)
    shapes = []

    class Loss:
        reduction = "mean"
        model = course.loss.model

        def batched(self, batch):
            shapes.append("attention_mask" in batch)
            return course.loss.with_whole_logits().batched(batch)

        def __call__(self, params, example):
            return course.loss(params, example)

    a, b = run(course, params_of(model))[-1], run(replace(course, loss=Loss()), params_of(model))[-1]
    torch.testing.assert_close(a.state.params, b.state.params, rtol=0, atol=0)
    assert shapes
    assert not any(shapes)


def test_tokens_weigh_alike_whatever_the_reduction():
    model, data = randomize(language_model("gpt2"), 0), documents()
    ends = [
        run(Course(causal_lm_loss(model, reduction), data, SETTINGS["sgd"], normalize="tokens"),
            params_of(model))[-1]
        for reduction in ("mean", "sum")
    ]  # fmt: skip
    torch.testing.assert_close(ends[0].state.params, ends[1].state.params, rtol=1e-12, atol=1e-12)
    rows = np.array([0, 1])
    losses = [causal_lm_loss(model, "sum")(params_of(model), data[row]) for row in (0, 1)]
    weights = row_weights(causal_lm_loss(model, "sum"), data, rows, "tokens")
    assert (weights @ torch.stack(losses)).item() == pytest.approx(sum(losses).item() / (2 + 5), rel=1e-12)
    with pytest.raises(InputError, match="does not say which tokens"):
        Course(causal_lm_loss(model), list(data), SETTINGS["sgd"], normalize="tokens")


def test_a_step_is_update_to_the_bit_and_empties_the_state_before():
    make, loss, _, data = problem("mlp")
    course = Course(loss, data, CLIPPED)
    params = params_of(make())
    state, copies = course.start(dict(params)), dict(params)
    step = course.steps(state)
    rows = next(course.batches())[1]
    leaves = {name: value.clone().requires_grad_() for name, value in copies.items()}
    mean = torch.stack([loss(leaves, data[int(row)]) for row in rows]).mean()
    grads = dict(zip(leaves, torch.autograd.grad(mean, [*leaves.values()]), strict=True))
    taken = next(step)
    assert not state.params
    assert not any(state.moments)
    expected = update(course.training, first_state(copies, course.training, torch.tensor(6)), grads)
    torch.testing.assert_close(taken.state, expected, rtol=1e-12, atol=1e-14)
    assert taken.norm == pytest.approx(torch.cat([g.flatten() for g in grads.values()]).norm().item())
    before = {name: value.clone() for name, value in taken.state.params.items()}
    kept = dict(taken.state.params)
    next(step)
    assert all(torch.equal(kept[name], value) for name, value in before.items())


@OPTIMIZERS
def test_one_model_is_what_it_is_among_stacked_ones(training):
    make, loss, _, data = problem("mlp")
    params = params_of(make())
    steps = make_trainer(params, loss, data, training).trajectory(torch.ones(1, ROWS, dtype=torch.bool), [7])
    for one, many in zip(run(Course(loss, data, training, seed=7), params), steps, strict=True):
        assert (torch.from_numpy(one.rows) == many.rows[0]).all()
        stacked = {name: value[0] for name, value in many.state.params.items()}
        torch.testing.assert_close(one.state.params, stacked, rtol=1e-10, atol=1e-12)


def test_the_order_is_a_function_of_seed_and_epoch():
    make, loss, _, data = problem("mlp")
    course = Course(loss, data, SETTINGS["sgd"], seed=1)
    order = [rows.tolist() for _, rows in course.batches()]
    assert order == [rows.tolist() for _, rows in replace(course, loss=classification(make())).batches()]
    assert order != [rows.tolist() for _, rows in replace(course, seed=2).batches()]
    assert order[4:] == [rows.tolist() for _, rows in course.batches(4)]
    assert [epoch for epoch, _ in course.batches()] == [0, 0, 0, 1, 1, 1]
    for epoch in (order[:3], order[3:]):
        assert sorted(row for rows in epoch for row in rows) == [*range(ROWS)]
    assert order[:3] != order[3:]


def test_steps_go_on_from_any_state():
    make, loss, _, data = problem("mlp")
    course, params = Course(loss, data, CLIPPED), params_of(make())
    whole = run(course, params)
    for stop in (1, 3, 5):
        *_, half = course.steps(course.start(dict(params)), stop)
        assert int(half.state.taken) == stop
        *_, last = course.steps(half.state)
        assert all(torch.equal(v, whole[-1].state.params[n]) for n, v in last.state.params.items())


def test_a_loss_that_is_not_finite_stops_before_its_step():
    data = [{"x": torch.tensor(1.0)}] * 3 + [{"x": torch.tensor(float("inf"))}]
    course = Course(lambda p, e: p["w"] * e["x"], data, Training(1, 1, 0.1, "sgd"), seed=0)
    place = next(step for step, (_, rows) in enumerate(course.batches(), 1) if rows[0] == 3)
    steps = course.steps(course.start({"w": torch.ones(())}))
    assert [int(next(steps).state.taken) for _ in range(place - 1)] == [*range(1, place)]
    with pytest.raises(Diverged, match=f"the loss of step {place} is inf .* give a lower `learning_rate`"):
        next(steps)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        (Training(1, 12, 0.1), "a batch of 12 is larger than the data, of 11 rows"),
        (Training(1, 4, 0.1, warmup=4), "warmup of 4 steps is longer than the training, of 3"),
    ],
)
def test_refusals(training, words):
    _, loss, _, data = problem("mlp")
    with pytest.raises(InputError, match=words):
        Course(loss, data, training)


def test_models_that_cannot_be_trained_are_refused():
    _, loss, _, data = problem("mlp")
    half = {name: value.half() for name, value in params_of(make_mlp()).items()}
    with pytest.raises(InputError, match="in which most steps of training round to nothing"):
        Course(loss, data, SETTINGS["sgd"]).start(half)


def test_the_loss_of_other_rows_is_that_of_a_step():
    model, data = randomize(language_model("gpt2"), 0), documents()
    for normalize in ("rows", "tokens"):
        course = Course(causal_lm_loss(model), data, Training(1, ROWS, 0.1, "sgd"), normalize=normalize)
        taken = next(course.steps(course.start(params_of(model))))
        assert course.mean_loss(params_of(model), data) == pytest.approx(taken.loss, rel=1e-12)


@pytest.mark.parametrize("kind", ["shapley", "before"])
def test_values_are_those_of_in_run_and_change_no_bit(kind):
    model, data = randomize(language_model("llama"), 0), documents()
    loss, queries = causal_lm_loss(model), documents((5, 7))
    plain = Course(loss, data, CLIPPED, token_batch_size=8)
    valued = replace(plain, valuing=Valuing(queries, loss, kind, every=2))
    state = first_state(params_of(model), CLIPPED, torch.tensor(plain.total))
    for number, (one, other) in enumerate(zip(run(plain, params_of(model)), run(valued, params_of(model)),
                                              strict=True)):  # fmt: skip
        assert all(torch.equal(value, other.state.params[name]) for name, value in one.state.params.items())
        assert (other.values is None) == (number % 2 == 1)
        if number == 2:
            batch = collate([labelled(data, int(row)) for row in one.rows])
            weights = torch.full((len(one.rows),), 1 / len(one.rows), dtype=torch.float64)
            asked = collate([labelled(queries, row) for row in range(2)])
            found = in_run(loss, CLIPPED, state, batch, weights, asked, kind=kind)
            np.testing.assert_allclose(other.values, found.values, rtol=1e-8, atol=1e-14)
            np.testing.assert_allclose(other.losses, found.losses, rtol=1e-12)
        state = one.state
    with pytest.raises(InputError, match="2 validation rows every 0 steps"):
        Valuing(queries, loss, every=0)


@pytest.mark.parametrize("weights", [torch.ones(4).double(), torch.full((5,), torch.nan).double()])
def test_weights_are_one_finite_number_a_row(weights):
    data = [{"x": torch.ones(())}] * 5
    with pytest.raises(InputError, match=r"expected `weights` of \[5\] or \[2, 5\] finite numbers"):
        Course(lambda p, e: p["w"] * e["x"], data, Training(2, 2, 0.1), weights=weights)


def test_rows_without_weight_are_not_recorded(tmp_path):
    model = language_model("gpt2")
    course = Course(causal_lm_loss(model), documents(), Training(1, 4, 0.1), weights=torch.ones(11).double())
    made = Provenance()
    with (
        pytest.raises(InputError, match="record without `weights`"),
        Recording(tmp_path, model, {}).begin(course, 0, made),
    ):
        pass
