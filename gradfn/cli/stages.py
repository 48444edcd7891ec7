"""What the options say is done to gradients: optimizer normalisation, projection, curvature, norm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradfn.cli import options as o
from gradfn.cli.inputs import Options, Subject, anchored
from gradfn.errors import InputError
from gradfn.hf.optimizer_state import load_optimizer_state
from gradfn.linalg.spectrum import Damping, parse_dampings
from gradfn.methods import RECIPES, Problem, Recipe, influence, recipe_named
from gradfn.methods.inner_product import Norm
from gradfn.runs.curvatures import load_curvature, open_curvature
from gradfn.runs.masks import refuse_foreign
from gradfn.runs.provenance import Provenance, refuse_mismatch
from gradfn.statistics import Curvature
from gradfn.transforms import Chain, Transform, chain, precondition, unit_normalize

COMPONENTS: int = o.METHOD["target_downweight_components"][1]
"""Directions that TrackStar counts less where no option says how many."""


@dataclass(frozen=True, eq=False)
class Stages:
    """What is done to every gradient before scores, and what a run records of where it came from.

    Args:
        normalize: the optimizer's normalisation, or nothing.
        projection: the random projection, or nothing.
        curvature: the one of --hessian-path.
        dampings: of a curvature.
        settings: the paths of what was read.
    """

    normalize: Transform
    projection: Transform
    curvature: Curvature | None
    dampings: tuple[Damping, ...]
    settings: dict[str, Any]

    @property
    def base(self) -> Chain:
        """Normalisation and projection."""
        return chain(self.normalize, self.projection)

    def query_side(self, unit: bool) -> Chain:
        """What `build` and `reduce` write: behind a curvature `H^-1 g`, or `H^-1/2 g` and the unit norm."""
        norm = [unit_normalize()] if unit else []
        if self.curvature is None:
            return chain(self.base, *norm)
        (damping,) = self.dampings
        power = precondition(self.curvature, -0.5 if unit else -1.0, damping)
        return chain(self.base, power, *norm)


def dampings_of(options: Options, *, fitted: bool = False) -> tuple[Damping, ...]:
    """What --damping says, read before anything is loaded.

    Args:
        fitted: whether the method fits a curvature where --hessian-path gives none.

    Raises:
        InputError: no damping, or one without a curvature.
    """
    path, damping = options["hessian_path"], options["damping"]
    if path is not None:
        with open_curvature(path):
            pass
    elif damping is not None and not fitted:
        raise InputError("--damping belongs to a curvature: give --hessian-path, or a --method that fits one")
    return (Damping(),) if damping is None else parse_dampings(damping)


def load_stages(subject: Subject, options: Options, *, fitted: bool = False) -> Stages:
    """Read the optimizer state and the curvature that the options name.

    Args:
        fitted: see `dampings_of`.

    Raises:
        InputError: a curvature of another model, layers or transform; a damping without a curvature.
    """
    dampings, path = dampings_of(options, fitted=fitted), options["hessian_path"]
    state = options["optimizer_state"]
    normalize = chain() if state is None else normalizer(state, subject)
    settings: dict[str, Any] = {} if state is None else {"optimizer_state": {"path": anchored(state)}}
    projection = options["projection"]
    refuse_foreign(projection, normalize, subject.settings())
    wanted = {**subject.settings(), "transform": chain(normalize, projection).settings()}
    H = None if path is None else curvature_for(path, wanted, dampings)
    if path is not None:
        settings["hessian"] = {"path": anchored(path)}
    return Stages(normalize, projection, H, dampings, settings)


def normalizer(path: str, subject: Subject) -> Transform:
    """The scaling of gradients that the optimizer had reached."""
    return load_optimizer_state(path, subject.model, replace(subject.view, tokens=False))


def curvature_for(path: str, wanted: Mapping[str, Any], dampings: Sequence[Damping]) -> Curvature:
    """The curvature in a run directory, for gradients made as `wanted` says, that can be damped so."""
    with open_curvature(path) as store:
        refuse_mismatch(store, Provenance.of(wanted).by_row(), f"the curvature in {path}")
    H = load_curvature(path)
    for damping in dampings:
        next(iter(H.values())).power(-1.0, damping)
    return H


def recipe_of(options: Options) -> tuple[str, Recipe]:
    """The method that --method, --unit-normalize and --hessian-path ask for together."""
    name, unit = options["method"], options["unit_normalize"]
    given = options["hessian_path"] is not None
    if name is None and given:
        norm: Norm = "cosine" if unit else "none"
        name, recipe = f"influence{' cosine' if unit else ''}", Recipe(_given(norm), norm=norm)
    else:
        name = name or ("grad_cosine" if unit else "grad_dot")
        name = name if ":" in name else name.replace("-", "_")
        recipe = recipe_named(name)
        if unit and recipe.norm != "cosine":
            raise InputError(f"{name} has no unit norm: leave out --unit-normalize, or --method")
        if given and not recipe.curvature:
            raise InputError(f"{name} has no curvature: leave out --hessian-path, or --method")
        if given and recipe.fits is not None:
            _check_kind(name, recipe.fits, options["hessian_path"])
    _check_fit(name, recipe, options)
    _check_sides(name, recipe, options)
    return name, recipe


def _check_kind(name: str, fits: str, path: str) -> None:
    """Refuse a curvature of another kind than the method is named after."""
    with open_curvature(path) as store:
        kind = str(store.read("fit/kind")[0])
    if kind != fits:
        raise InputError(
            f"{name} takes a curvature of kind {fits}, and that in {path} is {kind}: leave out --method, or "
            f"fit one with gradfn hessian --method {fits}"
        )


def check_fit(options: Options) -> None:
    """Refuse a curvature in no pass, and labels that cannot be drawn."""
    if options["partitions"] < 1:
        raise InputError(f"--partitions must be 1 or more, not {options['partitions']}")
    plain = str(options["loss"]) == "cross_entropy" and not options["label_smoothing"]
    if str(options["labels"]) == "model" and not plain:
        raise InputError("labels are drawn for a plain cross-entropy or squared error only: use the data's")


def _check_fit(name: str, recipe: Recipe, options: Options) -> None:
    """Refuse options of a fit where nothing is fitted, and those that the fit will not go with."""
    given = options["hessian_path"] is not None
    dampings, fits = dampings_of(options, fitted=recipe.curvature), recipe.curvature and not given
    check_fit(options)
    _check_components(name, options, fits)
    for option, told in (
        ("labels", str(options["labels"]) != "data"),
        ("partitions", options["partitions"] > 1),
    ):
        if told and not fits:
            raise InputError(f"--{option} is of a curvature that is fitted here, and none is: leave it out")
    factored = any(damping.kind == "factored" for damping in dampings)
    if factored and fits and name in RECIPES and not recipe.product:
        products = " or ".join(known for known, other in RECIPES.items() if other.product)
        raise InputError(
            f"factored damping needs a curvature that is a product of two factors, which that of {name} is "
            f"not: choose --method {products}, or another damping"
        )


def _check_components(name: str, options: Options, fits: bool) -> None:
    """Refuse a number of directions that nothing counts less; a recipe of one's own may look at it."""
    components, own = options["target_downweight_components"], ":" in name
    if components < 1:
        raise InputError(f"--target-downweight-components must be 1 or more, not {components}")
    if components != COMPONENTS and not own and not (name == "trackstar" and fits):
        raise InputError(
            "--target-downweight-components is of the curvatures that --method trackstar fits here, and none "
            "are: leave it out"
        )


def _check_sides(name: str, recipe: Recipe, options: Options) -> None:
    """Refuse queries that a method cannot have."""
    if options["self_influence"] and not recipe.self_influence:
        raise InputError(f"{name} gives no self-influence: choose grad_dot, or a curvature, for --self")
    if options["query_path"] is None:
        return
    if name == "trak":
        raise InputError("trak projects all layers together, which stored gradients are not: give --query")
    if name == "trackstar" and options["hessian_path"] is None:
        raise InputError("trackstar fits a curvature over the queries: give --query, or --hessian-path")


def _given(norm: Norm) -> Callable[[Problem], Any]:
    def make(problem: Problem) -> Any:
        assert problem.curvature is not None
        return influence(problem.curvature, problem.stage, damping=problem.damping, norm=norm)

    return make
