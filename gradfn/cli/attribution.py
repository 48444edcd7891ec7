"""Scoring as it is asked for: one checkpoint at a time, and several joined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as counting
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradfn.cli.commands import ScoreRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, anchored, at_checkpoint, recorded
from gradfn.cli.method import solver_of
from gradfn.cli.queries import SELF, Asked, Queries, load_queries, queries_of
from gradfn.cli.stages import Stages, load_stages
from gradfn.data import Corpus
from gradfn.engine.cache import CachedRows
from gradfn.engine.stream import Progress
from gradfn.errors import InputError
from gradfn.methods.attribution import Attribution, Scorer
from gradfn.methods.inner_product import InnerProduct, damping_names
from gradfn.methods.recipes import RECIPES, Persist, Problem, Recipe
from gradfn.methods.scoring import extremes_of, shares_of
from gradfn.model.sites import View
from gradfn.report.progress import rows_bar
from gradfn.report.rankings import ShownQueries, ranks_needed
from gradfn.report.rows import Ranked
from gradfn.report.summaries import (
    Facts,
    gradients_line,
    next_facts,
    resumed_facts,
    scores_facts,
    shard_facts,
    unprobed_facts,
)
from gradfn.report.tables import facts
from gradfn.runs.curvatures import hessian
from gradfn.runs.processes import TOGETHER, hessian_together
from gradfn.runs.provenance import Provenance
from gradfn.runs.queries import check_stored
from gradfn.runs.rows import Summary, unprobed
from gradfn.runs.scores import read_part, row_shares, score_chunks, score_run, write_scores
from gradfn.runs.shards import Shard
from gradfn.scores import Columns, extremes
from gradfn.statistics.curvature import Curvature
from gradfn.store.guard import refuse_links
from gradfn.store.reader import open_store
from gradfn.store.writer import Overwrite
from gradfn.transforms import Chain, Transform, chain, reseeded
from gradfn.types import Blocks, Data, Rows

Weighted = Sequence[tuple[str | None, float]]
"""Checkpoints and their weights; None is the model itself."""


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be scored, at whatever checkpoint.

    Args:
        request: as given, with the method's defaults.
        name, recipe: the method.
        projection: of both sides; of the first of several checkpoints.
        train: the training rows.
        asked: the queries' tokens, where there are any.
    """

    request: ScoreRequest
    name: str
    recipe: Recipe
    projection: Chain
    train: Corpus
    asked: Asked | None

    @property
    def shard(self) -> Shard | None:
        """The part of the rows to score, where it is not all of them."""
        return self.request.output.shard

    @property
    def top(self) -> int:
        """How many rows of each side are shown of a query."""
        return self.request.table.top or 0

    @property
    def needed(self) -> int:
        """How many of the best rows to keep, with the query itself where it is one of them."""
        own = self.asked is not None and bool(self.asked.own)
        return ranks_needed(self.top) + own

    @property
    def own(self) -> tuple[int, ...]:
        """The row that each query is, where these are rows; not shown as its own proponent."""
        return () if self.asked is None or self.noun == "token" else self.asked.own

    @property
    def noun(self) -> str:
        """What a row of the scores is."""
        return "token" if self.request.layers.by == "token" else "row"

    @property
    def overwrite(self) -> Overwrite:
        """Scores made alike are kept, where only a table is to be replaced."""
        return "unlike" if self.request.output.overwrite else False

    def next(self) -> Facts:
        """What follows on a part."""
        return next_facts(str(self.request.run), self.shard, ", and this without --shard shows the rows")

    def prepare(self, loaded: Loaded, run: str | None, *, first: bool = True) -> "Prepared":
        """What is needed to score at one checkpoint.

        Args:
            run: the checkpoint's own run directory, which keeps the curvature that the method fits.
            first: introduce it; of the checkpoints after it nothing is said but their names.
        """
        request = self.request
        stages = load_stages(loaded, self.projection, request.gradients.optimizer_state, request.curvature)
        wanted = {**loaded.settings(), "transform": stages.base.settings()}
        if first:
            self._introduce(loaded, stages)
        else:
            console().print(facts([("model", loaded.name)]))
        train = CachedRows(self.train, stages.base)
        method = self._method(loaded, stages, wanted, train, run)
        if lines := self._unlike_trackstar(stages, method):
            console().print(facts(lines))
        queries = SELF
        if not request.method.self_influence:
            queries, method = self._queries(loaded, method, wanted)
        known = {"recipe": self.name, **self._own(method, stages), **stages.settings, **queries.settings,
                 **recorded(request)}  # fmt: skip
        return Prepared(self, loaded, train, queries, method, Provenance.of(loaded.settings()).merged(known))

    def _introduce(self, loaded: Loaded, stages: Stages) -> None:
        """Print the first lines."""
        of = "derivatives through the training" if self.recipe.whole else gradients_line(stages.base)
        lines = [*shard_facts(self.train, self.shard), ("method", f"{self.name}, {of}"), *self._unlike_less()]
        seen = replace(loaded.subject, view=View(("*",))) if self.recipe.whole else loaded.subject
        replace(loaded, subject=seen).introduce(self.train, *lines)

    def _method(
        self, loaded: Loaded, stages: Stages, wanted: Mapping[str, Any], train: Data, run: str | None
    ) -> Attribution:
        """The recipe's method; what it will not go with is refused before a curvature is fitted."""
        fits = self.recipe.curvature and stages.curvature is None and self.name in RECIPES
        if fits and self.request.query.query_path is not None:
            check_stored(self.request.query.query_path, wanted, self.name)
        with loaded.multiplying():
            method = self.recipe.method(self._problem(loaded, stages, train, run))
        curvature = method.curvature if isinstance(method, InnerProduct) else None
        if stages.curvature is not None and curvature is not stages.curvature:
            raise InputError(
                f"{self.name} takes no curvature that was fitted before: leave out --hessian-path"
            )
        solves = isinstance(method, InnerProduct) and (method.norm != "none" or method.solve)
        if self.request.method.self_influence and solves:
            raise InputError(
                f"{self.name} gives no self-influence, having a norm or solving for queries: choose "
                "grad_dot, or a curvature"
            )
        return method

    def _queries(
        self, loaded: Loaded, method: Attribution, wanted: Mapping[str, Any]
    ) -> tuple[Queries, Attribution]:
        """The queries, with gradients where the method takes these, and the method that takes them so."""
        query = self.request.query
        if isinstance(method, InnerProduct):
            return load_queries(loaded, self.asked, query, method, wanted)
        if self.asked is None or query.group_column is not None or query.against is not None:
            option = str(self.request.gave("query_path", "group_column", "against"))
            raise InputError(
                f"{self.name} takes queries and not their gradients, which {option} is of: leave it out, and "
                "give the queries with --query"
            )
        return queries_of(self.asked, loaded, query), method

    def _own(self, method: Attribution, stages: Stages) -> dict[str, Any]:
        """What tells a recipe of somebody's own from another of its name, and what a solution may look at."""
        if self.recipe.file is None:
            return {}
        own: dict[str, Any] = {"file": self.recipe.file}
        if not isinstance(method, InnerProduct):
            return {"method": own}
        query, fit = chain(method.query_transform).settings(), self.request.fit
        if query != chain(method.row_transform).settings():
            own["query"] = query
        if method.solve is not None:
            own |= {"dampings": list(map(str, stages.dampings)), "labels": fit.labels,
                    "seed": self.request.seed, "components": fit.components}  # fmt: skip
        return {"method": own}

    def _unlike_less(self) -> Facts:
        """A note where LESS is not what its paper has."""
        if self.name != "less" or self.request.gradients.optimizer_state is not None:
            return []
        return [("note", "no --optimizer-state, so rows are not scaled by Adam's moments, as LESS has them")]

    def _unlike_trackstar(self, stages: Stages, method: Attribution) -> Facts:
        """A note where there are fewer directions than TrackStar is to count less."""
        H = method.curvature if isinstance(method, InnerProduct) else None
        components = self.request.fit.components
        if self.name != "trackstar" or stages.curvature is not None or H is None:
            return []
        directions = sum(one.values.numel() for one in H.values())
        few = f"the gradients have {directions:,} directions, fewer than the {components:,} of"
        note = ("note", f"{few} --target-downweight-components: the last counts")
        return [note] if directions < components else []

    def _problem(self, loaded: Loaded, stages: Stages, train: Data, run: str | None) -> Problem:
        fit = self.request.fit
        return Problem(
            loaded.subject, train, [] if self.asked is None else self.asked.every, stages.normalize,
            stages.projection, stages.curvature, stages.dampings, fit.labels, self.request.seed,
            fit.components, fit.partitions, solver_of(self.request.solver),
            lambda text: console().print(facts([("note", text)])),
            None if run is None else self._persist(loaded, stages, train, run),
        )  # fmt: skip

    def _persist(self, loaded: Loaded, stages: Stages, train: Data, run: str) -> Persist:
        """What fits a curvature over the training rows as `gradfn hessian` would, and takes the one there.

        A recipe that fits several finds the first in the run, and those after it in directories of theirs.
        """
        places = (run if number == 1 else f"{run}/hessian-{number}" for number in counting(1))
        fit, view = self.request.fit, replace(loaded.subject.view, tokens=False)
        settings = {**loaded.settings(), **stages.settings, **recorded(self.request),
                    "layers": view.settings()}  # fmt: skip

        def persist(fold: Any, transform: Transform, progress: Progress | None) -> Curvature:
            place = next(places)
            if place != run:  # the run itself may be a link, which the user gave
                refuse_links(Path(place))
            how: Any = {"labels": fit.labels, "seed": self.request.seed, "partitions": fit.partitions,
                        "settings": settings, "overwrite": self.overwrite, "progress": progress}  # fmt: skip
            given = place, replace(loaded.subject, view=view), train, fold, transform
            return (hessian if TOGETHER.get() is None else hessian_together)(*given, **how)

        return persist


