"""The schedule of a replay: the fewest steps, the states that it may keep, the last step first."""

from functools import cache

import pytest
import torch

from gradfn.errors import InputError, StorageError
from gradfn.train import State
from gradfn.train.replay import Replay, forward_steps, schedule, state_bytes


def run(steps, slots):
    """Do the actions with whole numbers for states: the steps taken, the most states kept, the pulls."""
    here, kept, taken, most, pulled = 0, {}, 0, 0, []
    for action in schedule(steps, slots):
        match action.kind:
            case "save":
                kept[action.slot] = here
                most = max(most, len(kept))
            case "restore":
                here = kept[action.slot]
            case "advance":
                taken += action.step - here
                assert action.step > here
                here = action.step
            case "pull":
                pulled.append(here)
        assert action.step == here
    return taken, most, pulled


@cache
def fewest(steps, slots):
    """By trying every place for the next state."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(k + fewest(k, slots) + fewest(steps - k, slots - 1) for k in range(1, steps))


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 40])
def test_no_schedule_takes_fewer_steps(slots):
    for steps in range(36):
        taken, most, pulled = run(steps, slots)
        assert taken == forward_steps(steps, slots) == fewest(steps, slots)
        assert most <= min(slots, max(steps, 1))
        assert pulled == [*reversed(range(steps))]


@pytest.mark.parametrize(("slots", "steps"), [(7, 1505), (10, 1236), (20, 947), (399, 399), (1000, 399)])
def test_400_steps(slots, steps):
    taken, most, pulled = run(400, slots)
    assert (taken, forward_steps(400, slots)) == (steps, steps)
    assert most == min(slots, 399)
    assert pulled == [*reversed(range(400))]


def test_a_long_training_is_planned_step_by_step():
    actions = schedule(10**6, 30)
    assert [next(actions).kind for _ in range(3)] == ["save", "advance", "save"]
    assert run(5_000, 5_000)[:2] == (4_999, 4_999)


def test_states_come_back_to_the_bit_from_memory_and_from_a_folder(tmp_path):
    state = State({"w": torch.randn(3).double()}, ({"w": torch.zeros(3)},), torch.tensor(4), torch.tensor(9))
    for folder in (None, tmp_path):
        with Replay(folder=folder).slots_like(state, 2) as slots:
            slots.put(0, state)
            slots.put(1, state._replace(taken=torch.tensor(5)))
            slots.put(1, state._replace(taken=torch.tensor(6)))
            slots.take(0).params.clear()
            for slot, taken in ((0, 4), (1, 6)):
                found = slots.take(slot)
                assert isinstance(found, State)
                assert int(found.taken) == taken
                torch.testing.assert_close(found[:2], state[:2], rtol=0, atol=0)
            assert len(list(tmp_path.glob("*/*.pt"))) == (0 if folder is None else 2)
    assert not list(tmp_path.iterdir())


def test_what_fits_is_kept(monkeypatch):
    state = State({"w": torch.ones(1000)}, (), torch.tensor(0), torch.tensor(9))
    assert state_bytes(state) == 4000
    assert Replay(slots=3).slots_for(state, 2) == 3
    for free, slots, queries in ((10**9, 50, 7), (80_000, 10, 1), (10, 1, 1)):
        monkeypatch.setattr("gradfn.train.replay.free_memory", lambda device, free=free: free)
        assert Replay().slots_for(state, 50) == slots
        assert Replay().queries_for(state, 7) == queries


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="1 or more `slots`"):
        list(schedule(3, 0))
    with pytest.raises(InputError, match="`query_chunk` must be 1 or more, not 0"):
        Replay(query_chunk=0)
    with pytest.raises(InputError, match="there is no folder"):
        Replay(folder=tmp_path / "absent")
    state = State({"w": torch.ones(1)}, (), torch.tensor(0), torch.tensor(9))
    with Replay(folder=tmp_path).slots_like(state, 2) as slots:
        assert slots.folder is not None
        slots.folder.rmdir()
        with pytest.raises(StorageError, match="cannot keep a state in"):
            slots.put(0, state)
        slots.folder.mkdir()
