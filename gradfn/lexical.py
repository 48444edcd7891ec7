"""Lexical search, to stand beside attribution: what the words alone would have found."""

from collections.abc import Sequence

import numpy as np


def bm25_ranks(texts: Sequence[str], queries: Sequence[str], k: int) -> np.ndarray:
    """The rows that BM25 ranks first for every query, `[queries, k]`, best first.

    Source: Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009 (k1 = 1.5, b = 0.75).

    >>> bm25_ranks(["a red house", "the blue sea"], ["blue"], 1)
    array([[1]])
    """
    import bm25s

    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(list(queries), show_progress=False)
    found = index.retrieve(tokens, k=min(k, len(texts)), show_progress=False, n_threads=1)
    return np.asarray(found.documents)  # pyright: ignore[reportAttributeAccessIssue]
