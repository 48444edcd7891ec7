"""`gradfn score`: the main job."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from gradfn.cli import inputs
from gradfn.cli.inputs import Options, Queries, Subject
from gradfn.cli.show import (
    NAME_WIDTH,
    check_exports,
    clean,
    console,
    count,
    export,
    facts,
    progress_bar,
    ranking,
)
from gradfn.data import Documents
from gradfn.errors import InputError
from gradfn.hf.answers import Answer, answers
from gradfn.hf.datasets import load_rows
from gradfn.lexical import NOT_FOUND, bm25_ranks
from gradfn.runs import describe, layer_summary, merged, score_run
from gradfn.scoring import Method, TopK, extremes, on_device_of
from gradfn.store import open_store
from gradfn.stream import collect
from gradfn.transforms import Transform, chain, dot, project

KNOWN_RANKS = 5
QUERY_CHARACTERS = 300
"""Of a query that is shown; it may be a whole document."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """Rows ranked for every query, with what is shown of them."""

    proponents: TopK
    opponents: TopK
    ids: Sequence[str]
    texts: Sequence[str]

    def rows(self, query: int, query_id: str, top: int) -> list[dict[str, str | int | float]]:
        """The table of one query, proponents first."""
        table = []
        for side, best in (("proponent", self.proponents), ("opponent", self.opponents)):
            for rank in range(min(top, best.rows.shape[1])):
                row, value = int(best.rows[query, rank]), float(best.scores[query, rank])
                if (value > 0) == (side == "proponent") and value != 0:
                    table.append({"query": query_id, "side": side, "rank": rank + 1, "score": value,
                                  "row": row, "id": self.ids[row], "text": self.texts[row]})  # fmt: skip
        return table


def run_score(**options: Any) -> None:
    """Load, score, show."""
    inputs.check_run(options["run"])
    is_example = options["model"] is None and options["dataset"] is None
    options = inputs.example_options(options) if is_example else options
    if options["model"] is None or options["dataset"] is None:
        lacking = "--model" if options["model"] is None else "--dataset"
        raise InputError(f"no {lacking}: give both --model and --dataset, or neither for the example")
    if options["projection_dim"] is None:
        options["projection_dim"] = 16
    name = inputs.method_named(options["method"], options["unit_normalize"])
    stage = project(options["projection_dim"], str(options["projection"]), options["seed"])  # pyright: ignore
    method = inputs.make_method(name, stage)
    check_top(options["top"])
    check_exports([options["csv"], options["jsonl"], options["parquet"]], options["overwrite"])
    query_rows = inputs.query_rows(options)
    rows = load_rows(options["dataset"], options["split"])
    subject = inputs.load_subject(options)
    train = inputs.load_documents(subject, rows, options)
    out = console()
    out.print(facts([*subject_facts(subject, train), ("method", f"{name}, {gradients_line(stage)}")]))
    wanted = merged(describe(subject.model, [], method.query, loss=subject.loss, view=subject.view),
                    subject.settings())  # fmt: skip
    queries = inputs.load_queries(subject, query_rows, options, method.query, wanted)
    chunks = _scored(subject, train, queries, method, options)
    show_all(out, subject, train.ids, train.texts, queries, chunks, options)


def check_top(top: int) -> None:
    """Refuse a table of no rows."""
    if top < 1:
        raise InputError(f"--top must be 1 or more, not {top}")


def subject_facts(subject: Subject, train: Documents) -> list[tuple[str, str]]:
    """What is attributed, in two lines; what is unusual about the data in a third."""
    head = (
        "" if subject.loss.fused_head else "; logits are not a plain linear map, so they are computed whole"
    )
    size = f"{count(len(train), 'row')}, {count(int(train.lengths.sum()), 'token')}"
    lines = [
        ("model", f"{subject.name} ({layer_summary(subject.model, subject.view)}{head})"),
        ("train", size),
    ]
    if unsupervised := int((train.supervised == 0).sum()):
        rows = count(unsupervised, "row")
        lines.append(("note", f"{rows} with nothing to supervise: zero gradient, zero scores"))
    return lines


def gradients_line(*transforms: Transform) -> str:
    """A chain of transforms in words."""
    return ", ".join(map(str, chain(*transforms).stages)) or "full gradients"


def _scored(
    subject: Subject, train: Documents, queries: Queries, method: Method, options: Options
) -> Iterable[Tensor]:
    """Score all rows, to a run directory if one is given."""
    total = int(train.lengths.sum())
    with progress_bar("scores", total) as progress:
        if options["run"] is None:
            ending = chain(method.train, dot(on_device_of(subject.model, queries.gradients)))
            return [collect(subject.model, train, ending, progress=progress, **subject.engine_options())]  # pyright: ignore
        settings = merged(subject.settings(), {**_data_settings(options), **queries.settings})
        fixed = {"queries/id": queries.ids, "queries/text": queries.texts}
        summary = score_run(
            options["run"], subject.model, train, queries.gradients, method.train, settings=settings,
            fixed=fixed, overwrite=options["overwrite"], progress=progress, **subject.engine_options(),
        )  # fmt: skip
    shape = f"{count(summary.rows, 'row')}, {count(len(queries.ids), 'query')}"
    lines = [("scores", f"{summary.path} [{shape}]")]
    if summary.resumed:
        lines.append(("resumed", f"from {count(summary.resumed, 'row')} that were there already"))
    console().print(facts(lines))
    return score_chunks(options["run"])


def _data_settings(options: Options) -> dict[str, Any]:
    return {"data": {"path": inputs.anchored(options["dataset"]), "split": options["split"]}}


def score_chunks(run: str) -> Iterable[Tensor]:
    """The score matrix of a run, streamed."""
    import torch

    with open_store(run, "scores") as store:
        for _, _, arrays in store.chunks(["scores"], 65536):
            yield torch.from_numpy(arrays["scores"])


def show_all(
    out: Console, subject: Subject, ids: Sequence[str], texts: Sequence[str], queries: Queries,
    chunks: Iterable[Tensor], options: Options,
) -> None:  # fmt: skip
    """Rank, show every query, say how often known sources were found, export."""
    ranked = Ranked(*extremes(chunks, max(options["top"], KNOWN_RANKS)), ids, texts)
    known = None
    if queries.documents is not None:
        known = answers(subject.model, subject.tokenizer, queries.documents)
    lexical = None
    if any(queries.sources):
        ranks = bm25_ranks(texts, queries.texts, max(options["top"], KNOWN_RANKS))
        lexical = [[ids[int(row)] for row in found if row != NOT_FOUND] for found in ranks.tolist()]
    table = []
    for number, query_id in enumerate(queries.ids):
        rows = ranked.rows(number, query_id, options["top"])
        table.extend(rows)
        out.print()
        out.print(facts(_query_facts(queries, number, known[number] if known else None)))
        out.print(ranking(rows, out.width))
        if lexical is not None:
            found = [clean(name, NAME_WIDTH) for name in lexical[number][: options["top"]]]
            out.print(facts([("BM25 finds", ", ".join(found) or "no row that shares a word")]))
    if lexical is not None:
        out.print()
        out.print(facts(_recall(queries, ranked, lexical)))
    export(table, csv_path=options["csv"], jsonl_path=options["jsonl"], parquet_path=options["parquet"])


def _query_facts(queries: Queries, number: int, answer: Answer | None) -> list[tuple[str, str]]:
    """A query, and what the model itself makes of it."""
    lines = [(f"query {clean(queries.ids[number])}", clean(queries.shown[number], QUERY_CHARACTERS))]
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


def _recall(queries: Queries, ranked: Ranked, lexical: list[list[str]]) -> list[tuple[str, str]]:
    """How often the known source of a query is ranked first and among the first five, beside BM25."""
    there = set(ranked.ids)
    named = [(number, source) for number, source in enumerate(queries.sources) if source]
    asked = [(number, source) for number, source in named if source in there]
    gradients = [[ranked.ids[int(row)] for row in rows[:KNOWN_RANKS]] for rows in ranked.proponents.rows]
    lines = []
    if asked:
        for name, found in (("gradients", gradients), ("BM25", lexical)):
            first, five = (_hits(asked, found, k) for k in (1, KNOWN_RANKS))
            lines.append((name, f"ranks the known source first for {first} of {count(len(asked), 'query')}, "
                                f"in the top {KNOWN_RANKS} for {five}"))  # fmt: skip
    if lost := len(named) - len(asked):
        lines.append(("note", f"{count(lost, 'query')} with a source that is not among the rows"))
    return lines


def _hits(asked: list[tuple[int, str]], found: list[list[str]], k: int) -> int:
    return sum(source in found[number][:k] for number, source in asked)
