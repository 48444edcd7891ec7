"""A store asked many questions: its rows are read, and only the queries need the model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

from gradfn.engine.stream import Progress, collect
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.methods.inner_product import InnerProduct, damping_names
from gradfn.methods.scoring import names_of
from gradfn.model.sites import View
from gradfn.runs.gradients import open_gradients
from gradfn.runs.masks import LOADERS
from gradfn.runs.provenance import Provenance, describe, rebuild, refuse_mismatch
from gradfn.runs.scores import stored_scores
from gradfn.scores import Scores
from gradfn.store import Store
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.transforms import Transform, chain, unit_normalize
from gradfn.types import Data


def query(
    run: str | Path,
    model: nn.Module | Subject,
    queries: Data,
    *,
    curvature: Mapping[str, Spectrum] | None = None,
    damping: tuple[Damping | None, ...] = (Damping(),),
    unit_norm: bool = False,
    normalize: Transform | None = None,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
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
    with open_gradients(run) as store:
        made, what = Provenance.of(store), f"the store {run}"
        base = rebuild(made.without_tail(), normalize, LOADERS)
        if not isinstance(model, Subject) and options.get("view") is None:
            options["view"] = View(**(made.layers or {}))
        subject = subject_of(model, **options)
        here = replace(describe(subject, queries, base), data=None, version=None)
        refuse_mismatch(made.without_tail(), here, what)
        method = searching(base, unit_norm or bool(made.tail), curvature, damping)
        gradients: Any = collect(subject.for_queries(), queries, method.query_transform, progress=progress)
        values = torch.cat(list(stored_scores(store, method.against(gradients))))
        dampings = damping_names(method)
        by_damping = values.unflatten(1, (len(dampings), -1)).movedim(1, 0)
        asked = describe(subject.for_queries(), queries, None)
        settings = {**store.settings, "query": asked.to_json()["data"]}
        names = names_of(queries)
        return Scores(by_damping, query_ids=names, dampings=dampings, settings=settings, **_rows(store))


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
