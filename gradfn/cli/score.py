"""`gradfn score`: the main job."""

from dataclasses import replace
from pathlib import Path

from gradfn.cli.attribution import Job, Weighted, score_checkpoints, score_model
from gradfn.cli.baselines import baselines_of, check_baselines
from gradfn.cli.commands import ScoreRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, anchored, check_run, checked, with_example
from gradfn.cli.inrun import show_values
from gradfn.cli.magic import MAGIC, check_magic, remove_kept, with_magic
from gradfn.cli.method import recipe_of
from gradfn.cli.options import UNWEIGHTED, MethodOptions
from gradfn.cli.queries import answers_of, classes_of, load_all
from gradfn.cli.request import flag
from gradfn.cli.smoothness import known_smoothness
from gradfn.cli.source import SOURCE, check_source, score_source
from gradfn.cli.stages import projection_of
from gradfn.cli.trained import open_recorded, training_facts, unseen_facts, with_training
from gradfn.errors import InputError
from gradfn.evaluate.truth import CLASSES
from gradfn.hf.locate import locate_model
from gradfn.methods.attribution import times_doubt, weighted_sum
from gradfn.methods.recipes import Recipe
from gradfn.report.baselines import baseline_facts
from gradfn.report.exports import export_ranking
from gradfn.report.rankings import ShownQueries, print_rankings
from gradfn.report.rows import DocumentRows, LabelledRows, Ranked, loaded_rows
from gradfn.report.tables import facts
from gradfn.runs.processes import TOGETHER
from gradfn.store.directory import segments_of
from gradfn.train.run import INRUN
from gradfn.train.run import KIND as TRAINING
from gradfn.transforms import Chain
from gradfn.transforms.joint import joint


def run_score(request: ScoreRequest) -> None:
    """Load, score, show."""
    if request.method.name == INRUN:
        return show_values(request)
    check_run(request.run)
    _check_own(request.run)
    trained = None if request.method.training is None else open_recorded(request.method.training)
    if trained is not None:
        request = with_training(request, trained)
    elif request.model.path is None and request.data.dataset is None:
        request = with_example(request)
    check_magic(request, trained)
    request = checked(request, "give both --model and --dataset, or neither for the example")
    name, recipe = recipe_of(request)
    if trained is not None and name == MAGIC:
        recipe = with_magic(recipe, request, trained)
    check_source(request, name)
    _check_shard(request, name, recipe)
    curvature, masks = request.curvature.path, request.model.task == "masked_lm"
    projection = projection_of(request.gradients, request.seed, recipe.projection, curvature, masks)
    if recipe.criterion is not None and request.loss.criterion == "cross_entropy":
        request = replace(request, loss=replace(request.loss, criterion=recipe.criterion))
    _check_alone(request, projection)
    check_baselines(request)
    request.table.check(request.output.overwrite)
    weighted = weighted_of(request.method)
    joins = weighted[0][0] is not None or recipe.combine is not weighted_sum
    _check_shared(request, weighted, projection)
    _check_joined(request, recipe, weighted, joins)
    loaded, train, asked = load_all(request)
    if trained is not None:
        trained.check_rows(train)
        smooth = known_smoothness(trained, request) if name == MAGIC else []
        unseen = [] if asked is None else unseen_facts(train, asked.documents, loaded.reads.tokenizer)
        console().print(facts([*training_facts(trained, request.method), *smooth, *unseen]))
    job = Job(request, name, recipe, projection, train, asked)
    if name == SOURCE:
        shown, ranked = score_source(job, loaded, weighted)
    else:
        shown, ranked = score_checkpoints(job, loaded, weighted) if joins else score_model(job, loaded)
    if name == MAGIC:
        remove_kept(request.run)
    if ranked is not None:
        _show(job, loaded, shown, ranked)


def _show(job: Job, loaded: Loaded, shown: ShownQueries, ranked: Ranked) -> None:
    """Print the best rows of every query, and export them."""
    request, by = job.request, str(job.request.layers.by)
    known = loaded_rows(job.train, loaded.reads.tokenizer, by)
    if request.method.self_influence and request.model.task in CLASSES and isinstance(known, DocumentRows):
        known = LabelledRows(known.ids, known.texts, classes_of(loaded, job.train, [*ranked.asked(job.top)]))
    beside = baselines_of(job, loaded, shown)
    if beside:
        shown = replace(shown, beside=beside)
        console().print(facts(baseline_facts(beside, ranked, job.top)))
    table = print_rankings(
        console(), shown, ranked, known, job.top, show=request.table.show, answers=answers_of(loaded, shown),
        texts=loaded.reads.processor is None,
    )  # fmt: skip
    export_ranking(table, request.table.paths, by, [one.name for one in beside])


