"""What a page shows of runs, gathered as plain values: for its template, and for the script in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gradfn.evaluate.correlation import correlation
from gradfn.evaluate.lexical import NOT_FOUND, bm25_ranks
from gradfn.evaluate.overlap import top_overlap
from gradfn.hf.answers import Answer
from gradfn.report.page_runs import PageRun
from gradfn.report.pictures import Grid, Histogram, Lines, Scatter, as_letters, grid_of, lines_of, shades
from gradfn.report.rankings import LIKELY_NATS
from gradfn.report.rendering import visible
from gradfn.report.rows import StoredTexts
from gradfn.report.runs import contents
from gradfn.report.words import count
from gradfn.scores import extremes
from gradfn.shown import SAID
from gradfn.store import open_store
from gradfn.train.run import INRUN, VALUES
from gradfn.train.run import KIND as TRAINING

TOKEN_SHADES = 4
LEAST = 0.08
"""Tokens below this share of the row's strongest token are not marked."""
CELL = 60
"""Letters of a value in a column of metadata."""
OWN_LISTED = 50
"""Rows that are listed where rows are scored against themselves."""
MANY = 100_000
"""Of more rows BM25 makes no index."""
NEAREST = 3
"""Rows that are nearest to a suspicious one, of a class."""


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
    """All that the template shows; `data` is what the script reads."""

    title: str
    own: bool
    asking: bool
    rows: int
    runs: Sequence[RunPart]
    queries: Sequence[QueryPart]
    notes: Sequence[str]
    grid: Grid | None
    images: Sequence[tuple[int, str]]
    scatters: Sequence[Scatter]
    command: str
    data: Mapping[str, Any] = field(repr=False)

    @property
    def blank(self) -> Card:
        """What the script makes further cards of."""
        return Card(0, "", 0, 0.0, 0.0, 0.0, [])


