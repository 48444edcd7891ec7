"""`gradfn mask fit`: which coordinates of gradients to keep."""

from typing import Any

from rich.table import Table
from rich.text import Text

from gradfn.cli import inputs
from gradfn.cli.queries import load_all
from gradfn.cli.show import clean, console, count, facts
from gradfn.cli.stages import normalizer
from gradfn.cli.tell import subject_facts
from gradfn.errors import InputError
from gradfn.layers import find_sites
from gradfn.masks import Mask, Reports, mask_run
from gradfn.runs import describe, merged
from gradfn.selective import Dims, check_dims, selective_mask
from gradfn.transforms import chain


def dims_of(text: str) -> Dims:
    """`4096`, or `128x128`.

    Raises:
        InputError: anything else.

    >>> dims_of("128x64")
    (128, 64)
    """
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise InputError(
            f"--keep {text!r}: give 128x128 for both sides of every block, or 4096 of each flattened"
        )
    numbers = [int(part) for part in parts]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def run_mask_fit(**options: Any) -> None:
    """Load, fit, write, report."""
    inputs.check_run(options["run"])
    inputs.check_options(options)
    options = {**options, "by": "example", "query_path": None}
    for name in ("model", "dataset"):
        if options[name] is None:
            raise InputError(f"no --{name}: a mask needs a model and a dataset")
    if options["query"] is None:
        raise InputError("no --query: a mask keeps the inner products with queries, so give some")
    if options["rows"] < 3:
        raise InputError(f"--rows must be 3 or more, not {options['rows']}: correlations over them are kept")
    dims = dims_of(options["keep"])
    subject, train, query = load_all(options)
    state = options["optimizer_state"]
    before = chain() if state is None else normalizer(state, subject)
    console().print(facts(subject_facts(subject, train)))
    known = merged(describe(subject.model, train, before, loss=subject.loss, view=subject.view),
                   {**subject.settings(), "mask": _settings(options, query)})  # fmt: skip

    def fit() -> tuple[Mask, Reports]:
        with subject.multiplying():
            return selective_mask(
                subject.model, train, query, dims, rows=options["rows"], seed=options["seed"], before=before,
                query_loss=subject.query_loss, **subject.engine_options(),
            )  # fmt: skip

    shapes = {site.block: site.spec.shape for site in find_sites(subject.model, subject.view)}
    check_dims(list(shapes.values()), dims)
    _, reports = mask_run(
        options["run"], fit, blocks=len(shapes), settings=known, overwrite=options["overwrite"]
    )
    out = console()
    out.print(_table(reports))
    kept = sum(one.kept for one in reports.values()) / len(reports)
    told = f"correlation {kept:.3f} kept on average over {count(len(reports), 'block')}"
    out.print(facts([("mask", f"{options['run']}/mask.h5 [{options['keep']}, {told}]"),
                     ("next", f"--projection 'selective:{options['run']} > sjlt:1024', say")]))  # fmt: skip


def _settings(options: inputs.Options, query: Any) -> dict[str, Any]:
    return {
        "keep": options["keep"], "rows": options["rows"], "seed": options["seed"],
        "query": query.fingerprint(), "data": inputs.anchored(options["dataset"]),
    }  # fmt: skip


def _table(reports: Reports) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("block", no_wrap=True, overflow="ellipsis")
    for name in ("kept", "random mask", "steps"):
        table.add_column(name, justify="right")
    for name, one in reports.items():
        table.add_row(Text(clean(name)), f"{one.kept:.3f}", f"{one.random:.3f}", str(one.steps))
    return table