def weighted_of(method: MethodOptions) -> Weighted:
    """The checkpoints and their weights; None is the model itself."""
    paths, weights = method.checkpoints or (), method.checkpoint_weights
    if weights is None:
        return [(path, 1 / len(paths)) for path in paths] or [(None, 1.0)]
    if len(weights) != len(paths):
        raise InputError(
            f"{len(weights)} --checkpoint-weights for {len(paths)} --checkpoints: give one for each"
        )
    return list(zip(paths, weights, strict=True))


# --- what cannot be asked


def _check_own(run: str | None) -> None:
    """Refuse the directory of a training, whose checkpoints and values lie where those of scores would."""
    if run is None:
        return
    folder = Path(run)
    if (folder / f"{TRAINING}.h5").exists() or segments_of(folder, TRAINING):
        raise InputError(
            f"{run} holds a training: give the scores a directory of their own, or show what it measured "
            f"with --method {INRUN}"
        )
    if models := sorted(folder.glob("checkpoint-*/config.json")):
        raise InputError(
            f"{models[0].parent} is a checkpoint of a model, where scores at checkpoints would lie: give the "
            "scores a directory of their own"
        )


def _check_shard(request: ScoreRequest, name: str, recipe: Recipe) -> None:
    """Refuse a part that cannot be scored alone, or would be shown as if it were all."""
    if request.output.shard is None:
        return
    if request.run is None:
        raise InputError("--shard writes its part to a run directory: give RUN, the same to all shards")
    if given := request.gave("csv", "jsonl", "parquet"):
        raise InputError(
            f"a shard shows no table: leave out {given}, and give it to the command without --shard, "
            "after gradfn merge"
        )
    if recipe.curvature and request.curvature.path is None and TOGETHER.get() is None:
        raise InputError(
            f"{name} fits over all training rows, which a shard does not see: fit its curvature with gradfn "
            "hessian --shard and gradfn merge, and give it with --hessian-path; or leave out --shard"
        )


def _check_alone(request: ScoreRequest, projection: Chain) -> None:
    """Refuse queries beside --self, and blocks that are not told apart."""
    of_queries = ("query", "query_split", "query_path", "completion", "against", "query_token", "query_rows",
                  "group_column", "query_loss")  # fmt: skip
    if request.method.self_influence and (given := request.gave(*of_queries)):
        raise InputError(f"--self has no queries: leave out {given}")
    if request.layers.by_block and joint() in projection.stages:
        raise InputError(
            f"joint makes one block of all, which is not told apart by {request.layers.by}: leave one of "
            "them out"
        )


def _check_shared(request: ScoreRequest, weighted: Weighted, projection: Chain) -> None:
    """Refuse what was made of one model where several are scored."""
    if request.method.checkpoints is not None and any(hasattr(s, "path") for s in projection.stages):
        raise InputError(
            "pca and selective projections are fitted for one model: leave out --checkpoints, or take another"
        )
    if len({anchored(path) for path, _ in weighted if path is not None}) < 2:
        return
    for option, instead in (
        ("hessian_path", "leave it out, for a --method that fits a curvature at each"),
        ("query_path", "give the queries themselves with --query"),
        ("optimizer_state", "leave it out"),
    ):
        if given := request.gave(option):
            raise InputError(
                f"{given} is of one model, and --checkpoints are several: {instead}, or score each "
                "checkpoint by itself"
            )


def _check_joined(request: ScoreRequest, recipe: Recipe, weighted: Weighted, joins: bool) -> None:
    """Refuse checkpoints that are not there, and what joined scores cannot be told apart by."""
    for path, _ in weighted:
        if path is not None:
            locate_model(path)
    by = request.layers.by
    if by == "time" and (not joins or recipe.combine is not weighted_sum):
        raise InputError(
            "scores have parts over time where they are sums over checkpoints: give several --checkpoints, "
            "or --training, and --method tracin or source"
        )
    if request.layers.by_block and joins:
        raise InputError(f"joined scores are not told apart by {by}: use --by example or token")
    if recipe.combine is not times_doubt:
        return
    if request.loss.reduction == "sum":
        raise InputError(
            "trak weighs a row by 1 - p, of which a sum over many tokens leaves nothing: leave out "
            "--loss-reduction"
        )
    if by == "token":
        raise InputError("trak weighs whole rows by their loss: use --by example")
    for name in UNWEIGHTED:
        if getattr(request.data, name) is not None:
            raise InputError(
                "trak takes the probability of a row from its loss, which a weight would change: leave out "
                f"{flag(name)}"
            )
