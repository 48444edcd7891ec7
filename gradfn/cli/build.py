"""`gradfn build` and `gradfn reduce`: gradients to disk."""

from typing import Any

from gradfn.cli.commands import BuildRequest, GradientsRequest, ReduceRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, check_run, checked, load_model_and_rows, recorded
from gradfn.cli.stages import dampings_of, load_stages, projection_of
from gradfn.data import Corpus
from gradfn.errors import InputError
from gradfn.report.progress import rows_bar
from gradfn.report.summaries import gradients_line, next_facts, shard_facts, size_facts, store_facts
from gradfn.report.tables import facts
from gradfn.runs import build, reduce
from gradfn.transforms import Chain


def run_build(request: BuildRequest) -> None:
    """Load, build, report."""
    loaded, documents, transform, settings = _prepared(request)
    shard, output = request.output.shard, request.output
    with loaded.multiplying(), rows_bar("gradients", documents, shard) as progress:
        summary = build(
            request.run, loaded.subject, documents, transform, settings=settings, shard=shard,
            overwrite=output.overwrite, progress=progress,
        )  # fmt: skip
    noun = "token" if loaded.subject.view.tokens else "row"
    console().print(facts([*store_facts(summary, noun), *next_facts(request.run, shard)]))


def run_reduce(request: ReduceRequest) -> None:
    """Load, reduce, report."""
    if request.layers.by == "token":
        raise InputError(
            "a mean over the tokens of all rows answers no question: reduce --by example or head, or build "
            "--by token"
        )
    loaded, documents, transform, settings = _prepared(request)
    with loaded.multiplying(), rows_bar("gradients", documents) as progress:
        summary = reduce(
            request.run, loaded.subject, documents, transform, aggregation=request.aggregation,
            settings=settings, overwrite=request.output.overwrite, progress=progress,
           
        )  # fmt: skip
    console().print(facts(store_facts(summary)))


def _prepared(request: GradientsRequest) -> tuple[Loaded, Corpus, Chain, dict[str, Any]]:
    """Model, documents and transform; what can be wrong with the request is found first."""
    check_run(request.run)
    request = checked(request, "gradients need a model and a dataset")
    if len(dampings_of(request.curvature)) > 1:
        raise InputError("gradients are written for one damping: give one, or several to score or query")
    gradients, masks = request.gradients, request.model.task == "masked_lm"
    projection = projection_of(gradients, request.seed, "rademacher:16x16", request.curvature.path, masks)
    loaded, documents = load_model_and_rows(request)
    stages = load_stages(loaded, projection, gradients.optimizer_state, request.curvature)
    transform = stages.query_side(gradients.unit_normalize)
    settings = {**loaded.settings(), **stages.settings, **recorded(request)}
    noun = "queries" if isinstance(request, ReduceRequest) else "train"
    lines = [*shard_facts(documents, request.output.shard), ("gradients", gradients_line(transform))]
    if isinstance(request, BuildRequest):
        lines += size_facts(loaded.subject, documents, transform, request.output.shard)
    loaded.introduce(documents, *lines, noun=noun)
    return loaded, documents, transform, settings
