"""Solves with curvature products, `(H + damping I) x = b`, and their largest eigenpairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradfn.errors import InputError
from gradfn.exact.vectors import Product, as_matrix, as_vectors, on_matrix
from gradfn.types import Params

POWER_ITERATIONS = 30
"""Products that a largest eigenvalue takes."""


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solve found, and how far it got with each row.

    Args:
        x: the solution, `{name: [k, *parameter]}`.
        iterations: how many steps each row took.
        residual: `|b - (H + damping I) x| / |b|`, computed from `x`; 0 where b is 0.
        converged: whether the residual is within the tolerance.
    """

    x: Params
    iterations: Int[Tensor, " k"]
    residual: Float[Tensor, " k"]
    converged: Bool[Tensor, " k"]


def cg(
    product: Product,
    b: Params,
    *,
    damping: float,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    preconditioner: Product | None = None,
) -> Solution:
    """Solve `(H + damping I) x = b` by preconditioned conjugate gradients, all rows at once.

    A row that has converged takes no further part in the products. The matrix must be positive definite.

    Args:
        product: `v -> H v`, symmetric.
        b: right-hand sides, `{name: [k, *parameter]}`.
        damping: added to every eigenvalue of H, in units of H.
        tolerance: of the residual, relative to `|b|`.
        max_iterations: how many products at most, not counting the last one, which computes the residual.
        preconditioner: `v -> M^-1 v`, symmetric positive definite, with M near `H + damping I`; it changes
            only the number of iterations.

    Returns:
        The solution, with what it took and whether it converged, row by row.

    Raises:
        InputError: numbers that are not finite, a negative damping, a matrix or preconditioner that is not
            positive definite.

    >>> H = torch.tensor([1.0, 3.0])
    >>> solution = cg(lambda v: {"w": v["w"] * H}, {"w": torch.ones(1, 2)}, damping=1.0)
    >>> solution.x, solution.iterations, solution.converged
    ({'w': tensor([[0.5000, 0.2500]])}, tensor([2]), tensor([True]))

    Source: Hestenes and Stiefel 1952; Golub and Van Loan, Matrix Computations, section 11.5.
    """
    rhs = _checked(b, damping, tolerance)
    apply = _damped(product, b, damping)
    precondition = on_matrix(preconditioner, b, "preconditioner") if preconditioner else lambda r: r
    x, r = torch.zeros_like(rhs), rhs
    # Half of it: rounding makes the residual of the recurrence differ from the true one.
    goal = tolerance / 2 * rhs.norm(dim=1)
    iterations = torch.zeros(len(rhs), dtype=torch.long, device=rhs.device)
    active = rhs.norm(dim=1) > goal
    p = z = precondition(r) if bool(active.any()) else r
    energy = _positive(_dots(r, z), active, "preconditioner")
    for _ in range(max_iterations):
        if not bool(active.any()):
            break
        moved = torch.zeros_like(p)
        moved[active] = apply(p[active])
        curvature = _positive(_dots(p, moved), active, "matrix H + damping I")
        step = torch.where(active, energy / curvature, 0)[:, None]
        x, r, iterations = x + step * p, r - step * moved, iterations + active
        active = active & (r.norm(dim=1) > goal)
        z = precondition(r)
        before, energy = energy, _positive(_dots(r, z), active, "preconditioner")
        p = z + (energy / before)[:, None] * p
    return _solution(apply, x, rhs, b, iterations, tolerance)


