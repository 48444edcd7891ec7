"""A training on disk: killed anywhere it ends with the same bits, and other settings are refused."""

import csv
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from train_problems import ROWS, SETTINGS, problem

from gradfn.errors import InputError
from gradfn.model.params import params_of
from gradfn.scores import Scores
from gradfn.store.folder import create_folder
from gradfn.train import run as module
from gradfn.train.course import Course, Diverged, Valuing
from gradfn.train.run import (
    COLUMNS,
    Saving,
    Validation,
    checkpoint_path,
    open_training,
    spans_of,
    train_run,
    write_values,
)

MAKE, LOSS, _, DATA = problem("mlp")
PARAMS = params_of(MAKE())
COURSE = Course(LOSS, DATA, replace(SETTINGS["adamw"], max_grad_norm=0.5), seed=5)


class Killed(BaseException):
    """What SIGKILL is to a test: nothing that follows is done."""


@dataclass
class Keeper:
    """States as torch saves them; dies at its n-th call before or after it has written."""

    die: int = -1
    late: bool = False
    calls: int = 0

    def write(self, folder, state):
        self.calls += 1
        if self.calls == self.die and not self.late:
            raise Killed
        torch.save(tuple(state), folder / "state.pt")
        (folder / "gradfn.json").write_text("{}")
        if self.calls == self.die:
            raise Killed

    def read(self, folder):
        return module.State(*torch.load(folder / "state.pt"))


def trained(run, course=COURSE, keeper=None, save_every="epoch", validation=None, **how):
    saving = Saving(keeper or Keeper(), save_every, validation)
    return train_run(run, course, lambda: course.start(dict(PARAMS)), saving, **how)


def content(run):
    """All that is to be the same: every state to the bit, every number of every step but the time."""
    found = open_training(run)
    states = {p.name: torch.load(p / "state.pt") for p in found.checkpoints}
    numbers = {name: value for name, value in found.steps.items() if name != "seconds"}
    return states, {**numbers, "rows": found.rows}


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0)
    for name, value in a[1].items():
        np.testing.assert_array_equal(value, b[1][name])


def log_of(run):
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("save_every", ["epoch", 1, 4, 100])
def test_all_of_a_training_is_on_disk(tmp_path, save_every):
    done = trained(tmp_path, save_every=save_every, validation=Validation(DATA[:3], {"rows": 3}))
    steps = [taken for taken in COURSE.steps(COURSE.start(dict(PARAMS)))]
    assert done.resumed == 0
    assert (done.rows == -1).sum() == 2 * (12 - ROWS)
    for number, (batch, one) in enumerate(zip(done.rows, steps, strict=True)):
        assert batch[batch >= 0].tolist() == one.rows.tolist()
        own = {"learning_rate": one.learning_rate, "loss": one.loss, "gradient_norm": one.norm,
               "clip": one.clip, "epoch": one.epoch, "tokens": one.tokens}  # fmt: skip
        assert own == {name: done.steps[name][number] for name in own}
    stops = [stop for _, stop in spans_of(COURSE, save_every)]
    assert [path.name for path in done.checkpoints] == [f"checkpoint-{stop}" for stop in (0, *stops)]
    first = Keeper().read(done.checkpoints[0])
    assert int(first.taken) == 0
    assert all(torch.equal(first.params[name], value) for name, value in PARAMS.items())
    assert np.isfinite(done.steps["validation_loss"]).nonzero()[0].tolist() == [stop - 1 for stop in stops]
    assert all((done.steps["seconds"] > 0).tolist())
    lines = log_of(tmp_path)
    assert [*lines[0]] == ["step", *COLUMNS]
    assert [line["step"] for line in lines] == ["1", "2", "3", "4", "5", "6"]
    assert [float(line["loss"]) for line in lines] == done.steps["loss"].tolist()
    assert sum(line["validation_loss"] != "" for line in lines) == len(stops)


