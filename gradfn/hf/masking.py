"""Masking tokens, which a masked language model then predicts."""

import dataclasses
from typing import Any

import numpy as np

from gradfn.data import IGNORED, Documents
from gradfn.random import choice

__all__ = ["mask_tokens"]

SHARE = 0.15
"""The share of a row's tokens that is masked."""


def mask_tokens(docs: Documents, mask: int, special: list[int], seed: int) -> Documents:
    """Documents with masked tokens; only the masked tokens are supervised.

    In a row whose tokens are all supervised (a text), a share of 0.15 is masked, at least one token, drawn by
    (seed, row). In a row with a supervised part (a completion, or labels), this part is masked. The mask
    token replaces every masked token. Special tokens are never masked.

    Args:
        docs: what `tokenize` made of rows.
        mask: the id of the mask token.
        special: the ids of special tokens.
        seed: of the draws.

    >>> from gradfn.data import make_documents
    >>> docs = make_documents([[1, 5, 6, 7, 2], [1, 8, 9, 2]], [[1, 5, 6, 7, 2], [-100, -100, 9, 2]])
    >>> masked = mask_tokens(docs, mask=3, special=[1, 2, 3], seed=0)
    >>> masked.supervised.tolist(), masked[1]["input_ids"].tolist(), masked[1]["labels"].tolist()
    ([1, 1], [1, 8, 3, 2], [-100, -100, 9, -100])

    Source: Devlin et al., arXiv:1810.04805, section 3.1, for the share.
    """
    plain = ~np.isin(docs.labels, special)
    able = plain & (docs.labels != IGNORED)
    at = np.zeros(len(docs.input_ids), bool)
    for row, (start, stop) in enumerate(zip(docs.offsets[:-1], docs.offsets[1:], strict=True)):
        places = start + np.flatnonzero(able[start:stop])
        if len(places) and not (docs.labels[start:stop] == IGNORED).any():
            places = places[choice(max(1, int(SHARE * len(places) + 0.5)), len(places), seed, "masked", row)]
        at[places] = True
    return dataclasses.replace(
        docs,
        input_ids=np.where(at, mask, docs.input_ids).astype(np.int32),
        labels=np.where(at, docs.labels, IGNORED).astype(np.int32),
        masked=True,
    )


def masking_of(tokenizer: Any, seed: int) -> dict[str, Any]:
    """What a run records of how tokens are masked."""
    return {"share": SHARE, "token": int(tokenizer.mask_token_id), "seed": seed}
