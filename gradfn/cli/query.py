"""`gradfn query`: exact search in a store of gradients."""

from pathlib import Path
from typing import Any

from gradfn.cli import inputs
from gradfn.cli import options as o
from gradfn.cli.inputs import Subject
from gradfn.cli.queries import Queries, load_queries, query_documents, query_rows_of
from gradfn.cli.rows import Ranked, stored_rows
from gradfn.cli.show import check_exports, console, count, facts
from gradfn.cli.stages import curvature_for, dampings_of, normalizer
from gradfn.cli.tell import check_top, ranks_needed, show_all
from gradfn.errors import InputError
from gradfn.methods.inner_product import InnerProduct
from gradfn.runs.gradients import GRADIENTS, ends_in_unit_norm, open_gradients
from gradfn.runs.masks import LOADERS
from gradfn.runs.provenance import Provenance, rebuild, refuse_mismatch
from gradfn.runs.scores import stored_scores, stored_shares
from gradfn.scores import extremes
from gradfn.store import Store, index_path
from gradfn.transforms import chain, unit_normalize
from gradfn.transforms.joint import JOINT


def _recorded_model(run: str, settings: inputs.Options) -> str:
    """Where the store says its model is, if it is still there."""
    path = settings["model"].get("path")
    if path is None:
        raise InputError(f"{run} does not say where its model is: give --model")
    if Path(path).is_absolute() and not Path(path).exists():
        raise InputError(f"the model of {run} was {path}, which is not there any more: give --model")
    return path


def _stored_by(run: str, settings: inputs.Options, asked: Any | None) -> str:
    """How finely to tell scores apart: as asked, where the store can, else as the store does."""
    layers = settings["layers"]
    made = "token" if layers["tokens"] else "head" if layers["heads"] else "example"
    possible = {"token": ("token",), "head": ("head", "example"), "example": ("example", "module")}[made]
    if asked is None:
        return made
    if str(asked) not in possible:
        need = "example" if str(asked) == "module" else asked
        raise InputError(
            f"{run} holds gradients by {made}, so it can be asked --by {' or '.join(possible)}, not {asked}: "
            f"make one with gradfn build --by {need}"
        )
    return str(asked)


def _check_losses(settings: inputs.Options, options: inputs.Options) -> None:
    """Refuse a loss of the queries that does not go with the store's task, before the model is loaded."""
    how = settings["loss"]
    asked = str(options["query_loss"] or how["criterion"])
    reference = options["reference"]
    if asked == "kl" and reference is None and how.get("reference") is not None:
        reference = how["reference"].get("path")
    inputs.check_losses(inputs.task_of(how), [asked], reference=reference)
    inputs.check_columns(options, inputs.task_of(how))


def _ranked(store: Store, queries: Queries, method: InnerProduct, by: str, options: inputs.Options) -> Ranked:
    best = extremes(stored_scores(store, method.against(queries.gradients)), ranks_needed(options))
    if by not in ("module", "head"):
        return Ranked(*best)
    scorer = method.against(queries.gradients, by_block=True)
    return Ranked(*best).with_shares(options["top"], lambda row: stored_shares(store, row, scorer))


def _check_tail(settings: inputs.Options, options: inputs.Options) -> None:
    """Refuse stored rows to which too much has been done already."""
    what, tail = (
        f"the store {options['store']}",
        [stage["transform"] for stage in Provenance.of(settings).tail],
    )
    if "Precondition" in tail:
        raise InputError(f"{what} is behind a curvature, which is for queries: give it as --query-path")
    if tail and options["hessian_path"] is not None:
        raise InputError(
            f"{what} has unit norm, which comes after a curvature: build it without --unit-normalize"
        )


def _method(subject: Subject, store: Store, options: inputs.Options) -> tuple[InnerProduct, dict[str, Any]]:
    """Rows as they are stored, queries through the store's transform; what a curvature must agree with."""
    made, what = Provenance.of(store), f"the store {options['store']}"
    state = made.optimizer_state and made.optimizer_state.path
    normalize = None if state is None else normalizer(state, subject)
    base = rebuild(made.without_tail(), normalize, LOADERS)
    wanted = {**subject.settings(), "transform": chain(base).settings()}
    refuse_mismatch(made.without_tail(), wanted, what)
    unit, path = options["unit_normalize"] or bool(made.tail), options["hessian_path"]
    if path is None:
        norm = [unit_normalize()] if unit else []
        return InnerProduct(chain(*norm), chain(base, *norm)), wanted
    dampings = dampings_of(options)
    H = curvature_for(path, wanted, dampings)
    return InnerProduct(chain(), chain(base), H, dampings, "cosine" if unit else "none"), wanted


def run_query(**options: Any) -> None:
    """Open, ask, show."""
    check_top(options["top"])
    check_exports([options["csv"], options["jsonl"], options["parquet"]], options["overwrite"])
    dampings_of(options)
    query_rows = query_rows_of(options, options["split"])
    if query_rows is None and options["split"] != o.QUERY_SPLIT["split"][1]:
        raise InputError("--split is of a dataset in --query, and none is given: leave it out")
    with open_gradients(options["store"]) as store:
        settings = store.settings
        by = _stored_by(options["store"], settings, options["by"])
        if by in ("module", "head") and store.names(GRADIENTS) == [f"{GRADIENTS}{JOINT}"]:
            raise InputError(
                f"{options['store']} was built behind joint, one block of all: leave out --by {by}"
            )
        path = options["model"] or _recorded_model(options["store"], settings)
        _check_losses(settings, options)
        _check_tail(settings, options)
        subject = inputs.load_subject(options, path=path, settings=settings)
        method, wanted = _method(subject, store, options)
        asked = query_documents(subject, query_rows, options)
        queries, method = load_queries(subject, query_rows, asked, options, method, wanted)
        out = console()
        rows = count(store.rows, "token" if by == "token" else "row")
        out.print(facts([("store", f"{index_path(options['store'])} [{rows}]"), ("model", subject.path),
                         ("method", _in_words(method))]))  # fmt: skip
        known = stored_rows(store, subject.tokenizer, by)
        ranked = _ranked(store, queries, method, by, options)
        shown = queries.with_dampings(["none" if d is None else str(d) for d in method.damping])
        show_all(out, subject, known, shown, ranked, by, options)


def _in_words(method: InnerProduct) -> str:
    cosine = method.norm == "cosine" or ends_in_unit_norm(method.row_transform)
    kind = "" if method.curvature is None else f", {method.curvature.kind}"  # pyright: ignore
    return f"{'cosine' if cosine else 'inner product'}{kind}"
