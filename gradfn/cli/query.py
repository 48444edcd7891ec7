"""`gradfn query`: exact search in a store of gradients."""

from pathlib import Path
from typing import Any

from gradfn.cli.commands import QueryRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, Settings, load_stored_subject
from gradfn.cli.options import By, SearchOptions, TableOptions, check_losses
from gradfn.cli.queries import Queries, answers_of, load_asked, load_queries, query_rows_of
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
from gradfn.runs.gradients import GRADIENTS, ends_in_unit_norm, open_gradients
from gradfn.runs.masks import LOADERS
from gradfn.runs.nearest import Faiss, empty_index, find, recall
from gradfn.runs.provenance import Provenance, rebuild, refuse_mismatch
from gradfn.runs.scores import stored_shares
from gradfn.runs.search import searching
from gradfn.store.directory import index_path
from gradfn.store.reader import Store
from gradfn.transforms import chain
from gradfn.transforms.joint import JOINT


def run_query(request: QueryRequest) -> None:
    """Open, ask, show."""
    top = request.table.top or 0
    request.table.check(request.output.overwrite)
    dampings_of(request.curvature)
    index = _index_of(request.search)
    query_rows = query_rows_of(request.query)
    if query_rows is not None and request.gave("text_column"):
        check_column(query_rows, request.data.text_column, "give another text_column")
    with open_gradients(request.store) as store:
        by = _stored_by(store, request)
        path = request.model.path or _recorded_model(request.store, store.settings)
        _check(store.settings, request)
        if index is not None:
            empty_index(store, index)
        loaded = load_stored_subject(request, path, store.settings)
        method, wanted = _method(loaded, store, request)
        if index is not None:
            method.sides()
        asked = load_asked(loaded, query_rows, request.query, request.data)
        queries, method = load_queries(loaded, asked, request.query, method, wanted)
        rows = count(store.rows, "token" if by == "token" else "row")
        lines = [("store", f"{index_path(request.store)} [{rows}]"), ("model", loaded.path)]
        method_line = ("method", _in_words(method) + ("" if index is None else f", index {index.factory}"))
        console().print(facts([*device_facts(loaded.model, loaded.products), *lines, method_line]))
        ranked = _ranked(store, queries, method, by, request.table, index)
        shown = queries.shown.with_dampings(["none" if d is None else str(d) for d in method.damping])
        if request.search.check:
            _print_check(store, queries, method, ranked, request.table)
        table = print_rankings(
            console(), shown, ranked, stored_rows(store, loaded.reads.tokenizer, by), top,
            show=request.table.show, answers=answers_of(loaded, shown), texts=loaded.reads.processor is None,
        )  # fmt: skip
    export_ranking(table, request.table.paths, by)


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


def _method(loaded: Loaded, store: Store, request: QueryRequest) -> tuple[InnerProduct, dict[str, Any]]:
    """Rows as they are stored, queries through the store's transform; what a curvature must agree with."""
    made, what = Provenance.of(store), f"the store {request.store}"
    state = request.gradients.optimizer_state or (made.optimizer_state and made.optimizer_state.path)
    normalize = None if state is None else normalizer(state, loaded)
    base = rebuild(made.without_tail(), normalize, LOADERS)
    wanted = {**loaded.settings(), "transform": chain(base).settings()}
    refuse_mismatch(made.without_tail(), wanted, what)
    unit, path = request.gradients.unit_normalize or bool(made.tail), request.curvature.path
    dampings = dampings_of(request.curvature)
    H = None if path is None else curvature_for(path, wanted, dampings)
    return searching(base, unit, H, dampings), wanted


def _index_of(options: SearchOptions) -> Faiss | None:
    """The index that is asked for."""
    options.check_given()
    return None if options.index is None else Faiss(options.index, options.nprobe)


def _ranked(
    store: Store, queries: Queries, method: InnerProduct, by: By, table: TableOptions, index: Faiss | None
) -> Ranked:
    top, memory = table.top or 0, table.memory << 20
    gradients = queries.gradients
    with progress_bar("index", store.rows, "rows", then="search") as progress:
        ranked = Ranked(
            *find(store, method, gradients, ranks_needed(top), index=index, memory=memory, progress=progress)
        )
    if by not in ("module", "head"):
        return ranked
    scorer = method.against(gradients, by_block=True)
    return ranked.with_shares(top, lambda row: stored_shares(store, row, scorer))


def _print_check(
    store: Store, queries: Queries, method: InnerProduct, ranked: Ranked, table: TableOptions
) -> None:
    """Which share of the exactly best rows an index found."""
    found = ranked.proponents, ranked.opponents
    count_of = found[0].rows.shape[1]
    exact = find(store, method, queries.gradients, count_of, memory=table.memory << 20)
    highest, lowest = (recall(one, other) for one, other in zip(found, exact, strict=True))
    text = (
        f"{highest:.1%} of the {count_of} highest rows of each query, {lowest:.1%} of the {count_of} lowest"
    )
    console().print(facts([("recall", text)]))


def _in_words(method: InnerProduct) -> str:
    cosine = method.norm == "cosine" or ends_in_unit_norm(method.row_transform)
    kind = "" if method.curvature is None else f", {method.curvature.kind}"  # pyright: ignore
    return f"{'cosine' if cosine else 'inner product'}{kind}"
