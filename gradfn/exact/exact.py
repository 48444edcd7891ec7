"""Exact curvature products and solves: what approximations of a curvature are measured against.

A vector is a dict of parameters with a leading axis, `{name: [k, *parameter]}`: row-aligned like blocks, and
`k = 1` for a single one. A product is a symmetric linear map of vectors, row by row, and a plain function;
nothing here ever holds a curvature, and no product the gradient of one example.

    products     fisher_product, gauss_newton_product, hessian_product: forward and reverse mode over the data
    solves       cg, lissa: (H + damping I) x = b
    low rank     arnoldi: the largest eigenpairs of H
    blocks       params_of_blocks: the inverse of blocks_of
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradfn.data import IGNORED, collate, plan_batches
from gradfn.engine.stream import labelled, lengths_of
from gradfn.errors import InputError
from gradfn.model.losses import CausalLMLoss, shifted_labels, token_losses
from gradfn.model.params import call
from gradfn.model.sites import Site
from gradfn.subject import TOKEN_BATCH_SIZE
from gradfn.types import Batch, Blocks, Data, Example, LossFn, Params

__all__ = [
    "Eigenpairs", "Product", "Solution", "arnoldi", "cg", "fisher_product", "gauss_newton_product",
    "hessian_product", "largest_eigenvalue", "lissa", "outputs_and_loss", "params_of_blocks",
]  # fmt: skip

Product = Callable[[Params], Params]
"""A symmetric linear map of vectors, `{name: [k, *parameter]}` to the same, row by row."""

Outputs = Callable[[Params, Example], Tensor]
"""What a model makes of one example: `outputs(params, example) -> tensor`."""

OutputLoss = Callable[[Tensor, Example], Tensor]
"""The loss as a function of the outputs: `output_loss(outputs, example) -> scalar`."""


# --- products


def fisher_product(
    loss: LossFn, params: Params, data: Data, *, token_batch_size: int = TOKEN_BATCH_SIZE
) -> Product:
    """The product with the empirical Fisher, `F v = 1/N sum_b g_b <g_b, v>`, `g_b` the gradient of example b.

    Forward mode gives `<g_b, v>` of all examples of a batch, reverse mode the sum that they weigh, so no
    example's gradient is ever made.

    Args:
        loss: `loss(params, example) -> scalar`, pure.
        params: what to differentiate with respect to; a part of the model's parameters will do.
        data: the N examples; sequences may differ in length.
        token_batch_size: tokens a batch, padding included, times the rows of `v`; it changes no result.

    Returns:
        `v -> F v`, vectors `{name: [k, *parameter]}`; each call is a pass over the data.

    Raises:
        InputError: no data; when called, a vector of other names or shapes, a loss that is not one number, an
            operation without forward mode. Attention runs by its formula, which has one.

    >>> def loss(p, e):
    ...     return (p["w"] * e["x"]).sum()
    >>> data = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> fisher_product(loss, {"w": torch.zeros(2)}, data)({"w": torch.ones(1, 2)})
    {'w': tensor([[0.5000, 2.0000]])}
    """

    def of_batch(batch: Batch, v: Params) -> Params:
        losses = _losses(loss, batch)
        dots = jvp(losses, (params,), (v,))[1]
        return vjp(losses, params)[1](dots)[0]

    return _streamed(of_batch, params, data, token_batch_size)


def gauss_newton_product(
    outputs: Outputs,
    output_loss: OutputLoss,
    params: Params,
    data: Data,
    *,
    token_batch_size: int = TOKEN_BATCH_SIZE,
) -> Product:
    """The product with the generalised Gauss-Newton matrix, `1/N sum_b J_bᵀ H_b J_b v`.

    `J_b` is the Jacobian of the outputs with respect to the parameters, `H_b` the Hessian of the loss with
    respect to the outputs. Where the loss is convex in them the matrix is positive semidefinite; for a
    softmax or Gaussian likelihood it is the Fisher of labels sampled from the model.

    Args:
        outputs: `outputs(params, example) -> tensor`.
        output_loss: `output_loss(outputs, example) -> scalar`, convex in the outputs.
        params, data, token_batch_size: see `fisher_product`.

    Returns:
        `v -> G v`, vectors `{name: [k, *parameter]}`; each call is a pass over the data.

    Raises:
        InputError: see `fisher_product`.

    >>> def outputs(p, e):
    ...     return p["w"] * e["x"]
    >>> def output_loss(z, e):
    ...     return (z**2).sum() / 2
    >>> data = [{"x": torch.tensor([1.0, 3.0])}]
    >>> gauss_newton_product(outputs, output_loss, {"w": torch.zeros(2)}, data)({"w": torch.ones(1, 2)})
    {'w': tensor([[1., 9.]])}

    Source: Schraudolph 2002, Fast curvature matrix-vector products; Martens, arXiv:1412.1193, section 8.
    """

    def of_batch(batch: Batch, v: Params) -> Params:
        def made(p: Params) -> Tensor:
            return _each(outputs, p, batch)

        def slope(z: Tensor) -> Tensor:
            return grad(lambda z: _each(output_loss, z, batch, 0).sum())(z)

        z, moved = jvp(made, (params,), (v,))[:2]
        bent = jvp(slope, (z,), (moved,))[1]
        return vjp(made, params)[1](bent)[0]

    return _streamed(of_batch, params, data, token_batch_size)


def hessian_product(
    loss: LossFn, params: Params, data: Data, *, token_batch_size: int = TOKEN_BATCH_SIZE
) -> Product:
    """The product with the Hessian of the mean loss, `1/N sum_b d²loss_b v`, forward over reverse mode.

    It is indefinite away from a minimum; a solve needs a damping above its most negative eigenvalue.

    Args:
        loss, params, data, token_batch_size: see `fisher_product`.

    Returns:
        `v -> H v`, vectors `{name: [k, *parameter]}`; each call is a pass over the data.

    Raises:
        InputError: see `fisher_product`.

    >>> def loss(p, e):
    ...     return e["x"] * p["w"].prod()
    >>> product = hessian_product(loss, {"w": torch.ones(2)}, [{"x": torch.tensor(3.0)}])
    >>> product({"w": torch.tensor([[1.0, 0.0]])})
    {'w': tensor([[0., 3.]])}

    Source: Pearlmutter 1994, Fast exact multiplication by the Hessian.
    """

    def of_batch(batch: Batch, v: Params) -> Params:
        losses = _losses(loss, batch)
        return jvp(grad(lambda p: losses(p).sum()), (params,), (v,))[1]

    return _streamed(of_batch, params, data, token_batch_size)


def outputs_and_loss(loss: CausalLMLoss) -> tuple[Outputs, OutputLoss]:
    """Split a loss of next tokens for `gauss_newton_product`: logits, and the loss as a function of them.

    The outputs are the logits `[tokens, vocabulary]` of all positions; those that are not supervised have no
    part in the loss, so their share of the product is zero.

    Args:
        loss: `causal_lm_loss(model)`, of cross-entropy or log-odds; both are convex in the logits.

    Returns:
        `(outputs, output_loss)`, with `output_loss(outputs(params, e), e) = loss(params, e)`.

    Raises:
        InputError: the "kl" loss, which needs the logits of another model too.
    """
    if loss.criterion == "kl":
        raise InputError("the kl loss depends on two models' logits: take cross_entropy or log_odds")

    def outputs(params: Params, example: Example) -> Tensor:
        ids = example["input_ids"][None]
        return call(loss.model, params, input_ids=ids, use_cache=False).logits[0]

    def output_loss(logits: Tensor, example: Example) -> Tensor:
        targets = shifted_labels(example.get("labels", example["input_ids"]))
        total = token_losses(logits, targets, loss.criterion, loss.label_smoothing).sum()
        if loss.reduction == "mean":
            total = total / (targets != IGNORED).sum().clamp_min(1)
        return total * example["weight"].to(total.dtype) if "weight" in example else total

    return outputs, output_loss


def _each(function: Callable, first: Params | Tensor, batch: Batch, dim: int | None = None) -> Tensor:
    """`function(first, example)` of every example; of one alone without vmap, which not all code passes."""
    if len(next(iter(batch.values()))) > 1:
        return vmap(function, in_dims=(dim, 0))(first, batch)
    example = {name: value[0] for name, value in batch.items()}
    return function(first if dim is None else first[dim], example)[None]  # pyright: ignore[reportArgumentType]


def _losses(loss: LossFn, batch: Batch) -> Callable[[Params], Tensor]:
    def losses(params: Params) -> Tensor:
        made = _each(loss, params, batch)
        if made.ndim != 1:
            raise InputError(
                f"the loss of an example has shape {list(made.shape[1:])}, expected one number: sum it, or "
                "take gauss_newton_product"
            )
        return made

    return losses


def _streamed(
    of_batch: Callable[[Batch, Params], Params], params: Params, data: Data, token_batch_size: int
) -> Product:
    """The mean over the data of a sum over the examples of a batch, for every row of a vector."""
    if not len(data) or not params:
        raise InputError("a product needs at least one example and one parameter")
    lengths = lengths_of(data)
    plan_batches(lengths[:1], token_batch_size)  # refuses a budget below 1 now, not when called
    device = next(iter(params.values())).device

    @torch.no_grad()  # forward and reverse mode are functional; a trainable model's graph would only be held
    def product(v: Params) -> Params:
        count = _rows_of(v, params)
        total = {n: torch.zeros_like(v[n], dtype=_wide(p.dtype), device=device) for n, p in params.items()}
        if not count:
            return total
        tangents = {name: v[name].to(p) for name, p in params.items()}
        for rows in plan_batches(lengths, max(1, token_batch_size // count)):
            examples = collate([labelled(data, int(row)) for row in rows])
            batch = {name: value.to(device) for name, value in examples.items()}
            with _forward_mode():
                share = vmap(of_batch, in_dims=(None, 0))(batch, tangents)
            total = {name: total[name] + share[name] for name in total}
        return {name: value / len(data) for name, value in total.items()}

    return product


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rows_of(v: Params, params: Params) -> int:
    if wrong := v.keys() ^ params.keys():
        raise InputError(
            f"the vector and the parameters differ in {min(wrong)}: give both the same {len(params)} names"
        )
    for name, p in params.items():
        if v[name].ndim != p.ndim + 1 or v[name].shape[1:] != p.shape:
            raise InputError(
                f"the vector's {name} has shape {list(v[name].shape)}, expected {['k', *p.shape]}: "
                "a single vector has k = 1, v[None]"
            )
    counts = {len(value) for value in v.values()}
    if len(counts) > 1:
        raise InputError(f"the vector's parts have {sorted(counts)} rows: give all of them the same number")
    return counts.pop()


REMEDIES = (
    ("random operation", "the model is random", "put it into eval mode, model.eval()"),
    (
        "autograd.Function|forward AD",
        "the model has an operation without forward mode",
        "load it with attn_implementation='eager' and without fused kernels",
    ),
    ("vmap", "the model's code cannot be mapped over examples", "take them one by one, token_batch_size=1"),
)
"""What PyTorch says, what it means, what to do."""


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Let attention run by its formula, which forward mode knows, and refuse what has no such thing."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        # PyTorch's own, when its table of forward derivatives loads.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        try:
            yield
        except RuntimeError as error:
            cause = " ".join(str(error).split())
            for words, meaning, remedy in REMEDIES:
                if re.search(words, cause):
                    raise InputError(f"{meaning} ({cause[:100]}...): {remedy}") from error
            raise


# --- vectors as matrices


def _flat(v: Params) -> Float[Tensor, "k n"]:
    flat = torch.cat([value.detach().flatten(1) for value in v.values()], 1)
    return flat.to(_wide(flat.dtype))


def _unflat(flat: Float[Tensor, "k n"], like: Params) -> Params:
    parts = flat.split([prod(value.shape[1:]) for value in like.values()], 1)
    return {
        name: part.reshape(len(flat), *value.shape[1:]).to(value.dtype)
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def _on_matrix(
    function: Product, like: Params, what: str
) -> Callable[[Float[Tensor, "k n"]], Float[Tensor, "k n"]]:
    """The function on flattened vectors; what it gives is checked to be finite."""

    def apply(flat: Tensor) -> Tensor:
        given = function(_unflat(flat, like))
        result = _flat({name: given[name] for name in like}).to(flat)
        if not bool(torch.isfinite(result).all()):
            raise InputError(
                f"the {what} gave NaN or infinite numbers: check the loss, or compute in float64"
            )
        return result

    return apply


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _relative(residual: Tensor, b: Tensor) -> Tensor:
    """`|residual| / |b|` of every row, and 0 where b is 0."""
    size = b.norm(dim=1)
    return torch.where(size > 0, residual.norm(dim=1) / size.clamp_min(torch.finfo(b.dtype).tiny), 0)


# --- solves


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

    A row that has converged leaves the products. The matrix must be positive definite.

    Args:
        product: `v -> H v`, symmetric.
        b: right-hand sides, `{name: [k, *parameter]}`.
        damping: added to every eigenvalue of H, in units of H.
        tolerance: of the residual, relative to `|b|`.
        max_iterations: products at most, but for one more that computes the residual.
        preconditioner: `v -> M^-1 v`, symmetric positive definite, M near `H + damping I`; it changes the
            number of iterations alone.

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
    precondition = _on_matrix(preconditioner, b, "preconditioner") if preconditioner else lambda r: r
    x, r = torch.zeros_like(rhs), rhs
    # Half: what the recurrence says of the residual and what it is differ by rounding.
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
) -> Solution:
    """Solve `(H + damping I) x = b` by LiSSA, `x <- x + (b - (H_j + damping I) x) / scale` from `x = 0`.

    `H` is the mean of the `H_j`. With one product this is Richardson's iteration: it converges if the scale
    is above half of the largest eigenvalue of `H + damping I`, by `1 - (smallest eigenvalue) / scale` a step.
    With several it ends as far from the solution as they differ, which the residual tells.

    Args:
        products: `v -> H_j v`, of minibatches of one size, taken in turn.
        b: right-hand sides, `{name: [k, *parameter]}`.
        damping: added to every eigenvalue of H, in units of H.
        steps: how many.
        scale: what a step is divided by, in units of H; None is the largest eigenvalue of all
            `H_j + damping I`, by power iteration.
        tolerance: the residual, relative to `|b|`, that counts as converged.

    Returns:
        The solution; its residual is computed from x with every product once.

    Raises:
        InputError: the iteration diverges, numbers that are not finite, a negative damping.

    >>> products = [lambda v: {"w": v["w"] * 3}]
    >>> solution = lissa(products, {"w": torch.ones(1, 1)}, damping=1.0, steps=50, scale=8.0)
    >>> solution.x, solution.converged
    ({'w': tensor([[0.2500]])}, tensor([True]))

    Source: LiSSA, arXiv:1602.03943, section 3; for influence, arXiv:1703.04730, section 3.
    """
    rhs = _checked(b, damping, tolerance)
    if not products:
        raise InputError("LiSSA needs at least one product")
    if scale is None:
        scale = max(abs(largest_eigenvalue(product, b)) for product in products) + damping
    if not (isfinite(scale) and scale > 0):
        raise InputError(f"the scale must be a number above 0, not {scale}: give a scale, or more damping")
    applies = [_damped(product, b, damping) for product in products]
    x = torch.zeros_like(rhs)
    for step in range(steps):
        residual = rhs - applies[step % len(applies)](x)
        _refuse_divergence(_relative(residual, rhs), step, scale)
        x = x + residual / scale

    def apply(v: Tensor) -> Tensor:
        return torch.stack([apply(v) for apply in applies]).mean(0)

    iterations = torch.where(rhs.norm(dim=1) > 0, steps, 0)
    return _solution(apply, x, rhs, b, iterations, tolerance)


def largest_eigenvalue(product: Product, like: Params, *, iterations: int = 30, seed: int = 0) -> float:
    """The eigenvalue of a product that is largest in magnitude, by power iteration from a random vector.

    Args:
        product: `v -> H v`, symmetric.
        like: any vectors of it, `{name: [k, *parameter]}`, for names, shapes and dtypes.
        iterations: products to spend.
        seed: of the random vector.

    Returns:
        `<v, H v>` for the last unit vector v; in magnitude never above the eigenvalue, up to rounding.

    >>> round(largest_eigenvalue(lambda v: {"w": v["w"] * -2}, {"w": torch.ones(1, 3)}), 4)
    -2.0
    """
    apply = _on_matrix(product, like, "product")
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
    rhs = _flat(b)
    if not bool(torch.isfinite(rhs).all()):
        raise InputError("a right-hand side is NaN or infinite: check the query's gradient")
    return rhs


def _damped(product: Product, like: Params, damping: float) -> Callable[[Tensor], Tensor]:
    apply = _on_matrix(product, like, "product")
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
    """Of a positive definite matrix and a scale that is large enough, the residual only shrinks."""
    worst = float(relative.max()) if len(relative) else 0.0
    if worst > 1e3:
        raise InputError(
            f"LiSSA diverges (at step {step} the residual is {worst:.3g} times |b|): give a larger scale "
            f"than {scale:.3g}, or more damping"
        )


def _solution(
    apply: Callable[[Tensor], Tensor], x: Tensor, rhs: Tensor, b: Params, iterations: Tensor, tolerance: float
) -> Solution:
    residual = _relative(rhs - apply(x), rhs) if bool(x.any()) else _relative(rhs, rhs)
    return Solution(_unflat(x, b), iterations, residual, residual <= tolerance)


# --- low rank


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

        What of b lies outside the span is dropped.

        Raises:
            InputError: an eigenvalue and the damping sum to zero.
        """
        damped = self.values + damping
        if not bool((damped.abs() > torch.finfo(damped.dtype).eps * self.values.abs().max()).all()):
            raise InputError("an eigenvalue plus the damping is zero: keep fewer, or give more damping")
        U = _flat(self.vectors)
        return _unflat(_flat({name: b[name] for name in self.vectors}) @ U.T / damped @ U, b)


