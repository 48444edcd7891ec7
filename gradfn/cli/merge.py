"""`gradfn merge`: the parts of an array job, or several stores, joined."""

from collections.abc import Sequence

from gradfn.cli.commands import MergeRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import check_run
from gradfn.report.summaries import Facts
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.runs.gradients import open_gradients
from gradfn.runs.joining import join_stores
from gradfn.runs.merge import BASIS, Joined, merge_run

AGAIN = "that was the first of two passes: run every shard of gradfn hessian again, then merge"


def run_merge(request: MergeRequest) -> None:
    """Join, report."""
    check_run(request.run)
    if request.stores:
        asked, overwrite = request.record()["request"], request.output.overwrite
        path = join_stores(request.run, request.stores, overwrite=overwrite, request=asked)
        with open_gradients(path) as store:
            console().print(facts([("store", f"{path} [{count(store.rows, 'row')}]")]))
        return
    joined = merge_run(request.run, overwrite=request.output.overwrite)
    again = [("next", AGAIN)] if any(one.kind == BASIS for one in joined) else []
    console().print(facts([*merged_facts(joined), *again]))


def merged_facts(joined: Sequence[Joined]) -> Facts:
    """What was made of how many parts."""
    labels = ("curvature" if one.kind in ("hessian", BASIS) else one.kind for one in joined)
    return [(label, f"{one.path} [{count(one.shards, 'shard')}]")
            for label, one in zip(labels, joined, strict=True)]  # fmt: skip
