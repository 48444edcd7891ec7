"""Long rows in chunks: every token is in one of them, in order."""

from dataclasses import replace

import numpy as np
import pytest

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.hf import chunked


@pytest.mark.parametrize("length", [2, 3, 7, 10])
def test_no_token_and_no_row_is_lost(length):
    random = np.random.default_rng(length)
    rows = [random.integers(0, 9, size).tolist() for size in (0, 1, 2, 3, 4, 6, 7, 9, 20)]
    docs = make_documents(rows)
    cut = chunked(docs, length)
    assert np.array_equal(cut.input_ids, docs.input_ids)
    assert cut.lengths.max() <= length
    assert list(dict.fromkeys(name.partition(":")[0] for name in cut.ids)) == docs.ids
    for row, tokens in enumerate(rows):
        own = [n for n, name in enumerate(cut.ids) if name.partition(":")[0] == str(row)]
        assert [token for n in own for token in cut[n]["input_ids"].tolist()] == tokens
        assert [cut.ids[n] for n in own] == (
            [f"{row}:{n}" for n in range(len(own))] if len(own) > 1 else [str(row)]
        )


def test_what_is_supervised_stays_so_but_for_the_first_of_a_chunk():
    docs = make_documents([[1, 2, 3, 4, 5]], [[-100, -100, 3, 4, 5]])
    assert chunked(docs, 2).supervised.tolist() == [0, 1, 0]
    assert chunked(docs, 5).supervised.tolist() == [3]


def test_what_is_not_cut():
    docs = make_documents([[1, 2, 3]])
    with pytest.raises(InputError, match="a chunk of 1 tokens has none to predict"):
        chunked(docs, 1)
    weighed = replace(docs, extras={"weight": np.ones(1)})
    with pytest.raises(InputError, match="rows with weight of their own are not cut"):
        chunked(weighed, 2)
