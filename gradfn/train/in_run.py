"""Values of rows inside a run: what each row of a step did to validation losses.

A step on a part S of the batch has the gradient `sum_S c_j g_j`, so its utility is

    U(S) = l_val(update(sum_S c_j g_j)) - l_val(theta)          G = sum_j c_j g_j, of the whole batch

The first-order value of row i is `-<u, c_i g_i>`, where u is the validation gradient pulled back through the
optimizer's step. Positive: the row lowered the validation loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.func import grad_and_value, jacrev, jvp

from gradfn.errors import InputError
from gradfn.exact.products import forward_mode
from gradfn.scores import Scores
from gradfn.train.optimizers import State, clip_scale, learning_rate, update
from gradfn.train.spec import Training
from gradfn.train.step import losses_of
from gradfn.types import Batch, LossFn, Params

Kind = Literal["influence", "shapley", "frozen", "before"]
"""How the optimizer's own dependence on the batch is shared out over its rows; see `step_direction`."""
ValidationLosses = Callable[[Params], Tensor]
"""`params -> [queries]`, losses of validation batches."""


def step_direction(
    training: Training,
    state: State,
    grads: Params | None,
    query_grads: Params,
    *,
    kind: Kind = "shapley",
    nodes: int = 8,
) -> Params:
    """The cotangent u of the gradient of a step: `<u, g>` is how much a gradient g adds to a query's loss.

    With `J(g)`, the Jacobian of the step's new parameters in its gradient, clipping included:

    * influence: `J(G)ᵀ g_val`, the derivative at the whole batch; best for leaving one row out.
    * shapley: `int_0^1 J(a G)ᵀ g_val da`, the values of Aumann and Shapley. They add up to what the whole
      batch changed beside a step on nothing, which is not nothing: momentum moves the parameters.
    * frozen: the denominators of Adam, and the factor of clipping, are constants, those of the whole batch.
    * before: the same with those of the step before, and no clipping: all of it is known before the batch.

    For sgd without clipping all four are the same.

    Args:
        training: the optimizer.
        state: of one model, before the step; `vmap` over stacked ones.
        grads: G of all parameters, before clipping; "before" does not need it.
        query_grads: of the validation losses, `{name: [*parameter]}`, or of many, `[queries, *parameter]`;
            they may be of fewer parameters.
        kind: see above. At Adam's first step no second moment is known yet: "before" gives 0 there, and
            the step is one of signs, which no value describes well (`InRun.cold`).
        nodes: of the Gauss-Legendre quadrature; as many again on the part of the way that is clipped.

    Returns:
        `{name: ...}` like `query_grads`.

    Raises:
        InputError: an unknown kind, muon, or no `grads` where they are needed.

    >>> from gradfn.train import first_state
    >>> training, params = Training(1, 1, 0.5, "sgd"), {"w": torch.ones(2)}
    >>> state = first_state(params, training, torch.tensor(1))
    >>> step_direction(training, state, {"w": torch.ones(2)}, {"w": torch.tensor([[1.0, 0.0], [2.0, 3.0]])})
    {'w': tensor([[-0.5000, -0.0000],
            [-1.0000, -1.5000]])}

    Source: Data Shapley in one training run, arXiv:2406.11011, section 4; Aumann and Shapley, Values of
    non-atomic games, 1974.
    """
    check_values(training, kind)
    if grads is None and kind != "before":
        raise InputError(f'the {kind} value needs `grads`, those of the batch: give them, or kind="before"')
    if kind in ("frozen", "before"):
        slopes, bends = _frozen_slopes(training, state, grads if kind == "frozen" else None), None
    else:
        assert grads is not None
        way = _way(training, grads, kind, nodes)
        slopes, bends = _mean_slopes(training, state, {name: grads[name] for name in query_grads}, way)
    pulled = {name: slopes[name].to(q) * q for name, q in query_grads.items()}
    if bends is None or grads is None:
        return pulled
    shares = [_inner(grads[name] * bends[name], q) for name, q in query_grads.items()]
    along = torch.stack(shares).sum(0)
    return {name: u - along.reshape((*along.shape, *[1] * grads[name].ndim)) * grads[name]
            for name, u in pulled.items()}  # fmt: skip


