"""From requests to values: the model under study, its documents, and what they were made from."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from gradfn import example
from gradfn.cli.commands import ModelRequest, QueryRequest, ScoreRequest
from gradfn.cli.console import console
from gradfn.cli.options import IMAGES, DataOptions, ModelOptions, check_losses
from gradfn.cli.request import flag_of
from gradfn.data import Corpus, Documents
from gradfn.engine.engine import probe_engine
from gradfn.engine.precision import Products, multiplying, products_of
from gradfn.engine.stream import pads
from gradfn.errors import InputError
from gradfn.hf.columns import with_weights
from gradfn.hf.datasets import load_split
from gradfn.hf.images import load_processor
from gradfn.hf.locate import has_no_tokenizer
from gradfn.hf.masking import masking_of
from gradfn.hf.models import check_device, infer_task, load_model, new_model, say_once
from gradfn.hf.reader import Reader
from gradfn.hf.sharded import load_sharded
from gradfn.hf.texts import begins_twice
from gradfn.hf.tokenizers import load_tokenizer
from gradfn.model.adapters import added_parameters
from gradfn.model.fingerprint import model_fingerprint
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.model.sites import View, output_head
from gradfn.model.spread import class_of
from gradfn.report.summaries import Facts, batches_facts, cut_facts, subject_facts
from gradfn.report.tables import facts
from gradfn.runs.processes import TURNS
from gradfn.runs.provenance import loss_source
from gradfn.store.directory import check_place
from gradfn.subject import Subject
from gradfn.types import LossFn

Settings = Mapping[str, Any]
Asking = TypeVar("Asking", bound=ModelRequest)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A subject that was loaded: where it is from, what reads its rows, and how it multiplies.

    Args:
        subject: the model with its losses and view.
        path: where the model is.
        reads: what makes tokens or pixels of rows.
        products: how float32 matrices are multiplied.
        reference: where the model is that kl compares with.
        revision: of the model on the hub.
        tokenizer: where it is, if not the model's.
        notes: what the first lines say of what was chosen for the user.
    """

    subject: Subject
    path: str
    reads: Reader
    precision: str = "fp32"
    products: Products = "ieee"
    reference: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    notes: tuple[tuple[str, str], ...] = ()

    def noting(self, *notes: tuple[str, str]) -> "Loaded":
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    @property
    def model(self) -> nn.Module:
        """The model that is attributed."""
        return self.subject.model

    @property
    def name(self) -> str:
        """What to call the model."""
        if anchored(self.path) == anchored(example.MODEL):
            return "the example inside gradfn"
        return self.path if self.revision is None else f"{self.path} at {self.revision}"

    @property
    def attention(self) -> str | None:
        """The kernel of attention that the model has, in transformers' words."""
        return getattr(self.model.config, "_attn_implementation", None)

    def multiplying(self) -> AbstractContextManager[None]:
        """Where gradients are made: float32 matrices are multiplied as the precision says."""
        return multiplying(self.products, next(self.model.parameters()).device)

    def introduce(self, train: Corpus, *lines: tuple[str, str], noun: str = "train") -> None:
        """Print the first lines of a command, and then what looking at the rows shows."""
        console().print(facts([*self._facts(train, noun), *lines]))
        with self.multiplying():
            engine = probe_engine(self.model, self.subject.loss, view=self.subject.view)
            found = batches_facts(pads(engine, train))
        if found:
            console().print(facts(found))

    def _facts(self, train: Corpus, noun: str) -> Facts:
        lines = subject_facts(
            self.name, self.subject, train, noun=noun, numbers=self.reads.numbers, products=self.products
        )
        if isinstance(train, Documents) and (twice := begins_twice(train, self.reads.tokenizer)):
            text = (
                f"{twice:,} of the rows begin with {self.reads.tokenizer.bos_token} twice, once in their text"
            )
            lines.append(("note", f"{text}: give --no-special-tokens to add none"))
        return [*self.notes, *lines]

    def settings(self) -> dict[str, Any]:
        """What a run records of it."""
        made = {
            "path": anchored(self.path), "precision": self.precision, "attention": self.attention,
            "fingerprint": model_fingerprint(self.model),
        }  # fmt: skip
        rounded = {} if self.products == "ieee" else {"products": self.products}
        at = {} if self.revision is None else {"revision": self.revision}
        reads = self.reads.settings()
        if self.tokenizer is not None:
            reads["tokenizer"]["path"] = anchored(self.tokenizer)
        return {"model": {**made, **rounded, **at}, **reads, "layers": self.subject.view.settings(),
                "loss": self.loss_settings(self.subject.loss)}  # fmt: skip

    def loss_settings(self, loss: LossFn) -> dict[str, Any]:
        """What a run records of a loss, and where its reference is."""
        known = loss_source(loss)
        if known.reference is None or self.reference is None:
            return known.to_json()
        return replace(known, reference=replace(known.reference, path=anchored(self.reference))).to_json()


