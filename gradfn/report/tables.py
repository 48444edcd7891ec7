"""Tables for a terminal. Text that comes from data is never markup."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from gradfn.report.words import clean

Row = Mapping[str, Any]
NAME_WIDTH = 30
EXCERPT_WIDTH = 20
SHOWN_SHARES = 3


def bare(**how: Any) -> Table:
    """A table without borders."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), **how)


def numbers_table(first: str, *names: str) -> Table:
    """An empty table: names to the left, below `first`, and columns of numbers to the right."""
    table = bare(header_style="bold")
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def rows_table(
    rows: Sequence[Row], columns: Sequence[str], left: Sequence[str] = ("run", "damping")
) -> Table:
    """A table of rows: columns `left` to the left, others to the right, none that is empty."""
    table = bare(header_style="bold")
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    for name in columns:
        side = "left" if name in left else "right"
        table.add_column(name.strip(), justify=side, no_wrap=name not in left, overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(str(row.get(name, "")))) for name in columns))
    return table


def facts(pairs: Sequence[tuple[str, str]]) -> Table:
    """A borderless table of names and values."""
    table = bare(show_header=False)
    table.add_column(style="bold", no_wrap=True, overflow="ellipsis", max_width=NAME_WIDTH)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(clean(name)), Text(clean(value)))
    return table


def ranking(rows: Sequence[Row], width: int) -> Table:
    """Proponents and opponents of one query: rank, score, id and an excerpt that fits in the width.

    Before the excerpt of a row that has a `label` stands this class, and the model's own if it is another.
    Below a row that has `shares` stand the largest of them.
    """
    table = bare(show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, overflow="ellipsis")
    sides = [Text(f"  {row['side']} {row['rank']}") for row in rows]
    scores, ids = [_signed(float(row["score"])) for row in rows], [clean(_name(row)) for row in rows]
    # Rich would shrink all columns alike, down to no score at all; it is the texts that have room to spare.
    name = min(NAME_WIDTH, _longest(map(Text, ids)))
    excerpt = width - 32 - name
    if excerpt < EXCERPT_WIDTH:
        left = max(0, width - 6 - _longest(sides) - _longest(scores))
        name = min(name, max(left - EXCERPT_WIDTH, min(left, EXCERPT_WIDTH // 2)))
        excerpt = min(EXCERPT_WIDTH, left - name)
    for row, side, score, which in zip(rows, sides, scores, ids, strict=True):
        table.add_row(side, score, _cut(which, name), _cut(clean(_text(row)), excerpt))
        for block, share in row.get("shares", ())[:SHOWN_SHARES]:
            table.add_row("", _signed(share), "", _cut(clean(block), excerpt))
    return table


def _longest(texts: Iterable[Text]) -> int:
    return max((text.cell_len for text in texts), default=0)


def _name(row: Row) -> str:
    """The id of a row; of a token, that of its document with the position in it."""
    return f"{row['id']}:{row['position']}" if "position" in row else str(row["id"])


def _text(row: Row) -> str:
    """
    >>> _text({"label": "a", "predicted": "b", "text": "x"}), _text({"text": "x"})
    ('[a, the model: b] x', 'x')
    """
    if "label" not in row:
        return str(row["text"])
    other = "" if row["predicted"] == row["label"] else f", the model: {row['predicted']}"
    return f"[{row['label']}{other}] {row['text']}"


def _signed(value: float) -> Text:
    return Text(f"{value:+.4g}", style="green" if value > 0 else "red" if value < 0 else "")


def _cut(text: str, cells: int) -> Text:
    """Text of a width in terminal cells, of which a Chinese letter takes two."""
    cut = Text(text if cells else "")
    cut.truncate(cells, overflow="ellipsis")
    return cut
