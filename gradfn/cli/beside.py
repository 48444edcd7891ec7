"""What a page shows beside scores: answers of the model; columns, labels and images of the rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gradfn.cli.commands import ScoreRequest, TrainRequest
from gradfn.cli.console import SPOKEN
from gradfn.cli.inputs import Loaded, checked, training_rows, with_example
from gradfn.cli.options import DataOptions
from gradfn.cli.queries import Asked, answers_of, classes_of, load_all, queries_of
from gradfn.cli.request import checked as checked_options
from gradfn.cli.request import make, slots_of
from gradfn.cli.trained import open_recorded, with_training
from gradfn.data import Corpus, Images
from gradfn.errors import InputError, StorageError
from gradfn.evaluate.scored import made_of
from gradfn.evaluate.truth import CLASSES
from gradfn.hf.images import thumbnail
from gradfn.model.fingerprint import model_fingerprint
from gradfn.report.page import Beside, PageRun
from gradfn.report.page_values import Budget
from gradfn.report.words import clean
from gradfn.runs.provenance import Provenance

OWNERS = ("model", "data", "loss", "query")
FURTHER = ("seed", "training", "self")
"""Options that say what was loaded, but for the groups of these."""
COLUMNS = 8
"""Columns of metadata that are shown."""
COMPARED = 5000
"""Of more images none are compared."""
SHOWN_ELSEWHERE = {"id", "text", "prompt", "completion", "messages", "image", "label", "input_ids", "labels",
                   "token_type_ids", "attention_mask"}  # fmt: skip


def beside_of(run: PageRun, *, load: bool, device: str = "auto") -> Beside:
    """What a run's model and data say, loaded as the run records; where they cannot be, a note says why.

    Nothing is shown of a model, of queries or of rows whose fingerprints are not those that were scored.

    Args:
        load: whether to load anything.
        device: of the model.
    """
    name = clean(run.scores.name)
    if not load:
        return Beside(notes=(f"{name}: no model was loaded, so there are no answers of the model.",))
    told = SPOKEN.set("nowhere")
    try:
        request = _recorded(run, device)
        loaded, train, asked = load_all(request)
        return _found(run, request, loaded, train, asked)
    except (InputError, StorageError) as error:
        return Beside(notes=(f"{name}: the model's own answers are not shown, because {error}.",))
    finally:
        SPOKEN.reset(told)


def _recorded(run: PageRun, device: str) -> ScoreRequest:
    """What to load, as the command says that made a run.

    Raises:
        InputError: no command is known, or it is of code that comes with a model.
    """
    record = run.store.request
    if record.get("command") == TrainRequest.COMMAND:
        trained = open_recorded(str(run.store.path.parent))
        given = {"training": trained.run, "query": trained.request.training.values,
                 "query_split": trained.request.training.values_split}  # fmt: skip
        given = {option: value for option, value in given.items() if value is not None}
    elif record.get("command") == ScoreRequest.COMMAND:
        slots = slots_of(ScoreRequest)
        every = checked_options(ScoreRequest, record["given"], "the record")
        given = {key: v for key, v in every.items() if slots[key].owner in OWNERS or key in FURTHER}
    else:
        raise InputError("the run does not record a command that scores")
    if given.get("trust_remote_code"):
        raise InputError("the model comes with code of its own, which no page runs")
    request = make(ScoreRequest, {**given, "device": device})
    if request.method.training is not None:
        request = with_training(request, open_recorded(request.method.training))
        if request.model.trust_remote_code:
            raise InputError("the model comes with code of its own, which no page runs")
    elif request.model.path is None and request.data.dataset is None:
        request = with_example(request)
    return checked(request, "the record lacks it")


def _found(run: PageRun, request: ScoreRequest, loaded: Loaded, train: Corpus, asked: Asked | None) -> Beside:
    """What was loaded, as far as it is what was scored."""
    made, notes, name = made_of(run.scores.settings), [], clean(run.scores.name)
    answers: Any = ()
    sources: Sequence[str | None] = ()
    if run.store.request.get("command") != TrainRequest.COMMAND and not _same_model(run, loaded):
        raise InputError(f"the model at {loaded.path} has other weights than the one that was scored")
    if asked is not None and [*asked.documents.ids] == [*run.scores.query_ids]:
        known = getattr(made.query, "fingerprint", None)
        if known is None or known == asked.documents.fingerprint():
            shown = queries_of(asked, loaded, request.query).shown
            first = asked.documents.select(range(min(len(asked.documents), Budget().queries)))
            answers = answers_of(loaded, replace(shown, documents=first)) or ()
            sources = shown.sources
        else:
            notes.append(
                f"{name}: the queries have changed since they were scored, so there are no answers to them."
            )
    elif asked is None and not run.own:
        notes.append(f"{name}: the queries are stored gradients, so the model's own answers are not shown.")
    tokenizer = loaded.reads.tokenizer
    if made.data is None or made.data.fingerprint != train.fingerprint():
        notes.append(
            f"{name}: the rows have changed since they were scored, so columns and labels are not shown."
        )
        return Beside(answers, sources, tokenizer, notes=notes)
    return Beside(
        answers, sources, tokenizer, _columns(request, train), *_classes(loaded, train),
        *_images(train, run.own), notes,
    )  # fmt: skip


def _same_model(run: PageRun, loaded: Loaded) -> bool:
    """Whether a model is that of a run, or of one of its checkpoints."""
    made = Provenance.of(run.scores.settings)
    models = [made.model, *(one.settings.model for one in made.checkpoints or () if one.settings is not None)]
    return model_fingerprint(loaded.model) in {model.fingerprint for model in models if model is not None}


def _columns(request: ScoreRequest, train: Corpus) -> Mapping[str, Sequence[Any]]:
    """Columns of numbers and short texts besides those that are read."""
    rows, _ = training_rows(request)
    if len(rows) != len(train):
        return {}
    read = {getattr(request.data, name) for name in DataOptions.__dataclass_fields__}
    names = [
        name for name, feature in rows.features.items()
        if name not in SHOWN_ELSEWHERE and name not in read and getattr(feature, "dtype", "list") != "list"
    ]  # fmt: skip
    columns = {name: rows[name] for name in names}
    plain = {
        name: values
        for name, values in columns.items()
        if all(isinstance(v, str | int | float | None) for v in values)
    }
    return dict([*plain.items()][:COLUMNS])


def _images(train: Corpus, near: bool) -> tuple[Any, Any]:
    """What gives the images most like one, by the cosine of pixels at 8 x 8, and small images of rows."""
    if not isinstance(train, Images):
        return None, None
    if not near or len(train) > COMPARED:
        return None, lambda row: thumbnail(train, row)
    pixels = [train[row]["pixel_values"].float() for row in range(len(train))]
    small = torch.stack([nn.functional.adaptive_avg_pool2d(one, 8).flatten() for one in pixels])
    unit = nn.functional.normalize(small - small.mean(0))
    return (lambda row: (unit @ unit[row]).argsort(descending=True).tolist()), lambda row: thumbnail(
        train, row
    )


def _classes(loaded: Loaded, train: Corpus) -> tuple[Sequence[str], Any]:
    """The names of the rows' classes, and what gives the model's own."""
    if loaded.reads.task not in CLASSES:
        return (), None
    config: Any = loaded.model.config
    names = {number: str(label) for label, number in config.label2id.items()}
    labels = [names.get(number, str(number)) for number in train.extras["labels"].tolist()]

    def predicted(rows: list[int]) -> dict[int, str]:
        return {row: said for row, (_, said) in classes_of(loaded, train, rows).items()}

    return labels, predicted
