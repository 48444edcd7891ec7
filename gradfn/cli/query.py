"""`gradfn query`: search in a store of gradients."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradfn.cli.commands import QueryRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, Settings, load_stored_subject
from gradfn.cli.options import By, check_losses
from gradfn.cli.queries import Asked, Queries, answers_of, load_asked, load_queries, query_rows_of
from gradfn.cli.reranking import SecondStage, check_rerank, second_stage
from gradfn.cli.session import HOW, at_a_terminal, converse
from gradfn.cli.stages import dampings_of, normalizer
from gradfn.errors import InputError
from gradfn.hf.datasets import check_column
from gradfn.methods.inner_product import InnerProduct
from gradfn.report.exports import export_ranking
from gradfn.report.progress import progress_bar
from gradfn.report.rankings import print_rankings, ranks_needed
from gradfn.report.rows import Ranked, stored_rows
from gradfn.report.summaries import device_facts
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.runs.curvatures import curvature_for
from gradfn.runs.exchange import IMPORTED, Imported
from gradfn.runs.gradients import GRADIENTS, ends_in_unit_norm, open_gradients
from gradfn.runs.masks import LOADERS
from gradfn.runs.nearest import Faiss, empty_index, find
from gradfn.runs.provenance import Provenance, rebuild, refuse_mismatch
from gradfn.runs.scores import stored_scores, stored_shares
from gradfn.runs.search import searching
from gradfn.scores import TopK, recall
from gradfn.store.directory import index_path
from gradfn.store.reader import Store
from gradfn.transforms import Transform, chain
from gradfn.transforms.joint import JOINT

_Method = tuple[InnerProduct, dict[str, Any], Transform]


@dataclass(frozen=True, eq=False)
class Search:
    """A store that is open and its model, ready for queries.

    Args:
        request: what was asked for.
        store: whose rows are searched.
        loaded: the store's model; None: another program made the rows.
        by: how finely scores are told apart.
        method: how stored rows are compared.
        wanted: what queries and curvatures must agree with.
        index: which index of FAISS is searched; None: all rows are compared.
        second: what ranks candidates anew, if asked for.
    """

    request: QueryRequest
    store: Store
    loaded: Loaded | None
    by: By
    method: InnerProduct
    wanted: dict[str, Any]
    index: Faiss | None
    second: SecondStage | None

    def introduce(self) -> None:
        """Print the first lines."""
        rows = count(self.store.rows, "token" if self.by == "token" else "row")
        index = "" if self.index is None else f", index {self.index.factory}"
        lines = [("store", f"{index_path(self.request.store)} [{rows}]")]
        if self.loaded is not None:
            device = device_facts(self.loaded.model, self.loaded.products)
            lines = [*device, *lines, ("model", self.loaded.path)]
        console().print(facts([*lines, ("method", _in_words(self.method) + index)]))

    def answer(self, asked: Asked | None) -> list[dict[str, Any]]:
        """Show the best rows of queries.

        Args:
            asked: the queries' tokens; None: their gradients are stored.

        Returns:
            The table, a line a row shown.
        """
        loaded, top = self.loaded, self.request.table.top or 0
        queries, method = load_queries(loaded, asked, self.request.query, self.method, self.wanted)
        ranked = self._ranked(queries, method, asked)
        shown = queries.shown.with_dampings(["none" if d is None else str(d) for d in method.damping])
        reads = None if loaded is None else loaded.reads
        return print_rankings(
            console(), shown, ranked, stored_rows(self.store, reads and reads.tokenizer, self.by), top,
            show=self.request.table.show, answers=None if loaded is None else answers_of(loaded, shown),
            texts=reads is None or reads.processor is None,
        )  # fmt: skip

    def scores(self, asked: Asked) -> Tensor:
        """The scores of all rows for queries, `[rows, queries]`."""
        queries, method = load_queries(self.loaded, asked, self.request.query, self.method, self.wanted)
        scorer, memory = method.against(queries.gradients), self.request.table.memory << 20
        return torch.cat([*stored_scores(self.store, scorer, memory=memory)])

    def _ranked(self, queries: Queries, method: InnerProduct, asked: Asked | None) -> Ranked:
        """The best rows, of one stage or two, with each block's share where it is asked for."""
        top, check = self.request.table.top or 0, self.request.search.check
        k = ranks_needed(top)
        found = self._found(queries, method, max(k, self.request.search.rerank or 0), self.index)
        if self.second is not None and asked is not None:
            found = self.second.rank(found, asked, top, check)
        elif check:
            exact = self._found(queries, method, k, None)
            shares = [recall(one, other) for one, other in zip(found, exact, strict=True)]
            k = exact[0].rows.shape[1]
            text = f"{shares[0]:.1%} of the {k} highest rows of each query, {shares[1]:.1%} of the {k} lowest"
            console().print(facts([("recall", text)]))
        if self.by not in ("module", "head"):
            return Ranked(*found)
        scorer = method.against(queries.gradients, by_block=True)
        return Ranked(*found).with_shares(top, lambda row: stored_shares(self.store, row, scorer))

    def _found(
        self, queries: Queries, method: InnerProduct, k: int, index: Faiss | None
    ) -> tuple[TopK, TopK]:
        """The rows that the store itself ranks highest and lowest."""
        gradients, memory = queries.gradients, self.request.table.memory << 20
        if index is None:
            return find(self.store, method, gradients, k, memory=memory)
        with progress_bar("index", self.store.rows, "rows", then="search") as progress:
            return find(self.store, method, gradients, k, index=index, memory=memory, progress=progress)


