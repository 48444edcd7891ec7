"""`gradfn info`: what a run holds and how it was made."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradfn.cli.show import console, facts
from gradfn.errors import InputError
from gradfn.store import Store, open_store

KINDS = ("store", "scores")


def run_info(run: str) -> None:
    """Show every index of the run."""
    path = Path(run)
    kinds = [kind for kind in KINDS if (path / f"{kind}.h5").exists()] if path.is_dir() else [path.stem]
    if not kinds:
        # Opening says why: unfinished, absent, or not a run.
        kinds = [next((k for k in KINDS if any(path.glob(f"segments/{k}-*"))), "store")]
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"{run} is no run: give a run directory, or the store.h5 or scores.h5 in it")
        with open_store(run, kind) as store:
            console().print(facts(list(_lines(store))))


def _lines(store: Store) -> Iterator[tuple[str, str]]:
    yield "file", str(store.path)
    arrays = store.names()
    blocks = [name for name in arrays if name.startswith("gradients/")]
    if blocks:
        yield (
            "gradients",
            f"{len(blocks)} blocks, such as {blocks[0].split('/', 1)[1]} {store.shape(blocks[0])}",
        )
    if "scores" in arrays:
        yield "scores", f"{store.shape('scores')} rows x queries; positive = proponent"
    tokens, loss = int(store.read("rows/length").sum()), store.read("rows/loss").mean()
    yield "rows", f"{store.rows}, {tokens:,} tokens, mean loss {loss:.3f}"
    for key, value in _flat(store.settings):
        yield key, value if isinstance(value, str) else json.dumps(value)


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
