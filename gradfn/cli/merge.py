"""`gradfn merge`: the parts of an array job, joined."""

from gradfn.cli.commands import MergeRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import check_run
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.runs.merge import Joined, merge_run

AGAIN = "that was the first of two passes: run every shard of gradfn hessian again, then merge"


def run_merge(request: MergeRequest) -> None:
    """Join, report."""
    check_run(request.run)
    joined = merge_run(request.run, overwrite=request.output.overwrite)
    console().print(facts([line for one in joined for line in _lines(one)]))


def _lines(one: Joined) -> list[tuple[str, str]]:
    label = "curvature" if one.kind in ("hessian", "basis") else one.kind
    line = (label, f"{one.path} [{count(one.shards, 'shard')}]")
    return [line, ("next", AGAIN)] if one.kind == "basis" else [line]
