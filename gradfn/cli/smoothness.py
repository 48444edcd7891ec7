"""`gradfn smoothness`: whether derivatives through a training predict what removing rows does."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from math import sqrt
from pathlib import Path
from typing import Any

from gradfn.cli.commands import ScoreRequest, SmoothnessRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import checked
from gradfn.cli.magic import MAGIC, check_magic, course_of, states_of
from gradfn.cli.queries import load_all
from gradfn.cli.request import command_line, make, slots_of
from gradfn.cli.trained import Recorded, open_recorded, training_facts, with_training
from gradfn.errors import InputError
from gradfn.report.summaries import Facts, device_facts
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.store.file import disk_errors
from gradfn.store.guard import refuse_links
from gradfn.train.smoothness import Smoothness, Verdict, metasmoothness

FILE = "smoothness.json"
MEANS: Mapping[Verdict, str] = {
    "smooth": f"smooth: scores of --method {MAGIC} say what such removals do",
    "between": f"in between: scores of --method {MAGIC} say in part what such removals do",
    "rough": f"rough: scores of --method {MAGIC} are exact derivatives, and hardly say what such removals do",
}


def run_smoothness(request: SmoothnessRequest) -> None:
    """Load, train again, compare, advise."""
    trained, directions = open_recorded(request.run), request.directions
    if not 0 < request.fraction < 1 or directions < 1:
        raise InputError(
            f"--fraction {request.fraction:g} and --directions {directions}: give a share of the rows "
            "between 0 and 1, and 1 direction or more"
        )
    own = {name: value for name, value in request.given.items()
           if name != "run" and name in slots_of(ScoreRequest)}  # fmt: skip
    asked = make(ScoreRequest, {**own, "training": request.run, "method": MAGIC})
    check_magic(asked, trained)
    asked = checked(with_training(asked, trained), "a training has both")
    loaded, rows, queries = load_all(asked)
    trained.check_rows(rows)
    assert queries is not None
    course = course_of(trained, loaded.subject, rows)
    console().print(facts([
        *training_facts(trained, asked.method), *device_facts(loaded.model, loaded.products),
        ("removals", f"of {request.fraction:.3g} of {count(len(rows), 'row')}, as seen by "
                     f"{count(len(queries.documents), 'query')} in {1 + 2 * directions} trainings"),
    ]))  # fmt: skip
    start = states_of(trained, course, asked)[0]().params
    with loaded.multiplying():
        found = metasmoothness(
            course, start, queries.documents, loaded.subject.query_loss, h=sqrt(request.fraction),
            directions=directions,
        )  # fmt: skip
    known = {"training": _digest(trained), "fraction": request.fraction, **asdict(found)}
    _write(Path(trained.run) / FILE, known)
    console().print(facts([
        ("agreement", f"{found.agreement:.3f}, how far the weights go on as they begin; 1 is straight on"),
        ("bend", f"{found.bend:.3f}, how much the derivative of a query's loss changes on the way; 0 is not"),
        ("curvature", f"{found.curvature:.3g}, of a query's loss"),
        ("movement", f"{found.movement:.3g} of the way that training goes"),
        ("verdict", MEANS[found.verdict]),
        *(() if found.verdict == "smooth" else [("what helps", _advice(trained))]),
    ]))  # fmt: skip


def known_smoothness(trained: Recorded, request: ScoreRequest) -> Facts:
    """What is known of how smooth a training is, and what to do where nothing is, or it is rough."""
    if (held := _read(trained)) is None:
        asked = {name: value for name, value in request.given.items()
                 if name in ("query", "query_split", "completion")}  # fmt: skip
        told = command_line(SmoothnessRequest, {"run": trained.run, **asked})
        return [("note", f"whether these derivatives say what removals do is told by: {told}")]
    fraction, found = held
    numbers = (
        f"agreement {found.agreement:.3f}, bend {found.bend:.3f}, removals of {fraction:.3g} of the rows"
    )
    return [("note" if found.verdict == "smooth" else "warning", f"{MEANS[found.verdict]} ({numbers})")]


def _advice(trained: Recorded) -> str:
    """What makes a training smoother, as far as it does not have it."""
    training = trained.request.training.training()
    adam = training.optimizer != "sgd"
    options = [
        f"a lower --learning-rate than {training.learning_rate:g}",
        f"a larger --batch-size than {training.batch_size}",
        f"--eps of 1e-6 and more, not {training.eps:g}" if adam and training.eps < 1e-6 else None,
        "an --eps-root above 0" if adam and not training.eps_root else None,
        "no --max-grad-norm" if training.max_grad_norm is not None else None,
        "smooth activations, and not ReLU",
        f"the last steps alone (gradfn score --method {MAGIC} --steps A:)",
    ]
    return "; ".join(filter(None, options))


def _digest(trained: Recorded) -> str:
    """What tells a training from another that is in its place by now."""
    return sha256(json.dumps(trained.made.settings(), sort_keys=True).encode()).hexdigest()[:16]


def _read(trained: Recorded) -> tuple[float, Smoothness] | None:
    """The share of the rows that was asked about, and what was found; None: nothing, or of another."""
    path = Path(trained.run) / FILE
    refuse_links(path)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        found = Smoothness(*(float(held[name]) for name in Smoothness.__dataclass_fields__))
        return (float(held["fraction"]), found) if held["training"] == _digest(trained) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _write(path: Path, values: Mapping[str, Any]) -> None:
    refuse_links(path)
    partial = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
