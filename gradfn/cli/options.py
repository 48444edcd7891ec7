"""The vocabulary of the command line: every option, once, in groups that commands take."""

import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

Group = Mapping[str, tuple[Any, Any]]
"""Options by the name of their parameter: the annotated type and the default."""


class Precision(StrEnum):
    """Of the model: its dtype, or fp32 with rounded products; statistics are float32 or better in all."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


class Attention(StrEnum):
    """Kernel of attention, by the names of transformers."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"
    flash_attention_3 = "flash_attention_3"


class Reduction(StrEnum):
    """How a document's loss comes from its positions."""

    mean = "mean"
    sum = "sum"


class Aggregated(StrEnum):
    """What becomes of the rows of a query set."""

    mean = "mean"
    sum = "sum"


class Kind(StrEnum):
    """Curvatures."""

    second_moment = "second_moment"
    kfac = "kfac"
    ekfac = "ekfac"
    shampoo = "shampoo"
    tkfac = "tkfac"


class LabelsOf(StrEnum):
    """Where a curvature's labels come from."""

    data = "data"
    model = "model"


class TaskName(StrEnum):
    """What the model was made for, which decides what a loss compares."""

    causal_lm = "causal_lm"
    seq2seq_lm = "seq2seq_lm"
    classification = "classification"
    image_classification = "image_classification"
    regression = "regression"
    masked_lm = "masked_lm"


class LossName(StrEnum):
    """What is computed of a position's logits."""

    cross_entropy = "cross_entropy"
    log_odds = "log_odds"
    kl = "kl"


class By(StrEnum):
    """How finely scores are told apart."""

    example = "example"
    module = "module"
    head = "head"
    token = "token"


class StoredBy(StrEnum):
    """How finely a store tells gradients apart; its blocks are modules in any case."""

    example = "example"
    head = "head"
    token = "token"


class OptimizerName(StrEnum):
    """Optimizers of retraining."""

    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"


