"""From options to values: the model under study, its documents, its queries, and what they were made from."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from gradfn import example
from gradfn.cli.show import progress_bar
from gradfn.data import Documents, Pairs
from gradfn.errors import InputError
from gradfn.hf.datasets import (
    load_rows,
    text_pair,
    text_query,
    tokenize,
    tokenize_pairs,
    with_labels,
    with_weights,
)
from gradfn.hf.models import (
    context_length,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from gradfn.layers import View, output_head
from gradfn.losses import CausalLMLoss, ModelLoss, causal_lm_loss, model_loss
from gradfn.runs import (
    ends_in_unit_norm,
    loss_settings,
    merged,
    open_gradients,
    read_gradients,
    refuse_mismatch,
)
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
    loss: CausalLMLoss | ModelLoss
    query_loss: CausalLMLoss | ModelLoss
    reference: str | None
    view: View
    token_batch_size: int
    precision: str

    @property
    def name(self) -> str:
        """What to call the model."""
        return "the example inside gradfn" if anchored(self.path) == anchored(example.MODEL) else self.path

    @property
    def task(self) -> str:
        """What the model does with a row."""
        return task_of(loss_settings(self.loss))

    def engine_options(self) -> dict[str, Any]:
        """What every function that runs the engine over training rows takes."""
        return {"loss": self.loss, "view": self.view,
                "token_batch_size": self.token_batch_size}  # fmt: skip

    def query_options(self) -> dict[str, Any]:
        """The same for queries, whose gradients are whole even where training rows are seen by token."""
        view = replace(self.view, tokens=False)
        return {"loss": self.query_loss, "view": view, "token_batch_size": self.token_batch_size}

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
            "loss": self.loss_settings(self.loss),
        }

    def loss_settings(self, loss: CausalLMLoss | ModelLoss) -> dict[str, Any]:
        """What a run records of a loss, and where its reference is."""
        known = loss_settings(loss)
        if known["reference"] is None or self.reference is None:
            return known
        return merged(known, {"reference": {"path": anchored(self.reference)}})


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
    documents: Documents | Pairs | None = None
    sources: list[str | None] = field(default_factory=list)


def anchored(path: str | Path) -> str:
    """A path as settings record it: absolute where it is a local one, so that it can be found again."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


def check_run(run: str | None) -> None:
    """Refuse a run that cannot be a directory before anything is loaded."""
    if run is not None and (run == "" or (os.path.exists(run) and not os.path.isdir(run))):
        raise InputError(f"{run!r} is not the directory of a run: give one that exists, or a new name")


def task_of(loss: Options) -> str:
    """The task of a model from what a run records of its loss."""
    return loss["name"]


def check_losses(
    task: str, losses: Sequence[str], label_smoothing: float = 0.0, reference: str | None = None
) -> None:
    """Refuse losses that do not go together before anything is loaded."""
    if not 0 <= label_smoothing < 1:
        raise InputError(f"--label-smoothing must be at least 0 and below 1, not {label_smoothing}")
    if task == "regression" and (label_smoothing or set(losses) != {"cross_entropy"}):
        raise InputError(
            "the loss of a regression is the squared error: leave out --loss, --query-loss and "
            "--label-smoothing"
        )
    if label_smoothing and "cross_entropy" not in losses:
        raise InputError(
            f"--label-smoothing is for cross-entropy, not for {losses[0]}: leave one of them out"
        )
    if "kl" in losses and task != "causal_lm":
        raise InputError(f"kl compares next tokens, not what {task} gives: use another loss, or causal-lm")
    if "kl" in losses and reference is None:
        raise InputError("kl needs a model to compare with: give --reference, or use another loss")
    if reference is not None and "kl" not in losses:
        raise InputError("--reference is for kl, and no loss is: give --loss kl, or leave it out")


def check_columns(options: Options, task: str) -> None:
    """Refuse columns that do not go together, or not with the task, before anything is loaded."""
    labelled = task in ("classification", "regression")
    if labelled != (options["label_column"] is not None):
        raise InputError(
            f"{task} needs to know its labels: give --label-column"
            if labelled
            else f"--label-column is for classification and regression, not for {task}: give --task too"
        )
    pair = [options[key] for key in ("prompt_column", "completion_column") if options[key] is not None]
    if labelled and pair:
        raise InputError(f"{task} reads a text: give --text-column, not prompts and completions")
    if options["messages_column"] is not None and (pair or task != "causal_lm"):
        raise InputError(
            "--messages-column stands alone: leave out the columns of prompts and completions, and "
            "give no --task but causal-lm"
        )
    if options.get("reward_column") is not None and options.get("advantage_column") is not None:
        raise InputError("rewards or advantages weigh the rows: give --reward-column or --advantage-column")
    if options.get("by") == "token" and task == "seq2seq_lm":
        raise InputError("pairs of inputs and outputs have no tokens of a row: use --by example, or head")


