"""Rows that are most like some listed ones: by their stored gradients, their pixels or their words."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from gradfn.errors import InputError
from gradfn.evaluate.lexical import NOT_FOUND, bm25_ranks
from gradfn.evaluate.scored import made_of
from gradfn.methods.grad_cosine import grad_cosine
from gradfn.report.page_runs import PageRun
from gradfn.runs.exchange import IMPORTED
from gradfn.runs.gradients import open_gradients, read_gradients
from gradfn.runs.provenance import Provenance
from gradfn.runs.scores import stored_scores
from gradfn.scores import extremes
from gradfn.store import Store
from gradfn.transforms import unit_normalize

RANKED = 200
"""Rows that are ranked of each, so that there are some of every class."""


class Nearest(NamedTuple):
    """The rows that are most like some others.

    Args:
        by: what is compared: "gradient", "pixels" or "words".
        rows: of each row the others, best first.
    """

    by: str
    rows: Callable[[int], Sequence[int]]


def nearest_rows(run: PageRun, listed: Sequence[int], texts: Sequence[str]) -> Nearest | None:
    """What is like the listed rows: by gradients where the run's directory holds them, else by what they are.

    Args:
        run: whose rows they are; its `Beside` compares images.
        listed: numbers of rows.
        texts: of all rows; empty where words are not compared.

    Returns:
        None where nothing can be compared.
    """
    if (store := _gradients_of(run)) is not None:
        return Nearest("gradient", _by_gradient(store, listed).__getitem__)
    if run.beside.nearest is not None:
        return Nearest("pixels", run.beside.nearest)
    if run.beside.thumbnail is not None or not listed or not any(texts):
        return None
    ranks = bm25_ranks(texts, [texts[row] for row in listed], RANKED).tolist()
    pairs = zip(listed, ranks, strict=True)
    found = {row: [one for one in ranked if one not in (NOT_FOUND, row)] for row, ranked in pairs}
    return Nearest("words", found.__getitem__)


def _gradients_of(run: PageRun) -> Store | None:
    """The stored gradients of the rows that were scored, by the model that scored them, if there are any."""
    try:
        store = open_gradients(run.store.path.parent)
    except InputError:
        return None
    made, scored = Provenance.of(store), made_of(run.scores.settings)
    same = (
        made.data is not None and scored.data is not None and made.model is not None
        and scored.model is not None and made.data.fingerprint == scored.data.fingerprint
        and made.model.fingerprint == scored.model.fingerprint
        and store.rows == len(run.scores.row_ids) and not (made.layers or {}).get("tokens")
    )  # fmt: skip
    return store if same and IMPORTED not in store.settings else None


def _by_gradient(store: Store, listed: Sequence[int]) -> dict[int, list[int]]:
    """The other rows by the cosine with each listed row, `<g, h> / (|g| |h|)`, the highest first."""
    rows = [read_gradients(store, row, row + 1) for row in listed]
    if not rows:
        return {}
    queries = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
    scorer = grad_cosine().against(unit_normalize()(queries))  # pyright: ignore[reportArgumentType]
    best, _ = extremes(stored_scores(store, scorer), min(RANKED + 1, store.rows))
    return {
        row: [one for one in found if one != row]
        for row, found in zip(listed, best.rows.tolist(), strict=True)
    }
