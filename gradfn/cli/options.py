"""The options of the command line, in groups that requests hold. Nothing here loads torch before it must."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gradfn.cli.request import OUTPUT, flag_of, found, option
from gradfn.cli.values import (
    STDOUT,
    dampings,
    device_named,
    dynamics,
    found_baseline,
    found_method,
    found_projection,
    paths,
    query_tokens,
    shard,
    steps,
    weights,
    written,
)
from gradfn.errors import InputError

if TYPE_CHECKING:
    from gradfn.hf.texts import Columns
    from gradfn.linalg.spectrum import Damping
    from gradfn.methods.dynamics import Dynamics
    from gradfn.runs.shards import Shard

Task = Literal[
    "causal_lm", "seq2seq_lm", "classification", "image_classification", "regression", "masked_lm"
]  # fmt: skip
Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp64"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
Criterion = Literal["cross_entropy", "log_odds", "kl"]
Reduction = Literal["mean", "sum"]
Kind = Literal["second_moment", "kfac", "ekfac", "shampoo", "eshampoo", "tkfac"]
Labels = Literal["data", "model"]
Product = Literal["fisher", "gauss_newton", "hessian"]
Adjoint = Literal["hessian", "gauss_newton"]
By = Literal["example", "module", "head", "time", "token"]
StoredBy = Literal["example", "head", "token"]
QueryBy = Literal["example", "module", "head", "token"]
Normalize = Literal["rows", "tokens"]

IMAGES = "image_classification"
"""The task whose rows are images."""
COMPONENTS = 1000
"""Directions that TrackStar counts less where no option says how many."""


# --- what is longer than a line

_DATASET = (
    "Training rows: .jsonl .json .csv .parquet .arrow .txt, a save_to_disk folder, a folder of images (a "
    "folder a class), or a hub name."
)
_IMAGES = "Column with images, or with their paths, relative to the dataset's."
_MESSAGES = (
    "Column with chats, lists of role and content, for the tokenizer's template; only the assistant is "
    "supervised."
)
_LABELS = "Column with what a row is to be mapped to: class numbers or names, or (regression) numbers."
_CHUNKS = "Cut texts into chunks of so many tokens; the chunks of row 17 are the rows 17:0, 17:1 and so on."
_REWARDS = "Column with rewards: a row's loss is multiplied by its reward less the mean of its prompt."
_QUERY = (
    "A text in quotes, or a dataset of queries (a file, or a save_to_disk folder): its prompts and "
    "completions, or its texts."
)
_AGAINST = (
    "What the model did not say: a dataset with as many rows as --query, or another completion. A query is "
    "the loss of its row less that of the row here."
)
_QUERY_TOKEN = (
    "Of every query only the N-th supervised token counts; -1 is the last; all: each is a query of its own."
)
_QUERY_ROWS = (
    "Training rows as queries, by their ids (numbers where there are none), with commas; a row is not shown "
    "for itself."
)
QUERY_SPLIT = 'Split of a dataset in --query, or a part of one: "test[:100]".'
_METHOD = (
    "grad_dot, grad_cosine, tracin, less, trackstar, logra, grass, factgrass, kfac, ekfac, shampoo, "
    "eshampoo, tkfac, relatif, trak, datainf, cg, lissa, ekfac_cg, astra, source (through the checkpoints of "
    "a training), magic (exact, back through the training of --training), inrun (what gradfn train RUN "
    "--values measured), or FILE.py:NAME for your own."
)
BM25, EMBEDDING = "bm25", "embedding"
_BASELINE = (
    "Show beside the scores what words or meaning alone find: bm25, or embedding:FOLDER of a model (mean of "
    "its last states, cosine); both may be given."
)
_SOLVES = "cg, lissa, ekfac_cg, astra"
_PRODUCT = f"{_SOLVES}: the curvature of the rows, exact and whole."
_CHECKPOINTS = (
    "Checkpoints of the model, separated by commas: their scores are joined (averaged, but by trak)."
)
_WEIGHTS = "A weight for each: its learning rate; in source the sum of those of the steps that it stands for."
_TRAINING = (
    "A run of gradfn train: its last checkpoint is the model, its rows are the dataset, read as then; tracin "
    "and source take all checkpoints, with the learning rates before each."
)
_SLOTS = "States of the training that magic keeps, in memory or RUN; fewer take more time, not other results."
_STEPS = "Only these steps of the training count, for magic: 100:200, or 100: for all from 100 on."
_ADJOINT = "What magic takes for the Hessian of a step; gauss_newton is biased, for trainings that are rough."
_SEGMENTS = "source: parts of the training, each with one curvature of the checkpoints in it."
_TRAINED = (
    "source: what the training stepped with: sgd, adam or adamw, and behind a colon its settings, such as "
    "sgd:momentum=0.9,weight_decay=0.01; learning_rate=0.1 where all steps had this one."
)
_OPTIMIZER = "Scale gradients as the optimizer does: its state_dict, a Trainer checkpoint, or safetensors."
PROJECTION = (
    "'gaussian:64x64' projects both sides of each layer's gradient, 'sjlt:4096' the flattened gradient; "
    "'mask:128x128 > sjlt:4096', 'joint > fjlt:2048', 'pca:64x64:RUN', 'selective:RUN', 'none'. Kinds: "
    "rademacher, gaussian, orthonormal, mask, sjlt, fjlt."
)
_DIM = (
    "16 is short for --projection rademacher:16x16 (or the kind that --projection names), but sides up to 16 "
    "stay; 0: the full gradient."
)
_HESSIAN = "A curvature that hessian or mix wrote: H^-1 on the queries, or (cosine) H^-1/2 on both sides."
_DAMPING = (
    "Of the curvature: 0.1 adds 0.1 mean(lambda); or absolute:, truncated:, tikhonov:, factored:NUMBER; "
    "several with commas. In datainf only one, which divides the scores and hardly changes their order."
)
_DIRECTIONS = "trackstar: directions of the queries to count less."
_INCLUDE = (
    "Glob of layers to take; several may be given. All weight matrices but the LM head and embeddings, "
    "unless told."
)
_BY = "What a score belongs to: a row, in all or by module or attention head too; or a token of a row."
_BY_TIME = f"{_BY[:-1]}; time: a row in all, and what each checkpoint (of inrun, each epoch) adds to it."

_STORED_BY = "What a gradient belongs to: a row and module; one attention head of it; a token of a row."
_SHARD = "I/N: do the I-th of N parts of the rows, or models, as an array's job; gradfn merge joins them."
_FSDP = "Under torchrun: hold one copy of the model in all processes together, 1/N in each (FSDP2)."

# --- groups

_TOKENIZER = "Folder or hub name of another tokenizer than the model's."
_PRECISION = "Dtype of the model's weights; tf32: fp32, multiplied on the device's TF32 or bf16 units."
_ATTENTION = "Kernel of attention; changes rounding, speed and memory."


@dataclass(frozen=True)
class ModelOptions:
    """The model, and how it runs."""

    PANEL: ClassVar[str] = "Model"
    path: str | None = option(None, "Local folder, .gguf file or hub name.", name="model", file=found)
    revision: str | None = option(None, "Branch, tag or commit of a --model on the hub.")
    task: Task | None = option(
        None, "What the model does with a row.", shown="what its config says that it was saved for"
    )
    tokenizer: str | None = option(None, _TOKENIZER, shown="the model's", file=found)
    precision: Precision | None = option("fp32", _PRECISION)
    attention: Attention | None = option(None, _ATTENTION, shown="what transformers takes")
    device: str = option("auto", "cpu, cuda, cuda:1; auto: a GPU where there is one.", parse=device_named)
    trust_remote_code: bool = option(False, "Run Python code that comes with models, once you have read it.")
    no_special_tokens: bool = option(False, "Add no special tokens to texts, which have their own.")
    token_batch_size: int = option(4096, "Tokens a batch with padding, or patches; changes no result.")
    threads: int | None = option(
        None, "Threads of the CPU; 1 is best beside other programs.", shown="all cores"
    )


STORED_MODEL: dict[str, Any] = {
    "path": option(None, "The store's model, if it lies elsewhere by now.", name="model", file=found),
    "revision": option(None, "Branch, tag or commit of a --model on the hub.", shown="the store's"),
    "task": None,
    "tokenizer": option(None, _TOKENIZER, shown="the store's", file=found),
    "precision": option(None, _PRECISION, shown="the store's"),
    "attention": option(None, _ATTENTION, shown="the store's"),
}
"""What a command says otherwise whose model is that of a store."""


@dataclass(frozen=True)
class DataOptions:
    """The training rows, and which of their columns are read."""

    PANEL: ClassVar[str] = "Data"
    dataset: str | None = option(None, _DATASET, file=found)
    dataset_revision: str | None = option(None, "Branch, tag or commit of a --dataset on the hub.")
    split: str = option("train", 'Split of --dataset, or a part of one: "train[:100]".')
    text_column: str = option("text", "Column with the text.")
    image_column: str | None = option(None, _IMAGES, shown="the only column of images, or image")
    prompt_column: str | None = option(None, "Column with prompts, which are not supervised.")
    completion_column: str | None = option(None, "Column with completions: only they are supervised.")
    messages_column: str | None = option(None, _MESSAGES, shown="messages, where there is no text")
    label_column: str | None = option(None, _LABELS, shown="of images, label")
    truncation: bool = option(False, "Cut documents that are longer than the model's context.")
    chunk_length: int | None = option(None, _CHUNKS, shown="whole texts")
    reward_column: str | None = option(None, _REWARDS)
    advantage_column: str | None = option(None, "Column with numbers that multiply the rows' losses.")

    def columns(self, names: list[str], *, query: bool) -> "Columns":
        """The columns to read: those given, else text, else prompt and completion (queries: these first).

        >>> DataOptions().columns(["prompt", "completion"], query=True)["prompt_column"]
        'prompt'
        """
        given: Columns = {
            "text_column": self.text_column,
            "prompt_column": self.prompt_column,
            "completion_column": self.completion_column,
        }
        pair: Columns = {"prompt_column": "prompt", "completion_column": "completion"}
        if self.messages_column is not None:
            return {**given, "messages_column": self.messages_column}
        if self.text_column != "text" and not query:  # what was asked for is read, or not there
            return given
        if self.label_column is not None or self.prompt_column or self.completion_column:
            return given
        if set(pair.values()) <= set(names) and (query or self.text_column not in names):
            return {**given, **pair}
        if "messages" in names and self.text_column not in names and "input_ids" not in names:
            return {**given, "messages_column": "messages"}
        return given

    def check(self, task: str, by: str | None = None) -> None:
        """Refuse columns that do not go together, or not with the task."""
        if task == IMAGES:
            return self._check_images(by)
        if self.image_column is not None:
            raise InputError(f"--image-column is for image-classification, not for {task}: give --task too")
        self._check_chunks(task)
        labelled = task in ("classification", "regression")
        if labelled and self.label_column is None:
            raise InputError(f"{task} needs to know its labels: give --label-column")
        if not labelled and self.label_column is not None:
            raise InputError(
                f"--label-column is for classification and regression, not for {task}: give --task too"
            )
        pair = self.prompt_column is not None or self.completion_column is not None
        if labelled and pair:
            raise InputError(f"{task} reads a text: give --text-column, not prompts and completions")
        if self.messages_column is not None and (pair or task != "causal_lm"):
            raise InputError(
                "--messages-column stands alone: leave out the columns of prompts and completions, and "
                "give no --task but causal-lm"
            )
        self._check_pair()
        if self.reward_column is not None and self.advantage_column is not None:
            raise InputError(
                "rewards or advantages weigh the rows: give --reward-column or --advantage-column"
            )
        if by == "token" and task == "seq2seq_lm":
            raise InputError("pairs of inputs and outputs have no tokens of a row: use --by example, or head")

    def _check_pair(self) -> None:
        """Refuse one side of prompts and completions without the other."""
        for given, missing in (("prompt", "completion"), ("completion", "prompt")):
            name = getattr(self, f"{given}_column")
            if name is not None and getattr(self, f"{missing}_column") is None:
                raise InputError(
                    f"--{given}-column {name} is half of a row: give --{missing}-column too (completions "
                    f"alone are supervised), or --text-column {name} to supervise these texts whole"
                )

    def _check_chunks(self, task: str) -> None:
        """Refuse chunks of what is not plain text."""
        if self.chunk_length is None:
            return
        whole = ("prompt_column", "completion_column", "messages_column", "label_column", "reward_column",
                 "advantage_column", "truncation")  # fmt: skip
        if given := [name for name in whole if getattr(self, name)]:
            raise InputError(
                f"--chunk-length cuts plain texts, and --{flag_of(given[0])} is of whole rows: leave one of "
                "them out"
            )
        if task not in ("causal_lm", "masked_lm"):
            raise InputError(f"--chunk-length cuts plain texts, and {task} is of whole rows: leave it out")
        if self.chunk_length < 2:
            raise InputError(f"--chunk-length must be 2 tokens or more, not {self.chunk_length}")

    def _check_images(self, by: str | None) -> None:
        """Refuse what goes with texts and not with images."""
        texts = ("prompt_column", "completion_column", "messages_column", "reward_column", "chunk_length")
        for name in texts:
            if getattr(self, name) is not None:
                raise InputError(f"images are no texts: leave out --{flag_of(name)}")
        if self.truncation:
            raise InputError("images are not cut, but made of one size: leave out --truncation")
        if by == "token":
            raise InputError("images have no tokens of a row: use --by example, module or head")


UNWEIGHTED: dict[str, Any] = {"reward_column": None, "advantage_column": None}
"""Rows that are read without weights."""


@dataclass(frozen=True)
class QueryOptions:
    """What the training rows are asked about."""

    PANEL: ClassVar[str] = "Query"
    query: str | None = option(None, _QUERY, file=found)
    completion: str | None = option(None, "What follows the text of --query; only it is supervised.")
    query_split: str | None = option(None, QUERY_SPLIT, shown="the only one")
    against: str | None = option(None, _AGAINST, file=found)
    query_token: int | Literal["all"] | None = option(None, _QUERY_TOKEN, parse=query_tokens)
    query_rows: tuple[str, ...] | None = option(None, _QUERY_ROWS, parse=paths, commas=True)
    query_path: str | None = option(None, "Query gradients that build or reduce wrote.", file=found)
    query_loss: Criterion | None = option(None, "Of the queries, if not that of the rows.", panel="Loss")
    group_column: str | None = option(None, "Column of --query: a group's queries are averaged to one.")


PLAIN_QUERY: dict[str, Any] = dict.fromkeys(("group_column", "against", "query_token", "query_rows"))
"""Queries that are asked as they are, each by itself."""


@dataclass(frozen=True)
class MethodOptions:
    """How rows are scored, at which checkpoints."""

    PANEL: ClassVar[str] = "Method"
    name: str | None = option(
        None, _METHOD, name="method", shown="grad_dot, or what other options say", file=found_method
    )
    self_influence: bool = option(
        False, "Instead of queries: rows' influence on themselves, for outliers.", name="self", panel="Query"
    )
    training: str | None = option(None, _TRAINING, file=found)
    steps: tuple[int, int | None] | None = option(None, _STEPS, parse=steps, shown="all")
    replay_slots: int | None = option(None, _SLOTS, shown="as many as fit")
    checkpoints: tuple[str, ...] | None = option(None, _CHECKPOINTS, parse=paths, commas=True, file=found)
    checkpoint_weights: tuple[float, ...] | None = option(
        None, _WEIGHTS, parse=weights, commas=True, shown="1 / number of checkpoints"
    )
    curvature: Adjoint = option("hessian", _ADJOINT)
    segments: int | None = option(None, _SEGMENTS, shown="3, or a checkpoint each")
    optimizer: "Dynamics | None" = option(None, _TRAINED, parse=dynamics, shown="sgd")
    baseline: tuple[str, ...] = option((), _BASELINE, file=found_baseline)
    normalize: Normalize = option("rows", "source: what a step took the mean over, as in gradfn train.")


@dataclass(frozen=True)
class GradientOptions:
    """What is done to every gradient before it is compared."""

    PANEL: ClassVar[str] = "Gradients"
    optimizer_state: str | None = option(None, _OPTIMIZER, file=found)
    projection: str | None = option(
        None,
        PROJECTION,
        shown="the curvature's, or else the method's, rademacher:16x16 or none",
        file=found_projection,
    )
    projection_dim: int | None = option(None, _DIM)
    unit_normalize: bool = option(False, "Scale every row's gradient to norm 1 (cosine).")


@dataclass(frozen=True)
class CurvatureOptions:
    """A curvature that was fitted before, and how it is damped."""

    PANEL: ClassVar[str] = "Curvature"
    path: str | None = option(None, _HESSIAN, name="hessian_path", file=found)
    damping: "tuple[Damping, ...] | None" = option(None, _DAMPING, parse=dampings, commas=True, shown="0.1")


@dataclass(frozen=True)
class FitOptions:
    """How a curvature is fitted."""

    PANEL: ClassVar[str] = "Curvature"
    labels: Labels = option("data", "Of curvatures: the data's, or drawn from the model with --seed.")
    partitions: int = option(1, "Fit curvatures in so many passes, with less memory; same result.")
    components: int = option(COMPONENTS, _DIRECTIONS, name="target_downweight_components")


@dataclass(frozen=True)
class SolverOptions:
    """How the methods cg, lissa, ekfac_cg and astra solve for queries."""

    PANEL: ClassVar[str] = "Curvature"
    product: Product | None = option(None, _PRODUCT, shown="fisher; ekfac_cg, astra: gauss_newton")
    iterations: int = option(100, f"{_SOLVES}: steps, each a pass over the rows or a minibatch of them.")
    tolerance: float = option(1e-3, f"{_SOLVES}: the residual, relative to the query, that is small enough.")
    scale: float | None = option(
        None, "lissa, astra: what a step is divided by.", shown="the largest eigenvalue"
    )
    minibatches: int | None = option(
        None, "lissa, astra: parts of the rows that steps take in turn.", shown="1; astra: of 256 rows each"
    )


@dataclass(frozen=True)
class LossOptions:
    """What is differentiated."""

    PANEL: ClassVar[str] = "Loss"
    criterion: Criterion = option("cross_entropy", "Loss of a position (or class).", name="loss")
    reference: str | None = option(None, "The model that kl compares with, of one vocabulary.", file=found)
    label_smoothing: float = option(0.0, "Share of cross-entropy's target that goes to all tokens alike.")
    reduction: Reduction = option("mean", "Over a document's supervised tokens.", name="loss_reduction")


def check_losses(
    task: str, losses: Sequence[str], label_smoothing: float = 0.0, reference: str | None = None
) -> None:
    """Refuse losses that do not go together."""
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


@dataclass(frozen=True)
class LayerOptions:
    """With respect to what, and how finely."""

    PANEL: ClassVar[str] = "Layers"
    include: tuple[str, ...] = option((), _INCLUDE)
    exclude: tuple[str, ...] = option((), "Glob of layers to leave out; several may be given.")
    by: By | None = option("example", _BY_TIME)
    no_biases: bool = option(False, "Leave out biases, which else are a column of their layer's gradient.")

    @property
    def by_block(self) -> bool:
        """Whether scores are told apart by block."""
        return self.by in ("module", "head")


STORED_BY: Any = option("example", _STORED_BY, type=StoredBy)
QUERY_BY: Any = option(None, _BY, shown="the store's", type=QueryBy)


@dataclass(frozen=True)
class TableOptions:
    """What is shown and exported."""

    PANEL: ClassVar[str] = OUTPUT
    top: int | None = option(3, "Proponents and opponents to show of each query.")
    show: int | None = option(5, "Queries to show; files have all of them.")
    memory: int = option(256, "MiB that rows and scores which are read from a run take at a time.")
    csv: Path | None = option(None, "Write the table here; - is stdout.", parse=Path, file=written)
    jsonl: Path | None = option(None, "Write the table here; - is stdout.", parse=Path, file=written)
    parquet: Path | None = option(None, "Write the table here.", parse=Path, file=written)

    @property
    def paths(self) -> dict[str, Path | None]:
        """Where the table is exported to."""
        return {"csv": self.csv, "jsonl": self.jsonl, "parquet": self.parquet}

    def check(self, overwrite: bool, *more: Path | None) -> None:
        """Refuse, before any work, a file that could not be written or would be replaced.

        Args:
            more: other files that are written.
        """
        if self.top is not None and self.top < 1:
            raise InputError(f"--top must be 1 or more, not {self.top}")
        if self.show is not None and self.show < 0:
            raise InputError(f"--show must be 0 or more, not {self.show}")
        if self.parquet == STDOUT:
            raise InputError("--parquet writes a file, not to stdout: give it a name, or --jsonl -")
        if not 1 <= self.memory < 1 << 32:
            raise InputError(f"--memory is MiB, 1 or more, not {self.memory}: give 256, say")
        given = [path for path in (*self.paths.values(), *more) if path is not None]
        if len({path.absolute() for path in given}) < len(given):
            raise InputError("two exports have the same path: give each a file of its own")
        for path in given:
            if path == STDOUT:
                continue
            if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
                raise InputError(
                    f"cannot write {path}: give a file in a folder that exists and can be written"
                )
            if path.exists() and not overwrite:
                raise InputError(f"{path} exists: give another name, or --overwrite to replace it")


@dataclass(frozen=True)
class RunOptions:
    """How a run directory is written."""

    PANEL: ClassVar[str] = OUTPUT
    shard: "Shard | None" = option(None, _SHARD, parse=shard)
    fsdp: bool = option(False, _FSDP)
    overwrite: bool = option(False, "Replace a table that is there, and a run that was made otherwise.")
