"""`gradfn tune`: which method to trust on a model, by a few retrained models."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradfn.cli.commands import ScoreRequest, TuneRequest
from gradfn.cli.console import SPOKEN, console
from gradfn.cli.inputs import Loaded, check_run, check_trained, checked, recorded
from gradfn.cli.queries import load_all
from gradfn.cli.request import command_line, make, slots_of
from gradfn.cli.score import run_score
from gradfn.data import Corpus
from gradfn.errors import InputError
from gradfn.evaluate.retraining import Retraining
from gradfn.evaluate.scored import evaluated_scores
from gradfn.evaluate.subsets import random_subsets
from gradfn.evaluate.truth import KIND as TRUTH
from gradfn.evaluate.truth import Truth, open_truth, retrain
from gradfn.evaluate.tuning import Recommendation, joined_truth, recommend
from gradfn.hf.models import fresh
from gradfn.model.params import params_of
from gradfn.report.evaluation import between
from gradfn.report.progress import progress_bar
from gradfn.report.summaries import device_facts
from gradfn.report.tables import facts, rows_table
from gradfn.report.words import as_json, count
from gradfn.scores import KIND as SCORES
from gradfn.store import open_store

HALVES, SEEDS, ROUNDS = 8, 2, 12
"""Halves of a round and models of each; rounds at most."""
FULL = 20_000_000
"""Parameters up to which methods are tried without a projection, too."""
DAMPINGS = "0.001,0.01,0.1,1,10,100"
METHODS: Mapping[str, Mapping[str, str]] = {
    "grad_dot": {}, "grad_cosine": {}, "logra": {"damping": DAMPINGS}, "kfac": {"damping": DAMPINGS},
    "ekfac": {"damping": DAMPINGS}, "relatif": {"damping": DAMPINGS}, "trackstar": {"damping": DAMPINGS},
    "trak": {"damping": DAMPINGS}, "datainf": {},
}  # fmt: skip
"""What each method is tried with; cheap ones first."""
SMALL = {"kfac", "ekfac", "relatif"}
"""Methods whose own projection is none, so that large models need one."""
WHOLE = {"grad_dot", "grad_cosine", "datainf"}
"""Methods that are tried without a projection too, where the model is small."""
CHOSEN = ("minutes", "methods", "quiet", "run", "threads", "device", "token_batch_size")
"""Options that may be others when a run is gone on with."""
RECORD = "tune.json"
SHARED = ("model", "data", "loss", "layers", "query")
"""Groups of options that scores are made with as given."""


class OutOfTime(BaseException):
    """The time is up; no error, so nothing that catches errors takes it for one."""


def run_tune(request: TuneRequest) -> None:
    """Retrain, score, compare, for as long as was said."""
    end = time.monotonic() + 60 * request.minutes
    check_run(request.run)
    methods = _methods(request)
    if not request.minutes > 0:
        raise InputError(f"--minutes must be above 0, not {request.minutes:g}")
    if request.query.query is None:
        raise InputError("no --query: tuning needs a model, a dataset and queries")
    check_trained(request)
    request = checked(request, "tuning needs a model, a dataset and queries")
    folder = Path(request.run)
    _refuse_another(request, folder)
    loaded, train, asked = load_all(request)
    assert asked is not None
    if hasattr(loaded.model, "peft_config"):
        raise InputError(f"{loaded.name} has adapters, and whole models are retrained: merge them into it")
    if len(train) < 2:
        raise InputError("models are retrained on halves of the rows, and there is 1: give more rows")
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    console().print(facts([
        *device_facts(loaded.model, loaded.products),
        ("model", f"{loaded.name} ({count(size, 'parameter')})"),
        ("train", f"{count(len(train), 'row')}, {count(int(train.lengths.sum()), 'token')}"),
        ("queries", f"{len(asked.documents):,}"),
        ("time", f"{request.minutes:g} minute" + "s" * (request.minutes != 1)),
    ]))  # fmt: skip
    _record(request, folder)
    queries, half = asked.documents, (time.monotonic() + end) / 2
    while (done := len(_rounds(folder))) < ROUNDS and time.monotonic() < (half if done else end):
        if not _until(half if done else end, lambda: _retrained(request, loaded, train, queries)):
            break
    del loaded, asked, queries
    candidates = _candidates(request, methods, size)
    _until(end, lambda: _scored(candidates, folder))
    _tell(request, folder, candidates)


def _methods(request: TuneRequest) -> list[str]:
    """The methods to try, as they are spelled in Python."""
    names = [name.replace("-", "_") for name in request.methods or METHODS]
    if wrong := next((name for name in names if name not in METHODS), None):
        raise InputError(f"no method {wrong!r} to try: choose from {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


def _refuse_another(request: TuneRequest, folder: Path) -> None:
    """Refuse a directory that another command made."""
    path = folder / RECORD
    if folder.exists() and any(folder.iterdir()) and not path.exists():
        raise InputError(f"{folder} holds something else: give tune a directory of its own")
    if path.exists():
        there, here = json.loads(path.read_text(encoding="utf-8")), _given(request)
        if differ := sorted(name for name in {*there, *here} if there.get(name) != here.get(name)):
            raise InputError(
                f"{folder} was tuned with another {', '.join(differ)}: give what was given then, or a new RUN"
            )


def _given(request: TuneRequest) -> dict[str, Any]:
    given = request.record()["request"]["given"]
    return {name: value for name, value in given.items() if name not in CHOSEN}


def _record(request: TuneRequest, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD).exists():
        unfinished = folder / f".{RECORD}.unfinished"
        unfinished.write_text(as_json(_given(request)) + "\n", encoding="utf-8")
        unfinished.replace(folder / RECORD)


# --- time


def _until(end: float, work: Callable[[], None]) -> bool:
    """Do work until it is done or the time is up, when what it wrote stays; whether it is done."""
    left = end - time.monotonic()
    if left <= 0:
        return False
    try:
        with _alarm(left):
            work()
    except OutOfTime:
        return False
    return True


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` after so many seconds, in the main thread of systems that can."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- retraining


def _rounds(folder: Path) -> list[Truth]:
    """The rounds of retraining that are complete."""
    found = []
    for number in range(1, ROUNDS + 1):
        if not (folder / f"round-{number}" / f"{TRUTH}.h5").exists():
            break
        found.append(open_truth(folder / f"round-{number}"))
    return found


def _retrained(request: TuneRequest, loaded: Loaded, train: Corpus, queries: Corpus) -> None:
    """Retrain a round of models, or the rest of one that was stopped."""
    folder, model, training, seed = Path(request.run), loaded.model, request.training.training(), request.seed
    number = len(_rounds(folder)) + 1
    start = params_of(model) if request.training.init == "given" else lambda: fresh(model)
    known = {key: value for key, value in loaded.settings().items() if key != "layers"}
    halves = random_subsets(len(train), HALVES * number, seed=seed)[-HALVES:]
    retraining = Retraining(
        start, loaded.subject.loss, training, halves, query_loss=loaded.subject.query_loss, seeds=SEEDS,
        seed=seed, removal="mask", chunk=1,  # so that a stop loses one model
    )  # fmt: skip
    total = training.epochs * len(train) * HALVES * SEEDS
    with loaded.multiplying(), progress_bar(f"retraining, round {number}", total, "examples") as progress:
        retrain(
            folder / f"round-{number}", retraining, train, queries, progress=progress,
            settings={**known, **recorded(request), "subsets": {"fraction": 0.5, "round": number}},
        )  # fmt: skip


# --- scoring


def _candidates(request: TuneRequest, methods: list[str], size: int) -> dict[str, dict[str, Any]]:
    """What `gradfn score` is to be given for each candidate, by its name."""
    slots, given = slots_of(TuneRequest), request.record()["request"]["given"]
    shared = {name: value for name, value in given.items()
              if slots[name].owner in SHARED or name == "seed"}  # fmt: skip
    found = dict[str, dict[str, Any]]()
    for method in methods:
        options = [{} if size <= FULL or method not in SMALL else {"projection_dim": 16}]
        if method in WHOLE and size <= FULL:
            options = [{"projection": "none"}]
        elif method in SMALL and size <= FULL:
            options.append({"projection_dim": 16})
        for more in options:
            name = method + "-16" * ("projection_dim" in more and len(options) > 1)
            given = {**shared, **METHODS[method], **more, "method": method}
            found[name] = {**given, "run": str(Path(request.run).resolve() / name)}
    return found


def _complete(run: str) -> bool:
    try:
        open_store(run, SCORES)
    except InputError:
        return False
    return True


def _scored(candidates: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Score the rows by one candidate after the other."""
    if not _rounds(folder):
        return
    for name, given in candidates.items():
        if _complete(str(given["run"])):
            continue
        before = SPOKEN.set("nowhere")
        try:
            run_score(make(ScoreRequest, given))
        except InputError as error:
            _leave_out(name, error)
        finally:
            SPOKEN.reset(before)


