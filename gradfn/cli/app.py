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

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")

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
@o.takes(o.MODEL, o.DATASET, o.COLUMNS, o.WEIGHTS, o.QUERY, o.METHOD, o.OPTIMIZER, o.SCORE_PROJECTION,
         o.CURVATURE, o.FIT, o.UNIT, o.LOSS, o.QUERY_LOSS, o.LAYERS, o.BY, o.TABLE, o.OVERWRITE)  # fmt: skip
def score(run: o.ScoreRun = None, **options: Any) -> None:
    """Show which training rows made the model do this.

    For each query, its proponents and opponents. A positive score is a proponent: a training step on that row
    lowers the query's loss. Without arguments: the example inside the package, a tiny language model and the
    corpus that it learned.
    """
    from gradfn.cli.score import run_score

    run_score(run=run, **options)


@app.command()
@o.takes(o.MODEL, o.DATASET, o.COLUMNS, o.WEIGHTS, o.GRADIENTS, o.OVERWRITE)
def build(run: o.Run, **options: Any) -> None:
    """Write a store of per-example gradients.

    `gradfn query` searches it; `gradfn score --query-path` takes it as queries.
    """
    from gradfn.cli.build import run_build

    run_build(run=run, **options)


@app.command()
@o.takes(o.AGGREGATION, o.MODEL, o.DATASET, o.COLUMNS, o.WEIGHTS, o.GRADIENTS, o.OVERWRITE)
def reduce(run: o.Run, **options: Any) -> None:
    """Write the mean or sum of a query set's gradients.

    `gradfn score --query-path` and `gradfn query --query-path` take it as one query.
    """
    from gradfn.cli.build import run_reduce

    run_reduce(run=run, **options)


@app.command()
@o.takes(o.QUERY, o.STORED_MODEL, o.QUERY_SPLIT, o.COLUMNS, o.CURVATURE, o.UNIT, o.QUERY_LOSS, o.REFERENCE,
         o.QUERY_BY, o.TABLE, o.OVERWRITE)  # fmt: skip
def query(store: o.Store, **options: Any) -> None:
    """Search a store that `gradfn build` wrote.

    The search is exact. Model, layers, loss and transform are the store's.
    """
    from gradfn.cli.query import run_query

    run_query(store=store, **options)


@app.command()
@o.takes(o.KIND, o.MODEL, o.DATASET, o.COLUMNS, o.WEIGHTS, o.OPTIMIZER, o.SCORE_PROJECTION, o.FIT, o.LOSS,
         o.LAYERS, o.OVERWRITE)  # fmt: skip
def hessian(run: o.Run, **options: Any) -> None:
    """Fit a curvature over a dataset's gradients.

    `gradfn score`, `query`, `reduce` and `build` take it as --hessian-path.
    """
    from gradfn.cli.hessian import run_hessian

    run_hessian(run=run, **options)


@app.command()
@o.takes(o.MIX, o.OVERWRITE)
def mix(run: o.Run, query: o.FittedQuery, train: o.FittedTrain, **options: Any) -> None:
    """Mix two curvatures, a H_query + (1 - a) H_train.

    With TrackStar's a, directions that are common to all queries count less.
    """
    from gradfn.cli.hessian import run_mix

    run_mix(run=run, query=query, train=train, **options)


@app.command()
def info(run: o.Inspected) -> None:
    """Show what a run holds and how it was made."""
    from gradfn.cli.info import run_info

    run_info(run)


@app.command()
@o.takes(o.CHECKED, o.DATASET, o.COLUMNS, o.LAYERS)
def check(model: o.CheckedModel, **options: Any) -> None:
    """Show what is attributed, whether it is right, and how noisy.

    Coverage of all parameters; the engine against plain autograd; rows in batches against rows alone, and the
    precision against fp32, on a few rows of --dataset, or on random tokens.
    """
    from gradfn.cli.check import run_check

    run_check(model=model, **options)
