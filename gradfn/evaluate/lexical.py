"""Lexical search, to compare attribution with: what the words alone would find."""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float32, Int64

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
    ranks = np.full((len(queries), min(k, len(texts))), NOT_FOUND)
    for number, scores in enumerate(_scores(texts, queries)):
        if scores is not None:
            best = np.argsort(-scores, kind="stable")[: ranks.shape[1]]
            ranks[number] = np.where(scores[best] > 0, best, NOT_FOUND)
    return ranks


def bm25_scores(texts: Sequence[str], queries: Sequence[str]) -> Float32[np.ndarray, "rows queries"]:
    """BM25 of every row for every query; 0 where they share no word.

        sum_w log(1 + (n - n_w + 1/2) / (n_w + 1/2)) c_w / (c_w + k1 (1 - b + b l / mean(l)))

    over the words `w` of the query, repeated ones too: `c_w` times in the row of `l` words, in `n_w` of `n`
    rows; `k1 = 1.5`, `b = 0.75`. Words are counted as in `bm25_ranks`.

    Args:
        texts: one a row.
        queries: what to search for.

    Source: as for `bm25_ranks`, in Lucene's form.

    >>> bm25_scores(["red", "blue", "green"], ["red", "black"]).round(3)
    array([[0.392, 0.   ],
           [0.   , 0.   ],
           [0.   , 0.   ]], dtype=float32)
    """
    scores = np.zeros((len(texts), len(queries)), np.float32)
    for number, found in enumerate(_scores(texts, queries)):
        if found is not None:
            scores[:, number] = found
    return scores


def _scores(texts: Sequence[str], queries: Sequence[str]) -> Iterator[np.ndarray | None]:
    """The scores of the rows for each query in turn; None for a query without a word of any row."""
    import bm25s

    words, asked = (
        bm25s.tokenize(list(part), return_ids=False, show_progress=False) for part in (texts, queries)
    )
    index = bm25s.BM25()
    if any(words):
        index.index(words, show_progress=False)
    for tokens in asked:
        known = [token for token in tokens if any(words) and token in index.vocab_dict]
        yield index.get_scores(known) if known else None  # pyright: ignore[reportArgumentType]
