"""Files of an optimizer's state: torch's `state_dict`, a Trainer's checkpoint, safetensors of second moments.

No code in a file is run.
"""

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from gradfn.errors import InputError
from gradfn.hf.hub import listing, quiet, summary

_TRAINER_FILES = ("optimizer.pt", "optimizer.bin")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SECOND_MOMENT = "exp_avg_sq"
"""What Adam calls its second moment."""
_CORRECTED = {"eps": 1e-8, "betas": (0.9, 0.999), "step": math.inf}
"""The settings of a file without any: Adam's usual epsilon, and so many steps that no bias is left."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One parameter in a file: its name (if there is one), its state, and the settings of its group."""

    name: str | None
    state: Mapping[str, Any]
    group: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class SavedState:
    """A file of optimizer state: entries by group, in the optimizer's order."""

    path: Path
    groups: tuple[tuple[Entry, ...], ...]
    by_trainer: bool = False

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(chain(*self.groups))


def read_state(path: Path) -> SavedState:
    """Read a file, or the one in a Trainer's folder.

    Args:
        path: see `gradfn.hf.optimizer_state.load_optimizer_state`.

    Raises:
        InputError: no such file, or not one of an optimizer's state.
    """
    if path.is_dir():
        file = next((path / name for name in _TRAINER_FILES if (path / name).is_file()), None)
        if file is None:
            raise InputError(
                f"folder {path} holds no optimizer.pt, only {listing(path)}: give a Trainer's checkpoint "
                "folder, or the file that torch.save(optimizer.state_dict(), file) wrote"
            )
        path = file
    if not path.is_file():
        raise InputError(f"no optimizer state {str(path)!r}: no file or folder here has this name")
    if path.suffix == ".safetensors":
        return SavedState(path, (tuple(_read_safetensors(path)),))
    if path.suffix not in _TORCH_SUFFIXES:
        raise InputError(
            f"optimizer state {path} has no known ending: expected .pt, .pth, .bin or .safetensors"
        )
    by_trainer = path.name in _TRAINER_FILES and (path.parent / "trainer_state.json").is_file()
    return SavedState(path, _groups(_load_torch(path), path), by_trainer)


def _read_safetensors(path: Path) -> Iterator[Entry]:
    """The second moments in a file of tensors. Other tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            marked = [
                key
                for key in keys
                if key.startswith(f"{SECOND_MOMENT}.") or key.endswith(f".{SECOND_MOMENT}")
            ]
            for key in marked or keys:
                name = key.removeprefix(f"{SECOND_MOMENT}.").removesuffix(f".{SECOND_MOMENT}")
                yield Entry(name, {SECOND_MOMENT: file.get_tensor(key)}, _CORRECTED)
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a .safetensors file ({summary(error)}): save the state again"
        ) from error


def _load_torch(path: Path) -> Any:
    """What torch.save wrote, if it is only tensors and plain values. No code is run."""
    try:
        with quiet():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and plain values, which could run code, so it was not loaded: "
            "save optimizer.state_dict() of an optimizer that is not quantised"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever else is raised here is about the file at `path`
        raise InputError(
            f"{path} cannot be read ({summary(error)}): save it again with torch.save"
        ) from error


def _groups(content: Any, path: Path) -> tuple[tuple[Entry, ...], ...]:
    """The entries of every parameter group of a `state_dict`."""
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
        found = (
            ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        )
        raise InputError(
            f"{path} is not an optimizer's state_dict with state and param_groups, but holds {found}: "
            "save optimizer.state_dict() alone"
        )
    groups = content["param_groups"]
    if not isinstance(groups, list) or not all(isinstance(g, dict) and "params" in g for g in groups):
        raise InputError(f"{path} has a group without params: save optimizer.state_dict() as it is")
    states = content["state"]
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        raise InputError(
            f"{path} has a state that is no dict of one a parameter: save optimizer.state_dict() as it is"
        )
    return tuple(tuple(_group_entries(group, states, path)) for group in groups)


def _group_entries(group: Mapping[str, Any], states: Mapping[Any, Any], path: Path) -> Iterator[Entry]:
    keys = group["params"]
    names = group.get("param_names") or [key if isinstance(key, str) else None for key in keys]
    if len(names) != len(keys):
        raise InputError(
            f"{path} has {len(names)} param_names for {len(keys)} params: save optimizer.state_dict() as it "
            "is"
        )
    for key, name in zip(keys, names, strict=True):
        yield Entry(name, states.get(key, {}), group)
