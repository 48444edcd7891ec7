"""Methods by name: what each of them fits, and over what.

A recipe is a function of a `Problem` that gives an `Attribution`. One in a file of your own works the same:

    def mine(problem):
        return gf.influence(problem.fit(gf.kfac()), problem.stage, damping=problem.damping)
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import prod
from pathlib import Path
from runpy import run_path
from typing import Any, Literal

import torch

from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import check_results, lengths_of
from gradfn.errors import InputError, StorageError
from gradfn.linalg.spectrum import Damping
from gradfn.methods.attribution import (
    Attribution,
    Combine,
    Joined,
    Queries,
    Scorer,
    best_query,
    times_doubt,
    weighted_sum,
)
from gradfn.methods.datainf import DataInf, MeanSquares
from gradfn.methods.exact_solve import (
    PRECONDITIONED,
    ExactSolve,
    Solver,
    absolute_damping,
    check_exact_damping,
)
from gradfn.methods.grad_cosine import grad_cosine
from gradfn.methods.grad_dot import grad_dot
from gradfn.methods.influence import influence, relatif, trackstar
from gradfn.methods.inner_product import EngineScorer, InnerProduct, Norm
from gradfn.model.sites import find_sites
from gradfn.statistics import (
    Curvature,
    ekfac,
    eshampoo,
    kfac,
    mix,
    mixing_coefficient,
    second_moment,
    shampoo,
    tkfac,
)
from gradfn.statistics.fold import fit, passes
from gradfn.statistics.labels import sample_labels
from gradfn.subject import Subject
from gradfn.transforms import Transform, chain
from gradfn.transforms.joint import Joint, joint
from gradfn.transforms.projection import lenient, parse_projection, reseeded
from gradfn.types import Blocks, Data
from gradfn.watch import WATCH, Progress

Persist = Callable[[Any, Transform, Progress | None], Curvature]


@dataclass(frozen=True, eq=False)
class Problem:
    """What a recipe may look at: one checkpoint of a model, its training rows and its queries.

    Args:
        subject: the checkpoint, with its losses; a curvature is fitted in its view, but never by token.
        train, query: training rows and queries.
        normalize: the optimizer's normalisation, applied to gradients of training rows (and, where the
            method says so, of queries) before the projection.
        projection: the random projection of both sides.
        curvature: one that was fitted before; None: the recipe fits what it needs.
        damping: of the curvature.
        labels: "data", or "model" to draw the labels of curvatures from the model, with `seed`.
        components: TrackStar's number of directions to count less.
        partitions: see `fit`.
        solver: how cg, lissa, ekfac_cg and astra solve.
        tell: called with a sentence that the user should read.
        report: called with a sentence on what was done.
        persist: `persist(fold, transform, progress)` fits a curvature over the training rows and writes it
            to disk, or reads the one there; None: it is fitted and stays in memory.
    """

    subject: Subject
    train: Data
    query: Data
    normalize: Transform = field(default_factory=chain)
    projection: Transform = field(default_factory=chain)
    curvature: Curvature | None = None
    damping: tuple[Damping | None, ...] = (Damping(),)
    labels: Literal["data", "model"] = "data"
    seed: int = 0
    components: int = 1000
    partitions: int = 1
    solver: Solver = field(default_factory=Solver)
    tell: Callable[[str], None] = field(default=warnings.warn, repr=False)
    report: Callable[[str], None] = field(default=lambda text: None, repr=False)
    persist: Persist | None = field(default=None, repr=False)

    @property
    def stage(self) -> Transform:
        """Normalisation and projection, for both sides."""
        return chain(self.normalize, self.projection)

    def fit(self, fold: Any, *, transform: Transform | None = None, queries: bool = False) -> Any:
        """Fit a statistic over the transformed gradients of the training rows, or of the queries.

        Args:
            fold: `kfac()`, say; see `gradfn.fit`.
            transform: None means `stage`.
            queries: fit it over the queries, with their loss.
        """
        decomposes = getattr(fold, "gives_curvature", False)
        is_curvature = decomposes and not queries
        if self.curvature is not None and is_curvature:
            return self.curvature
        subject = self.subject.for_queries() if queries else self.subject
        subject = replace(subject, view=replace(subject.view, tokens=False))
        data = self.query if queries else self.train
        if queries and not len(data):
            raise InputError("this method fits a curvature over the queries: give --query, or --hessian-path")
        if is_curvature and len(self.query):  # before a long fit, not after it
            asked = self.subject.for_queries()
            engine = probe_engine(asked.model, asked.loss, self.stage, view=asked.view)
            check_results(engine, len(self.query), "queries")
        lengths = lengths_of(data)
        watch = partial(
            WATCH.get(), "curvature of the queries" if queries else "curvature",
            int(lengths.sum()) * passes(fold) * self.partitions, "tokens",
            then="decompositions and scores" if decomposes else "scores", longest=int(lengths.max(initial=0)),
        )  # fmt: skip
        transform = self.stage if transform is None else transform
        if self.persist is not None and is_curvature:
            with watch() as progress:
                return self.persist(fold, transform, progress)
        if self.labels == "model":
            size = subject.token_batch_size
            data = sample_labels(subject.loss, data, self.seed, token_batch_size=size)
        with watch() as progress:
            return fit(fold, subject, data, transform, partitions=self.partitions, progress=progress)


@dataclass(frozen=True)
class Recipe:
    """A method by name.

    Args:
        method: what it does for one checkpoint.
        projection: of both sides, unless told otherwise, as it is spelled; "none" is the full gradient.
        criterion: the loss it is defined with; None: any.
        combine: how checkpoints are joined.
        curvature: whether it has one, which damping and a fitted curvature belong to.
        fits: the kind of curvature that it fits, and takes where one is given; None: any, or none.
        norm: what its rows are divided by: "none", "cosine" or "relative".
        solves: whether it solves for given queries.
        whole: whether it is of all parameters.
        file: 16 hex digits of the file that it is from; None: gradfn's own.
    """

    method: Callable[[Problem], Attribution]
    projection: str = "rademacher:16x16"
    criterion: str | None = None
    combine: Combine = weighted_sum
    curvature: bool = True
    fits: str | None = None
    norm: Norm = "none"
    solves: bool = False
    whole: bool = False
    file: str | None = None

    @property
    def product(self) -> bool:
        """Whether its curvature is a product of two factors, which factored damping needs."""
        return self.fits in ("kfac", "tkfac", "shampoo")

    @property
    def self_influence(self) -> bool:
        """Whether a row has an influence on itself to speak of: no norm, and no solution for queries."""
        return self.norm == "none" and not self.solves


def _influence_of(fold: Callable[[], Any]) -> Callable[[Problem], InnerProduct]:
    return lambda problem: influence(problem.fit(fold()), problem.stage, damping=problem.damping)


def _trackstar(problem: Problem) -> InnerProduct:
    H = problem.curvature
    if H is None:
        train, query = problem.fit(second_moment()), problem.fit(second_moment(), queries=True)
        H = mix(query, train, mixing_coefficient(query, train, problem.components))
    return trackstar(H, problem.stage, damping=problem.damping)


def _trak(problem: Problem) -> InnerProduct:
    if any(isinstance(stage, Joint) for stage in chain(problem.projection).stages):
        whole = problem
    else:
        whole = replace(problem, normalize=chain(problem.normalize, problem.projection), projection=joint())
    return influence(whole.fit(second_moment()), whole.stage, damping=problem.damping)


def _less(problem: Problem) -> InnerProduct:
    return InnerProduct(problem.stage, problem.projection, norm="cosine")


@dataclass(frozen=True, eq=False)
class _Solve:
    """DataInf's map of the queries, fitted when it gets them."""

    problem: Problem
    damping: float

    def __call__(self, queries: Blocks) -> Blocks:
        return self.problem.fit(DataInf(queries, self.damping))

    def settings(self) -> dict[str, Any]:
        """What the map depends on beside the gradients."""
        labels, seed = self.problem.labels, self.problem.seed
        return {"damping": self.damping, "labels": labels, "seed": seed if labels == "model" else None}


