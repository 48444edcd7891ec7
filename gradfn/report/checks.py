"""Tables of what `gradfn.check` finds of a model."""

from collections.abc import Sequence
from itertools import groupby

import torch
from rich.table import Table
from rich.text import Text

from gradfn.data import Corpus, Images
from gradfn.engine.check import BlockError, Covered, Difference, Noise
from gradfn.engine.precision import EPS, Products
from gradfn.hf.models import PRECISIONS
from gradfn.report.summaries import Facts
from gradfn.report.tables import numbers_table
from gradfn.report.words import clean, count

EQUAL = 1e-4
"""A relative error that only rounding in fp32 or better stays below."""
ROUNDED = ("tf32", "bf16", "fp16")
"""Precisions that are measured against fp32."""


def coverage_table(rows: Sequence[Covered]) -> Table:
    """By kind, a line a place in the model's pattern; then the sums."""
    whole = sum(row.parameters for row in rows)
    table = numbers_table("layers", "parameters", "share")

    def add(name: str, part: int) -> None:
        share = part / whole
        shown = f"{share:.1%}" if share >= 0.001 or part == 0 else "<0.1%"
        table.add_row(Text(name), f"{part:,}", shown)

    for (kind, how), group in groupby(rows, key=lambda row: (row.kind, row.engine or row.reason)):
        table.add_row(Text(f"{kind}: {how}", style="bold"))
        for row in group:
            add(f"  {clean(row.pattern)}" + (f" x {row.modules}" if row.modules > 1 else ""), row.parameters)
    for engine, name in (("probe", "by probe"), ("vmap(grad)", "by vmap(grad)"), (None, "not attributed")):
        if part := sum(row.parameters for row in rows if row.engine == engine):
            add(name, part)
    add("all parameters", whole)
    return table


def sample_line(documents: Corpus, random: bool, limits: tuple[int, int]) -> str:
    """Which rows are looked at.

    Args:
        limits: rows and tokens of a dataset, at most.
    """
    sizes = f"{count(len(documents), 'row')}, {count(int(documents.lengths.sum()), 'token')}"
    lengths = f"{int(documents.lengths.min())} to {int(documents.lengths.max())} each"
    if random:
        return f"{sizes} at random, {lengths}; give --dataset to measure on your own"
    padded = isinstance(documents, Images) or len(set(documents.lengths.tolist())) > 1
    same = "" if padded else "; of one length, so padding is not tried"
    return f"the first {sizes}, {lengths} (at most {limits[0]} rows, {limits[1]:,} tokens){same}"


def equality_facts(errors: Sequence[BlockError], rows: int, precision: str, products: Products) -> Facts:
    """Whether the engine is equal to plain autograd, as far as the precision tells."""
    if not errors:
        return [("equality", "not compared: autograd has no gradient of quantised weights")]
    worst, equal = errors[0], errors[0].error <= EQUAL
    blocks = f"all {len(errors)} blocks" if len(errors) > 1 else "the one block"
    found = f"equal to {worst.error:.1e} in {blocks}" if equal else (
        f"the worst of {count(len(errors), 'block')} is {worst.block}: relative error {worst.error:.1e}, "
        f"cosine {worst.cosine:.6f}"
    )  # fmt: skip
    how = f"{count(rows, 'row')} in one batch against plain autograd, a row at a time"
    return [("equality", f"{how}: {found}"), ("", _precision_line(precision, products, equal))]


def _precision_line(precision: str, products: Products, equal: bool) -> str:
    """What a precision means for the comparison, and where more is to be seen."""
    if precision == "tf32":
        what, eps = "both factors of a product", EPS[products]
    else:
        what, eps = "every number", torch.finfo(PRECISIONS[precision]).eps
    line = f"{precision} rounds {what} to 1 part in {1 / eps:,.0f}"
    if equal:
        return line
    finer = {"fp32": "fp64"}.get(precision, "fp32" if precision in ROUNDED else None)
    if finer is None:
        return f"{line}, which does not explain it: this should not be, please tell us"
    return f"{line}, on both sides; whether the engine is right is to be seen with --precision {finer}"


def noise_table(measured: Noise, documents: Corpus, precision: str) -> Table:
    """What batching and rounding do to rows."""
    table = numbers_table("noise: median (worst)", "cosine", "relative error", "worst row")

    def add(name: str, part: Difference) -> None:
        table.add_row(
            name, f"{part.cosine:.6f} ({part.worst_cosine:.6f})",
            f"{part.error:.1e} ({part.worst_error:.1e})", Text(clean(documents.ids[part.row], 18)),
        )  # fmt: skip

    add("batched against alone", measured.batching)
    if measured.precision is not None:
        add(f"{precision} against fp32", measured.precision)
    return table
