"""From options to values: the model under study, its documents, its queries, and what they were made from."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gradfn import example
from gradfn.cli.show import progress_bar
from gradfn.data import Documents
from gradfn.errors import InputError
from gradfn.hf.datasets import load_rows, text_query, tokenize
from gradfn.hf.models import (
    context_length,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from gradfn.layers import View
from gradfn.losses import CausalLMLoss, causal_lm_loss
from gradfn.runs import ends_in_unit_norm, open_gradients, read_gradients, refuse_mismatch
from gradfn.scoring import Method
from gradfn.stream import collect
from gradfn.transforms import Transform, unit_normalize
from gradfn.types import Blocks

Options = Mapping[str, Any]
DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"}


@dataclass(frozen=True, eq=False)
class Subject:
    """The model that is attributed, with all that its gradients depend on but data and transform."""

    path: str
    model: nn.Module
    tokenizer: Any
    loss: CausalLMLoss
    view: View
    token_batch_size: int
    precision: str

    @property
    def name(self) -> str:
        """What to call the model."""
        return "the example inside gradfn" if anchored(self.path) == anchored(example.MODEL) else self.path

    def engine_options(self) -> dict[str, Any]:
        """What every function that runs the engine takes."""
        return {"loss": self.loss, "view": self.view,
                "token_batch_size": self.token_batch_size}  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What a run records of it."""
        return {
            "model": {
                "path": anchored(self.path),
                "precision": self.precision,
                "fingerprint": model_fingerprint(self.model),
            },
            "tokenizer": {"fingerprint": tokenizer_fingerprint(self.tokenizer)},
            "layers": self.view.settings(),
        }


@dataclass(frozen=True, eq=False)
class Queries:
    """Query gradients and what is known of the queries.

    Args:
        gradients: `{block: [queries, ...]}`, transformed.
        settings: what a run records of them.
        ids, texts: one a query.
        shown: the texts as a person sees them, prompt and completion apart.
        documents: their tokens; None for stored gradients.
        sources: the ids of the rows that are known to teach the answers, None where none is known.
    """

    gradients: Blocks
    settings: dict[str, Any]
    ids: list[str]
    texts: list[str]
    shown: list[str]
    documents: Documents | None = None
    sources: list[str | None] = field(default_factory=list)


