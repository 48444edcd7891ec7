"""From modules to gradients: which weights get a block, and how each kind of layer makes it.

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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from operator import attrgetter
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.heads import Heads, heads_of
from gradfn.kron import Kron, Side, apply_side
from gradfn.maps import Map
from gradfn.types import Blocks, BlockSpec


@dataclass(frozen=True, eq=False)
class Where:
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
        G = weight.reshape(len(weight), self.out_features, self.in_features)
        return G if bias is None else torch.cat([G, bias[..., None]], -1)

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
        """Inner products with `queries [n, out, in]`, and the squared norm if `unit`, from the factors."""
        right, left = self.factors(kept, g, kron, tokens)
        dots = [((left @ query) * right).sum((-2, -1)) for query in queries]
        norms = [((left @ left.mT) * (right @ right.mT)).sum((-2, -1))] if unit else []
        return torch.stack(dots + norms, -1)


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
        same = ids[..., :, None] == ids[..., None, :]
        norms = [((right @ right.mT) * same).sum((-2, -1))] if unit else []
        return torch.stack(dots + norms, -1)


@dataclass(frozen=True, eq=False)
class Scale(Layer):
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

    A call is ragged: each row has its example and its expert (`Where`).
    """

    experts: int
    transposed: bool = False

    def block(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.mT if self.transposed else weight
        return super().block(weight, None if bias is None else bias.flatten(1))

    def keep(self, x: Tensor, right: Side) -> Tensor:
        return Linear(0, 0, self.bias).keep(x, right)

    def contract_ragged(self, kept: Tensor, g: Tensor, kron: Kron, where: Where) -> Tensor:
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
class Bare(Layer):
    """A parameter of any shape, `[first axis, rest]`, that no layer kind knows."""


Tap = Callable[..., Tensor]
"""`tap(weight name, x, y, ...) -> y`: puts the probes of one weight behind `y`."""

Attach = Callable[[nn.Module, Tap], Callable[[], None]]
"""Lets a module call its tap whenever it uses a weight; gives the function that undoes it."""


def attach_hook(module: nn.Module, tap: Tap) -> Callable[[], None]:
    """Tap a module whose output is its weight's: by a forward hook."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor) -> Tensor:
        return tap("weight", args[0] if args else next(iter(named.values())), y)

    return module.register_forward_hook(hook, with_kwargs=True).remove


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that gets a block (or a part of it, an attention head's).

    Args:
        path: the module's path in the model (the parameter's, where a module has several weights).
        block: the name of its block: its own path ("root" for the model itself), or that of the first module
            with the same weight.
        module: the module itself.
        layer: how the block comes about.
        parameter, bias: the names of the weight and of the bias in the module.
        attach: how the module is tapped.
    """

    path: str
    block: str
    module: nn.Module
    layer: Layer
    parameter: str = "weight"
    bias: str = "bias"
    attach: Attach = field(default=attach_hook, repr=False)
    names: tuple[str, ...] = ()
    """The weight's name among the model's parameters, and the bias's."""
    probed: bool = True
    """Whether a probe sees it; otherwise its gradient is `vmap(grad)` of the parameter alone."""

    @property
    def weight(self) -> Tensor:
        """The weight, as stored."""
        return attrgetter(self.parameter)(self.module)

    @property
    def own_bias(self) -> Tensor | None:
        """The bias, where the block has one."""
        return attrgetter(self.bias)(self.module) if self.layer.bias else None

    @property
    def spec(self) -> BlockSpec:
        """The block's name, shape (bias column included), device and statistics dtype."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        shape = (self.layer.out_features, self.layer.in_features + self.layer.bias)
        return BlockSpec(self.block, shape, self.weight.device, dtype)


def _attach_channels_first(module: nn.Module, tap: Tap) -> Callable[[], None]:
    """Tap a normalisation over axis 1: its tap sees the features last."""
    return attach_hook(module, lambda name, x, y: tap(name, x, y.movedim(1, -1)).movedim(-1, 1))


def _attach_attention(module: Any, tap: Tap) -> Callable[[], None]:
    """Tap the functional projections inside nn.MultiheadAttention, which keeps the batch on axis 1."""
    own: dict[int, tuple[str, int]] = {}
    linear = F.linear
    width = module.embed_dim
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = module._parameters.get(name)
        if weight is not None:
            starts = (0, width, 2 * width) if name == "in_proj_weight" else (0,)
            own |= {weight[start].data_ptr(): (name, start) for start in starts}  # pyright: ignore
    own[module.out_proj.weight.data_ptr()] = ("out_proj.weight", 0)  # pyright: ignore

    def tapped(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        found = own.get(weight.data_ptr())
        if found is None:
            return y
        name, start = found
        if name == "out_proj.weight":  # [tokens * batch, features]
            x, flat = x.unflatten(0, (-1, batch[0])), y.unflatten(0, (-1, batch[0]))
            return tap(name, x.movedim(1, 0), flat.movedim(1, 0)).movedim(0, 1).flatten(0, 1)
        batch[0] = x.shape[1]
        return tap(name, x.movedim(1, 0), y.movedim(1, 0), rows=(start, start + len(weight))).movedim(0, 1)

    batch = [1]
    forward = module.forward

    def patched(*args: Any, **named: Any) -> Any:
        with patch.object(F, "linear", tapped):
            return forward(*args, **named)

    module.forward = patched
    return lambda: delattr(module, "forward")


def _attach_experts(module: Any, tap: Tap) -> Callable[[], None]:
    """Tap HF's fused experts: the same sums as their forward's, with the rows of all experts side by side."""

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        chosen = top_k_index.flatten()
        tokens = torch.arange(len(hidden), device=hidden.device).repeat_interleave(top_k_index.shape[-1])
        real = chosen < module.num_experts  # some mixtures mark dropped tokens by one expert more
        order = chosen.masked_fill(~real, module.num_experts).argsort(stable=True)[: int(real.sum())]
        experts, tokens, weights = chosen[order], tokens[order], top_k_weights.flatten()[order]

        def apply(name: str, x: Tensor) -> Tensor:
            weight, bias = module.get_parameter(name), module._parameters.get(f"{name}_bias")
            parts = []
            for expert, part in zip(*_runs(experts, x), strict=True):
                own = weight[expert].T if getattr(module, "is_transposed", False) else weight[expert]
                parts.append(F.linear(part, own, None if bias is None else bias[expert]))
            return tap(name, x, torch.cat(parts), ragged=(tokens, experts, len(hidden)))

        if getattr(module, "has_gate", True):
            inner = apply("gate_up_proj", hidden[tokens])
            gate = getattr(module, "_apply_gate", None)
            if gate is None:
                first, second = inner.chunk(2, dim=-1)
                inner = module.act_fn(first) * second  # pyright: ignore[reportCallIssue]
            else:
                inner = gate(inner)
        else:
            inner = module.act_fn(apply("up_proj", hidden[tokens]))  # pyright: ignore[reportCallIssue]
        outer = apply("down_proj", inner) * weights[:, None]
        return torch.zeros_like(hidden).index_add(0, tokens, outer.to(hidden.dtype))

    module.forward = forward
    return lambda: delattr(module, "forward")


def _runs(experts: Tensor, x: Tensor) -> tuple[list[int], Sequence[Tensor]]:
    """The rows of `x` by expert; `experts` is sorted."""
    present, counts = experts.unique_consecutive(return_counts=True)
    return present.tolist(), x.split(counts.tolist())


def _linear(path: str, module: nn.Module) -> list[Site]:
    if not isinstance(module, nn.Linear):
        return []
    layer = Linear(module.out_features, module.in_features, module.bias is not None)
    return [Site(path, path, module, layer)]


def _hf_conv1d(path: str, module: nn.Module) -> list[Site]:
    # By name: transformers must not be imported to look at a model that does not use it.
    if type(module).__name__ != "Conv1D" or type(module).__module__ != "transformers.pytorch_utils":
        return []
    fan_in, fan_out = module.get_parameter("weight").shape
    return [Site(path, path, module, Linear(fan_out, fan_in, bias=True, transposed=True))]


def _conv(path: str, module: nn.Module) -> list[Site]:
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return []
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    fan_in = module.in_channels // module.groups * prod(module.kernel_size)
    return [Site(path, path, module, Conv(module.out_channels, fan_in, module.bias is not None, module))]


def _embedding(path: str, module: nn.Module) -> list[Site]:
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
        return []
    scaled = type(module).__name__.endswith("ScaledWordEmbedding")
    if type(module).forward is not nn.Embedding.forward and not scaled:
        return []
    scale: Any = getattr(module, "embed_scale", 1.0) if scaled else 1.0
    layer = Embedding(module.num_embeddings, module.embedding_dim, False, module.padding_idx, scale)
    return [Site(path, path, module, layer)]


CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def _norm(path: str, module: nn.Module) -> list[Site]:
    own = {name: p for name, p in module.named_parameters(recurse=False)}
    first = isinstance(module, CHANNEL_NORMS)
    named = type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
    if not (first or named) or "weight" not in own or own.keys() - {"weight", "bias"}:
        return []
    layer = Scale(own["weight"].numel(), 1, "bias" in own, module, first)
    return [Site(path, path, module, layer, attach=_attach_channels_first if first else attach_hook)]


def _attention(path: str, module: nn.Module) -> list[Site]:
    """q, k and v of nn.MultiheadAttention get a block each, as does the output projection."""
    if not isinstance(module, nn.MultiheadAttention):
        return []
    width, sites = module.embed_dim, []
    bias = module.in_proj_bias is not None
    for number, name in enumerate("qkv"):
        fused = module.in_proj_weight is not None
        weight = "in_proj_weight" if fused else f"{name}_proj_weight"
        fan_in = module.get_parameter(weight).shape[1]
        first = number * width
        rows = torch.arange(first, first + width)
        layer = AttentionInput(width, fan_in, bias, rows=rows, first=0 if fused else first)
        where = f"{path}.in_proj[{name}]".lstrip(".")
        sites.append(Site(where, where, module, layer, weight, "in_proj_bias", _attach_attention))
    out = f"{path}.out_proj".lstrip(".")
    layer = Linear(width, width, module.out_proj.bias is not None)
    return [*sites, Site(out, out, module, layer, "out_proj.weight", "out_proj.bias", _attach_attention)]


def _experts(path: str, module: nn.Module) -> list[Site]:
    own = dict(module.named_parameters(recurse=False))
    weights = [name for name in ("gate_up_proj", "up_proj", "down_proj") if name in own]
    fused = "down_proj" in weights and len(weights) == 2 and hasattr(module, "num_experts")
    if not fused or any(own[name].ndim != 3 for name in weights):
        return []
    transposed, sites = getattr(module, "is_transposed", False), []
    for name in weights:
        count, fan_out, fan_in = own[name].shape
        fan_out, fan_in = (fan_in, fan_out) if transposed else (fan_out, fan_in)
        bias = f"{name}_bias"
        layer = Experts(count * fan_out, fan_in, bias in own, count, transposed)
        where = f"{path}.{name}".lstrip(".")
        sites.append(Site(where, where, module, layer, name, bias, _attach_experts))
    return sites


ADAPTERS: tuple[Callable[[str, nn.Module], list[Site]], ...] = (
    _linear, _hf_conv1d, _conv, _embedding, _norm, _attention, _experts,
)  # fmt: skip
"""What turns a module into sites; the first that answers wins."""


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path or "root", pattern) for pattern in patterns)


def output_head(model: nn.Module) -> nn.Module | None:
    """The model's LM head, where it has one (`get_output_embeddings` of HF models).

    >>> output_head(nn.Linear(2, 2)) is None
    True
    """
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None  # pyright: ignore[reportReturnType]


def all_sites(model: nn.Module) -> tuple[Site, ...]:
    """Every weight that can have a block; parameters that no layer kind knows stand for themselves.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> [(site.path, type(site.layer).__name__) for site in all_sites(net)]
    [('0', 'Linear'), ('1', 'Scale')]
    """
    sites = [site for path, module in model.named_modules() for site in _adapt(path, module)]
    known = {id(p) for site in sites for p in _parameters(site)}
    bare = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in known:
                known.add(id(parameter))
                first = parameter.shape[0] if parameter.ndim else 1
                layer = Bare(first, parameter.numel() // max(first, 1), False)
                where = f"{path}.{name}".lstrip(".")
                bare.append(Site(where, where, module, layer, name, probed=False))
    inner = {id(site.module.out_proj) for site in sites if isinstance(site.module, nn.MultiheadAttention)}
    names = {id(p): name for name, p in model.named_parameters()}
    return tuple(
        replace(site, names=tuple(names[id(p)] for p in _parameters(site)))
        for site in (*sites, *bare)
        if id(site.module) not in inner
    )


def _adapt(path: str, module: nn.Module) -> list[Site]:
    return next((sites for adapter in ADAPTERS if (sites := adapter(path, module))), [])


def _parameters(site: Site) -> list[Tensor]:
    own = site.own_bias
    return [site.weight] if own is None else [site.weight, own]


def _is_default(site: Site, head: nn.Module | None, adapters: bool) -> bool:
    """Weight matrices but the LM head and embeddings; of a model with PEFT adapters, these alone."""
    if adapters and "lora_" not in site.path:
        return False
    return isinstance(site.layer, Linear | Conv | Experts) and site.module is not head


@dataclass(frozen=True)
class View:
    """Which gradients to look at, and how finely.

    Unless told otherwise: all weight matrices (linear layers, convolutions, experts) with their biases, but
    neither the LM head nor embeddings nor norms; of a model with PEFT adapters, the adapters alone.

    Args:
        include: globs over module paths; what matches one is taken, whatever it is: `"*"` is everything.
        exclude: globs over module paths; what matches one is left out.
        heads: give every attention head a block of its own, `path[head]`: True finds the heads by the model's
            config, a mapping from globs over module paths declares them.
        tokens: give every token a row of its own; its rows sum to the example's.

    >>> View(exclude=["*.mlp.*"], tokens=True).settings()
    {'include': [], 'exclude': ['*.mlp.*'], 'heads': False, 'tokens': True}
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    heads: bool | Mapping[str, Heads] = False
    tokens: bool = False

    def settings(self) -> dict[str, Any]:
        """What a store records of it."""
        heads = self.heads if isinstance(self.heads, bool) else {k: repr(v) for k, v in self.heads.items()}
        return {
            "include": list(self.include),
            "exclude": list(self.exclude),
            "heads": heads,
            "tokens": self.tokens,
        }


def find_sites(model: nn.Module, view: View | None = None) -> tuple[Site, ...]:
    """Find the weights that get a block.

    Args:
        model: any module.
        view: which; None is the default of `View`.

    Raises:
        InputError: nothing is left, a chosen weight is used where it has no block too, or there are no heads.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> [site.spec.shape for site in find_sites(net)]
    [(4, 4), (2, 5)]
    """
    view = view or View()
    include, exclude = view.include, view.exclude
    head, adapters = output_head(model), hasattr(model, "peft_config")
    found = all_sites(model)
    chosen = [
        site
        for site in found
        if (_matches(site.path, include) if include else _is_default(site, head, adapters))
        and not _matches(site.path, exclude)
    ]
    if not chosen:
        paths = ", ".join(site.path or "root" for site in found[:8]) or "none"
        raise InputError(
            f"no layer is left to attribute with include={list(include)} exclude={list(exclude)}: "
            f"the model's layers are {paths}{', ...' if len(found) > 8 else ''}"
        )
    _refuse_shared_elsewhere(model, chosen)
    shared = _share_blocks(chosen)
    return _split_heads(model, shared, view.heads) if view.heads else shared


def _refuse_shared_elsewhere(model: nn.Module, sites: Sequence[Site]) -> None:
    """A weight's gradient is whole only when every module that uses it has a site."""
    ours = {id(site.module) for site in sites}
    weights = {id(site.weight): site.path or "root" for site in sites}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) not in weights or id(module) in ours:
                continue
            if isinstance(module, NotCalled):
                continue
            site, other = weights[id(parameter)], f"{path}.{name}"
            raise InputError(
                f"the weight of {site} is also {other}, which is not among the attributed layers, so its "
                f"gradient would be incomplete: --include {path} too, or --exclude {site}"
            )


