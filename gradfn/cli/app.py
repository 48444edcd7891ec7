"""The Typer application and how errors are told."""

import errno
import sys
from typing import Any

import typer

import gradfn
from gradfn.cli import options as o
from gradfn.errors import InputError, StorageError

app = typer.Typer(
    name="gradfn",
    help="Which training examples made the model do this? Start with `gradfn score`: without arguments it "
    "shows an example. Options may be spelled with - or _; --debug shows the traceback of an error.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)

STORE = typer.Argument(help="A run directory, or the store.h5 in it.")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
RUN = typer.Argument(
    help="The run directory to write; made if absent, resumed if it was made by the same command."
)


UsageError: Any = typer.BadParameter.__base__
"""What the parser raises; typer has it from click, or from a copy of click inside, and does not export it."""


def report(error: Exception) -> int:
    """Tell an error in one sentence; the exit status: 2 is the user's input, 1 is ours or the disk's."""
    from gradfn.cli.show import clean

    print(f"gradfn: {clean(_sentence(error))}", file=sys.stderr)
    return 2 if isinstance(error, InputError | UsageError) else 1


def _sentence(error: Exception) -> str:
    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx else "gradfn"  # pyright: ignore
        return f"{error.format_message().rstrip('.')}: see {command} --help"  # pyright: ignore
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, InputError | StorageError) or full:
        return str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return f"out of memory ({str(error) or 'RAM'}): lower --token-batch-size, or --projection-dim"
    return f"{type(error).__name__}: {error} (gradfn's fault: run again with --debug and tell us)"


def _version(wanted: bool) -> bool:
    if wanted:
        print(gradfn.__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _common(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """gradfn."""


@app.command()
def score(
    run: str | None = typer.Argument(
        None, help="The run directory to write scores.h5 to; none: only show them."
    ),
    model: o.Model = None,
    precision: o.Precisions = o.Precision.fp32,
    device: o.Device = "cpu",
    token_batch_size: o.TokenBatchSize = 4096,
    dataset: o.Dataset = None,
    split: o.Split = "train",
    text_column: o.TextColumn = "text",
    prompt_column: o.PromptColumn = None,
    completion_column: o.CompletionColumn = None,
    truncation: o.Truncation = False,
    query: o.Query = None,
    completion: o.Completion = None,
    query_path: str | None = typer.Option(
        None, "--query-path", rich_help_panel="Data", help="Query gradients that build or reduce wrote."
    ),
    method: o.Method = None,
    projection_dim: o.ScoreProjectionDim = None,
    projection: o.Projection = o.Distribution.rademacher,
    seed: o.Seed = 0,
    unit_normalize: o.UnitNormalize = False,
    loss_reduction: o.LossReduction = o.Reduction.mean,
    include: o.Include = None,
    exclude: o.Exclude = None,
    top: o.Top = 3,
    csv: o.Csv = None,
    jsonl: o.Jsonl = None,
    parquet: o.Parquet = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Show which training rows made the model do this.

    For each query, its proponents and opponents. A positive score is a proponent: a training step on that row
    lowers the query's loss. Without arguments: the example inside the package, a tiny language model and the
    corpus that it learned.
    """
    from gradfn.cli.score import run_score

    run_score(**locals())


@app.command()
def build(
    run: str = RUN,
    model: o.Model = None,
    precision: o.Precisions = o.Precision.fp32,
    device: o.Device = "cpu",
    token_batch_size: o.TokenBatchSize = 4096,
    dataset: o.Dataset = None,
    split: o.Split = "train",
    text_column: o.TextColumn = "text",
    prompt_column: o.PromptColumn = None,
    completion_column: o.CompletionColumn = None,
    truncation: o.Truncation = False,
    projection_dim: o.ProjectionDim = 16,
    projection: o.Projection = o.Distribution.rademacher,
    seed: o.Seed = 0,
    unit_normalize: o.UnitNormalize = False,
    loss_reduction: o.LossReduction = o.Reduction.mean,
    include: o.Include = None,
    exclude: o.Exclude = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Write a store of per-example gradients.

    `gradfn query` searches it; `gradfn score --query-path` takes it as queries.
    """
    from gradfn.cli.build import run_build

    run_build(**locals())


@app.command()
def reduce(
    run: str = RUN,
    aggregation: o.Aggregation = o.Aggregated.mean,
    model: o.Model = None,
    precision: o.Precisions = o.Precision.fp32,
    device: o.Device = "cpu",
    token_batch_size: o.TokenBatchSize = 4096,
    dataset: o.Dataset = None,
    split: o.Split = "train",
    text_column: o.TextColumn = "text",
    prompt_column: o.PromptColumn = None,
    completion_column: o.CompletionColumn = None,
    truncation: o.Truncation = False,
    projection_dim: o.ProjectionDim = 16,
    projection: o.Projection = o.Distribution.rademacher,
    seed: o.Seed = 0,
    unit_normalize: o.UnitNormalize = False,
    loss_reduction: o.LossReduction = o.Reduction.mean,
    include: o.Include = None,
    exclude: o.Exclude = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Write the mean or sum of a query set's gradients.

    `gradfn score --query-path` and `gradfn query --query-path` take it as one query.
    """
    from gradfn.cli.build import run_reduce

    run_reduce(**locals())


@app.command()
def query(
    store: str = STORE,
    query: o.Query = None,
    completion: o.Completion = None,
    query_path: str | None = typer.Option(
        None, "--query-path", rich_help_panel="Data", help="Query gradients that build or reduce wrote."
    ),
    model: o.StoredModel = None,
    precision: o.StoredPrecision = None,
    device: o.Device = "cpu",
    token_batch_size: o.TokenBatchSize = 4096,
    split: o.QuerySplit = "train",
    text_column: o.TextColumn = "text",
    prompt_column: o.PromptColumn = None,
    completion_column: o.CompletionColumn = None,
    truncation: o.Truncation = False,
    unit_normalize: o.UnitNormalize = False,
    top: o.Top = 3,
    csv: o.Csv = None,
    jsonl: o.Jsonl = None,
    parquet: o.Parquet = None,
    overwrite: o.Overwrite = False,
) -> None:
    """Search a store that `gradfn build` wrote.

    The search is exact. Model, layers, loss and transform are the store's.
    """
    from gradfn.cli.query import run_query

    run_query(**locals())


@app.command()
def info(run: str = typer.Argument(help="A run directory, or an .h5 file in it.")) -> None:
    """Show what a run holds and how it was made."""
    from gradfn.cli.info import run_info

    run_info(run)