def arnoldi(product: Product, like: Params, *, steps: int, keep: int, seed: int = 0) -> Eigenpairs:
    """The eigenpairs of a product that are largest in magnitude, by Arnoldi's iteration from a random vector.

    `steps` products span a Krylov space, each vector of it made orthogonal to all before; the product
    restricted to it is a small symmetric matrix, of whose eigenpairs `keep` are kept.

    Args:
        product: `v -> H v`, symmetric.
        like: any vectors of it, `{name: [k, *parameter]}`, for names, shapes and dtypes.
        steps: products to spend; so many vectors are held. Fewer if the space is exhausted before.
        keep: eigenpairs to keep; the last ones of many steps are inexact, so keep fewer.
        seed: of the random vector.

    Raises:
        InputError: `keep` is not between 1 and `steps`.

    >>> spectrum = torch.tensor([1.0, -5.0, 3.0])
    >>> pairs = arnoldi(lambda v: {"w": v["w"] * spectrum}, {"w": torch.ones(1, 3)}, steps=3, keep=2)
    >>> pairs.values.round(decimals=4)
    tensor([-5.,  3.])

    Source: Schioppa et al., arXiv:2112.03052, section 3.
    """
    if not 1 <= keep <= steps:
        raise InputError(f"keep must lie between 1 and the {steps} steps, not at {keep}")
    apply = _on_matrix(product, like, "product")
    Q = _random_unit(like, seed)
    moved, largest = [], 0.0
    while True:
        moved.append(apply(Q[-1:]))
        largest = max(largest, float(moved[-1].norm()))
        rest = moved[-1]
        for _ in range(2):  # once leaves rounding in, twice is enough
            rest = rest - rest @ Q.T @ Q
        exhausted = float(rest.norm()) <= 10 * torch.finfo(Q.dtype).eps * largest
        if len(Q) == min(steps, Q.shape[1]) or exhausted:
            break
        Q = torch.cat([Q, rest / rest.norm()])
    small = Q @ torch.cat(moved).T
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    order = values.abs().argsort(descending=True)[:keep]
    return Eigenpairs(values[order], _unflat(vectors.T[order] @ Q, like))


