"""Numbers with their nouns, and text from data as one line that is safe to print."""

import json
import unicodedata
from typing import Any

from gradfn.shown import SAID

ESCAPED = str.maketrans({
    "\n": r"\n", "\r": r"\r", "\t": r"\t", "\u2028": r"\n", "\u2029": r"\n", **dict.fromkeys("\v\f\x85", " ")
})  # fmt: skip


def count(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count(1, "row"), count(1200, "row"), count(2, "query")
    ('1 row', '1,200 rows', '2 queries')
    """
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number:,} {noun if number == 1 else plural}"


def size_of(size: int) -> str:
    """A number of bytes in the unit that makes it short.

    >>> size_of(512), size_of(24 << 10), size_of(2900 << 20)
    ('512 B', '24.0 KiB', '2.8 GiB')
    """
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def clean(text: str, width: int | None = None) -> str:
    """One line of printable text: line breaks become spaces, control characters are dropped.

    >>> clean("a\\n\\x1b[31mb")
    'a [31mb'
    """
    line = _printable(" ".join(text.split()))
    return line if width is None or len(line) <= width else line[: width - 1].rstrip() + "…"


def whole(text: str) -> str:
    """All of a text as one line for other programs: breaks are written as `\\n`, control characters dropped.

    >>> print(whole("a\\n b\\x1b"))
    a\\n b
    """
    return _printable(text.replace(SAID, " → ").translate(ESCAPED))


def as_json(value: Any) -> str:
    """JSON on one line, in which letters that cannot be printed are written as `\\uXXXX`: the same value.

    >>> print(as_json({"id": "é\\x1b[2J"}))
    {"id": "é\\u001b[2J"}
    """
    text = json.dumps(value, ensure_ascii=False)
    return (
        text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    )


def on_terminal(text: str) -> str:
    """Lines of a table for a terminal: without control characters, which would move its cursor or hide text.

    >>> on_terminal("a\\x1b[2J\\r\\nb")
    'a[2J\\nb'
    """
    return _printable(text, but="\n\t")


def _printable(text: str, but: str = "") -> str:
    unseen = ("Cc", "Cf", "Cs", "Co", "Cn")
    return "".join(c for c in text if c in but or unicodedata.category(c) not in unseen)