@dataclass(frozen=True, eq=False)
class Prepared:
    """A checkpoint ready to be scored: the rows, the queries, the method, what a run records."""

    job: Job
    loaded: Loaded
    train: Data
    queries: Queries
    method: Attribution
    settings: Provenance

    @property
    def columns(self) -> Columns:
        """What the scores of a row are of."""
        shown = self.queries.shown
        return Columns(shown.ids, shown.texts, damping_names(self.method))

    @property
    def shown(self) -> ShownQueries:
        """What is known of the queries, of each for every damping."""
        return self.queries.shown.with_dampings(self.columns.dampings)

    @property
    def query(self) -> Blocks | Data | None:
        """What is scored against: gradients, or the queries themselves; None: each row itself."""
        tokens = None if self.job.asked is None else self.job.asked.documents
        return self.queries.gradients or tokens

    def scorer(self, *, by_block: bool = False) -> Scorer:
        """What gives the scores of rows against the queries (or themselves), or of each block its share."""
        return self.method.scorer(self.loaded.subject, self.query, by_block=by_block)

    def write(self, run: str, progress: Progress) -> Summary:
        """Write the scores to a run directory."""
        return score_run(
            run, self.loaded.subject, self.train, lambda: self.query, self.method,
            by_block=self.job.request.layers.by_block, settings=self.settings, overwrite=self.job.overwrite,
            progress=progress, shard=self.job.shard, query_ids=self.columns.query_ids,
            query_texts=self.columns.query_texts,
        )  # fmt: skip