def anchored(path: str | Path) -> str:
    """A path as settings record it: absolute where it is a local one, so that it can be found again."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


# --- what can be seen to be wrong before anything is loaded


def check_run(run: str | None) -> None:
    """Refuse a run that cannot be a directory."""
    if run == "":
        raise InputError("'' is not the directory of a run: give one that exists, or a new name")
    if run is not None:
        check_place(run)


def checked(request: Asking, why: str) -> Asking:
    """The request with its task; refuses one without model or dataset, and what does not go together."""
    for name, value in (("model", request.model.path), ("dataset", request.data.dataset)):
        if value is None:
            raise InputError(f"no --{name}: {why}")
    request, loss = with_task(request), request.loss
    losses = [name for name in (loss.criterion, request.query_loss) if name is not None]
    check_losses(str(request.model.task), losses, loss.label_smoothing, loss.reference)
    request.data.check(str(request.model.task), request.layers.by)
    return request


def check_trained(request: ModelRequest) -> None:
    """Refuse a precision in which models cannot be trained."""
    if (precision := request.model.precision) in ("bf16", "fp16"):
        raise InputError(
            f"--precision {precision} rounds most steps of training to nothing: give fp32, or tf32, whose "
            "weights are float32 too"
        )


def with_task(request: Asking) -> Asking:
    """The request with the task that the model was saved for, if none is given."""
    if request.model.task is not None:
        return request
    weights = request.new_weights is None
    task: Any = infer_task(str(request.model.path), request.model.revision, weights=weights)
    return replace(request, model=replace(request.model, task=task))


# --- the model


def load_subject(request: ModelRequest) -> Loaded:
    """Load the model and tokenizer that are asked for."""
    loss, layers = request.loss, request.layers
    how = {
        "name": request.model.task, "reduction": loss.reduction, "criterion": loss.criterion,
        "label_smoothing": loss.label_smoothing, "reference": None,
    }  # fmt: skip
    view = View(
        layers.include, layers.exclude, heads=layers.by == "head", tokens=layers.by == "token",
        biases=not layers.no_biases,
    )  # fmt: skip
    kl = loss.criterion == "kl"
    loaded = _loaded(
        request.model, how, view, loss.reference if kl else None, request.seed, request.new_weights
    )
    if not request.gave("task", "training") and anchored(loaded.path) != anchored(example.MODEL):
        kind = class_of(loaded.model).__name__
        loaded = loaded.noting(("task", f"{flag_of(loaded.reads.task)}, which a {kind} is for"))
    asked = request.query_loss or loss.criterion
    if asked == loss.criterion:
        return loaded
    reference = None
    if asked == "kl":
        reference = _load_reference(request.model, str(loss.reference), None, loaded.reads)
    query_loss = _make_loss(loaded.model, {**how, "criterion": asked}, reference)
    return replace(loaded, subject=replace(loaded.subject, query_loss=query_loss), reference=loss.reference)


def load_stored_subject(request: QueryRequest, path: str, settings: Settings) -> Loaded:
    """Load the model at a path as a store of its gradients records it, with the loss that queries have."""
    made, how = settings["model"], settings.get("loss")
    if how is None:
        raise InputError(
            "the store does not say which loss its rows have, because a loop of Python recorded it: ask it "
            "in Python, with gf.query"
        )
    if how["name"] == "masked_lm" and "masking" not in settings:
        raise InputError(
            f"the store of {path} does not say how its tokens were masked: make it again with gradfn build"
        )
    elsewhere = request.model.path is not None
    model = replace(
        request.model, path=path, task=how["name"],
        revision=request.model.revision or (None if elsewhere else made.get("revision")),
        tokenizer=request.model.tokenizer or settings.get("tokenizer", {}).get("path"),
        precision=request.model.precision or made.get("precision", "fp32"),
        attention=request.model.attention or made.get("attention"),
    )  # fmt: skip
    asked = {**how, "criterion": request.query.query_loss or how["criterion"]}
    reference = None
    if asked["criterion"] == "kl":
        reference = request.loss.reference or (how.get("reference") or {}).get("path")
    seed = settings["masking"]["seed"] if "masking" in settings else 0
    return _loaded(model, asked, View(**settings["layers"]), reference, seed)


def _loaded(
    options: ModelOptions,
    how: Settings,
    view: View,
    reference: str | None,
    seed: int,
    new_weights: int | None = None,
) -> Loaded:
    """A model with one loss, compared with a reference where one is given."""
    path, task, precision = options.path, str(options.task), options.precision or "fp32"
    if options.token_batch_size < 1:
        raise InputError(f"--token-batch-size must be 1 or more, not {options.token_batch_size}")
    if path is None:
        raise InputError("no model: give --model a local folder, a .gguf file or a hub name")
    if options.tokenizer is not None and task == IMAGES:
        raise InputError("images are no texts: leave out --tokenizer")
    products = _products(precision, options.device)
    say_once("bitsandbytes.autograd._functions")
    trusted = options.trust_remote_code
    hub: dict[str, Any] = {"revision": options.revision, "trust_remote_code": trusted}
    processor = load_processor(path, **hub) if task == IMAGES else None
    model = load_as_asked(path, options, task, options.revision, new_weights)
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=trusted)
    elif processor is None:
        tokenizer = load_tokenizer(path, vocabulary=getattr(model.config, "vocab_size", None), **hub)
    masking = _masking(path, tokenizer, seed) if task == "masked_lm" else None
    reads = Reader(model, task, tokenizer, processor, masking, special=not options.no_special_tokens)
    other = None
    if reference is not None:
        other = _load_reference(options, reference, how.get("reference"), reads)
    loss = _make_loss(model, how, other)
    subject = Subject(model, loss, view=view, token_batch_size=options.token_batch_size)
    return Loaded(subject, path, reads, precision, products, reference, options.revision, options.tokenizer)


def at_checkpoint(loaded: Loaded, path: str, options: ModelOptions) -> Loaded:
    """The same with a checkpoint's weights; the tokenizer is the model's.

    Raises:
        InputError: it is of another architecture, or has a tokenizer with another vocabulary.
    """
    model = load_as_asked(path, options, loaded.reads.task)
    shapes, others = _own_shapes(loaded.model), _own_shapes(model)
    differ = sorted(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
    if type(model) is not type(loaded.model) or differ:
        kind, other = type(loaded.model).__name__, type(model).__name__
        what = f"is a {other}, and the model a {kind}" if kind != other else f"differs in {differ[0]}"
        raise InputError(f"checkpoint {path} {what}: give checkpoints of the training of one model")
    own: Any = loaded.reads.tokenizer
    reads = own is not None and not loaded.reads.numbers and not has_no_tokenizer(path)
    trusted = options.trust_remote_code
    reads = reads and options.tokenizer is None
    theirs: Any = load_tokenizer(path, trust_remote_code=trusted) if reads else None
    if own is not None and theirs is not None and theirs.get_vocab() != own.get_vocab():
        raise InputError(
            f"checkpoint {path} has a tokenizer of another vocabulary than the model's: give checkpoints of "
            "the training of one model"
        )
    return replace(loaded, subject=loaded.subject.at(model), path=path, revision=None)


def _own_shapes(model: nn.Module) -> dict[str, Any]:
    """The shapes of a model's parameters by name, without those of adapters, which checkpoints may have."""
    added = added_parameters(model)
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): p.shape
        for name, p in model.named_parameters()
        if name not in added
    }


