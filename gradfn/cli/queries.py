"""Queries as they are asked for: from datasets, texts and stores of gradients, and what is known of them."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from gradfn.cli.commands import MaskFitRequest, RetrainRequest, ScoreRequest
from gradfn.cli.inputs import (
    Loaded,
    Settings,
    anchored,
    load_documents,
    load_model_and_rows,
    say_cut,
)
from gradfn.cli.options import DataOptions, QueryOptions
from gradfn.data import Corpus, Documents
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.evaluate.retrieval import source_name
from gradfn.hf.answers import Answer, answers, predicted_classes
from gradfn.hf.datasets import load_split
from gradfn.hf.unpack import PACKED, kind_of
from gradfn.methods.inner_product import InnerProduct
from gradfn.methods.recipes import group_means
from gradfn.model.losses import ModelLoss
from gradfn.report.progress import rows_bar
from gradfn.report.rankings import ShownQueries
from gradfn.runs.gradients import ends_in_unit_norm, open_gradients
from gradfn.runs.provenance import DataSource, Provenance, ids_digest
from gradfn.runs.queries import stored_queries
from gradfn.transforms import Transform, chain, unit_normalize
from gradfn.types import Blocks

DATA_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt"}
FURTHER = {".7z", ".avro", ".feather", ".h5", ".hdf5", ".orc", ".pkl", ".tar", ".tgz", ".xls", ".xlsx",
           ".xml", ".xz", ".yaml", ".yml", ".zip"}  # fmt: skip
"""Endings of files that are no datasets here; a single word with one is no text either."""
PATH = re.compile(r"(?=.*/)~?/?([\w.-]+/)*[\w.:-]*", re.ASCII)


@dataclass(frozen=True, eq=False)
class Asked:
    """Queries that are made of tokens.

    Args:
        documents: their tokens.
        rows: the dataset that they come from; None: a text.
    """

    documents: Corpus
    rows: Any | None


@dataclass(frozen=True, eq=False)
class Queries:
    """Query gradients and what is known of the queries.

    Args:
        make: gives `{block: [queries, ...]}`, transformed; empty where rows are scored against themselves, or
            by an attribution that takes the queries' tokens.
        settings: what a run records of them.
        shown: what is known of them.
    """

    make: Callable[[], Blocks]
    settings: dict[str, Any]
    shown: ShownQueries

    @cached_property
    def gradients(self) -> Blocks:
        """The gradients, made when they are asked for: of a run that has all its scores they are not."""
        return self.make()


_OWN = "how far a step on a row lowers that row's own loss"
SELF = Queries(dict, {"query": "self"}, ShownQueries(["self-influence"], [_OWN]))
"""What is shown of rows that are scored against themselves."""


def is_dataset(query: str) -> bool:
    """Whether --query names a dataset rather than being a text."""
    # `Path.exists` raises on what is too long to be a name.
    if kind_of(Path(query)) in DATA_SUFFIXES or Path(query).suffix.lower() in PACKED or os.path.exists(query):
        return True
    named = kind_of(Path(query)) in FURTHER and not re.search(r"\s", query)
    return named or PATH.fullmatch(query) is not None


def query_rows_of(options: QueryOptions) -> Any | None:
    """The dataset of --query, loaded before the model so that a wrong path fails at once; None for a text."""
    query, completion, split = options.query, options.completion, options.query_split
    if (query is None) == (options.query_path is None):
        raise InputError("give one of --query (a dataset, or a text in quotes) and --query-path (a store)")
    if completion is not None and (query is None or is_dataset(query)):
        raise InputError("--completion follows a text: give that text in quotes with --query")
    if split is not None and (query is None or not is_dataset(query)):
        raise InputError("--query-split is of a dataset in --query, and none is given: leave it out")
    if query is None and options.query_loss is not None:
        raise InputError("the queries of --query-path have their loss already: leave out --query-loss")
    if query is None:
        open_gradients(str(options.query_path))
        return None
    if not query.strip() and not completion:
        raise InputError("--query is empty: give a text in quotes, or a dataset")
    if any("\ud800" <= letter <= "\udfff" for letter in query + (completion or "")):
        raise InputError("the query is not valid UTF-8: give it in the encoding of the terminal")
    if not is_dataset(query):
        return None
    try:
        return load_split(query, split, argument="query_split")[0]
    except InputError as error:
        if os.path.exists(query) or kind_of(Path(query)) in DATA_SUFFIXES:
            raise
        raise InputError(
            f"{error}; a text that looks like a path is asked in a dataset of queries"
        ) from error


def load_asked(loaded: Loaded, rows: Any | None, options: QueryOptions, data: DataOptions) -> Asked | None:
    """The queries' tokens; None where their gradients are stored, or rows are scored against themselves.

    Args:
        rows: of `query_rows_of`.
    """
    if options.query is None:
        return None
    try:
        if rows is not None:
            documents = load_documents(loaded, rows, data, options.query, query=True)
        else:
            documents = loaded.reads.text(options.query, options.completion, truncation=data.truncation)
            say_cut(documents, "--query")
    except InputError as error:
        raise InputError(f"in --query: {error}") from error
    empty = [documents.ids[row] for row in range(len(documents)) if not documents.supervised[row]]
    if empty:
        raise InputError(
            f"query {empty[0]} has nothing to predict (it needs two tokens, or a completion): make it longer"
        )
    return Asked(documents, rows)


def load_all(request: ScoreRequest | MaskFitRequest | RetrainRequest) -> tuple[Loaded, Corpus, Asked | None]:
    """The model, the training rows and the queries; paths are looked at before a model is loaded."""
    column = request.query.group_column
    own = isinstance(request, ScoreRequest) and request.method.self_influence
    rows = None if own else query_rows_of(request.query)
    if column is not None and rows is None:
        raise InputError("--group-column groups the queries of a dataset: give one with --query")
    if column is not None and rows is not None and column not in rows.column_names:
        raise InputError(
            f"--group-column {column} is no column of --query, which has {', '.join(rows.column_names)}"
        )
    loaded, train = load_model_and_rows(request)
    return loaded, train, load_asked(loaded, rows, request.query, request.data)


def answers_of(loaded: Loaded, shown: ShownQueries) -> list[Answer] | None:
    """What the model itself makes of every query, of next tokens."""
    if not isinstance(shown.documents, Documents) or loaded.reads.task != "causal_lm":
        return None
    return answers(loaded.model, loaded.reads.tokenizer, shown.documents)


def classes_of(loaded: Loaded, train: Corpus, rows: list[int]) -> dict[int, tuple[str, str]]:
    """The class of each of some rows, and the one that the model gives it."""
    loss, config = loaded.subject.loss, cast(Any, loaded.model.config)
    assert isinstance(loss, ModelLoss)
    names = {number: name for name, number in config.label2id.items()}
    with loaded.multiplying():
        predicted = predicted_classes(loss, train.select(rows))
    labels = train.extras["labels"][rows].tolist()
    pairs = zip(rows, labels, predicted, strict=True)
    return {row: (str(names.get(label, label)), str(names.get(said, said))) for row, label, said in pairs}


def load_queries(
    loaded: Loaded | None, asked: Asked | None, options: QueryOptions, method: InnerProduct, wanted: Settings
) -> tuple[Queries, InnerProduct]:
    """Make (or read) the queries' gradients, and the method that takes them as they are.

    Args:
        asked: the queries' tokens; None: their gradients are stored.
        wanted: see `check_stored`.
    """
    if asked is None or loaded is None:
        return _read_queries(str(options.query_path), method, wanted)
    transform, groups, plain = (
        method.query_transform,
        options.group_column,
        queries_of(asked, loaded, options),
    )
    unit = groups is not None and ends_in_unit_norm(transform)
    if unit:  # a mean of gradients is normalised, not of directions
        transform = chain(*chain(transform).stages[:-1])
    queries = replace(plain, make=lambda: _gradients(loaded, asked.documents, transform))
    return (_grouped(queries, asked.rows, groups, unit) if groups else queries), method


def queries_of(asked: Asked, loaded: Loaded, options: QueryOptions) -> Queries:
    """What is known of queries without their gradients."""
    documents, rows = asked.documents, asked.rows
    settings = {"path": None if rows is None else anchored(str(options.query)), "split": options.query_split,
                "fingerprint": documents.fingerprint(), "rows": len(documents), "ids": ids_digest(documents),
                "loss": loaded.loss_settings(loaded.subject.query_loss)}  # fmt: skip
    shown = ShownQueries(documents.ids, documents.texts, _sources(rows), documents=documents)
    return Queries(dict, {"query": settings}, shown)


def _gradients(loaded: Loaded, documents: Corpus, transform: Transform) -> Any:
    """The queries' gradients."""
    with loaded.multiplying(), rows_bar("query gradients", documents, then="scores") as progress:
        try:
            return collect(loaded.subject.for_queries(), documents, transform, progress=progress)
        except InputError as error:
            raise InputError(f"in --query: {error}") from error