def check_options(options: Options) -> None:
    """Refuse what can be seen to be wrong in the options of a command that loads a model and a dataset."""
    losses = [str(options[key]) for key in ("loss", "query_loss") if options.get(key) is not None]
    check_losses(str(options["task"]), losses, options["label_smoothing"], options["reference"])
    check_columns(options, str(options["task"]))


def _recorded(options: Options) -> dict[str, Any]:
    """The loss that the options ask for, as a store would record it."""
    return {
        "name": str(options["task"]),
        "reduction": str(options["loss_reduction"]),
        "criterion": str(options["loss"]),
        "label_smoothing": options["label_smoothing"],
        "reference": None if options["reference"] is None else {"path": options["reference"]},
    }


def load_subject(options: Options, *, path: str | None = None, settings: Options | None = None) -> Subject:
    """Load the model and tokenizer that the options (or a store's settings) name."""
    if options["token_batch_size"] < 1:
        raise InputError(f"--token-batch-size must be 1 or more, not {options['token_batch_size']}")
    path = path or options["model"]
    if path is None:
        raise InputError("no model: give --model a local folder, a .gguf file or a hub name")
    recorded = settings or {}
    how = recorded["loss"] if recorded else _recorded(options)
    precision = str(options["precision"] or recorded.get("model", {}).get("precision", "fp32"))
    model = load_model(
        path, task=task_of(how), precision=precision, device=options["device"],
        attention=options.get("attention"),
    )  # fmt: skip
    _check_model(path, model, task_of(how))
    tokenizer = load_tokenizer(path)
    asked = str(options.get("query_loss") or how["criterion"])
    where, reference = None, None
    if "kl" in ([asked] if recorded else [how["criterion"], asked]):
        where = options["reference"] or how["reference"]["path"]
        reference = load_model(where, precision=precision, device=options["device"])
        _check_reference(where, reference, how["reference"], output_head(model), tokenizer)
    query_loss = _make_loss(model, {**how, "criterion": asked}, reference)
    # A store's own loss is not run again: it is the queries' that are asked.
    same = recorded or asked == how["criterion"]
    loss = query_loss if same else _make_loss(model, how, reference)
    return Subject(
        path, model, tokenizer, loss, query_loss, where, _view(options, recorded),
        options["token_batch_size"], precision,
    )  # fmt: skip


def _view(options: Options, recorded: Options) -> View:
    """The layers that the store's settings or the options name, and how finely they are seen."""
    if recorded:
        return View(**recorded["layers"])
    by = str(options["by"])
    return View(options["include"] or (), options["exclude"] or (), heads=by == "head", tokens=by == "token")


def _make_loss(model: nn.Module, how: Options, reference: nn.Module | None) -> CausalLMLoss | ModelLoss:
    criterion = how["criterion"]
    smoothing = how["label_smoothing"] if criterion == "cross_entropy" else 0.0
    if task_of(how) != "causal_lm":
        return model_loss(
            model, task_of(how), how["reduction"], criterion=criterion, label_smoothing=smoothing  # pyright: ignore
        )  # fmt: skip
    return causal_lm_loss(
        model, how["reduction"], criterion=criterion, label_smoothing=smoothing,
        reference=reference if criterion == "kl" else None,
    )  # fmt: skip


def _check_model(path: str, model: nn.Module, task: str) -> None:
    """Refuse a model that cannot do the task with padded batches."""
    config: Any = model.config
    if task not in ("classification", "regression"):
        return
    if config.pad_token_id is None:
        raise InputError(
            f"{path} has no padding token, by which a classifier finds the end of a text: set pad_token_id "
            "in its config.json"
        )
    if task == "regression" and config.num_labels != 1:
        raise InputError(
            f"{path} gives {config.num_labels} numbers and a regression one: use --task classification"
        )


