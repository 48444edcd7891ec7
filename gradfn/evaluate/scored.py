"""Scores that a run holds, and whether they speak of what other scores, or a ground truth, speak of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.truth import Truth
from gradfn.store import open_store

SHOWN = 3
"""Ids that a refusal shows."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What `gradfn score RUN` wrote.

    Args:
        name: the run, as a person calls it.
        scores: positive = proponent, `[dampings, rows, queries]`.
        dampings: as the command line spells them; one that is empty where there is no choice.
        row_ids, query_ids: the names of rows and of queries.
        settings: what the scores depend on.
    """

    name: str
    scores: Float[Tensor, "dampings rows queries"] = field(repr=False)
    dampings: tuple[str, ...]
    row_ids: list[str] = field(repr=False)
    query_ids: list[str] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)

    @property
    def made(self) -> Mapping[str, Any]:
        """The settings; of joined scores, those of the first checkpoint."""
        return _first(self.settings)

    def of_queries(self, numbers: Int[Tensor, " part"]) -> "Scored":
        """The same of some queries only."""
        ids = [self.query_ids[number] for number in numbers.tolist()]
        return replace(self, scores=self.scores[:, :, numbers], query_ids=ids)


def open_scored(run: str | Path) -> Scored:
    """Read the scores of a run.

    Raises:
        InputError: there are none, they are of tokens, or they are not finite.
    """
    with open_store(run, "scores") as store:
        if "rows/id" not in store.names("rows"):
            raise InputError(f"{store.path} scores tokens, not rows: score with --by example to evaluate")
        scores = torch.from_numpy(store.read("scores"))
        row_ids = [str(name) for name in store.read("rows/id")]
        names = [str(name) for name in store.fixed("queries/id")]
        dampings = dampings_of(store.settings, len(names))
        settings = store.settings
    if wrong := int((~scores.isfinite()).sum()):
        raise InputError(
            f"{wrong:,} scores in {run} are no finite numbers: score again in a higher precision"
        )
    queries = len(names) // len(dampings)
    by_damping = scores.reshape(len(scores), len(dampings), queries).transpose(0, 1)
    suffix = f" (damping {dampings[0]})" if len(dampings) > 1 else ""
    ids = [name.removesuffix(suffix) for name in names[:queries]]
    return Scored(Path(run).name or str(run), by_damping, dampings, row_ids, ids, settings)


def dampings_of(settings: Mapping[str, Any], columns: int) -> tuple[str, ...]:
    """The dampings that the columns of scores are of, from a run's settings; scores may be joined.

    >>> dampings_of({"method": {"damping": ["0.1", None]}}, columns=4)
    ('0.1', 'none')
    >>> dampings_of({}, columns=4)
    ('',)
    """
    given = _first(settings).get("method", {}).get("damping") or [""]
    names = tuple("none" if name is None else str(name) for name in given)
    # The best over queries and dampings (less) is one column.
    return names if columns % len(names) == 0 and columns >= len(names) else ("",)


def refuse_other_data(mine: Scored, theirs: Scored | Truth, what: str, other: str) -> None:
    """Refuse to compare two of which the rows, the queries or the training data differ.

    Args:
        mine, theirs: what is compared.
        what, other: their names.

    Raises:
        InputError: naming what differs, with both sides.
    """
    for noun, a, b in (
        ("rows", mine.row_ids, theirs.row_ids),
        ("queries", mine.query_ids, theirs.query_ids),
    ):
        if a != b and sorted(a) == sorted(b):
            raise InputError(
                f"{what} and {other} have the same {noun} in another order: make both with the same "
                "--dataset and --query"
            )
        if a != b:
            raise InputError(
                f"{what} and {other} are of different {noun}, {in_words(a, b)} there and {in_words(b, a)} "
                "here: make both with the same --dataset and --query"
            )
    for noun, key in (("training data", "data"), ("queries", "query")):
        a, b = (_fingerprint(side.settings, key) for side in (mine, theirs))
        if a is not None and b is not None and a != b:
            raise InputError(
                f"{what} and {other} are of different {noun} (fingerprint {a} there and {b} here): make both "
                "with the same --dataset, --query, columns and tokenizer"
            )


def _fingerprint(settings: Mapping[str, Any], key: str) -> str | None:
    told = _first(settings).get(key)
    return told.get("fingerprint") if isinstance(told, Mapping) else None


def _first(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a run; of joined scores, those of the first checkpoint."""
    return settings["checkpoints"][0]["settings"] if "checkpoints" in settings else settings


def in_words(ids: Sequence[str], other: Sequence[str]) -> str:
    """How many ids there are, and the first of those that the other side has not in their place.

    >>> in_words(["a", "b"], ["a", "c", "d"])
    '2 (b)'
    """
    differ = [name for number, name in enumerate(ids) if number >= len(other) or other[number] != name]
    named = ", ".join(differ[:SHOWN]) + (", ..." if len(differ) > SHOWN else "")
    return f"{len(ids):,} ({named})" if named else f"{len(ids):,}"
