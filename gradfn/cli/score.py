"""`gradfn score`: the main job."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count as counting
from math import isfinite
from pathlib import Path
from typing import Any

from torch import Tensor

from gradfn.cli import inputs
from gradfn.cli.inputs import Options, Subject
from gradfn.cli.merge import next_facts, shard_facts, tokens_of
from gradfn.cli.projections import with_projection
from gradfn.cli.queries import (
    Queries,
    check_groups,
    check_stored,
    load_queries,
    query_documents,
    query_rows_of,
    self_query,
)
from gradfn.cli.rows import Ranked, loaded_rows
from gradfn.cli.show import check_exports, console, count, facts, progress_bar
from gradfn.cli.stages import Stages, load_stages, recipe_of
from gradfn.cli.tell import (
    check_top,
    gradients_line,
    ranks_needed,
    show_all,
    subject_facts,
    unprobed_facts,
)
from gradfn.data import Corpus
from gradfn.engine.cache import CachedRows
from gradfn.engine.engine import Engine, probe_engine
from gradfn.engine.stream import Progress, gather, stream_to_host
from gradfn.errors import InputError
from gradfn.hf import load_rows
from gradfn.hf.locate import locate_model
from gradfn.methods.inner_product import InnerProduct, on_device_of
from gradfn.methods.recipes import RECIPES, Persist, Problem, Recipe, times_doubt, weighted_sum
from gradfn.methods.scoring import extremes_of
from gradfn.runs.curvatures import hessian
from gradfn.runs.provenance import Provenance
from gradfn.runs.rows import Summary, unprobed
from gradfn.runs.scores import damping_names, score_run, write_scores
from gradfn.runs.shards import Shard, parse_shard, shard_run
from gradfn.scores import SHARES, Columns, extremes
from gradfn.statistics import Curvature
from gradfn.store import Overwrite, open_part, open_store
from gradfn.transforms import Transform, chain
from gradfn.transforms.joint import joint
from gradfn.types import Data, Rows


def run_score(**options: Any) -> None:
    """Load, score, show."""
    inputs.check_run(options["run"])
    inputs.check_options(options)
    is_example = options["model"] is None and options["dataset"] is None
    options = inputs.example_options(options) if is_example else options
    if options["model"] is None or options["dataset"] is None:
        lacking = "--model" if options["model"] is None else "--dataset"
        raise InputError(f"no {lacking}: give both --model and --dataset, or neither for the example")
    name, recipe = recipe_of(options)
    shard = _shard_of(options, name, recipe)
    options = _with_defaults(options, recipe)
    if str(options["by"]) in ("module", "head") and joint() in options["projection"].stages:
        raise InputError(
            f"joint makes one block of all, which is not told apart by {options['by']}: leave one of them out"
        )
    check_top(options["top"])
    check_exports([options["csv"], options["jsonl"], options["parquet"]], options["overwrite"])
    weighted = checkpoints_of(options)
    _check_shared(options, weighted)
    _check_joined(options, recipe, weighted)
    query_rows = None if options["self_influence"] else query_rows_of(options)
    check_groups(query_rows, options["group_column"])
    rows = load_rows(options["dataset"], options["split"])
    subject = inputs.load_subject(options)
    train = inputs.load_documents(subject, rows, options)
    asked = query_documents(subject, query_rows, options)
    case = Case(options, name, recipe, train, asked, query_rows, shard)
    if _joins(recipe, weighted):
        queries, ranked = _checkpoints(case, subject, weighted)
    else:
        queries, ranked = _one_checkpoint(case, subject)
    if ranked is None:
        return
    by = str(options["by"])
    show_all(console(), subject, loaded_rows(train, subject.tokenizer, by), queries, ranked, by, options)


@dataclass(frozen=True, eq=False)
class Case:
    """What is asked, of whatever checkpoint.

    Args:
        options: as given, with the method's defaults.
        name, recipe: the method.
        train: the training rows.
        asked: the queries' tokens, where there are any.
        query_rows: the dataset that they come from.
        shard: the part of the rows to score, where it is not all of them.
    """

    options: Options
    name: str
    recipe: Recipe
    train: Corpus
    asked: Corpus | None
    query_rows: Any | None
    shard: Shard | None = None

    @property
    def by_block(self) -> bool:
        """Whether scores are told apart by block."""
        return str(self.options["by"]) in ("module", "head")

    def prepare(self, subject: Subject, run: str | None) -> tuple[Queries, InnerProduct, Data, Provenance]:
        """The queries' gradients, the method, the rows, and what a run records of them, for one checkpoint.

        Args:
            run: the checkpoint's own run directory, which keeps the curvature that the method fits.
        """
        options = self.options
        stages = load_stages(subject, options, fitted=self.recipe.curvature)
        wanted = {**subject.settings(), "transform": stages.base.settings()}
        told = ("method", f"{self.name}, {gradients_line(stages.base)}")
        rows = [*subject_facts(subject, self.train), *shard_facts(self.train, self.shard)]
        console().print(facts([*rows, told, *self._unlike_less()]))
        train = CachedRows(self.train, stages.base)
        method = self._method(subject, stages, wanted, train, run)
        if lines := self._unlike_trackstar(stages, method):
            console().print(facts(lines))
        if options["self_influence"]:
            queries = self_query()
        else:
            queries, method = load_queries(subject, self.query_rows, self.asked, options, method, wanted)
        known = {"recipe": self.name, **self._own(method, stages), **stages.settings, **queries.settings,
                 **self._data()}  # fmt: skip
        return queries, method, train, Provenance.of(subject.settings()).merged(known)

    def _method(
        self, subject: Subject, stages: Stages, wanted: dict[str, Any], train: Data, run: str | None
    ) -> InnerProduct:
        """The recipe's method; what it will not go with is refused before a curvature is fitted."""
        fits = self.recipe.curvature and stages.curvature is None and self.name in RECIPES
        if fits and self.options["query_path"] is not None:
            check_stored(self.options["query_path"], wanted, self.name)
        with subject.multiplying():
            method = self.recipe.method(self._problem(subject, stages, train, run))
        if not isinstance(method, InnerProduct):
            raise InputError(f"{self.name} gives no inner product of gradients: call gf.score in Python")
        if stages.curvature is not None and method.curvature is not stages.curvature:
            raise InputError(
                f"{self.name} takes no curvature that was fitted before: leave out --hessian-path"
            )
        if self.options["self_influence"] and (method.norm != "none" or method.solve):
            raise InputError(
                f"{self.name} gives no self-influence, having a norm or solving for queries: choose "
                "grad_dot, or a curvature"
            )
        return method

    def _own(self, method: InnerProduct, stages: Stages) -> dict[str, Any]:
        """What tells a recipe of somebody's own from another of its name, and what a solution may look at."""
        if self.recipe.file is None:
            return {}
        told: dict[str, Any] = {"file": self.recipe.file}
        query = chain(method.query_transform).settings()
        if query != chain(method.row_transform).settings():
            told["query"] = query
        if method.solve is not None:
            told |= {"dampings": list(map(str, stages.dampings)), "labels": self.options["labels"].value,
                     "seed": self.options["seed"],
                     "components": self.options["target_downweight_components"]}  # fmt: skip
        return {"method": told}

    def _unlike_less(self) -> list[tuple[str, str]]:
        """A note where LESS is not what its paper has."""
        if self.name != "less" or self.options["optimizer_state"] is not None:
            return []
        return [("note", "no --optimizer-state, so rows are not scaled by Adam's moments, as LESS has them")]

    def _unlike_trackstar(self, stages: Stages, method: InnerProduct) -> list[tuple[str, str]]:
        """A note where there are fewer directions than TrackStar is to count less."""
        H, components = method.curvature, self.options["target_downweight_components"]
        if self.name != "trackstar" or stages.curvature is not None or H is None:
            return []
        directions = sum(one.values.numel() for one in H.values())
        few = f"the gradients have {directions:,} directions, fewer than the {components:,} of"
        note = ("note", f"{few} --target-downweight-components: the last counts")
        return [note] if directions < components else []

    def _keep(self, subject: Subject, stages: Stages, train: Data, run: str) -> Persist:
        """What fits a curvature over the training rows as `gradfn hessian` would, and takes the one there.

        A recipe that fits several finds the first in the run, and those after it in directories of theirs.
        """
        places = (run if number == 1 else f"{run}/hessian-{number}" for number in counting(1))
        options, view = self.options, replace(subject.view, tokens=False)
        settings = {**subject.settings(), **stages.settings, **self._data(), "layers": view.settings()}

        def keep(fold: Any, transform: Transform, progress: Progress | None) -> Curvature:
            return hessian(
                next(places), subject.model, train, fold, transform, labels=options["labels"].value,
                seed=options["seed"], loss=subject.loss, view=view, partitions=options["partitions"],
                token_batch_size=subject.token_batch_size, settings=settings,
                overwrite=_unlike(options), progress=progress,
            )  # fmt: skip

        return keep

    def _problem(self, subject: Subject, stages: Stages, train: Data, run: str | None) -> Problem:
        options = self.options
        asked = [] if self.asked is None else self.asked
        return Problem(
            subject.bare(), train, asked, stages.normalize, stages.projection, stages.curvature,
            stages.dampings, options["labels"].value, options["seed"],
            options["target_downweight_components"], options["partitions"], progress_bar,
            None if run is None else self._keep(subject, stages, train, run),
        )  # fmt: skip

    def _data(self) -> dict[str, Any]:
        return {"data": {"path": inputs.anchored(self.options["dataset"]), "split": self.options["split"]}}