def _check_reference(
    path: str, reference: nn.Module, recorded: Options | None, head: Any, tokenizer: Any
) -> None:
    """Refuse a reference of another vocabulary, or another than a store's."""
    theirs: Any = output_head(reference)
    if theirs.weight.shape[0] != head.weight.shape[0] or (
        load_tokenizer(path).get_vocab() != tokenizer.get_vocab()
    ):
        raise InputError(
            f"the reference {path} has another vocabulary than the model, and kl compares token by token: "
            "give one with the same tokenizer"
        )
    known = (recorded or {}).get("fingerprint")
    if known is not None and known != model_fingerprint(reference):
        raise InputError(
            f"the store was made with the reference {recorded['path']}, whose weights were not those "  # pyright: ignore
            f"of {path}: give the same with --reference"
        )


def _columns(names: list[str], options: Options, *, query: bool) -> dict[str, str | None]:
    """The columns to read: those given, else text, else prompt and completion (queries: these first)."""
    given = {key: options[key] for key in ("text_column", "prompt_column", "completion_column")}
    pair = {"prompt_column": "prompt", "completion_column": "completion"}
    if options["messages_column"] is not None:
        return {**given, "messages_column": options["messages_column"]}
    if options["label_column"] is not None or given["prompt_column"] or given["completion_column"]:
        return given
    if set(pair.values()) <= set(names) and (query or options["text_column"] not in names):
        return {**given, **pair}
    if "messages" in names and options["text_column"] not in names and "input_ids" not in names:
        return {**given, "messages_column": "messages"}
    return given


def load_documents(
    subject: Subject, rows: Any, options: Options, *, query: bool = False
) -> Documents | Pairs:
    """Tokenise the rows of a dataset; of training rows, with the weights that the options name."""
    pairs = subject.task == "seq2seq_lm"
    columns: Any = _columns(list(rows.column_names), options, query=query or pairs)
    fit = {"max_length": context_length(subject.model), "truncation": options["truncation"]}
    if pairs:
        both = [columns.get(key) for key in ("prompt_column", "completion_column")]
        if None in both:
            raise InputError(
                "seq2seq-lm maps prompts to completions: give --prompt-column and --completion-column"
            )
        docs = tokenize_pairs(
            rows, subject.tokenizer, prompt_column=both[0], completion_column=both[1], **fit
        )
    else:
        docs = tokenize(rows, subject.tokenizer, **columns, **fit)
    if isinstance(docs, Documents) and options["label_column"] is not None:
        config: Any = subject.model.config
        classes = config.label2id if subject.task == "classification" else None
        docs = with_labels(docs, rows, options["label_column"], classes)
    given = {key: options.get(key) for key in ("reward_column", "advantage_column")}
    if query or not any(given.values()):
        return docs
    prompts = columns.get("prompt_column") if given["reward_column"] else None
    return with_weights(docs, rows, prompt_column=prompts, **given)


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
                          "fingerprint": documents.fingerprint(), "rows": len(documents),
                          "loss": subject.loss_settings(subject.query_loss)}}  # fmt: skip
    return Queries(gradients, settings, documents.ids, documents.texts,
                   _shown(documents, rows, options), documents, _sources(rows))  # fmt: skip


def _query_documents(subject: Subject, rows: Any | None, options: Options) -> Documents | Pairs:
    try:
        if rows is not None:
            return load_documents(subject, rows, options, query=True)
        fit: Any = {"max_length": context_length(subject.model), "truncation": options["truncation"]}
        match subject.task:
            case "causal_lm":
                return text_query(subject.tokenizer, options["query"], options["completion"], **fit)
            case "seq2seq_lm" if options["completion"] is not None:
                return text_pair(subject.tokenizer, options["query"], options["completion"], **fit)
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


def _shown(documents: Documents | Pairs, rows: Any | None, options: Options) -> list[str]:
    """Queries as a person reads them: what is asked, and after an arrow what is supervised."""
    if isinstance(documents, Pairs):
        return documents.texts
    if rows is None:
        prompts, completions = [options["query"]], [options["completion"]]
    elif options["label_column"] is not None:
        labels = zip(documents.texts, rows[options["label_column"]], strict=True)
        return [f"{text} → {label}" for text, label in labels]
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
        whole = {**wanted, "layers": {**wanted["layers"], "tokens": False}}
        refuse_mismatch(store.settings, whole, f"the query gradients in {path}")
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
