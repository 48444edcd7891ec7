"""Queries made of others: one token of each, training rows, and two that are contrasted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradfn.data import IGNORED, Corpus, Documents, Pairs, make_documents
from gradfn.errors import InputError
from gradfn.shown import SAID, asked_and_said, brief


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
    chosen = []
    for row, name in enumerate(documents.ids):
        places = _supervised(documents, row)
        if not -len(places) <= (at := number - (number > 0)) < len(places):
            raise InputError(
                f"query {name} has {len(places)} supervised tokens, so there is no token {number}: give a "
                "number that all queries have"
            )
        chosen.append((row, places[at]))
    texts = [asked_and_said(*parts) for parts in _around(documents, chosen, tokenizer)]
    return _up_to(documents, chosen, documents.ids, texts)


def each_token(documents: Documents, tokenizer: Any) -> tuple[Documents, list[int]]:
    """Every supervised token as a document of its own, and the number of the document that each is of.

    The names are those of the documents with the number of the token, as `one_token` counts. In a text the
    arrow stands before the token, which has its own spaces: without the arrow it is the text up to there.

    Args:
        documents, tokenizer: see `one_token`.

    >>> class Letters:
    ...     def decode(self, ids):
    ...         return "".join(chr(96 + number) for number in ids)
    >>> tokens, of = each_token(make_documents([[1, 2, 3]], ids=["q"]), Letters())
    >>> tokens.ids, tokens.labels.tolist(), of
    (['q[1]', 'q[2]'], [-100, 2, -100, -100, 3], [0, 0])
    """
    chosen, ids = [], []
    for row, name in enumerate(documents.ids):
        places = _supervised(documents, row)
        chosen += [(row, place) for place in places]
        ids += [f"{name}[{number}]" for number in range(1, len(places) + 1)]
    parts = _around(documents, chosen, tokenizer)
    texts = [before + (SAID if before.strip() else "") + token for before, token in parts]
    return _up_to(documents, chosen, ids, texts), [row for row, _ in chosen]


def _supervised(documents: Documents, row: int) -> list[int]:
    """The places of the supervised tokens of a document."""
    span = slice(documents.offsets[row], documents.offsets[row + 1])
    return (1 + np.flatnonzero(documents.labels[span][1:] != IGNORED)).tolist()


def _around(
    documents: Documents, chosen: Sequence[tuple[int, int]], tokenizer: Any
) -> Iterator[tuple[str, str]]:
    """The text before each of some tokens, and what the token adds to it."""
    for row, place in chosen:
        start = int(documents.offsets[row])
        ids = documents.input_ids[start : start + place + 1].tolist()
        before, through = tokenizer.decode(ids[:-1]), tokenizer.decode(ids)
        yield before, through[len(before) :] if through.startswith(before) else tokenizer.decode(ids[-1:])


def _up_to(
    documents: Documents, chosen: Sequence[tuple[int, int]], ids: Sequence[str], texts: Sequence[str]
) -> Documents:
    """Documents that end with one supervised token each, given by document and place."""
    inputs, labels = [], []
    for row, place in chosen:
        start = int(documents.offsets[row])
        inputs.append(documents.input_ids[start : start + place + 1].tolist())
        labels.append([IGNORED] * place + [int(documents.labels[start + place])])
    return make_documents(inputs, labels, ids=ids, texts=texts)


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
            raise InputError(f"{there} the id {brief(name)}: give ids as tables of rows show them")
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
