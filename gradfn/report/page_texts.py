"""Texts, tokens and numbers as a page shows them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradfn.hf.answers import Answer
from gradfn.report.rankings import LIKELY_NATS
from gradfn.report.rendering import visible
from gradfn.shown import SAID

TOKEN_SHADES = 4
LEAST = 0.08
"""Tokens below this share of the row's strongest token are not marked."""
CELL = 60
"""Letters of a value in a column of metadata."""


def marked_pieces(pieces: Sequence[str], values: np.ndarray, characters: int) -> list[tuple[str, str]]:
    """The tokens of a row with the shade of each, around the strongest one as far as there is room.

    >>> marked_pieces(["a", "b", "c"], np.array([1.0, 0.01, -0.5]), 100)
    [('a', 'p4'), ('b', ''), ('c', 'n2')]
    """
    sizes = np.abs(values)
    most, start = float(sizes.max(initial=0)) or 1.0, 0
    if sum(map(len, pieces)) > characters:
        start, room = int(sizes.argmax()), characters // 2
        while start and room > 0:
            start -= 1
            room -= len(pieces[start])
    made: list[tuple[str, str]] = [("…", "")] if start else []
    room = characters
    for piece, value in zip(pieces[start:], values[start:], strict=True):
        if room <= 0:
            return [*made, ("…", "")]
        room -= len(piece)
        shade = int(np.ceil(TOKEN_SHADES * abs(value) / most)) if abs(value) >= LEAST * most else 0
        name = f"{'p' if value > 0 else 'n'}{shade}" if shade else ""
        if made and made[-1][1] == name == "":
            made[-1] = (made[-1][0] + visible(piece), "")
        else:
            made.append((visible(piece), name))
    return made


def answer_in_words(answer: Answer) -> tuple[str, bool | None]:
    """What is told of a model's answer, and whether it knows it.

    >>> answer_in_words(Answer(0.02, 0.98, True, ""))
    ('The model knows this answer: probability 0.98, 0.02 nats a token.', True)
    """
    nats = f"{answer.loss:.2f} nats a token"
    if answer.known is None:
        return f"The loss of the model is {nats}.", None
    chance = f"probability {answer.probability:.3g}, {nats}"
    if answer.known:
        return f"The model knows this answer: {chance}.", True
    says = f" It says “{visible(answer.says).strip()}”." if answer.says.strip() else ""
    if answer.loss < LIKELY_NATS:
        return f"The model finds this answer likely: {chance}.{says}", None
    return f"The model does not know this answer, so there may be no source: {chance}.{says}", False


def texts_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; tokens that end inside a letter add nothing."""
    made, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, through = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start:end])
        if through.endswith("\ufffd") and end < len(ids):
            made.append("")
            continue
        made.append(through[len(before) :])
        start, done = done, end
    return made


def cell(value: Any) -> str:
    """A value of a column in a few letters."""
    return "" if value is None else cut(visible(str(value)), CELL)


def row_text(text: str, characters: int) -> str:
    """The text of a row, of at most so many letters; of a prompt the end, so that what is supervised stays.

    >>> row_text("a very long question\u00a0\u2192 an answer", 20)
    '…uestion\\xa0→ an answer'
    """
    text = visible(text)
    asked, arrow, said = text.rpartition(SAID)
    if len(text) <= characters or not arrow:
        return cut(text, characters)
    said = cut(said, max(characters // 2, characters - len(asked) - len(arrow)))
    room = characters - len(said) - len(arrow)
    return (asked if len(asked) <= room else "…" + asked[len(asked) - room + 1 :]) + arrow + said


def cut(text: str, characters: int) -> str:
    """A text of at most so many letters.

    >>> cut("Bujumbura", 5)
    'Buju…'
    """
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def short(value: float) -> float | int:
    """Four digits, which are few letters in JSON.

    >>> short(0.123456), short(2.0)
    (0.1235, 2)
    """
    brief = float(f"{value:.4g}")
    return int(brief) if brief.is_integer() and abs(brief) < 1e6 else brief
