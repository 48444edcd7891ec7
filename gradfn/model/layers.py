"""How each kind of layer makes its block of a gradient.

Every weight has a block `G [out, in]`, its gradient whatever the storage order, with the bias, the constant
input 1, as the last column. A linear-like layer makes it of factors, `G = sum_t g_t x_tᵀ`, where `x` is the
layer's input and `g` the gradient at its output; so a Kron `L G Rᵀ` acts on them before they meet.

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

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.linalg.kron import Kron, Side, apply_side
from gradfn.linalg.maps import Map


@dataclass(frozen=True, eq=False)
class ExpertRouting:
    """Which example, position and expert each row of a ragged call belongs to, and their numbers."""

    examples: Tensor
    experts: Tensor
    batch: int


@dataclass(frozen=True, eq=False)
class Layer:
    """How one weight's block comes from its module's input and output gradient.

    Args:
        out_features, in_features: the block's size, bias column not counted.
        bias: whether the block has a bias column.
    """

    out_features: int
    in_features: int
    bias: bool

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Lay the gradient of the parameters, `[rows, *parameter]`, out as the block."""
        weight = weight.to_dense() if weight.is_sparse else weight
        G = weight.reshape(len(weight), self.out_features, self.in_features)
        return G if bias is None else torch.cat([G, bias.flatten(1)[..., None]], -1)

    def keep(self, x: Tensor, right: Side) -> Tensor:
        """What the backward needs of the input: its projection where there is one, else itself."""
        raise NotImplementedError

    def contract(self, kept: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        """`L G Rᵀ` of every example, `[batch, p, q]`, or of every token, `[batch, tokens, p, q]`."""
        raise NotImplementedError

    has_factors: ClassVar[bool] = False
    """Whether the block is a sum of outer products of `factors`."""

    def factors(self, kept: Tensor, g: Tensor, kron: Kron, tokens: bool = False) -> tuple[Tensor, Tensor]:
        """`R x [batch, positions, q]`, bias column included, and `L g [batch, positions, p]`."""
        raise NotImplementedError

    def positions(self, g: Tensor, tokens: bool) -> int:
        """How many outer products an example's (or a token's) block is the sum of."""
        raise NotImplementedError

    def prefers_factors(self, g: Tensor, kron: Kron, queries: int, unit: bool, tokens: bool) -> bool:
        """Whether inner products cost less from the factors than from the dense block."""
        if not self.has_factors or _is_matrix(kron.left) or _is_matrix(kron.right):
            return False
        size, positions = self.out_features * self.in_features, self.positions(g, tokens)
        ghost = positions * (self.out_features + self.in_features) if unit else 0
        return queries * positions * size + positions * ghost < (positions + queries) * size

    def score(
        self, kept: Tensor, g: Tensor, kron: Kron, queries: Tensor, unit: bool, tokens: bool
    ) -> Float[Tensor, "*rows k"]:
        """Inner products with `queries [n, out, in]`, and the norm if `unit`, from the factors."""
        right, left = self.factors(kept, g, kron, tokens)
        dots = [((left @ query) * right).sum((-2, -1)) for query in queries]
        if not unit:
            return torch.stack(dots, -1)
        (left, a), (right, b) = _scaled(left), _scaled(right)
        return torch.stack([*dots, _root((left @ left.mT) * (right @ right.mT)) * a * b], -1)


def _is_matrix(side: Side) -> bool:
    return side is not None and side.ndim == 2


def _diagonal(side: Side) -> Tensor:
    """A side that is one."""
    assert isinstance(side, Tensor)
    return side


def _positions(v: Tensor, tokens: bool) -> Tensor:
    """What is summed over in one axis: all positions of an example, or what a token has beside its place."""
    lead = 2 if tokens else 1
    return v.reshape(*v.shape[:lead], prod(v.shape[lead:-1]), v.shape[-1])


def _with_one(v: Tensor) -> Tensor:
    """One more feature, the constant 1: the bias's input."""
    return torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], -1)


def _outer(left: Tensor, right: Tensor, tokens: bool) -> Tensor:
    """`sum_t left_t right_tᵀ` of every example, or each token's terms of the sum."""
    return _positions(left, tokens).mT @ _positions(right, tokens)


def _scaled(v: Tensor) -> tuple[Tensor, Tensor]:
    """Divide every example's factors by the largest number: products of four leave float32's range."""
    scale = v.abs().amax((-2, -1)).clamp_min(torch.finfo(v.dtype).tiny)
    return v / scale[..., None, None], scale


