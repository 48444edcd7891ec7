"""`gradfn info`: what a run holds and how it was made."""

from pathlib import Path

from gradfn.cli.commands import InfoRequest
from gradfn.cli.console import console
from gradfn.cli.request import command_line
from gradfn.cli.rerun import recorded_request, spelled
from gradfn.report.runs import contents, part_facts
from gradfn.report.tables import facts
from gradfn.store.directory import index_path
from gradfn.store.reader import open_store

KINDS = ("store", "scores", "hessian", "basis", "mask", "truth")


def run_info(request: InfoRequest) -> None:
    """Show every index of the run, or the one file given, and which shards are there."""
    run, path = request.run, Path(request.run)
    if request.command:
        print(command_line(*recorded_request(run)))
        return
    shards = list(part_facts(run))
    kinds = [kind for kind in KINDS if path.is_file() or (path / f"{kind}.h5").exists()]
    if shards:
        console().print(facts(shards))
        if not kinds:
            return
    # Where there is no index, opening says why: unfinished, absent, or not a run.
    unfinished = [kind for kind in KINDS if any(path.glob(f"segments/{kind}-*"))]
    for kind in kinds[:1] if path.is_file() else kinds or unfinished[:1] or KINDS[:1]:
        with open_store(run, kind) as store:
            made = [("command", spelled(store.request))] if store.request else []
            console().print(facts([("file", str(index_path(run, kind))), *made, *contents(store)]))
