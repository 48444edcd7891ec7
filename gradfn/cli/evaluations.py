"""What `gradfn evaluate` is asked: a request each. Its docstring is the command's help."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gradfn.cli.options import QUERY_SPLIT, RunOptions, TableOptions
from gradfn.cli.request import Request, argument, found, group, option
from gradfn.cli.values import paths

SCORED = "What gradfn score RUN wrote"
ALONE: dict[str, Any] = {"shard": None, "fsdp": None}
"""A run that is not written in parts."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Request):
    """What every evaluation is asked."""

    table: TableOptions = group(TableOptions, top=None, show=None, memory=None)
    output: RunOptions = group(RunOptions, **ALONE)


@dataclass(frozen=True, kw_only=True)
class ComparisonRequest(EvaluateRequest):
    """What a comparison with retrained models is asked."""

    truth: tuple[str, ...] = argument(
        "What gradfn retrain wrote; several with commas, a row of the table each.", parse=paths, commas=True,
        file=found,
    )  # fmt: skip
    runs: tuple[str, ...] = argument(f"{SCORED}; several.", metavar="RUN", file=found)
    plot: Path | None = option(None, "Draw it here: a .png, .pdf or .svg.", parse=Path, file=os.path.abspath)
    seed: int = option(0, "Of intervals, and of the queries that dampings are chosen on.", panel="Evaluation")


@dataclass(frozen=True, kw_only=True)
class LdsRequest(ComparisonRequest):
    """Show the linear datamodeling score, beside the noise ceiling.

    For each query the rank correlation, over subsets, of the scores of a subset's rows with minus the loss of
    models trained on it. Of several dampings one is chosen, on queries that are not reported.
    """

    COMMAND: ClassVar[str] = "evaluate lds"


@dataclass(frozen=True, kw_only=True)
class LooRequest(ComparisonRequest):
    """Show the correlation with models retrained without one row.

    The truth is that of `gradfn retrain --leave-out 1`.
    """

    COMMAND: ClassVar[str] = "evaluate loo"


@dataclass(frozen=True, kw_only=True)
class ChangeRequest(ComparisonRequest):
    """Show predicted beside real changes of losses.

    The truth is that of `gradfn retrain --step S --scores RUN`, whose rows have other weights, or any other:
    the change of a query's loss is predicted as minus the sum of its scores times the change of each weight.
    Slope 1 means that scores are right in size, too. A step is the root mean square of the change of weights.
    """

    COMMAND: ClassVar[str] = "evaluate change"


@dataclass(frozen=True, kw_only=True)
class BrittlenessRequest(EvaluateRequest):
    """Show what removing each query's best rows does.

    Beside removing as many random ones: how far losses rise, and how many predictions of classes flip. The
    truth is that of `gradfn retrain --remove-top K --scores RUN`.
    """

    COMMAND: ClassVar[str] = "evaluate brittleness"
    truth: str = argument("What gradfn retrain wrote.", file=found)


@dataclass(frozen=True, kw_only=True)
class MislabelRequest(EvaluateRequest):
    """Show whether self-influence finds rows that are wrong.

    AUROC, average precision and precision at k.
    """

    COMMAND: ClassVar[str] = "evaluate mislabel"
    PANEL: ClassVar[str] = "Data"
    run: str = argument("What gradfn score RUN --self wrote.", file=found)
    dataset: str | None = option(None, "The rows that were scored.", shown="as recorded", file=found)
    split: str | None = option(None, "Split of a dataset.", shown="as recorded")
    label_column: str = option("is_wrong", "Column with 1 for a row that is wrong and 0 for a right one.")
    table: TableOptions = group(
        TableOptions,
        show=None,
        memory=None,
        top=option(None, "Rows of which the precision is told.", shown="as many as are wrong"),
    )


@dataclass(frozen=True, kw_only=True)
class RecallRequest(EvaluateRequest):
    """Show how often known sources are found.

    Recall at 1 and at --top, and the mean reciprocal rank.
    """

    COMMAND: ClassVar[str] = "evaluate recall"
    PANEL: ClassVar[str] = "Data"
    runs: tuple[str, ...] = argument(f"{SCORED}; several.", metavar="RUN", file=found)
    query: str | None = option(
        None, "The queries scored, with a column source: a row's id.", shown="as recorded", file=found
    )
    query_split: str | None = option(None, QUERY_SPLIT, shown="as recorded, or the only one")
    table: TableOptions = group(
        TableOptions, show=None, memory=None, top=option(5, "Rows among which a source counts as found.")
    )


@dataclass(frozen=True, kw_only=True)
class OverlapRequest(EvaluateRequest):
    """Show how far two runs agree.

    On the strongest proponents, and on the order of all rows.
    """

    COMMAND: ClassVar[str] = "evaluate overlap"
    run: str = argument(f"{SCORED}.", file=found)
    other: str = argument("Scores of the same rows and queries.", file=found)
    table: TableOptions = group(
        TableOptions, show=None, memory=None, top=option(10, "Proponents that are compared.")
    )