@dataclass(frozen=True, eq=False)
class Gathered:
    """Runs of the same rows and queries, and how much of them a page holds.

    Args:
        runs: the first is shown, the others beside it.
        budget: what a page holds.
        top: rows that are listed on each side of a query.
    """

    runs: Sequence[PageRun]
    budget: Budget
    top: int

    # --- the rows and queries that are there

    @property
    def first(self) -> PageRun:
        """The run that is shown."""
        return self.runs[0]

    @cached_property
    def queries(self) -> range:
        """The queries that the page holds."""
        return range(min(len(self.first.scores.query_ids), self.budget.queries))

    @cached_property
    def listed(self) -> tuple[Int[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
        """The rows of both sides of every query that the page lists."""
        best = extremes([self.first.scores.values[0]], self.listed_each)
        return best[0].rows.numpy(), best[1].rows.numpy()

    @property
    def listed_each(self) -> int:
        """How many rows a side lists."""
        return max(self.top, min(OWN_LISTED, self.budget.rows // 4)) if self.first.own else self.top

    @cached_property
    def depth(self) -> tuple[int, list[int]]:
        """To which rank of every query, run and damping the page holds all rows, and the rows that it holds."""
        total = len(self.first.scores.row_ids)
        columns = torch.cat([run.scores.values[:, :, : len(self.queries)] for run in self.runs])
        allowed = min(self.budget.rows, max(1, self.budget.cells // (len(columns) * len(self.queries))))
        if total <= allowed:
            return total, list(range(total))
        ranked = extremes([columns.permute(1, 0, 2).flatten(1)], min(allowed, total))
        depth = least = min(self.listed_each, total)
        while depth < min(allowed, total) and len(_union(ranked, depth + 1)) <= allowed:
            depth += 1
        return depth, _union(ranked, max(depth, least)).tolist()

    @cached_property
    def texts(self) -> Sequence[str]:
        """The text of every row; none where no run has texts, and no tokenizer reads its tokens."""
        total = len(self.first.scores.row_ids)
        for run in self.runs:
            if "rows/text" in run.store.header.arrays:
                return (
                    run.store.read("rows/text").tolist()
                    if total <= MANY
                    else StoredTexts(run.store, "rows/text")
                )
        reads = next((run for run in self.runs if run.tokens is not None and run.beside.tokenizer), None)
        if reads is None:
            return [""] * total
        return ["".join(_pieces(reads, row)[0]) for row in range(total)]

    @cached_property
    def lexical(self) -> Int[np.ndarray, "queries k"] | None:
        """The rows that BM25 finds for every query; None where there are no texts, or too many."""
        queries = self.first.scores.query_texts
        if self.first.own or not queries or not 0 < len(self.texts) <= MANY or not any(self.texts):
            return None
        if self.first.beside.thumbnail is not None:
            return None
        return bm25_ranks(self.texts, [queries[number] for number in self.queries], max(self.top, 20))

    @cached_property
    def marking(self) -> PageRun | None:
        """The run whose tokens are marked."""
        return next((run for run in self.runs if run.tokens is not None and run.beside.tokenizer), None)

    @cached_property
    def blocks(self) -> PageRun | None:
        """The run that tells scores apart by block."""
        return next((run for run in self.runs if run.scores.shares and not run.over_time), None)

    @cached_property
    def grid(self) -> Grid | None:
        """The heat map of these blocks."""
        return None if self.blocks is None else grid_of(self.blocks.scores.shares)

    @cached_property
    def suspicious(self) -> Mapping[int, str]:
        """The model's own class of the rows that are listed, where rows have classes."""
        beside = self.first.beside
        if beside.predicted is None:
            return {}
        return beside.predicted(sorted({int(row) for side in self.listed for row in side.flat}))

    # --- the page

    def page(self, scatters: Sequence[Scatter], command: str, asking: bool) -> Page:
        """All of it."""
        first, shown = self.first, [self._query(number) for number in self.queries]
        rows = sorted({card.row for query in shown for _, cards in query.sides for card in cards})
        image = first.beside.thumbnail
        runs = [_run(run) for run in self.runs]
        return Page(
            " · ".join(run.name for run in runs), first.own, asking, len(first.scores.row_ids), runs, shown,
            self._notes(), self.grid, [] if image is None else [(row, image(row)) for row in rows], scatters,
            command, self._data(rows),
        )  # fmt: skip

    def _notes(self) -> list[str]:
        """What the page lacks, and why."""
        first = self.first.scores
        notes = [note for run in self.runs for note in run.beside.notes]
        total, asked, (depth, rows) = len(first.row_ids), len(first.query_ids), self.depth
        if len(self.queries) < asked:
            notes.append(
                f"Only the first {len(self.queries):,} of {count(asked, 'query')} are here, so that the page stays small."
            )
        if len(rows) < total:
            notes.append(
                f"Only {len(rows):,} of {count(total, 'row')} are here, so that the page stays small: of every "
                f"query at least the {depth:,} highest and lowest. Histograms are of all rows."
            )
        if not self.first.own and self.marking is None:
            notes.append(
                "No token is marked, since no run scored tokens: score with --by token, and give that run too."
            )
        if not self.first.own and self.grid is None:
            notes.append(
                "There is no map of layers and heads, since no run tells scores apart by block: score with --by "
                "head or module, and give that run too."
            )
        return list(dict.fromkeys(notes))

    def _query(self, number: int) -> QueryPart:
        """A query, its rows and its charts."""
        scores, beside = self.first.scores, self.first.beside
        histogram = Histogram.of(scores.values[0, :, number].numpy())
        asked, _, said = visible(scores.query_texts[number] if scores.query_texts else "").rpartition(SAID)
        names = ("The most suspicious rows",) if self.first.own else ("Proponents", "Opponents")
        sides = [
            (name, self._cards(number, side, histogram)) for name, side in zip(names, (0, 1), strict=False)
        ]
        source = beside.sources[number] if beside.sources else None
        found = None if self.lexical is None else [
            visible(scores.row_ids[int(row)]) for row in self.lexical[number][: self.top] if row != NOT_FOUND
        ]  # fmt: skip
        heat = []
        if self.grid is not None and sides[0][1]:
            heat = shades(self.grid.cells(self._shares(sides[0][1][0].row, number)))
        return QueryPart(
            number, visible(scores.query_ids[number]), asked, said, self._answers(number), sides, histogram,
            source and visible(source), found, heat, self._lines(number, sides), self._agreement(number),
        )  # fmt: skip

    def _cards(self, number: int, side: int, histogram: Histogram) -> list[Card]:
        """The rows of a side of a query that have its sign."""
        sign, column = (1, -1)[side], self.first.scores.values[0, :, number]
        rows = [int(row) for row in self.listed[side][number] if sign * float(column[int(row)]) > 0]
        return [self._card(number, row, rank, histogram) for rank, row in enumerate(rows, 1)]

    def _card(self, number: int, row: int, rank: int, histogram: Histogram) -> Card:
        scores, beside = self.first.scores, self.first.beside
        score, name = float(scores.values[0, row, number]), visible(scores.row_ids[row])
        badges = []
        if beside.sources and beside.sources[number] == scores.row_ids[row]:
            badges.append("known source")
        if self.lexical is not None and row in (found := self.lexical[number].tolist()):
            badges.append(f"BM25 {found.index(row) + 1}")
        others = [_other(run.scores, number, row) for run in self.runs[1:]]
        columns = [
            (visible(name), cell) for name, values in beside.columns.items() if (cell := _cell(values[row]))
        ]
        label, predicted = beside.labels[row] if beside.labels else "", self.suspicious.get(row, "")
        return Card(
            row, name, rank, score, score / (max(-histogram.low, histogram.high) or 1.0), histogram.x(score),
            self._marked(number, row), badges, columns, others, visible(label), visible(predicted),
            self._near(row, label, predicted) if self.first.own else (), beside.thumbnail is not None,
        )  # fmt: skip

    def _marked(self, number: int, row: int) -> list[tuple[str, str]]:
        """The text of a row, with its tokens marked where they are scored."""
        if self.marking is None:
            return [(_cut(visible(self.texts[row]), self.budget.characters), "")]
        pieces, values = _pieces(self.marking, row)
        return marked_pieces(pieces, values[:, number], self.budget.characters)

    def _near(self, row: int, label: str, predicted: str) -> list[tuple[str, str]]:
        """The rows of the label, and of the model's class, that are nearest by their words."""
        if not any(self.texts) or len(self.texts) > MANY or self.first.beside.thumbnail is not None:
            return []
        labels, ids = self.first.beside.labels, self.first.scores.row_ids
        near = [int(found) for found in self.words(row) if found not in (NOT_FOUND, row)]
        classes = dict.fromkeys([label, predicted or label]) if labels else {"": None}
        alike = {
            one: [visible(ids[r]) for r in near if not labels or labels[r] == one][:NEAREST]
            for one in classes
        }
        return [(visible(one), ", ".join(found)) for one, found in alike.items() if found]

    def words(self, row: int) -> list[int]:
        """The rows nearest to a listed one by BM25, best first."""
        rows = self._listed_rows
        return self._neighbours[rows[row]].tolist() if row in rows else []

    @cached_property
    def _listed_rows(self) -> dict[int, int]:
        """The place of each row that is listed on the first side."""
        return {int(row): place for place, row in enumerate(dict.fromkeys(self.listed[0].flat))}

    @cached_property
    def _neighbours(self) -> Int[np.ndarray, "listed k"]:
        return bm25_ranks(self.texts, [self.texts[row] for row in self._listed_rows], 200)

    def _answers(self, number: int) -> list[tuple[str, str, bool | None]]:
        """What each model makes of a query; runs of one model say it once."""
        told: dict[str, tuple[str, str, bool | None]] = {}
        for run in self.runs:
            if run.beside.answers:
                sentence, known = answer_in_words(run.beside.answers[number])
                told.setdefault(sentence, (run.scores.name, sentence, known))
        return [*told.values()]

    def _agreement(self, number: int) -> list[str]:
        """How far the order of rows in other runs agrees."""
        mine, k = self.first.scores.values[0, :, [number]], min(10, len(self.first.scores.row_ids))
        told = []
        for run in self.runs[1:]:
            theirs = run.scores.values[0, :, [number]]
            same, order = float(top_overlap(mine, theirs, k)), float(correlation(mine, theirs))
            told.append(
                f"{visible(run.scores.name)}: {same * k:.0f} of the top {k} are the same, rank correlation {order:.2f}"
            )
        return told

    def _shares(self, row: int, number: int) -> dict[str, float]:
        assert self.blocks is not None
        return {block: float(share[0, row, number]) for block, share in self.blocks.scores.shares.items()}

    @cached_property
    def _trajectories(self) -> PageRun | None:
        """The run whose scores have parts over time."""
        return next((run for run in self.runs if run.over_time and (run.scores.shares or _valued(run))), None)

    @cached_property
    def _steps(self) -> tuple[Int[np.ndarray, "steps batch"], Any] | None:
        """The rows and values of all steps of a training that valued them."""
        if self._trajectories is None or not _valued(self._trajectories):
            return None
        store = open_store(self._trajectories.store.path.parent, TRAINING)
        return store.read("steps/rows"), store.read(VALUES)

    def _lines(self, number: int, sides: Sequence[tuple[str, Sequence[Card]]]) -> Lines | None:
        """How the scores of the listed rows grew over a training."""
        run, rows = self._trajectories, [card.row for _, cards in sides for card in cards]
        if run is None or not rows:
            return None
        if self._steps is not None:
            steps, values = self._steps
            series = {}
            for row in rows:
                when, where = np.nonzero(steps == row)
                series[row] = [
                    (float(x) + 1, float(values[x, y, number])) for x, y in zip(when, where, strict=True)
                ]
            return lines_of(series, "first step", f"step {len(steps):,}")
        names = [*run.scores.shares]
        series = {row: [(float(x), float(share[0, row, number])) for x, share in enumerate(run.scores.shares.values(), 1)]
                  for row in rows}  # fmt: skip
        return lines_of(series, "before", visible(names[-1]))

    # --- what the script reads

    def _data(self, listed: Sequence[int]) -> dict[str, Any]:
        """Ids, texts, columns and scores of the rows that the page holds, as plain JSON values."""
        scores, beside, (depth, kept) = self.first.scores, self.first.beside, self.depth
        rows = sorted({*kept, *listed})
        values = {visible(name): [_cell(v[row]) for row in rows] for name, v in beside.columns.items()}
        places = {scores.row_ids[row]: row for row in rows}
        return {
            "total": len(scores.row_ids), "depth": None if len(rows) == len(scores.row_ids) else depth, "rows": rows,
            "ids": [visible(scores.row_ids[row]) for row in rows],
            "texts": [_cut(visible(self.texts[row]), self.budget.characters) for row in rows],
            "columns": values, "labels": [visible(beside.labels[row]) for row in rows] if beside.labels else [],
            "predicted": {row: visible(name) for row, name in self.suspicious.items()},
            "images": beside.thumbnail is not None, "own": self.first.own,
            "sources": [places.get(source) for source in beside.sources[: len(self.queries)]],
            "bm25": [] if self.lexical is None else self.lexical[:, :20].tolist(),
            "runs": [self._columns(run.scores, rows) for run in self.runs],
            "heat": self._letters(),
        }  # fmt: skip

    def _columns(self, scores: Any, rows: Sequence[int]) -> dict[str, Any]:
        """The scores of a run at every damping: of every query the kept rows, and the histogram of all."""
        chosen = scores.values[:, :, : len(self.queries)]
        histograms = [[Histogram.of(column.numpy()) for column in one.T] for one in chosen]
        return {
            "name": visible(scores.name), "dampings": [visible(name) for name in scores.dampings],
            "scores": [[[_short(float(v)) for v in column[rows]] for column in one.T] for one in chosen],
            "histograms": [[[_short(h.low), _short(h.high), h.levels] for h in one] for one in histograms],
        }  # fmt: skip

    def _letters(self) -> dict[str, Any] | None:
        """The heat maps of the rows that are listed."""
        if self.grid is None:
            return None
        cells = {}
        for number in self.queries:
            for side in self.listed:
                for row in side[number].tolist():
                    made = self.grid.cells(self._shares(row, number))
                    cells[f"{number}-{row}"] = [_short(float(np.abs(made).max())), as_letters(made)]
        return {
            "layers": list(map(visible, self.grid.layers)),
            "columns": list(map(visible, self.grid.columns)),
            "cells": cells,
        }


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


# --- small parts


def _union(ranked: tuple[Any, Any], depth: int) -> Int[np.ndarray, " rows"]:
    """The rows down to a rank on either side of any column."""
    return np.unique(np.concatenate([side.rows[:, :depth].numpy().ravel() for side in ranked]))


def _run(run: PageRun) -> RunPart:
    facts = [(visible(name), visible(value)) for name, value in contents(run.store)]
    made = run.scores.settings
    method = made.get("recipe") or "scores"
    tokens = ", by token" if run.tokens is not None else ""
    return RunPart(
        visible(run.scores.name), visible(f"{method}{tokens}"), [*map(visible, run.scores.dampings)],
        visible(run.command), facts,
    )  # fmt: skip


def _other(scores: Any, number: int, row: int) -> tuple[str, float, float, int]:
    """The score of a row in another run, its share of the largest, and its rank from the highest."""
    column: Tensor = scores.values[0, :, number]
    score = float(column[row])
    return (
        visible(scores.name),
        score,
        score / (float(column.abs().max()) or 1.0),
        1 + int((column > score).sum()),
    )


def _valued(run: PageRun) -> bool:
    return run.scores.settings.get("recipe") == INRUN and (run.store.path.parent / f"{TRAINING}.h5").exists()


def _pieces(run: PageRun, row: int) -> tuple[list[str], np.ndarray]:
    """The tokens of a row as texts that join to its text, and their scores `[tokens, queries]`."""
    assert run.tokens is not None
    offsets = run.store.index_array("tokens/offsets")
    span = slice(int(offsets[row]), int(offsets[row + 1]))
    ids = run.store.read("rows/token", span.start, span.stop).tolist()
    return texts_of(run.beside.tokenizer, ids), run.tokens.values[0, span].numpy()


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


def _cell(value: Any) -> str:
    """A value of a column in a few letters."""
    return "" if value is None else _cut(visible(str(value)), CELL)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


def _short(value: float) -> float | int:
    """Four digits, which are few letters in JSON.

    >>> _short(0.123456), _short(2.0)
    (0.1235, 2)
    """
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short
