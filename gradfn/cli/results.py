"""What is asked of scores that are there: a page, and rows to keep. Their docstrings are the help."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from gradfn.cli.request import Request, argument, found, option

_OUTPUT = (
    "The file or folder to write, by its ending: .jsonl .json .csv .parquet .arrow, or none for a folder of "
    "`datasets`."
)


@dataclass(frozen=True, kw_only=True)
class SelectRequest(Request):
    """Write the rows of a dataset that scores say to keep.

    By one of three rules: a share of the rows, all but the worst, or the best of every query. Rows are
    written in their order, with all their columns and gradfn_row, gradfn_score and gradfn_rank. Of equal
    scores the row that comes first ranks first. With several queries a row is ranked by the mean of its
    scores, as if the loss of all queries was to fall. Of self-influence the lowest is best.
    """

    COMMAND: ClassVar[str] = "select"
    FIRST: ClassVar[tuple[str, ...]] = ("keep", "drop_worst", "top_per_query", "by", "output")
    run: str = argument("What gradfn score RUN wrote, or gradfn train RUN --values.", file=found)
    output: str | None = option(None, _OUTPUT, short="-o", file=os.path.abspath)
    keep: float | None = option(None, "Keep this share of the rows, rounded up: 0.8.")
    drop_worst: int | None = option(None, "Keep all rows but so many.")
    top_per_query: int | None = option(None, "Keep what is among so many best rows of any query.")
    by: str | None = option(None, "Column of the dataset: the rule holds within each of its values.")
    over: Literal["mean", "max"] = option("mean", "What ranks a row that has scores for several queries.")
    best: Literal["highest", "lowest"] | None = option(
        None, "Which scores are best.", shown="highest; of self-influence lowest"
    )
    damping: str | None = option(None, "Of scores at several dampings: the one to take, as it is spelled.")
    dataset: str | None = option(None, "The rows that were scored.", shown="as recorded", file=found)
    split: str | None = option(None, "Split of a dataset.", shown="as recorded")
    overwrite: bool = option(False, "Replace what is there.")


@dataclass(frozen=True, kw_only=True)
class ReportRequest(Request):
    """Write scores as a page for a browser, in one file.

    It shows every query with the model's own answer, its proponents and opponents, and where their scores
    come from. Several runs of the same rows and queries stand beside each other: other methods or
    checkpoints; runs by token, whose tokens are marked; runs by head, as maps. Rows that were scored against
    themselves can be ticked as wrong or right. The page needs no network, and reads without scripts too.
    """

    COMMAND: ClassVar[str] = "report"
    FIRST: ClassVar[tuple[str, ...]] = ("output", "top", "truth")
    runs: tuple[str, ...] = argument(
        "What gradfn score RUN wrote; several, of which the first is shown.", metavar="RUN", file=found
    )
    path: Path | None = option(
        None,
        "The page to write: page.html, say.",
        name="output",
        short="-o",
        parse=Path,
        file=os.path.abspath,
    )
    top: int = option(10, "Rows that each side of a query lists at first.")
    truth: str | None = option(
        None,
        "What gradfn retrain wrote: the changes that scores predict are drawn beside real ones.",
        file=found,
    )
    no_model: bool = option(False, "Load no model: the page has no answers, labels and marked tokens.")
    device: str = option("auto", "Where models run: cpu, cuda; auto: a GPU where there is one.")
    overwrite: bool = option(False, "Replace a page that is there.")
    serve: bool = option(False, "Show a store of gradfn build on this machine, with a box to ask it.")
    port: int = option(0, "Of --serve.", shown="a free one")
    unit_normalize: bool = option(False, "Of --serve: compare by cosines.")
