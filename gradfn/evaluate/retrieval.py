"""Whether known sources are found: recall at k, and the mean reciprocal rank."""

from collections.abc import Iterable, Sequence
from math import isnan

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradfn.errors import InputError
from gradfn.evaluate.correlation import check_finite
from gradfn.evaluate.mislabel import check_k


def source_name(value: object) -> str | None:
    """The id that a cell of a column `source` holds, None where it is empty.

    A column of whole numbers with an empty cell is one of floats, and of NaN where it is empty.

    >>> [source_name(value) for value in ("r1", 7, 7.0, 0.5, "", None, float("nan"))]
    ['r1', '7', '7', '0.5', None, None, None]
    """
    if value is None or value == "" or (isinstance(value, float) and isnan(value)):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def source_ranks(
    scores: Float[Tensor, "rows queries"], sources: Bool[Tensor, "rows queries"]
) -> Int[Tensor, "rows queries"]:
    """Ranks from 1, the highest score first; among equal scores sources come last, so that ties do not help.

    >>> source_ranks(torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[False], [True], [False]])).T
    tensor([[3, 2, 1]])
    """
    others_first = sources.long().argsort(dim=0, stable=True)
    order = scores.gather(0, others_first).argsort(dim=0, descending=True, stable=True)
    return others_first.gather(0, order).argsort(dim=0) + 1


def recall_at(
    scores: Float[Tensor, "rows queries"], sources: Bool[Tensor, "rows queries"], k: int
) -> Float[Tensor, " queries"]:
    """The share of a query's sources that are among the k rows with the highest scores.

    With one source a query their mean is the share of queries whose source was found.

    Args:
        scores: of every row for every query.
        sources: which rows are known to be sources of which query, one or more a query.
        k: how many rows to count.

    Returns:
        float64 `[queries]`.

    Raises:
        InputError: a query without a source; other shapes; scores that are not finite; k is not from 1 to
            the number of rows.

    >>> recall_at(torch.tensor([[1.0], [2.0]]), torch.tensor([[True], [False]]), 1)
    tensor([0.], dtype=torch.float64)
    """
    _check(scores, sources)
    check_k(k, len(scores))
    found = (source_ranks(scores, sources) <= k) & sources
    return found.sum(0).double() / sources.sum(0)


def reciprocal_rank(
    scores: Float[Tensor, "rows queries"], sources: Bool[Tensor, "rows queries"]
) -> Float[Tensor, " queries"]:
    """One over the rank of a query's best source; the mean over queries is the MRR.

    Args:
        scores, sources: see `recall_at`.

    Returns:
        float64 `[queries]`.

    Raises:
        InputError: a query without a source; other shapes; scores that are not finite.

    >>> reciprocal_rank(torch.tensor([[1.0], [2.0]]), torch.tensor([[True], [False]]))
    tensor([0.5000], dtype=torch.float64)

    Source: Voorhees, TREC-8 question answering track (1999).
    """
    _check(scores, sources)
    ranked = source_ranks(scores, sources)
    return 1 / torch.where(sources, ranked, len(ranked)).amin(0).double()


def _check(scores: Tensor, sources: Tensor) -> None:
    check_finite("scores", scores)
    if sources.shape != scores.shape:
        raise InputError(
            f"expected sources [rows, queries] like the scores, {list(scores.shape)}, got "
            f"{list(sources.shape)}: give those of the same rows and queries"
        )
    if without := int((~sources.any(0)).sum()):
        raise InputError(f"{without:,} queries have no source among the rows: leave them out")


def known_sources(
    named: Iterable[object], row_ids: Sequence[str]
) -> tuple[Bool[Tensor, "rows asked"], list[int]]:
    """Which rows are known to teach the answers, and the numbers of the queries that have such a row.

    Args:
        named: of each query the id of the row; see `source_name`.
        row_ids: the names of the rows; pieces of a document share its name.

    >>> known_sources(["b", None], ["a", "b", "b"])
    (tensor([[False],
            [ True],
            [ True]]), [0])
    """
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(row_ids):
        numbers.setdefault(name, []).append(number)
    known = {query: numbers[name] for query, value in enumerate(named)
             if (name := source_name(value)) is not None and name in numbers}  # fmt: skip
    sources = torch.zeros(len(row_ids), len(known), dtype=torch.bool)
    for column, rows in enumerate(known.values()):
        sources[rows, column] = True
    return sources, list(known)
