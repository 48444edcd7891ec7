"""`gradfn score`: the main job."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from gradfn.cli import inputs
from gradfn.cli.inputs import Options, Queries, Subject
from gradfn.cli.show import check_exports, console, export, facts, progress_bar, ranking
from gradfn.data import Documents
from gradfn.errors import InputError
from gradfn.hf.answers import Answer, answers
from gradfn.hf.datasets import load_rows
from gradfn.lexical import bm25_ranks
from gradfn.runs import describe, layer_summary, merged, score_run
from gradfn.scoring import Method, TopK, extremes, on_device_of
from gradfn.store import open_store
from gradfn.stream import collect
from gradfn.transforms import chain, dot, project

KNOWN_RANKS = 5


@dataclass(frozen=True, eq=False)
class Ranked:
    """Rows ranked for every query, with what is shown of them."""

    proponents: TopK
    opponents: TopK
    ids: list[str]
    texts: list[str]

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
    is_example = options["model"] is None and options["dataset"] is None
    options = inputs.example_options(options) if is_example else options
    if options["model"] is None or options["dataset"] is None:
        lacking = "--model" if options["model"] is None else "--dataset"
        raise InputError(f"no {lacking}: give both --model and --dataset, or neither for the example")
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
    out.print(facts([*subject_facts(subject, train), ("method", method_line(name, stage))]))
    wanted = merged(describe(subject.model, [], method.query, loss=subject.loss, include=subject.include,
                             exclude=subject.exclude), subject.settings())  # fmt: skip
    queries = inputs.load_queries(subject, query_rows, options, method.query, wanted)
    chunks = _scored(subject, train, queries, method, options)
    show_all(out, subject, train.ids, train.texts, queries, chunks, options)


def check_top(top: int) -> None:
    """Refuse a table of no rows."""
    if top < 1:
        raise InputError(f"--top must be 1 or more, not {top}")


def subject_facts(subject: Subject, train: Documents) -> list[tuple[str, str]]:
    """What is attributed, in three lines; what is unusual about the data in a fourth."""
    head = (
        "" if subject.loss.fused_head else "; logits are not a plain linear map, so they are computed whole"
    )
    lines = [
        ("model", f"{subject.path} ({layer_summary(subject.model, subject.include, subject.exclude)}{head})"),
        ("train", f"{len(train)} rows, {int(train.lengths.sum()):,} tokens"),
    ]
    if unsupervised := int((train.supervised == 0).sum()):
        lines.append(
            ("note", f"{unsupervised} rows have nothing to supervise: their gradient and scores are zero")
        )
    return lines


def method_line(name: str, stage: Any) -> str:
    """The method in words."""
    return f"{name}, {'full gradients' if stage == chain() else stage}"


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
    console().print(facts([("scores", f"{summary.path} [{summary.rows} rows, {len(queries.ids)} queries]")]))
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
    out: Console, subject: Subject, ids: list[str], texts: list[str], queries: Queries,
    chunks: Iterable[Tensor], options: Options,
) -> None:  # fmt: skip
    """Rank, show every query, say how often known sources were found, export."""
    ranked = Ranked(*extremes(chunks, max(options["top"], KNOWN_RANKS)), ids, texts)
    known = None
    if queries.documents is not None:
        known = answers(subject.model, subject.tokenizer, queries.documents)
    lexical = bm25_ranks(texts, queries.texts, KNOWN_RANKS) if queries.sources else None
    table = []
    for number, query_id in enumerate(queries.ids):
        rows = ranked.rows(number, query_id, options["top"])
        table.extend(rows)
        out.print()
        out.print(facts(_query_facts(queries, number, known[number] if known else None)))
        out.print(ranking(rows, max(20, out.width - 60)))
        if lexical is not None:
            found = ", ".join(ids[row] for row in lexical[number][: options["top"]])
            out.print(facts([("BM25 finds", found)]))
    if lexical is not None:
        out.print()
        out.print(facts(_recall(queries, ranked, [[ids[row] for row in found] for found in lexical])))
    export(table, csv_path=options["csv"], jsonl_path=options["jsonl"], parquet_path=options["parquet"])


def _query_facts(queries: Queries, number: int, answer: Answer | None) -> list[tuple[str, str]]:
    """A query, and what the model itself makes of it."""
    lines = [(f"query {queries.ids[number]}", queries.texts[number])]
    if answer is None:
        return lines
    chance = f"loss {answer.loss:.2f} nats a token, probability {answer.probability:.3g}"
    if answer.known:
        lines.append(("model", f"{chance}: it knows the answer"))
    else:
        says = f'; it says "{answer.says}"' if answer.says else ""
        lines.append(("model", f"{chance}: it does NOT know the answer{says}, so expect no source below"))
    return lines


def _recall(queries: Queries, ranked: Ranked, lexical: list[list[str]]) -> list[tuple[str, str]]:
    """How often the known source of a query is ranked first and among the first five, beside BM25."""
    asked = [(n, source) for n, source in enumerate(queries.sources or []) if source]
    gradients = [[ranked.ids[int(row)] for row in rows[:KNOWN_RANKS]] for rows in ranked.proponents.rows]
    return [
        (name, f"ranks the known source first for {_hits(asked, found, 1)} of {len(asked)} queries, "
               f"in the top {KNOWN_RANKS} for {_hits(asked, found, KNOWN_RANKS)}")
        for name, found in (("gradients", gradients), ("BM25", lexical))
    ]  # fmt: skip


def _hits(asked: list[tuple[int, str]], found: list[list[str]], k: int) -> int:
    return sum(source in found[number][:k] for number, source in asked)