def _root(squares: Tensor) -> Tensor:
    """The root of a sum, of which rounding may make one below 0."""
    return squares.sum((-2, -1)).clamp_min(0).sqrt()


@dataclass(frozen=True, eq=False)
class Linear(Layer):
    """`y = W x + b`; `rows` and `columns` choose a part of the block, an attention head's."""

    transposed: bool = False
    rows: Tensor | None = None
    columns: Tensor | None = None

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        G = weight.mT if self.transposed else weight
        bias = bias if self.bias else None
        if self.rows is not None:
            G, bias = G[..., self.rows, :], None if bias is None else bias[..., self.rows]
        G = G if self.columns is None else G[..., self.columns]
        return G if bias is None else torch.cat([G, bias[..., None]], -1)

    def keep(self, x: Tensor, right: Side) -> Tensor:
        x = x if self.columns is None else x[..., self.columns]
        if isinstance(right, Map):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return right.with_one(x) if self.bias else right(x)
        if not _is_matrix(right):
            return x
        assert right is not None
        if not self.bias:
            return F.linear(x.to(right.dtype), right)
        return F.linear(x.to(right.dtype), right[:, :-1], right[:, -1])

    has_factors = True

    def positions(self, g: Tensor, tokens: bool) -> int:
        return prod(g.shape[2 if tokens else 1 : -1])

    def factors(self, kept: Tensor, g: Tensor, kron: Kron, tokens: bool = False) -> tuple[Tensor, Tensor]:
        left = _positions(apply_side(kron.left, g if self.rows is None else g[..., self.rows]), tokens)
        right = _positions(kept, tokens)
        if not _is_matrix(kron.right):
            right = apply_side(kron.right, _with_one(right) if self.bias else right)
        return right, left

    def contract(self, kept: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        left = apply_side(kron.left, g if self.rows is None else g[..., self.rows])
        G = _outer(left, kept, tokens)
        if _is_matrix(kron.right):
            return G
        if self.bias:
            G = torch.cat([G, _positions(left, tokens).sum(-2)[..., None]], -1)
        return apply_side(kron.right, G)


@dataclass(frozen=True, eq=False)
class AttentionInput(Linear):
    """The projection to q, k or v inside nn.MultiheadAttention: rows of one weight, or one of its own.

    The bias of all three is one vector, of which `rows` are this one's; its own weight begins at `first`.
    """

    first: int = 0

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert self.rows is not None
        G = weight[..., self.rows - self.first, :]
        return torch.cat([G, bias[..., self.rows, None]], -1) if self.bias and bias is not None else G

    def seen_in(self, start: int, stop: int) -> "AttentionInput | None":
        """The same where `y` holds the weight's rows `start` to `stop`; None if these are not its own."""
        assert self.rows is not None
        rows = self.rows - self.first
        return replace(self, rows=rows - start) if start <= int(rows[0]) < stop else None


@dataclass(frozen=True, eq=False)
class Conv(Layer):
    """A convolution over 1 to 3 axes: patches are the inputs, places the positions; groups share them."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def _axes(self) -> int:
        return len(self.module.kernel_size)

    def _padded(self, x: Tensor) -> Tensor:
        mode = "constant" if self.module.padding_mode == "zeros" else self.module.padding_mode
        padding: list[int] = self.module._reversed_padding_repeated_twice
        return F.pad(x, padding, mode) if any(padding) else x

    def _by_group(self, x: Tensor) -> Tensor:
        """`[n, channels, *places] -> [n * groups, channels / groups, *places]`."""
        return x.unflatten(1, (self.module.groups, -1)).flatten(0, 1)

    def keep(self, x: Tensor, right: Side) -> Tensor:
        """Projected patches are a convolution with the projection as filters."""
        if not _is_matrix(right):
            return x
        assert isinstance(right, Tensor)
        x = x.to(right.dtype)
        bare = x.ndim == self._axes + 1
        x = self._by_group(self._padded(x[None] if bare else x))
        filters, shift = (right[:, :-1], right[:, -1]) if self.bias else (right, None)
        filters = filters.unflatten(1, (-1, *self.module.kernel_size))
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self._axes - 1]
        kept = convolve(x, filters, shift, stride=self.module.stride, dilation=self.module.dilation)  # pyright: ignore
        kept = kept.flatten(2).unflatten(0, (-1, self.module.groups))
        return kept[0] if bare else kept  # [n, groups, q, places]

    def _patches(self, x: Tensor) -> Tensor:
        """`[n, channels, *places] -> [n, groups, inputs, places]`, what each output place sees."""
        x = self._by_group(self._padded(x))
        for axis, (size, step, hole) in enumerate(
            zip(self.module.kernel_size, self.module.stride, self.module.dilation, strict=True), start=2
        ):
            x = x.unfold(axis, (size - 1) * hole + 1, step)[..., ::hole]
        places = tuple(range(2, 2 + self._axes))
        kernel = tuple(range(2 + self._axes, 2 + 2 * self._axes))
        x = x.permute(0, 1, *kernel, *places).flatten(2 + self._axes)
        return x.flatten(1, -2).unflatten(0, (-1, self.module.groups))

    @property
    def has_factors(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.module.groups == 1

    def _grouped(self, kept: Tensor, g: Tensor, right: Side) -> tuple[Tensor, Tensor]:
        """Inputs `[batch, images, groups, inputs, places]` and output gradients alike, of every group."""
        size, groups = len(g), self.module.groups
        if _is_matrix(right):
            x = kept.reshape(size, -1, *kept.shape[-3:])
        else:
            patches = self._patches(kept.reshape(-1, *kept.shape[-self._axes - 1 :]).to(g.dtype))
            x = patches.reshape(size, -1, *patches.shape[1:])
            if self.bias:
                x = torch.cat([x, x.new_ones(1).expand(*x.shape[:3], 1, x.shape[-1])], -2)
            x = x if right is None else x * _diagonal(right)[:, None]
        return x, g.reshape(size, -1, groups, self.out_features // groups, prod(g.shape[-self._axes :]))

    def positions(self, g: Tensor, tokens: bool) -> int:
        return g[0].numel() // self.module.out_channels

    def factors(self, kept: Tensor, g: Tensor, kron: Kron, tokens: bool = False) -> tuple[Tensor, Tensor]:
        right, left = (v.squeeze(2).movedim(-1, 2).flatten(1, 2) for v in self._grouped(kept, g, kron.right))
        return right, apply_side(kron.left, left)

    def contract(self, kept: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        # n: images of one example, e: groups, o: outputs of a group, i: inputs, t: places
        right, g = self._grouped(kept, g, kron.right)
        if _is_matrix(kron.left):
            assert isinstance(kron.left, Tensor)
            left = torch.einsum("peo,bneot->bnept", kron.left.unflatten(1, (self.module.groups, -1)), g)
            return torch.einsum("bnept,bneqt->bpq", left, right)
        G = torch.einsum("bneot,bneit->beoi", g, right).flatten(1, 2)
        return G if kron.left is None else G * _diagonal(kron.left)[:, None]


@dataclass(frozen=True, eq=False)
class Embedding(Layer):
    """`y = scale W[id]`: the left factor is the one-hot of the id, so `L` is indexed, never multiplied."""

    padding: int | None = None
    scale: Tensor | float = 1.0

    def keep(self, x: Tensor, right: Side) -> Tensor:
        return x

    def _right(self, ids: Tensor, g: Tensor, right: Side) -> Tensor:
        g = g * torch.as_tensor(self.scale, dtype=g.dtype, device=g.device)
        if self.padding is not None:
            g = g.masked_fill((ids == self.padding)[..., None], 0)
        return apply_side(right, g)

    def contract(self, kept: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        right = self._right(kept, g, kron.right)
        if _is_matrix(kron.left):
            assert isinstance(kron.left, Tensor)
            return _outer(F.embedding(kept, kron.left.T), right, tokens)
        if kron.left is not None:
            right = right * _diagonal(kron.left)[kept][..., None]
        lead = kept.shape if tokens else kept.shape[:1]
        count = prod(lead)
        ids = kept.reshape(count, -1)
        flat = ids + self.out_features * torch.arange(count, device=ids.device)[:, None]
        G = right.new_zeros(count * self.out_features, right.shape[-1])
        G.index_add_(0, flat.flatten(), right.flatten(0, -2))
        return G.view(*lead, self.out_features, -1)

    def prefers_factors(self, g: Tensor, kron: Kron, queries: int, unit: bool, tokens: bool) -> bool:
        return not (_is_matrix(kron.left) or _is_matrix(kron.right))

    def score(self, kept: Tensor, g: Tensor, kron: Kron, queries: Tensor, unit: bool, tokens: bool) -> Tensor:
        """Rows of the queries are looked up; two positions meet in the norm where their ids are the same."""
        right = self._right(kept, g, kron.right)
        if kron.left is not None:
            right = right * _diagonal(kron.left)[kept][..., None]
        ids, right = kept.reshape(*kept.shape[: 2 if tokens else 1], -1), _positions(right, tokens)
        dots = [(query[ids] * right).sum((-2, -1)) for query in queries]
        if not unit:
            return torch.stack(dots, -1)
        right, scale = _scaled(right)
        same = ids[..., :, None] == ids[..., None, :]
        return torch.stack([*dots, _root((right @ right.mT) * same) * scale], -1)


@dataclass(frozen=True, eq=False)
class NormScale(Layer):
    """The elementwise scale (and shift) of a normalisation, `y = w n(x) + b`: `G = sum_t [g_t n(x_t), g_t]`.

    `n(x)` is read off the module itself as `y(w=1, b=0) - y(w=0, b=0)`, so that every variant counts, Gemma's
    `(1 + w) n(x)` too.
    """

    module: nn.Module
    channels_first: bool = False
    """Whether features are axis 1 (BatchNorm, GroupNorm), not the last ones (LayerNorm, RMSNorm)."""

    def keep(self, x: Tensor, right: Side) -> Tensor:
        own = dict(self.module._parameters)
        ones, zeros = (make(own["weight"]) for make in (torch.ones_like, torch.zeros_like))  # pyright: ignore
        changed: dict = self.module._parameters
        try:
            if own.get("bias") is not None:
                changed["bias"] = zeros
            changed["weight"] = ones
            one = self.module.forward(x)
            changed["weight"] = zeros
            normalised = one - self.module.forward(x)
        finally:
            changed.update(own)
        return normalised.movedim(1, -1) if self.channels_first else normalised

    def contract(self, kept: Tensor, g: Tensor, kron: Kron, tokens: bool) -> Tensor:
        shape = (*kept.shape[: 2 if tokens else 1], -1, self.out_features)
        kept, g = kept.reshape(shape).to(g.dtype), g.reshape(shape)
        columns = [(g * kept).sum(-2)] + ([g.sum(-2)] if self.bias else [])
        return kron(torch.stack(columns, -1))


@dataclass(frozen=True, eq=False)
class Experts(Layer):
    """The weights of a mixture's experts in one parameter `[experts, O, I]`; the block has their rows.

    A call is ragged: each row has its example and its expert (`ExpertRouting`).
    """

    experts: int
    transposed: bool = False

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.mT if self.transposed else weight
        return super().block(weight, None if bias is None else bias.flatten(1))

    def keep(self, x: Tensor, right: Side) -> Tensor:
        return Linear(0, 0, self.bias).keep(x, right)

    def contract_ragged(self, kept: Tensor, g: Tensor, kron: Kron, where: ExpertRouting) -> Tensor:
        """`L G Rᵀ` of every example; rows of `kept` and `g` are those of `where`."""
        size = self.out_features // self.experts
        if not _is_matrix(kron.right) and self.bias:
            kept = _with_one(kept)
        right = kept if _is_matrix(kron.right) else apply_side(kron.right, kept)
        left = g
        if kron.left is not None and kron.left.ndim == 1:
            left = g * _diagonal(kron.left).view(self.experts, size)[where.experts]
        elif isinstance(kron.left, Tensor):
            by_expert = kron.left.T.reshape(self.experts, size, -1)
            left = g.new_empty(len(g), by_expert.shape[-1])
            for expert in where.experts.unique().tolist():
                mine = where.experts == expert
                left[mine] = g[mine] @ by_expert[expert]
        projected = _is_matrix(kron.left)
        owners = where.examples if projected else where.examples * self.experts + where.experts
        count = where.batch * (1 if projected else self.experts)
        G = g.new_zeros(count, left.shape[-1], right.shape[-1])
        for owner in owners.unique().tolist():
            mine = owners == owner
            G[owner] = left[mine].T @ right[mine]
        return G.view(where.batch, -1, right.shape[-1])


@dataclass(frozen=True, eq=False)
class BareParameter(Layer):
    """A parameter of any shape, `[first axis, rest]`, that no layer kind knows."""
