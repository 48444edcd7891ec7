"""Queries: from datasets, texts and stores of gradients, and what is known of them."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradfn.cli.inputs import (
    DATA_SUFFIXES,
    Options,
    Subject,
    anchored,
    check_tokens,
    columns_of,
    load_documents,
    load_subject,
    masked,
)
from gradfn.cli.show import progress_bar
from gradfn.data import Corpus, Images, Pairs
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.evaluate.retrieval import source_name
from gradfn.hf import context_length, load_rows, text_pair, text_query
from gradfn.methods.inner_product import InnerProduct
from gradfn.methods.recipes import group_means
from gradfn.runs.gradients import ends_in_unit_norm, open_gradients, read_gradients
from gradfn.runs.provenance import DataSource, Provenance, refuse_mismatch
from gradfn.transforms import Transform, chain, precondition, unit_normalize
from gradfn.transforms.precondition import digest_of
from gradfn.types import Blocks


@dataclass(frozen=True, eq=False)
class Queries:
    """Query gradients and what is known of the queries.

    Args:
        gradients: `{block: [queries, ...]}`, transformed.
        settings: what a run records of them.
        ids, texts: one a query.
        shown: the texts as a person sees them, prompt and completion apart.
        documents: their tokens; None for stored gradients.
        dampings: of which there is a query each.
        sources: the ids of the rows that are known to teach the answers, None where none is known.
    """

    gradients: Blocks
    settings: dict[str, Any]
    ids: list[str]
    texts: list[str]
    shown: list[str]
    documents: Corpus | None = None
    sources: list[str | None] = field(default_factory=list)
    dampings: tuple[str, ...] = ("",)

    def joined(self, name: str) -> "Queries":
        """One for all of them."""
        text = f"the best of {len(self.ids)} queries"
        return replace(
            self, ids=[name], texts=[text], shown=[text], documents=None, sources=[], dampings=("",)
        )

    def with_dampings(self, names: Sequence[str]) -> "Queries":
        """Each of them once for every damping, in the order of scores; one damping is not told."""
        if len(names) == 1:
            return self
        count = len(names)
        ids = [f"{query} (damping {name})" for name in names for query in self.ids]
        every: Any = None if self.documents is None else list(range(len(self.documents))) * count
        return replace(
            self, ids=ids, texts=self.texts * count, shown=self.shown * count, sources=self.sources * count,
            documents=None if self.documents is None else self.documents.select(every),
            dampings=tuple(names),
        )  # fmt: skip


def is_dataset(query: str) -> bool:
    """Whether --query names a dataset rather than being a text."""
    # `Path.exists` raises on what is too long to be a name.
    return Path(query).suffix.lower() in DATA_SUFFIXES or os.path.exists(query)


def query_rows_of(options: Options, split: str = "train") -> Any | None:
    """The dataset of --query, loaded before the model so that a wrong path fails at once; None for a text."""
    query, completion = options["query"], options["completion"]
    if (query is None) == (options["query_path"] is None):
        raise InputError("give one of --query (a dataset, or a text in quotes) and --query-path (a store)")
    if completion is not None and (query is None or is_dataset(query)):
        raise InputError("--completion follows a text: give that text in quotes with --query")
    if query is None and options["query_loss"] is not None:
        raise InputError("the queries of --query-path have their loss already: leave out --query-loss")
    if query is None:
        open_gradients(options["query_path"])
        return None
    if not query.strip() and not completion:
        raise InputError("--query is empty: give a text in quotes, or a dataset")
    if any("\ud800" <= letter <= "\udfff" for letter in query + (completion or "")):
        raise InputError("the query is not valid UTF-8: give it in the encoding of the terminal")
    return load_rows(query, split) if is_dataset(query) else None


def query_documents(subject: Subject, rows: Any | None, options: Options) -> Corpus | None:
    """The queries' tokens; None where their gradients are stored, or rows are scored against themselves."""
    if options["query"] is None:
        return None
    documents = _query_documents(subject, rows, options)
    empty = [documents.ids[row] for row in range(len(documents)) if not documents.supervised[row]]
    if empty:
        raise InputError(
            f"query {empty[0]} has nothing to predict (it needs two tokens, or a completion): make it longer"
        )
    return documents