def _datainf(problem: Problem) -> InnerProduct:
    (damping,) = problem.damping if len(problem.damping) == 1 else (None,)
    if damping is None or damping.kind != "relative" or not damping.value:
        raise InputError("datainf takes one relative damping above 0: give --damping 0.1, say")
    return InnerProduct(problem.stage, problem.stage, solve=_Solve(problem, damping.value))


def _exact(name: str, problem: Problem) -> InnerProduct:
    """What exact solves solve for: all weights as they are, of the rows with their labels."""
    fits = name in PRECONDITIONED
    if chain(problem.stage).stages or (problem.partitions > 1 and not fits):
        raise InputError(
            f"{name} solves for whole gradients in one go: leave out the projection, the optimizer's state "
            "and `partitions`"
        )
    if problem.subject.view.heads:
        raise InputError(f"{name} solves for whole weights, which heads are parts of: use --by example")
    for damping in problem.damping:
        check_exact_damping(damping, positive=fits)
    curvature: Curvature | None = problem.fit(ekfac()) if fits else None

    @cache
    def mean_eigenvalue() -> float:
        if curvature is not None:  # EK-FAC has the trace of the Fisher
            values = [one.values for one in curvature.values()]
            return sum(float(v.sum()) for v in values) / sum(v.numel() for v in values)
        means = problem.fit(MeanSquares())
        view = replace(problem.subject.view, tokens=False)
        sizes = {site.block: prod(site.spec.shape) for site in find_sites(problem.subject.model, view)}
        return sum(means[block] * size for block, size in sizes.items()) / sum(sizes.values())

    data, size = problem.train, problem.subject.token_batch_size
    if problem.labels == "model":
        data = sample_labels(problem.subject.loss, data, problem.seed, token_batch_size=size)
    values = tuple(absolute_damping(damping, mean_eigenvalue) for damping in problem.damping)
    solve = ExactSolve(
        name, problem.subject, data, values, problem.solver, curvature, problem.seed, problem.tell,
        problem.report,
    )  # fmt: skip
    return InnerProduct(problem.stage, problem.stage, damping=problem.damping, solve=solve)