def dying(place, run):
    """Start a training that dies at a place; whether it did."""
    kind, number = place
    with pytest.MonkeyPatch.context() as patch:
        if kind == "step":  # the log has lines that no segment has
            real, count = Course.gradient, iter(range(100))

            def gradient(*args):
                if next(count) == number:
                    raise Killed
                return real(*args)

            patch.setattr(Course, "gradient", gradient)
        if kind == "renamed":  # a checkpoint without the segment of its steps
            count = iter(range(1, 100))

            def create(path, fill):
                create_folder(path, fill)
                if next(count) == number:
                    raise Killed

            patch.setattr(module, "create_folder", create)
        keeper = Keeper(number, kind == "written") if kind in ("writing", "written") else Keeper()
        if kind == "unjoined":
            patch.setattr("gradfn.store.writer.Writer.finish", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            trained(run, keeper=keeper, save_every=2)


PLACES = [("step", 0), ("step", 3), ("writing", 1), ("renamed", 1), ("writing", 2), ("written", 3),
          ("renamed", 4), ("unjoined", 0)]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    trained(run, save_every=2)
    return content(run)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path, whole, place):
    dying(place, tmp_path / "killed")
    done = trained(tmp_path / "killed", save_every=2)
    kind, number = place
    spans = {"step": number // 2, "unjoined": 3}  # the first checkpoint is that before the first step
    assert done.resumed == 2 * spans.get(kind, max(0, number - 2))
    assert_same(whole, content(tmp_path / "killed"))
    assert [line["step"] for line in log_of(tmp_path / "killed")] == ["1", "2", "3", "4", "5", "6"]
    assert not [*(tmp_path / "killed").glob(".*.tmp")]


def test_a_complete_training_takes_no_step_again(tmp_path, monkeypatch):
    trained(tmp_path)
    monkeypatch.setattr(Course, "gradient", None)
    told = []
    assert trained(tmp_path, progress=lambda done, said: told.append(int(done))).resumed == COURSE.total
    assert told == [2 * ROWS]


def test_a_damaged_segment_that_was_deleted_is_made_again(tmp_path):
    trained(tmp_path, save_every=2)
    before = content(tmp_path)
    (tmp_path / "training.h5").unlink()
    (tmp_path / "segments/training-0000000002-0000000004.h5").unlink()
    assert trained(tmp_path, save_every=2).resumed == 4
    assert_same(before, content(tmp_path))
    (tmp_path / "training.h5").unlink()
    (tmp_path / "segments/training-0000000002-0000000004.h5").unlink()
    shutil.rmtree(checkpoint_path(tmp_path, 2))
    with pytest.raises(InputError, match="checkpoint-2 is gone, from which the training would go on"):
        trained(tmp_path, save_every=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 6}, "seed is 5 there and 6 here"),
        ({"training": replace(COURSE.training, learning_rate=0.02)}, "training.learning_rate is 0.01 there"),
        ({"weights": torch.full((ROWS,), 0.5).double()}, "weights is nothing there and "),
        ({"token_batch_size": 8}, "training.token_batch_size is 4096 there and 8 here"),
    ],
)
def test_other_settings_are_refused_with_what_differs(tmp_path, change, words):
    trained(tmp_path)
    before, other = content(tmp_path), replace(COURSE, **change)
    with pytest.raises(InputError, match=words):
        trained(tmp_path, other)
    assert_same(before, content(tmp_path))
    trained(tmp_path, other, overwrite=True, save_every=4)
    assert [path.name for path in open_training(tmp_path).checkpoints][1:] == ["checkpoint-4", "checkpoint-6"]
    assert len(log_of(tmp_path)) == 6


def test_checkpoints_of_another_program_are_not_touched(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500/mine").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="checkpoint-500 is no checkpoint of a training by gradfn"):
            trained(tmp_path, overwrite=overwrite)
    assert (tmp_path / "checkpoint-500/mine").read_text() == "precious"
    (tmp_path / "link").mkdir()
    (tmp_path / "link/checkpoint-3").symlink_to(tmp_path / "checkpoint-500")
    with pytest.raises(InputError, match="is a symbolic link"):
        trained(tmp_path / "link")


def test_a_training_that_diverges_keeps_its_last_checkpoint(tmp_path):
    data = [{"x": torch.tensor(1e3)}] * 4

    def loss(params, example):
        return (params["w"] * example["x"]).square()

    course = Course(loss, data, replace(SETTINGS["sgd"], epochs=400, learning_rate=0.1))

    def run():
        return train_run(tmp_path, course, lambda: course.start({"w": torch.ones(())}), Saving(Keeper(), 2))

    with pytest.raises(Diverged, match=r"the loss of step 4 is .* gradient inf.*\(.*checkpoint-2 is kept\)"):
        run()
    assert checkpoint_path(tmp_path, 2).exists()
    with pytest.raises(Diverged, match=r"the loss of step 4 is"):  # from where it went on
        run()
    with pytest.raises(InputError, match="is unfinished"):
        open_training(tmp_path)


def test_stopped_it_says_what_is_kept(tmp_path, monkeypatch):
    calls = iter(range(100))
    real = Course.gradient

    def gradient(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Course, "gradient", gradient)
    with pytest.raises(
        KeyboardInterrupt, match=r"3 of 6 steps are kept in .*: the same command does the others"
    ):
        trained(tmp_path)


def test_progress_counts_rows_and_says_the_loss(tmp_path):
    told = []
    dying(("step", 3), tmp_path)
    trained(tmp_path, save_every=2, progress=lambda done, said: told.append((done, said)))
    assert [int(done) for done, _ in told] == [8, 3, 4, 4, 3]
    assert type(told[0][0]).__name__ == "Resumed"
    assert all(said.startswith("loss ") for _, said in told[1:])
    assert Path(tmp_path / "training.h5").exists()


def test_values_are_summed_over_the_steps_whatever_was_killed(tmp_path):
    course = replace(COURSE, valuing=Valuing(DATA[:2], LOSS, "influence"))
    by_epoch = np.zeros((course.training.epochs, ROWS, 2))
    for taken in course.steps(course.start(dict(PARAMS))):
        np.add.at(by_epoch[taken.epoch], taken.rows, taken.values)
    trained(tmp_path, course, Keeper())
    with pytest.raises(InputError, match="valued no rows"):
        write_values(tmp_path, COURSE)
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "training.h5").unlink()
    (tmp_path / "segments/training-0000000003-0000000006.h5").unlink()
    trained(tmp_path, course, Keeper())
    write_values(tmp_path, course)
    scores = Scores.load(tmp_path)
    np.testing.assert_allclose(scores.values[0], by_epoch.sum(0), rtol=1e-5, atol=1e-8)
    for epoch, expected in enumerate(by_epoch, 1):
        np.testing.assert_allclose(scores.shares[f"epoch {epoch}"][0], expected, rtol=1e-5, atol=1e-9)
    write_values(tmp_path, course)  # and again, which changes nothing
