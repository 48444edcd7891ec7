"""Settings beside each other: which leaves differ, and what is refused for it."""

import json
import re
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

from gradfn.errors import InputError

SHOWN = 8
"""Settings that an error message shows."""
DIGEST = re.compile("[0-9a-f]{16}")
"""A value that tells nobody anything, but that it is another one."""


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def differing(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Return the leaves in which two nested settings differ, by dotted key.

    Args:
        a: settings as JSON has them: dicts, lists, strings, numbers, booleans, None.
        b: the settings to compare with.

    Returns:
        `{dotted key: (value in a, value in b)}`, with `MISSING` for what one side does not have.

    >>> differing({"project": {"dim": 16, "seed": 0}}, {"project": {"dim": 32, "seed": 0}, "loss": "sum"})
    {'project.dim': (16, 32), 'loss': (nothing, 'sum')}
    """
    if a == b or (a != a and b != b):  # NaN is the same setting as NaN
        return {}
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        pairs = {str(key): (a.get(key, MISSING), b.get(key, MISSING)) for key in {**a, **b}}
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        pairs = {str(i): pair for i, pair in enumerate(zip_longest(a, b, fillvalue=MISSING))}
    else:
        return {"": (a, b)}
    return {
        f"{key}.{inner}" if inner else key: values
        for key, pair in pairs.items()
        for inner, values in differing(*pair).items()
    }


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings as they come back from JSON (tuples are lists, keys are strings)."""
    try:
        return json.loads(json.dumps(settings))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the settings of a store must be plain JSON values, got {settings!r}: {error}"
        ) from error


def in_words(differences: Mapping[str, tuple[Any, Any]], show: Callable[[Any], str] | None = None) -> str:
    """What `differing` found, in an error message: both values of the first eight settings, but of digests.

    Args:
        differences: what `differing` returns.
        show: how to write a value; None means `shown`, which tells `1` from `"1"`.

    >>> in_words(differing({"dim": 16, "seed": 0}, {"dim": 32}))
    'dim is 16 there and 32 here, seed is 0 there and nothing here'
    >>> in_words({"tokenizer.fingerprint": ("0123456789abcdef", "fedcba9876543210")})
    'tokenizer is not the same'
    """
    show = show or shown

    def pair(key: str, a: Any, b: Any) -> str:
        if all(isinstance(side, str) and DIGEST.fullmatch(side) for side in (a, b)):
            return f"{key.removesuffix('.fingerprint')} is not the same"
        return f"{key} is {show(a)} there and {show(b)} here"

    pairs = [pair(key, a, b) for key, (a, b) in differences.items()]
    more = f" and {len(pairs) - SHOWN} more settings differ" if len(pairs) > SHOWN else ""
    return ", ".join(pairs[:SHOWN]) + more


def shown(value: Any, limit: int = 100) -> str:
    """A setting in an error message: as JSON, cut in the middle where it is long.

    >>> shown("a" * 10, limit=8)
    '"aaa...aaa"'
    """
    text = repr(value) if value is MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