def run_query(request: QueryRequest) -> None:
    """Open, ask, show."""
    request.table.check(request.output.overwrite)
    request.search.check_given()
    dampings_of(request.curvature)
    if request.query.query is None and request.query.query_path is None and at_a_terminal():
        return _converse(request)
    query_rows = query_rows_of(request.query)
    if query_rows is not None and request.gave("text_column"):
        check_column(query_rows, request.data.text_column, "give another text_column")
    with open_gradients(request.store) as store:
        search = _imported(store, request) if IMPORTED in store.settings else opened_search(store, request)
        asked = None
        if search.loaded is not None:
            asked = load_asked(search.loaded, query_rows, request.query, request.data)
        search.introduce()
        table = search.answer(asked)
    export_ranking(table, request.table.paths, search.by)


def _converse(request: QueryRequest) -> None:
    """Ask for queries at the terminal, one after the other."""
    if given := request.gave("completion", "query_split", *request.table.paths):
        raise InputError(
            f"{given} goes with a query, and a session asks for queries: give --query, or leave it out"
        )
    with open_gradients(request.store) as store:
        search = _imported(store, request) if IMPORTED in store.settings else opened_search(store, request)
        loaded = search.loaded
        assert loaded is not None
        if loaded.reads.processor is not None:
            raise InputError("images cannot be typed: give a folder of them as --query")
        search.introduce()
        console().print(facts([("session", HOW)]))

        def answer(text: str, completion: str | None) -> None:
            query = replace(request.query, query=text, completion=completion)
            search.answer(load_asked(loaded, None, query, request.data))
            console().print()

        converse(answer)


def _imported(store: Store, request: QueryRequest) -> Search:
    """A store of rows that another program made, whose queries it made too."""
    if request.query.query_path is None:
        raise InputError(
            f"{request.store} was imported, and its projections are another program's: give queries that "
            "this program made, imported too, as --query-path"
        )
    if given := request.gave("rerank", "hessian_path", "model", "optimizer_state"):
        raise InputError(f"{request.store} was imported, without a model: leave out {given}")
    by, made = _stored_by(store, request), Provenance.of(store)
    base = chain(*(Imported(stage) for stage in made.without_tail().stages))
    method = searching(base, request.gradients.unit_normalize or bool(made.tail), None)
    wanted = made.without_tail().settings()
    return Search(request, store, None, by, method, wanted, _index_of(store, request), None)


def _index_of(store: Store, request: QueryRequest) -> Faiss | None:
    """The index that is asked for, if it can hold the rows."""
    if request.search.index is None:
        return None
    index = Faiss(request.search.index, request.search.nprobe)
    empty_index(store, index)
    return index


