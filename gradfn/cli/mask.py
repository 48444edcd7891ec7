"""`gradfn mask fit`: which coordinates of gradients to keep."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

import gradfn
from gradfn.cli import inputs
from gradfn.cli import options as o
from gradfn.cli.queries import load_all
from gradfn.cli.show import clean, console, count, facts, progress_bar
from gradfn.cli.stages import normalizer
from gradfn.cli.tell import subject_facts
from gradfn.errors import InputError
from gradfn.model.sites import find_sites
from gradfn.runs.gradients import open_gradients
from gradfn.runs.masks import FEWEST, Mask, Reports, block_shapes, check_stores, mask_run, stored_mask
from gradfn.runs.provenance import Provenance, describe
from gradfn.statistics.mask import Dims, Watch, check_dims, selective_mask
from gradfn.store import index_path
from gradfn.transforms import chain
from gradfn.transforms.projection import is_number, quoted

SKETCH = 1024
"""Numbers of the sjlt that is suggested behind a mask."""


def dims_of(text: str) -> Dims:
    """`4096`, or `128x128`.

    Raises:
        InputError: anything else.

    >>> dims_of("128x64")
    (128, 64)
    """
    parts = text.split("x")
    if len(parts) > 2 or not all(is_number(part) and int(part) for part in parts):
        raise InputError(
            f"--keep {text!r}: give 128x128 for both sides of every block, or 4096 of each flattened"
        )
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def run_mask_fit(**options: Any) -> None:
    """Load or open, fit, write, report."""
    inputs.check_run(options["run"])
    dims = dims_of(options["keep"])
    if options["rows"] < FEWEST:
        raise InputError(
            f"--rows must be {FEWEST} or more, not {options['rows']}: correlations over them are kept"
        )
    given = _of_model(options, dims) if options["store"] is None else _of_stores(options, dims)
    check_dims(list(given.shapes.values()), dims)
    with progress_bar("mask", len(given.shapes), "blocks") as progress:
        _, reports = mask_run(
            options["run"], lambda: given.fit(lambda *_: progress(1)), blocks=len(given.shapes),
            settings=given.settings, overwrite=options["overwrite"],
        )  # fmt: skip
    out = console()
    out.print(_table(reports))
    kept = sum(one.kept for one in reports.values()) / len(reports)
    told = f"correlation {kept:.3f} kept on average over {count(len(reports), 'block')}"
    more = f" > sjlt:{SKETCH}" if _kept(given, dims) > SKETCH else ""
    out.print(facts([("mask", f"{options['run']}/mask.h5 [{options['keep']}, {told}]"),
                     ("next", f"--projection 'selective:{quoted(options['run'])}{more}', say")]))  # fmt: skip


class _Given(NamedTuple):
    """What a mask is fitted to: the blocks' shapes, what their gradients depend on, and the fit itself."""

    shapes: Mapping[str, tuple[int, ...]]
    settings: Provenance
    fit: Callable[[Watch], tuple[Mask, Reports]]


def _of_model(options: inputs.Options, dims: Dims) -> _Given:
    """Gradients that a model makes of a dataset and of queries."""
    if options["query_path"] is not None:
        raise InputError("--query-path goes with --store: give both, or the queries themselves with --query")
    options = {**options, "by": "example"}
    inputs.check_options(options)
    for name in ("model", "dataset"):
        if options[name] is None:
            raise InputError(f"no --{name}: a mask needs a model and a dataset, or gradients with --store")
    if options["query"] is None:
        raise InputError("no --query: a mask keeps the inner products with queries, so give some")
    subject, train, query = load_all(options)
    state = options["optimizer_state"]
    before = chain() if state is None else normalizer(state, subject)
    console().print(facts(subject_facts(subject, train)))

    def fit(watch: Watch) -> tuple[Mask, Reports]:
        with subject.multiplying():
            return selective_mask(
                subject.model, train, query, dims, rows=options["rows"], seed=options["seed"], before=before,
                query_loss=subject.query_loss, watch=watch, **subject.engine_options(),
            )  # fmt: skip

    how: dict[str, Any] = {"query": query.fingerprint(), "data": inputs.anchored(options["dataset"])}
    if subject.query_loss is not subject.loss:
        how["query_loss"] = subject.loss_settings(subject.query_loss)
    known = describe(subject.bare(), train, before)
    shapes = {site.block: site.spec.shape for site in find_sites(subject.model, subject.view)}
    made = known.merged({**subject.settings(), "mask": {**_settings(options), **how}})
    return _Given(shapes, made, fit)


def _of_stores(options: inputs.Options, dims: Dims) -> _Given:
    """Gradients that are stored, and what was recorded of them."""
    for name, (_, default) in o.MASKED.items():
        if (options[name] or None) != (default or None):
            raise InputError(
                f"the gradients of --store are made already: leave out --{name.replace('_', '-')}"
            )
    if options["query_path"] is None:
        raise InputError("--store has the rows' gradients: give the queries' with --query-path")
    train, query = open_gradients(options["store"]), open_gradients(options["query_path"])
    check_stores(train, query)
    sides = (("store", options["store"], train), ("queries", options["query_path"], query))
    lines = [(name, f"{index_path(run)} [{count(store.rows, 'row')}]") for name, run, store in sides]
    console().print(facts(lines))
    asked = {key: query.settings[key] for key in ("data", "aggregation") if key in query.settings}
    how = {**_settings(options), "query": asked}
    known = replace(Provenance.of(train), version=gradfn.__version__, mask=how, request=None)

    def fit(watch: Watch) -> tuple[Mask, Reports]:
        return stored_mask(train, query, dims, rows=options["rows"], seed=options["seed"], watch=watch)

    return _Given(block_shapes(train), known, fit)


def _kept(given: _Given, dims: Dims) -> int:
    """Numbers that the mask leaves of the largest block."""
    if isinstance(dims, int):
        return min(dims, max(map(prod, given.shapes.values())))
    return max(min(dims[0], out) * min(dims[1], into) for out, into in given.shapes.values())


def _settings(options: inputs.Options) -> dict[str, Any]:
    return {key: options[key] for key in ("keep", "rows", "seed")}


def _table(reports: Reports) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("block", no_wrap=True, overflow="ellipsis")
    for name in ("kept", "random mask", "steps"):
        table.add_column(name, justify="right")
    for name, one in reports.items():
        table.add_row(Text(clean(name)), f"{one.kept:.3f}", f"{one.random:.3f}", str(one.steps))
    return table
