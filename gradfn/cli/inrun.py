"""`gradfn score RUN --method inrun`: what a training measured, shown like any other scores."""

from dataclasses import replace

from gradfn.cli.commands import ScoreRequest
from gradfn.cli.console import console
from gradfn.cli.request import flag, slots_of
from gradfn.errors import InputError, LostFileError
from gradfn.report.exports import export_ranking
from gradfn.report.rankings import ShownQueries, print_rankings, ranks_needed
from gradfn.report.rows import Ranked, stored_rows
from gradfn.report.summaries import scores_facts
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.runs.provenance import Provenance
from gradfn.runs.scores import row_shares, score_chunks
from gradfn.scores import KIND, SHARES, columns_of, extremes
from gradfn.store import Store, open_store
from gradfn.store.directory import index_path
from gradfn.train.run import INRUN
from gradfn.train.run import KIND as TRAINING

ALLOWED = ("run", "method", "overwrite", "quiet", "threads")
"""Options that are not of the table and make sense where nothing is scored."""


def show_values(request: ScoreRequest) -> None:
    """Read the sums of the rows' values over the steps of a training, and show them."""
    run, top, by = _checked_run(request), request.table.top or 0, str(request.layers.by)
    request.table.check(request.output.overwrite)
    with _open_values(run) as store:
        how, columns = Provenance.of(store).method or {}, columns_of(store)
        lines = scores_facts(store.path, store.rows, len(columns.query_ids))
        steps = "every step" if how["every"] == 1 else f"every {how['every']:,} steps"
        lines.append(("method", f"{INRUN}, {how['kind']}, {steps}"))
        if by == "time" and not store.names(SHARES):
            raise InputError(
                f"the training in {run} has one epoch, and so no parts over time: leave out --by"
            )
        if zero := int(store.read("rows/zero").sum()):
            lines.append(("note", f"{count(zero, 'row')} have values of 0, as in steps that were not valued"))
        console().print(facts(lines))
        texts = columns.query_texts or [""] * len(columns.query_ids)
        best = Ranked(*extremes(score_chunks(run, memory=request.table.memory << 20), ranks_needed(top)))
        if by == "time":
            best = replace(best.with_shares(top, lambda row: row_shares(store, row)), in_order=True)
        table = print_rankings(
            console(), ShownQueries(columns.query_ids, texts), best,
            stored_rows(store, None, "example"), top, show=request.table.show,
        )  # fmt: skip
    export_ranking(table, request.table.paths, by)


def _checked_run(request: ScoreRequest) -> str:
    """The run; refuses options of scores that are computed."""
    slots = slots_of(ScoreRequest)
    for name in request.given:
        allowed = name in ALLOWED or slots[name].owner == "table"
        if name == "training":
            raise InputError(
                f"--method {INRUN} shows what a training measured: give its run as RUN, and no --training"
            )
        if not allowed and not (name == "by" and request.layers.by == "time"):
            raise InputError(
                f"{flag(name)} is of scores that are computed, and --method {INRUN} shows what a training "
                "measured: leave it out"
            )
    if not request.run:
        raise InputError(
            f"--method {INRUN} shows what a training measured: give the RUN of gradfn train RUN --values "
            "QUERIES"
        )
    return request.run


def _open_values(run: str) -> Store:
    """The scores that a training wrote.

    Raises:
        InputError: there is no training, it is not complete or measured nothing, or these are other scores.
    """
    with open_store(run, TRAINING) as store:
        trained = Provenance.of(store).settings()
    if "values" not in trained:
        raise InputError(
            f"the training in {run} measured no values of its rows: train again with --values QUERIES, into "
            "another directory"
        )
    path = index_path(run, KIND)
    if not path.exists():
        raise LostFileError(
            f"the values that the training in {run} measured are not summed: run the command that made it "
            "again, which does that alone",
            path,
        )
    with open_store(run, KIND) as store:
        made = store.settings
    if made.get("recipe") != INRUN or {**made, **trained} != made:
        raise InputError(
            f"{store.path} has other scores than the values of the training beside it: move it elsewhere, "
            "and run the command that made the training again, which writes them"
        )
    return store
