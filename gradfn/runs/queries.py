"""Query gradients that are stored: what they must agree with, and the method that takes them as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradfn.errors import InputError
from gradfn.methods.inner_product import InnerProduct
from gradfn.runs.gradients import ends_in_unit_norm, open_gradients, read_gradients
from gradfn.runs.provenance import Provenance, refuse_mismatch
from gradfn.store import Store
from gradfn.transforms import chain, precondition, unit_normalize
from gradfn.transforms.precondition import digest_of
from gradfn.types import Blocks

Settings = Mapping[str, Any]


def check_stored(path: str, wanted: Settings, name: str) -> None:
    """Refuse, before a method fits a curvature, stored queries that do not go with it.

    Args:
        path: of the stored queries.
        wanted: what they must agree with: model, layers, and the transform before any curvature.
        name: of the method.
    """
    with open_gradients(path) as store:
        made, what = Provenance.of(store), f"the query gradients in {path}"
    refuse_mismatch(made.without_tail(), Provenance.of(wanted).by_row(), what)
    if made.tail:
        raise InputError(
            f"{what} have unit norm or are behind a curvature, and {name} fits one of its own: make them "
            "again without `unit_normalize` and `hessian_path`"
        )


def stored_queries(path: str, method: InnerProduct, wanted: Settings) -> tuple[Blocks, InnerProduct, Store]:
    """Query gradients from a store, and the method for what has been done to them already.

    Args:
        path: of the stored queries.
        wanted: see `check_stored`.
    """
    with open_gradients(path) as store:
        made, what = Provenance.of(store), f"the query gradients in {path}"
        asked = Provenance.of({**wanted, "transform": method.query_transform.settings()})
        refuse_mismatch(made.without_tail(), asked.by_row().without_tail(), what)
        rest = _continued(method, made.tail, what)
        gradients = read_gradients(store)
    if not made.tail and rest.curvature is None and ends_in_unit_norm(rest.query_transform):
        gradients = unit_normalize()(gradients)
    return gradients, rest, store


def _continued(method: InnerProduct, tail: Sequence[Settings], what: str) -> InnerProduct:
    """The method from where stored query gradients are: behind nothing, a unit norm, a curvature, or both."""
    H, unit = method.curvature, bool(tail) and tail[-1]["transform"] == "UnitNormalize"
    powers = [stage for stage in tail if stage["transform"] == "Precondition"]
    if not powers:
        if unit and H is not None:
            raise InputError(
                f"{what} have unit norm, which comes after a curvature: make them again without it"
            )
        if unit and not ends_in_unit_norm(method.query_transform) and method.norm != "cosine":
            raise InputError(
                f"{what} were made with unit norm, which cannot be undone: give `unit_normalize` (cosine), "
                "or make them again without"
            )
        return method
    (power,) = powers
    if H is None:
        raise InputError(
            f"{what} were multiplied by H^{power['power']:g}: give that curvature as `hessian_path`"
        )
    if power["curvature"] != digest_of(H):
        raise InputError(f"{what} were multiplied by another curvature: give theirs as `hessian_path`")
    needed = -0.5 if method.norm == "cosine" else -1.0
    needs = "a cosine needs H^-0.5 on both sides" if needed == -0.5 else "an inner product H^-1 on one side"
    if power["power"] != needed or unit != (needed == -0.5):
        raise InputError(
            f"{what} were multiplied by H^{power['power']:g}, and {needs}: make them again without "
            "`hessian_path`"
        )
    dampings = [None if damping is None else str(damping) for damping in method.damping]
    if dampings != [power["damping"]]:
        raise InputError(f"{what} were damped by {power['damping']}: give `damping` {power['damping']}")
    if needed == -1.0:
        return replace(method, curvature=None, norm="none", damping=(None,))
    half = precondition(H, -0.5, method.damping[0])
    return InnerProduct(chain(method.row_transform, half), method.query_transform, norm="cosine")