def _unlike(options: Options) -> Overwrite:
    """What --overwrite says of runs: scores made alike are kept, where only a table is to be replaced."""
    return "unlike" if options["overwrite"] else False


def _shard_of(options: Options, name: str, recipe: Recipe) -> Shard | None:
    """What --shard says; refused where a part cannot be scored alone, or would be shown as if it were all."""
    shard = parse_shard(options["shard"])
    if shard is None:
        return None
    if options["run"] is None:
        raise InputError("--shard writes its part to a run directory: give RUN, the same to all shards")
    if given := [key for key in ("csv", "jsonl", "parquet") if options[key] is not None]:
        raise InputError(
            f"a shard shows no table: leave out --{given[0]}, and give it to the command without --shard, "
            "after gradfn merge"
        )
    if recipe.curvature and options["hessian_path"] is None:
        raise InputError(
            f"{name} fits over all training rows, which a shard does not see: fit its curvature with gradfn "
            "hessian --shard and gradfn merge, and give it with --hessian-path; or leave out --shard"
        )
    return shard


def _with_defaults(options: Options, recipe: Recipe) -> dict[str, Any]:
    """What the method decides where the options do not."""
    filled = with_projection(options, recipe.projection)
    if recipe.criterion is not None and str(options["loss"]) == "cross_entropy":
        filled["loss"] = recipe.criterion
    if options["self_influence"]:
        of_queries = ("query", "query_path", "completion", "group_column", "query_loss")
        if given := [key for key in of_queries if options[key] is not None]:
            raise InputError(f"--self has no queries: leave out --{given[0].replace('_', '-')}")
    return filled