def _masking(path: str, tokenizer: Any, seed: int) -> dict[str, Any]:
    """What decides which tokens are masked."""
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"the tokenizer of {path} has no mask token, which masked-lm puts in the place of tokens: use "
            "another task, or a model that was trained with one"
        )
    return masking_of(tokenizer, seed)


def _products(precision: str, device: str) -> Products:
    """How float32 matrices are multiplied; what the device offers is asked only where it matters."""
    if precision != "tf32":
        return "ieee"
    check_device(device)
    return products_of(precision, torch.device(device))


def load_as_asked(
    path: str, options: ModelOptions, task: str, revision: str | None = None, new_weights: int | None = None
) -> nn.Module:
    """A model that can do the task, as the options say; tf32 is of products, not of weights.

    Args:
        new_weights: the seed of new ones; None: those of the model.
    """
    how: dict[str, Any] = {
        "precision": "fp32" if options.precision in ("tf32", None) else options.precision,
        "task": task, "revision": revision, "device": options.device,
        "attention": options.attention, "trust_remote_code": options.trust_remote_code,
    }  # fmt: skip
    if (turns := TURNS.get()) is not None:
        sharded = {name: value for name, value in how.items() if name != "task"}
        turns.attach(model := load_sharded(path, **sharded))
        return model
    model = load_model(path, **how) if new_weights is None else new_model(path, **how, seed=new_weights)
    config: Any = model.config
    if task == "regression" and config.num_labels != 1:
        raise InputError(
            f"{path} gives {config.num_labels} numbers and a regression one: use --task classification"
        )
    return model


def _make_loss(model: nn.Module, how: Settings, reference: nn.Module | None) -> LossFn:
    task, criterion, reduction = how["name"], how["criterion"], how["reduction"]
    smoothing = how["label_smoothing"] if criterion == "cross_entropy" else 0.0
    if task != "causal_lm":
        return model_loss(model, task, reduction, criterion=criterion, label_smoothing=smoothing)
    reference = reference if criterion == "kl" else None
    return causal_lm_loss(
        model, reduction, criterion=criterion, label_smoothing=smoothing, reference=reference
    )