def params_of_blocks(sites: Sequence[Site], blocks: Blocks) -> Params:
    """Lay blocks `[k, out, in (+ 1)]` out as vectors `{name: [k, *parameter]}`; undoes `blocks_of`.

    A preconditioner of blocks is one of vectors: `lambda v: params_of_blocks(sites, M(blocks_of(sites, v)))`.

    Args:
        sites: from `find_sites`, without heads.
        blocks: as `blocks_of` lays them out.

    Raises:
        InputError: a site whose block is a part of a parameter (a head, a part of nn.MultiheadAttention, a
            mixture's experts), or that has no block here; it is named.

    >>> from gradfn.model.sites import blocks_of, find_sites
    >>> sites = find_sites(torch.nn.Linear(3, 2))
    >>> v = {"weight": torch.ones(5, 2, 3), "bias": torch.zeros(5, 2)}
    >>> {name: value.shape for name, value in params_of_blocks(sites, blocks_of(sites, v)).items()}
    {'weight': torch.Size([5, 2, 3]), 'bias': torch.Size([5, 2])}
    """
    params: Params = {}
    for site in sites:
        if site.names[0] in params:  # of a shared weight
            continue
        layer = site.layer
        if not layer.is_whole:
            raise InputError(
                f"the block {site.block} is not one weight laid out whole, so it has no inverse map: "
                f"--exclude {site.path}, and no heads"
            )
        if site.block not in blocks:
            raise InputError(f"there is no block {site.block}: give the blocks of all {len(sites)} sites")
        G = blocks[site.block]
        weight = G[..., :-1] if layer.bias else G
        params[site.names[0]] = layer.unblock(weight, site.weight.shape)
        if layer.bias:
            params[site.names[1]] = G[..., -1]
    return params


def _random_unit(like: Params, seed: int) -> Float[Tensor, "1 n"]:
    """A random unit vector, the same on every device."""
    flat = _flat({name: value[:0] for name, value in like.items()})
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(1, flat.shape[1], generator=generator, dtype=torch.float64)
    return (v / v.norm()).to(flat)
