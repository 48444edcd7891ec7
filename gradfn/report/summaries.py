"""Facts about models, rows and runs, as pairs of a name and a value for `tables.facts`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from gradfn.data import Corpus, Documents, Pairs
from gradfn.engine.check import Covered, coverage
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import results_per_row
from gradfn.model.losses import CausalLMLoss
from gradfn.report.words import count, size_of
from gradfn.runs.processes import TOGETHER
from gradfn.runs.rows import Summary, layer_summary
from gradfn.runs.shards import Shard, shard_rows
from gradfn.statistics.curvature import Curvature
from gradfn.subject import Subject
from gradfn.transforms import Transform, chain

Facts = list[tuple[str, str]]


def device_facts(model: nn.Module, products: str = "ieee") -> Facts:
    """Where the model is, in which dtype, and how its float32 matrices are multiplied if not exactly.

    >>> device_facts(nn.Linear(2, 2))
    [('device', 'cpu, float32')]
    """
    floating = next((p for p in model.parameters() if p.is_floating_point()), None)
    some = next(model.parameters()) if floating is None else floating
    rounded = "" if products == "ieee" else f", {products} products"
    return [("device", f"{some.device}, {str(some.dtype).removeprefix('torch.')}{rounded}")]


def subject_facts(
    name: str,
    subject: Subject,
    train: Corpus,
    *,
    noun: str = "train",
    numbers: bool = False,
    products: str = "ieee",
) -> Facts:
    """What is attributed, where, to which rows, and what is unusual about them.

    Args:
        name: what to call the model.
        noun: what to call the rows.
        numbers: whether its tokens are written as their numbers.
        products: see `device_facts`.
    """
    model, loss = subject.model, subject.loss
    simple = isinstance(loss, CausalLMLoss) and loss.criterion == "cross_entropy" and not loss.label_smoothing
    whole = simple and not loss.fused_head  # pyright: ignore
    head = "; logits are not a plain linear map, so they are computed whole" if whole else ""
    lines = [
        *device_facts(model, products),
        ("model", f"{name} ({layer_summary(model, subject.view)}{head})"),
        (noun, f"{count(len(train), 'row')}, {count(int(train.lengths.sum()), 'token')}"),
    ]
    lines += coverage_facts(coverage(model, subject.view))
    if numbers:
        lines.append(("note", "the model has no tokenizer: tokens are written as their numbers"))
    if unsupervised := int((train.supervised == 0).sum()):
        rows = count(unsupervised, "row")
        lines.append(("note", f"{rows} with nothing to supervise: zero gradient, zero scores"))
    return lines


def cut_facts(documents: Corpus, name: str) -> Facts:
    """How many rows were cut, and from which length.

    >>> from gradfn.data import make_documents
    >>> cut_facts(make_documents([[1, 2]]), "rows.jsonl")
    []
    """
    sides = (documents.inputs, documents.outputs) if isinstance(documents, Pairs) else (documents,)
    return [
        ("note", f"{count(one.cut[0], 'row')} of {name} cut to {one.lengths.max():,} tokens; the longest had "
                 f"{one.cut[1]:,}")
        for one in sides if isinstance(one, Documents) and one.cut[0]
    ]  # fmt: skip


def coverage_facts(rows: Sequence[Covered]) -> Facts:
    """A note on what is left out, where less than half of the parameters are attributed.

    >>> coverage_facts(coverage(nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 1))))
    [('note', "13% of the parameters are attributed, and the rest is embedding 87%: --include '*' takes all")]
    """
    rest = [row for row in rows if row.engine is None]
    whole, size = (sum(row.parameters for row in some) for some in (rows, rest))
    if 2 * size <= whole or any(row.reason != "left out by default" for row in rest):
        return []
    sizes = Counter[str]()
    for row in rest:
        sizes[row.kind] += row.parameters
    named = ", ".join(f"{kind} {part / whole:.0%}" for kind, part in sizes.most_common(3))
    how = f"{1 - size / whole:.0%} of the parameters are attributed, and the rest is {named}"
    return [("note", f"{how}: --include '*' takes all")]


def batches_facts(padded: bool) -> Facts:
    """A note where rows of unequal length do not share a batch.

    >>> batches_facts(True)
    []
    """
    why = "in this model padding changes a row: batches have rows of one length, which is slower"
    return [] if padded else [("note", why)]


def gradients_line(*transforms: Transform) -> str:
    """A chain of transforms in words, its projections as they are spelled.

    >>> gradients_line()
    'full gradients'
    """
    line, projecting = "", False
    for stage in chain(*transforms).stages:
        follows, projecting = projecting, "projection" in stage.settings()
        line += (" > " if follows and projecting else ", " if line else "") + str(stage)
    return line or "full gradients"


def size_facts(subject: Subject, train: Corpus, transform: Transform, shard: Shard | None) -> Facts:
    """What the gradients of the rows, or of a part of them, take on disk."""
    engine = probe_engine(subject.model, subject.loss, transform, view=subject.view)
    rows = range(len(train)) if shard is None else shard_rows(train.lengths, shard)
    total = int(results_per_row(engine, train)[rows.start : rows.stop].sum())
    noun = "token" if subject.view.tokens else "row"
    return [
        ("size", f"{size_of(engine.result_bytes)} a {noun}, {size_of(engine.result_bytes * total)} in all")
    ]


def unprobed_facts(paths: Sequence[str]) -> Facts:
    """A note on the layers that no probe could see, if there are any.

    >>> unprobed_facts([])
    []
    """
    if not paths:
        return []
    named = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")
    return [("note", f"no probe sees {named}: through vmap(grad), which is slower")]


def resumed_facts(resumed: int, noun: str = "row") -> Facts:
    """How much was there already."""
    return [("resumed", f"from {count(resumed, noun)} that were there already")] if resumed else []


def store_facts(summary: Summary, noun: str = "row") -> Facts:
    """Gradients that were written."""
    lines = [
        ("store", f"{summary.path} [{count(summary.rows, noun)}]"),
        *resumed_facts(summary.resumed, noun),
    ]
    if summary.zero:
        lines.append(("note", f"{count(summary.zero, noun)} with a zero gradient"))
    return [*lines, *unprobed_facts(summary.unprobed)]


def scores_facts(path: Path, rows: int, queries: int, noun: str = "row", resumed: int = 0) -> Facts:
    """Scores that were written."""
    shape = f"{count(rows, noun)}, {count(queries, 'query')}"
    return [("scores", f"{path} [{shape}]"), *resumed_facts(resumed, noun)]


def curvature_facts(run: str, fitted: Curvature) -> Facts:
    """A curvature that was written."""
    shape = f"{fitted.kind}, {count(len(fitted), 'block')}, {count(fitted.rows, 'row')}"
    largest = max(float(one.values.max()) for one in fitted.values())
    total = sum(float(one.values.sum()) for one in fitted.values())
    return [
        ("curvature", f"{run}/hessian.h5 [{shape}]"),
        ("eigenvalues", f"sum {total:.4g}, largest {largest:.4g}"),
    ]


def shard_facts(train: Corpus, shard: Shard | None) -> Facts:
    """Which rows a part does."""
    if shard is None:
        return []
    rows, tokens = shard_rows(train.lengths, shard), count(tokens_of(train, shard), "token")
    return [
        ("shard", f"{shard}: rows {rows.start:,} to {rows.stop - 1:,} ({count(len(rows), 'row')}, {tokens})")
    ]


def next_facts(run: str, shard: Shard | None, then: str = "") -> Facts:
    """What is to be done when all parts are there."""
    if shard is None or TOGETHER.get() is not None:
        return []
    return [("next", f"when all {shard.count} are there: gradfn merge {run}{then}")]


def tokens_of(train: Corpus, shard: Shard | None = None) -> int:
    """Tokens of the training rows, or of a part of them; refuses more parts than rows."""
    rows = range(len(train)) if shard is None else shard_rows(train.lengths, shard)
    return int(train.lengths[rows.start : rows.stop].sum())
