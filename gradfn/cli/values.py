"""From what is typed to values: the parsers of options. Nothing here loads torch before it must."""

import os
import re
from math import isfinite
from pathlib import Path
from typing import Any

from gradfn.cli.request import found
from gradfn.errors import InputError

STDOUT = Path("-")
"""What --csv and --jsonl take for stdout."""


def written(path: str) -> str:
    """A path that is written, absolute; "-" is stdout."""
    return path if path == str(STDOUT) else os.path.abspath(path)


def device_named(name: str) -> str:
    """A device; "auto" is a CUDA GPU where there is one, else the CPU."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dampings(text: str) -> Any:
    """Dampings as they are spelled."""
    from gradfn.linalg.spectrum import parse_dampings

    return parse_dampings(text)


def dynamics(text: str) -> Any:
    """How an optimizer moves weights, as it is spelled."""
    from gradfn.methods.dynamics import parse_dynamics

    return parse_dynamics(text)


def shard(text: str) -> Any:
    """A shard as it is spelled."""
    from gradfn.runs.shards import parse_shard

    return parse_shard(text)


def dims(text: str) -> int | tuple[int, int]:
    """`4096`, or `128x128`.

    Raises:
        InputError: anything else.

    >>> dims("128x64")
    (128, 64)
    """
    if not (match := re.fullmatch(r"0*([1-9]\d{0,8})(?:x0*([1-9]\d{0,8}))?", text, re.ASCII)):
        raise InputError(
            f"--keep {text!r}: give 128x128 for both sides of every block, or 4096 of each flattened"
        )
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def paths(text: str) -> tuple[str, ...]:
    """Paths with commas between.

    >>> paths("a, b")
    ('a', 'b')
    """
    named = tuple(part.strip() for part in text.split(","))
    if "" in named:
        raise InputError(f"{text!r} names no path, or an empty one: give paths with commas between")
    return named


def weights(text: str) -> tuple[float, ...]:
    """Finite numbers with commas between."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(isfinite, numbers)):
        raise InputError(f"--checkpoint-weights {text} are not numbers: give 0.1,0.05, say")
    return numbers


def sizes(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--remove-top {text} are not whole numbers: give 10,20, say") from None


def steps(text: str) -> tuple[int, int | None]:
    """A part of the steps of a training.

    Raises:
        InputError: it is not spelled so.

    >>> steps("100:200"), steps("100:"), steps(":200")
    ((100, 200), (100, None), (0, 200))
    """
    if not (match := re.fullmatch(r"(\d{0,9}):(\d{0,9})", text, re.ASCII)):
        raise InputError(
            f"--steps {text!r} is no part of the steps: give 100:200, or 100: for those from 100 on"
        )
    return int(match[1] or 0), int(match[2]) if match[2] else None


def found_method(text: str) -> str:
    """`FILE.py:NAME` with the path of the file absolute.

    >>> found_method("ekfac")
    'ekfac'
    """
    path, colon, name = text.rpartition(":")
    return f"{found(path)}:{name}" if colon else text


def found_baseline(text: str) -> str:
    """`embedding:FOLDER` with the path of the folder absolute.

    >>> found_baseline("bm25")
    'bm25'
    """
    kind, colon, path = text.partition(":")
    return f"{kind}:{found(path)}" if colon else text


def found_projection(text: str) -> str:
    """A projection as it is spelled, with the runs that it is read from absolute."""
    from gradfn.transforms.projection import quoted

    def place(match: re.Match[str]) -> str:
        path = match[2][1:-1].replace('""', '"') if match[2].startswith('"') else match[2].strip()
        return match[1] + quoted(found(path)) + match[3]

    return re.sub(r'(selective:|pca:\d+x\d+:)("(?:[^"]|"")*"|[^">]*[^">\s])(\s*)', place, text)
