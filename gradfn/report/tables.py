"""Tables for a terminal, or as lines for other programs. Text that comes from data is never markup."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradfn.report.words import clean, whole
from gradfn.shown import SAID

Row = Mapping[str, Any]
NAME_WIDTH = 30
EXCERPT_WIDTH = 20
SHOWN_SHARES = 3
ARROW = " → "


class Piped(Console):
    """Where there is no terminal: a row of a table is one line, whole and without blanks at its end."""

    def print(self, *objects: Any, **how: Any) -> None:
        """Print a table as lines, anything else as ever."""
        for one in objects or ("",):
            if isinstance(one, Table):
                super().print(Text("\n".join(_lines(one))), soft_wrap=True)
            else:
                super().print(one, **how)


def _lines(table: Table) -> Iterator[str]:
    """A table without borders; its columns are aligned, except by cells that are longer than most."""
    columns = [list(map(_plain, column.cells)) for column in table.columns]
    if table.show_header:
        columns = [[_plain(one.header), *cells] for one, cells in zip(table.columns, columns, strict=True)]
    widths = [min(max(map(cell_len, cells), default=0), 2 * NAME_WIDTH) for cells in columns]
    for row in zip(*columns, strict=True):
        cells = zip(row, widths, table.columns, strict=True)
        padded = ((" " * (width - cell_len(cell)), cell, one.justify) for cell, width, one in cells)
        yield "  ".join(gap + cell if side == "right" else cell + gap for gap, cell, side in padded).rstrip()


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


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


def ranking(rows: Sequence[Row], width: int | None) -> Table:
    """Proponents and opponents of one query: rank, score, id and an excerpt that fits in the width.

    Before the excerpt of a row that has a `label` stands the model's own class, if it is another.
    Below a row that has `shares` stand the first `shown` of them; `beside` stands before the text of a row.

    Args:
        width: in terminal cells; None: as wide as the ids and texts are.
    """
    beside = any(row.get("beside") for row in rows)
    table = bare(show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for _ in range(2 + beside):
        table.add_column(no_wrap=True, overflow="ellipsis")
    sides = [Text(f"  {row['side']} {row['rank']}") for row in rows]
    scores, ids = [_signed(float(row["score"])) for row in rows], [clean(_name(row)) for row in rows]
    name, room = (None, None) if width is None else _room(width, sides, scores, ids)
    places = [[Text(str(row["beside"]))] if beside else [] for row in rows]
    if room is not None and beside:
        room = max(EXCERPT_WIDTH, room - 2 - _longest(place for (place,) in places))
    for row, side, score, which, place in zip(rows, sides, scores, ids, places, strict=True):
        table.add_row(side, score, _cut(which, name), *place, Text(excerpt(_text(row), room)))
        for block, share in row.get("shares", ())[: row.get("shown")]:
            table.add_row("", _signed(share), "", *([""] if beside else []), _cut(clean(block), room))
    return table


def excerpt(text: str, cells: int | None) -> str:
    """A text on one line of so many terminal cells; None: all of it.

    Of a text that is supervised in part it is the end of the rest, and the beginning of that part.

    >>> excerpt(f"You are helpful. Who wrote it?{SAID}Dr. Who, long ago", 24)
    '…wrote it? → Dr. Who, l…'
    """
    if cells is None:
        return whole(text)
    asked, arrow, said = text.rpartition(SAID)
    asked, said = clean(asked), clean(said)
    if not arrow:
        return _cut(said, cells).plain
    room = max(0, cells - len(ARROW))
    front = min(cell_len(asked), max(room - cell_len(said), room // 2))
    # A text that is turned round is cut at its start.
    return _cut(asked[::-1], front).plain[::-1] + _cut(ARROW + said, cells - front).plain


def _room(width: int, sides: list[Text], scores: list[Text], ids: list[str]) -> tuple[int, int]:
    """The cells for names, and for texts.

    Rich would shrink all columns alike, down to no score at all; it is the texts that have room to spare.
    """
    name = min(NAME_WIDTH, _longest(map(Text, ids)))
    room = width - 32 - name
    if room >= EXCERPT_WIDTH:
        return name, room
    left = max(0, width - 6 - _longest(sides) - _longest(scores))
    name = min(name, max(left - EXCERPT_WIDTH, min(left, EXCERPT_WIDTH // 2)))
    return name, min(EXCERPT_WIDTH, left - name)


def _longest(texts: Iterable[Text]) -> int:
    return max((text.cell_len for text in texts), default=0)


def _name(row: Row) -> str:
    """The id of a row; of a token, that of its document with the position in it."""
    return f"{row['id']}:{row['position']}" if "position" in row else str(row["id"])


def _text(row: Row) -> str:
    """
    >>> _text({"label": "a", "predicted": "b", "text": "x → a"}), _text({"text": "x"})
    ('[the model: b] x → a', 'x')
    """
    said = row.get("predicted")
    return str(row["text"]) if said is None or said == row["label"] else f"[the model: {said}] {row['text']}"


def _signed(value: float) -> Text:
    return Text(f"{value:+.4g}", style="green" if value > 0 else "red" if value < 0 else "")


def _cut(text: str, cells: int | None) -> Text:
    """Text of a width in terminal cells, of which a Chinese letter takes two; None: all of it."""
    cut = Text("" if cells == 0 else text)
    if cells is not None:
        cut.truncate(cells, overflow="ellipsis")
    return cut
