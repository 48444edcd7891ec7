"""Runs of scores as a page shows them, and what is known besides of their rows, queries and model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gradfn.evaluate.scored import evaluated_scores, made_of
from gradfn.hf.answers import Answer
from gradfn.scores import KIND, Scores
from gradfn.store import Store, open_store
from gradfn.train.run import INRUN


@dataclass(frozen=True, eq=False)
class Beside:
    """What is known of a run besides its scores, where its model and data could be loaded.

    Args:
        answers: what the model itself makes of every query.
        sources: the id of the row that is known to teach each answer, or None.
        tokenizer: reads the tokens of rows.
        columns: further columns of the rows, by name: the values of all rows.
        labels: of every row the name of its class.
        predicted: gives the model's own class of some rows.
        nearest: gives the rows that are most like a row, best first; None: they are told by their words.
        thumbnail: gives a small image of a row as a `data:` address.
        notes: sentences on what the page lacks, and why.
    """

    answers: Sequence[Answer] = ()
    sources: Sequence[str | None] = ()
    tokenizer: Any = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    labels: Sequence[str] = ()
    predicted: Callable[[list[int]], Mapping[int, str]] | None = None
    nearest: Callable[[int], Sequence[int]] | None = None
    thumbnail: Callable[[int], str] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class PageRun:
    """A run as a page shows it.

    Args:
        scores: of rows; where tokens were scored, the sums over each row's.
        store: the file that they come from.
        beside: what is known besides.
        tokens: the scores of tokens, where these were scored.
        command: that makes the run again, or empty.
    """

    scores: Scores
    store: Store
    beside: Beside = field(default_factory=Beside)
    tokens: Scores | None = None
    command: str = ""

    @property
    def over_time(self) -> bool:
        """Whether shares of scores are of times, not of blocks."""
        settings = self.scores.settings
        return settings.get("recipe") == INRUN or "checkpoints" in settings

    @property
    def own(self) -> bool:
        """Whether rows are scored against themselves."""
        return made_of(self.scores.settings).query == "self"


def open_page_run(run: str | Path, beside: Beside | None = None, command: str = "") -> PageRun:
    """Read a run of scores for a page.

    Raises:
        InputError: there are no scores, or they are damaged or not finite.
    """
    scores, store = evaluated_scores(run, tokens=True), open_store(run, KIND)
    if scores.documents is None:
        return PageRun(scores, store, beside or Beside(), None, command)
    ids = store.index_array("documents/id").tolist()
    dampings, _, queries = scores.values.shape
    values = torch.zeros(dampings, len(ids), queries).index_add_(1, scores.documents, scores.values)
    rows = replace(scores, values=values, row_ids=ids, documents=None, positions=None, losses=None, shares={})
    return PageRun(rows, store, beside or Beside(), scores, command)
