"""From options to values: the model under study, its documents, its queries, and what they were made from."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradfn import example
from gradfn.data import Corpus, Documents, Images, Pairs
from gradfn.engine.precision import Products, multiplying, products_of
from gradfn.errors import InputError
from gradfn.hf import (
    check_device,
    check_vocabulary,
    context_length,
    load_images,
    load_model,
    load_processor,
    load_tokenizer,
    processor_fingerprint,
    tokenize,
    tokenize_pairs,
    tokenizer_fingerprint,
    with_labels,
    with_weights,
)
from gradfn.hf.masking import mask_tokens, masking_of
from gradfn.model.fingerprint import model_fingerprint
from gradfn.model.losses import CausalLMLoss, ModelLoss, causal_lm_loss, model_loss
from gradfn.model.sites import View, output_head
from gradfn.runs.provenance import loss_source
from gradfn.subject import Subject as LibrarySubject

Options = Mapping[str, Any]
DATA_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"}


@dataclass(frozen=True, eq=False)
class Subject:
    """The model that is attributed, with all that its gradients depend on but data and transform.

    A model reads texts by its tokenizer or images by its processor, and the other is None; `masking` is what
    decides which tokens are masked, where the task is to tell them.
    """

    path: str
    model: nn.Module
    tokenizer: Any
    loss: CausalLMLoss | ModelLoss
    query_loss: CausalLMLoss | ModelLoss
    reference: str | None
    view: View
    token_batch_size: int
    precision: str
    products: Products
    processor: Any = None
    masking: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """What to call the model."""
        return "the example inside gradfn" if anchored(self.path) == anchored(example.MODEL) else self.path

    @property
    def task(self) -> str:
        """What the model does with a row."""
        return task_of(loss_source(self.loss).to_json())

    @property
    def attention(self) -> str | None:
        """The kernel of attention that the model has, in transformers' words."""
        return getattr(self.model.config, "_attn_implementation", None)

    def multiplying(self) -> AbstractContextManager[None]:
        """Where gradients are made: float32 matrices are multiplied as the precision says."""
        return multiplying(self.products, next(self.model.parameters()).device)

    def bare(self) -> LibrarySubject:
        """The subject as the library knows it."""
        return LibrarySubject(self.model, self.loss, self.query_loss, self.view, self.token_batch_size)

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
        rounded = {} if self.products == "ieee" else {"products": self.products}
        masking = {} if self.masking is None else {"masking": self.masking}
        return {
            "model": {
                "path": anchored(self.path),
                "precision": self.precision,
                **rounded,
                "attention": self.attention,
                "fingerprint": model_fingerprint(self.model),
            },
            **self._reads(),
            "layers": self.view.settings(),
            "loss": self.loss_settings(self.loss),
            **masking,
        }

    def _reads(self) -> dict[str, Any]:
        """What makes tokens or pixels of rows."""
        if self.processor is not None:
            return {"processor": {"fingerprint": processor_fingerprint(self.processor)}}
        return {"tokenizer": {"fingerprint": tokenizer_fingerprint(self.tokenizer)}}

    def loss_settings(self, loss: CausalLMLoss | ModelLoss) -> dict[str, Any]:
        """What a run records of a loss, and where its reference is."""
        known = loss_source(loss)
        if known.reference is None or self.reference is None:
            return known.to_json()
        return replace(known, reference=replace(known.reference, path=anchored(self.reference))).to_json()


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


IMAGES = "image_classification"
"""The task whose rows are images."""


def _check_image_columns(options: Options, task: str) -> None:
    """Refuse what goes with images and not with the task, or with texts and not with images."""
    if task != IMAGES:
        if options["image_column"] is not None:
            raise InputError(f"--image-column is for image-classification, not for {task}: give --task too")
        return
    columns = ("prompt_column", "completion_column", "messages_column", "reward_column")
    if given := [key for key in columns if options.get(key) is not None]:
        raise InputError(f"images are no texts: leave out --{given[0].replace('_', '-')}")
    if options["truncation"]:
        raise InputError("images are not cut, but made of one size: leave out --truncation")
    if options.get("by") == "token":
        raise InputError("images have no tokens of a row: use --by example, module or head")


