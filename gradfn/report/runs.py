"""What a run directory holds, and how it was made."""

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from gradfn.report.words import count
from gradfn.runs.shards import is_complete, kind_name, listed, shards_of
from gradfn.store.reader import Store


def part_facts(run: str) -> Iterator[tuple[str, str]]:
    """Which parts of an array job are complete, which are not, and which have not begun."""
    for kind, found in shards_of(run).items():
        for total in sorted({shard.count for shard in found}):
            these = [shard for shard in found if shard.count == total]
            done = [shard.number for shard in these if is_complete(run, kind, shard)]
            begun = [shard.number for shard in these if shard.number not in done]
            absent = sorted({*range(1, total + 1)} - {*done, *begun})
            states = (("complete", done), ("incomplete", begun), ("missing", absent))
            words = [f"{listed(numbers)} {state}" for state, numbers in states if numbers]
            yield "shards", f"{kind_name(kind)}, of {total}: {'; '.join(words)}"


def contents(store: Store) -> Iterator[tuple[str, str]]:
    """What a file of a run holds, and the settings that it was made with."""
    arrays, blocks = store.names(), store.names("gradients")
    if blocks:
        name, shape = blocks[0].split("/", 1)[1], " x ".join(map(str, store.shape(blocks[0])[1:]))
        yield "gradients", f"{count(len(blocks), 'block')}, such as {name} [{shape}]"
    if "scores" in arrays:
        queries = count(prod(store.shape("scores")[1:]), "query")
        yield "scores", f"{count(store.rows, 'row')} x {queries}; positive = proponent"
    if store.header.kind in ("hessian", "basis"):
        kind, rows = store.read("fit/kind")[0], int(store.read("fit/rows")[0])
        label = "curvature" if store.header.kind == "hessian" else "first pass"
        yield label, f"{kind}, {count(len(store.index_array('blocks')), 'block')}, {count(rows, 'row')}"
    elif store.header.kind == "mask":
        kept = store.read("blocks/kept")
        yield "mask", f"{count(len(kept), 'block')}, correlation {kept.mean():.3f} kept on average"
    elif store.header.kind == "truth":
        removed = "masked" if store.settings.get("removal") == "mask" else "dropped"
        yield "models", f"{store.rows:,}, rows outside a subset {removed}"
    elif store.header.kind == "training":
        losses = store.read("steps/loss")
        yield "steps", f"{store.rows:,}, loss {losses[0]:.4g} at the first and {losses[-1]:.4g} at the last"
    else:
        yield "rows", ", ".join(_row_facts(store, arrays))
    for key, value in _flat(store.settings):
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _row_facts(store: Store, arrays: list[str]) -> Iterator[str]:
    yield f"{store.rows:,}"
    if "rows/length" in arrays:
        yield count(int(store.read("rows/length").sum()), "token")
    if "rows/loss" in arrays:
        yield f"mean loss {store.read('rows/loss').mean():.3f}"
    if "rows/zero" in arrays and (zero := int(store.read("rows/zero").sum())):
        yield f"{zero:,} of them zero"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
