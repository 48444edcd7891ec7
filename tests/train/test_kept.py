"""A way back through a training that is killed goes on, and ends with the same bits."""

import random

import pytest
import torch
from train_problems import SETTINGS, classification, make_mlp, vectors

from gradfn.errors import InputError, StorageError
from gradfn.model.params import params_of
from gradfn.train.course import Course
from gradfn.train.magic import metagradient
from gradfn.train.replay import Replay


class Killed(Exception):
    pass


def stopping(at):
    """A progress that stops the work at its so many calls."""
    left = [at]

    def progress(done):
        left[0] -= 1
        if not left[0]:
            raise Killed

    return progress


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Every step is written."""
    monkeypatch.setattr("gradfn.train.kept.SECONDS", 0.0)


@pytest.fixture
def case():
    torch.manual_seed(0)
    net, rows = make_mlp(), vectors()
    return Course(classification(net), rows, SETTINGS["adamw"]), params_of(net), rows[:3]


def same(one, other):
    return (
        torch.equal(one.values, other.values)
        and all(torch.equal(one.start[name], other.start[name]) for name in one.start)
        and all(torch.equal(one.end.params[name], other.end.params[name]) for name in one.start)
    )


@pytest.mark.parametrize(("per", "window"), [("row", (0, None)), ("visit", (1, 3))])
def test_killed_again_and_again_it_ends_with_the_same_bits(case, tmp_path, per, window):
    how = {"per": per, "window": window}
    whole = metagradient(*case, **how, replay=Replay(query_chunk=2))
    for at in (2, 4):
        with pytest.raises(Killed):
            metagradient(*case, **how, replay=Replay(query_chunk=2, resume=tmp_path), progress=stopping(at))
    seen = []
    # Another number of queries would fit by now, and another number of states.
    last = metagradient(*case, **how, replay=Replay(slots=1, resume=tmp_path), progress=seen.append)
    assert same(whole, last)
    assert sum(seen) == 2 * (case[0].total - window[0])
    assert seen[0] > 1  # what was done before
    again = []
    assert same(whole, metagradient(*case, **how, replay=Replay(resume=tmp_path), progress=again.append))
    assert len(again) == 2


def test_what_other_work_left_is_not_taken(case, tmp_path):
    course, start, _ = case
    for other in (course.data[1:2], course.data[2:5]):
        with pytest.raises(Killed):
            metagradient(course, start, other, replay=Replay(resume=tmp_path), progress=stopping(2))
    (tmp_path / "states-left").mkdir()
    seen = []
    made = metagradient(*case, replay=Replay(resume=tmp_path), progress=seen.append)
    assert same(made, metagradient(*case))
    assert set(seen) == {1}
    assert [path.name for path in tmp_path.iterdir()] == ["queries-0.pt"]


def test_a_damaged_file_is_made_again(case, tmp_path):
    (tmp_path / "queries-0.pt").write_bytes(b"nothing")
    assert same(metagradient(*case, replay=Replay(resume=tmp_path)), metagradient(*case))


def test_a_folder_that_cannot_be_written(case, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        metagradient(*case, replay=Replay(resume=tmp_path / "file/folder"))


def test_states_that_are_known_are_not_made_again(case):
    course, start, _ = case

    kept = {}
    for step in (2, 3, course.total):
        *_, last = course.steps(course.start(start), step)
        kept[step] = last.state
    whole = metagradient(*case)
    known = {step: lambda state=state: state for step, state in kept.items()}
    for slots in (1, None):
        made = metagradient(*case, replay=Replay(slots=slots, states=known))
        assert same(whole, made)
    late = metagradient(*case, window=(3, None), replay=Replay(states=known))
    assert late.steps == course.total - 3
    assert torch.equal(late.values, metagradient(*case, window=(3, None)).values)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_known_state_that_the_training_does_not_come_to(case, step):
    course, start, _ = case
    *_, last = course.steps(course.start(start), step)
    moments = tuple({name: value + 1e-9 for name, value in part.items()} for part in last.state.moments)
    wrong = last.state._replace(moments=moments)
    with pytest.raises(InputError, match=rf"step {step} came to another state than before"):
        metagradient(*case, replay=Replay(states={step: lambda: wrong}))


def test_no_flipped_bit_in_a_file_changes_the_result(case, tmp_path):
    """torch.load alone takes a flipped bit of a tensor for its value."""
    whole, chance = metagradient(*case), random.Random(0)
    with pytest.raises(Killed):
        metagradient(*case, replay=Replay(resume=tmp_path), progress=stopping(3))
    (path,) = tmp_path.glob("queries-*.pt")
    content, size = path.read_bytes(), path.stat().st_size
    for place in [*(chance.randrange(size) for _ in range(12)), None]:
        damaged = bytearray(content[: size // 2] if place is None else content)
        if place is not None:
            damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert same(whole, metagradient(*case, replay=Replay(resume=tmp_path)))
