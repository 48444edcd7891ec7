"""`--baseline`: what words or meaning alone find, beside the scores of a method, and in a run of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradfn.cli.attribution import Job
from gradfn.cli.commands import ScoreRequest
from gradfn.cli.inputs import Loaded
from gradfn.cli.options import BM25, EMBEDDING
from gradfn.data import Images
from gradfn.errors import InputError
from gradfn.evaluate.lexical import bm25_scores
from gradfn.evaluate.scored import made_of
from gradfn.hf.embeddings import check_embedder, embeddings
from gradfn.report.baselines import Baseline
from gradfn.report.rankings import ShownQueries
from gradfn.runs.scores import read_part, write_scores
from gradfn.scores import Columns
from gradfn.shown import SAID
from gradfn.store.guard import refuse_links
from gradfn.types import Rows


def check_baselines(request: ScoreRequest) -> None:
    """Refuse, before any work, baselines that are none or have nothing to compare.

    Raises:
        InputError: naming what is wrong.
    """
    if not (asked := request.method.baseline):
        return
    for given in asked:
        kind, _, path = given.partition(":")
        if kind == EMBEDDING and path:
            check_embedder(path)
        elif given != BM25:
            raise InputError(f"no baseline {given!r}: give {BM25}, or {EMBEDDING}:FOLDER of a model")
    kinds = [given.partition(":")[0] for given in asked]
    if len({*kinds}) < len(kinds):
        raise InputError("--baseline is given twice for one kind: give each kind once")
    if other := request.gave("self", "group_column", "against", "shard"):
        raise InputError(f"a baseline compares texts of rows with those of queries, and {other} leaves none: "
                         "leave out --baseline")  # fmt: skip
    if request.layers.by == "token":
        raise InputError(
            "a baseline is of whole rows, and these are tokens: leave out --baseline, or --by token"
        )


def baselines_of(job: Job, loaded: Loaded, shown: ShownQueries) -> list[Baseline]:
    """The baselines that are asked for, written beside the scores of a run.

    Args:
        shown: what is known of the queries, of each for every damping.
    """
    if not (asked := job.request.method.baseline):
        return []
    if isinstance(job.train, Images):
        raise InputError("a baseline compares texts, and these rows are images: leave out --baseline")
    rows, queries = _plain(job.train.texts), _plain(shown.texts[: shown.each])
    if len(shown.ids) == 1 < len(getattr(job.asked, "documents", ())):
        raise InputError(f"{job.name} gives one score for all queries: leave out --baseline")
    found = []
    for given in asked:
        kind, _, path = given.partition(":")
        if kind == BM25:
            values = torch.from_numpy(bm25_scores(rows, queries))
        else:
            made = embeddings(path, [*rows, *queries], device=next(loaded.model.parameters()).device)
            values = made[: len(rows)] @ made[len(rows) :].T
        found.append(Baseline(kind, values))
        if job.request.run is not None:
            _write(job, job.request.run, found[-1], shown, path)
    return found


def _plain(texts: Sequence[str]) -> list[str]:
    """Texts without the arrow before what is supervised."""
    return [text.replace(SAID, " ") for text in texts]


def _write(job: Job, run: str, baseline: Baseline, shown: ShownQueries, path: str) -> None:
    """Write a baseline as a run of scores of the same rows and queries."""
    place = Path(run) / f"baseline-{baseline.name}"
    refuse_links(place)
    scored, made = read_part(run)
    about: dict[str, Any] = {"baseline": baseline.name, **({"embedder": path} if path else {})}
    settings = {**made_of(made.settings()).settings(), "recipe": baseline.name, "by_block": False,
                "method": about, **job.request.record()}  # fmt: skip
    ids = [name.removesuffix(f" (damping {shown.dampings[0]})") for name in shown.ids[: shown.each]]
    columns = Columns(ids, shown.texts[: shown.each])
    write_scores(
        place, job.train, Rows(baseline.values.float(), scored.losses), columns, settings=settings,
        overwrite=job.overwrite,
    )  # fmt: skip
