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

from gradfn.cli.commands import MaskFitRequest, RetrainRequest, ScoreRequest, TuneRequest
from gradfn.cli.inputs import (
    Loaded,
    Settings,
    anchored,
    load_documents,
    load_model_and_rows,
    say_cut,
)
from gradfn.cli.options import DataOptions, QueryOptions
from gradfn.cli.request import flag
from gradfn.data import Corpus, Documents
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.evaluate.retrieval import source_name
from gradfn.hf.answers import Answer, answers, predicted_classes
from gradfn.hf.datasets import load_split
from gradfn.hf.queries import contrasted, each_token, one_token, row_numbers, unweighted
from gradfn.hf.unpack import PACKED, kind_of
from gradfn.methods.inner_product import InnerProduct
from gradfn.methods.recipes import group_means
from gradfn.model.losses import ModelLoss
from gradfn.report.progress import rows_bar
from gradfn.report.rankings import ShownQueries
from gradfn.report.words import count
from gradfn.runs.gradients import ends_in_unit_norm, open_gradients
from gradfn.runs.provenance import DataSource, Provenance, ids_digest
from gradfn.runs.queries import stored_queries
from gradfn.transforms import Transform, UnitNormalize, chain, unit_normalize
from gradfn.types import Blocks, Data

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
        against: what each is contrasted with.
        own: of training rows as queries, their numbers.
        of: of queries that are all tokens of others, the number of the one that each is of.
    """

    documents: Corpus
    rows: Any | None
    against: Corpus | None = None
    own: tuple[int, ...] = ()
    of: tuple[int, ...] = ()

    @property
    def every(self) -> Data:
        """All that gradients are made of, one by one."""
        if self.against is None:
            return self.documents
        return [corpus[row] for corpus in (self.documents, self.against) for row in range(len(corpus))]


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
    given = [one for one in (query, options.query_path, options.query_rows) if one is not None]
    if len(given) != 1:
        raise InputError(
            "give one of --query (a dataset, or a text in quotes), --query-rows (training rows) and "
            "--query-path (a store)"
        )
    if completion is not None and (query is None or is_dataset(query)):
        raise InputError("--completion follows a text: give that text in quotes with --query")
    if split is not None and (query is None or not is_dataset(query)):
        raise InputError("--query-split is of a dataset in --query, and none is given: leave it out")
    if options.query_path is not None:
        _check_stored(options)
        open_gradients(options.query_path)
    if query is None:
        return None
    if not query.strip() and not completion:
        raise InputError("--query is empty: give a text in quotes, or a dataset")
    if any("\ud800" <= letter <= "\udfff" for letter in query + (completion or "")):
        raise InputError("the query is not valid UTF-8: give it in the encoding of the terminal")
    return _dataset_of(query, split) if is_dataset(query) else None


def _check_stored(options: QueryOptions) -> None:
    """Refuse what stored queries have decided already."""
    for name in ("query_loss", "against", "query_token"):
        if getattr(options, name) is not None:
            raise InputError(f"the queries of --query-path are gradients already: leave out {flag(name)}")


def _dataset_of(query: str, split: str | None) -> Any:
    try:
        return load_split(query, split, argument="query_split")[0]
    except InputError as error:
        if os.path.exists(query) or kind_of(Path(query)) in DATA_SUFFIXES:
            raise
        raise InputError(
            f"{error}; a text that looks like a path is asked in a dataset of queries"
        ) from error


def against_rows_of(options: QueryOptions, rows: Any | None) -> Any | None:
    """The dataset of --against, loaded as early; None for a text.

    Args:
        rows: the dataset of --query.
    """
    against = options.against
    if against is None:
        return None
    if options.query is None:
        raise InputError("--against is what --query is contrasted with: give --query too")
    if is_dataset(against) != (rows is not None):
        raise InputError(
            "--query and --against are two datasets, or two texts: give --against as --query is given"
        )
    if rows is None:
        return None
    others = _dataset_of(against, options.query_split)
    if len(others) != len(rows):
        raise InputError(
            f"--against has {count(len(others), 'row')} and --query {len(rows):,}, and the first is compared "
            "with the first: give as many"
        )
    return others


def load_asked(loaded: Loaded, rows: Any | None, options: QueryOptions, data: DataOptions) -> Asked | None:
    """The queries' tokens; None where their gradients are stored, or rows are scored against themselves.

    Args:
        rows: of `query_rows_of`.
    """
    if options.query is None:
        return None
    text = options.query, options.completion
    documents, of = _documents(loaded, rows, text, options, data, "--query")
    return Asked(documents, rows, of=of)


def _documents(
    loaded: Loaded, rows: Any | None, text: tuple[str, str | None], options: QueryOptions, data: DataOptions,
    option: str,
) -> tuple[Corpus, tuple[int, ...]]:  # fmt: skip
    """The tokens of a dataset, or of a text and its completion."""
    try:
        if rows is not None:
            documents = load_documents(loaded, rows, data, text[0], query=True)
        else:
            documents = loaded.reads.text(*text, truncation=data.truncation)
            say_cut(documents, option)
    except InputError as error:
        raise InputError(f"in {option}: {error}") from error
    return _to_predict(documents, loaded, options, option)


def _to_predict(
    documents: Corpus, loaded: Loaded, options: QueryOptions, option: str
) -> tuple[Corpus, tuple[int, ...]]:
    """Queries that have something to predict, or only one token of each; and see `Asked.of`."""
    empty = [documents.ids[row] for row in range(len(documents)) if not documents.supervised[row]]
    if empty:
        raise InputError(
            f"query {empty[0]} has nothing to predict (it needs two tokens, or a completion): make it longer"
        )
    if options.query_token is None:
        return documents, ()
    if not isinstance(documents, Documents) or loaded.reads.task != "causal_lm":
        raise InputError(f"--query-token is of next tokens, and {loaded.reads.task} has none: leave it out")
    if options.query_token == "all":
        tokens, of = each_token(documents, loaded.reads.tokenizer)
        return tokens, tuple(of)
    try:
        return one_token(documents, options.query_token, loaded.reads.tokenizer), ()
    except InputError as error:
        raise InputError(f"in {option}: {error}") from error


def load_all(
    request: ScoreRequest | MaskFitRequest | RetrainRequest | TuneRequest,
) -> tuple[Loaded, Corpus, Asked | None]:
    """The model, the training rows and the queries; paths are looked at before a model is loaded."""
    options, data, column = request.query, request.data, request.query.group_column
    own = isinstance(request, ScoreRequest) and request.method.self_influence
    rows = None if own else query_rows_of(options)
    others = against_rows_of(options, rows)
    if column is not None and rows is None:
        raise InputError("--group-column groups the queries of a dataset: give one with --query")
    if column is not None and rows is not None and column not in rows.column_names:
        raise InputError(
            f"--group-column {column} is no column of --query, which has {', '.join(rows.column_names)}"
        )
    if options.query_token == "all" and (column or options.against) is not None:
        which = "--against" if column is None else "--group-column"
        raise InputError(
            f"--query-token all makes a query of every token: leave out {which}, or give a number"
        )
    loaded, train = load_model_and_rows(request)
    if options.query_rows is not None:
        numbers = row_numbers(train, options.query_rows)
        rows = unweighted(train.select(list(numbers)))
        documents, of = _to_predict(rows, loaded, options, "--query-rows")
        own = tuple(numbers[row] for row in of) or numbers
        return loaded, train, Asked(documents, None, own=own, of=of)
    asked = load_asked(loaded, rows, options, data)
    if asked is None or options.against is None:
        return loaded, train, asked
    text = (options.against, None) if options.completion is None else (str(options.query), options.against)
    against, _ = _documents(loaded, others, text, options, data, "--against")
    if against.fingerprint() == asked.documents.fingerprint():
        raise InputError(
            "--query and --against say the same, so that every score is 0: give what the model did not say"
        )
    return loaded, train, replace(asked, against=against)


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
    transform, groups = method.query_transform, options.group_column
    linear = groups is not None or asked.against is not None
    unit = linear and ends_in_unit_norm(transform)
    if unit:  # a mean or a difference of gradients is normalised, not of directions
        transform = chain(*chain(transform).stages[:-1])
    if linear and any(isinstance(stage, UnitNormalize) for stage in chain(transform).stages):
        raise InputError("the method normalises queries before its last stage: ask each query by itself")
    plain = queries_of(asked, loaded, options)

    def make() -> Blocks:
        gradients = _gradients(loaded, asked.documents, transform)
        if asked.against is not None:
            others = _gradients(loaded, asked.against, transform)
            gradients = {name: G - others[name] for name, G in gradients.items()}
        if groups is not None:
            gradients, _ = group_means(gradients, _groups_of(asked, groups))
        return unit_normalize()(gradients) if unit else gradients  # pyright: ignore[reportReturnType]

    queries = replace(plain, make=make)
    return (queries if groups is None else _grouped(queries, _groups_of(asked, groups), groups)), method


def queries_of(asked: Asked, loaded: Loaded, options: QueryOptions) -> Queries:
    """What is known of queries without their gradients."""
    documents, rows, against = asked.documents, asked.rows, asked.against
    settings = {"path": None if rows is None else anchored(str(options.query)), "split": options.query_split,
                **_told(documents), "loss": loaded.loss_settings(loaded.subject.query_loss)}  # fmt: skip
    sources = _sources(rows)
    if asked.of:
        settings["tokens_of"] = list(asked.of)
        sources = [sources[row] for row in asked.of if sources]
    shown = ShownQueries(documents.ids, documents.texts, sources, documents=documents)
    if against is not None:
        settings["against"] = {"path": None if rows is None else anchored(str(options.against)),
                               **_told(against)}  # fmt: skip
        pairs = zip(documents.texts, against.texts, strict=True)
        shown = replace(shown, texts=[contrasted(*pair) for pair in pairs], documents=None)
    return Queries(dict, {"query": settings}, shown)


def _told(documents: Corpus) -> dict[str, Any]:
    """What a run records of tokens."""
    return {"fingerprint": documents.fingerprint(), "rows": len(documents), "ids": ids_digest(documents)}


def _gradients(loaded: Loaded, documents: Corpus, transform: Transform) -> Any:
    """The queries' gradients."""
    with loaded.multiplying(), rows_bar("query gradients", documents, then="scores") as progress:
        try:
            return collect(loaded.subject.for_queries(), documents, transform, progress=progress)
        except InputError as error:
            raise InputError(f"in --query: {error}") from error


def _groups_of(asked: Asked, column: str) -> list[str]:
    """The group of every query."""
    return [str(value) for value in cast(Any, asked.rows)[column]]


def _grouped(queries: Queries, groups: list[str], column: str) -> Queries:
    """What is known of the means of groups."""
    names = list(dict.fromkeys(groups))
    texts = [f"mean of {groups.count(name)} queries" for name in names]
    digest = hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]
    grouping = {"groups": column, "groups_fingerprint": digest}
    settings = {"query": {**queries.settings["query"], **grouping}}
    return replace(queries, settings=settings, shown=ShownQueries(names, texts))


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
