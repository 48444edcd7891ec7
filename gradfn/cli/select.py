"""`gradfn select`: the rows that scores say to keep, as a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradfn.cli.commands import COMMANDS, ScoreRequest
from gradfn.cli.console import console
from gradfn.cli.evaluate import refuse_other_ids
from gradfn.cli.inputs import load_as_asked, read_documents
from gradfn.cli.options import IMAGES, DataOptions, ModelOptions
from gradfn.cli.request import checked, flag, make
from gradfn.cli.results import SelectRequest
from gradfn.cli.trained import open_recorded
from gradfn.errors import InputError
from gradfn.evaluate.scored import evaluated_scores, made_of
from gradfn.hf.datasets import column_values, load_rows
from gradfn.hf.images import load_processor
from gradfn.hf.models import blank_model
from gradfn.hf.reader import Reader
from gradfn.hf.tokenizers import load_tokenizer
from gradfn.report.subsets import PREFIX, check_columns, check_subset, with_ranks, write_subset
from gradfn.report.summaries import Facts
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.runs.provenance import DataSource, Provenance
from gradfn.scores import KIND, Scores
from gradfn.selection import Selection
from gradfn.store import open_store

RULES = ("keep", "drop_worst", "top_per_query")


class _Read(NamedTuple):
    """How the rows of a run were read: the command's options of data and model."""

    data: DataOptions
    model: ModelOptions


def run_select(request: SelectRequest) -> None:
    """Read the scores and the rows, choose, write."""
    _check_rules(request)
    path = Path(str(request.output))
    scores = _scores(request)
    made = made_of(scores.settings)
    recorded = made.data or DataSource()
    place = request.dataset or recorded.path
    if place is None:
        raise InputError(
            f"no dataset is known for {request.run}: give the rows that were scored as --dataset"
        )
    check_subset(path, source=Path(place), overwrite=request.overwrite)
    at = recorded.revision if request.dataset is None else None
    rows = load_rows(place, request.split or recorded.split or "train", revision=at)
    notes = _refuse_other_rows(request, scores, made, rows, place)
    check_columns(rows, path)
    own = made.query == "self"
    best = request.best or ("lowest" if own else "highest")
    by = None if request.by is None else _groups(rows, request.by)
    rule: Any = {name: getattr(request, name) for name in RULES}
    chosen = scores.select(**rule, over=request.over, best=best, by=by)
    if any(name.startswith(PREFIX) for name in rows.column_names):
        notes.append(
            ("note", f"the columns {PREFIX}... of the dataset are of an earlier selection: replaced")
        )
    write_subset(with_ranks(rows, chosen, scores.query_ids), path)
    console().print(facts([*_facts(request, scores, chosen, by, best), *notes, ("subset", str(path))]))


def _check_rules(request: SelectRequest) -> None:
    """Refuse, before any work, none or several rules, and no place to write to."""
    given = [flag(name) for name in RULES if getattr(request, name) is not None]
    if len(given) != 1:
        which = f"{' and '.join(given)} are" if given else "none is"
        raise InputError(f"rows are selected by one rule, and {which} given: give {_one_of(RULES)}")
    if request.output is None:
        raise InputError("nowhere to write the rows to: give --output subset.jsonl, say")
    if request.top_per_query is not None and request.gave("over"):
        raise InputError("--top-per-query ranks rows by one query at a time: leave out --over")


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(map(flag, names[:-1]))} or {flag(names[-1])}"


def _scores(request: SelectRequest) -> Scores:
    """The scores of the run, at one damping."""
    scores = evaluated_scores(request.run)
    if request.damping is not None:
        return scores.of_damping(request.damping)
    if len(scores.dampings) > 1:
        raise InputError(
            f"{request.run} has scores at the dampings {', '.join(scores.dampings)}: take one with "
            f"--damping {scores.dampings[0]}"
        )
    return scores


def _groups(rows: Any, column: str) -> list[Any]:
    """The group of every row."""
    values = column_values(rows, column, "--by")
    if any(isinstance(value, list | dict) for value in values):
        raise InputError(
            f"--by {column} holds lists, which name no groups: give a column of texts or numbers"
        )
    return values


def _facts(
    request: SelectRequest, scores: Scores, chosen: Selection, by: Sequence[Any] | None, best: str
) -> Facts:
    """What was chosen, and by what."""
    total, kept, queries = len(scores.row_ids), len(chosen.rows), len(scores.query_ids)
    over = "" if queries == 1 else f"{request.over} over {count(queries, 'query')}, "
    if request.top_per_query is not None:
        over = f"each of {count(queries, 'query')}, "
    ranked = ("ranked", f"{over}{best} first; equal scores by row number")
    lines = [("rows", f"{kept:,} of {total:,} ({kept / total:.1%})"), ranked]
    if by is not None:
        lines.append(("by", f"{request.by}, {count(len({*by}), 'group')}"))
    return lines


# --- whether the rows are those that were scored


def _refuse_other_rows(
    request: SelectRequest, scores: Scores, made: Provenance, rows: Any, place: str
) -> Facts:
    """Refuse rows other than those scored; a note where their tokens cannot be compared."""
    with open_store(request.run, KIND) as store:
        asked = store.request
    read = None if not asked else _read_by(asked, request.run)
    if read is not None and read.data.chunk_length is not None:
        raise InputError(
            f"{request.run} has scores of chunks of rows, and whole rows are selected: score without "
            "--chunk-length"
        )
    refuse_other_ids(rows, scores.row_ids, request.run, place, "--dataset")
    if read is None:
        return [("note", "rows were compared by their names alone, since no command of gradfn scored them")]
    known = made.data and made.data.fingerprint
    try:
        reads = _reader(read.model, made)
    except InputError as error:
        return [("note", f"rows were compared by their names alone ({error})")]
    tokens = reads.settings().get("tokenizer", {}).get("fingerprint")
    if made.tokenizer is not None and made.tokenizer.fingerprint != tokens:
        return [("note", "rows were compared by their names alone, since the tokenizer is another by now")]
    if read_documents(reads, rows, read.data, place).fingerprint() != known:
        raise InputError(
            f"the rows of {place} are not what {request.run} scored (other texts or labels under the same "
            "names): put them back, or score again"
        )
    return []


def _read_by(asked: Any, run: str) -> _Read | None:
    """How the command of a record read its rows; None where what it names is gone."""
    kind = next((one for one in COMMANDS if asked["command"] == one.COMMAND), None)
    if kind is None:
        return None
    command: Any = make(kind, checked(kind, asked["given"], f"the record of {run}"))
    if isinstance(command, ScoreRequest) and command.method.training is not None:
        try:
            command = open_recorded(command.method.training).request
        except InputError:
            return None
    return _Read(command.data, command.model)


def _reader(options: ModelOptions, made: Provenance) -> Reader:
    """What reads rows as they were read, without the weights of the model where it is of texts.

    Raises:
        InputError: the model or its tokenizer is gone, or brings code of its own.
    """
    task = str(made.loss and made.loss.name)
    path = options.path or str(made.model and made.model.path)
    if task == IMAGES:
        return Reader(
            load_as_asked(path, options, task, options.revision), task,
            processor=load_processor(path, revision=options.revision),
        )  # fmt: skip
    model = blank_model(path, task, revision=options.revision)
    size = getattr(model.config, "vocab_size", None)
    other = options.tokenizer
    how: dict[str, Any] = {} if other else {"revision": options.revision, "vocabulary": size}
    tokenizer = load_tokenizer(other or path, **how)
    return Reader(model, task, tokenizer, masking=made.masking, special=not options.no_special_tokens)