def _load_reference(options: ModelOptions, path: str, recorded: Settings | None, reads: Reader) -> nn.Module:
    """The model that kl compares with; refused if its vocabulary is another, or it is not a store's."""
    reference = load_as_asked(path, options, "causal_lm")
    heads: Any = output_head(reference), output_head(reads.model)
    theirs, ours = (len(one.weight) for one in heads)
    how: dict[str, Any] = {"vocabulary": ours, "trust_remote_code": options.trust_remote_code}
    known = options.tokenizer is not None and has_no_tokenizer(path)
    if theirs != ours or not (
        known or load_tokenizer(path, **how).get_vocab() == reads.tokenizer.get_vocab()
    ):
        raise InputError(
            f"the reference {path} has another vocabulary than the model, or no tokenizer, and kl compares "
            "token by token: give one with the same tokenizer beside it"
        )
    if recorded is not None and recorded.get("fingerprint") not in (None, model_fingerprint(reference)):
        raise InputError(
            f"the store was made with the reference {recorded['path']}, whose weights were not those "
            f"of {path}: give the same with --reference"
        )
    return reference


# --- rows


def load_model_and_rows(request: ModelRequest) -> tuple[Loaded, Corpus]:
    """The model and the training rows; a wrong path of the rows is found before the model is loaded."""
    path, (rows, notes) = str(request.data.dataset), training_rows(request)
    loaded = load_subject(request).noting(*notes)
    docs = load_documents(loaded, rows, request.data, path)
    if not docs.supervised.any():
        raise InputError(
            f"no row of {path} has anything to supervise, so all gradients are zero: give rows of two tokens "
            "or more, with completions that are not empty"
        )
    return loaded, docs


def training_rows(request: ModelRequest) -> tuple[Any, Facts]:
    """The rows of --dataset; if nobody chose from several splits, a note for the first lines."""
    path, split = str(request.data.dataset), request.data.split
    rows, splits = load_split(path, split, revision=request.data.dataset_revision)
    if len(splits) == 1 or request.gave("split", "training"):
        return rows, []
    return rows, [("split", f"{split}, of {', '.join(splits)}: --split takes another")]


def load_documents(loaded: Loaded, rows: Any, data: DataOptions, path: str, *, query: bool = False) -> Corpus:
    """The rows of the dataset at a path; of training rows, with the weights that the options name."""
    docs = read_documents(loaded.reads, rows, data, path, query=query)
    say_cut(docs, path)
    return docs


def read_documents(reads: Reader, rows: Any, data: DataOptions, path: str, *, query: bool = False) -> Corpus:
    """The same by what reads them, without a word."""
    columns = data.columns(list(rows.column_names), query=query or reads.task == "seq2seq_lm")
    if reads.processor is not None:
        docs = reads.images(rows, path, data.image_column, data.label_column)
    else:
        docs = reads.rows(
            rows, columns, label_column=data.label_column, truncation=data.truncation,
            chunk_length=None if query else data.chunk_length,
        )  # fmt: skip
    if query or (data.reward_column is None and data.advantage_column is None):
        return docs
    asked = {key: columns.get(key) for key in ("prompt_column", "messages_column")}
    return with_weights(
        docs, rows, **asked, reward_column=data.reward_column, advantage_column=data.advantage_column
    )


def say_cut(docs: Corpus, path: str) -> None:
    """Say how many rows were cut, if any."""
    if lines := cut_facts(docs, path):
        console().print(facts(lines))


def recorded(request: ModelRequest) -> dict[str, Any]:
    """What a run records of where its training rows are, and of the request itself."""
    data = request.data
    known = {"path": anchored(str(data.dataset)), "split": data.split, "revision": data.dataset_revision}
    return {"data": known, **request.record()}


def with_example(request: ScoreRequest) -> ScoreRequest:
    """A request to score with the example's model, corpus and queries where none are given."""
    query, method, gradients = request.query, request.method, request.gradients
    if (
        query.query is None
        and query.query_path is None
        and query.query_rows is None
        and not method.self_influence
    ):
        query = replace(query, query=str(example.QUERIES))
    if method.name is None and not method.self_influence:
        gradients = replace(gradients, unit_normalize=True)
    if request.gave("method", "projection_dim", "projection", "hessian_path") is None:
        gradients = replace(gradients, projection="none")  # so small a model needs none
    return replace(
        request, query=query, gradients=gradients,
        model=replace(request.model, path=str(example.MODEL), task=request.model.task or "causal_lm"),
        data=replace(request.data, dataset=str(example.CORPUS), text_column="text"),
    )  # fmt: skip
