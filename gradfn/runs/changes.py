"""What was changed since a run was made, as far as it can be told: rows of data, parts of a model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch

from gradfn.model.fingerprint import NO_ADAPTER_FUNCTION, NO_FUNCTION
from gradfn.store import MISSING, SettingsDiffer, Store, differing, in_words
from gradfn.store.directory import index_path, segments_of
from gradfn.store.file import read_header

AROUND, BEHIND = 20, 60
"""Letters that are shown before and behind the first in which two texts differ."""
MOST_BYTES = 4 << 30
"""Of files of weights that are compared number by number."""


@contextmanager
def explaining(run: Path, kind: str, arrays: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """Say of settings that differ also which rows do, and what differs between two models.

    Args:
        run, kind: what is there.
        arrays: what the rows here have beside them, by the names of arrays there.
    """
    try:
        yield
    except SettingsDiffer as error:
        changed = error.differences.keys()
        models = [str(side.get("model", {}).get("path")) for side in (error.there, error.here)]
        weights = "model.fingerprint" in changed and "model.precision" not in changed
        more = [changed_model(*models)] if weights else []
        if "data.fingerprint" in changed:
            more.append(changed_rows(run, kind, arrays))
        raise error.saying("".join(f"; {one}" for one in more if one)) from None


def changed_rows(run: Path, kind: str, arrays: Mapping[str, Sequence[Any]]) -> str:
    """How many of the rows of a run are others by now, and which is the first; "" where it does not tell.

    Args:
        run, kind, arrays: see `explaining`.
    """
    paths = segments_of(run, kind) or [index_path(run, kind)]
    headers = [read_header(path) for path in paths]
    spans = sorted((one.start, one.stop) for one in headers)
    segments = tuple(spans) if segments_of(run, kind) else ()
    there = Store(
        index_path(run, kind), replace(headers[0], start=0, stop=headers[0].rows, segments=segments)
    )
    names = [name for name in arrays if name in there.header.arrays]
    if not names:
        return ""
    changed, seen, first = 0, 0, ""
    for start, stop in spans:
        old = there.read_all(names, start, stop)
        new = {name: list(arrays[name][start:stop]) for name in names}
        for place in range(stop - start):
            sides = {n: (old[n][place], new[n][place] if place < len(new[n]) else MISSING) for n in names}
            unlike = {name: (a, b) for name, (a, b) in sides.items() if a != b}
            first = first or (_first(start + place, unlike) if unlike else "")
            changed, seen = changed + bool(unlike), seen + 1
    if not changed:
        return f"the {seen:,} rows there have the same ids, texts and lengths, so tokens or labels differ"
    return f"{changed:,} of the {seen:,} rows there differ, first {first}"


def _first(row: int, unlike: Mapping[str, tuple[Any, Any]]) -> str:
    name, (a, b) = next(iter(unlike.items()))
    alike = (x == y for x, y in zip_longest(str(a), str(b)))
    start = max(0, sum(1 for _ in takewhile(bool, alike)) - AROUND)
    a, b = (repr(str(one)[start : start + BEHIND]) if isinstance(one, str) else str(one) for one in (a, b))
    return f"row {row}, whose {name.removeprefix('rows/')} is {a} there and {b} here"


def changed_model(a: str, b: str) -> str:
    """The first difference between the files of two models: of their configs, or of a tensor.

    Args:
        a, b: where the models are; "" is given for what are no two folders of this machine.
    """
    one, other = Path(a), Path(b)
    if not (one.is_dir() and other.is_dir()):
        return ""
    if one.resolve() == other.resolve():
        return f"{a} has been changed since"
    for file, without in (("config.json", NO_FUNCTION), ("adapter_config.json", NO_ADAPTER_FUNCTION)):
        configs = [_config(place / file, without) for place in (one, other)]
        if found := differing(*configs):
            return f"in {file}, {in_words(dict([next(iter(found.items()))]))}"
    return _changed_tensor(one, other)


def _config(file: Path, without: set[str]) -> dict[str, Any]:
    try:
        return {key: v for key, v in json.loads(file.read_text()).items() if key not in without}
    except (OSError, ValueError, AttributeError):  # then it tells nothing, and the models were loaded
        return {}


def _changed_tensor(one: Path, other: Path) -> str:
    """The first tensor in the weights of two folders that differs in shape or, of small ones, in a number."""
    from safetensors import safe_open

    small = sum(file.stat().st_size for file in [*one.glob("*.safetensors"), *other.glob("*.safetensors")])
    for a, b in zip_longest(sorted(one.glob("*.safetensors")), sorted(other.glob("*.safetensors"))):
        if a is None or b is None or a.name != b.name:
            return ""
        with safe_open(a, "pt") as theirs, safe_open(b, "pt") as ours:
            for name in sorted({*theirs.keys()} ^ {*ours.keys()}):
                return f"only one of them has {name}"
            for name in sorted(theirs.keys()):
                shapes = [side.get_slice(name).get_shape() for side in (theirs, ours)]
                if shapes[0] != shapes[1]:
                    return f"{name} has shape {shapes[0]} there and {shapes[1]} here"
                if small <= MOST_BYTES and not torch.equal(theirs.get_tensor(name), ours.get_tensor(name)):
                    return f"the first tensor that differs is {name}"
    return ""
