"""`gradfn build` and `gradfn reduce`: gradients to disk."""

from collections.abc import Sequence
from typing import Any

from gradfn.cli import inputs
from gradfn.cli.inputs import Options
from gradfn.cli.merge import next_facts, shard_facts, tokens_of
from gradfn.cli.projections import with_projection
from gradfn.cli.show import console, count, facts, progress_bar
from gradfn.cli.stages import dampings_of, load_stages
from gradfn.cli.tell import gradients_line, subject_facts, unprobed_facts
from gradfn.errors import InputError
from gradfn.hf import load_rows
from gradfn.runs.gradients import build, reduce
from gradfn.runs.rows import Summary
from gradfn.runs.shards import Shard, parse_shard
from gradfn.transforms import Chain


def _prepared(
    options: Options, shard: Shard | None = None
) -> tuple[inputs.Subject, Any, Chain, dict[str, Any]]:
    """Model, documents and transform; what can be wrong with the options is found first."""
    inputs.check_run(options["run"])
    inputs.check_options(options)
    for name in ("model", "dataset"):
        if options[name] is None:
            raise InputError(f"no --{name}: gradients need a model and a dataset")
    if len(dampings_of(options)) > 1:
        raise InputError("gradients are written for one damping: give one, or several to score or query")
    options = with_projection(options, "rademacher:16x16")
    rows = load_rows(options["dataset"], options["split"])
    subject = inputs.load_subject(options)
    documents = inputs.load_documents(subject, rows, options)
    stages = load_stages(subject, options)
    transform = stages.query_side(options["unit_normalize"])
    recorded = {
        **subject.settings(),
        **stages.settings,
        "data": {"path": inputs.anchored(options["dataset"]), "split": options["split"]},
    }
    lines = [*subject_facts(subject, documents), *shard_facts(documents, shard)]
    console().print(facts([*lines, ("gradients", gradients_line(transform))]))
    return subject, documents, transform, recorded


def _report(summary: Summary, noun: str = "row", then: Sequence[tuple[str, str]] = ()) -> None:
    notes = [("store", f"{summary.path} [{count(summary.rows, noun)}]")]
    if summary.resumed:
        notes.append(("resumed", f"from {count(summary.resumed, noun)} that were there already"))
    if summary.zero:
        notes.append(("note", f"{count(summary.zero, noun)} with a zero gradient"))
    console().print(facts([*notes, *unprobed_facts(summary.unprobed), *then]))


def run_build(**options: Any) -> None:
    """Load, build, report."""
    shard = parse_shard(options["shard"])
    subject, documents, transform, settings = _prepared(options, shard)
    with subject.multiplying(), progress_bar("gradients", tokens_of(documents, shard)) as progress:
        summary = build(
            options["run"], subject.model, documents, transform, settings=settings, shard=shard,
            overwrite=options["overwrite"], progress=progress, **subject.engine_options(),
        )  # fmt: skip
    _report(summary, "token" if subject.view.tokens else "row", next_facts(options["run"], shard))


def run_reduce(**options: Any) -> None:
    """Load, reduce, report."""
    if str(options["by"]) == "token":
        raise InputError(
            "a mean over the tokens of all rows answers no question: reduce --by example or head, or build "
            "--by token"
        )
    subject, documents, transform, settings = _prepared(options)
    with subject.multiplying(), progress_bar("gradients", int(documents.lengths.sum())) as progress:
        summary = reduce(
            options["run"], subject.model, documents, transform, aggregation=options["aggregation"].value,
            settings=settings, overwrite=options["overwrite"], progress=progress, **subject.engine_options(),
        )  # fmt: skip
    _report(summary)