def anchored(path: str | Path) -> str:
    """A path as settings record it: absolute where it is a local one, so that it can be found again."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


def check_run(run: str | None) -> None:
    """Refuse a run that cannot be a directory before anything is loaded."""
    if run is not None and (run == "" or (os.path.exists(run) and not os.path.isdir(run))):
        raise InputError(f"{run!r} is not the directory of a run: give one that exists, or a new name")


def load_subject(options: Options, *, path: str | None = None, settings: Options | None = None) -> Subject:
    """Load the model and tokenizer that the options (or a store's settings) name."""
    if options["token_batch_size"] < 1:
        raise InputError(f"--token-batch-size must be 1 or more, not {options['token_batch_size']}")
    path = path or options["model"]
    if path is None:
        raise InputError("no model: give --model a local folder, a .gguf file or a hub name")
    recorded = settings or {}
    precision = options["precision"] or recorded.get("model", {}).get("precision", "fp32")
    model = load_model(path, precision=str(precision), device=options["device"])
    view = View(**{key: value for key, value in {**options, **recorded.get("layers", {})}.items()
                   if key in ("include", "exclude", "heads", "tokens") and value is not None})  # fmt: skip
    reduction = recorded["loss"]["reduction"] if recorded else options["loss_reduction"].value
    return Subject(
        path, model, load_tokenizer(path), causal_lm_loss(model, reduction),
        view, options["token_batch_size"], str(precision),
    )  # fmt: skip


def _columns(names: list[str], options: Options, *, query: bool) -> dict[str, str | None]:
    """The columns to read: those given, else text, else prompt and completion (queries: these first)."""
    given = {key: options[key] for key in ("prompt_column", "completion_column")}
    pair = {"prompt_column": "prompt", "completion_column": "completion"}
    if any(given.values()) or not set(pair.values()) <= set(names):
        return {"text_column": options["text_column"], **given}
    if query or options["text_column"] not in names:
        return {"text_column": options["text_column"], **pair}
    return {"text_column": options["text_column"], **given}


def load_documents(subject: Subject, rows: Any, options: Options, *, query: bool = False) -> Documents:
    """Tokenise the rows of a dataset."""
    columns = _columns(list(rows.column_names), options, query=query)
    limit = context_length(subject.model)
    return tokenize(rows, subject.tokenizer, max_length=limit, truncation=options["truncation"], **columns)  # pyright: ignore


def is_dataset(query: str) -> bool:
    """Whether --query names a dataset rather than being a text."""
    # `Path.exists` raises on what is too long to be a name.
    return Path(query).suffix.lower() in DATA_SUFFIXES or os.path.exists(query)


def query_rows(options: Options, split: str = "train") -> Any | None:
    """The dataset of --query, loaded before the model so that a wrong path fails at once; None for a text."""
    query, completion = options["query"], options["completion"]
    if (query is None) == (options["query_path"] is None):
        raise InputError("give one of --query (a dataset, or a text in quotes) and --query-path (a store)")
    if completion is not None and (query is None or is_dataset(query)):
        raise InputError("--completion follows a text: give that text in quotes with --query")
    if query is None:
        open_gradients(options["query_path"])
        return None
    if not query.strip() and not completion:
        raise InputError("--query is empty: give a text in quotes, or a dataset")
    if any("\ud800" <= letter <= "\udfff" for letter in query + (completion or "")):
        raise InputError("the query is not valid UTF-8: give it in the encoding of the terminal")
    return load_rows(query, split) if is_dataset(query) else None


def load_queries(
    subject: Subject, rows: Any | None, options: Options, transform: Transform, wanted: dict[str, Any]
) -> Queries:
    """Make (or read) the queries' gradients, with the query side's transform."""
    if options["query_path"] is not None:
        return _stored_queries(options["query_path"], transform, wanted)
    documents = _query_documents(subject, rows, options)
    empty = [documents.ids[row] for row in range(len(documents)) if not documents.supervised[row]]
    if empty:
        raise InputError(
            f"query {empty[0]} has nothing to predict (it needs two tokens, or a completion): make it longer"
        )
    with progress_bar("query gradients", int(documents.lengths.sum())) as progress:
        gradients = _query_gradients(subject, documents, transform, progress)
    settings = {"query": {"path": None if rows is None else anchored(options["query"]),
                          "fingerprint": documents.fingerprint(), "rows": len(documents)}}  # fmt: skip
    return Queries(gradients, settings, documents.ids, documents.texts,
                   _shown(documents, rows, options), documents, _sources(rows))  # fmt: skip


def _query_documents(subject: Subject, rows: Any | None, options: Options) -> Documents:
    try:
        if rows is not None:
            return load_documents(subject, rows, options, query=True)
        return text_query(
            subject.tokenizer, options["query"], options["completion"],
            max_length=context_length(subject.model), truncation=options["truncation"],
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"in --query: {error}") from error


def _query_gradients(subject: Subject, documents: Documents, transform: Transform, progress: Any) -> Any:
    try:
        return collect(subject.model, documents, transform, progress=progress, **subject.engine_options())
    except InputError as error:
        raise InputError(f"in --query: {error}") from error


def _shown(documents: Documents, rows: Any | None, options: Options) -> list[str]:
    """Queries as a person reads them: what is asked, and after an arrow what is supervised."""
    if rows is None:
        prompts, completions = [options["query"]], [options["completion"]]
    else:
        columns = _columns(list(rows.column_names), options, query=True)
        prompt, completion = columns["prompt_column"], columns["completion_column"]
        if prompt is None or completion is None:
            return documents.texts
        prompts, completions = list(rows[prompt]), list(rows[completion])
    pairs = zip(documents.texts, prompts, completions, strict=True)
    return [f"{prompt} → {end.strip()}" if prompt and end else text for text, prompt, end in pairs]


def _sources(rows: Any | None) -> list[str | None]:
    if rows is None or "source" not in rows.column_names:
        return []
    return [None if source in (None, "") else str(source) for source in rows["source"]]


def _stored_queries(path: str, transform: Transform, wanted: dict[str, Any]) -> Queries:
    with open_gradients(path) as store:
        refuse_mismatch(store.settings, wanted, f"the query gradients in {path}")
        gradients = read_gradients(store)
        ids, texts = list(store.read("rows/id")), list(store.read("rows/text"))
        made = store.settings
    if ends_in_unit_norm(transform):
        gradients = unit_normalize()(gradients)
    # The same directory may hold other gradients of the same data tomorrow.
    how = {key: made[key] for key in ("loss", "transform", "aggregation") if key in made}
    about = {"path": anchored(path), "fingerprint": made["data"]["fingerprint"], "rows": len(ids), **how}
    return Queries(gradients, {"query": about}, ids, texts, texts)


def example_options(options: Options) -> dict[str, Any]:
    """Options filled in with the example's model, corpus and queries where none are given."""
    filled = {**options, "model": str(example.MODEL), "dataset": str(example.CORPUS), "text_column": "text"}
    if options["query"] is None and options["query_path"] is None:
        filled["query"] = str(example.QUERIES)
    if options["method"] is None:
        filled["unit_normalize"] = True
    if options["projection_dim"] is None:
        filled["projection_dim"] = 0  # so small a model needs no projection
    return filled


def method_named(name: str | None, unit: bool) -> str:
    """The recipe that --method and --unit-normalize ask for together."""
    if name == "grad_dot" and unit:
        raise InputError(
            "grad_dot is the inner product, without unit norm: leave out --unit-normalize or --method"
        )
    return name or ("grad_cosine" if unit else "grad_dot")


def make_method(name: str, *stages: Transform) -> Method:
    """The recipe of that name over the stages given."""
    from gradfn import methods

    return getattr(methods, name)(*stages)
