"""Lexical search, to compare attribution with: what the words alone would find."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

NOT_FOUND = -1
"""The place holder in the ranks of a query that shares words with fewer than `k` rows."""


def bm25_ranks(texts: Sequence[str], queries: Sequence[str], k: int) -> Int64[np.ndarray, "queries k"]:
    """The rows that BM25 ranks first for every query, best first, equal ones in the order of the rows.

    A row that shares no word with the query is not ranked: `NOT_FOUND` stands in its place. Stop words of
    English and words of one letter do not count.

    Args:
        texts: one a row.
        queries: what to search for.
        k: how many rows to rank; fewer columns come where there are fewer rows.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009 (k1 = 1.5, b = 0.75).

    >>> bm25_ranks(["a red house", "the blue sea", "a blue house"], ["blue", "red", "green"], 2)
    array([[ 1,  2],
           [ 0, -1],
           [-1, -1]])
    """
    import bm25s

    words, asked = (
        bm25s.tokenize(list(part), return_ids=False, show_progress=False) for part in (texts, queries)
    )
    ranks = np.full((len(queries), min(k, len(texts))), NOT_FOUND)
    if not any(words):
        return ranks
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    for number, tokens in enumerate(asked):
        if known := [token for token in tokens if token in index.vocab_dict]:
            scores = index.get_scores(known)  # pyright: ignore[reportArgumentType]
            best = np.argsort(-scores, kind="stable")[: ranks.shape[1]]
            ranks[number] = np.where(scores[best] > 0, best, NOT_FOUND)
    return ranks
