"""`gradfn import` and `gradfn export`: gradients from other programs, and for them."""

from gradfn.cli.commands import ExportRequest, ImportRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import check_run
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.runs.exchange import export_gradients, import_bergson
from gradfn.runs.gradients import open_gradients


def run_import(request: ImportRequest) -> None:
    """Read, write, report."""
    check_run(request.run)
    path = import_bergson(request.index, request.run, overwrite=request.output.overwrite)
    with open_gradients(request.run) as store:
        rows = count(store.rows, "row")
    console().print(facts([("store", f"{path} [{rows}]")]))


def run_export(request: ExportRequest) -> None:
    """Read, write, report."""
    path = export_gradients(
        request.store, request.path, overwrite=request.output.overwrite, memory=request.memory << 20
    )
    console().print(facts([("file", f"{path} [{path.stat().st_size / 2**20:,.1f} MiB]")]))
