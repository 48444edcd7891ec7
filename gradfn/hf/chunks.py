"""Long documents as chunks of one length, as language models are trained on them."""

from dataclasses import replace
from typing import Any

import numpy as np

from gradfn.data import Documents, offsets_of
from gradfn.errors import InputError


def chunked(docs: Documents, length: int, tokenizer: Any = None) -> Documents:
    """Documents cut into chunks of `length` tokens, of which the last is shorter. No token is lost.

    Chunk c of the row "17" has the name "17:c", c from 0; a row of no more than `length` tokens keeps its
    own. The first token of a chunk is not predicted, since nothing comes before it.

    Args:
        docs: what `tokenize` made of texts or token ids.
        length: tokens a chunk, 2 or more.
        tokenizer: what makes the text of a chunk; None: its tokens are shown as numbers.

    Raises:
        InputError: a chunk of fewer than two tokens, or rows with weights or labels of their own.

    >>> from gradfn.data import make_documents
    >>> docs = chunked(make_documents([[5, 6, 7, 8, 9], [4]], ids=["a", "b"]), 2)
    >>> docs.ids, docs.lengths.tolist(), docs.texts[0]
    (['a:0', 'a:1', 'a:2', 'b'], [2, 2, 1, 1], '5 6')
    """
    if length < 2:
        raise InputError(f"a chunk of {length} tokens has none to predict: give chunks of 2 or more")
    if docs.extras:
        raise InputError(
            f"rows with {' and '.join(docs.extras)} of their own are not cut into chunks: add them afterwards"
        )
    counts = np.maximum(-(-docs.lengths // length), 1)
    rows = np.repeat(np.arange(len(docs)), counts)
    chunks = np.arange(len(rows)) - np.repeat(offsets_of(counts)[:-1], counts)
    lengths = np.minimum(docs.lengths[rows] - chunks * length, length)
    offsets = offsets_of(lengths)
    ids, texts = [], []
    for place, (row, chunk) in enumerate(zip(rows.tolist(), chunks.tolist(), strict=True)):
        if counts[row] == 1:
            ids.append(docs.ids[row])
            texts.append(docs.texts[row])
            continue
        tokens = docs.input_ids[offsets[place] : offsets[place + 1]].tolist()
        ids.append(f"{docs.ids[row]}:{chunk}")
        texts.append(" ".join(map(str, tokens)) if tokenizer is None else tokenizer.decode(tokens))
    return replace(docs, offsets=offsets, ids=ids, texts=texts)
