"""`gradfn hessian` and `gradfn mix`: curvatures to disk."""

from typing import Any

from gradfn import statistics as kinds
from gradfn.cli import inputs
from gradfn.cli.merge import next_facts, shard_facts, tokens_of
from gradfn.cli.projections import with_projection
from gradfn.cli.show import console, count, facts, progress_bar
from gradfn.cli.stages import COMPONENTS, check_fit, load_stages
from gradfn.cli.tell import gradients_line, subject_facts
from gradfn.errors import InputError
from gradfn.hf import load_rows
from gradfn.runs.curvatures import hessian, mix_runs
from gradfn.runs.merge import hessian_shard
from gradfn.runs.shards import Shard, parse_shard, shard_run
from gradfn.statistics import Curvature
from gradfn.statistics.fold import passes

NONE_OF_THESE = {"hessian_path": None, "damping": None}
"""A curvature is fitted without another one."""


def run_hessian(**options: Any) -> None:
    """Load, fit, report."""
    inputs.check_run(options["run"])
    inputs.check_options(options)
    for name in ("model", "dataset"):
        if options[name] is None:
            raise InputError(f"no --{name}: a curvature needs a model and a dataset")
    check_fit(options)
    shard, kind = parse_shard(options["shard"]), str(options["kind"])
    default = "rademacher:16x16" if kind == "second_moment" else "none"
    options = {**with_projection({**options, **NONE_OF_THESE}, default), "by": "example"}
    fold = getattr(kinds, kind)()
    rows = load_rows(options["dataset"], options["split"])
    subject = inputs.load_subject(options)
    documents = inputs.load_documents(subject, rows, options)
    stages = load_stages(subject, options)
    where = {"path": inputs.anchored(options["dataset"]), "split": options["split"]}
    lines = [*subject_facts(subject, documents), *shard_facts(documents, shard)]
    console().print(facts([*lines, ("gradients", gradients_line(stages.base))]))
    how = {
        "labels": str(options["labels"]), "seed": options["seed"], "partitions": options["partitions"],
        "overwrite": options["overwrite"],
        "settings": {**subject.settings(), **stages.settings, "data": where}, **subject.engine_options(),
    }  # fmt: skip
    total = tokens_of(documents, shard) * options["partitions"]
    given = options["run"], subject.model, documents, fold, stages.base
    if shard is not None:
        with subject.multiplying(), progress_bar("curvature", total) as progress:
            done = hessian_shard(*given, shard=shard, progress=progress, **how)
        console().print(facts(_shard_facts(options["run"], shard, done, passes(fold))))
        return
    with subject.multiplying(), progress_bar("curvature", total * passes(fold)) as progress:
        fitted = hessian(*given, progress=progress, **how)
    console().print(facts(_facts(options["run"], fitted)))


def _shard_facts(run: str, shard: Shard, done: int, passes: int) -> list[tuple[str, str]]:
    """Which sums are there, and what comes next."""
    which = f", pass {done} of {passes}" if passes > 1 else ""
    then = "" if done == passes else ", then every shard again"
    return [("sums", f"{shard_run(run, shard)}{which}"), *next_facts(run, shard, then)]


def run_mix(**options: Any) -> None:
    """Mix, report."""
    inputs.check_run(options["run"])
    components = options["target_downweight_components"]
    if options["coefficient"] is not None and components != COMPONENTS:
        raise InputError(
            "--coefficient is a weight, and --target-downweight-components chooses one: leave one of them out"
        )
    mixed, weight = mix_runs(
        options["run"], options["query"], options["train"], coefficient=options["coefficient"],
        components=components, overwrite=options["overwrite"],
    )  # fmt: skip
    lines = [("mixed", f"{weight:.4g} of the queries', {1 - weight:.4g} of the training rows'")]
    console().print(facts([*lines, *_facts(options["run"], mixed)]))


def _facts(run: str, fitted: Curvature) -> list[tuple[str, str]]:
    shape = f"{fitted.kind}, {count(len(fitted), 'block')}, {count(fitted.rows, 'row')}"
    largest = max(float(one.values.max()) for one in fitted.values())
    total = sum(float(one.values.sum()) for one in fitted.values())
    return [
        ("curvature", f"{run}/hessian.h5 [{shape}]"),
        ("eigenvalues", f"sum {total:.4g}, largest {largest:.4g}"),
    ]
