"""Texts of which every token is a query, as a page shows them: whole, with the tokens that carry a score."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Float

from gradfn.report.page_texts import shade
from gradfn.report.page_values import Whole
from gradfn.report.rendering import visible
from gradfn.shown import SAID


def token_groups(of: Sequence[int]) -> list[range]:
    """The queries that are tokens of one text, given the text that each is of.

    >>> token_groups([0, 0, 1])
    [range(0, 2), range(2, 3)]
    """
    groups, start = [], 0
    for _, members in groupby(of):
        groups.append(range(start, start := start + len([*members])))
    return groups


def token_pieces(texts: Sequence[str]) -> list[tuple[str, int | None]]:
    """The parts of a text, each with the place of its token among some, or None.

    Args:
        texts: of the tokens as `gradfn.hf.queries.each_token` writes them, each with what stands before it.

    >>> token_pieces(["The\u00a0→  end", "The end?\u00a0→  no"])
    [('The', None), (' end', 0), ('?', None), (' no', 1)]
    """
    parts = [(asked, said) for asked, _, said in (text.rpartition(SAID) for text in texts)]
    whole, end = "".join(parts[-1]), 0
    made: list[tuple[str, int | None]] = []
    for place, (asked, said) in enumerate(parts):
        start = max(end, _common(asked, whole))
        stop = max(start, _common(asked + said, whole))
        made += [(whole[end:start], None), (whole[start:stop], place)]
        end = stop
    return [(text, place) for text, place in (*made, (whole[end:], None)) if text]


def whole_of(
    texts: Sequence[str], numbers: range, values: Float[np.ndarray, "rows queries"], row_ids: Sequence[str]
) -> Whole:
    """A text whose tokens are queries, shaded by the row with the highest sum of scores.

    Args:
        texts: of all its tokens.
        numbers: the queries that the page holds.
        values: the scores of all rows for these.
        row_ids: their names.
    """
    row = int(values.sum(1).argmax())
    most = float(np.abs(values[row]).max()) or 1.0
    pieces = [
        (visible(text), None, "") if place is None or place >= len(numbers)
        else (visible(text), numbers[place], shade(float(values[row, place]), most))
        for text, place in token_pieces(texts)
    ]  # fmt: skip
    return Whole(pieces, visible(row_ids[row]))


def _common(a: str, b: str) -> int:
    """How many letters two texts have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
