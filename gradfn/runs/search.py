"""A store asked many questions: its rows are read, and only the queries need the model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import nn

from gradfn.engine.stream import Progress, collect
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.methods.inner_product import InnerProduct, damping_names
from gradfn.methods.scoring import names_of
from gradfn.model.sites import View
from gradfn.runs.gradients import open_gradients
from gradfn.runs.masks import LOADERS
from gradfn.runs.nearest import Faiss, find
from gradfn.runs.provenance import Provenance, describe, rebuild, refuse_mismatch
from gradfn.runs.scores import stored_scores
from gradfn.scores import Scores, TopK
from gradfn.store import Store
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.transforms import Transform, chain, unit_normalize
from gradfn.types import Data


class CompareOptions(TypedDict, total=False):
    """How stored rows are compared with queries, as keywords; see `query`."""

    curvature: Mapping[str, Spectrum] | None
    damping: tuple[Damping | None, ...]
    unit_norm: bool
    normalize: Transform | None


class QueryOptions(SubjectOptions, CompareOptions, total=False):
    """How a store is asked, as keywords; see `query`."""

    progress: Progress | None


def query(
    run: str | Path,
    model: nn.Module | Subject,
    queries: Data,
    **options: Unpack[QueryOptions],
) -> Scores:
    """Score the rows of a store against queries, as `gradfn query` does.

    The queries go through the transform that the store's rows went through. Scores are `<g, q>`; with a
    curvature `<g, H^-1 q>`; and with the unit norm the cosine of either.

    Args:
        run: what `build` wrote.
        model: that of the store: a `Subject`, or a module with a subject's `options` as keywords. The view is
            the store's unless it is given.
        queries: query examples; their loss, which may be another than the rows', is `query_loss`.
        curvature: fitted behind the store's transform, see `fit` and `load_curvature`.
        damping: of the curvature; for several, scores come for each of them.
        unit_norm: whether scores are cosines; those of a store of unit rows always are.
        normalize: the optimizer's normalisation, if the store has one, since it keeps a digest alone. Rows of
            a training that were each divided by that of their own step take any, such as a checkpoint's; it
            divides the queries.
        progress: called with the queries' tokens done.

    Raises:
        InputError: the store is of another model or view, or of a transform that it does not tell.

    >>> import tempfile
    >>> import gradfn as gf
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> run, data = tempfile.mkdtemp(), [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> done = gf.build(run, net, data, loss=loss)
    >>> query(run, net, data, loss=loss).matrix
    tensor([[1., 0.],
            [0., 4.]])
    """
    asked = _asked(run, model, queries, options)
    store, method = asked.store, asked.method
    values = torch.cat(list(stored_scores(store, method.against(asked.gradients))))
    dampings = damping_names(method)
    by_damping = values.unflatten(1, (len(dampings), -1)).movedim(1, 0)
    about = describe(asked.subject.for_queries(), queries, None)
    settings = {**store.settings, "query": about.to_json()["data"]}
    names = names_of(queries)
    return Scores(by_damping, query_ids=names, dampings=dampings, settings=settings, **_rows(store))


def query_best(
    run: str | Path,
    model: nn.Module | Subject,
    queries: Data,
    k: int,
    *,
    index: Faiss | str | None = None,
    memory: int | None = None,
    **options: Unpack[QueryOptions],
) -> tuple[TopK, TopK]:
    """The `k` highest and the `k` lowest rows of a store for every query, in little memory.

    Args:
        run, model, queries: see `query`.
        k, index, memory: see `find`; a text is the factory string of a `Faiss`.
        options: `curvature`, `damping`, `unit_norm`, `normalize`, `progress` and those of a subject; see
            `query`.

    Returns:
        Proponents and opponents, `[dampings * queries, k]` each.

    Raises:
        InputError: as `query`; an index that cannot hold these rows.

    >>> import tempfile
    >>> import gradfn as gf
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> run, data = tempfile.mkdtemp(), [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> done = gf.build(run, net, data, loss=loss)
    >>> query_best(run, net, data, 1, index="Flat", loss=loss)[0].rows
    tensor([[0],
            [1]])
    """
    index = Faiss(index) if isinstance(index, str) else index
    asked = _asked(run, model, queries, options)
    return find(asked.store, asked.method, asked.gradients, k, index=index, memory=memory)


class _Asked(NamedTuple):
    """Queries of a store: their gradients, and how rows are compared with them."""

    store: Store
    subject: Subject
    method: InnerProduct
    gradients: Any


def _asked(run: str | Path, model: nn.Module | Subject, queries: Data, how: QueryOptions) -> _Asked:
    """Make the gradients of queries as those of the store's rows were made."""
    options: Any = {name: value for name, value in how.items() if name in SubjectOptions.__annotations__}
    compared: Any = {name: value for name, value in how.items() if name in CompareOptions.__annotations__}
    store = open_gradients(run)
    made, base, method = method_of_store(store, compared)
    if not isinstance(model, Subject) and options.get("view") is None:
        options["view"] = View(**(made.layers or {}))
    subject = subject_of(model, **options)
    here = replace(describe(subject, queries, base), data=None, version=None)
    refuse_mismatch(made, here, f"the store {run}")
    progress = how.get("progress")
    gradients = collect(subject.for_queries(), queries, method.query_transform, progress=progress)
    return _Asked(store, subject, method, gradients)


def method_of_store(store: Store, how: CompareOptions) -> tuple[Provenance, Transform, InnerProduct]:
    """How a store was made before any unit norm, its transform, and how its rows are compared.

    Raises:
        InputError: a transform that the store does not tell.
    """
    made = Provenance.of(store)
    base = rebuild(made.without_tail(), how.get("normalize"), LOADERS)
    unit = how.get("unit_norm", False) or bool(made.tail)
    method = searching(base, unit, how.get("curvature"), how.get("damping", (Damping(),)))
    return made.without_tail(), base, method


def searching(
    base: Transform,
    unit_norm: bool,
    curvature: Mapping[str, Spectrum] | None,
    damping: tuple[Damping | None, ...] = (Damping(),),
) -> InnerProduct:
    """The method of stored rows: they are taken as they are, and queries go through `base` first.

    >>> searching(chain(), True, None).query_transform
    Chain(stages=(UnitNormalize(),))
    """
    if curvature is None:
        norm = [unit_normalize()] if unit_norm else []
        return InnerProduct(chain(*norm), chain(base, *norm))
    return InnerProduct(chain(), chain(base), curvature, damping, "cosine" if unit_norm else "none")


def _rows(store: Store) -> dict[str, Any]:
    """The names of a store's rows; of tokens, their documents and positions."""
    if "rows/id" in store.header.arrays:
        losses = torch.from_numpy(store.read("rows/loss"))
        return {"row_ids": store.read("rows/id").tolist(), "losses": losses}
    documents, positions = (store.read(f"rows/{name}") for name in ("document", "position"))
    return {
        "row_ids": store.index_array("documents/id")[documents].tolist(),
        "documents": torch.from_numpy(documents), "positions": torch.from_numpy(positions),
    }  # fmt: skip