def check_values(training: Training, kind: str) -> None:
    """Refuse values of a kind, or with an optimizer, that there are not.

    >>> check_values(Training(1, 1, 0.1, "muon", momentum=0.95), "shapley")
    Traceback (most recent call last):
    gradfn.errors.InputError: values know no muon, whose step is of whole matrices: train with adamw or sgd
    """
    if kind not in get_args(Kind):
        raise InputError(f"no kind {kind!r} of value: choose {', '.join(get_args(Kind))}")
    if training.optimizer == "muon":
        raise InputError("values know no muon, whose step is of whole matrices: train with adamw or sgd")


def _inner(of_parameter: Tensor, of_queries: Tensor) -> Tensor:
    """`[*queries]` inner products of `[*parameter]` and `[*queries, *parameter]`."""
    product = of_parameter * of_queries
    return product.reshape(*product.shape[: product.ndim - of_parameter.ndim], -1).sum(-1)


Point = tuple[Any, Any, Any]


def _way(training: Training, grads: Params, kind: Kind, nodes: int) -> list[Point]:
    """The points `a G` of the way from no gradient to the whole one at which the Jacobian is taken.

    Returns:
        Of each point the multiple of G that has passed clipping, `a s`; what its slopes count, its weight
        times s; and what they count in the rank-one part, see `_mean_slopes`.
    """
    places, weights = np.polynomial.legendre.leggauss(nodes)
    unit = [(float(x + 1) / 2, float(w) / 2) for x, w in zip(places, weights, strict=True)]
    whole, limit = kind == "influence", training.max_grad_norm
    if limit is None:
        one = whole or training.optimizer == "sgd"
        return [(1.0, 1.0, None)] if one else [(x, w, None) for x, w in unit]
    _, norm = clip_scale(training, grads)
    if whole:
        way = [(torch.ones_like(norm), torch.ones_like(norm))]
    else:  # up to the kink, and from there in the logarithm of a, for the factor is about 1 / a
        kink = ((limit - 1e-6) / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(1e-6, 1)
        beyond = [(kink ** (1 - x), -kink.log() * w) for x, w in unit]
        way = [*((kink * x, kink * w) for x, w in unit), *((a, a * w) for a, w in beyond)]
    made = []
    for a, weight in way:
        n = a * norm
        s = (limit / (n + 1e-6)).clamp_max(1)
        active = (s < 1) & (n > 0)
        bend = torch.where(active, weight * s * a.square() / torch.where(active, n * (n + 1e-6), 1), 0)
        made.append((a * s, weight * s, bend))
    return made


def _mean_slopes(
    training: Training, state: State, grads: Params, way: list[Point]
) -> tuple[Params, Params | None]:
    """The weighted mean of Jacobians, each a diagonal minus a matrix of rank one: `D - G (E G)ᵀ`.

    An optimizer acts elementwise, with slopes d. Where the gradient g is clipped, `d s (I - g gᵀ / (n (n +
    1e-6)))` is the Jacobian, so D is the mean of `d s`, and E that of `d s a² / (n (n + 1e-6))`.
    """
    slopes: Params = {}
    bends: Params = {}
    slope = _slope_of(training, state)
    for name, g in grads.items():
        made = [(slope(name, g * at), weight, bend) for at, weight, bend in way]
        slopes[name] = reduce(torch.add, [d * weight for d, weight, _ in made])
        if training.max_grad_norm is not None:
            bends[name] = reduce(torch.add, [d * bend for d, _, bend in made])
    return slopes, bends or None


def _slope_of(training: Training, state: State) -> Callable[[str, Tensor], Tensor]:
    """The derivative of each number of a new parameter in its own gradient, which clipping has passed.

    * sgd: `-lr`, with nesterov `-lr (1 + mu)`
    * adam: `-lr / (1 - b1^t) ((1 - b1) - m' R' / D) / D`, with `R = sqrt(v' / (1 - b2^t) + eps_root)`,
      `D = R + eps`, and `R' = (1 - b2) g / ((1 - b2^t) R)`, the derivative of R, which is 0 where R is
    """
    t, rate = state.taken.double() + 1, -learning_rate(training, state.taken, state.total)
    if training.optimizer == "sgd":
        rate = rate * (1 + (training.momentum if training.nesterov else 0.0))
        return lambda name, g: rate.to(g) * torch.ones_like(g)
    b1, b2 = training.betas
    rate, share = rate / (1 - b1**t), 1 - b2**t

    def slope(name: str, g: Tensor) -> Tensor:
        m, v = (moment[name] for moment in state.moments)
        if training.optimizer == "adam" and training.weight_decay:
            g = g + training.weight_decay * state.params[name]
        root = (torch.addcmul(b2 * v, g, g, value=1 - b2) / share.to(g) + training.eps_root).sqrt()
        divisor = root + training.eps
        bend = torch.where(root > 0, g / root, 0) * ((1 - b2) / share).to(g)
        return ((1 - b1) - torch.lerp(m, g, 1 - b1) * bend / divisor) / divisor * rate.to(g)

    return slope


def _frozen_slopes(training: Training, state: State, grads: Params | None) -> Params:
    """The slopes where Adam's second moments stay as they are after the step; without `grads`, before it."""
    scale = torch.ones(()) if grads is None else clip_scale(training, grads)[0]
    if training.optimizer == "sgd":
        some, slope = state.params if grads is None else grads, _slope_of(training, state)
        return {name: scale.to(g) * slope(name, g) for name, g in some.items()}
    b1, b2 = training.betas
    after = state if grads is None else update(training, state, grads)
    age, t = after.taken.double(), state.taken.double() + 1
    size = scale * learning_rate(training, state.taken, state.total) * (1 - b1) / (1 - b1**t)
    made: Params = {}
    for name, v in after.moments[1].items():
        seen = v / (1 - b2 ** age.clamp_min(1)).to(v) + training.eps_root
        made[name] = torch.where(age > 0, -size.to(v) / (seen.sqrt() + training.eps), 0)
    return made


class InRun(NamedTuple):
    """A step and the values of its rows.

    Args:
        state: after the step.
        values: of each row for each validation loss, in units of that loss; positive: the row lowered it.
        losses: of the rows, before the step.
        cold: whether it was Adam's first step, a step of signs: its values say little.
    """

    state: State
    values: Float[Tensor, "batch queries"]
    losses: Float[Tensor, " batch"]
    cold: Tensor


def in_run(
    loss: LossFn,
    training: Training,
    state: State,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    queries: Batch | ValidationLosses,
    *,
    kind: Kind = "shapley",
    order: int = 1,
) -> InRun:
    """A step, and what each of its rows did to each validation loss: a pure function of any loss.

    * order 1: `-w_i <u, g_i>`, with u of `step_direction`; one jvp of the row losses for each query.
    * order 2, of sgd: the Shapley values of the validation loss's second-order expansion, by one product
      with its Hessian a query: `g_val + H (moved by the whole batch + moved by none) / 2` for `g_val`.
      Without momentum and decay this adds `-eta²/2 <w_i g_i, H G>`.

    It defines the values; `values` gives the same ones inside a training step of the caller's own.

    Args:
        loss: `loss(params, example) -> scalar`; its `batched`, where it has one, is used instead.
        training: the optimizer.
        state: of one model, before the step.
        batch: the rows, `{key: [batch, ...]}`.
        weights: of their losses in the step: 1 / batch for their mean.
        queries: validation examples, `{key: [queries, ...]}`, with the same loss; or `params -> [queries]`.
        kind: see `step_direction`.
        order: of the expansion of the validation loss.

    Raises:
        InputError: an order of 2 with another optimizer than sgd, or with clipping.

    >>> from gradfn.train import first_state
    >>> training = Training(1, 2, 0.5, "sgd")
    >>> state = first_state({"w": torch.zeros(())}, training, torch.tensor(1))
    >>> batch = {"x": torch.tensor([1.0, -1.0]), "y": torch.tensor([2.0, 1.0])}
    >>> def loss(p, e):
    ...     return (p["w"] * e["x"] - e["y"]).square() / 2
    >>> query = {"x": torch.tensor([1.0]), "y": torch.tensor([2.0])}
    >>> in_run(loss, training, state, batch, torch.full((2,), 0.5), query).values
    tensor([[ 1.0000],
            [-0.5000]])

    Source: Data Shapley in one training run, arXiv:2406.11011, equations 4 and 5.
    """
    if order not in (1, 2) or (order == 2 and (training.optimizer != "sgd" or training.max_grad_norm)):
        raise InputError(
            f"no values of order {order} with {training.optimizer} and a `max_grad_norm` of "
            f"{training.max_grad_norm}: give order=1, or order=2 with sgd and no `max_grad_norm`"
        )
    losses = losses_of(loss)
    asked = queries if callable(queries) else lambda params: losses(params, queries)
    (grads, (_, before)) = grad_and_value(
        lambda params: (((made := losses(params, batch)) * weights).sum(), made), has_aux=True
    )(state.params)
    slope = jacrev(asked, chunk_size=1)  # one at a time: not every model can be mapped over
    after = update(training, state, grads)
    if order == 2:
        empty = update(training, state, {name: torch.zeros_like(g) for name, g in grads.items()}).params
        middle = {name: (p + after.params[name]) / 2 - state.params[name] for name, p in empty.items()}
        with forward_mode():
            made, bent = jvp(slope, (state.params,), (middle,))[:2]
        query_grads = {name: q + bent[name] for name, q in made.items()}
    else:
        query_grads = slope(state.params)
    u = step_direction(training, state, grads, query_grads, kind=kind)
    with forward_mode():
        columns = [
            jvp(lambda params: losses(params, batch), (state.params,), ({n: d[q] for n, d in u.items()},))[1]
            for q in range(len(next(iter(u.values()))))
        ]
    cold = (state.taken == 0) & (training.optimizer != "sgd")
    return InRun(after, -torch.stack(columns, 1) * weights[:, None], before, cold)


class Totals(NamedTuple):
    """Sums over the steps of a run: of the values of each row, and how often it was met."""

    values: Float64[Tensor, "rows queries"]
    visits: Int64[Tensor, " rows"]


@dataclass(frozen=True, eq=False)
class InRunTotals:
    """A fold of the values of rows over the steps of a run, whose parts may be merged in any order.

    The sum over steps is the value of the row for the whole run, to first order in each step.

    Args:
        row_ids, query_ids: names of the rows of the data, and of the validation losses.
        settings: all that the values depend on, as plain JSON values.

    >>> fold = InRunTotals(["a", "b", "c"], ["q"])
    >>> one = fold.update(fold.init(), torch.tensor([2, 0]), torch.tensor([[1.0], [2.0]]))
    >>> two = fold.update(fold.init(), torch.tensor([2]), torch.tensor([[0.5]]))
    >>> fold.finalize(fold.merge(one, two)).matrix
    tensor([[2.0000],
            [0.0000],
            [1.5000]])
    """

    row_ids: Sequence[str]
    query_ids: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def init(self) -> Totals:
        """No steps."""
        rows = len(self.row_ids)
        return Totals(torch.zeros(rows, len(self.query_ids)).double(), torch.zeros(rows, dtype=torch.long))

    def update(
        self, state: Totals, rows: Int64[Tensor, " batch"], values: Float[Tensor, "batch queries"]
    ) -> Totals:
        """The sums after one more step.

        Args:
            state: so far.
            rows: the numbers of the step's rows in the data; a number may come twice.
            values: theirs.
        """
        rows = rows.to(state.visits.device)
        return Totals(
            state.values.index_add(0, rows, values.detach().to(state.values)),
            state.visits.index_add(0, rows, torch.ones_like(rows)),
        )

    def merge(self, a: Totals, b: Totals) -> Totals:
        """The sums over the steps of both."""
        return Totals(a.values + b.values, a.visits + b.visits)

    def finalize(self, state: Totals) -> Scores:
        """The sums as scores, which tables, files and evaluations take like any others."""
        values = state.values.float()[None]
        return Scores(values, self.row_ids, self.query_ids, settings=self.settings)