def lissa(
    products: Sequence[Product],
    b: Params,
    *,
    damping: float,
    steps: int,
    scale: float | None = None,
    tolerance: float = 1e-6,
    preconditioner: Product | None = None,
) -> Solution:
    """Solve `(H + damping I) x = b` by LiSSA, `x <- x + (b - (H_j + damping I) x) / scale` from `x = 0`.

    `H` is the mean of the `H_j`. With one product this is Richardson's iteration: it converges if the scale
    is above half of the largest eigenvalue of `H + damping I`, and each step multiplies the error by at most
    `1 - (smallest eigenvalue) / scale`. With several products it does not reach the solution exactly, because
    they differ; the residual shows how far away it stays.

    With a preconditioner it is `x <- x + M^-1 (b - (H_j + damping I) x) / scale`, and with that of EK-FAC
    ASTRA. Eigenvalues are then those of `M^-1 (H + damping I)`, which are near 1 where M is near.

    Args:
        products: `v -> H_j v`, of minibatches of one size; the steps cycle through them.
        b: right-hand sides, `{name: [k, *parameter]}`.
        damping: added to every eigenvalue of H, in units of H.
        steps: how many steps to take.
        scale: what a step is divided by, in units of H, or of `M^-1 H`; None is the largest eigenvalue of all
            `H_j + damping I`, or of these times `M^-1`, by power iteration.
        tolerance: the residual, relative to `|b|`, that counts as converged.
        preconditioner: `v -> M^-1 v`, symmetric positive definite; None is the identity.

    Returns:
        The solution; its residual is computed from x with every product once.

    Raises:
        InputError: the iteration diverges, numbers that are not finite, a negative damping.

    >>> products = [lambda v: {"w": v["w"] * 3}]
    >>> solution = lissa(products, {"w": torch.ones(1, 1)}, damping=1.0, steps=50, scale=8.0)
    >>> solution.x, solution.converged
    ({'w': tensor([[0.2500]])}, tensor([True]))

    Source: LiSSA, arXiv:1602.03943, section 3; for influence, arXiv:1703.04730, section 3; ASTRA: Wang et
    al., arXiv:2507.14740.
    """
    rhs = _checked(b, damping, tolerance)
    if not products:
        raise InputError("LiSSA needs at least one product")
    if scale is None:
        scale = max(_largest(product, b, damping, preconditioner) for product in products)
    if not (isfinite(scale) and scale > 0):
        raise InputError(f"the scale must be a number above 0, not {scale}: give a scale, or more damping")
    applies = [_damped(product, b, damping) for product in products]
    precondition = on_matrix(preconditioner, b, "preconditioner") if preconditioner else lambda r: r
    x, start = torch.zeros_like(rhs), _energy(rhs, precondition(rhs))
    for step in range(steps):
        residual = rhs - applies[step % len(applies)](x)
        move = precondition(residual)
        grown = _energy(residual, move) / start.clamp_min(torch.finfo(rhs.dtype).tiny)
        _refuse_divergence(torch.where(start > 0, grown, 0), step, scale)
        x = x + move / scale

    def apply(v: Tensor) -> Tensor:
        return torch.stack([apply(v) for apply in applies]).mean(0)

    iterations = torch.where(rhs.norm(dim=1) > 0, steps, 0)
    return _solution(apply, x, rhs, b, iterations, tolerance)


def _energy(residual: Tensor, move: Tensor) -> Tensor:
    """The norm of a residual in which a step that is small enough never makes it grow."""
    return _dots(residual, move).clamp_min(0).sqrt()


def _largest(product: Product, like: Params, damping: float, preconditioner: Product | None) -> float:
    """The largest eigenvalue of `M^-1 (H + damping I)`; `<M^-1 A v, A v> / <v, A v>` is never above it."""
    if preconditioner is None:
        return abs(largest_eigenvalue(product, like)) + damping
    apply, precondition = _damped(product, like, damping), on_matrix(preconditioner, like, "preconditioner")
    v, value = _random_unit(like, 0), 0.0
    for _ in range(POWER_ITERATIONS):
        moved = apply(v)
        stepped, size = precondition(moved), float(_dots(v, moved))
        if not size > 0:
            break
        value = max(value, float(_dots(moved, stepped)) / size)
        v = stepped / stepped.norm()
    return value


def largest_eigenvalue(
    product: Product, like: Params, *, iterations: int = POWER_ITERATIONS, seed: int = 0
) -> float:
    """The eigenvalue of a product that is largest in magnitude, by power iteration from a random vector.

    Args:
        product: `v -> H v`, symmetric.
        like: any vectors of it, `{name: [k, *parameter]}`, for names, shapes and dtypes.
        iterations: how many products to compute.
        seed: of the random vector.

    Returns:
        `<v, H v>` of the last unit vector v. Up to rounding, its magnitude is at most that of the eigenvalue.

    >>> round(largest_eigenvalue(lambda v: {"w": v["w"] * -2}, {"w": torch.ones(1, 3)}), 4)
    -2.0
    """
    apply = on_matrix(product, like, "product")
    v, value = _random_unit(like, seed), 0.0
    for _ in range(iterations):
        moved = apply(v)
        value = float(_dots(v, moved))
        if not bool(moved.any()):
            break
        v = moved / moved.norm()
    return value


def _checked(b: Params, damping: float, tolerance: float) -> Float[Tensor, "k n"]:
    if not (isfinite(damping) and damping >= 0):
        raise InputError(f"the damping must be a number of 0 or more, not {damping}")
    if not tolerance > 0:
        raise InputError(f"the tolerance must be above 0, not {tolerance}")
    if len({len(value) for value in b.values()}) != 1:
        raise InputError(
            "the right-hand sides must be {name: [k, *parameter]} with one k: a single one has k = 1, b[None]"
        )
    rhs = as_matrix(b)
    if not bool(torch.isfinite(rhs).all()):
        raise InputError("a right-hand side is NaN or infinite: check the query's gradient")
    return rhs


def _damped(product: Product, like: Params, damping: float) -> Callable[[Tensor], Tensor]:
    apply = on_matrix(product, like, "product")
    return lambda v: apply(v) + damping * v