def _grouped(queries: Queries, rows: Any, column: str, unit: bool) -> Queries:
    """One query for each value of a column: the mean of its queries' gradients, `unit` with norm 1."""
    groups = [str(value) for value in rows[column]]
    names = list(dict.fromkeys(groups))
    texts = [f"mean of {groups.count(name)} queries" for name in names]
    digest = hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]
    grouping = {"groups": column, "groups_fingerprint": digest}
    settings = {"query": {**queries.settings["query"], **grouping}}

    def means() -> Any:
        gradients, _ = group_means(queries.gradients, groups)
        return unit_normalize()(gradients) if unit else gradients

    return Queries(means, settings, ShownQueries(names, texts))


def _read_queries(path: str, method: InnerProduct, wanted: Settings) -> tuple[Queries, InnerProduct]:
    """Queries of which the gradients are stored."""
    gradients, method, store = stored_queries(path, method, wanted)
    ids, texts = list(store.read("rows/id")), list(store.read("rows/text"))
    made = Provenance.of(store)
    # The same directory may hold other gradients of the same data tomorrow.
    about = DataSource(
        path=anchored(path), fingerprint=made.data and made.data.fingerprint, rows=len(ids), loss=made.loss,
        transform=made.transform, aggregation=made.aggregation,
    )  # fmt: skip
    return Queries(lambda: gradients, {"query": about.to_json()}, ShownQueries(ids, texts)), method


def _sources(rows: Any | None) -> list[str | None]:
    if rows is None or "source" not in rows.column_names:
        return []
    return [source_name(source) for source in rows["source"]]
