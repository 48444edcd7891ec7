"""`gradfn mask fit`: which coordinates of gradients to keep."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from rich.text import Text

import gradfn
from gradfn.cli.commands import MaskFitRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import anchored, check_run, checked
from gradfn.cli.queries import load_all
from gradfn.cli.request import slots_of
from gradfn.cli.stages import normalizer
from gradfn.errors import InputError
from gradfn.model.sites import find_sites
from gradfn.report.progress import progress_bar
from gradfn.report.tables import facts, numbers_table
from gradfn.report.words import clean, count
from gradfn.runs.gradients import open_gradients
from gradfn.runs.masks import FEWEST, Mask, Reports, block_shapes, check_stores, mask_run, stored_mask
from gradfn.runs.provenance import Provenance, describe
from gradfn.statistics.mask import Dims, Watch, check_dims, selective_mask
from gradfn.store.directory import index_path
from gradfn.transforms import chain
from gradfn.transforms.projection import quoted

SKETCH = 1024
"""Numbers of the sjlt that is suggested behind a mask."""


def run_mask_fit(request: MaskFitRequest) -> None:
    """Load or open, fit, write, report."""
    check_run(request.run)
    if request.rows < FEWEST:
        raise InputError(
            f"--rows must be {FEWEST} or more, not {request.rows}: correlations over them are kept"
        )
    given = _of_model(request) if request.store is None else _of_stores(request, request.store)
    check_dims(list(given.shapes.values()), request.keep)
    with progress_bar("mask", len(given.shapes), "blocks") as progress:
        _, reports = mask_run(
            request.run, lambda: given.fit(lambda *_: progress(1)), blocks=len(given.shapes),
            settings=given.settings, overwrite=request.output.overwrite,
        )  # fmt: skip
    table = numbers_table("block", "kept", "random mask", "steps")
    for name, one in reports.items():
        table.add_row(Text(clean(name)), f"{one.kept:.3f}", f"{one.random:.3f}", str(one.steps))
    console().print(table)
    kept = sum(one.kept for one in reports.values()) / len(reports)
    summary = f"correlation {kept:.3f} kept on average over {count(len(reports), 'block')}"
    more = f" > sjlt:{SKETCH}" if _kept(given, request.keep) > SKETCH else ""
    mask = ("mask", f"{request.run}/mask.h5 [{_spelled(request.keep)}, {summary}]")
    console().print(facts([mask, ("next", f"--projection 'selective:{quoted(request.run)}{more}', say")]))


class _Given(NamedTuple):
    """What a mask is fitted to: the blocks' shapes, what their gradients depend on, and the fit itself."""

    shapes: Mapping[str, tuple[int, ...]]
    settings: Provenance
    fit: Callable[[Watch], tuple[Mask, Reports]]


def _of_model(request: MaskFitRequest) -> _Given:
    """Gradients that a model makes of a dataset and of queries."""
    if request.query.query_path is not None:
        raise InputError("--query-path goes with --store: give both, or the queries themselves with --query")
    request = checked(request, "a mask needs a model and a dataset, or gradients with --store")
    if request.query.query is None:
        raise InputError("no --query: a mask keeps the inner products with queries, so give some")
    loaded, train, asked = load_all(request)
    assert asked is not None
    query, state = asked.documents, request.gradients.optimizer_state
    before = chain() if state is None else normalizer(state, loaded)
    loaded.introduce(train)

    def fit(watch: Watch) -> tuple[Mask, Reports]:
        with loaded.multiplying():
            return selective_mask(
                loaded.subject, train, query, request.keep, rows=request.rows, seed=request.seed,
                before=before, watch=watch,
            )  # fmt: skip

    how: dict[str, Any] = {"query": query.fingerprint(), "data": anchored(str(request.data.dataset))}
    if loaded.subject.query_loss is not loaded.subject.loss:
        how["query_loss"] = loaded.loss_settings(loaded.subject.query_loss)
    known = describe(loaded.subject, train, before)
    shapes = {site.block: site.spec.shape for site in find_sites(loaded.model, loaded.subject.view)}
    mask = {"mask": {**_settings(request), **how}}
    settings = known.merged({**loaded.settings(), **mask, **request.record()})
    return _Given(shapes, settings, fit)


def _of_stores(request: MaskFitRequest, run: str) -> _Given:
    """Gradients that are stored, and what was recorded of them."""
    own = ("run", "keep", "rows", "seed", "store", "query_path", "overwrite")
    if given := request.gave(*(name for name in slots_of(type(request)) if name not in own)):
        raise InputError(f"the gradients of --store are made already: leave out {given}")
    if request.query.query_path is None:
        raise InputError("--store has the rows' gradients: give the queries' with --query-path")
    train, query = open_gradients(run), open_gradients(request.query.query_path)
    check_stores(train, query)
    sides = (("store", run, train), ("queries", request.query.query_path, query))
    lines = [(name, f"{index_path(path)} [{count(store.rows, 'row')}]") for name, path, store in sides]
    console().print(facts(lines))
    asked = {key: query.settings[key] for key in ("data", "aggregation") if key in query.settings}
    how = {**_settings(request), "query": asked}
    known = replace(Provenance.of(train), version=gradfn.__version__, mask=how, **request.record())

    def fit(watch: Watch) -> tuple[Mask, Reports]:
        return stored_mask(train, query, request.keep, rows=request.rows, seed=request.seed, watch=watch)

    return _Given(block_shapes(train), known, fit)


def _kept(given: _Given, dims: Dims) -> int:
    """Numbers that the mask leaves of the largest block."""
    if isinstance(dims, int):
        return min(dims, max(map(prod, given.shapes.values())))
    return max(min(dims[0], out) * min(dims[1], into) for out, into in given.shapes.values())


def _settings(request: MaskFitRequest) -> dict[str, Any]:
    return {"keep": _spelled(request.keep), "rows": request.rows, "seed": request.seed}


def _spelled(dims: Dims) -> str:
    """Coordinates as --keep has them."""
    return str(dims) if isinstance(dims, int) else "x".join(map(str, dims))
