"""`gradfn info`: what a run holds and how it was made."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradfn.cli.commands import InfoRequest, spelled
from gradfn.cli.console import console
from gradfn.cli.request import command_line
from gradfn.cli.rerun import recorded_request
from gradfn.errors import InputError
from gradfn.report.runs import contents, part_facts
from gradfn.report.tables import facts
from gradfn.report.words import as_json
from gradfn.store.directory import index_path
from gradfn.store.reader import Store, open_store

KINDS = ("store", "scores", "hessian", "basis", "mask", "truth", "training")


def run_info(request: InfoRequest) -> None:
    """Show every index of the run, or the one file given, and which shards are there."""
    if request.command and request.json:
        raise InputError("--command and --json print different things: leave one of them out")
    if request.command:
        print(command_line(*recorded_request(request.run)))
        return
    shards = list(part_facts(request.run))
    stores = dict(_stores(request.run, bool(shards)))
    if request.json:
        files = [_as_json(*found) for found in stores.items()]
        print(as_json({"files": files, "shards": [state for _, state in shards]}))
        return
    if shards:
        console().print(facts(shards))
    for path, store in stores.items():
        made = [("command", spelled(store.request))] if store.request else []
        console().print(facts([("file", path), *made, *contents(store)]))


def _stores(run: str, in_shards: bool) -> Iterator[tuple[str, Store]]:
    """The files of a run, or the one given, by their paths as they were given."""
    path = Path(run)
    kinds = [kind for kind in KINDS if path.is_file() or (path / f"{kind}.h5").exists()]
    if in_shards and not kinds:
        return
    # Where there is no index, opening says why: unfinished, absent, or not a run.
    unfinished = [kind for kind in KINDS if any(path.glob(f"segments/{kind}-*"))]
    for kind in kinds[:1] if path.is_file() else kinds or unfinished[:1] or KINDS[:1]:
        yield str(index_path(run, kind)), open_store(run, kind)


def _as_json(path: str, store: Store) -> dict[str, Any]:
    """What a file of a run holds, as plain JSON values."""
    return {
        "file": path, "kind": store.header.kind, "rows": store.rows,
        "command": spelled(store.request) if store.request else None, "settings": store.settings,
        "arrays": {name: list(store.shape(name)) for name in store.names()},
    }  # fmt: skip