def load_all(options: Options) -> tuple[Subject, Corpus, Corpus]:
    """The model, the training rows and the queries' tokens; paths are looked at before a model is loaded."""
    query_rows = query_rows_of(options)
    rows = load_rows(options["dataset"], options["split"])
    subject = load_subject(options)
    train = load_documents(subject, rows, options)
    asked = query_documents(subject, query_rows, options)
    assert asked is not None
    return subject, train, asked


def load_queries(
    subject: Subject,
    rows: Any | None,
    documents: Corpus | None,
    options: Options,
    method: InnerProduct,
    wanted: dict[str, Any],
) -> tuple[Queries, InnerProduct]:
    """Make (or read) the queries' gradients, and the method that takes them as they are.

    Args:
        rows: the dataset of --query; None for a text.
        documents: of `query_documents`.
        wanted: what stored gradients must agree with: model, layers, and the transform before any curvature.
    """
    if documents is None:
        return _stored_queries(options["query_path"], method, wanted)
    column, transform = options.get("group_column"), method.query_transform
    unit = column is not None and ends_in_unit_norm(transform)
    if unit:  # a mean of gradients is normalised, not of directions
        transform = chain(*chain(transform).stages[:-1])
    with subject.multiplying(), progress_bar("query gradients", int(documents.lengths.sum())) as progress:
        gradients = _query_gradients(subject, documents, transform, progress)
    settings = {"query": {"path": None if rows is None else anchored(options["query"]),
                          "fingerprint": documents.fingerprint(), "rows": len(documents),
                          "loss": subject.loss_settings(subject.query_loss)}}  # fmt: skip
    queries = Queries(gradients, settings, documents.ids, documents.texts,
                      _shown(documents, rows, options), documents, _sources(rows))  # fmt: skip
    return (queries if column is None else _grouped(queries, rows, column, unit)), method


def check_groups(rows: Any | None, column: str | None) -> None:
    """Refuse a column of groups that --query has not."""
    if column is None:
        return
    if rows is None:
        raise InputError("--group-column groups the queries of a dataset: give one with --query")
    if column not in rows.column_names:
        raise InputError(
            f"--group-column {column} is no column of --query, which has {', '.join(rows.column_names)}"
        )


def _grouped(queries: Queries, rows: Any, column: str, unit: bool) -> Queries:
    """One query for each value of a column: the mean of its queries' gradients, `unit` with norm 1."""
    groups = [str(value) for value in rows[column]]
    gradients, names = group_means(queries.gradients, groups)
    texts = [f"mean of {groups.count(name)} queries" for name in names]
    digest = hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16]
    grouping = {"groups": column, "groups_fingerprint": digest}
    settings = {"query": {**queries.settings["query"], **grouping}}
    return Queries(unit_normalize()(gradients) if unit else gradients, settings, names, texts, texts)


def self_query() -> Queries:
    """What is shown of rows that are scored against themselves."""
    text = "how far a step on a row lowers that row's own loss"
    return Queries({}, {"query": "self"}, ["self-influence"], [text], [text])


def _query_documents(subject: Subject, rows: Any | None, options: Options) -> Corpus:
    try:
        if rows is not None:
            return load_documents(subject, rows, options, query=True)
        fit: Any = {"max_length": context_length(subject.model), "truncation": options["truncation"]}
        match subject.task:
            case "causal_lm" | "masked_lm":
                docs = text_query(subject.tokenizer, options["query"], options["completion"], **fit)
                check_tokens(subject, docs)
                return masked(subject, docs)
            case "seq2seq_lm" if options["completion"] is not None:
                pair = text_pair(subject.tokenizer, options["query"], options["completion"], **fit)
                check_tokens(subject, pair.inputs, pair.outputs)
                return pair
            case "seq2seq_lm":
                raise InputError("an input alone has no loss: give what the model said with --completion")
            case task:
                raise InputError(f"a text has no label, which {task} needs: give a dataset of queries")
    except InputError as error:
        raise InputError(f"in --query: {error}") from error


def _query_gradients(subject: Subject, documents: Any, transform: Transform, progress: Any) -> Any:
    try:
        return collect(subject.model, documents, transform, progress=progress, **subject.query_options())
    except InputError as error:
        raise InputError(f"in --query: {error}") from error


