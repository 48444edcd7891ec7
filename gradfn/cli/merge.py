"""`gradfn merge`: the parts of an array job, joined; and what a command says of its part."""

from gradfn.cli import inputs
from gradfn.cli.show import console, count, facts
from gradfn.data import Corpus
from gradfn.runs.merge import Joined, merge_run
from gradfn.runs.shards import Shard, shard_rows

AGAIN = "that was the first of two passes: run every shard of gradfn hessian again, then merge"


def run_merge(run: str, overwrite: bool) -> None:
    """Join, report."""
    inputs.check_run(run)
    lines = [line for one in merge_run(run, overwrite=overwrite) for line in _lines(one)]
    console().print(facts(lines))


def _lines(one: Joined) -> list[tuple[str, str]]:
    label = "curvature" if one.kind in ("hessian", "basis") else one.kind
    told = (label, f"{one.path} [{count(one.shards, 'shard')}]")
    return [told, ("next", AGAIN)] if one.kind == "basis" else [told]


def tokens_of(train: Corpus, shard: Shard | None) -> int:
    """Tokens of the training rows, or of a part of them; refuses more parts than rows."""
    rows = range(len(train)) if shard is None else shard_rows(train.lengths, shard)
    return int(train.lengths[rows.start : rows.stop].sum())


def shard_facts(train: Corpus, shard: Shard | None) -> list[tuple[str, str]]:
    """Which rows a part does."""
    if shard is None:
        return []
    rows, tokens = shard_rows(train.lengths, shard), count(tokens_of(train, shard), "token")
    return [
        ("shard", f"{shard}: rows {rows.start:,} to {rows.stop - 1:,} ({count(len(rows), 'row')}, {tokens})")
    ]


def next_facts(run: str, shard: Shard | None, then: str = "") -> list[tuple[str, str]]:
    """What is to be done when all parts are."""
    if shard is None:
        return []
    return [("next", f"when all {shard.count} are there: gradfn merge {run}{then}")]