def _leave_out(name: str, error: InputError) -> None:
    """Say that a candidate cannot be had for this model, and go on."""
    before = SPOKEN.set("out")
    console().print(facts([("left out", f"{name}: {error}")]))
    SPOKEN.reset(before)


# --- what is said


def _tell(request: TuneRequest, folder: Path, candidates: Mapping[str, dict[str, Any]]) -> None:
    """The table, the recommendation in words, the command."""
    rounds, again = _rounds(folder), "the same command again goes on"
    if not rounds:
        models = HALVES * SEEDS
        console().print(facts([("too short", f"not even {models} models were retrained: {again}")]))
        return
    truth = joined_truth(rounds)
    there = {
        name: evaluated_scores(given["run"]) for name, given in candidates.items() if _complete(given["run"])
    }
    lines = [
        ("models", f"{len(truth.losses):,} retrained on {len(truth.numbers.unique())} halves of the rows")
    ]
    if not there:
        console().print(facts([*lines, ("too short", f"no method has scored all rows: {again}")]))
        return
    found = recommend(list(there.values()), truth, seed=request.seed)
    if found.ceiling is not None:
        lines.append(("ceiling", f"{found.ceiling.value:.3f} ({between(found.ceiling)})"))
    if late := [name for name in candidates if name not in there]:
        lines.append(("not tried", f"{', '.join(late)}: {again}"))
    console().print(facts(lines))
    table = [
        {"method": one.name, "damping": one.damping, "LDS": f"{one.lds.value:.3f}",
         "95 % interval": between(one.lds), "behind by": f"{by.value:.3f} ({between(by)})" if place else ""}
        for place, (one, by) in enumerate(zip(found.ranked, found.behind, strict=True))
    ]  # fmt: skip
    console().print(rows_table(table, tuple(table[0]), left=("method", "damping")))
    best = found.ranked[0]
    given = {**candidates[best.name], "run": "scores"}
    given |= {"damping": best.damping} if "damping" in given else {}
    console().print(facts([("trust", advice(found)), ("command", command_line(ScoreRequest, given))]))


def advice(found: Recommendation) -> str:
    """A recommendation in words."""
    best = found.ranked[0]
    if not found.predicts:
        return (
            f"none yet: the best, {best.name} (LDS {best.lds.value:.2f}), has an interval that reaches 0, so "
            "it may predict nothing; the same command again retrains more models"
        )
    at = f" at damping {best.damping}" if best.damping else ""
    share = ""
    if found.ceiling is not None and found.ceiling.value > 0:
        share = f", {best.lds.value / found.ceiling.value:.0%} of what any score could reach"
    words = f"{best.name}{at}: LDS {best.lds.value:.2f}{share}"
    if others := [one.name for one in found.level[1:]]:
        return f"{words}; {', '.join(others)} cannot be told from it by so few models"
    return f"{words}; the 95 % intervals of all others lie behind it"
