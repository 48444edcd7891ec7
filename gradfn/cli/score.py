"""`gradfn score`: the main job."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor

from gradfn.cli import inputs
from gradfn.cli.inputs import Options, Queries, Subject
from gradfn.cli.rows import DocumentRows, Scored, ShownRows, loaded_rows, top_shares
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
from gradfn.data import Documents, Pairs
from gradfn.errors import InputError
from gradfn.hf.answers import Answer, answers
from gradfn.hf.datasets import load_rows
from gradfn.lexical import NOT_FOUND, bm25_ranks
from gradfn.losses import CausalLMLoss
from gradfn.probes import probe_engine
from gradfn.runs import SHARES, describe, layer_summary, merged, score_run, unprobed
from gradfn.scoring import Method, TopK, extremes, on_device_of
from gradfn.store import open_store
from gradfn.stream import gather
from gradfn.transforms import Transform, chain, dot, project
from gradfn.types import Blocks

KNOWN_RANKS = 5
QUERY_CHARACTERS = 300
"""Of a query that is shown; it may be a whole document."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """Rows ranked for every query, with what is shown of them."""

    proponents: TopK
    opponents: TopK
    known: ShownRows
    scored: Scored

    def rows(self, query: int, query_id: str, top: int) -> list[dict[str, Any]]:
        """The table of one query, proponents first."""
        table = []
        for side, best in (("proponent", self.proponents), ("opponent", self.opponents)):
            for rank in range(min(top, best.rows.shape[1])):
                row, value = int(best.rows[query, rank]), float(best.scores[query, rank])
                if (value > 0) == (side == "proponent") and value != 0:
                    table.append({"query": query_id, "side": side, "rank": rank + 1, "score": value,
                                  **self.known.cells(row), **self._shares(row, query)})  # fmt: skip
        return table

    def _shares(self, row: int, query: int) -> dict[str, Any]:
        return {} if self.scored.shares is None else {"shares": top_shares(self.scored.shares(row), query)}


def run_score(**options: Any) -> None:
    """Load, score, show."""
    inputs.check_run(options["run"])
    inputs.check_options(options)
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
    scored, by = _scored(subject, train, queries, method, options), str(options["by"])
    show_all(out, subject, loaded_rows(train, subject.tokenizer, by), queries, scored, by, options)


def check_top(top: int) -> None:
    """Refuse a table of no rows."""
    if top < 1:
        raise InputError(f"--top must be 1 or more, not {top}")


def subject_facts(subject: Subject, train: Documents | Pairs) -> list[tuple[str, str]]:
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
    if unsupervised := int((train.supervised == 0).sum()):
        rows = count(unsupervised, "row")
        lines.append(("note", f"{rows} with nothing to supervise: zero gradient, zero scores"))
    return lines


def gradients_line(*transforms: Transform) -> str:
    """A chain of transforms in words."""
    return ", ".join(map(str, chain(*transforms).stages)) or "full gradients"


def unprobed_facts(paths: Sequence[str]) -> list[tuple[str, str]]:
    """A note on the layers that no probe could see, if there are any."""
    if not paths:
        return []
    named = ", ".join(paths[:3]) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "")
    return [("note", f"no probe sees {named}: through vmap(grad), which is slower")]


def _scored(
    subject: Subject, train: Documents | Pairs, queries: Queries, method: Method, options: Options
) -> Scored:
    """Score all rows, to a run directory if one is given."""
    by_block = str(options["by"]) in ("module", "head")
    with progress_bar("scores", int(train.lengths.sum())) as progress:
        if options["run"] is None:
            there = on_device_of(subject.model, queries.gradients)
            ending = chain(method.train, dot(there, by_block=by_block))
            engine = probe_engine(subject.model, subject.loss, ending, view=subject.view)
            values = gather(
                engine, train, token_batch_size=subject.token_batch_size, progress=progress
            ).values
            lines, scored = unprobed_facts(unprobed(engine)), _in_memory(values)
        else:
            settings = merged(subject.settings(), {**_data_settings(options), **queries.settings})
            fixed = {"queries/id": queries.ids, "queries/text": queries.texts}
            summary = score_run(
                options["run"], subject.model, train, queries.gradients, method.train, by_block=by_block,
                settings=settings, fixed=fixed, overwrite=options["overwrite"], progress=progress,
                **subject.engine_options(),
            )  # fmt: skip
            noun = "token" if subject.view.tokens else "row"
            shape = f"{count(summary.rows, noun)}, {count(len(queries.ids), 'query')}"
            lines = [("scores", f"{summary.path} [{shape}]")]
            if summary.resumed:
                lines.append(("resumed", f"from {count(summary.resumed, noun)} that were there already"))
            lines, scored = [*lines, *unprobed_facts(summary.unprobed)], _on_disk(options["run"], by_block)
    if lines:
        console().print(facts(lines))
    return scored


def _in_memory(values: Blocks | Tensor) -> Scored:
    if not isinstance(values, dict):
        return Scored([values])
    total = sum(values.values(), next(iter(values.values())).new_zeros(()))
    return Scored([total], lambda row: {name: share[row] for name, share in values.items()})


def _on_disk(run: str, by_block: bool) -> Scored:
    return Scored(score_chunks(run), (lambda row: score_shares(run, row)) if by_block else None)


def score_shares(run: str, row: int) -> Blocks:
    """Of a row's scores in a run the share of each block, `{block: [queries]}`."""
    import torch

    with open_store(run, "scores") as store:
        return {name.removeprefix(SHARES): torch.from_numpy(store.read(name, row, row + 1)[0])
                for name in store.names(SHARES)}  # fmt: skip


