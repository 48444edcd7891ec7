"""What is shown of queries: the rows that made the model do this, and how often known sources were found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from gradfn.data import Corpus
from gradfn.evaluate.lexical import NOT_FOUND, bm25_ranks
from gradfn.hf.answers import Answer
from gradfn.report.baselines import Baseline
from gradfn.report.rows import DocumentRows, Ranked, ShownRows, top_shares
from gradfn.report.tables import NAME_WIDTH, SHOWN_SHARES, Piped, excerpt, facts, ranking
from gradfn.report.words import clean, count

KNOWN_RANKS = 5
LIKELY_NATS = 0.7
"""Below this loss a token, half of the tokens' probability, an answer is not called unknown."""
QUERY_CHARACTERS = 300
"""Of a query that is shown; it may be a whole document."""


@dataclass(frozen=True, eq=False)
class ShownQueries:
    """What is known of queries, one for each column of the scores.

    Args:
        ids, texts: one a query.
        sources: the ids of the rows that are known to teach the answers, None where none is known.
        dampings: of which every query has a column each, those of one damping together; "" is not shown.
        documents: the queries' tokens, where every query is one document; once for all dampings.
        beside: baselines, of which each row's place is shown.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    sources: Sequence[str | None] = field(default_factory=list)
    dampings: tuple[str, ...] = ("",)
    documents: Corpus | None = None
    beside: Sequence[Baseline] = ()

    def joined(self, name: str) -> "ShownQueries":
        """One for all of them."""
        return ShownQueries([name], [f"the best of {len(self.ids)} queries"])

    def with_dampings(self, names: Sequence[str]) -> "ShownQueries":
        """Each of them once for every damping, in the order of scores; a single damping is not shown."""
        if len(names) == 1:
            return self
        times = len(names)
        return ShownQueries(
            [f"{query} (damping {name})" for name in names for query in self.ids],
            list(self.texts) * times, list(self.sources) * times, tuple(names), self.documents,
        )  # fmt: skip

    @property
    def each(self) -> int:
        """How many queries there are of one damping."""
        return len(self.ids) // len(self.dampings)


def ranks_needed(top: int) -> int:
    """How many of the best rows to keep: those shown, and those among which a known source counts."""
    return max(top, KNOWN_RANKS)


def print_rankings(
    out: Console,
    queries: ShownQueries,
    ranked: Ranked,
    known: ShownRows,
    top: int,
    *,
    show: int | None = None,
    answers: Sequence[Answer] | None = None,
    texts: bool = True,
) -> list[dict[str, Any]]:
    """Show how often known sources were found, and the best rows of queries.

    Args:
        out: where.
        ranked: the best `ranks_needed(top)` rows of every query.
        known: what is known of the rows.
        show: how many queries to show; None: all.
        answers: what the model itself makes of every query, for one damping.
        texts: whether rows and queries are texts, which BM25 can search too.

    Returns:
        The table, a line a row shown.
    """
    lexical = _lexical(known, queries, top) if texts else None
    width = None if isinstance(out, Piped) else out.width
    if any(queries.sources) and isinstance(known, DocumentRows):
        out.print()
        out.print(facts(_recall(queries, ranked, known.ids, lexical)))
    table = []
    for number, query in enumerate(queries.ids):
        rows = [{**row, **_places(queries.beside, int(row["row"]), number)}
                for row in _lines(ranked, known, number, query, top)]  # fmt: skip
        table.extend(rows)
        if show is not None and number >= show:
            continue
        out.print()
        text = excerpt(queries.texts[number], None if width is None else QUERY_CHARACTERS)
        answer = answers[number % queries.each] if answers else None
        out.print(facts([(f"query {clean(query)}", text), *_query_facts(queries, number, answer)]))
        out.print(ranking(rows, width))
        if lexical is not None:
            found = [clean(name, NAME_WIDTH) for name in lexical[number][:top]]
            out.print(facts([("BM25 finds", ", ".join(found) or "no row that shares a word")]))
    if show is not None and (left := len(queries.ids) - show) > 0:
        out.print()
        out.print(facts([("more", f"{count(left, 'query')}: --show {len(queries.ids)}, or --csv FILE")]))
    return table


def _lines(ranked: Ranked, known: ShownRows, query: int, query_id: str, top: int) -> list[dict[str, Any]]:
    """The table of one query, proponents first."""
    table = []
    for side, rank, row, score in ranked.shown(query, top):
        found = None if ranked.shares is None else ranked.shares[row, query]
        shares = {}
        if found is not None:
            told = [*found.items()] if ranked.in_order else top_shares(found)
            shares = {"shares": told, "shown": len(told) if ranked.in_order else SHOWN_SHARES}
        table.append({"query": query_id, "side": side, "rank": rank, "score": score,
                      **known.cells(row), **shares})  # fmt: skip
    return table


def _places(beside: Sequence[Baseline], row: int, query: int) -> dict[str, Any]:
    """Scores and places of a row by each baseline, and these in words."""
    found = {one.name: (one.score(row, query), one.rank(row, query)) for one in beside}
    cells = {name: score for name, (score, _) in found.items()}
    cells |= {f"{name}_rank": rank for name, (_, rank) in found.items()}
    words = ", ".join(f"{name} #{rank}" for name, (_, rank) in found.items())
    return {**cells, "beside": words} if beside else {}


def _lexical(known: ShownRows, queries: ShownQueries, top: int) -> list[list[str]] | None:
    """What BM25 finds for every query, where sources are known and rows are documents."""
    if not any(queries.sources) or not isinstance(known, DocumentRows):
        return None
    ranks = bm25_ranks(known.texts, queries.texts, ranks_needed(top))
    return [[known.ids[int(row)] for row in found if row != NOT_FOUND] for found in ranks.tolist()]


def _query_facts(queries: ShownQueries, number: int, answer: Answer | None) -> list[tuple[str, str]]:
    """The damping of a query, and what the model itself makes of it."""
    damping = queries.dampings[number // queries.each]
    lines = [("damping", damping)] if damping else []
    if answer is None:
        return lines
    loss = f"loss {answer.loss:.2f} nats a token"
    if answer.known is None:
        return [*lines, ("model", loss)]
    chance = f"{loss}, probability {answer.probability:.3g}"
    if answer.known:
        return [*lines, ("model", f"{chance}: it knows the answer")]
    if answer.glued:
        lines.append(
            ("note", "the completion does not start with a space, so it goes on with the prompt's last word")
        )
    if answer.loss < LIKELY_NATS or not answer.says:
        return [*lines, ("model", chance)]
    says = f'(it says "{clean(answer.says)}")'
    return [*lines, ("model", f"{chance}: it does NOT know the answer {says}, so there may be no source")]


def _recall(
    queries: ShownQueries, ranked: Ranked, ids: Sequence[str], lexical: list[list[str]] | None
) -> list[tuple[str, str]]:
    """How often the known source of a query is ranked first and in the first five, of texts beside BM25."""
    there = set(ids)
    named = {number: source for number, source in enumerate(queries.sources) if source}
    asked = {number: source for number, source in named.items() if source in there}
    gradients = [
        [ids[int(row)] for row in rows[:KNOWN_RANKS] if row != NOT_FOUND] for rows in ranked.proponents.rows
    ]
    parts = [("gradients", f"damping {name}: " if name else "", gradients, number)
             for number, name in enumerate(queries.dampings)]  # fmt: skip
    if lexical is not None:
        parts.append(("BM25", "", lexical, 0))
    lines = []
    for label, damping, found, number in parts if asked else []:
        mine = {query: source for query, source in asked.items() if query // queries.each == number}
        first, five = (
            sum(source in found[query][:k] for query, source in mine.items()) for k in (1, KNOWN_RANKS)
        )
        of = f"{first} of {count(len(mine), 'query')}, in the top {KNOWN_RANKS} for {five}"
        lines.append((label, f"{damping}ranks the known source first for {of}"))
    if lost := (len(named) - len(asked)) // len(queries.dampings):
        lines.append(("note", f"{count(lost, 'query')} with a source that is not among the rows"))
    return lines
