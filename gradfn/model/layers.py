"""How each kind of layer turns its input and output gradient into the block of its weight.

The block `G [out, in]` of a weight is its gradient in one layout, whatever order the weight is stored in. The
bias is the last column, because it is the weight of the constant input 1. A linear-like layer builds the
block from two factors, `G = sum_t g_t x_tᵀ`: the layer's input `x` and the gradient `g` at its output. A Kron
`L G Rᵀ` can therefore act on the factors before they are multiplied.

A new kind of layer is a subclass of `Layer` here and a function in `gradfn.model.sites.ADAPTERS`. Every other
file asks the layer itself what it can do.

| layer | x | g | block |
|---|---|---|---|
| Linear, HF Conv1D | input | output gradient | `[O, I]` |
| Conv1d, 2d, 3d | patches, positions as t | output gradient | `[O, I / groups * kernel]` |
| Embedding | output gradient | one-hot of the ids, never built | `[vocab, D]` |
| Layer-, RMS-, Batch-, GroupNorm scale | normalised input | output gradient | `[D, 1]`, elementwise |
| fused experts | input of each expert | output gradient | `[experts * O, I]` |
| nn.MultiheadAttention | query, key, value | projections' gradient | `[E, I]` each |
| any other parameter | | `vmap(grad)` of it alone | `[first axis, rest]` |
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron, Side, apply_side
from gradfn.linalg.maps import Map

KINDS = ("linear", "convolution", "experts", "embedding", "norm", "other")
"""What `Layer.kind` may be, in the order in which tables list them."""


@dataclass(frozen=True, eq=False)
class ExpertRouting:
    """Which example and which expert each row of a call belongs to, and the number of examples."""

    examples: Tensor
    experts: Tensor
    batch: int


@dataclass(frozen=True, eq=False)
class Layer:
    """How the input and output gradient of a module become the block of one of its weights.

    Args:
        out_features, in_features: the size of the block, without the bias column.
        bias: whether the block has a bias column.
    """

    out_features: int
    in_features: int
    bias: bool

    kind: ClassVar[str] = "other"
    """One of `KINDS`: what to call the layer in a table or a message."""
    by_default: ClassVar[bool] = False
    """Whether a `View` includes the layer unless it is told otherwise."""
    by_token: ClassVar[bool] = True
    """Whether the layer has a gradient for each token."""
    ragged: ClassVar[bool] = False
    """Whether the rows of a call are tokens of any example, so that `in_call` must say whose."""
    takes_maps: ClassVar[bool] = False
    """Whether `save_input` and `contract` apply a `Map`; other layers need it as a matrix."""
    sums_rows_first: ClassVar[bool] = False
    """Whether the sum of all rows' blocks is the block of one row that has all their positions."""
    projects_late: ClassVar[bool] = False
    """Whether the right side of a Kron may wait for the backward pass; see `project`."""
    has_factors: ClassVar[bool] = False
    """Whether the block is a sum of outer products of `factors`."""

    def in_call(self, size: int | None, *call: Any) -> "Layer | None":
        """The layer as one call of its module uses it; None if the call does not use this weight.

        Args:
            size: the number of examples in the batch; None for one example without a batch axis.
            call: what the module's `attach` says about the call.
        """
        return self

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Lay the gradients of the parameters, `[rows, *parameter]`, out as blocks."""
        weight = weight.to_dense() if weight.is_sparse else weight
        G = weight.reshape(len(weight), self.out_features, self.in_features)
        return G if bias is None else torch.cat([G, bias.flatten(1)[..., None]], -1)

    @property
    def is_whole(self) -> bool:
        """Whether the block is one whole parameter, so that `unblock` exists."""
        return type(self).block is Layer.block

    def unblock(self, G: Tensor, shape: torch.Size) -> Tensor:
        """Lay blocks without their bias column out as the parameter, `[rows, *shape]`."""
        return G.reshape(len(G), *shape)

    def projected_block(self, weight: Tensor, bias: Tensor | None, kron: Kron) -> tuple[Tensor, Tensor]:
        """`L G Rᵀ` and the norm of `G`, for the gradients of the parameters of one row."""
        G = self.block(weight, bias)
        return kron(G), G.norm()

    def rank_one(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor] | None:
        """Lay a statistic `row columnᵀ` of the parameter out as the block; None if the block has no such."""
        return None

    def save_input(self, x: Tensor, right: Side) -> Tensor:
        """What the backward pass needs of the input: its projection if there is one, else the input."""
        raise NotImplementedError

    def project(self, saved: Tensor, right: Side) -> Tensor:
        """What `save_input(x, right)` gives, made of `save_input(x, None)`."""
        raise NotImplementedError

    def contract(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        """`L G Rᵀ` of every example, `[batch, p, q]`, or of every token, `[batch, tokens, p, q]`."""
        raise NotImplementedError

    def factors(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool = False) -> tuple[Tensor, Tensor]:
        """`R x [batch, positions, q]`, with the bias column, and `L g [batch, positions, p]`."""
        raise NotImplementedError

    def positions(self, g: Tensor, tokens: bool) -> int:
        """How many outer products the block of an example (or of a token) sums."""
        raise NotImplementedError

    def prefers_factors(self, g: Tensor, kron: Kron, queries: int, unit: bool, tokens: bool) -> bool:
        """Whether inner products cost less when they are taken of the factors, not of the dense block."""
        if not self.has_factors or is_matrix(kron.left) or is_matrix(kron.right):
            return False
        size, positions = self.out_features * self.in_features, self.positions(g, tokens)
        ghost = positions * (self.out_features + self.in_features) if unit else 0
        return queries * positions * size + positions * ghost < (positions + queries) * size

    def score(
        self, saved: Tensor, g: Tensor, kron: Kron, queries: Tensor, unit: bool, tokens: bool
    ) -> Float[Tensor, "*rows k"]:
        """Inner products with `queries [n, out, in]`, and the norm if `unit`, from the factors."""
        right, left = self.factors(saved, g, kron, tokens)
        dots = [((left @ query) * right).sum((-2, -1)) for query in queries]
        if not unit:
            return torch.stack(dots, -1)
        (left, a), (right, b) = _scaled(left), _scaled(right)
        return torch.stack([*dots, _root((left @ left.mT) * (right @ right.mT)) * a * b], -1)


def is_matrix(side: Side) -> bool:
    """Whether a side of a Kron is a matrix, not a diagonal and not left out."""
    return side is not None and side.ndim == 2


def diagonal_of(side: Side) -> Tensor:
    """The diagonal of a side that is neither a matrix nor left out."""
    assert isinstance(side, Tensor)
    return side


def in_full_precision(v: Tensor) -> AbstractContextManager[Any]:
    """Switch off a surrounding autocast: a projection is computed in the dtype of its statistics."""
    kind = v.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _positions(v: Tensor, tokens: bool) -> Tensor:
    """Flatten the axes that a block sums over, which begin after the example or after the token."""
    lead = 2 if tokens else 1
    return v.reshape(*v.shape[:lead], prod(v.shape[lead:-1]), v.shape[-1])


def _with_one(v: Tensor) -> Tensor:
    """Append the input of the bias, the constant 1."""
    return torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], -1)


def _outer(left: Tensor, right: Tensor, tokens: bool) -> Tensor:
    """`sum_t left_t right_tᵀ` for every example, or its terms for every token."""
    return _positions(left, tokens).mT @ _positions(right, tokens)


def _scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """Divide an example's factors by their largest number, because products of four may overflow."""
    scale = v.abs().amax((-2, -1)).clamp_min(torch.finfo(v.dtype).tiny)
    return v / scale[..., None, None], scale


