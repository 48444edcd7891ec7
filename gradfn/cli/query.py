"""`gradfn query`: exact search in a store of gradients."""

from typing import Any

from gradfn.cli import inputs
from gradfn.cli.score import check_top, show_all
from gradfn.cli.show import check_exports, console, facts
from gradfn.errors import InputError
from gradfn.runs import ends_in_unit_norm, refuse_mismatch, stored_scores, transform_of
from gradfn.store import open_store
from gradfn.transforms import chain, unit_normalize


def run_query(**options: Any) -> None:
    """Open, ask, show."""
    check_top(options["top"])
    check_exports([options["csv"], options["jsonl"], options["parquet"]], options["overwrite"])
    query_rows = inputs.query_rows(options)
    with open_store(options["store"]) as store:
        settings = store.settings
        if "path" not in settings["model"] and options["model"] is None:
            raise InputError(f"{options['store']} does not say where its model is: give --model")
        stored = transform_of(settings)
        unit = options["unit_normalize"] or ends_in_unit_norm(stored)
        transform = chain(stored, unit_normalize()) if unit and not ends_in_unit_norm(stored) else stored
        path = options["model"] or settings["model"]["path"]
        subject = inputs.load_subject(options, path=path, settings=settings)
        wanted = {**subject.settings(), "transform": transform.settings()}
        refuse_mismatch(settings, wanted, f"the store {options['store']}")
        queries = inputs.load_queries(subject, query_rows, options, transform, wanted)
        out = console()
        out.print(facts([("store", f"{store.path} [{store.rows} rows]"), ("model", subject.path),
                         ("method", "cosine" if unit else "inner product")]))  # fmt: skip
        chunks = stored_scores(store, queries.gradients, unit=unit)
        ids, texts = list(store.read("rows/id")), list(store.read("rows/text"))
        show_all(out, subject, ids, texts, queries, chunks, options)
