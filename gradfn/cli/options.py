"""The vocabulary of the command line: every option, once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_DATA = "Data"
_MODEL = "Model"
_GRADIENTS = "Gradients"
_OUTPUT = "Output"


class Precision(StrEnum):
    """Dtype of the model; statistics are float32 or better in all of them."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


class Distribution(StrEnum):
    """Distribution of a random projection."""

    rademacher = "rademacher"
    gaussian = "gaussian"
    orthonormal = "orthonormal"


class Reduction(StrEnum):
    """How a document's loss comes from its positions."""

    mean = "mean"
    sum = "sum"


class Aggregated(StrEnum):
    """What becomes of the rows of a query set."""

    mean = "mean"
    sum = "sum"


class MethodName(StrEnum):
    """Recipes."""

    grad_dot = "grad_dot"
    grad_cosine = "grad_cosine"


def _option(*names: str, panel: str, help: str) -> typer.models.OptionInfo:
    return typer.Option(*names, rich_help_panel=panel, help=help, show_default=True)


Model = Annotated[str | None, _option("--model", panel=_MODEL, help="Local folder, .gguf file or hub name.")]
Precisions = Annotated[Precision, _option("--precision", panel=_MODEL, help="Dtype of the model's weights.")]
StoredModel = Annotated[
    str | None, _option("--model", panel=_MODEL, help="The store's model, if it lies elsewhere by now.")
]
StoredPrecision = Annotated[
    Precision | None,
    _option("--precision", panel=_MODEL, help="Dtype of the model's weights; the store's unless told."),
]
Device = Annotated[str, _option("--device", panel=_MODEL, help="cpu, cuda, cuda:1, ...")]
Dataset = Annotated[
    str | None,
    _option(
        "--dataset",
        panel=_DATA,
        help="Training rows: .jsonl .json .csv .parquet .arrow .txt, a save_to_disk folder, or a hub name.",
    ),
]
Split = Annotated[
    str, _option("--split", panel=_DATA, help='Split of --dataset, or a part of one: "train[:100]".')
]
QuerySplit = Annotated[
    str,
    _option("--split", panel=_DATA, help='Split of a dataset in --query, or a part of one: "test[:100]".'),
]
TextColumn = Annotated[str, _option("--text-column", panel=_DATA, help="Column with the text.")]
PromptColumn = Annotated[
    str | None, _option("--prompt-column", panel=_DATA, help="Column with prompts, which are not supervised.")
]
CompletionColumn = Annotated[
    str | None,
    _option("--completion-column", panel=_DATA, help="Column with completions: only they are supervised."),
]
Truncation = Annotated[
    bool, _option("--truncation", panel=_DATA, help="Cut documents that are longer than the model's context.")
]
TokenBatchSize = Annotated[
    int,
    _option("--token-batch-size", panel=_MODEL, help="Tokens a batch, padding included; changes no result."),
]
_SIDE = "Side of each layer's projected block; 0: none, the full gradient."
ProjectionDim = Annotated[int, _option("--projection-dim", panel=_GRADIENTS, help=_SIDE)]
ScoreProjectionDim = Annotated[
    int | None,
    _option("--projection-dim", panel=_GRADIENTS, help=f"{_SIDE} [default: 16; the example: 0]"),
]
Projection = Annotated[
    Distribution, _option("--projection", panel=_GRADIENTS, help="Distribution of the projection.")
]
Seed = Annotated[int, _option("--seed", panel=_GRADIENTS, help="Key of the projection.")]
UnitNormalize = Annotated[
    bool, _option("--unit-normalize", panel=_GRADIENTS, help="Scale every row's gradient to norm 1 (cosine).")
]
LossReduction = Annotated[
    Reduction, _option("--loss-reduction", panel=_GRADIENTS, help="Over a document's supervised tokens.")
]
Include = Annotated[
    list[str] | None,
    _option(
        "--include",
        panel=_GRADIENTS,
        help="Glob of layers to take; several may be given. All linear layers but the LM head, unless told.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    _option("--exclude", panel=_GRADIENTS, help="Glob of layers to leave out; several may be given."),
]
Query = Annotated[
    str | None,
    _option(
        "--query",
        panel=_DATA,
        help="A text in quotes, or a dataset of queries (a file, or a save_to_disk folder): its prompts and "
        "completions, or its texts.",
    ),
]
Completion = Annotated[
    str | None,
    _option("--completion", panel=_DATA, help="What follows the text of --query; only it is supervised."),
]
Method = Annotated[
    MethodName | None,
    _option("--method", panel=_GRADIENTS, help="A recipe: the inner product (the default), or the cosine."),
]
Aggregation = Annotated[
    Aggregated, _option("--aggregation", panel=_GRADIENTS, help="Of the rows' gradients.")
]
Top = Annotated[int, _option("--top", panel=_OUTPUT, help="Proponents and opponents to show of each query.")]
Csv = Annotated[Path | None, _option("--csv", panel=_OUTPUT, help="Write the table here too.")]
Jsonl = Annotated[Path | None, _option("--jsonl", panel=_OUTPUT, help="Write the table here too.")]
Parquet = Annotated[Path | None, _option("--parquet", panel=_OUTPUT, help="Write the table here too.")]
Overwrite = Annotated[
    bool, _option("--overwrite", panel=_OUTPUT, help="Replace what an earlier command wrote there.")
]
