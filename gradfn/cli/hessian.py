"""`gradfn hessian` and `gradfn mix`: curvatures to disk."""

from typing import Any

from gradfn import statistics as kinds
from gradfn.cli.commands import HessianRequest, MixRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import check_run, checked, load_model_and_rows, recorded
from gradfn.cli.method import check_fit
from gradfn.cli.options import COMPONENTS
from gradfn.cli.stages import load_stages, projection_of
from gradfn.errors import InputError
from gradfn.report.progress import rows_bar
from gradfn.report.summaries import (
    Facts,
    curvature_facts,
    gradients_line,
    next_facts,
    shard_facts,
)
from gradfn.report.tables import facts
from gradfn.runs.curvatures import hessian, mix_runs
from gradfn.runs.merge import hessian_shard
from gradfn.runs.shards import Shard, shard_run
from gradfn.statistics.fold import passes


def run_hessian(request: HessianRequest) -> None:
    """Load, fit, report."""
    check_run(request.run)
    request = checked(request, "a curvature needs a model and a dataset")
    check_fit(request.fit, request.loss.criterion, request.loss.label_smoothing)
    default = "rademacher:16x16" if request.kind == "second_moment" else "none"
    projection, fold = projection_of(request.gradients, request.seed, default), getattr(kinds, request.kind)()
    loaded, documents = load_model_and_rows(request)
    shard, fit = request.output.shard, request.fit
    stages = load_stages(loaded, projection, request.gradients.optimizer_state)
    part = shard_facts(documents, shard)
    loaded.introduce(documents, *part, ("gradients", gradients_line(stages.base)))
    how: dict[str, Any] = {
        "labels": fit.labels, "seed": request.seed, "partitions": fit.partitions,
        "overwrite": request.output.overwrite, "shard": shard,
        "settings": {**loaded.settings(), **stages.settings, **recorded(request)},
    }  # fmt: skip
    whole = shard is None
    times, then = fit.partitions * (passes(fold) if whole else 1), "decompositions" if whole else ""
    bar = rows_bar("curvature", documents, shard, passes=times, then=then)
    given = request.run, loaded.subject, documents, fold, stages.base
    with loaded.multiplying(), bar as progress:
        if shard is None:
            lines = curvature_facts(request.run, hessian(*given, progress=progress, **how))
        else:
            done = hessian_shard(*given, progress=progress, **how)
            lines = _sums_facts(request.run, shard, done, passes(fold))
    console().print(facts(lines))


def _sums_facts(run: str, shard: Shard, done: int, passes: int) -> Facts:
    """Which sums are there, and what comes next."""
    which = f", pass {done} of {passes}" if passes > 1 else ""
    then = "" if done == passes else ", then every shard again"
    return [("sums", f"{shard_run(run, shard)}{which}"), *next_facts(run, shard, then)]


def run_mix(request: MixRequest) -> None:
    """Mix, report."""
    check_run(request.run)
    if request.coefficient is not None and request.components != COMPONENTS:
        raise InputError(
            "--coefficient is a weight, and --target-downweight-components chooses one: leave one of them out"
        )
    mixed, weight = mix_runs(
        request.run, request.query, request.train, coefficient=request.coefficient,
        components=request.components, settings=request.record(), overwrite=request.output.overwrite,
    )  # fmt: skip
    lines = [("mixed", f"{weight:.4g} of the queries', {1 - weight:.4g} of the training rows'")]
    console().print(facts([*lines, *curvature_facts(request.run, mixed)]))
