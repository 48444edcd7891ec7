"""How far back through a training some queries are, in a file, so that a process that is killed goes on."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from pickle import PickleError
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

import gradfn
from gradfn.errors import StorageError
from gradfn.runs.provenance import loss_source
from gradfn.store.file import system_error
from gradfn.train.course import Course
from gradfn.train.optimizers import State
from gradfn.train.pull import Adjoint
from gradfn.train.replay import STATES
from gradfn.types import Data, LossFn

SECONDS = 60.0
"""What a process that is killed may lose, beside the states that it kept."""


@dataclass(eq=False)
class Way:
    """How far back some queries are.

    Args:
        step: the step that was gone back through last; at first the number of steps.
        values: of the steps from there on, `[1 or epochs, rows or tokens, queries]`.
        adjoint: of the state before that step; None: none was gone back through.
        end: the state after the training; None: it is not known.
        seen: the bits of the states that were met, by the steps before them.
        steps: that were taken forward.
    """

    step: int
    values: Tensor
    adjoint: Any = None
    end: Any = None
    seen: dict[int, list[int]] = field(default_factory=dict)
    steps: int = 0


@dataclass(eq=False)
class Kept:
    """Writes and reads how far back queries are.

    Args:
        folder: of the files; None: nothing is written.
        key: what tells the work from other work, whose files are deleted; see `key_of`.
    """

    folder: str | Path | None
    key: str
    written: float = field(default_factory=time.monotonic)

    def chunk(self) -> int | None:
        """The queries that an earlier process took together; what is left of other work is deleted."""
        if self.folder is None or not Path(self.folder).is_dir():
            return None
        for stale in Path(self.folder).glob(f"{STATES}*"):
            shutil.rmtree(stale, ignore_errors=True)
        chunk = None
        for path in self._files():
            held = self._read(path, torch.device("cpu"))
            if held is None:
                path.unlink()
            else:
                chunk = max(chunk or 0, held["values"].shape[-1])
        return chunk

    def read(self, asked: range, device: torch.device) -> Way | None:
        """How far an earlier process was with some queries."""
        if self.folder is None or (held := self._read(self._path(asked), device)) is None:
            return None
        adjoint, end = Adjoint(held["adjoint"][0], tuple(held["adjoint"][1:])), State(*held["end"])
        return Way(held["step"], held["values"].cpu(), adjoint, end, held["seen"], held["steps"])

    def write(self, asked: range, way: Way, *, now: bool = False) -> None:
        """Write how far some queries are, once a minute.

        Args:
            now: write it in any case.

        Raises:
            StorageError: it cannot be written.
        """
        if self.folder is None or not (now or time.monotonic() - self.written >= SECONDS):
            return
        path = self._path(asked)
        partial = path.with_suffix(".tmp")
        held = {"key": self.key, "step": way.step, "values": way.values, "end": tuple(way.end),
                "adjoint": [way.adjoint.params, *way.adjoint.moments], "seen": way.seen,
                "steps": way.steps}  # fmt: skip
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(held, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            raise StorageError(
                f"cannot write {path} ({system_error(error) or error}): free some space, or make it writable"
            ) from error
        self.written = time.monotonic()

    def _path(self, asked: range) -> Path:
        return Path(str(self.folder)) / f"queries-{asked.start}.pt"

    def _files(self) -> Sequence[Path]:
        return sorted(Path(str(self.folder)).glob("queries-*.pt"))

    def _read(self, path: Path, device: torch.device) -> dict[str, Any] | None:
        """What a file holds; None: it is not there, is damaged, or is of other work."""
        if not path.is_file() or path.is_symlink():
            return None
        try:
            with ZipFile(path) as file:
                if file.testzip() is not None:  # torch does not compare the checksums
                    return None
            held = torch.load(path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, PickleError, BadZipFile, ValueError, LookupError):
            return None
        return held if isinstance(held, dict) and held.get("key") == self.key else None


def key_of(course: Course, start: State, queries: Data, query_loss: LossFn, asked: Sequence[Any]) -> str:
    """16 hex digits of all that a way back depends on.

    >>> from gradfn.train import Training
    >>> course = Course(lambda p, e: p["w"] * e["x"], [{"x": torch.ones(())}], Training(1, 1, 0.1))
    >>> keys = {key_of(course, course.start({"w": torch.tensor(w)}), [], course.loss, []) for w in (0.0, 1.0)}
    >>> len(keys), len(keys.pop())
    (2, 16)
    """
    losses = [loss_source(loss).to_json() for loss in (course.loss, query_loss)]
    how = [gradfn.__version__, torch.__version__, torch.get_num_threads(), course.training.settings(),
           course.seed, course.normalize, course.token_batch_size, course.pads, course.weights_digest, losses,
           list(asked)]  # fmt: skip
    digest, parts = sha256(repr(how).encode()), [start.params]
    for data in (course.data, queries):
        if (known := getattr(data, "fingerprint", None)) is not None:
            digest.update(known().encode())
        else:
            parts += [data[row] for row in range(len(data))]
    for part in parts:
        for name, value in part.items():
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