def checkpoints_of(options: Options) -> list[tuple[str | None, float]]:
    """The checkpoints and their weights; None is the model itself."""
    given = options["checkpoints"]
    paths = [] if given is None else [path.strip() for path in given.split(",")]
    if "" in paths:
        raise InputError(
            f"--checkpoints {given!r} names none, or an empty one: give them with commas between"
        )
    text = options["checkpoint_weights"]
    if text is None:
        return [(path, 1 / len(paths)) for path in paths] or [(None, 1.0)]
    try:
        weights = [float(part) for part in text.split(",")]
        if not all(map(isfinite, weights)):
            raise ValueError
    except ValueError:
        raise InputError(f"--checkpoint-weights {text} are not numbers: give 0.1,0.05, say") from None
    if len(weights) != len(paths):
        raise InputError(
            f"{len(weights)} --checkpoint-weights for {len(paths)} --checkpoints: give one for each"
        )
    return list(zip(paths, weights, strict=True))


Weighted = Sequence[tuple[str | None, float]]
"""Checkpoints and their weights; None is the model itself."""


def _check_shared(options: Options, weighted: Weighted) -> None:
    """Refuse what was made of one model where several are scored."""
    if options["checkpoints"] is not None and any(hasattr(s, "path") for s in options["projection"].stages):
        raise InputError(
            "pca and selective projections are fitted for one model: leave out --checkpoints, or take another"
        )
    if len({inputs.anchored(path) for path, _ in weighted if path is not None}) < 2:
        return
    for option, instead in (
        ("hessian_path", "leave it out, for a --method that fits a curvature at each"),
        ("query_path", "give the queries themselves with --query"),
        ("optimizer_state", "leave it out"),
    ):
        if options[option] is not None:
            raise InputError(
                f"--{option.replace('_', '-')} is of one model, and --checkpoints are several: {instead}, or "
                "score each checkpoint by itself"
            )