def _of_training(what: str) -> Recipe:
    """A method that looks at a training, which a problem does not have."""

    def refuse(problem: Problem) -> InnerProduct:
        raise InputError(what)

    return Recipe(refuse, projection="none", curvature=False, solves=True, whole=True)


RECIPES: Mapping[str, Recipe] = {
    "grad_dot": Recipe(lambda problem: grad_dot(problem.stage), curvature=False),
    "grad_cosine": Recipe(lambda problem: grad_cosine(problem.stage), curvature=False, norm="cosine"),
    "tracin": Recipe(lambda problem: grad_dot(problem.stage), projection="none", curvature=False),
    "less": Recipe(_less, combine=best_query, curvature=False, norm="cosine"),
    "trackstar": Recipe(_trackstar, fits="second_moment", norm="cosine"),
    "logra": Recipe(_influence_of(second_moment), projection="logra:16x16", fits="second_moment"),
    "grass": Recipe(_influence_of(second_moment), projection="grass:256", fits="second_moment"),
    "factgrass": Recipe(_influence_of(second_moment), projection="factgrass:256", fits="second_moment"),
    "kfac": Recipe(_influence_of(kfac), projection="none", fits="kfac"),
    "ekfac": Recipe(_influence_of(ekfac), projection="none", fits="ekfac"),
    "shampoo": Recipe(_influence_of(shampoo), projection="none", fits="shampoo"),
    "eshampoo": Recipe(_influence_of(eshampoo), projection="none", fits="eshampoo"),
    "tkfac": Recipe(_influence_of(tkfac), projection="none", fits="tkfac"),
    "relatif": Recipe(
        lambda problem: relatif(problem.fit(ekfac()), problem.stage, damping=problem.damping),
        projection="none",
        fits="ekfac",
        norm="relative",
    ),
    "trak": Recipe(_trak, criterion="log_odds", combine=times_doubt),
    "datainf": Recipe(_datainf, solves=True),
    "cg": Recipe(partial(_exact, "cg"), projection="none", solves=True),
    "lissa": Recipe(partial(_exact, "lissa"), projection="none", solves=True),
    "ekfac_cg": Recipe(partial(_exact, "ekfac_cg"), projection="none", fits="ekfac", solves=True),
    "astra": Recipe(partial(_exact, "astra"), projection="none", fits="ekfac", solves=True),
    "source": replace(
        _of_training(
            "source goes through the checkpoints of a training, which its name does not tell: make it with "
            "gf.methods.source(checkpoints, train)"
        ),
        curvature=True,
        whole=False,
    ),
    "inrun": _of_training(
        "inrun is what a training measured: read it with gradfn score RUN --method inrun, of gradfn train"
    ),
    "magic": _of_training(
        "magic goes back through a training: give `gf.train.Magic(course, start)` as the `method`, or "
        "gradfn score --training RUN"
    ),
}