def _data_settings(options: Options) -> dict[str, Any]:
    return {"data": {"path": inputs.anchored(options["dataset"]), "split": options["split"]}}


def score_chunks(run: str) -> Iterable[Tensor]:
    """The score matrix of a run, streamed."""
    import torch

    with open_store(run, "scores") as store:
        for _, _, arrays in store.chunks(["scores"], 65536):
            yield torch.from_numpy(arrays["scores"])


def show_all(
    out: Console, subject: Subject, known: ShownRows, queries: Queries, scored: Scored, by: str,
    options: Options,
) -> None:  # fmt: skip
    """Rank, show every query, say how often known sources were found, export."""
    ranked = Ranked(*extremes(scored.chunks, max(options["top"], KNOWN_RANKS)), known, scored)
    told = None
    if isinstance(queries.documents, Documents) and subject.task == "causal_lm":
        told = answers(subject.model, subject.tokenizer, queries.documents)
    lexical = _lexical(known, queries, options["top"])
    table = []
    for number, query_id in enumerate(queries.ids):
        rows = ranked.rows(number, query_id, options["top"])
        table.extend(rows)
        out.print()
        out.print(facts(_query_facts(queries, number, told[number] if told else None)))
        out.print(ranking(rows, out.width))
        if lexical is not None:
            found = [clean(name, NAME_WIDTH) for name in lexical[number][: options["top"]]]
            out.print(facts([("BM25 finds", ", ".join(found) or "no row that shares a word")]))
    if lexical is not None and isinstance(known, DocumentRows):
        out.print()
        out.print(facts(_recall(queries, ranked, known.ids, lexical)))
    paths = {f"{kind}_path": options[kind] for kind in ("csv", "jsonl", "parquet")}
    export(table, by=by, **paths)


def _lexical(known: ShownRows, queries: Queries, top: int) -> list[list[str]] | None:
    """What BM25 finds for every query, where sources are known and rows are documents."""
    if not any(queries.sources) or not isinstance(known, DocumentRows):
        return None
    ranks = bm25_ranks(known.texts, queries.texts, max(top, KNOWN_RANKS))
    return [[known.ids[int(row)] for row in found if row != NOT_FOUND] for found in ranks.tolist()]


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


def _recall(
    queries: Queries, ranked: Ranked, ids: Sequence[str], lexical: list[list[str]]
) -> list[tuple[str, str]]:
    """How often the known source of a query is ranked first and among the first five, beside BM25."""
    there = set(ids)
    named = [(number, source) for number, source in enumerate(queries.sources) if source]
    asked = [(number, source) for number, source in named if source in there]
    gradients = [[ids[int(row)] for row in rows[:KNOWN_RANKS]] for rows in ranked.proponents.rows]
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