def _check_joined(options: Options, recipe: Recipe, weighted: Weighted) -> None:
    """Refuse checkpoints that are not there, and what joined scores cannot be told apart by."""
    for path, _ in weighted:
        if path is not None:
            locate_model(path)
    by = str(options["by"])
    if by in ("module", "head") and _joins(recipe, weighted):
        raise InputError(f"joined scores are not told apart by {by}: use --by example or token")
    if by == "token" and recipe.combine is times_doubt:
        raise InputError("trak weighs whole rows by their loss: use --by example")
    weighs = [name for name in ("reward_column", "advantage_column") if options.get(name) is not None]
    if weighs and recipe.combine is times_doubt:
        raise InputError(
            "trak takes the probability of a row from its loss, which a weight would change: leave out "
            f"--{weighs[0].replace('_', '-')}"
        )


def _joins(recipe: Recipe, weighted: Weighted) -> bool:
    return weighted[0][0] is not None or recipe.combine is not weighted_sum


def _one_checkpoint(case: Case, subject: Subject) -> tuple[Queries, Ranked | None]:
    """Score the rows, to a run directory if one is given, and rank them, but for a part of them."""
    run, by_block = case.options["run"], case.by_block
    queries, method, train, settings = case.prepare(subject, run)
    shown = queries.with_dampings(damping_names(method))
    with subject.multiplying(), progress_bar("scores", tokens_of(case.train, case.shard)) as progress:
        if run is None:
            engine = _engine(subject, queries, method, by_block=False)
            best = extremes_of(engine, train, ranks_needed(case.options),
                               token_batch_size=subject.token_batch_size, progress=progress)  # fmt: skip
            lines = unprobed_facts(unprobed(engine))
        else:
            summary = _write_scores(case, subject, run, train, queries, method, settings, progress)
            lines = [*_score_facts(summary, subject, shown), *_next(case)]
            best = None if case.shard else extremes(score_chunks(run), ranks_needed(case.options))
    if lines:
        console().print(facts(lines))
    if best is None:
        return shown, None
    if not by_block:
        return shown, Ranked(*best)
    if run is not None:
        return shown, _stored_shares(Ranked(*best), run, case.options["top"])
    return shown, _with_shares(Ranked(*best), case, subject, queries, method)


def _next(case: Case) -> list[tuple[str, str]]:
    """What follows on a part."""
    return next_facts(case.options["run"], case.shard, ", and this without --shard shows the rows")


def _checkpoints(case: Case, subject: Subject, weighted: Weighted) -> tuple[Queries, Ranked | None]:
    """Score the rows at every checkpoint, and join what they say."""
    run, results, resumed, shown = case.options["run"], [], [], self_query()
    columns = Columns([])
    for number, (path, _) in enumerate(weighted, 1):
        one = subject if path is None else inputs.at_checkpoint(subject, path, case.options)
        part = None if run is None else str(Path(run) / f"checkpoint-{number}")
        queries, method, train, settings = case.prepare(one, part)
        columns = Columns(queries.ids, queries.texts, damping_names(method))
        shown = queries.with_dampings(columns.dampings)
        with one.multiplying(), progress_bar("scores", tokens_of(case.train, case.shard)) as progress:
            if part is None:
                results.append(gather(_engine(one, queries, method, by_block=False), train,
                                      token_batch_size=one.token_batch_size, progress=progress))  # fmt: skip
            else:
                summary = _write_scores(case, one, part, train, queries, method, settings, progress)
                results.append(_read_scores(part, case.shard))
                resumed.append(summary.resumed)
    scores = case.recipe.combine(results, [weight for _, weight in weighted])
    if scores.shape[1] != len(shown.ids):
        shown = shown.joined(case.name)
        columns = Columns(shown.ids, shown.texts)
    if run is not None:
        path = _write_joined(case, subject, run, weighted, columns, Rows(scores, results[-1].losses))
        shape = f"{count(len(scores), 'row')}, {count(scores.shape[1], 'query')}"
        lines = _resumed_facts(sum(resumed), subject)
        console().print(facts([("scores", f"{path} [{shape}]"), *lines, *_next(case)]))
    if case.shard is not None:
        return shown, None
    return shown, Ranked(*extremes([scores], ranks_needed(case.options)))


