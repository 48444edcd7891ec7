"""The Typer application and how errors are told."""

import errno
import re
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

FLAGS = {
    "with `overwrite=True`": "with --overwrite",
    "give `overwrite=True`": "add --overwrite",
    "`merge_run`": "gradfn merge",
    "`mask_run` wrote a mask": "gradfn mask fit made a mask",
    "without `shard`": "without --shard",
    "end the transform in `unit_normalize()`": "add --unit-normalize",
    "`View(tokens=False)`": "--by example",
    "without a projection, a unit norm and a curvature": "with --projection none, and without "
    "--unit-normalize and --hessian-path",
    "the same data and queries": "the same --dataset and --query",
    "the same data, queries and tokenizer": "the same --dataset, --query, columns and tokenizer",
}
"""What messages of the library say, and how the command line says it."""

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
        return _with_flags(str(error.strerror if isinstance(error, OSError) and error.strerror else error))
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return f"out of memory ({str(error) or 'RAM'}): lower --token-batch-size, or --projection-dim"
    return f"{type(error).__name__}: {error} (gradfn's fault: run again with --debug and tell us)"


def _with_flags(text: str) -> str:
    """A message of the library, in which arguments are named as the command line spells them."""
    text = re.sub(r"`shard=Shard\((\w+), (\w+)\)`", r"--shard \1/\2", text)
    for argument, flag in FLAGS.items():
        text = text.replace(argument, flag)
    return text


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
         o.CURVATURE, o.FIT, o.UNIT, o.LOSS, o.QUERY_LOSS, o.LAYERS, o.BY, o.TABLE, o.SHARD,
         o.OVERWRITE)  # fmt: skip
def score(run: o.ScoreRun = None, **options: Any) -> None:
    """Show which training rows made the model do this.

    For each query, its proponents and opponents. A positive score is a proponent: a training step on that row
    lowers the query's loss. Without arguments: the example inside the package, a tiny language model and the
    corpus that it learned.
    """
    from gradfn.cli.score import run_score

    run_score(run=run, **options)


@app.command()
@o.takes(o.MODEL, o.DATASET, o.COLUMNS, o.WEIGHTS, o.GRADIENTS, o.SHARD, o.OVERWRITE)
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
         o.LAYERS, o.SHARD, o.OVERWRITE)  # fmt: skip
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
@o.takes(o.OVERWRITE)
def merge(run: o.Merged, **options: Any) -> None:
    """Join the shards of an array job.

    What `--shard I/N` wrote becomes what one process would have written.
    """
    from gradfn.cli.merge import run_merge

    run_merge(run, **options)


_mask = typer.Typer(help="Selective masks of gradients.", rich_markup_mode=None)
app.add_typer(_mask, name="mask")


@_mask.command("fit")
@o.takes(o.KEEP, o.MASKED, o.STORES, o.OVERWRITE)
def mask_fit(run: o.Run, **options: Any) -> None:
    """Choose the coordinates of gradients that keep their inner products with queries.

    The gradients are those of a model, or stored ones. Other commands take the mask as --projection
    'selective:RUN', alone or with more behind it.
    """
    from gradfn.cli.mask import run_mask_fit

    run_mask_fit(run=run, **options)


evaluate = typer.Typer(help="Tell what scores are worth.", rich_markup_mode=None)
app.add_typer(evaluate, name="evaluate")


@evaluate.command()
@o.takes(o.EXPORTS, o.PLOT, o.RESAMPLING, o.OVERWRITE)
def lds(truth: o.Truth, runs: o.Scores, **options: Any) -> None:
    """Show the linear datamodeling score, beside the noise ceiling.

    For each query the rank correlation, over subsets, of the scores of a subset's rows with minus the loss of
    models trained on it. Of several dampings one is chosen, on queries that are not reported.
    """
    from gradfn.cli.evaluate import run_lds

    run_lds(truth=truth, runs=runs, **options)


@evaluate.command()
@o.takes(o.EXPORTS, o.PLOT, o.RESAMPLING, o.OVERWRITE)
def loo(truth: o.Truth, runs: o.Scores, **options: Any) -> None:
    """Show the correlation with models retrained without one row.

    The truth is that of `gradfn retrain --leave-out 1`.
    """
    from gradfn.cli.evaluate import run_loo

    run_loo(truth=truth, runs=runs, **options)


@evaluate.command()
@o.takes(o.EXPORTS, o.OVERWRITE)
def brittleness(truth: o.Truth, **options: Any) -> None:
    """Show what removing each query's best rows does.

    Beside removing as many random ones: how far losses rise, and how many predictions of classes flip. The
    truth is that of `gradfn retrain --remove-top K --scores RUN`.
    """
    from gradfn.cli.evaluate import run_brittleness

    run_brittleness(truth=truth, **options)


@evaluate.command()
@o.takes(o.WRONG, o.EXPORTS, o.OVERWRITE)
def mislabel(run: o.SelfScores, **options: Any) -> None:
    """Show whether self-influence finds rows that are wrong.

    AUROC, average precision and precision at k.
    """
    from gradfn.cli.evaluate import run_mislabel

    run_mislabel(run=run, **options)


@evaluate.command()
@o.takes(o.KNOWN, o.EXPORTS, o.OVERWRITE)
def recall(runs: o.Scores, **options: Any) -> None:
    """Show how often known sources are found.

    Recall at 1 and at --top, and the mean reciprocal rank.
    """
    from gradfn.cli.evaluate import run_recall

    run_recall(runs=runs, **options)


@evaluate.command()
@o.takes(o.AGREEMENT, o.EXPORTS, o.OVERWRITE)
def overlap(run: o.OneScores, other: o.OtherScores, **options: Any) -> None:
    """Show how far two runs agree.

    On the strongest proponents, and on the order of all rows.
    """
    from gradfn.cli.evaluate import run_overlap

    run_overlap(run=run, other=other, **options)


@app.command()
@o.takes(o.TRAINED, o.DATASET, o.COLUMNS, o.WEIGHTS, o.ASKED, o.LOSS, o.QUERY_LOSS, o.SUBSETS, o.RETRAINING,
         o.SHARD, o.OVERWRITE)  # fmt: skip
def retrain(truth: o.TruthRun, **options: Any) -> None:
    """Retrain models on subsets: the ground truth of attribution.

    Many models train at once. What is stored is the loss (of classes, the margin too) of every query under
    every model, which `gradfn evaluate` compares with scores. All parameters are trained, without dropout.
    """
    from gradfn.cli.retrain import run_retrain

    run_retrain(run=truth, **options)


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
