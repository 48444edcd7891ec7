"""Whether scores can be evaluated, and are of the rows and queries of other scores, or of a ground truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gradfn.errors import InputError
from gradfn.evaluate.truth import Truth
from gradfn.runs.provenance import Provenance
from gradfn.scores import Scores
from gradfn.shown import brief
from gradfn.store import storable

SHOWN = 3
"""Ids that a refusal shows."""


class Sides(NamedTuple):
    """What scores are of: the names of rows and queries, and the settings with their fingerprints."""

    row_ids: Sequence[str]
    query_ids: Sequence[str]
    settings: Mapping[str, Any]


def evaluated_scores(run: str | Path, *, tokens: bool = False) -> Scores:
    """Read the scores of a run for an evaluation.

    Args:
        run: the directory.
        tokens: allow scores of tokens.

    Raises:
        InputError: there are none, they are of tokens, or they are not finite.
    """
    scores = Scores.load(run)
    if scores.documents is not None and not tokens:
        raise InputError(f"{run} scores tokens, not rows: score with `View(tokens=False)`")
    if wrong := int((~scores.values.isfinite()).sum()):
        raise InputError(
            f"{wrong:,} scores in {run} are no finite numbers: score again in a higher precision"
        )
    return scores


def sides_of(scores: Scores) -> Sides:
    """The sides of scores; of those of tokens, the rows that these are of.

    >>> import torch
    >>> one = Scores(torch.zeros(1, 3, 1), ["a", "a", "b"], ["q"], documents=torch.tensor([0, 0, 1]))
    >>> sides_of(one).row_ids
    ['a', 'b']
    """
    ids, of = scores.row_ids, scores.documents
    if of is not None:
        ids = [name for token, name in enumerate(ids) if not token or of[token] != of[token - 1]]
    return Sides(ids, scores.query_ids, scores.settings)


def made_of(settings: Mapping[str, Any]) -> Provenance:
    """What scores were made of; of joined scores, those of the first checkpoint.

    >>> made_of({"checkpoints": [{"weight": 1.0, "settings": {"query": "self"}}]}).query
    'self'
    """
    made = Provenance.of(settings)
    return (made.checkpoints[0].settings if made.checkpoints else None) or made


def refuse_other_data(mine: Scores | Sides, theirs: Scores | Truth | Sides, what: str, other: str) -> None:
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
        if [*a] != [*b] and sorted(a) == sorted(b):
            raise InputError(
                f"{what} and {other} have the same {noun} in another order: make both with the same data and "
                "queries"
            )
        if [*a] != [*b]:
            raise InputError(
                f"{what} and {other} are of different {noun}, {in_words(a, b)} there and {in_words(b, a)} "
                "here: make both with the same data and queries"
            )
    for noun, key in (("training data", "data"), ("queries", "query")):
        a, b = (getattr(getattr(made_of(side.settings), key), "fingerprint", None) for side in (mine, theirs))
        if a is not None and b is not None and a != b:
            raise InputError(
                f"{what} and {other} are of different {noun} under the same names (other texts or labels): "
                "make both with the same data, queries and tokenizer"
            )


def mismatch(scores: Scores, truth: Truth) -> str | None:
    """What a person must know who compares scores with a ground truth that answers another question.

    Args:
        scores: whose settings say how they were made.
        truth: the retrained models.

    Returns:
        A sentence, or None where nothing is amiss.
    """
    made = made_of(scores.settings)
    magic = (made.method or {}).get("magic") or made.further.get("magic")
    if magic is None and made.recipe != "inrun":
        return None
    name, seed = scores.name, made.seed if magic is None else magic.get("seed")
    if truth.removal == "drop":
        return (
            f"{name} says what masking rows does to one training, and these models dropped them: retrain "
            "with --removal mask"
        )
    if truth.seeding == "independent" or (seed is not None and seed not in truth.seeds):
        return (
            f"{name} is of the order of seed {seed}, which is not that of all of these models: retrain with "
            f"--seed {seed}, and shared seeds"
        )
    own, theirs = magic or made.training or {}, truth.settings.get("training") or {}
    if differ := [key for key in theirs if key in own and own[key] != theirs[key]]:
        pairs = ", ".join(f"{key} {own[key]} and {theirs[key]}" for key in differ)
        return (
            f"{name} and these models are of trainings that differ ({pairs}): retrain with the same options"
        )
    return None


def in_words(ids: Sequence[str], other: Sequence[str]) -> str:
    """How many ids there are, and the first of those that the other side has not in their place.

    >>> in_words(["a", "b"], ["a", "c", "d"])
    "2 ('b')"
    """
    differ = [name for number, name in enumerate(ids) if number >= len(other) or other[number] != name]
    named = ", ".join(map(brief, differ[:SHOWN])) + (", ..." if len(differ) > SHOWN else "")
    return f"{len(ids):,} ({named})" if named else f"{len(ids):,}"


def single_scores(run: str | Path, train: Any, query: Any, *, tokens: bool = False) -> Scores:
    """Read scores of one damping, which must be of these rows, or of their tokens, and queries.

    Raises:
        InputError: they are of others, or of several dampings.
    """
    scored = evaluated_scores(run, tokens=tokens)
    prints = {"data": {"fingerprint": train.fingerprint()}, "query": {"fingerprint": query.fingerprint()}}
    here = Sides(storable(train.ids), storable(query.ids), prints)
    refuse_other_data(sides_of(scored), here, str(run), "what is retrained")
    if len(scored.dampings) > 1:
        raise InputError(
            f"{run} has scores for {len(scored.dampings)} dampings, and rows are removed by one: score with "
            "one `damping`"
        )
    return scored
