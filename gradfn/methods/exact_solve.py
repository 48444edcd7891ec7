"""Queries solved with exact curvature products, by conjugate gradients or LiSSA, alone or with EK-FAC."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any, Literal, get_args

import torch

from gradfn.errors import InputError
from gradfn.exact import (
    Product,
    Solution,
    cg,
    fisher_product,
    gauss_newton_product,
    hessian_product,
    lissa,
    outputs_and_loss,
    params_of_blocks,
)
from gradfn.linalg.spectrum import Damping
from gradfn.model.params import params_of
from gradfn.model.sites import Site, blocks_of, find_sites
from gradfn.random import words
from gradfn.statistics import Curvature
from gradfn.subject import Subject
from gradfn.transforms import precondition
from gradfn.types import Blocks, Data, Params

Curvatures = Literal["fisher", "gauss_newton", "hessian"]

PRECONDITIONED = ("ekfac_cg", "astra")
"""The solves that EK-FAC takes part in."""
ROWS = 256
"""About so many rows has a minibatch of ASTRA, where nothing is said."""
SHOWN = 8
"""Queries of which a report has every number."""


@dataclass(frozen=True)
class Solver:
    """How `(H + damping I) x = q` is solved.

    Args:
        product: H of the training rows: the empirical Fisher, the Gauss-Newton matrix or the Hessian. None:
            the Fisher, but with EK-FAC (ekfac_cg, astra) the Gauss-Newton matrix.
        iterations: steps at most (cg, ekfac_cg), or steps (lissa, astra); each is a pass over the rows or a
            minibatch.
        tolerance: the residual, relative to `|q|`, at which conjugate gradients stop and above which all
            warn.
        scale: what a step of lissa or astra is divided by, in units of H, or of `M^-1 H` with EK-FAC's M;
            None: the largest eigenvalue.
        minibatches: parts of the rows that steps take in turn; None: 1, of astra as many as have about 256
            rows each.

    Raises:
        InputError: numbers with which nothing can be solved.

    >>> Solver(iterations=10).tolerance
    0.001
    """

    product: Curvatures | None = None
    iterations: int = 100
    tolerance: float = 1e-3
    scale: float | None = None
    minibatches: int | None = None

    def __post_init__(self) -> None:
        if self.product is not None and self.product not in get_args(Curvatures):
            raise InputError(f"no product {self.product!r}: choose {', '.join(get_args(Curvatures))}")
        for name in ("iterations", "minibatches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be 1 or more, not {value}")
        for name in ("tolerance", "scale"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise InputError(f"`{name}` must be a number above 0, not {value}")


def _quiet(text: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, eq=False)
class ExactSolve:
    """`x = (H + damping I)^-1 q` of queries, over all weights together; a map for `InnerProduct.solve`.

    A query's loss and the rows' may differ; H is of the rows' loss. All queries of one damping are solved at
    once: a product of H with a block of vectors serves them all.

    Args:
        name: "cg" or "lissa"; "ekfac_cg" or "astra", which are these with the inverse of EK-FAC as the
            preconditioner.
        subject: the model, its loss and view; heads cannot be told apart.
        train: the rows of H.
        damping: added to every eigenvalue of H, and of the preconditioner; solved for one after the other.
        solver: see `Solver`.
        curvature: what preconditions, an EK-FAC of the same blocks; None: nothing does.
        seed: of the minibatches of astra.
        tell: called with a sentence where the residual is above the tolerance.
        report: called with a sentence on what a solve took.

    Raises:
        InputError: when called, what `cg` and `lissa` refuse; a loss that is no function of outputs, for the
            Gauss-Newton matrix.

    Source: ASTRA: Wang et al., arXiv:2507.14740; EK-FAC: Grosse et al., arXiv:2308.03296.
    """

    name: str
    subject: Subject
    train: Data
    damping: tuple[float, ...]
    solver: Solver
    curvature: Curvature | None = None
    seed: int = 0
    tell: Callable[[str], None] = warnings.warn
    report: Callable[[str], None] = _quiet

    def __call__(self, queries: Blocks) -> Blocks:
        found = self.solutions(queries)
        for damping, solution in zip(self.damping, found, strict=True):
            self._say(damping, solution)
        parts = [blocks_of(self._sites, solution.x) for solution in found]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def solutions(self, queries: Blocks) -> list[Solution]:
        """What was found for every damping: `x`, and iterations, residual and convergence of every query.

        Args:
            queries: gradients of queries, `{block: [queries, out, in]}`.
        """
        b = params_of_blocks(self._sites, queries)
        every = params_of(self.subject.model)
        params = {name: every[name] for site in self._sites for name in site.names}
        if fixed := [name for name, value in params.items() if not value.is_floating_point()]:
            raise InputError(
                f"{fixed[0]} is quantised, and {self.name} differentiates with respect to it: choose another "
                "method, or the model that is not quantised"
            )
        count = self.minibatches
        parts = [self.train] if count == 1 else [self._part(n, count) for n in range(count)]
        products = [self._product(params, part) for part in parts]
        return [self._solved(products, b, damping) for damping in self.damping]

    def _solved(self, products: Sequence[Product], b: Params, damping: float) -> Solution:
        solver = self.solver
        common: Any = {"damping": damping, "tolerance": solver.tolerance,
                       "preconditioner": self._preconditioner(damping)}  # fmt: skip
        if self.name in ("cg", "ekfac_cg"):
            return cg(products[0], b, max_iterations=solver.iterations, **common)
        return lissa(products, b, steps=solver.iterations, scale=solver.scale, **common)

    def _preconditioner(self, damping: float) -> Product | None:
        if self.curvature is None:
            return None
        inverse = precondition(self.curvature, -1.0, Damping(damping, "absolute"))

        def apply(v: Params) -> Params:
            made = inverse(blocks_of(self._sites, v))
            assert isinstance(made, dict)
            return params_of_blocks(self._sites, made)

        return apply

    def _say(self, damping: float, found: Solution) -> None:
        solver, queries = self.solver, len(found.residual)
        if not queries:
            return
        at = f"damping {damping:.3g}: " if len(self.damping) > 1 else ""
        self.report(
            f"{at}{queries} {'query' if queries == 1 else 'queries'} in {_span(found.iterations, 'd')} "
            f"iterations, residuals {_span(found.residual, '.2g')}"
        )
        above = int((~found.converged).sum())
        if above:
            self.tell(
                f"{at}{self.name} stopped after {solver.iterations:,} iterations with a residual of "
                f"{float(found.residual.max()):.2g}, and {above} of {queries} above the tolerance "
                f"{solver.tolerance:g}: give more iterations, or more damping"
            )

    @cached_property
    def _sites(self) -> Sequence[Site]:
        return find_sites(self.subject.model, replace(self.subject.view, tokens=False))

    @property
    def product(self) -> Curvatures:
        """What H is."""
        return self.solver.product or ("fisher" if self.curvature is None else "gauss_newton")

    @property
    def minibatches(self) -> int:
        """How many parts the rows are in."""
        if self.name in ("cg", "ekfac_cg"):
            return 1
        asked = self.solver.minibatches
        if asked is None:
            asked = max(1, round(len(self.train) / ROWS)) if self.name == "astra" else 1
        return min(asked, len(self.train))

    def _part(self, number: int, count: int) -> list[Any]:
        """Every so many rows; of astra in an order that is drawn."""
        rows = range(len(self.train))
        if self.name == "astra":
            rows = words(len(rows), self.seed, "astra").argsort(kind="stable").tolist()
        return [self.train[row] for row in rows[number::count]]

    def _product(self, params: Params, data: Data) -> Product:
        loss, budget = self.subject.loss, self.subject.token_batch_size
        if self.product == "gauss_newton":
            return gauss_newton_product(*outputs_and_loss(loss), params, data, token_batch_size=budget)
        made: Callable[..., Product] = hessian_product if self.product == "hessian" else fisher_product
        return made(loss, params, data, token_batch_size=budget)

    def settings(self) -> dict[str, Any]:
        """What the map depends on beside the gradients."""
        solver, damping = self.solver, self.damping
        one = {"solver": self.name, "product": self.product,
               "damping": damping[0] if len(damping) == 1 else list(damping),
               "iterations": solver.iterations, "tolerance": solver.tolerance, "scale": solver.scale,
               "minibatches": self.minibatches}  # fmt: skip
        if self.curvature is not None:
            one["preconditioner"] = self.curvature.digest
        return one | ({"seed": self.seed} if self.name == "astra" else {})


def _span(values: torch.Tensor, spelled: str) -> str:
    """All numbers, or of many the smallest and the largest.

    >>> _span(torch.tensor([3, 5]), "d"), _span(torch.arange(99), "d"), _span(torch.ones(99), ".2g")
    ('3, 5', '0 to 98', '1')
    """
    if len(values) <= SHOWN:
        return ", ".join(f"{value:{spelled}}" for value in values.tolist())
    ends = dict.fromkeys(f"{end.item():{spelled}}" for end in values.aminmax())
    return " to ".join(ends)


def absolute_damping(damping: Damping | None, mean_eigenvalue: Callable[[], float]) -> float:
    """A damping in units of H: a relative one is of the mean eigenvalue of the Fisher.

    >>> absolute_damping(Damping(0.1), lambda: 3.0)
    0.30000000000000004

    Raises:
        InputError: a damping of another kind.
    """
    check_exact_damping(damping)
    assert damping is not None
    return damping.value * (1.0 if damping.kind == "absolute" else mean_eigenvalue())


def check_exact_damping(damping: Damping | None, *, positive: bool = False) -> None:
    """Refuse a damping that is not added to the eigenvalues of H.

    Args:
        positive: refuse 0 too, where EK-FAC, of which eigenvalues are 0, preconditions.
    """
    if damping is None or damping.kind not in ("relative", "absolute"):
        raise InputError("exact solves take dampings that are relative or absolute: give --damping 0.1, say")
    if positive and not damping.value:
        raise InputError("EK-FAC preconditions with its damped inverse: give a --damping above 0")
