"""Which method a request to score asks for, and what it will not go with."""

from collections.abc import Callable, Sequence
from typing import Any

from gradfn.cli.commands import ScoreRequest
from gradfn.cli.options import COMPONENTS, FitOptions, SolverOptions
from gradfn.cli.stages import dampings_of
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping
from gradfn.methods import RECIPES, Problem, Recipe, influence, recipe_named
from gradfn.methods.exact_solve import PRECONDITIONED, Solver, check_exact_damping
from gradfn.methods.inner_product import Norm
from gradfn.runs.curvatures import open_curvature

SOLVERS = dict.fromkeys(("product", "iterations", "tolerance"), ("cg", "lissa", *PRECONDITIONED))
SOLVERS |= dict.fromkeys(("scale", "minibatches"), ("lissa", "astra"))
"""Options of how queries are solved for, and the methods that do."""


def solver_of(options: SolverOptions) -> Solver:
    """The solver that is asked for, which is refused before anything is loaded where it makes no sense."""
    return Solver(options.product, options.iterations, options.tolerance, options.scale, options.minibatches)


def recipe_of(request: ScoreRequest) -> tuple[str, Recipe]:
    """The method that --method, --unit-normalize and --hessian-path ask for together."""
    name, unit, path = request.method.name, request.gradients.unit_normalize, request.curvature.path
    if name is None and path is not None:
        norm: Norm = "cosine" if unit else "none"
        name, recipe = f"influence{' cosine' if unit else ''}", Recipe(_given(norm), norm=norm)
    else:
        name = name or ("grad_cosine" if unit else "grad_dot")
        name = name if ":" in name else name.replace("-", "_")
        recipe = recipe_named(name)
        if unit and recipe.norm != "cosine":
            raise InputError(f"{name} has no unit norm: leave out --unit-normalize, or --method")
        if path is not None and not recipe.curvature:
            raise InputError(f"{name} has no curvature: leave out --hessian-path, or --method")
        if path is not None and recipe.fits is not None:
            _check_kind(name, recipe.fits, path)
    _check_fit(name, recipe, request)
    _check_sides(name, recipe, request)
    return name, recipe


def _given(norm: Norm) -> Callable[[Problem], Any]:
    def make(problem: Problem) -> Any:
        assert problem.curvature is not None
        return influence(problem.curvature, problem.stage, damping=problem.damping, norm=norm)

    return make


def _check_kind(name: str, fits: str, path: str) -> None:
    """Refuse a curvature of another kind than the method is named after."""
    with open_curvature(path) as store:
        kind = str(store.read("fit/kind")[0])
    if kind != fits:
        raise InputError(
            f"{name} takes a curvature of kind {fits}, and that in {path} is {kind}: leave out --method, or "
            f"fit one with gradfn hessian --method {fits}"
        )


def check_fit(fit: FitOptions, criterion: str, label_smoothing: float) -> None:
    """Refuse a curvature in no pass, and labels that cannot be drawn."""
    if fit.partitions < 1:
        raise InputError(f"--partitions must be 1 or more, not {fit.partitions}")
    if fit.labels == "model" and (criterion != "cross_entropy" or label_smoothing):
        raise InputError("labels are drawn for a plain cross-entropy or squared error only: use the data's")


def _check_fit(name: str, recipe: Recipe, request: ScoreRequest) -> None:
    """Refuse options of a fit where nothing is fitted, and those that the fit will not go with."""
    fit, loss = request.fit, request.loss
    dampings = dampings_of(request.curvature, fitted=recipe.curvature)
    fits = recipe.curvature and request.curvature.path is None
    check_fit(fit, loss.criterion, loss.label_smoothing)
    solver_of(request.solver)
    if name in SOLVERS["product"]:
        _check_exact(name, request, dampings)
    if fit.components < 1:
        raise InputError(f"--target-downweight-components must be 1 or more, not {fit.components}")
    looked_at = ":" in name or (name == "trackstar" and fits)  # a recipe of one's own may look at it
    if fit.components != COMPONENTS and not looked_at:
        raise InputError(
            "--target-downweight-components is of the curvatures that --method trackstar fits here, and none "
            "are: leave it out"
        )
    for option, asked in (("labels", fit.labels != "data"), ("partitions", fit.partitions > 1)):
        if asked and not fits:
            raise InputError(f"--{option} is of a curvature that is fitted here, and none is: leave it out")
    for option, methods in SOLVERS.items():
        if name not in methods and request.gave(option):
            raise InputError(f"--{option} is of --method {', '.join(methods)}, not of {name}: leave it out")
    factored = any(damping.kind == "factored" for damping in dampings)
    if factored and fits and name in RECIPES and not recipe.product:
        products = " or ".join(known for known, other in RECIPES.items() if other.product)
        raise InputError(
            f"factored damping needs a curvature that is a product of two factors, which that of {name} is "
            f"not: choose --method {products}, or another damping"
        )


def _check_exact(name: str, request: ScoreRequest, dampings: Sequence[Damping]) -> None:
    """Refuse what the exact solves of a method do not have."""
    fits = name in PRECONDITIONED
    parts = () if fits else ("partitions",)
    if given := request.gave("projection", "projection_dim", "optimizer_state", *parts):
        raise InputError(f"{name} solves for whole gradients in one go: leave out {given}")
    if request.layers.by == "head":
        raise InputError(f"{name} solves for whole weights, which heads are parts of: use --by example")
    for damping in dampings:
        check_exact_damping(damping, positive=fits)


def _check_sides(name: str, recipe: Recipe, request: ScoreRequest) -> None:
    """Refuse queries that a method cannot have."""
    if request.method.self_influence and not recipe.self_influence:
        raise InputError(f"{name} gives no self-influence: choose grad_dot, or a curvature, for --self")
    if request.query.query_path is None:
        return
    if name == "trak":
        raise InputError("trak projects all layers together, which stored gradients are not: give --query")
    if name == "trackstar" and request.curvature.path is None:
        raise InputError("trackstar fits a curvature over the queries: give --query, or --hessian-path")
