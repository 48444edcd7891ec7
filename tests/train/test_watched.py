"""Rows that are recorded, and values, while a course trains, which is the same to the bit."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from recorded import contents, read
from tiny import language_model, mostly_slow
from torch import nn
from train_problems import SETTINGS, problem

import gradfn as gf
from gradfn.data import make_documents
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import labelled
from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss
from gradfn.model.params import params_of
from gradfn.store import open_store
from gradfn.testing.strategies import randomize
from gradfn.train.checkpoints import take_params
from gradfn.train.course import Course, Valuing
from gradfn.train.optimizers import State
from gradfn.train.run import Saving, train_run
from gradfn.train.watched import Divisors, Recording, check_rows_run, fast_values, unseen

TRAINING = replace(SETTINGS["adamw"], max_grad_norm=0.1, warmup=0)
LENGTHS = (3, 6, 4, 5, 3, 7, 4, 5, 6, 3, 4)


def documents(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return make_documents([torch.randint(11, (length,), generator=generator).tolist() for length in lengths])


def float64_model(family):
    """A language model that computes in float64 throughout; the norm of a Llama has float32 in it."""
    model = randomize(language_model(family), 0)
    for path, module in [*model.named_modules()]:
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
            norm.weight = module.weight
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, norm)
    return model


# --- values


def valued(model, kind, training=TRAINING, size=4096, fast=True, data=None, **how):
    """The values of two steps, and the weights after them."""
    loss = causal_lm_loss(model)
    valuing = Valuing(documents((5, 7, 4), 1), loss, kind, **how)
    course = Course(loss, data or documents(), training, token_batch_size=size, valuing=valuing)
    with fast_values(course, model) if fast else nullcontext(course) as ready:
        assert (ready.valuing.probes is not None) == fast
        values = []
        for taken in ready.steps(ready.start(dict(params_of(model))), 2):
            values.append(taken.values)
            params = dict(taken.state.params)
    return values, params


@pytest.mark.parametrize("size", mostly_slow([4096, 8], 8))
@pytest.mark.parametrize(
    ("family", "kind"),
    [("gpt2", "shapley"), ("gpt_neox", "influence"), ("llama", "frozen"), ("llama", "before")],
)
def test_values_by_probes_are_those_by_forward_mode(monkeypatch, family, kind, size):
    model = float64_model(family)
    monkeypatch.setattr(
        "gradfn.train.course.DIRECTIONS_BYTES", 2 * 8 * sum(p.numel() for p in model.parameters())
    )
    fast, slow = (valued(model, kind, size=size, fast=fast) for fast in (True, False))
    for one, other in zip(fast[0], slow[0], strict=True):
        assert np.abs(other).max() > 0 or kind == "before"  # Adam knows nothing before its first step
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10 * np.abs(other).max())
    assert all(torch.equal(value, slow[1][name]) for name, value in fast[1].items())


@pytest.mark.parametrize("name", ["nesterov", "clipped"])
def test_values_by_probes_of_sgd(name):
    fast, slow = (valued(float64_model("gpt2"), "shapley", SETTINGS[name], fast=f) for f in (True, False))
    for one, other in zip(fast[0], slow[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10 * np.abs(other).max())


def test_a_parameter_that_no_probe_sees_leaves_the_values_to_forward_mode():
    model = float64_model("gpt2")
    own = model.transformer.h[0].mlp
    own.scale, plain = nn.Parameter(torch.full((1,), 1.5).double(), requires_grad=False), type(own).forward
    own.forward = lambda x: plain(own, x) * own.scale
    assert unseen(model, causal_lm_loss(model), documents()) == ["transformer.h.0.mlp.scale"]
    loss = causal_lm_loss(model)
    course = Course(loss, documents(), TRAINING, valuing=Valuing(documents((5,), 1), loss))
    with fast_values(course, model) as ready:
        assert ready is course
        assert (next(ready.steps(ready.start(dict(params_of(model))))).values != 0).all()
    _, plain_loss, _, rows = problem("mlp")
    assert unseen(problem("mlp")[0](), plain_loss, rows) == ["0", "2"]


# --- recording


class Killed(BaseException):
    """What SIGKILL is to a test: nothing that follows is done."""


@dataclass
class Keeper:
    """States as torch saves them; dies before it writes for the n-th time."""

    die: int = -1
    calls: int = 0

    def write(self, folder, state):
        self.calls += 1
        if self.calls == self.die:
            raise Killed
        torch.save(tuple(state), folder / "state.pt")
        (folder / "gradfn.json").write_text("{}")

    def read(self, folder):
        return State(*torch.load(folder / "state.pt"))


def recorded(
    tmp_path,
    rows="rows",
    *,
    training=TRAINING,
    keeper=None,
    course=None,
    valued=False,
    overwrite=False,
    **how,
):
    """Train a small model with a recording, or with none; where it is, and the weights at the end."""
    model = float64_model("gpt2")
    loss = causal_lm_loss(model)
    start = Course(loss, documents(), training, seed=3, **(course or {}))
    if valued:
        start = replace(start, valuing=Valuing(documents((5, 4), 1), loss, "influence"))
    recording = rows and Recording(tmp_path / rows, model, {"transform": gf.project(3), **how})
    if recording:
        recording.check(start)

    def begin():
        state = start.start(params_of(model))
        take_params(model)
        return state

    run = tmp_path / f"run-of-{rows}"
    with fast_values(start, model) if valued else nullcontext(start) as ready:
        done = train_run(run, ready, begin, Saving(keeper or Keeper(), 2, recording=recording or None),
                         overwrite=overwrite)  # fmt: skip
    return tmp_path / str(rows), Keeper().read(done.checkpoints[-1]).params


def built(tmp_path, model, rows, transform):
    """The rows of `build` at the weights of the model."""
    gf.build(tmp_path / "built", model, documents(), transform, loss=causal_lm_loss(model), overwrite=True)
    names = [name for name in read(tmp_path / "built") if name.startswith("gradients/")]
    found = read(tmp_path / "built", *names)
    return {name: found[name][rows] for name in names}


@pytest.mark.parametrize("size", mostly_slow([4096, 8], 8))
@pytest.mark.parametrize("normalize", ["rows", "tokens"])
def test_rows_of_the_first_step_are_those_of_build(tmp_path, normalize, size):
    run, _ = recorded(tmp_path, course={"normalize": normalize, "token_batch_size": size})
    store = read(run)
    first = store["visits/step"] == 0
    rows = store["visits/row"][first]
    assert len(rows) == 4
    assert (store["visits/microstep"][first].max() > 0) == (size == 8)
    for name, expected in built(tmp_path, float64_model("gpt2"), rows, gf.project(3)).items():
        np.testing.assert_allclose(store[name][first], expected, rtol=1e-6, atol=1e-7)
    model = float64_model("gpt2")
    losses = [float(causal_lm_loss(model)(params_of(model), documents()[int(row)])) for row in rows]
    np.testing.assert_allclose(store["rows/loss"][first], losses, rtol=1e-6)


def test_every_visit_is_there_and_the_training_is_the_same_to_the_bit(tmp_path):
    run, params = recorded(tmp_path, course={"token_batch_size": 8})
    _, plain = recorded(tmp_path, None, course={"token_batch_size": 8})
    assert all(torch.equal(value, plain[name]) for name, value in params.items())
    store, done = read(run), gf.train.run.open_training(tmp_path / "run-of-rows")
    for step, rows in enumerate(done.rows):
        here = store["visits/step"] == step
        assert sorted(store["visits/row"][here]) == sorted(rows[rows >= 0])
        assert set(store["visits/epoch"][here]) == {done.steps["epoch"][step]}
        np.testing.assert_array_equal(store["visits/factor"][here], done.steps["clip"][step])
    assert (done.steps["clip"] < 1).any()


def test_rows_and_values_at_once(tmp_path):
    run, params = recorded(tmp_path, valued=True)
    other, plain = recorded(tmp_path, "other")
    assert all(torch.equal(value, plain[name]) for name, value in params.items())
    one, two = read(run), read(other)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    with open_store(tmp_path / "run-of-rows", "training") as store:
        values, rows = store.read("steps/values", 0, 1)[0], store.read("steps/rows", 0, 1)[0]
    model = float64_model("gpt2")
    loss = causal_lm_loss(model)
    course = Course(
        loss, documents(), TRAINING, seed=3, valuing=Valuing(documents((5, 4), 1), loss, "influence")
    )
    taken = next(course.steps(course.start(dict(params_of(model)))))
    assert rows.tolist() == taken.rows.tolist()
    np.testing.assert_allclose(values, taken.values, rtol=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_rows_are_divided_by_the_second_moment(tmp_path, when):
    run, _ = recorded(tmp_path, normalize=when)
    store, model = read(run), float64_model("gpt2")
    assert store["visits/scaled"].tolist() == [when == "after" or step > 0 for step in store["visits/step"]]
    step = 2 if when == "before" else 1  # the state after two steps is in a checkpoint
    state = Keeper().read(tmp_path / "run-of-rows/checkpoint-2")
    divisors = Divisors(TRAINING, gf.model.find_sites(model), state)()
    course = Course(causal_lm_loss(model), documents(), TRAINING, seed=3)
    steps = course.steps(course.start(dict(params_of(model))))
    for _ in range(step):
        params = dict(next(steps).state.params)
    for name, value in params.items():
        model.get_parameter(name).data = value
    here = store["visits/step"] == step
    engine = probe_engine(model, causal_lm_loss(model))
    row = int(store["visits/row"][here][0])
    G = engine(gf.data.collate([labelled(documents(), row)])).values
    wanted = gf.project(3)({name: block / divisors[name] for name, block in G.items()})
    for name, block in wanted.items():
        np.testing.assert_allclose(store[f"gradients/{name}"][here][0], block[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("die", mostly_slow([1, 2, 3, 4], 2))
def test_killed_at_a_checkpoint_it_ends_with_the_same_bytes(tmp_path, die):
    run, params = recorded(tmp_path, "whole")
    expected = contents(run)
    with pytest.raises(Killed):
        recorded(tmp_path, "killed", keeper=Keeper(die))
    killed, again = recorded(tmp_path, "killed")
    assert all(torch.equal(value, again[name]) for name, value in params.items())
    assert contents(killed) == expected
    recorded(tmp_path, "killed")  # and again, which changes nothing
    assert contents(killed) == expected


def test_a_span_that_is_made_again_is_not_recorded_twice(tmp_path):
    run, _ = recorded(tmp_path)
    before = contents(run)
    (tmp_path / "run-of-rows/training.h5").unlink()
    (tmp_path / "run-of-rows/segments/training-0000000002-0000000004.h5").unlink()
    recorded(tmp_path)
    assert contents(run) == before


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="sgd has no second moments of all weights to divide rows by"):
        recorded(tmp_path, training=SETTINGS["sgd"], normalize="before")
    run, _ = recorded(tmp_path)
    with pytest.raises(InputError, match="is the run of the training itself"):
        check_rows_run(run, tmp_path / "x/../rows")
    with pytest.raises(InputError, match="made with other settings"):
        recorded(tmp_path, transform=gf.project(2))
    for path in run.rglob("*.h5"):
        path.unlink()
    with pytest.raises(InputError, match=r"has taken 6 steps already, of which .*rows has no rows"):
        recorded(tmp_path)
    recorded(tmp_path, overwrite=True)
    assert len(read(run, "visits/step")) == 22
    gf.build(tmp_path / "built", float64_model("gpt2"), documents(), gf.project(3))
    with pytest.raises(InputError, match="has a store that no training recorded"):
        check_rows_run(tmp_path / "built", tmp_path / "run")
    check_rows_run(tmp_path / "built", tmp_path / "run", overwrite=True)
