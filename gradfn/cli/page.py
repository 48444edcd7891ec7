"""`gradfn report`: scores as a page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gradfn.cli.beside import beside_of
from gradfn.cli.commands import spelled
from gradfn.cli.console import console
from gradfn.cli.evaluate import opened_truth, weights_of
from gradfn.cli.request import command_line
from gradfn.cli.results import ReportRequest
from gradfn.cli.serve import serve
from gradfn.errors import InputError
from gradfn.evaluate.change import agreement, changes
from gradfn.evaluate.scored import refuse_other_data, sides_of
from gradfn.report.evaluation import between
from gradfn.report.page import PageRun, check_page, open_page_run, write_page
from gradfn.report.pictures import Scatter, scatter_of
from gradfn.report.tables import facts
from gradfn.report.words import count, size_of


def run_report(request: ReportRequest) -> None:
    """Read the runs, load what they were made of, and write the page; or answer a browser."""
    if request.serve:
        return serve(request)
    if given := request.gave("port", "unit_normalize"):
        raise InputError(f"{given} is of --serve: leave it out")
    if request.path is None:
        raise InputError("the page has no name: give --output page.html")
    check_page(request.path, request.overwrite)
    runs = opened_runs(request)
    path = write_page(
        [with_beside(run, request) for run in runs], request.path, top=request.top,
        scatters=scatters_of(runs, request), command=command_line(ReportRequest, request.given),
        overwrite=request.overwrite,
    )  # fmt: skip
    rows, queries = len(runs[0].scores.row_ids), len(runs[0].scores.query_ids)
    of = f"{count(rows, 'row')}, {count(queries, 'query')}, {count(len(runs), 'run')}"
    console().print(facts([("page", f"{path} [{of}; {size_of(path.stat().st_size)}]")]))


def opened_runs(request: ReportRequest) -> list[PageRun]:
    """The runs without their models, each with a name of its own.

    Raises:
        InputError: a run is given twice, has no scores, or has other rows or queries than the first.
    """
    paths = request.runs
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"a run is given twice in {', '.join(paths)}: give each once")
    runs = [open_page_run(path) for path in paths]
    if len({run.scores.name for run in runs}) < len(runs):
        runs = [
            replace(run, scores=replace(run.scores, name=path)) for run, path in zip(runs, paths, strict=True)
        ]
    for run, path in zip(runs[1:], paths[1:], strict=True):
        refuse_other_data(sides_of(run.scores), runs[0].scores, path, paths[0])
    return runs


def with_beside(run: PageRun, request: ReportRequest) -> PageRun:
    """A run with its command, and with what its model and data say, unless no model is to be loaded."""
    command = spelled(run.store.request) if run.store.request else ""
    return replace(
        run, command=command, beside=beside_of(run, load=not request.no_model, device=request.device)
    )


def scatters_of(runs: Sequence[PageRun], request: ReportRequest) -> list[Scatter]:
    """Predicted and real changes of every run and damping, where there are retrained models.

    Raises:
        InputError: these are of other rows or queries, or nothing changes in them.
    """
    if request.truth is None:
        return []
    truth, made = opened_truth(request.truth), []
    if bool((truth.row_weights == 1).flatten(1).all(1).any()):
        truth = truth.whole_seeds()
    for run, path in zip(runs, request.runs, strict=True):
        scores = run.tokens or run.scores
        refuse_other_data(sides_of(scores), truth, path, request.truth)
        weights = weights_of(scores, truth, path, request.truth)
        for damping, values in zip(scores.dampings, scores.values, strict=True):
            found = changes(values, weights, truth.targets()[1])
            slope, correlation = agreement(found)
            words = [f"{one.value:.3f}" + (f" ({interval})" if (interval := between(one)) else "")
                     for one in (slope, correlation)]  # fmt: skip
            made.append(scatter_of(f"{scores.name} {damping}".strip(), found, *words))
    return made
