"""Running a training backwards: which states to keep, and which steps to take again, when not all states fit.

To run back, the states before the last step, the one before it, and so on are needed. The binomial schedule
takes the fewest steps that any schedule with so many slots can take:

    t(n, s) = r n - C(s + r, s + 1),    the smallest r with n <= C(s + r, s)

Every step is then taken at most r times. With a slot for every step, each is taken once.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from gradfn.errors import InputError, StorageError
from gradfn.memory import free_memory
from gradfn.store.file import system_error
from gradfn.train.optimizers import State
from gradfn.types import Params

Curvature = Literal["hessian", "gauss_newton"]
"""What the adjoint of a step takes for the second derivative of its loss."""
STATES = "states-"
"""What the names of folders of states begin with."""


class Action(NamedTuple):
    """What is done next.

    Args:
        kind: "save": keep the state at hand in the slot. "advance": take steps up to `step`. "restore": take
            the state of the slot. "pull": go back through the step that follows on the state at hand.
        step: the number of steps before the state at hand, once the action is done.
        slot: for "save" and "restore".
    """

    kind: Literal["save", "advance", "restore", "pull"]
    step: int
    slot: int = -1


def schedule(steps: int, slots: int) -> Iterator[Action]:
    """The actions that go back through all steps, last one first, and take the fewest steps forward.

    The state before the first step is at hand, and takes a slot. The last step is never taken: it is only
    pulled through.

    Args:
        steps: of the training, n.
        slots: the states that may be kept, s.

    Raises:
        InputError: no slot.

    >>> for action in schedule(3, 2):
    ...     print(*action)
    save 0 0
    advance 1 -1
    save 1 1
    advance 2 -1
    pull 2 -1
    restore 1 1
    pull 1 -1
    restore 0 0
    pull 0 -1

    Source: Griewank and Walther 2000, Algorithm 799: Revolve; as REPLAY for gradients of a training in
    arXiv:2503.13751, section 3, which keeps a tree of states and takes more steps.
    """
    if slots < 1:
        raise InputError(f"a replay keeps 1 state or more, not {slots}: give 1 or more `slots`")
    held, here = [0], 0  # the steps of the states in slots 0, 1, ...
    if steps:
        yield Action("save", 0, 0)
    for step in reversed(range(steps)):
        while held[-1] > step:
            held.pop()
        if here != held[-1]:
            here = held[-1]
            yield Action("restore", here, len(held) - 1)
        while here < step:
            here += split(step + 1 - here, slots - len(held) + 1)
            yield Action("advance", here)
            if here < step:
                held.append(here)
                yield Action("save", here, len(held) - 1)
        yield Action("pull", step)


def split(steps: int, slots: int) -> int:
    """How far to go before the next state is kept, of 2 steps or more; one slot holds the state at hand.

    >>> split(10, 1), split(10, 2), split(10, 10)
    (9, 6, 1)
    """
    if slots == 1:
        return steps - 1
    r = _times(steps, slots)
    return min(comb(slots + r - 1, slots), steps - comb(slots + r - 2, slots - 1))


def forward_steps(steps: int, slots: int) -> int:
    """The steps that `schedule` takes forward, `t(n, s)`.

    >>> forward_steps(400, 10), forward_steps(400, 400)
    (1236, 399)
    """
    r = _times(steps, slots)
    return r * steps - comb(slots + r, slots + 1) if steps else 0


def _times(steps: int, slots: int) -> int:
    """How often a step is taken at most: the smallest r with `steps <= C(slots + r, slots)`."""
    r = 0
    while comb(slots + r, slots) < steps:
        r += 1
    return r


@dataclass(frozen=True, eq=False)
class Replay:
    """How a training is gone through backwards. Only `curvature` changes a result.

    Args:
        slots: the states that may be kept; None: as many as fit in half of the memory, or disk, that is free.
        folder: where they are kept, in files that are deleted at the end; None: in memory.
        query_chunk: the queries that share a replay; None: as many as fit in a quarter of the free memory.
        end: parameters to which the training must come, to the bit: those that are asked about. None: any.
        states: functions that give states which are known, such as checkpoints, by the steps before them. No
            step is taken to come to one; the steps from one to the next must come to the same bits.
        resume: a folder for how far back it is, written once a minute. A process that is killed goes on
            there. States that do not fit in memory are kept there too. Delete it when all is done.
        curvature: H in the adjoint of a step, `lam <- lam + H u`. "hessian" is exact. "gauss_newton" takes
            `Jᵀ (Hessian of the loss in the outputs) J`, J the Jacobian of the model's outputs. It is biased,
            but it damps adjoints that explode in a training that is not smooth; for a model that is linear
            in its parameters both are the same. It needs a loss that is split, see `split_of`.

    Raises:
        InputError: fewer than one slot, or query; a folder that is not there; another curvature.

    >>> Replay(slots=10).folder
    """

    slots: int | None = None
    folder: str | Path | None = None
    query_chunk: int | None = None
    end: Params | None = None
    states: Mapping[int, Callable[[], State]] = field(default_factory=dict)
    resume: str | Path | None = None
    curvature: Curvature = "hessian"

    def __post_init__(self) -> None:
        if self.curvature not in get_args(Curvature):
            raise InputError(f"no `curvature` {self.curvature!r}: choose {' or '.join(get_args(Curvature))}")
        for name in ("slots", "query_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"`{name}` must be 1 or more, not {value}: leave it out for what fits")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise InputError(f"there is no folder {self.folder} for states: make it, or keep them in memory")

    def slots_for(self, state: State, steps: int) -> int:
        """The states to keep of a training of so many steps."""
        if self.slots is not None:
            return self.slots
        place, device = self.place(state, steps), next(iter(state.params.values())).device
        free = free_memory(device) if place is None else shutil.disk_usage(place).free
        return max(1, min(steps, free // 2 // state_bytes(state)))

    def place(self, state: State, steps: int) -> Path | None:
        """The folder where states of so many steps are kept; None: in memory."""
        if self.folder is not None or self.resume is None:
            return None if self.folder is None else Path(self.folder)
        free = free_memory(next(iter(state.params.values())).device)
        if (self.slots or steps) * state_bytes(state) <= free // 2:
            return None
        Path(self.resume).mkdir(parents=True, exist_ok=True)
        return Path(self.resume)

    def queries_for(self, state: State, queries: int) -> int:
        """The queries that go back through the training together, each with about three states in memory."""
        if self.query_chunk is not None:
            return self.query_chunk
        free = free_memory(next(iter(state.params.values())).device)
        return max(1, min(queries, free // 4 // (3 * state_bytes(state))))

    @contextmanager
    def slots_like(self, like: State, steps: int) -> Iterator["Slots"]:
        """Slots for states of so many steps of a training, on the device of one of them."""
        if (place := self.place(like, steps)) is None:
            yield Slots({})
            return
        device = next(iter(like.params.values())).device
        with tempfile.TemporaryDirectory(prefix=STATES, dir=place) as folder:
            yield Slots({}, Path(folder), device)


@dataclass(frozen=True, eq=False)
class Slots:
    """States that are kept, in memory or in files of a folder, and taken out again to the bit.

    Args:
        kept: those in memory.
        folder: of the files; None: there are none.
        device: where a state that was in a file is wanted.
    """

    kept: dict[int, State]
    folder: Path | None = None
    device: torch.device | None = None

    def put(self, slot: int, state: State) -> None:
        """Keep a state in place of what was in the slot.

        Raises:
            StorageError: it cannot be written.
        """
        if self.folder is None:
            self.kept[slot] = copied(state)
            return
        try:
            with (self.folder / f"{slot}.pt").open("wb") as file:
                torch.save(tuple(state), file)
        except (OSError, RuntimeError) as error:
            raise StorageError(
                f"cannot keep a state in {self.folder} ({system_error(error) or error}): free some space, or "
                "give fewer `slots`"
            ) from error

    def take(self, slot: int) -> State:
        """The state of a slot, which stays there."""
        if self.folder is None:
            return copied(self.kept[slot])
        saved = torch.load(self.folder / f"{slot}.pt", map_location=self.device, weights_only=True)
        return State(*saved)


def copied(state: State) -> State:
    """The same state in dicts of its own: a step empties those that it is given, and changes no tensor.

    >>> state = State({"w": torch.ones(1)}, (), torch.tensor(0), torch.tensor(1))
    >>> copied(state).params is state.params, copied(state).params["w"] is state.params["w"]
    (False, True)
    """
    return state._replace(params=dict(state.params), moments=tuple(dict(part) for part in state.moments))


def state_bytes(state: State) -> int:
    """The memory of a state.

    >>> state_bytes(State({"w": torch.ones(2)}, ({"w": torch.ones(2)},), torch.tensor(0), torch.tensor(1)))
    16
    """
    return sum(value.nbytes for part in (state.params, *state.moments) for value in part.values())