def check_columns(options: Options, task: str) -> None:
    """Refuse columns that do not go together, or not with the task, before anything is loaded."""
    _check_image_columns(options, task)
    if task == IMAGES:
        return
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
    made = recorded.get("model", {})
    precision = str(options["precision"] or made.get("precision", "fp32"))
    products = _products(precision, options["device"])
    _say_once("bitsandbytes.autograd._functions")
    attention = options["attention"] or made.get("attention")
    processor = load_processor(path) if task_of(how) == IMAGES else None
    model = _load(path, options, precision, attention, task=task_of(how))
    _check_model(path, model, task_of(how))
    vocabulary = getattr(model.config, "vocab_size", None)
    tokenizer = load_tokenizer(path, vocabulary=vocabulary) if processor is None else None
    masking = _masking(path, tokenizer, options, recorded) if task_of(how) == "masked_lm" else None
    asked = str(options.get("query_loss") or how["criterion"])
    where, reference = None, None
    if "kl" in ([asked] if recorded else [how["criterion"], asked]):
        where = options["reference"] or how["reference"]["path"]
        reference = _load(where, options, precision, options["attention"])
        _check_reference(where, reference, how["reference"], output_head(model), tokenizer)
    query_loss = _make_loss(model, {**how, "criterion": asked}, reference)
    # A store's own loss is not run again: it is the queries' that are asked.
    same = recorded or asked == how["criterion"]
    loss = query_loss if same else _make_loss(model, how, reference)
    return Subject(
        path, model, tokenizer, loss, query_loss, where, _view(options, recorded),
        options["token_batch_size"], precision, products, processor, masking,
    )  # fmt: skip


def _masking(path: str, tokenizer: Any, options: Options, recorded: Options) -> dict[str, Any]:
    """What decides which tokens are masked: the store's seed, or that of the options."""
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"the tokenizer of {path} has no mask token, which masked-lm puts in the place of tokens: use "
            "another task, or a model that was trained with one"
        )
    if recorded and "masking" not in recorded:
        raise InputError(
            f"the store of {path} does not say how its tokens were masked: make it again with gradfn build"
        )
    return masking_of(tokenizer, recorded["masking"]["seed"] if recorded else options["seed"])


def at_checkpoint(subject: Subject, path: str, options: Options) -> Subject:
    """The same with a checkpoint's weights; the tokenizer is the model's."""
    model = _load(path, options, subject.precision, options["attention"], task=subject.task)
    _check_model(path, model, subject.task)
    losses = [replace(loss, model=model) for loss in (subject.loss, subject.query_loss)]
    return replace(subject, path=path, model=model, loss=losses[0], query_loss=losses[1])


def _products(precision: str, device: str) -> Products:
    """How float32 matrices are multiplied; what the device offers is asked only where it matters."""
    if precision != "tf32":
        return "ieee"
    check_device(device)
    return products_of(precision, torch.device(device))