def score_model(job: Job, loaded: Loaded) -> tuple[ShownQueries, Ranked | None]:
    """Score the rows, to a run directory if one is given, and rank them, but for a part of them."""
    run, layers, needed = job.request.run, job.request.layers, job.needed
    prepared = job.prepare(loaded, run)
    shown = prepared.shown
    with loaded.multiplying(), rows_bar("scores", job.train, job.shard) as progress:
        if run is None:
            scorer = prepared.scorer()
            best = extremes_of(scorer, prepared.train, needed, progress=progress)
            lines = unprobed_facts(unprobed(scorer))
        else:
            done = prepared.write(run, progress)
            lines = [*scores_facts(done.path, done.rows, len(shown.ids), job.noun, done.resumed),
                     *unprobed_facts(done.unprobed), *job.next()]  # fmt: skip
            best = (
                None
                if job.shard
                else extremes(score_chunks(run, memory=job.request.table.memory << 20), needed)
            )
    if lines:
        console().print(facts(lines))
    if best is None:
        return shown, None
    ranked = Ranked(*best, own=job.own)
    if not layers.by_block:
        return shown, ranked
    if run is not None:
        with open_store(run, "scores") as store:
            return shown, ranked.with_shares(job.top, lambda row: row_shares(store, row))
    asked = ranked.asked(job.top)  # scored again, rather than to keep the shares of all rows
    rows = job.train.select(list(asked))
    with loaded.multiplying(), rows_bar("shares", rows) as progress:
        shares = shares_of(prepared.scorer(by_block=True), rows, asked, progress=progress)
    return shown, replace(ranked, shares=shares)