def opened_search(store: Store, request: QueryRequest) -> Search:
    """The store's model and method; what can be wrong is found before the model is loaded."""
    by = _stored_by(store, request)
    path = request.model.path or _recorded_model(request.store, store.settings)
    _check(store.settings, request)
    check_rerank(request, by)
    index = _index_of(store, request)
    loaded = load_stored_subject(request, path, store.settings)
    method, wanted, base = _method(loaded, store, request)
    if index is not None:
        method.sides()
    second = None
    if request.search.rerank is not None:
        unit = request.gradients.unit_normalize or ends_in_unit_norm(method.row_transform)
        second = second_stage(loaded, request, store.settings, base, unit)
    return Search(request, store, loaded, by, method, wanted, index, second)


def _stored_by(store: Store, request: QueryRequest) -> By:
    """How finely to tell scores apart: as asked, where the store can, else as the store does."""
    run, asked, layers = request.store, request.layers.by, store.settings["layers"]
    made: By = "token" if layers["tokens"] else "head" if layers["heads"] else "example"
    possible = {"token": ("token",), "head": ("head", "example"), "example": ("example", "module")}[made]
    if asked is not None and asked not in possible:
        need = "example" if asked == "module" else asked
        raise InputError(
            f"{run} holds gradients by {made}, so it can be asked --by {' or '.join(possible)}, not {asked}: "
            f"make one with gradfn build --by {need}"
        )
    by = asked or made
    if by in ("module", "head") and store.names(GRADIENTS) == [f"{GRADIENTS}{JOINT}"]:
        raise InputError(f"{run} was built behind joint, one block of all: leave out --by {by}")
    return by


def _recorded_model(run: str, settings: Settings) -> str:
    """Where the store says its model is, if it is still there."""
    path = settings["model"].get("path")
    if path is None:
        raise InputError(f"{run} does not say where its model is: give --model")
    if Path(path).is_absolute() and not Path(path).exists():
        raise InputError(f"the model of {run} was {path}, which is not there any more: give --model")
    return path


def _check(settings: Settings, request: QueryRequest) -> None:
    """Refuse, before the model is loaded, a loss that the task has not, and rows that cannot be asked."""
    how, reference = settings["loss"], request.loss.reference
    asked = request.query.query_loss or how["criterion"]
    if asked == "kl" and reference is None and how.get("reference") is not None:
        reference = how["reference"].get("path")
    check_losses(how["name"], [asked], reference=reference)
    request.data.check(how["name"], request.layers.by)
    what, tail = f"the store {request.store}", [stage["transform"] for stage in Provenance.of(settings).tail]
    if "Precondition" in tail:
        raise InputError(f"{what} is behind a curvature, which is for queries: give it as --query-path")
    if tail and request.curvature.path is not None:
        raise InputError(
            f"{what} has unit norm, which comes after a curvature: build it without --unit-normalize"
        )


def _method(loaded: Loaded, store: Store, request: QueryRequest) -> _Method:
    """Rows as they are stored, queries through the store's transform; what a curvature must agree with; and
    the transform."""
    made, what = Provenance.of(store), f"the store {request.store}"
    state = request.gradients.optimizer_state or (made.optimizer_state and made.optimizer_state.path)
    normalize = None if state is None else normalizer(state, loaded)
    base = rebuild(made.without_tail(), normalize, LOADERS)
    wanted = {**loaded.settings(), "transform": chain(base).settings()}
    refuse_mismatch(made.without_tail(), wanted, what)
    unit, path = request.gradients.unit_normalize or bool(made.tail), request.curvature.path
    dampings = dampings_of(request.curvature)
    H = None if path is None else curvature_for(path, wanted, dampings)
    return searching(base, unit, H, dampings), wanted, base


def _in_words(method: InnerProduct) -> str:
    cosine = method.norm == "cosine" or ends_in_unit_norm(method.row_transform)
    kind = "" if method.curvature is None else f", {method.curvature.kind}"  # pyright: ignore
    return f"{'cosine' if cosine else 'inner product'}{kind}"