def recipe_named(name: str) -> Recipe:
    """A recipe by its name, or `FILE.py:NAME` for one of your own (a `Recipe`, or a function of a `Problem`).

    The file is run, so it is as trusted as any program.

    Raises:
        InputError: no such recipe or file; the file cannot be run.

    >>> recipe_named("ekfac").projection
    'none'
    """
    if name in RECIPES:
        return RECIPES[name]
    path, colon, attribute = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(f"no method {name!r}: choose {', '.join(RECIPES)}, or FILE.py:NAME for your own")
    if not Path(path).is_file():
        raise InputError(f"no file {path}: --method FILE.py:NAME takes NAME from it")
    found = _told_as(path, run_path, path).get(attribute)
    if not callable(found) and not isinstance(found, Recipe):
        raise InputError(
            f"{path} has no recipe {attribute}: define a function {attribute}(problem) that returns an "
            "attribution"
        )
    recipe = found if isinstance(found, Recipe) else Recipe(found)  # pyright: ignore[reportArgumentType]
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return replace(recipe, method=_checked(name, recipe.method), file=digest)


def method_of(method: Attribution | str, subject: Subject, train: Data, query: Queries) -> Attribution:
    """The attribution itself, or the one that a name stands for, which is fitted to the training rows.

    Args:
        method: "ekfac", say, with the options that `gradfn score --method ekfac` has by default.
        subject, train, query: see `gradfn.score`.

    Raises:
        InputError: no such method, a loss that it is not defined with, gradients instead of queries.

    >>> subject = Subject(torch.nn.Linear(1, 1), lambda params, example: params["weight"].sum())
    >>> method_of("grad_dot", subject, [], []).row_transform.stages[0].kind
    'rademacher'
    """
    if not isinstance(method, str):
        if isinstance(method, Attribution):
            return method
        raise InputError(f"{method!r} is no method: give gf.grad_dot(), say, or the name of one, 'ekfac'")
    if isinstance(query, dict):
        raise InputError(f"{method} by its name takes queries and not their gradients: give the examples")
    joined = over_checkpoints(method, [subject], train, query or [])
    return joined.parts[0][1] if joined.combine is weighted_sum else joined