# --- several checkpoints


def score_checkpoints(job: Job, loaded: Loaded, weighted: Weighted) -> tuple[ShownQueries, Ranked | None]:
    """Score the rows at every checkpoint, each behind a projection of its own, and join what they say."""
    run, results, resumed, shown, columns = job.request.run, [], 0, SELF.shown, Columns([])
    for path in dict.fromkeys(path for path, _ in weighted[1:] if path is not None):
        at_checkpoint(loaded, path, job.request.model)  # refuses what does not fit before the first is scored
    different = [*dict.fromkeys(path and anchored(path) for path, _ in weighted)]
    for number, (path, _) in enumerate(weighted, 1):
        projection = reseeded(job.projection, different.index(path and anchored(path)))
        one = loaded if path is None else at_checkpoint(loaded, path, job.request.model)
        part = None if run is None else str(Path(run) / f"checkpoint-{number}")
        if part is not None:
            refuse_links(Path(part))
        prepared = replace(job, projection=projection).prepare(one, part, first=number == 1)
        shown, columns = prepared.shown, prepared.columns
        with one.multiplying(), rows_bar("scores", job.train, job.shard) as progress:
            if part is None:
                results.append(prepared.scorer()(prepared.train, progress=progress))
            else:
                resumed += prepared.write(part, progress).resumed
                results.append(read_part(part, job.shard)[0])
    weights = [weight for _, weight in weighted]
    if job.request.layers.by == "time":
        scores: Any = over_time(
            weighted, [one.values * weight for one, weight in zip(results, weights, strict=True)]
        )
    else:
        scores = job.recipe.combine(results, weights)
        if scores.shape[1] != len(shown.ids):
            shown = shown.joined(job.name)
            columns = Columns(shown.ids, shown.texts)
    return show_joined(job, weighted, shown, columns, Rows(scores, results[-1].losses), resumed)


def over_time(weighted: Weighted, parts: Sequence[Tensor]) -> Blocks:
    """What checkpoints add to scores, by their names, or if these are not different, with numbers."""
    names = ["the model" if path is None else Path(path).name for path, _ in weighted]
    if len({*names}) < len(names):
        names = [f"{number} {name}" for number, name in enumerate(names, 1)]
    return dict(zip(names, parts, strict=True))


def show_joined(
    job: Job, weighted: Weighted, shown: ShownQueries, columns: Columns, result: Rows, resumed: int
) -> tuple[ShownQueries, Ranked | None]:
    """Write the scores that those of checkpoints make, if there is a run, and rank them, if they are all."""
    shares = result.values if isinstance(result.values, dict) else None
    scores: Any = result.values if shares is None else torch.stack([*shares.values()]).sum(0)
    if (run := job.request.run) is not None:
        path = _write_joined(job, run, weighted, columns, result)
        lines = [*scores_facts(path, len(scores), scores.shape[1]), *resumed_facts(resumed, job.noun)]
        console().print(facts([*lines, *job.next()]))
    if job.shard is not None:
        return shown, None
    own = job.own if job.own and len(shown.ids) % len(job.own) == 0 else ()  # less has one for all
    ranked = Ranked(*extremes([scores], job.needed), in_order=shares is not None, own=own)
    if shares is None:
        return shown, ranked
    return shown, ranked.with_shares(job.top, lambda row: {name: v[row] for name, v in shares.items()})


def _write_joined(job: Job, run: str, weighted: Weighted, columns: Columns, result: Rows) -> Path:
    parts = [{"path": None if path is None else anchored(path), "weight": weight,
              "settings": read_part(f"{run}/checkpoint-{number}", job.shard)[1].to_json()}
             for number, (path, weight) in enumerate(weighted, 1)]  # fmt: skip
    settings = {"recipe": job.name, "checkpoints": parts, **job.request.record()}
    return write_scores(
        run, job.train, result, columns, settings=settings, tokens=job.request.layers.by == "token",
        overwrite=job.overwrite, shard=job.shard,
    )  # fmt: skip
