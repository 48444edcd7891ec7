"""The Typer application and how errors are told."""

import errno
import sys

import typer

import gradfn
from gradfn.cli import options as o
from gradfn.errors import InputError, StorageError

app = typer.Typer(
    name="gradfn",
    help="Which training examples made the model do this? Start with `gradfn score`: without arguments it "
    "shows an example. Options may be spelled with - or _; --debug shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)

STORE = typer.Argument(help="A run directory, or the store.h5 in it.")
RUN = typer.Argument(
    help="The run directory to write; made if absent, resumed if it was made by the same command."
)


def report(error: Exception) -> int:
    """Tell an error in one sentence; the exit status: 2 is the user's input, 1 is ours or the disk's."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, InputError | StorageError) or full:
        sentence = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    else:
        sentence = f"{type(error).__name__}: {error} (gradfn's fault: run again with --debug and tell us)"
    print(f"gradfn: {' '.join(sentence.split())}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1


def _version(wanted: bool) -> None:
    if wanted:
        print(gradfn.__version__)
        raise typer.Exit


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
    projection_dim: o.ProjectionDim = 16,
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
    """Show which training rows made the model answer a query: its proponents and opponents.

    A positive score is a proponent: a training step on that row lowers the query's loss. Without arguments:
    the example inside the package, a tiny language model and the corpus that it learned.
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
    """Write a store of per-example gradients, to be searched with `gradfn query`."""
    from gradfn.cli.build import run_build

    run_build(**locals())


@app.command()
def reduce(
    run: str = RUN,
    aggregation: str = typer.Option("mean", "--aggregation", help="mean or sum over the rows."),
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
    """Write the mean (or sum) of a query set's gradients, for `gradfn score --query-path`."""
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
    model: o.Model = None,
    precision: o.Precisions = o.Precision.fp32,
    device: o.Device = "cpu",
    token_batch_size: o.TokenBatchSize = 4096,
    split: o.Split = "train",
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
    """Search a store that `gradfn build` wrote, exactly; its model and settings are the store's."""
    from gradfn.cli.query import run_query

    run_query(**locals())


@app.command()
def info(run: str = typer.Argument(help="A run directory, or an .h5 file in it.")) -> None:
    """Show what a run holds and how it was made."""
    from gradfn.cli.info import run_info

    run_info(run)