class _Once(logging.Filter):
    """Lets a message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        new = record.getMessage() not in self.known
        self.known.add(record.getMessage())
        return new


def _say_once(logger: str) -> None:
    """For libraries that say the same at every product."""
    found = logging.getLogger(logger)
    if not any(isinstance(known, _Once) for known in found.filters):
        found.addFilter(_Once())


def _load(
    path: str, options: Options, precision: str, attention: str | None, task: str = "causal_lm"
) -> nn.Module:
    """A model as the options say; tf32 is of products, the weights are fp32."""
    dtype = "fp32" if precision == "tf32" else precision
    kernel = None if attention is None else str(attention)
    return load_model(path, task=task, precision=dtype, device=options["device"], attention=kernel)


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
        load_tokenizer(path, vocabulary=head.weight.shape[0]).get_vocab() != tokenizer.get_vocab()
    ):
        raise InputError(
            f"the reference {path} has another vocabulary than the model, or no tokenizer, and kl compares "
            "token by token: give one with the same tokenizer beside it"
        )
    known = (recorded or {}).get("fingerprint")
    if known is not None and known != model_fingerprint(reference):
        raise InputError(
            f"the store was made with the reference {recorded['path']}, whose weights were not those "  # pyright: ignore
            f"of {path}: give the same with --reference"
        )


def columns_of(names: list[str], options: Options, *, query: bool) -> dict[str, str | None]:
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


def load_documents(subject: Subject, rows: Any, options: Options, *, query: bool = False) -> Corpus:
    """Read the rows of a dataset; of training rows, with the weights that the options name."""
    pairs = subject.task == "seq2seq_lm"
    columns: Any = columns_of(list(rows.column_names), options, query=query or pairs)
    if subject.processor is None:
        docs = _tokenized(subject, rows, columns, options)
    else:
        docs = _images(subject, rows, options, options["query"] if query else options["dataset"])
    given = {key: options.get(key) for key in ("reward_column", "advantage_column")}
    if query or not any(given.values()):
        return docs
    asked = {key: columns.get(key) for key in ("prompt_column", "messages_column")}
    return with_weights(docs, rows, **asked, **given)


def _images(subject: Subject, rows: Any, options: Options, path: str) -> Images:
    """The images of a dataset at a path, which their own paths are relative to."""
    place = Path(path).expanduser()
    return load_images(
        rows, subject.processor, subject.model, image_column=options["image_column"],
        label_column=options["label_column"] or "label", folder=place if place.is_dir() else place.parent,
    )  # fmt: skip


def masked(subject: Subject, docs: Documents) -> Documents:
    """The documents with masked tokens, where the model is to tell these."""
    if subject.masking is None:
        return docs
    special = list(subject.tokenizer.all_special_ids)
    return mask_tokens(docs, subject.masking["token"], special, subject.masking["seed"])


def _tokenized(subject: Subject, rows: Any, columns: Any, options: Options) -> Documents | Pairs:
    """The tokens of a dataset's texts, with what the model is to make of them."""
    fit = {"max_length": context_length(subject.model), "truncation": options["truncation"]}
    if subject.task == "seq2seq_lm":
        both = [columns.get(key) for key in ("prompt_column", "completion_column")]
        if None in both:
            raise InputError(
                "seq2seq-lm maps prompts to completions: give --prompt-column and --completion-column"
            )
        pairs = tokenize_pairs(
            rows, subject.tokenizer, prompt_column=both[0], completion_column=both[1], **fit
        )
        check_tokens(subject, pairs.inputs, pairs.outputs)
        return pairs
    docs = tokenize(rows, subject.tokenizer, **columns, **fit)
    check_tokens(subject, docs)
    docs = masked(subject, _with_types(subject, docs))
    if options["label_column"] is None:
        return docs
    config: Any = subject.model.config
    classes = config.label2id if subject.task == "classification" else None
    return with_labels(docs, rows, options["label_column"], classes)


def check_tokens(subject: Subject, *parts: Documents) -> None:
    """Refuse tokens that the model does not have."""
    model: Any = subject.model
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if size is not None:
        for docs in parts:
            check_vocabulary(docs, size)


def _with_types(subject: Subject, docs: Documents) -> Documents:
    """The documents with the types of their tokens only if the model reads any."""
    kinds = getattr(subject.model.config, "type_vocab_size", None)
    reads = "token_type_ids" in signature(subject.model.forward).parameters and kinds != 0
    if docs.token_types is None or not reads:
        return replace(docs, token_types=None)
    if subject.task == "causal_lm":
        raise InputError(
            "token_type_ids are not given to a model of next tokens, and this one would read them: leave out "
            "the column token_type_ids"
        )
    if kinds is not None and (most := int(docs.token_types.max())) >= kinds:
        raise InputError(
            f"the dataset has token type {most}, and {subject.path} has {kinds}, numbered from 0: leave out "
            "the column token_type_ids"
        )
    return docs


def example_options(options: Options) -> dict[str, Any]:
    """Options filled in with the example's model, corpus and queries where none are given."""
    filled = {**options, "model": str(example.MODEL), "dataset": str(example.CORPUS), "text_column": "text"}
    if options["query"] is None and options["query_path"] is None and not options["self_influence"]:
        filled["query"] = str(example.QUERIES)
    if options["method"] is None and not options["self_influence"]:
        filled["unit_normalize"] = True
    told = [options[key] for key in ("method", "projection_dim", "projection", "hessian_path")]
    if not any(one is not None for one in told):
        filled["projection"] = "none"  # so small a model needs no projection, but a method may have its own
    return filled
