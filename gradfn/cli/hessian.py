"""`gradfn hessian` and `gradfn mix`: curvatures to disk."""

from typing import Any

from gradfn import curvature as kinds
from gradfn.cli import inputs
from gradfn.cli.show import console, count, facts, progress_bar
from gradfn.cli.stages import check_fit, load_stages
from gradfn.cli.tell import gradients_line, subject_facts
from gradfn.curvature import Curvature
from gradfn.errors import InputError
from gradfn.fold import passes
from gradfn.hf.datasets import load_rows
from gradfn.runs import hessian, mix_runs

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
    kind = str(options["kind"])
    if options["projection_dim"] is None:
        options["projection_dim"] = 16 if kind == "second_moment" else 0
    fold = getattr(kinds, kind)()
    rows = load_rows(options["dataset"], options["split"])
    options = {**options, "by": "example"}
    subject = inputs.load_subject(options)
    documents = inputs.load_documents(subject, rows, options)
    stages = load_stages(subject, {**options, **NONE_OF_THESE})
    where = {"path": inputs.anchored(options["dataset"]), "split": options["split"]}
    console().print(facts([*subject_facts(subject, documents), ("gradients", gradients_line(stages.base))]))
    total = int(documents.lengths.sum()) * passes(fold) * options["partitions"]
    with subject.multiplying(), progress_bar("curvature", total) as progress:
        fitted = hessian(
            options["run"], subject.model, documents, fold, stages.base, labels=str(options["labels"]),  # pyright: ignore
            seed=options["seed"], partitions=options["partitions"], overwrite=options["overwrite"],
            settings={**subject.settings(), **stages.settings, "data": where}, progress=progress,
            **subject.engine_options(),
        )  # fmt: skip
    console().print(facts(_facts(options["run"], fitted)))


def run_mix(**options: Any) -> None:
    """Mix, report."""
    inputs.check_run(options["run"])
    mixed, weight = mix_runs(
        options["run"], options["query"], options["train"], coefficient=options["coefficient"],
        components=options["target_downweight_components"], overwrite=options["overwrite"],
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