def _shown(documents: Corpus, rows: Any | None, options: Options) -> list[str]:
    """Queries as a person reads them: what is asked, and after an arrow what is supervised."""
    if isinstance(documents, Pairs | Images):
        return documents.texts
    if rows is None:
        prompts, completions = [options["query"]], [options["completion"]]
    elif options["label_column"] is not None:
        labels = zip(documents.texts, rows[options["label_column"]], strict=True)
        return [f"{text} → {label}" for text, label in labels]
    else:
        columns = columns_of(list(rows.column_names), options, query=True)
        prompt, completion = columns["prompt_column"], columns["completion_column"]
        if prompt is None or completion is None:
            return documents.texts
        prompts, completions = list(rows[prompt]), list(rows[completion])
    pairs = zip(documents.texts, prompts, completions, strict=True)
    return [f"{prompt} → {end.strip()}" if prompt and end else text for text, prompt, end in pairs]


def _sources(rows: Any | None) -> list[str | None]:
    if rows is None or "source" not in rows.column_names:
        return []
    return [source_name(source) for source in rows["source"]]


def check_stored(path: str, wanted: dict[str, Any], name: str) -> None:
    """Refuse, before a method fits a curvature, stored queries that do not go with it.

    Args:
        path: of the stored queries.
        wanted: see `load_queries`.
        name: of the method.
    """
    with open_gradients(path) as store:
        made, what = Provenance.of(store), f"the query gradients in {path}"
    refuse_mismatch(made.without_tail(), Provenance.of(wanted).by_row(), what)
    if made.tail:
        raise InputError(
            f"{what} have unit norm or are behind a curvature, and {name} fits one of its own: make them "
            "again without --unit-normalize and --hessian-path"
        )


def _stored_queries(path: str, method: InnerProduct, wanted: dict[str, Any]) -> tuple[Queries, InnerProduct]:
    """Query gradients from a store, and the method for what has been done to them already."""
    with open_gradients(path) as store:
        made, what = Provenance.of(store), f"the query gradients in {path}"
        asked = Provenance.of({**wanted, "transform": method.query_transform.settings()})
        refuse_mismatch(made.without_tail(), asked.by_row().without_tail(), what)
        tail = made.tail
        method = _continued(method, tail, what)
        gradients = read_gradients(store)
        ids, texts = list(store.read("rows/id")), list(store.read("rows/text"))
    if not tail and method.curvature is None and ends_in_unit_norm(method.query_transform):
        gradients = unit_normalize()(gradients)
    # The same directory may hold other gradients of the same data tomorrow.
    about = DataSource(
        path=anchored(path), fingerprint=made.data and made.data.fingerprint, rows=len(ids), loss=made.loss,
        transform=made.transform, aggregation=made.aggregation,
    )  # fmt: skip
    return Queries(gradients, {"query": about.to_json()}, ids, texts, texts), method


def _continued(method: InnerProduct, tail: Sequence[Mapping[str, Any]], what: str) -> InnerProduct:
    """The method from where stored query gradients are: behind nothing, a unit norm, a curvature, or both."""
    H, unit = method.curvature, bool(tail) and tail[-1]["transform"] == "UnitNormalize"
    powers = [stage for stage in tail if stage["transform"] == "Precondition"]
    if not powers:
        if unit and H is not None:
            raise InputError(
                f"{what} have unit norm, which comes after a curvature: make them again without it"
            )
        if unit and not ends_in_unit_norm(method.query_transform) and method.norm != "cosine":
            raise InputError(
                f"{what} were made with unit norm, which cannot be undone: add --unit-normalize (cosine), or "
                "make them again without"
            )
        return method
    (power,) = powers
    if H is None:
        raise InputError(
            f"{what} were multiplied by H^{power['power']:g}: give that curvature with --hessian-path"
        )
    if power["curvature"] != digest_of(H):
        raise InputError(f"{what} were multiplied by another curvature than --hessian-path's: give theirs")
    needed = -0.5 if method.norm == "cosine" else -1.0
    needs = "a cosine needs H^-0.5 on both sides" if needed == -0.5 else "an inner product H^-1 on one side"
    if power["power"] != needed or unit != (needed == -0.5):
        raise InputError(
            f"{what} were multiplied by H^{power['power']:g}, and {needs}: make them again without "
            "--hessian-path"
        )
    dampings = [None if damping is None else str(damping) for damping in method.damping]
    if dampings != [power["damping"]]:
        raise InputError(f"{what} were damped by {power['damping']}: give --damping {power['damping']}")
    if needed == -1.0:
        return replace(method, curvature=None, norm="none", damping=(None,))
    half = precondition(H, -0.5, method.damping[0])
    return InnerProduct(chain(method.row_transform, half), method.query_transform, norm="cosine")