def _root(squares: Tensor) -> Tensor:
    """The square root of a sum that rounding may take below 0."""
    return squares.sum((-2, -1)).clamp_min(0).sqrt()


@dataclass(frozen=True, eq=False)
class Linear(Layer):
    """`y = W x + b`; `rows` and `columns` select a part of the block, such as an attention head."""

    transposed: bool = False
    rows: Tensor | None = None
    columns: Tensor | None = None

    kind = "linear"
    by_default = takes_maps = sums_rows_first = projects_late = has_factors = True

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        G = weight.mT if self.transposed else weight
        bias = bias if self.bias else None
        if self.rows is not None:
            G, bias = G[..., self.rows, :], None if bias is None else bias[..., self.rows]
        G = G if self.columns is None else G[..., self.columns]
        return G if bias is None else torch.cat([G, bias[..., None]], -1)

    @property
    def is_whole(self) -> bool:
        return self.rows is None and self.columns is None

    def unblock(self, G: Tensor, shape: torch.Size) -> Tensor:
        return G.mT if self.transposed else G

    def projected_block(self, weight: Tensor, bias: Tensor | None, kron: Kron) -> tuple[Tensor, Tensor]:
        """The same without a copy of a large weight."""
        left, right = kron.left, kron.right
        if bias is None or not self.is_whole or not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return super().projected_block(weight, bias, kron)
        G = self.block(weight, None)
        projected = left @ G @ right[:, :-1].T + (bias @ left.mT)[..., None] * right[:, -1]
        return projected, G.norm().hypot(bias.norm())

    def rank_one(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor] | None:
        row, column = (column, row) if self.transposed else (row, column)
        row = row if self.rows is None else row[self.rows]
        return row, column if self.columns is None else column[self.columns]

    def save_input(self, x: Tensor, right: Side) -> Tensor:
        return self.project(x if self.columns is None else x[..., self.columns], right)

    def project(self, saved: Tensor, right: Side) -> Tensor:
        with in_full_precision(saved):
            if isinstance(right, Map):
                saved = saved.to(torch.promote_types(saved.dtype, torch.float32))
                return right.with_one(saved) if self.bias else right(saved)
            if not is_matrix(right):
                return saved
            assert right is not None
            saved = saved.to(right.dtype)
            return F.linear(saved, right[:, :-1], right[:, -1]) if self.bias else F.linear(saved, right)

    def positions(self, g: Tensor, tokens: bool) -> int:
        return prod(g.shape[2 if tokens else 1 : -1])

    def factors(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool = False) -> tuple[Tensor, Tensor]:
        left = _positions(apply_side(kron.left, g if self.rows is None else g[..., self.rows]), tokens)
        right = _positions(saved, tokens)
        if not is_matrix(kron.right):
            right = apply_side(kron.right, _with_one(right) if self.bias else right)
        return right, left

    def contract(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        left = apply_side(kron.left, g if self.rows is None else g[..., self.rows])
        G = _outer(left, saved, tokens)
        if is_matrix(kron.right):
            return G
        if self.bias:
            G = torch.cat([G, _positions(left, tokens).sum(-2)[..., None]], -1)
        return apply_side(kron.right, G)


@dataclass(frozen=True, eq=False)
class AttentionInput(Linear):
    """The projection to q, k or v inside nn.MultiheadAttention, which has one bias vector for all three.

    `rows` are the rows of that vector. The weight, which may be one for all three or one for each, begins at
    its row `first`.
    """

    first: int = 0

    projects_late = False

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert self.rows is not None
        G = weight[..., self.rows - self.first, :]
        return torch.cat([G, bias[..., self.rows, None]], -1) if self.bias and bias is not None else G

    def rank_one(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor] | None:
        return None

    def in_call(self, size: int | None, *call: Any) -> "AttentionInput | None":
        """The layer for a call whose output has the weight's rows from `start` to `stop`."""
        start, stop = call
        assert self.rows is not None
        rows = self.rows - self.first
        return replace(self, rows=rows - start) if start <= int(rows[0]) < stop else None


@dataclass(frozen=True, eq=False)
class Embedding(Layer):
    """`y = scale W[id]`: the left factor is the one-hot vector of the id, so `L` is only indexed."""

    padding: int | None = None
    scale: Tensor | float = 1.0

    kind = "embedding"

    def rank_one(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor] | None:
        return row, column

    def save_input(self, x: Tensor, right: Side) -> Tensor:
        return x

    def _right(self, ids: Tensor, g: Tensor, right: Side) -> Tensor:
        g = g * torch.as_tensor(self.scale, dtype=g.dtype, device=g.device)
        if self.padding is not None:
            g = g.masked_fill((ids == self.padding)[..., None], 0)
        return apply_side(right, g)

    def contract(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        right = self._right(saved, g, kron.right)
        if is_matrix(kron.left):
            assert isinstance(kron.left, Tensor)
            return _outer(F.embedding(saved, kron.left.T), right, tokens)
        if kron.left is not None:
            right = right * diagonal_of(kron.left)[saved][..., None]
        lead = saved.shape if tokens else saved.shape[:1]
        count = prod(lead)
        ids = saved.reshape(count, -1)
        flat = ids + self.out_features * torch.arange(count, device=ids.device)[:, None]
        G = right.new_zeros(count * self.out_features, right.shape[-1])
        G.index_add_(0, flat.flatten(), right.flatten(0, -2))
        return G.view(*lead, self.out_features, -1)

    def prefers_factors(self, g: Tensor, kron: Kron, queries: int, unit: bool, tokens: bool) -> bool:
        return not (is_matrix(kron.left) or is_matrix(kron.right))

    def score(
        self, saved: Tensor, g: Tensor, kron: Kron, queries: Tensor, unit: bool, tokens: bool
    ) -> Tensor:
        """The ids index rows of the queries; in the norm, only positions with the same id have a product."""
        right = self._right(saved, g, kron.right)
        if kron.left is not None:
            right = right * diagonal_of(kron.left)[saved][..., None]
        ids, right = saved.reshape(*saved.shape[: 2 if tokens else 1], -1), _positions(right, tokens)
        dots = [(query[ids] * right).sum((-2, -1)) for query in queries]
        if not unit:
            return torch.stack(dots, -1)
        right, scale = _scaled(right)
        same = ids[..., :, None] == ids[..., None, :]
        return torch.stack([*dots, _root((right @ right.mT) * same) * scale], -1)


@dataclass(frozen=True, eq=False)
class NormScale(Layer):
    """The elementwise scale (and shift) of a normalisation, `y = w n(x) + b`: `G = sum_t [g_t n(x_t), g_t]`.

    The module itself gives `n(x)`, as `y(w=1, b=0) - y(w=0, b=0)`, so the formula holds for every variant,
    such as Gemma's `(1 + w) n(x)`.
    """

    module: nn.Module
    channels_first: bool = False
    """Whether the features are axis 1 (BatchNorm, GroupNorm), not the last ones (LayerNorm, RMSNorm)."""

    kind = "norm"

    def save_input(self, x: Tensor, right: Side) -> Tensor:
        module: Any = self.module
        own, buffers = dict(module._parameters), dict(module._buffers)
        ones, zeros = (make(own["weight"]) for make in (torch.ones_like, torch.zeros_like))
        try:
            if module.training:  # running statistics must not see the input again
                module._buffers.update({n: b if b is None else b.clone() for n, b in buffers.items()})
            if own.get("bias") is not None:
                module._parameters["bias"] = zeros
            module._parameters["weight"] = ones
            one = module.forward(x)
            module._parameters["weight"] = zeros
            normalised = one - module.forward(x)
        finally:
            module._parameters.update(own)
            module._buffers.update(buffers)
        return normalised.movedim(1, -1) if self.channels_first else normalised

    def contract(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        shape = (*saved.shape[: 2 if tokens else 1], -1, self.out_features)
        saved, g = saved.reshape(shape).to(g.dtype), g.reshape(shape)
        columns = [(g * saved).sum(-2)] + ([g.sum(-2)] if self.bias else [])
        return kron(torch.stack(columns, -1))


@dataclass(frozen=True, eq=False)
class Experts(Layer):
    """The weights of a mixture's experts in one parameter `[experts, O, I]`, whose rows the block stacks.

    The rows of a call are tokens in the order of their experts; `routing` has the example of each.
    """

    experts: int
    transposed: bool = False
    routing: ExpertRouting | None = None

    kind = "experts"
    by_default = ragged = True
    by_token = False

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.mT if self.transposed else weight
        return super().block(weight, None if bias is None else bias.flatten(1))

    def in_call(self, size: int | None, *call: Any) -> "Experts":
        """The layer for a call with the token and the expert of each row, and the number of tokens.

        Raises:
            InputError: the batch is not known, so the tokens have no example.
        """
        tokens, experts, count = call
        if size is None or count % size:
            raise InputError("a mixture of experts needs a loss with a batched form: exclude its experts")
        return replace(self, routing=ExpertRouting(tokens // (count // size), experts, size))

    def save_input(self, x: Tensor, right: Side) -> Tensor:
        return Linear(0, 0, self.bias).save_input(x, right)

    def contract(self, saved: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        """`L G Rᵀ` of every example; the rows of `saved` and `g` are those of `routing`."""
        routing = self.routing
        assert routing is not None
        size = self.out_features // self.experts
        if not is_matrix(kron.right) and self.bias:
            saved = _with_one(saved)
        right = saved if is_matrix(kron.right) else apply_side(kron.right, saved)
        left = g
        if kron.left is not None and kron.left.ndim == 1:
            left = g * diagonal_of(kron.left).view(self.experts, size)[routing.experts]
        elif isinstance(kron.left, Tensor):
            by_expert = kron.left.T.reshape(self.experts, size, -1)
            left = g.new_empty(len(g), by_expert.shape[-1])
            for expert in routing.experts.unique().tolist():
                mine = routing.experts == expert
                left[mine] = g[mine] @ by_expert[expert]
        projected = is_matrix(kron.left)
        owners = routing.examples if projected else routing.examples * self.experts + routing.experts
        count = routing.batch * (1 if projected else self.experts)
        G = g.new_zeros(count, left.shape[-1], right.shape[-1])
        for owner in owners.unique().tolist():
            mine = owners == owner
            G[owner] = left[mine].T @ right[mine]
        return G.view(routing.batch, -1, right.shape[-1])


@dataclass(frozen=True, eq=False)
class BareParameter(Layer):
    """A parameter that no other kind describes, as `[first axis, rest]`."""

    def rank_one(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor] | None:
        return row, column
