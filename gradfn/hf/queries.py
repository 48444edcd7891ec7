"""Queries made of others: one token of each, training rows, and two that are contrasted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradfn.data import IGNORED, Corpus, Documents, Pairs, make_documents
from gradfn.errors import InputError
from gradfn.shown import SAID, asked_and_said


def one_token(documents: Documents, number: int, tokenizer: Any) -> Documents:
    """Of every document the tokens up to one that is supervised, and only this one supervised.

    Args:
        documents: of next tokens, in which a token does not depend on later ones.
        number: which of the supervised tokens, from 1; below 0 from the end, -1 being the last.
        tokenizer: to show what is asked.

    Raises:
        InputError: the number 0, or a document that has fewer supervised tokens.

    >>> class Letters:
    ...     def decode(self, ids):
    ...         return "".join(chr(96 + number) for number in ids)
    >>> two = one_token(make_documents([[1, 2, 3], [4, 5]]), -1, Letters())
    >>> two.labels.tolist(), [text.split() for text in two.texts]
    ([-100, -100, 3, -100, 5], [['ab', '→', 'c'], ['d', '→', 'e']])
    """
    if number == 0:
        raise InputError("supervised tokens are counted from 1, or from the end with -1, and not from 0")
    inputs, labels, texts = [], [], []
    for row, name in enumerate(documents.ids):
        span = slice(documents.offsets[row], documents.offsets[row + 1])
        ids, own = documents.input_ids[span].tolist(), documents.labels[span]
        places = 1 + np.flatnonzero(own[1:] != IGNORED)
        if not -len(places) <= (at := number - (number > 0)) < len(places):
            raise InputError(
                f"query {name} has {len(places)} supervised tokens, so there is no token {number}: give a "
                "number that all queries have"
            )
        place = int(places[at])
        inputs.append(ids[: place + 1])
        labels.append([IGNORED] * place + [int(own[place])])
        texts.append(asked_and_said(tokenizer.decode(ids[:place]), tokenizer.decode([ids[place]])))
    return make_documents(inputs, labels, ids=documents.ids, texts=texts)


def row_numbers(rows: Corpus, names: Sequence[str]) -> tuple[int, ...]:
    """The numbers of rows by their names.

    Raises:
        InputError: there is no such row, or several; a row twice.

    >>> row_numbers(make_documents([[1, 2], [3, 4]], ids=["a", "b"]), ["b"])
    (1,)
    """
    ids, found = list(rows.ids), list[int]()
    for name in names:
        if (times := ids.count(name)) != 1:
            there = "no training row has" if not times else f"{times:,} training rows have"
            raise InputError(f"{there} the id {name!r}: give ids as tables of rows show them")
        found.append(ids.index(name))
    if len({*found}) < len(found):
        raise InputError("a row is given twice among `query_rows`: give each once")
    return tuple(found)


def unweighted(rows: Corpus) -> Corpus:
    """The same without the weights that multiply losses."""
    if isinstance(rows, Pairs):
        return replace(rows, inputs=unweighted(rows.inputs))
    extras: Mapping[str, np.ndarray] = {
        name: values for name, values in rows.extras.items() if name != "weight"
    }
    return replace(rows, extras=extras)


def contrasted(text: str, other: str) -> str:
    """What to show of a text that is contrasted with another; what they have in common stands there once.

    >>> contrasted(f"The capital is{SAID}Lima", f"The capital is{SAID}Quito").split()[-3:]
    ['Lima,', 'not', 'Quito']
    """
    asked, arrow, said = other.rpartition(SAID)
    return f"{text}, not {said if arrow and text.startswith(asked + arrow) else other}"
