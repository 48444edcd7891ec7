"""What a page shows of runs, gathered as plain values: for its template, and for the script in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gradfn.evaluate.correlation import correlation
from gradfn.evaluate.lexical import NOT_FOUND, bm25_ranks
from gradfn.evaluate.overlap import top_overlap
from gradfn.report.page_runs import PageRun
from gradfn.report.page_texts import answer_in_words, cell, marked_pieces, row_text, short, texts_of
from gradfn.report.page_values import Budget, Card, Page, QueryPart, RunPart
from gradfn.report.pictures import Grid, Histogram, Lines, Scatter, as_letters, grid_of, lines_of, shades
from gradfn.report.rendering import visible
from gradfn.report.rows import StoredTexts
from gradfn.report.runs import contents
from gradfn.report.words import count
from gradfn.scores import Scores, extremes
from gradfn.shown import SAID
from gradfn.store import open_store
from gradfn.train.run import INRUN, VALUES
from gradfn.train.run import KIND as TRAINING

OWN_LISTED = 50
"""Rows that are listed where rows are scored against themselves."""
MANY = 100_000
"""Of more rows BM25 makes no index."""
NEAREST = 3
"""Rows that are nearest to a suspicious one, of a class."""


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
        """To which rank the page holds the rows of every query, run and damping, and which rows it holds."""
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
                stored = StoredTexts(run.store, "rows/text")
                return [*stored] if total <= MANY else stored
        if self.marking is None:
            return [""] * total
        return ["".join(self._pieces(row)[0]) for row in range(total)]

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
    def _tokens(self) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " bounds"]]:
        """The tokens of the rows of this run, and where each row begins and the last ends."""
        assert self.marking is not None
        store = self.marking.store
        return store.read("rows/token"), store.index_array("tokens/offsets")

    def _pieces(self, row: int) -> tuple[list[str], np.ndarray]:
        """The tokens of a row as texts that join to its text, and their scores `[tokens, queries]`."""
        (ids, offsets), run = self._tokens, self.marking
        tokens = None if run is None else run.tokens
        assert run is not None
        assert tokens is not None
        own = slice(int(offsets[row]), int(offsets[row + 1]))
        return texts_of(run.beside.tokenizer, ids[own].tolist()), tokens.values[0, own].numpy()

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
        runs, images = (
            [_run(run) for run in self.runs],
            [] if image is None else [(r, image(r)) for r in rows],
        )
        return Page(
            " · ".join(run.name for run in runs), first.own, self.marking is not None, asking,
            len(first.scores.row_ids), runs, shown, self._notes(), self._hints(), self.grid,
            "" if self.blocks is None else visible(self.blocks.scores.name), images, scatters,
            command, self._data(rows),
        )  # fmt: skip

    def _notes(self) -> list[str]:
        """What the page lacks, and why."""
        first = self.first.scores
        notes = [note for run in self.runs for note in run.beside.notes]
        total, asked, (depth, rows) = len(first.row_ids), len(first.query_ids), self.depth
        small = "so that the page stays small"
        if len(self.queries) < asked:
            notes.append(f"Only {len(self.queries):,} of {count(asked, 'query')} are here, {small}.")
        if len(rows) < total:
            notes.append(
                f"Only {len(rows):,} of {count(total, 'row')} are here, {small}: of every query at least the "
                f"{depth:,} highest and lowest. Histograms are of all rows."
            )
        return list(dict.fromkeys(notes))

    def _hints(self) -> list[str]:
        """Which further runs would show more."""
        hints = []
        if not self.first.own and self.marking is None:
            hints.append("to mark the tokens that carry a score, score with --by token")
        if not self.first.own and self.grid is None:
            hints.append("for a map of layers and heads, score with --by head or --by module")
        return hints

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
        columns = [(visible(name), told) for name, of in beside.columns.items() if (told := cell(of[row]))]
        label, predicted = beside.labels[row] if beside.labels else "", self.suspicious.get(row, "")
        return Card(
            row, name, rank, score, score / (max(-histogram.low, histogram.high) or 1.0), histogram.x(score),
            self._marked(number, row), badges, columns, others, visible(label), visible(predicted),
            self._near(row, label, predicted) if self.first.own else (), beside.thumbnail is not None,
        )  # fmt: skip

    def _marked(self, number: int, row: int) -> list[tuple[str, str]]:
        """The text of a row, with its tokens marked where they are scored."""
        if self.marking is None:
            return [(row_text(self.texts[row], self.budget.characters), "")]
        pieces, values = self._pieces(row)
        return marked_pieces(pieces, values[:, number], self.budget.characters)

    def _near(self, row: int, label: str, predicted: str) -> list[tuple[str, str]]:
        """The rows of the label, and of the model's class, that are nearest: by their words, or pixels."""
        beside, ids = self.first.beside, self.first.scores.row_ids
        if beside.nearest is None and (beside.thumbnail or not any(self.texts) or len(self.texts) > MANY):
            return []
        labels, found = beside.labels, self._alike(row) if beside.nearest is None else beside.nearest(row)
        near = [int(other) for other in found if other not in (NOT_FOUND, row)]
        classes = dict.fromkeys([label, predicted or label]) if labels else {"": None}
        alike = {
            one: [visible(ids[r]) for r in near if not labels or labels[r] == one][:NEAREST]
            for one in classes
        }
        return [(visible(one), ", ".join(found)) for one, found in alike.items() if found]

    def _alike(self, row: int) -> list[int]:
        """The rows nearest to a listed one by BM25, best first."""
        return self._neighbours[self._listed_rows[row]].tolist()

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
            words = f"{same * k:.0f} of the top {k} are the same, rank correlation {order:.2f}"
            told.append(f"{visible(run.scores.name)}: {words}")
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
        names, shares = [*run.scores.shares], [*run.scores.shares.values()]
        series = {
            row: [(float(x), float(of[0, row, number])) for x, of in enumerate(shares, 1)] for row in rows
        }
        return lines_of(series, "before", visible(names[-1]))

    # --- what the script reads

    def _data(self, listed: Sequence[int]) -> dict[str, Any]:
        """Ids, texts, columns and scores of the rows that the page holds, as plain JSON values."""
        scores, beside, (depth, kept) = self.first.scores, self.first.beside, self.depth
        rows = sorted({*kept, *listed})
        values = {visible(name): [cell(v[row]) for row in rows] for name, v in beside.columns.items()}
        places = {scores.row_ids[row]: row for row in rows}
        return {
            "total": len(scores.row_ids), "depth": None if len(rows) == len(scores.row_ids) else depth,
            "rows": rows, "ids": [visible(scores.row_ids[row]) for row in rows],
            "texts": [row_text(self.texts[row], self.budget.characters) for row in rows],
            "columns": values, "own": self.first.own, "images": beside.thumbnail is not None,
            "labels": [visible(beside.labels[row]) for row in rows] if beside.labels else [],
            "predicted": {row: visible(name) for row, name in self.suspicious.items()},
            "sources": [source and places.get(source) for source in beside.sources[: len(self.queries)]],
            "bm25": [] if self.lexical is None else self.lexical[:, :20].tolist(),
            "runs": [self._columns(run.scores, rows) for run in self.runs],
            "heat": self._letters(),
        }  # fmt: skip

    def _columns(self, scores: Scores, rows: Sequence[int]) -> dict[str, Any]:
        """The scores of a run at every damping: of every query the kept rows, and the histogram of all."""
        chosen = scores.values[:, :, : len(self.queries)]
        histograms = [[Histogram.of(column.numpy()) for column in one.T] for one in chosen]
        return {
            "name": visible(scores.name), "dampings": [visible(name) for name in scores.dampings],
            "scores": [[[short(float(v)) for v in column[rows]] for column in one.T] for one in chosen],
            "histograms": [[[short(h.low), short(h.high), h.levels] for h in one] for one in histograms],
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
                    cells[f"{number}-{row}"] = [short(float(np.abs(made).max())), as_letters(made)]
        return {
            "layers": list(map(visible, self.grid.layers)),
            "columns": list(map(visible, self.grid.columns)),
            "cells": cells,
        }


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


def _other(scores: Scores, number: int, row: int) -> tuple[str, float, float, int]:
    """The score of a row in another run, its share of the largest, and its rank from the highest."""
    column: Tensor = scores.values[0, :, number]
    score, rank = float(column[row]), 1 + int((column > column[row]).sum())
    name = f"{scores.name} (damping {scores.dampings[0]})" if len(scores.dampings) > 1 else scores.name
    return visible(name), score, score / (float(column.abs().max()) or 1.0), rank


def _valued(run: PageRun) -> bool:
    return run.scores.settings.get("recipe") == INRUN and (run.store.path.parent / f"{TRAINING}.h5").exists()
