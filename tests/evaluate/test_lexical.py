import numpy as np
import pytest

from gradfn.evaluate.lexical import NOT_FOUND, bm25_ranks, bm25_scores

TEXTS = [
    "Lima is the capital of Peru",
    "the sea is blue",
    "Peru borders the sea, and Peru has mountains",
    "Paris is the capital of France",
]


def bm25(texts, query, k1=1.5, b=0.75):
    """The textbook sum, over words split at spaces."""
    rows = [text.split() for text in texts]
    average = sum(map(len, rows)) / len(rows)
    scores = []
    for row in rows:
        score = 0.0
        for word in query.split():
            containing = sum(word in other for other in rows)
            idf = np.log(1 + (len(rows) - containing + 0.5) / (containing + 0.5))
            count = row.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(row) / average))
        scores.append(score)
    return np.array(scores)


def test_ranks_are_those_of_the_formula():
    generator = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    texts = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(12)]
    query = "alpha omega"
    scores = bm25(texts, query)
    expected = np.argsort(-scores, kind="stable")[: int((scores > 0).sum())]
    ranks = bm25_ranks(texts, [query], len(texts))[0]
    assert ranks[: len(expected)].tolist() == expected.tolist()
    assert set(ranks[len(expected) :]) <= {NOT_FOUND}


def test_scores_are_the_formula():
    generator = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    texts = [" ".join(generator.choice(words, generator.integers(1, 9))) for _ in range(12)]
    queries = ["alpha omega", "none", "beta beta delta"]
    expected = np.stack([bm25(texts, query) for query in queries], 1)
    np.testing.assert_allclose(bm25_scores(texts, queries), expected, rtol=1e-5)
    assert not bm25_scores(["a", ""], ["a"]).any()


def test_each_query_has_its_own_ranks():
    assert bm25_ranks(TEXTS, ["capital of Peru", "blue sea"], 2).tolist() == [[0, 2], [1, 2]]


def test_rows_without_a_common_word_are_not_ranked():
    assert bm25_ranks(TEXTS, ["Paris", "Tokyo", ""], 3).tolist() == [[3, -1, -1], [-1, -1, -1], [-1, -1, -1]]


def test_equal_rows_keep_their_order():
    assert bm25_ranks(["blue"] * 40, ["blue"], 3).tolist() == [[0, 1, 2]]


def test_no_more_ranks_than_rows():
    assert bm25_ranks(["blue sea"], ["sea"], 5).shape == (1, 1)


@pytest.mark.parametrize("texts", [["", ""], ["a", "b"], ["the of", "\x1b"]])
def test_texts_without_a_word(texts):
    assert bm25_ranks(texts, ["a word"], 5).tolist() == [[-1, -1]]
