"""What is shown of a row that was scored: a document, or a token in its context."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from gradfn.data import Corpus, Documents
from gradfn.scores import TopK
from gradfn.store import Store

BEFORE, AFTER = 6, 4
"""Tokens of context around a token."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """The best rows of every query, and what their scores are made of.

    Args:
        proponents, opponents: rows and scores, the strongest first.
        shares: of the rows that are shown for a query the share of each block in the score, by
            `(row, query)`; None where not asked for.
        in_order: whether shares are of times, and shown in their order; else the largest are shown.
        own: the row that each query is, where queries are rows: not shown for it. The queries of one damping
            stand behind those of another.
    """

    proponents: TopK
    opponents: TopK
    shares: Mapping[tuple[int, int], Mapping[str, float]] | None = None
    in_order: bool = False
    own: Sequence[int] = ()

    def shown(self, query: int, top: int) -> Iterator[tuple[str, int, int, float]]:
        """Side, rank, row and score of the first `top` that have the sign of their side."""
        for side, sign, best in (("proponent", 1, self.proponents), ("opponent", -1, self.opponents)):
            own = self.own[query % len(self.own)] if self.own else None
            pairs = zip(best.rows[query].tolist(), best.scores[query].tolist(), strict=True)
            others = [(row, score) for row, score in pairs if row != own][:top]
            for rank, (row, score) in enumerate(others, 1):
                if sign * score > 0:
                    yield side, rank, row, score

    def asked(self, top: int) -> dict[int, list[int]]:
        """The queries that each row is shown for, rows in order."""
        queries = range(len(self.proponents.rows))
        pairs = {(row, query) for query in queries for _, _, row, _ in self.shown(query, top)}
        asked: dict[int, list[int]] = {}
        for row, query in sorted(pairs):
            asked.setdefault(row, []).append(query)
        return asked

    def with_shares(self, top: int, of_row: Callable[[int], Mapping[str, Any]]) -> "Ranked":
        """The same with shares, each row asked for once.

        Args:
            of_row: `{block: [queries]}` of a row.
        """
        shares = {}
        for row, asked in self.asked(top).items():
            values = of_row(row)
            shares |= {(row, query): {name: float(v[query]) for name, v in values.items()} for query in asked}
        return replace(self, shares=shares)


@dataclass(frozen=True, eq=False)
class DocumentRows:
    """Rows that are documents."""

    ids: Sequence[str]
    texts: Sequence[str]

    def cells(self, row: int) -> dict[str, Any]:
        """Number, id and text."""
        return {"row": row, "id": self.ids[row], "text": self.texts[row]}


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows that are tokens, document after document.

    Args:
        ids: the documents' names.
        offsets: where the tokens of each document start, and where the last end.
        tokens: the token ids of rows `start` to `stop`.
        tokenizer: to read them.
    """

    ids: Sequence[str]
    offsets: np.ndarray
    tokens: Callable[[int, int], np.ndarray]
    tokenizer: Any

    def cells(self, row: int) -> dict[str, Any]:
        """Number, the document's id and number, the position in it, the token, and where it stands."""
        document = int(np.searchsorted(self.offsets, row, "right")) - 1
        first, last = int(self.offsets[document]), int(self.offsets[document + 1])
        start, stop = max(first, row - BEFORE), min(last, row + 1 + AFTER)
        left, token, right = self._parts(self.tokens(start, stop).tolist(), row - start)
        text = f"{'…' if start > first else ''}{left}»{token}«{right}{'…' if stop < last else ''}"
        return {"row": row, "id": self.ids[document], "text": text, "document": document,
                "position": row - first, "token": token}  # fmt: skip

    def _parts(self, tokens: list[int], at: int) -> tuple[str, str, str]:
        """The text before the token, the token's and the text behind; some tokens alone lose their space."""
        left, through, whole = (self.tokenizer.decode(tokens[:end]) for end in (at, at + 1, len(tokens)))
        # Tokens that end inside a letter decode to U+FFFD, and the token behind them to the letter itself.
        start = _common(left, through)
        start = start if start < len(through) else len(through.rstrip("\ufffd"))
        return through[:start], through[start:], whole[_common(through, whole) :]


def _common(a: str, b: str) -> int:
    """How many letters two texts have in common at their start.

    >>> _common("above", "about")
    3
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True, eq=False)
class LabelledRows(DocumentRows):
    """Documents or images with a class each.

    Args:
        classes: of the rows that are shown, the name of a row's class and of the model's own.
    """

    classes: Mapping[int, tuple[str, str]]

    def cells(self, row: int) -> dict[str, Any]:
        """Number, id, text, and the two classes."""
        label, predicted = self.classes[row]
        return {**super().cells(row), "label": label, "predicted": predicted}


ShownRows = DocumentRows | TokenRows
"""What is known of the rows of a score matrix: `cells(row)` are those of a row in a table."""


@dataclass(frozen=True)
class StoredTexts(Sequence[str]):
    """An array of strings that stays on disk: a store may have more rows than fit in memory as text."""

    store: Store
    name: str

    def __len__(self) -> int:
        return self.store.rows

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return list(self)[index]
        row = range(len(self))[index]
        return str(self.store.read(self.name, row, row + 1)[0])

    def __iter__(self) -> Iterator[str]:
        for _, _, arrays in self.store.chunks([self.name], 1024):
            yield from arrays[self.name]


def loaded_rows(documents: Corpus, tokenizer: Any, by: str) -> ShownRows:
    """What is known of documents at hand, or of their tokens."""
    if by != "token":
        return DocumentRows(documents.ids, documents.texts)
    assert isinstance(documents, Documents)
    ids = documents.input_ids
    return TokenRows(documents.ids, documents.offsets, lambda start, stop: ids[start:stop], tokenizer)


def stored_rows(store: Store, tokenizer: Any, by: str) -> ShownRows:
    """What a store knows of its rows."""
    if by != "token":
        return DocumentRows(StoredTexts(store, "rows/id"), StoredTexts(store, "rows/text"))
    ids, offsets = store.index_array("documents/id").tolist(), store.index_array("tokens/offsets")
    return TokenRows(ids, offsets, lambda start, stop: store.read("rows/token", start, stop), tokenizer)


def top_shares(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    """Blocks and their shares of a score, the largest in size first.

    >>> top_shares({"a": 1.0, "b": -2.0})
    [('b', -2.0), ('a', 1.0)]
    """
    return sorted(shares.items(), key=lambda pair: -abs(pair[1]))
