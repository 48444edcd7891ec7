"""What is seen of the rows of a course while it trains: the gradients that are recorded, and the values.

Both come from probes in the backward passes of the steps. A course empties the model, so the probes are
attached before it starts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import labelled
from gradfn.errors import InputError
from gradfn.model.sites import Site, View, blocks_of, find_sites
from gradfn.runs.provenance import Provenance
from gradfn.runs.visits import END, is_recorded
from gradfn.store import open_store
from gradfn.store.directory import check_place, segments_of
from gradfn.store.file import read_header
from gradfn.train.course import Course
from gradfn.train.dots import values
from gradfn.train.optimizers import State
from gradfn.train.parts import RecordOptions
from gradfn.train.record import Recorder, recording
from gradfn.train.spec import Training
from gradfn.types import Blocks, Data, LossFn

EVERY = View(include=["*"])


@dataclass(eq=False)
class Divisors:
    """What Adam divides by at a state: `sqrt(v / (1 - b2^t) + eps_root) + eps` of every block.

    Args:
        training: with adam or adamw.
        sites: the weights, found while the model has them.
        state: whose moments are read.
    """

    training: Training
    sites: Sequence[Site]
    state: State | None = None

    def __call__(self) -> Blocks:
        """By block, `[out, in]`; of no block before the first step."""
        if self.state is None or not (age := int(self.state.taken)):
            return {}
        found: dict[str, Tensor] = {}
        for name in {name for site in self.sites for name in site.names}:
            v = self.state.moments[1][name] / (1 - self.training.betas[1] ** age)
            found[name] = ((v + self.training.eps_root).sqrt() + self.training.eps)[None]
        return {block: G[0] for block, G in blocks_of(self.sites, found).items()}


@dataclass(frozen=True, eq=False)
class Recorded:
    """The recorder of a course, and what it divides the rows by."""

    recorder: Recorder
    divisors: Divisors | None = None

    def begin(self, state: State) -> None:
        """Tell the state before a step."""
        if self.divisors is not None:
            self.divisors.state = state

    def end(self, state: State, epoch: int, factor: float) -> None:
        """Tell the state after it, and record the rows."""
        self.begin(state)
        self.recorder.step(epoch=epoch, factor=factor)


@dataclass(frozen=True, eq=False)
class Recording:
    """Where and how the rows of a training are recorded; see `recording`.

    Args:
        run: the run directory of the rows.
        model: which the training has not emptied yet.
        options: without the optimizer, and without where the training begins.

    Raises:
        InputError: probes do not see a weight of the view; a division by second moments, which sgd has not.
    """

    run: Path
    model: nn.Module
    options: RecordOptions

    @contextmanager
    def begin(
        self, course: Course, step: int, made: Provenance, *, overwrite: bool = False
    ) -> Iterator[Course]:
        """The course with a recorder, which records from a step on.

        Args:
            course: whose rows are recorded.
            step: how many steps are complete; the rows of later ones are removed.
            made: what the training depends on.
            overwrite: replace what is in the run.

        Raises:
            InputError: the run lacks the rows of earlier steps, or was made otherwise.
        """
        if step and not segments_of(self.run, "store"):
            raise InputError(
                f"the training has taken {step} steps already, of which {self.run} has no rows: give "
                "`overwrite=True` to begin again"
            )
        view, divisors = self.options.get("view"), None
        options: RecordOptions = {
            **self.options, "start": step, "again": not _is_complete(self.run), "overwrite": overwrite,
            "settings": made,
        }  # fmt: skip
        if options.get("normalize", "none") != "none":
            divisors = Divisors(course.training, find_sites(self.model, view))
            options["optimizer"] = divisors
        with recording(self.model, self.run, course.data, **options) as recorder:
            yield replace(course, recorded=Recorded(recorder, divisors))

    def check(self, course: Course) -> None:
        """Refuse what cannot be recorded, before any work."""
        optimizer = course.training.optimizer
        if self.options.get("normalize", "none") != "none" and optimizer not in ("adam", "adamw"):
            raise InputError(
                f"{optimizer} has no second moments of all weights to divide rows by: leave the division "
                "out, or train with adamw"
            )
        if hidden := unseen(self.model, course.loss, course.data, self.options.get("view") or View()):
            raise InputError(
                f"the rows' gradients of {hidden[0]} cannot be seen while the model trains: exclude it"
            )


def check_rows_run(rows: Path, run: Path, *, overwrite: bool = False) -> None:
    """Refuse a run of rows that is the training's own, or holds what no training recorded.

    Raises:
        InputError: saying which.
    """
    check_place(rows)
    if rows.resolve() == run.resolve():
        raise InputError(f"{run} is the run of the training itself: record its rows to another directory")
    there = [*segments_of(rows, "store"), *rows.glob("store.h5")]
    if there and not overwrite and not is_recorded(read_header(there[0]).settings):
        raise InputError(f"{rows} has a store that no training recorded: record rows to another directory")


def _is_complete(run: Path) -> bool:
    """Whether a training to its end was recorded in a run."""
    if not (run / "store.h5").exists():
        return False
    with open_store(run) as store:
        return str(store.index_array(END)[0]) == "complete"


def unseen(model: nn.Module, loss: LossFn, data: Data, view: View = EVERY) -> list[str]:
    """The blocks whose gradients no probe sees, as the engine finds on two rows.

    >>> import torch
    >>> unseen(nn.Linear(2, 1), lambda p, e: (p["weight"] @ e["x"]).sum(), [{"x": torch.ones(2)}])
    ['root']
    """
    engine = probe_engine(model, loss, view=view)
    device = next(model.parameters()).device
    batch = collate([labelled(data, row) for row in range(min(2, len(data)))])
    engine.verify({key: value.to(device) for key, value in batch.items()})
    facts = engine.facts
    whole = facts.singly or facts.copies or not hasattr(loss, "batched")
    return [site.block for site in engine.sites if whole or not site.probed]


@contextmanager
def fast_values(course: Course, model: nn.Module) -> Iterator[Course]:
    """The course with probes for its values, if they see every parameter; else as it is.

    Args:
        course: with `valuing`.
        model: that of its loss, which the training has not emptied yet.
    """
    assert course.valuing is not None
    if unseen(model, course.loss, course.data):
        yield course
        return
    with values(model, view=EVERY) as seen, seen.seeing(False):
        yield replace(course, valuing=replace(course.valuing, probes=seen))
