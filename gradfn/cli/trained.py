"""`--training RUN`: what a training recorded of its model, its rows, its loss and its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gradfn.cli.app import torch_threads
from gradfn.cli.commands import ScoreRequest, TrainRequest
from gradfn.cli.options import MethodOptions
from gradfn.cli.request import checked, flag, make, slots_of
from gradfn.cli.source import SOURCE, of_training
from gradfn.data import IGNORED, Corpus, Documents
from gradfn.errors import InputError
from gradfn.report.summaries import Facts
from gradfn.report.words import count
from gradfn.runs.provenance import Provenance
from gradfn.store import open_store
from gradfn.train.run import KIND, Trained, checkpoint_path, open_training, step_of

OVER_CHECKPOINTS = ("tracin", "source")
"""Methods that look at every checkpoint of a training where no option names some."""
FREE = ("device", "threads", "token_batch_size", "trust_remote_code")
"""Options of the model that the training does not decide."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """A training that is complete, as its run records it.

    Args:
        run: the directory.
        request: the command that made it.
        made: what it depends on.
        done: its steps and checkpoints.
    """

    run: str
    request: TrainRequest
    made: Provenance
    done: Trained

    @cached_property
    def checkpoints(self) -> Mapping[int, Path]:
        """The checkpoints that are there, by the steps before them."""
        return {step_of(path): path for path in self.done.checkpoints}

    @property
    def total(self) -> int:
        """The steps of the training."""
        return len(self.done.rows)

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after so many steps.

        Raises:
            InputError: it is gone.
        """
        if step not in self.checkpoints:
            raise InputError(
                f"{checkpoint_path(self.run, step)} is gone, which the training in {self.run} wrote: put it "
                "back, or train again"
            )
        return self.checkpoints[step]

    def check_rows(self, rows: Corpus) -> None:
        """Refuse rows that are not those of the training."""
        known = self.made.data
        if known is None or known.fingerprint != rows.fingerprint():
            raise InputError(
                f"the rows of {self.request.data.dataset} are not those that {self.run} was trained on: put "
                "these back, or train again"
            )


def open_recorded(run: str) -> Recorded:
    """Read what `gradfn train` wrote.

    Raises:
        InputError: there is no such run, it is not complete, or a Python program made it.
    """
    done = open_training(run)
    with open_store(run, KIND) as store:
        made, asked = Provenance.of(store), store.request
    if asked.get("command") != TrainRequest.COMMAND:
        raise InputError(
            f"{run} does not record the command that made it, since a Python program wrote it: give --model "
            "and --dataset, or train with gradfn train"
        )
    given = checked(TrainRequest, asked["given"], f"the record of {run}")
    run = run if Path(run).is_dir() else str(done.path.parent)
    return Recorded(run, make(TrainRequest, given), made, done)


def with_training(request: ScoreRequest, trained: Recorded) -> ScoreRequest:
    """The request with the model, the rows and the loss of a training, and its checkpoints if they are asked.

    Raises:
        InputError: an option that the training decides; code that comes with the model, which is not trusted.
    """
    slots, asked = slots_of(ScoreRequest), trained.request
    for name in request.given:
        decided = name in ("seed", "optimizer", "normalize")
        if decided or (slots[name].owner in ("model", "data", "loss") and name not in FREE):
            raise InputError(
                f"{flag(name)} is of the training that --training names, which says it already: leave it out"
            )
    if asked.model.trust_remote_code and not request.model.trust_remote_code:
        raise InputError(
            f"the training in {trained.run} runs code that comes with its model: read that, and give "
            "--trust-remote-code again"
        )
    if asked.model.threads is not None and request.model.threads is None:
        torch_threads(asked.model.threads)
    own: dict[str, Any] = {name: getattr(request.model, name) for name in FREE}
    if "token_batch_size" not in request.given:
        own["token_batch_size"] = asked.model.token_batch_size
    task: Any = asked.model.task if trained.made.loss is None else trained.made.loss.name
    path = str(trained.checkpoint(trained.total))
    model = replace(asked.model, **own, path=path, revision=None, task=task)
    return replace(
        request, model=model, data=asked.data, loss=asked.loss, seed=asked.seed,
        method=_at_checkpoints(request.method, trained),
    )  # fmt: skip


def _at_checkpoints(method: MethodOptions, trained: Recorded) -> MethodOptions:
    """The checkpoints of a method that looks at them, and the learning rates of the steps before each.

    A checkpoint stands for the steps since the one before it: TracIn, arXiv:2002.08484, section 3.3.
    """
    after = {str(path.resolve()): step for step, path in trained.checkpoints.items() if step}
    chosen = [*after.values()]
    if method.checkpoints is not None:
        paths = [str(Path(path).resolve()) for path in method.checkpoints]
        if method.checkpoint_weights is not None:
            return method
        if absent := next((path for path in paths if path not in after), None):
            raise InputError(
                f"--checkpoints {absent} is none of {trained.run} behind a step: give some of these, "
                "or --checkpoint-weights too"
            )
        chosen = sorted({after[path] for path in paths})
    elif (method.name or "").replace("-", "_") not in OVER_CHECKPOINTS:
        return method
    steps, bounds, source = trained.done.steps, [0, *chosen], method.name == SOURCE
    rates = steps["learning_rate"] * (steps["clip"] if source else 1.0)
    sums = tuple(float(rates[a:b].sum()) for a, b in zip(bounds, chosen, strict=False))
    paths = tuple(str(trained.checkpoints[step]) for step in chosen)
    given = sums if method.checkpoint_weights is None else method.checkpoint_weights
    if source:
        options = trained.request.training
        return of_training(method, paths, given, options.training(), normalize=options.normalize)
    return replace(method, checkpoints=paths, checkpoint_weights=given)


def training_facts(trained: Recorded, method: MethodOptions) -> Facts:
    """Which training is asked about, and how its checkpoints are weighed."""
    lines = [("training", f"{trained.run}, {count(trained.total, 'step')}")]
    if method.steps is not None:
        first, stop = method.steps
        lines.append(("counted", f"steps {first + 1} to {stop or trained.total} of {trained.total}"))
    if method.curvature != "hessian":
        lines.append(("curvature", f"{method.curvature}, so the derivatives are not exact"))
    if method.checkpoints is not None:
        weights = ", ".join(f"{weight:.4g}" for weight in method.checkpoint_weights or ())
        names = ", ".join(Path(path).name for path in method.checkpoints)
        lines.append(("weights", f"{weights}, of {names}"))
    return lines


def unseen_facts(train: Corpus, queries: Corpus, tokenizer: Any) -> Facts:
    """A note where queries ask for tokens that no row of the training has."""
    if not (isinstance(train, Documents) and isinstance(queries, Documents)):
        return []
    asked = queries.labels != IGNORED
    asked[queries.offsets[:-1]] &= queries.masked
    unseen = asked & ~np.isin(queries.labels, train.input_ids)
    if not unseen.any():
        return []
    which = np.unique(np.searchsorted(queries.offsets, np.flatnonzero(unseen), "right"))
    words = [tokenizer.decode([int(token)]) for token in dict.fromkeys(queries.labels[unseen].tolist())]
    shown = ", ".join(f'"{word}"' for word in words[:5]) + (", ..." if len(words) > 5 else "")
    asks = "query asks" if len(which) == 1 else "queries ask"
    return [("note", f"{len(which)} {asks} for tokens that no row of the training has ({shown})")]
