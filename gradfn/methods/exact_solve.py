"""Queries solved with exact curvature products, by conjugate gradients or LiSSA."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, get_args

from gradfn.errors import InputError
from gradfn.exact import cg, fisher_product, gauss_newton_product, hessian_product, lissa, outputs_and_loss
from gradfn.exact.vectors import Product, params_of_blocks
from gradfn.linalg.spectrum import Damping
from gradfn.model.losses import CausalLMLoss
from gradfn.model.params import params_of
from gradfn.model.sites import blocks_of, find_sites
from gradfn.subject import Subject
from gradfn.types import Blocks, Data, Params

Curvatures = Literal["fisher", "gauss_newton", "hessian"]


@dataclass(frozen=True)
class Solver:
    """How `(H + damping I) x = q` is solved.

    Args:
        product: H of the training rows: the empirical Fisher, the Gauss-Newton matrix or the Hessian.
        iterations: steps at most (cg), or steps (lissa); each is a pass over the rows or a minibatch.
        tolerance: the residual, relative to `|q|`, at which cg stops and above which both warn.
        scale: what a step of lissa is divided by, in units of H; None: the largest eigenvalue.
        minibatches: parts of the rows that the steps of lissa take in turn.

    Raises:
        InputError: numbers with which nothing can be solved.

    >>> Solver(iterations=10).product
    'fisher'
    """

    product: Curvatures = "fisher"
    iterations: int = 100
    tolerance: float = 1e-3
    scale: float | None = None
    minibatches: int = 1

    def __post_init__(self) -> None:
        if self.product not in get_args(Curvatures):
            raise InputError(f"no product {self.product!r}: choose {', '.join(get_args(Curvatures))}")
        for name in ("iterations", "minibatches"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be 1 or more, not {getattr(self, name)}")
        for name in ("tolerance", "scale"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise InputError(f"`{name}` must be a number above 0, not {value}")


@dataclass(frozen=True, eq=False)
class ExactSolve:
    """`x = (H + damping I)^-1 q` of queries, over all weights together; a map for `InnerProduct.solve`.

    A query's loss and the rows' may differ; H is of the rows' loss.

    Args:
        name: "cg" or "lissa".
        subject: the model, its loss and view; heads cannot be told apart.
        train: the rows of H.
        damping: added to every eigenvalue of H.
        solver: see `Solver`.
        tell: called with a sentence where the residual is above the tolerance.

    Raises:
        InputError: when called, what `cg` and `lissa` refuse.
    """

    name: str
    subject: Subject
    train: Data
    damping: float
    solver: Solver
    tell: Callable[[str], None] = warnings.warn

    def __call__(self, queries: Blocks) -> Blocks:
        model, solver = self.subject.model, self.solver
        sites, every = find_sites(model, replace(self.subject.view, tokens=False)), params_of(model)
        params = {name: every[name] for site in sites for name in site.names}
        if fixed := [name for name, value in params.items() if not value.is_floating_point()]:
            raise InputError(
                f"{fixed[0]} is quantised, and {self.name} differentiates with respect to it: choose another "
                "method, or the model that is not quantised"
            )
        b = params_of_blocks(sites, queries)
        if self.name == "cg":
            found = cg(
                self._product(params, self.train), b, damping=self.damping, tolerance=solver.tolerance,
                max_iterations=solver.iterations,
            )  # fmt: skip
        else:
            count = min(solver.minibatches, len(self.train))
            parts = [self.train] if count == 1 else [self._part(n, count) for n in range(count)]
            found = lissa(
                [self._product(params, part) for part in parts], b, damping=self.damping,
                steps=solver.iterations, scale=solver.scale, tolerance=solver.tolerance,
            )  # fmt: skip
        if not bool(found.converged.all()):
            self.tell(
                f"{self.name} stopped after {solver.iterations:,} iterations with a residual of "
                f"{float(found.residual.max()):.2g}, above the tolerance {solver.tolerance:g}: give more "
                "iterations, or more damping"
            )
        return blocks_of(sites, found.x)

    def _part(self, number: int, count: int) -> list[Any]:
        return [self.train[row] for row in range(number, len(self.train), count)]

    def _product(self, params: Params, data: Data) -> Product:
        loss, budget = self.subject.loss, self.subject.token_batch_size
        if self.solver.product == "gauss_newton":
            if not isinstance(loss, CausalLMLoss):
                raise InputError("the Gauss-Newton matrix is of next tokens here: give another `product`")
            return gauss_newton_product(*outputs_and_loss(loss), params, data, token_batch_size=budget)
        made: Callable[..., Product] = hessian_product if self.solver.product == "hessian" else fisher_product
        return made(loss, params, data, token_batch_size=budget)

    def settings(self) -> dict[str, Any]:
        """What the map depends on beside the gradients."""
        solver = self.solver
        return {"solver": self.name, "product": solver.product, "damping": self.damping,
                "iterations": solver.iterations, "tolerance": solver.tolerance, "scale": solver.scale,
                "minibatches": solver.minibatches}  # fmt: skip


def absolute_damping(damping: Damping | None, mean_eigenvalue: Callable[[], float]) -> float:
    """A damping in units of H: a relative one is of the mean eigenvalue of the Fisher.

    >>> absolute_damping(Damping(0.1), lambda: 3.0)
    0.30000000000000004

    Raises:
        InputError: a damping of another kind.
    """
    if damping is not None and damping.kind == "absolute":
        return damping.value
    if damping is None or damping.kind != "relative":
        raise InputError("exact solves take one damping, relative or absolute: give --damping 0.1, say")
    return damping.value * mean_eigenvalue()