NotCalled = nn.modules.linear.NonDynamicallyQuantizableLinear
"""The output projection of nn.MultiheadAttention, which only lends it its weight."""


def _share_blocks(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Give modules with the same weight one block, named after the first; biases of their own apart."""
    groups: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        part = site.path if isinstance(site.layer, AttentionInput) else ""
        groups.setdefault((id(site.weight), part), []).append(site)
    shared = []
    for site in sites:
        part = site.path if isinstance(site.layer, AttentionInput) else ""
        group = groups[id(site.weight), part]
        site = replace(site, block=group[0].path or "root")
        if all(other.own_bias is group[0].own_bias for other in group) or not site.layer.bias:
            shared.append(site)
        else:
            shared += [replace(site, layer=replace(site.layer, bias=False)), _bias_alone(site)]
    return tuple(shared)


def _bias_alone(site: Site) -> Site:
    """The site whose block is the bias column alone, `path[bias]`."""
    if not isinstance(site.layer, Linear):
        raise InputError(f"the bias of {site.path} cannot have a block of its own: --exclude {site.path}")
    none = torch.zeros(0, dtype=torch.long)
    path = site.path or "root"
    return replace(site, block=f"{path}[bias]", layer=replace(site.layer, columns=none, in_features=0))


def _split_heads(
    model: nn.Module, sites: Sequence[Site], declared: bool | Mapping[str, Heads]
) -> tuple[Site, ...]:
    """Give each attention head of the sites a site of its own; sites without heads stay as they are."""
    split, any_split = [], False
    for site in sites:
        if isinstance(declared, bool):
            found = heads_of(model, site.path)
        else:
            found = next((h for glob, h in declared.items() if fnmatchcase(site.path, glob)), None)
        if found is None:
            split.append(site)
            continue
        if not isinstance(site.layer, Linear):
            raise InputError(f"{site.path} is not a linear layer, so it has no attention heads")
        any_split = True
        split += _heads_of_site(site, site.layer, found)
    if not any_split:
        raise InputError(
            "no attention heads were found: declare them, heads={'*.q_proj': gf.Heads('rows', '(h d)', h=8)}"
        )
    return tuple(split)


def _heads_of_site(site: Site, layer: Linear, heads: Heads) -> list[Site]:
    width = layer.out_features if heads.side == "rows" else layer.in_features
    parts = []
    for name, index in heads.parts(width, site.path).items():
        if heads.side == "rows":
            rows = index if layer.rows is None else layer.rows[index]
            part = replace(layer, rows=rows, out_features=len(index))
        else:
            part = replace(layer, columns=index, in_features=len(index), bias=False)
        parts.append(replace(site, block=f"{site.block}[{name}]", layer=part))
    if heads.side == "columns" and layer.bias:
        parts.append(_bias_alone(site))
    return parts


def blocks_of(sites: Sequence[Site], grads: dict[str, Tensor]) -> Blocks:
    """Lay per-example gradients of parameters `[rows, *parameter]` out as blocks `[rows, out, in (+ 1)]`.

    >>> net = nn.Linear(3, 2)
    >>> grads = {"weight": torch.zeros(5, 2, 3), "bias": torch.zeros(5, 2)}
    >>> blocks_of(find_sites(net), grads)["root"].shape
    torch.Size([5, 2, 4])
    """
    blocks: Blocks = {}
    for site in sites:
        if site.block not in blocks:  # of a shared weight, the gradient is whole
            weight, *bias = (grads[name] for name in site.names)
            blocks[site.block] = site.layer.block(weight, bias[0] if bias and site.layer.bias else None)
    return blocks


def uncovered(model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
    """Name the parameters that no block covers, with their sizes; nothing is skipped in silence.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> uncovered(net, find_sites(net))
    {'1.weight': 4, '1.bias': 4}
    """
    covered = {id(parameter) for site in sites for parameter in _parameters(site)}
    return {name: p.numel() for name, p in model.named_parameters() if id(p) not in covered}
