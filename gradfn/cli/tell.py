"""What a command says of its model, its rows and its queries."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from gradfn.cli.inputs import Options, Subject
from gradfn.cli.queries import Queries
from gradfn.cli.rows import DocumentRows, Ranked, ShownRows, top_shares
from gradfn.cli.show import NAME_WIDTH, clean, count, export, facts, ranking
from gradfn.data import Corpus, Documents
from gradfn.errors import InputError
from gradfn.evaluate.lexical import NOT_FOUND, bm25_ranks
from gradfn.hf.answers import Answer, answers
from gradfn.hf.tokenizers import writes_numbers
from gradfn.model.losses import CausalLMLoss
from gradfn.runs.rows import layer_summary
from gradfn.transforms import Transform, chain

KNOWN_RANKS = 5
QUERY_CHARACTERS = 300
"""Of a query that is shown; it may be a whole document."""


def check_top(top: int) -> None:
    """Refuse a table of no rows."""
    if top < 1:
        raise InputError(f"--top must be 1 or more, not {top}")


def subject_facts(subject: Subject, train: Corpus) -> list[tuple[str, str]]:
    """What is attributed, in two lines; what is unusual about the data in a third."""
    loss = subject.loss
    simple = isinstance(loss, CausalLMLoss) and loss.criterion == "cross_entropy" and not loss.label_smoothing
    whole = simple and not loss.fused_head  # pyright: ignore
    head = "; logits are not a plain linear map, so they are computed whole" if whole else ""
    size = f"{count(len(train), 'row')}, {count(int(train.lengths.sum()), 'token')}"
    lines = [
        ("model", f"{subject.name} ({layer_summary(subject.model, subject.view)}{head})"),
        ("train", size),
    ]
    if writes_numbers(subject.tokenizer):
        lines.append(("note", "the model has no tokenizer: tokens are written as their numbers"))
    if unsupervised := int((train.supervised == 0).sum()):
        rows = count(unsupervised, "row")
        lines.append(("note", f"{rows} with nothing to supervise: zero gradient, zero scores"))
    return lines


def gradients_line(*transforms: Transform) -> str:
    """A chain of transforms in words, its projections as they are spelled."""
    line, projecting = "", False
    for stage in chain(*transforms).stages:
        follows, projecting = projecting, "projection" in stage.settings()
        line += (" > " if follows and projecting else ", " if line else "") + str(stage)
    return line or "full gradients"


def unprobed_facts(paths: Sequence[str]) -> list[tuple[str, str]]:
    """A note on the layers that no probe could see, if there are any."""
    if not paths:
        return []
    named = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")
    return [("note", f"no probe sees {named}: through vmap(grad), which is slower")]


def ranks_needed(options: Options) -> int:
    """How many of the best rows to keep: those shown, and those among which a known source counts."""
    return max(options["top"], KNOWN_RANKS)


def show_all(
    out: Console, subject: Subject, known: ShownRows, queries: Queries, ranked: Ranked, by: str,
    options: Options,
) -> None:  # fmt: skip
    """Show every query, say how often known sources were found, export."""
    told = None
    if isinstance(queries.documents, Documents) and subject.task == "causal_lm":
        told = answers(subject.model, subject.tokenizer, queries.documents)
    lexical = _lexical(known, queries, options["top"]) if subject.processor is None else None
    table = []
    for number, query_id in enumerate(queries.ids):
        rows = _lines(ranked, known, number, query_id, options["top"])
        table.extend(rows)
        out.print()
        out.print(facts(_query_facts(queries, number, told[number] if told else None)))
        out.print(ranking(rows, out.width))
        if lexical is not None:
            found = [clean(name, NAME_WIDTH) for name in lexical[number][: options["top"]]]
            out.print(facts([("BM25 finds", ", ".join(found) or "no row that shares a word")]))
    if any(queries.sources) and isinstance(known, DocumentRows):
        out.print()
        out.print(facts(_recall(queries, ranked, known.ids, lexical)))
    paths = {f"{kind}_path": options[kind] for kind in ("csv", "jsonl", "parquet")}
    export(table, by=by, **paths)


def _lines(ranked: Ranked, known: ShownRows, query: int, query_id: str, top: int) -> list[dict[str, Any]]:
    """The table of one query, proponents first."""
    table = []
    for side, rank, row, score in ranked.shown(query, top):
        shares = {} if ranked.shares is None else {"shares": top_shares(ranked.shares[row, query])}
        table.append({"query": query_id, "side": side, "rank": rank, "score": score,
                      **known.cells(row), **shares})  # fmt: skip
    return table


def _lexical(known: ShownRows, queries: Queries, top: int) -> list[list[str]] | None:
    """What BM25 finds for every query, where sources are known and rows are documents."""
    if not any(queries.sources) or not isinstance(known, DocumentRows):
        return None
    ranks = bm25_ranks(known.texts, queries.texts, max(top, KNOWN_RANKS))
    return [[known.ids[int(row)] for row in found if row != NOT_FOUND] for found in ranks.tolist()]


def _query_facts(queries: Queries, number: int, answer: Answer | None) -> list[tuple[str, str]]:
    """A query, and what the model itself makes of it."""
    lines = [(f"query {clean(queries.ids[number])}", clean(queries.shown[number], QUERY_CHARACTERS))]
    if damping := queries.dampings[number * len(queries.dampings) // len(queries.ids)]:
        lines.append(("damping", damping))
    if answer is None:
        return lines
    loss = f"loss {answer.loss:.2f} nats a token"
    if answer.known is None:
        return [*lines, ("model", loss)]
    chance = f"{loss}, probability {answer.probability:.3g}"
    if answer.known:
        return [*lines, ("model", f"{chance}: it knows the answer")]
    says = f' (it says "{clean(answer.says)}")' if clean(answer.says) else ""
    return [*lines, ("model", f"{chance}: it does NOT know the answer{says}, so there may be no source")]


def _recall(
    queries: Queries, ranked: Ranked, ids: Sequence[str], lexical: list[list[str]] | None
) -> list[tuple[str, str]]:
    """How often the known source of a query is ranked first and in the first five, of texts beside BM25."""
    there = set(ids)
    named = [(number, source) for number, source in enumerate(queries.sources) if source]
    asked = [(number, source) for number, source in named if source in there]
    gradients = [[ids[int(row)] for row in rows[:KNOWN_RANKS]] for rows in ranked.proponents.rows]
    each, lines = len(queries.ids) // len(queries.dampings), []
    parts = [("gradients", f"damping {name}: " if name else "", gradients, number)
             for number, name in enumerate(queries.dampings)]  # fmt: skip
    if lexical is not None:
        parts.append(("BM25", "", lexical, 0))
    for told, which, found, number in parts if asked else []:
        mine = [(query, source) for query, source in asked if query // each == number]
        first, five = (_hits(mine, found, k) for k in (1, KNOWN_RANKS))
        of = f"{first} of {count(len(mine), 'query')}, in the top {KNOWN_RANKS} for {five}"
        lines.append((told, f"{which}ranks the known source first for {of}"))
    if lost := (len(named) - len(asked)) // len(queries.dampings):
        lines.append(("note", f"{count(lost, 'query')} with a source that is not among the rows"))
    return lines


def _hits(asked: list[tuple[int, str]], found: list[list[str]], k: int) -> int:
    return sum(source in found[number][:k] for number, source in asked)
