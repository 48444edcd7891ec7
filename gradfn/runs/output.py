"""Where a run is written, and how: the directory, what is recorded, the part of an array job."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from gradfn.runs.changes import explaining
from gradfn.runs.provenance import Provenance, Settings
from gradfn.runs.shards import Shard, shard_run
from gradfn.store import Overwrite, Span, Writer, open_writer
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.watch import Progress


class WriteOptions(TypedDict, total=False):
    """What may be said of a run that is written, as keywords; see `Output`."""

    settings: Settings | Provenance | None
    overwrite: Overwrite
    shard: Shard | None
    progress: Progress | None


class RunOptions(SubjectOptions, WriteOptions, total=False):
    """The same beside a bare model, of which a subject's options may be said too."""


@dataclass(frozen=True, eq=False)
class Output:
    """Where a run is written, and how.

    Args:
        run: the run directory, common to all shards.
        settings: recorded beside what is known of the model, data and transform (paths, say).
        overwrite: replace what is there; "unlike": only where it was made otherwise.
        shard: do this part of the rows only, for `merge_run` to join; None means all.
        progress: called with the tokens done.
    """

    run: str | Path
    settings: Settings | Provenance | None = None
    overwrite: Overwrite = False
    shard: Shard | None = None
    progress: Progress | None = None

    @property
    def folder(self) -> Path:
        """The directory that is written: of a shard its own."""
        return shard_run(self.run, self.shard)

    @contextmanager
    def open(
        self,
        kind: str,
        made: Provenance,
        rows: int,
        *,
        part: Span | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        beside: Mapping[str, Sequence[Any]] | None = None,
    ) -> Iterator[Writer]:
        """Open the directory to write the rows of one kind, or to resume.

        Args:
            made: what the rows depend on, and what was asked for.
            beside: what tells which rows changed; see `explaining`.
            kind, rows, part, names: see `open_writer`.
        """
        writer = open_writer(
            self.folder, kind, made.settings(), rows, self.overwrite, part=part, names=names,
            request=made.request,
        )  # fmt: skip
        with explaining(self.folder, kind, beside or {}), writer as opened:
            yield opened


def output_of(run: str | Path, model: nn.Module | Subject, options: RunOptions) -> tuple[Output, Subject]:
    """Where a run is written and how, and what it is a run of."""
    written = {name: value for name, value in options.items() if name in WriteOptions.__annotations__}
    of_model: Any = {name: value for name, value in options.items() if name not in written}
    return Output(run, **written), subject_of(model, **of_model)  # pyright: ignore[reportArgumentType]