def _positive(values: Tensor, active: Tensor, what: str) -> Tensor:
    """The values, which are positive for active rows, and 1 for the rest."""
    wrong = active & ~(values > 0)
    if bool(wrong.any()):
        remedy = "give more damping" if what.startswith("matrix") else "conjugate gradients need one that is"
        raise InputError(
            f"the {what} is not positive definite (<v, A v> = {float(values[wrong][0]):.3g} for a v of row "
            f"{int(wrong.nonzero()[0, 0])}): {remedy}"
        )
    return torch.where(active, values, 1)


def _refuse_divergence(relative: Tensor, step: int, scale: float) -> None:
    """Refuse a residual that grows, or is no number: with a large enough scale it shrinks."""
    worst = float(relative.max()) if len(relative) else 0.0
    if not worst <= 1e3:
        raise InputError(
            f"the iteration diverges (at step {step} the residual is {worst:.3g} times |b|): give a larger "
            f"scale than {scale:.3g}, or more damping"
        )


def _solution(
    apply: Callable[[Tensor], Tensor], x: Tensor, rhs: Tensor, b: Params, iterations: Tensor, tolerance: float
) -> Solution:
    residual = _relative(rhs - apply(x), rhs) if bool(x.any()) else _relative(rhs, rhs)
    return Solution(as_vectors(x, b), iterations, residual, residual <= tolerance)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _relative(residual: Tensor, b: Tensor) -> Tensor:
    """`|residual| / |b|` of every row, and 0 where b is 0."""
    size = b.norm(dim=1)
    return torch.where(size > 0, residual.norm(dim=1) / size.clamp_min(torch.finfo(b.dtype).tiny), 0)


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenvalues of a product and orthonormal eigenvectors; see `arnoldi`.

    Args:
        values: eigenvalues, largest in magnitude first.
        vectors: `{name: [rank, *parameter]}`.
    """

    values: Float[Tensor, " rank"]
    vectors: Params

    def solve(self, b: Params, *, damping: float = 0.0) -> Params:
        """The inverse on the span of the eigenvectors, `sum_i u_i <u_i, b> / (lambda_i + damping)`.

        The part of b outside the span is dropped.

        Raises:
            InputError: an eigenvalue and the damping sum to zero.
        """
        damped = self.values + damping
        if not bool((damped.abs() > torch.finfo(damped.dtype).eps * self.values.abs().max()).all()):
            raise InputError("an eigenvalue plus the damping is zero: give a lower rank, or more damping")
        U = as_matrix(self.vectors)
        return as_vectors(as_matrix({name: b[name] for name in self.vectors}) @ U.T / damped @ U, b)


def arnoldi(product: Product, like: Params, *, steps: int, rank: int, seed: int = 0) -> Eigenpairs:
    """The eigenpairs of a product that are largest in magnitude, by Arnoldi's iteration from a random vector.

    `steps` products span a Krylov space, of which an orthonormal basis is made. The product restricted to
    that space is a small symmetric matrix, and its largest eigenpairs approximate those of the product.

    Args:
        product: `v -> H v`, symmetric.
        like: any vectors of it, `{name: [k, *parameter]}`, for names, shapes and dtypes.
        steps: how many products to compute, and vectors to hold; fewer if the space is exhausted earlier.
        rank: how many eigenpairs to return; take it well below `steps`, since the last pairs are inexact.
        seed: of the random vector.

    Raises:
        InputError: `rank` is not between 1 and `steps`.

    >>> spectrum = torch.tensor([1.0, -5.0, 3.0])
    >>> pairs = arnoldi(lambda v: {"w": v["w"] * spectrum}, {"w": torch.ones(1, 3)}, steps=3, rank=2)
    >>> pairs.values.round(decimals=4)
    tensor([-5.,  3.])

    Source: Schioppa et al., arXiv:2112.03052, section 3.
    """
    if not 1 <= rank <= steps:
        raise InputError(f"rank must be between 1 and the {steps} steps, not {rank}")
    apply = on_matrix(product, like, "product")
    Q = _random_unit(like, seed)
    moved, largest = [], 0.0
    while True:
        moved.append(apply(Q[-1:]))
        largest = max(largest, float(moved[-1].norm()))
        rest = moved[-1]
        for _ in range(2):  # the second time removes the rounding error of the first
            rest = rest - rest @ Q.T @ Q
        exhausted = float(rest.norm()) <= 10 * torch.finfo(Q.dtype).eps * largest
        if len(Q) == min(steps, Q.shape[1]) or exhausted:
            break
        Q = torch.cat([Q, rest / rest.norm()])
    small = Q @ torch.cat(moved).T
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    order = values.abs().argsort(descending=True)[:rank]
    return Eigenpairs(values[order], as_vectors(vectors.T[order] @ Q, like))


def _random_unit(like: Params, seed: int) -> Float[Tensor, "1 n"]:
    """A random unit vector, the same on every device."""
    empty = as_matrix({name: value[:0] for name, value in like.items()})
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(1, empty.shape[1], generator=generator, dtype=torch.float64)
    return (v / v.norm()).to(empty)