def _read_scores(run: str, shard: Shard | None) -> Rows:
    import torch

    with open_part(shard_run(run, shard), "scores") as store:
        losses = (
            torch.from_numpy(store.read("rows/loss", *store.span))
            if "rows/loss" in store.names("rows")
            else torch.zeros(0)
        )
        return Rows(torch.from_numpy(store.read("scores", *store.span)).flatten(1), losses)


def _write_joined(
    case: Case, subject: Subject, run: str, weighted: Weighted, columns: Columns, result: Rows
) -> Path:  # fmt: skip
    parts = [{"path": None if path is None else inputs.anchored(path), "weight": weight,
              "settings": _settings_of(shard_run(Path(run) / f"checkpoint-{number}", case.shard))}
             for number, (path, weight) in enumerate(weighted, 1)]  # fmt: skip
    return write_scores(
        run, case.train, result, columns, settings={"recipe": case.name, "checkpoints": parts},
        tokens=subject.view.tokens, overwrite=_unlike(case.options), shard=case.shard,
    )  # fmt: skip


def _settings_of(run: Path) -> dict[str, Any]:
    with open_part(run, "scores") as store:
        return store.settings


def _write_scores(
    case: Case, subject: Subject, run: str, train: Data, queries: Queries, method: InnerProduct,
    settings: Provenance, progress: Progress,
) -> Summary:  # fmt: skip
    return score_run(
        run, subject.model, train, None if case.options["self_influence"] else queries.gradients, method,
        by_block=case.by_block, settings=settings, overwrite=_unlike(case.options), progress=progress,
        shard=case.shard, query_ids=queries.ids, query_texts=queries.texts, **subject.engine_options(),
    )  # fmt: skip


def _score_facts(summary: Summary, subject: Subject, shown: Queries) -> list[tuple[str, str]]:
    """What there is to say of scores that were written."""
    noun = "token" if subject.view.tokens else "row"
    shape = f"{count(summary.rows, noun)}, {count(len(shown.ids), 'query')}"
    lines = [("scores", f"{summary.path} [{shape}]")]
    return [*lines, *_resumed_facts(summary.resumed, subject), *unprobed_facts(summary.unprobed)]


def _resumed_facts(resumed: int, subject: Subject) -> list[tuple[str, str]]:
    """How much was there already, at all checkpoints together."""
    noun = "token" if subject.view.tokens else "row"
    return [("resumed", f"from {count(resumed, noun)} that were there already")] if resumed else []


def _engine(subject: Subject, queries: Queries, method: InnerProduct, *, by_block: bool) -> Engine:
    """What gives the scores of rows against the queries (or themselves), or of each block its share."""
    if queries.gradients:
        scorer = method.against(on_device_of(subject.model, queries.gradients), by_block=by_block)
    else:
        scorer = method.against_itself(by_block=by_block)
    return probe_engine(subject.model, subject.loss, scorer, view=subject.view)


def _with_shares(
    ranked: Ranked, case: Case, subject: Subject, queries: Queries, method: InnerProduct
) -> Ranked:
    """Score the rows that are shown again, by block, rather than keep the shares of all rows."""
    asked = ranked.asked(case.options["top"])
    rows = list(asked)
    shown, shares = case.train.select(rows), {}
    engine, size = _engine(subject, queries, method, by_block=True), subject.token_batch_size
    with subject.multiplying(), progress_bar("shares", int(shown.lengths.sum())) as progress:
        for numbers, result in stream_to_host(engine, shown, token_batch_size=size, progress=progress):
            assert isinstance(result.values, dict)
            for place, row in enumerate(rows[number] for number in numbers):
                for query in asked[row]:
                    shares[row, query] = {name: float(v[place, query]) for name, v in result.values.items()}
    return replace(ranked, shares=shares)


def _stored_shares(ranked: Ranked, run: str, top: int) -> Ranked:
    """The shares that a run keeps, of the rows that are shown."""
    with open_store(run, "scores") as store:

        def of_row(row: int) -> dict[str, Any]:
            arrays = store.read_all(store.names(SHARES), row, row + 1)
            return {name.removeprefix(SHARES): array[0].reshape(-1) for name, array in arrays.items()}

        return ranked.with_shares(top, of_row)


def score_chunks(run: str) -> Iterable[Tensor]:
    """The score matrix of a run, streamed."""
    import torch

    with open_store(run, "scores") as store:
        for _, _, arrays in store.chunks(["scores"], 65536):
            yield torch.from_numpy(arrays["scores"]).flatten(1)