def over_checkpoints(
    method: str,
    checkpoints: Sequence[Subject],
    train: Data,
    query: Data,
    *,
    projection: Transform | None = None,
    weights: Sequence[float] | None = None,
) -> Joined:
    """A method by its name, fitted at several checkpoints of a model and joined as the method joins them.

    Each checkpoint has a projection of its own, see `gradfn.transforms.reseeded`.

    Args:
        method: "trak", say.
        checkpoints: a subject each.
        train, query: rows and queries, as they are scored.
        projection: of the first checkpoint; None: that of the method.
        weights: of the checkpoints; None: `1 / number of checkpoints`.

    Raises:
        InputError: no such method, no checkpoint, a loss that the method is not defined with, for trak a sum
            over tokens too.

    >>> net = torch.nn.Linear(1, 1)
    >>> both = [Subject(net, lambda params, example: params["weight"].sum())] * 2
    >>> joined = over_checkpoints("grad_dot", both, [], [])
    >>> [made.row_transform.stages[0].seed == 0 for _, made in joined.parts]
    [True, False]
    """
    recipe, parts = recipe_named(method), list[tuple[Subject | None, Attribution]]()
    projection = lenient(parse_projection(recipe.projection)) if projection is None else projection
    for number, subject in enumerate(checkpoints):
        criterion = getattr(subject.loss, "criterion", recipe.criterion)
        if recipe.criterion is not None and criterion != recipe.criterion:
            raise InputError(
                f"{method} takes the loss {recipe.criterion} and not {criterion}: give "
                f'loss=gf.causal_lm_loss(model, criterion="{recipe.criterion}")'
            )
        if recipe.combine is times_doubt and getattr(subject.loss, "reduction", "mean") == "sum":
            raise InputError(
                f"{method} weighs a row by 1 - p, of which a sum over many tokens leaves nothing: take a "
                "loss with the mean over tokens"
            )
        made = recipe.method(Problem(subject, train, query, projection=reseeded(projection, number)))
        parts.append((subject, made))
    return Joined(parts, weights, recipe.combine)


def _checked(name: str, method: Callable[[Problem], Any]) -> Callable[[Problem], Attribution]:
    """A recipe of somebody's own, whose faults are told as its file's."""

    def checked(problem: Problem) -> Attribution:
        made = _told_as(name, method, problem)
        if not isinstance(made, Attribution):
            raise InputError(
                f"{name} gives {type(made).__name__}, not an attribution: return "
                "gf.methods.InnerProduct(...), say"
            )
        return made if isinstance(made, InnerProduct | Joined) else _Own(name, made)

    return checked


@dataclass(frozen=True, eq=False)
class _Own:
    """An attribution of somebody's own, whose faults are told as its file's."""

    name: str
    made: Attribution

    @property
    def damping(self) -> tuple[Damping | None, ...]:
        return self.made.damping

    def scorer(self, subject: Subject, query: Queries, *, by_block: bool = False) -> Scorer:
        scorer = _told_as(self.name, partial(self.made.scorer, by_block=by_block), subject, query)
        return scorer if isinstance(scorer, EngineScorer) else partial(_told_as, self.name, scorer)

    def settings(self) -> dict[str, Any]:
        return self.made.settings()


def _told_as(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call what is in somebody's own file; what goes wrong there is no fault of gradfn's."""
    try:
        return function(*arguments, **options)
    except (InputError, StorageError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{name} failed ({said}): mend it, --debug shows where") from error


def group_means(queries: Blocks, groups: Sequence[str]) -> tuple[Blocks, list[str]]:
    """The mean of the queries of every group, in the order in which groups come.

    >>> group_means({"a": torch.tensor([[1.0], [3.0], [5.0]])}, ["x", "x", "y"])
    ({'a': tensor([[2.],
            [5.]])}, ['x', 'y'])
    """
    names = list(dict.fromkeys(groups))
    members = torch.tensor([[group == name for group in groups] for name in names], dtype=torch.float64)
    means = members / members.sum(1, keepdim=True)
    blocks = {
        name: (means.to(G) @ G.flatten(1)).view(len(names), *G.shape[1:]) for name, G in queries.items()
    }
    return blocks, names