class ScheduleName(StrEnum):
    """What the learning rate does after the warmup."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Init(StrEnum):
    """Where retraining starts."""

    given = "given"
    random = "random"


def _option(kind: Any, name: str, help: str) -> Any:
    return Annotated[kind, typer.Option(name, help=help, show_default=True)]


def takes(*groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of the groups, behind its own; they reach it as keywords.

    >>> @takes({"top": (int, 3)})
    ... def command(run: str, **options): ...
    >>> inspect.signature(command)
    <Signature (run: str, *, top: int = 3) -> None>
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for group in groups
            for name, (kind, default) in group.items()
        ]
        new = signature.replace(parameters=[*own, *added], return_annotation=None)
        annotations = {p.name: p.annotation for p in new.parameters.values()}
        # The parser reads the signature and the annotations, not the code.
        command.__signature__ = new  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {**annotations, "return": None}
        return command

    return decorate


Store = Annotated[str, typer.Argument(help="A run directory, or the store.h5 in it.")]
Run = Annotated[
    str,
    typer.Argument(
        help="The run directory to write; made if absent, resumed if it was made by the same command."
    ),
]
ScoreRun = Annotated[
    str | None, typer.Argument(help="The run directory to write scores.h5 to; none: only show them.")
]
TruthRun = Annotated[
    str, typer.Argument(help="The run directory to write truth.h5 to; resumed if the same command made it.")
]
CheckedModel = Annotated[str, typer.Argument(help="Local folder, .gguf file or hub name.")]
FittedQuery = Annotated[str, typer.Argument(help="The run directory of the queries' curvature.")]
FittedTrain = Annotated[str, typer.Argument(help="The run directory of the training rows' curvature.")]
Merged = Annotated[str, typer.Argument(help="The run directory that the shards were given.")]
Truth = Annotated[str, typer.Argument(help="What gradfn retrain wrote.")]
Scores = Annotated[list[str], typer.Argument(metavar="RUN", help="What gradfn score RUN wrote; several.")]
OneScores = Annotated[str, typer.Argument(metavar="RUN", help="What gradfn score RUN wrote.")]
OtherScores = Annotated[str, typer.Argument(metavar="OTHER", help="Scores of the same rows and queries.")]
SelfScores = Annotated[str, typer.Argument(metavar="RUN", help="What gradfn score RUN --self wrote.")]
Inspected = Annotated[str, typer.Argument(help="A run directory, or an .h5 file in it.")]

_PRECISION = "Dtype of the model's weights; tf32: fp32, multiplied on the device's TF32 or bf16 units"
_ATTENTION = "Kernel of attention; changes rounding, speed and memory."
MODEL: Group = {
    "model": (_option(str | None, "--model", "Local folder, .gguf file or hub name."), None),
    "task": (_option(TaskName, "--task", "What the model does with a row."), TaskName.causal_lm),
    "precision": (
        _option(Precision, "--precision", f"{_PRECISION}."),
        Precision.fp32,
    ),
    "attention": (
        _option(Attention | None, "--attention", f"{_ATTENTION} [default: what transformers takes]"),
        None,
    ),
    "device": (_option(str, "--device", "cpu, cuda, cuda:1, ..."), "cpu"),
    "token_batch_size": (
        _option(
            int,
            "--token-batch-size",
            "Tokens a batch, padding included, or patches of images; changes no result.",
        ),
        4096,
    ),
}
CHECKED: Group = {name: option for name, option in MODEL.items() if name != "model"}
STORED_MODEL: Group = {
    "model": (_option(str | None, "--model", "The store's model, if it lies elsewhere by now."), None),
    "precision": (
        _option(Precision | None, "--precision", f"{_PRECISION}. [default: the store's]"),
        None,
    ),
    "attention": (_option(Attention | None, "--attention", f"{_ATTENTION} [default: the store's]"), None),
    "device": MODEL["device"],
    "token_batch_size": MODEL["token_batch_size"],
}

DATASET: Group = {
    "dataset": (
        _option(
            str | None,
            "--dataset",
            "Training rows: .jsonl .json .csv .parquet .arrow .txt, a save_to_disk folder, a folder of "
            "images (a folder a class), or a hub name.",
        ),
        None,
    ),
    "split": (_option(str, "--split", 'Split of --dataset, or a part of one: "train[:100]".'), "train"),
}
QUERY_SPLIT: Group = {
    "split": (
        _option(str, "--split", 'Split of a dataset in --query, or a part of one: "test[:100]".'),
        "train",
    ),
}
COLUMNS: Group = {
    "text_column": (_option(str, "--text-column", "Column with the text."), "text"),
    "image_column": (
        _option(
            str | None,
            "--image-column",
            "Column with images, or with their paths, relative to the dataset's. [default: the only column "
            "of images, or image]",
        ),
        None,
    ),
    "prompt_column": (
        _option(str | None, "--prompt-column", "Column with prompts, which are not supervised."),
        None,
    ),
    "completion_column": (
        _option(str | None, "--completion-column", "Column with completions: only they are supervised."),
        None,
    ),
    "messages_column": (
        _option(
            str | None,
            "--messages-column",
            "Column with chats, lists of role and content, for the tokenizer's template; only the "
            "assistant is supervised. [default: messages, where there is no text]",
        ),
        None,
    ),
    "label_column": (
        _option(
            str | None,
            "--label-column",
            "Column with what a row is to be mapped to: class numbers or names, or (regression) numbers. "
            "[default, of images: label]",
        ),
        None,
    ),
    "truncation": (
        _option(bool, "--truncation", "Cut documents that are longer than the model's context."),
        False,
    ),
}
WEIGHTS: Group = {
    "reward_column": (
        _option(
            str | None,
            "--reward-column",
            "Column with rewards: a row's loss is multiplied by its reward less the mean of its prompt.",
        ),
        None,
    ),
    "advantage_column": (
        _option(str | None, "--advantage-column", "Column with numbers that multiply the rows' losses."),
        None,
    ),
}
QUERY: Group = {
    "query": (
        _option(
            str | None,
            "--query",
            "A text in quotes, or a dataset of queries (a file, or a save_to_disk folder): its prompts and "
            "completions, or its texts.",
        ),
        None,
    ),
    "completion": (
        _option(str | None, "--completion", "What follows the text of --query; only it is supervised."),
        None,
    ),
    "query_path": (
        _option(str | None, "--query-path", "Query gradients that build or reduce wrote."),
        None,
    ),
}

METHOD: Group = {
    "method": (
        _option(
            str | None,
            "--method",
            "grad_dot, grad_cosine, tracin, less, trackstar, logra, grass, factgrass, kfac, ekfac, shampoo, "
            "tkfac, relatif, trak, datainf, or FILE.py:NAME for your own. [default: grad_dot, or what other "
            "options say]",
        ),
        None,
    ),
    "self_influence": (
        _option(bool, "--self", "Instead of queries: each row's influence on itself, for outliers."),
        False,
    ),
    "group_column": (
        _option(str | None, "--group-column", "Column of --query: queries of a group are averaged to one."),
        None,
    ),
    "checkpoints": (
        _option(
            str | None,
            "--checkpoints",
            "Checkpoints of the model, separated by commas: their scores are joined (averaged, but by trak).",
        ),
        None,
    ),
    "checkpoint_weights": (
        _option(
            str | None,
            "--checkpoint-weights",
            "A weight for each checkpoint, such as its learning rate. [default: 1 / number of checkpoints]",
        ),
        None,
    ),
    "target_downweight_components": (
        _option(int, "--target-downweight-components", "trackstar: directions of the queries to count less."),
        1000,
    ),
}
KEEP: Group = {
    "keep": (
        _option(
            str, "--keep", "Coordinates: 128x128 of both sides of every block, or 4096 of each flattened one."
        ),
        "128x128",
    ),
    "rows": (_option(int, "--rows", "Training rows, and queries at most, to look at."), 512),
    "seed": (_option(int, "--seed", "Which rows, the noise of the start, and what masked-lm masks."), 0),
}
OPTIMIZER: Group = {
    "optimizer_state": (
        _option(
            str | None,
            "--optimizer-state",
            "Scale gradients as the optimizer does: its state_dict, a Trainer checkpoint, or safetensors.",
        ),
        None,
    ),
}
_HESSIAN = "A curvature that hessian or mix wrote: H^-1 on the queries, or (cosine) H^-1/2 on both sides."
_DAMPING = "Of the curvature: 0.1 adds 0.1 mean(lambda); or absolute:, truncated:, tikhonov:, factored:NUMBER"
DAMPING: Group = {
    "damping": (_option(str | None, "--damping", f"{_DAMPING}; several with commas. [default: 0.1]"), None),
}
CURVATURE: Group = {
    "hessian_path": (_option(str | None, "--hessian-path", _HESSIAN), None),
    **DAMPING,
}
FIT: Group = {
    "labels": (
        _option(LabelsOf, "--labels", "Of curvatures: the data's, or drawn from the model with --seed."),
        LabelsOf.data,
    ),
    "partitions": (
        _option(int, "--partitions", "Fit curvatures in so many passes, with less memory; same result."),
        1,
    ),
}
KIND: Group = {
    "kind": (_option(Kind, "--method", "What to fit."), Kind.second_moment),
}
MIX: Group = {
    "target_downweight_components": METHOD["target_downweight_components"],
    "coefficient": (
        _option(
            float | None, "--coefficient", "Weight of the queries' curvature. [default: TrackStar's choice]"
        ),
        None,
    ),
}
_PROJECTION = (
    "'gaussian:64x64' projects both sides of each layer's gradient, 'sjlt:4096' the flattened gradient; "
    "'mask:128x128 > sjlt:4096', 'joint > fjlt:2048', 'pca:64x64:RUN', 'selective:RUN', 'none'. Kinds: "
    "rademacher, gaussian, orthonormal, mask, sjlt, fjlt."
)
_OTHERWISE = "[default: the curvature's, or else rademacher:16x16]"
PROJECTION: Group = {
    "projection": (_option(str | None, "--projection", f"{_PROJECTION} {_OTHERWISE}"), None),
    "projection_dim": (
        _option(
            int | None,
            "--projection-dim",
            "16 is short for --projection rademacher:16x16 (or the kind that --projection names), but sides "
            "up to 16 stay; 0: the full gradient.",
        ),
        None,
    ),
    "seed": (_option(int, "--seed", "Key of the projection, and what masked-lm masks."), 0),
}
_METHODS = "[default: the curvature's, or else the method's, rademacher:16x16 or none]"
SCORE_PROJECTION: Group = {
    **PROJECTION,
    "projection": (_option(str | None, "--projection", f"{_PROJECTION} {_METHODS}"), None),
}
UNIT: Group = {
    "unit_normalize": (
        _option(bool, "--unit-normalize", "Scale every row's gradient to norm 1 (cosine)."),
        False,
    ),
}
REFERENCE: Group = {
    "reference": (
        _option(str | None, "--reference", "The model that kl compares with, of the same vocabulary."),
        None,
    ),
}
QUERY_LOSS: Group = {
    "query_loss": (
        _option(LossName | None, "--query-loss", "Loss of the queries, where it is not that of the rows."),
        None,
    ),
}
LOSS: Group = {
    "loss": (_option(LossName, "--loss", "Loss of a position (or class)."), LossName.cross_entropy),
    **REFERENCE,
    "label_smoothing": (
        _option(float, "--label-smoothing", "Share of cross-entropy's target that goes to all tokens alike."),
        0.0,
    ),
    "loss_reduction": (
        _option(Reduction, "--loss-reduction", "Over a document's supervised tokens."),
        Reduction.mean,
    ),
}
LAYERS: Group = {
    "include": (
        _option(
            list[str] | None,
            "--include",
            "Glob of layers to take; several may be given. All weight matrices but the LM head "
            "and embeddings, unless told.",
        ),
        None,
    ),
    "exclude": (
        _option(list[str] | None, "--exclude", "Glob of layers to leave out; several may be given."),
        None,
    ),
}

_BY = "What a score belongs to: a row, in all or by module or attention head too; or a token of a row."
BY: Group = {"by": (_option(By, "--by", _BY), By.example)}
STORED_BY: Group = {
    "by": (
        _option(
            StoredBy,
            "--by",
            "What a gradient belongs to: a row and module; one attention head of it; a token of a row.",
        ),
        StoredBy.example,
    ),
}
QUERY_BY: Group = {"by": (_option(By | None, "--by", f"{_BY} [default: the store's]"), None)}

TRAINED: Group = {name: option for name, option in MODEL.items() if name != "token_batch_size"}
ASKED: Group = {name: option for name, option in QUERY.items() if name != "query_path"}
SUBSETS: Group = {
    "subsets": (
        _option(
            int | None,
            "--subsets",
            "How many subsets of the rows to train on. [default: 50; with --leave-out 1, one a row]",
        ),
        None,
    ),
    "fraction": (_option(float | None, "--fraction", "Share of the rows in a subset. [default: 0.5]"), None),
    "leave_out": (
        _option(int | None, "--leave-out", "Instead of a share: rows to leave out; 1 leaves each out once."),
        None,
    ),
    "remove_top": (
        _option(
            str | None,
            "--remove-top",
            "Instead of subsets at random: all rows, all but each query's so many best, and controls: 10,20.",
        ),
        None,
    ),
    "scores": (_option(str | None, "--scores", "For --remove-top: the run of scores that says which."), None),
    "seeds": (_option(int, "--seeds", "Models of each subset, whose losses are averaged."), 2),
}
RETRAINING: Group = {
    "epochs": (_option(int, "--epochs", "Passes over a subset."), 3),
    "batch_size": (_option(int, "--batch-size", "Rows a step."), 8),
    "optimizer": (_option(OptimizerName, "--optimizer", "As in torch.optim."), OptimizerName.adamw),
    "learning_rate": (_option(float, "--learning-rate", "Before the schedule."), 1e-3),
    "momentum": (_option(float, "--momentum", "Of sgd."), 0.0),
    "weight_decay": (_option(float, "--weight-decay", "In the convention of the optimizer."), 0.0),
    "schedule": (
        _option(ScheduleName, "--schedule", "Of the learning rate after the warmup; down to 0."),
        ScheduleName.constant,
    ),
    "warmup": (_option(int, "--warmup", "Steps over which the learning rate rises from 0."), 0),
    "init": (
        _option(Init, "--init", "Start from the weights of --model, or from new ones of its architecture."),
        Init.given,
    ),
    "seed": (_option(int, "--seed", "Of subsets, data orders, new weights, and what masked-lm masks."), 0),
}
AGGREGATION: Group = {
    "aggregation": (_option(Aggregated, "--aggregation", "Of the rows' gradients."), Aggregated.mean),
}
SHARD: Group = {
    "shard": (
        _option(
            str | None,
            "--shard",
            "I/N: do the I-th of N parts of the rows, or models, as an array's job; gradfn merge joins them.",
        ),
        None,
    ),
}
OVERWRITE: Group = {
    "overwrite": (
        _option(bool, "--overwrite", "Replace a table that is there, and a run that was made otherwise."),
        False,
    ),
}
TABLE: Group = {
    "top": (_option(int, "--top", "Proponents and opponents to show of each query."), 3),
    "csv": (_option(Path | None, "--csv", "Write the table here too."), None),
    "jsonl": (_option(Path | None, "--jsonl", "Write the table here too."), None),
    "parquet": (_option(Path | None, "--parquet", "Write the table here too."), None),
}
EXPORTS: Group = {name: TABLE[name] for name in ("csv", "jsonl", "parquet")}
PLOT: Group = {"plot": (_option(Path | None, "--plot", "Draw it here: a .png, .pdf or .svg."), None)}
RESAMPLING: Group = {
    "seed": (_option(int, "--seed", "Of intervals, and of the queries that dampings are chosen on."), 0),
}
WRONG: Group = {
    "dataset": (_option(str | None, "--dataset", "The rows that were scored. [default: as recorded]"), None),
    "split": (_option(str | None, "--split", "Split of a dataset. [default: as recorded]"), None),
    "label_column": (
        _option(str, "--label-column", "Column with 1 for a row that is wrong and 0 for a right one."),
        "is_wrong",
    ),
    "top": (
        _option(int | None, "--top", "Rows of which the precision is told. [default: as many as are wrong]"),
        None,
    ),
}
KNOWN: Group = {
    "query": (
        _option(
            str | None,
            "--query",
            "The queries that were scored, with a column source: a row's id. [default: as recorded]",
        ),
        None,
    ),
    **QUERY_SPLIT,
    "top": (_option(int, "--top", "Rows among which a source counts as found."), 5),
}
AGREEMENT: Group = {"top": (_option(int, "--top", "Proponents that are compared."), 10)}
MASKED: Group = {
    **MODEL, **DATASET, **COLUMNS, **WEIGHTS, **ASKED, **OPTIMIZER, **LOSS, **QUERY_LOSS, **LAYERS,
}  # fmt: skip
"""Of a mask that is fitted to a model's gradients; stored ones have all of this behind them."""
STORES: Group = {
    "store": (
        _option(
            str | None,
            "--store",
            "Instead of a model and a dataset: the rows' whole gradients, which build wrote.",
        ),
        None,
    ),
    "query_path": QUERY["query_path"],
}
GRADIENTS: Group = {**OPTIMIZER, **PROJECTION, **CURVATURE, **UNIT, **LOSS, **LAYERS, **STORED_BY}
"""Of commands that write gradients."""
