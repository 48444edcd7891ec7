"""`gradfn query`: exact search in a store of gradients."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from gradfn.cli import inputs
from gradfn.cli.score import check_top, show_all
from gradfn.cli.show import check_exports, console, count, facts
from gradfn.errors import InputError
from gradfn.runs import ends_in_unit_norm, open_gradients, refuse_mismatch, stored_scores, transform_of
from gradfn.store import Store
from gradfn.transforms import chain, unit_normalize


@dataclass(frozen=True)
class StoredTexts(Sequence[str]):
    """An array of strings that stays on disk: a store may have more rows than fit in memory as text."""

    store: Store
    name: str

    def __len__(self) -> int:
        return self.store.rows

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return list(self)[index]
        row = range(len(self))[index]
        return str(self.store.read(self.name, row, row + 1)[0])

    def __iter__(self) -> Iterator[str]:
        for _, _, arrays in self.store.chunks([self.name], 1024):
            yield from arrays[self.name]


def _recorded_model(run: str, settings: inputs.Options) -> str:
    """Where the store says its model is, if it is still there."""
    path = settings["model"].get("path")
    if path is None:
        raise InputError(f"{run} does not say where its model is: give --model")
    if Path(path).is_absolute() and not Path(path).exists():
        raise InputError(f"the model of {run} was {path}, which is not there any more: give --model")
    return path


def run_query(**options: Any) -> None:
    """Open, ask, show."""
    check_top(options["top"])
    check_exports([options["csv"], options["jsonl"], options["parquet"]], options["overwrite"])
    query_rows = inputs.query_rows(options, options["split"])
    with open_gradients(options["store"]) as store:
        settings = store.settings
        path = options["model"] or _recorded_model(options["store"], settings)
        stored = transform_of(settings)
        unit = options["unit_normalize"] or ends_in_unit_norm(stored)
        transform = chain(stored, unit_normalize()) if unit and not ends_in_unit_norm(stored) else stored
        subject = inputs.load_subject(options, path=path, settings=settings)
        wanted = {**subject.settings(), "transform": transform.settings()}
        refuse_mismatch(settings, wanted, f"the store {options['store']}")
        queries = inputs.load_queries(subject, query_rows, options, transform, wanted)
        out = console()
        out.print(facts([("store", f"{store.path} [{count(store.rows, 'row')}]"), ("model", subject.path),
                         ("method", "cosine" if unit else "inner product")]))  # fmt: skip
        chunks = stored_scores(store, queries.gradients, unit=unit)
        ids, texts = StoredTexts(store, "rows/id"), StoredTexts(store, "rows/text")
        show_all(out, subject, ids, texts, queries, chunks, options)
