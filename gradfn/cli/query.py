"""`gradfn query`: exact search in a store of gradients."""

from pathlib import Path
from typing import Any

from gradfn.cli import inputs
from gradfn.cli.rows import Scored, stored_rows
from gradfn.cli.score import check_top, show_all
from gradfn.cli.show import check_exports, console, count, facts
from gradfn.errors import InputError
from gradfn.runs import (
    ends_in_unit_norm,
    open_gradients,
    refuse_mismatch,
    stored_scores,
    stored_shares,
    transform_of,
)
from gradfn.store import Store
from gradfn.transforms import chain, unit_normalize
from gradfn.types import Blocks


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
    if asked == "kl" and reference is None and how["reference"] is not None:
        reference = how["reference"].get("path")
    inputs.check_losses(inputs.task_of(how), [asked], reference=reference)
    inputs.check_columns(options, inputs.task_of(how))


def _scored(store: Store, queries: Blocks, unit: bool, by: str) -> Scored:
    chunks = stored_scores(store, queries, unit=unit)
    if by not in ("module", "head"):
        return Scored(chunks)
    return Scored(chunks, lambda row: stored_shares(store, row, queries, unit=unit))


def run_query(**options: Any) -> None:
    """Open, ask, show."""
    check_top(options["top"])
    check_exports([options["csv"], options["jsonl"], options["parquet"]], options["overwrite"])
    query_rows = inputs.query_rows(options, options["split"])
    with open_gradients(options["store"]) as store:
        settings = store.settings
        by = _stored_by(options["store"], settings, options["by"])
        path = options["model"] or _recorded_model(options["store"], settings)
        _check_losses(settings, options)
        stored = transform_of(settings)
        unit = options["unit_normalize"] or ends_in_unit_norm(stored)
        transform = chain(stored, unit_normalize()) if unit and not ends_in_unit_norm(stored) else stored
        subject = inputs.load_subject(options, path=path, settings=settings)
        wanted = {**subject.settings(), "transform": transform.settings()}
        refuse_mismatch(settings, wanted, f"the store {options['store']}")
        queries = inputs.load_queries(subject, query_rows, options, transform, wanted)
        out = console()
        rows = count(store.rows, "token" if by == "token" else "row")
        out.print(facts([("store", f"{store.path} [{rows}]"), ("model", subject.path),
                         ("method", "cosine" if unit else "inner product")]))  # fmt: skip
        known = stored_rows(store, subject.tokenizer, by)
        show_all(out, subject, known, queries, _scored(store, queries.gradients, unit, by), by, options)
