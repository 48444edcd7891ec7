"""What a page shows, as plain values: its template reads these, and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gradfn.report.pictures import Grid, Histogram, Lines, Scatter


class Budget(NamedTuple):
    """What a page holds at most.

    Args:
        rows: whose scores it holds; those that rank highest and lowest.
        cells: scores of one damping and run.
        queries: the first ones.
        characters: of a row's text.
    """

    rows: int = 1000
    cells: int = 120_000
    queries: int = 200
    characters: int = 600

    def smaller(self) -> "Budget":
        """The next that is tried."""
        return Budget(
            max(self.rows * 2 // 3, 20), self.cells * 2 // 3, max(self.queries * 4 // 5, 1),
            max(self.characters * 2 // 3, 120),
        )  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A row below a query.

    Args:
        row, id, rank, score: of the row; the rank is among the rows of its side.
        share: its score as a share of the largest in size, from -1 to 1.
        x: where it lies in the histogram, from 0 to 100.
        pieces: its text in parts, each with the shade of its marking or "".
        badges: what is told of it in a word.
        columns: names and values of metadata.
        others: of every other run the name, the score, its share and the rank.
        label, predicted: its class, and the model's own.
        near: of a class the rows of it that are nearest, `(class, ids)`.
        image: whether there is a small image of it.
    """

    row: int
    id: str
    rank: int
    score: float
    share: float
    x: float
    pieces: Sequence[tuple[str, str]]
    badges: Sequence[str] = ()
    columns: Sequence[tuple[str, str]] = ()
    others: Sequence[tuple[str, float, float, int]] = ()
    label: str = ""
    predicted: str = ""
    near: Sequence[tuple[str, str]] = ()
    image: bool = False


@dataclass(frozen=True)
class QueryPart:
    """A query and its rows.

    Args:
        number, id: of the query.
        asked, said: its text; only `said` is supervised, where `asked` is not empty.
        answers: of every model its run, what is said of its answer, and whether it knows it.
        sides: names and cards.
        histogram: of all scores.
        source: the id of the row that is known to teach the answer.
        lexical: ids of the rows that BM25 finds; None where it did not search.
        heat: the squares of the heat map of the first row.
        lines: how scores grew over time.
        agreement: of every other run how far it agrees.
    """

    number: int
    id: str
    asked: str
    said: str
    answers: Sequence[tuple[str, str, bool | None]]
    sides: Sequence[tuple[str, Sequence[Card]]]
    histogram: Histogram
    source: str | None = None
    lexical: Sequence[str] | None = None
    heat: Sequence[tuple[str, int, str]] = ()
    lines: Lines | None = None
    agreement: Sequence[str] = ()


@dataclass(frozen=True)
class RunPart:
    """What is told of a run: its name, its method, its dampings, its command, and all that it records."""

    name: str
    method: str
    dampings: Sequence[str]
    command: str
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """All that the template shows; `blocks` is the run of the heat map, `data` what the script reads."""

    title: str
    own: bool
    marked: bool
    asking: bool
    rows: int
    runs: Sequence[RunPart]
    queries: Sequence[QueryPart]
    notes: Sequence[str]
    hints: Sequence[str]
    grid: Grid | None
    blocks: str
    images: Sequence[tuple[int, str]]
    scatters: Sequence[Scatter]
    command: str
    data: Mapping[str, Any] = field(repr=False)

    @property
    def blank(self) -> Card:
        """What the script makes further cards of."""
        return Card(0, "", 0, 0.0, 0.0, 0.0, [])
