"""What is shown of a row of which only a part is supervised, and of what the data says in an error."""

from typing import Any

SAID = "\u00a0→ "
"""What stands in a text before the part that is supervised. Its space tells it from arrows of the data."""


def asked_and_said(asked: str, said: str) -> str:
    """What to show of a row of which only a part is supervised: the rest, an arrow, that part.

    >>> asked_and_said("The capital of Peru is", " Lima").split()
    ['The', 'capital', 'of', 'Peru', 'is', '→', 'Lima']
    """
    return f"{asked}{SAID}{said.strip()}" if asked.strip() and said.strip() else asked + said


def brief(value: Any, limit: int = 80) -> str:
    """A value of the data in an error, such as an id: as Python writes it, cut where it is long.

    >>> brief("egypt"), brief("a" * 100, limit=5)
    ("'egypt'", "'aaa…")
    """
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
