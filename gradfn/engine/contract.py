"""From the factors of a layer to the cotangent of its slot: what a probe saves, and its pullback."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

import torch
from torch import Tensor

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.model.layers import Layer
from gradfn.model.sites import Site
from gradfn.transforms import Transform
from gradfn.transforms.lower import BlockPlan, Lowered, lower
from gradfn.transforms.row_sum import FactorSum


def lower_for(sites: Sequence[Site], transform: Transform, shared: Collection[str] = ()) -> Lowered:
    """Lower a transform for the blocks of sites, with maps as matrices where a layer takes no maps.

    Args:
        sites: from `find_sites`.
        transform: a chain or a single transform.
        shared: blocks whose weight is used more than once in a forward pass; see `lower`.
    """
    lowered = lower(transform, {site.block: site.spec for site in sites}.values(), frozenset(shared))
    matrices = {site.block for site in sites if not site.layer.takes_maps}
    plans = {n: plan.with_matrices() if n in matrices else plan for n, plan in lowered.plans.items()}
    return replace(lowered, plans=plans)


@dataclass(frozen=True, eq=False)
class Segments:
    """Examples that lie one after the other in one row of tokens, without padding.

    Args:
        index: the positions of each, `[examples, longest]`, among all tokens of the batch.
        real: which of these are tokens of the example and no padding.
        tokens: how many tokens the batch has.

    >>> packed = Segments.of([2, 1], 3)
    >>> packed.cut(torch.tensor([[[5.0], [6.0], [7.0]]]), "layer").squeeze(-1)
    tensor([[5., 6.],
            [7., 0.]])
    """

    index: Tensor
    real: Tensor
    tokens: int

    @classmethod
    def of(cls, lengths: Sequence[int], tokens: int, device: torch.device | None = None) -> "Segments":
        """Those of these lengths, from the first of a batch's tokens on."""
        sizes = torch.tensor(lengths, device=device)
        at = torch.arange(int(sizes.max()), device=device)
        real = at < sizes[:, None]
        return cls(torch.where(real, (sizes.cumsum(0) - sizes)[:, None] + at, 0), real, tokens)

    def cut(self, v: Tensor, path: str) -> Tensor:
        """`[examples, longest, ...]` of `[batch, tokens, ...]`, zeros for padding.

        Raises:
            InputError: the rows of `v` are not those tokens.
        """
        if v.ndim > 1 and v.shape[0] * v.shape[1] == self.tokens:
            v = v.flatten(0, 1)
        if len(v) != self.tokens:
            raise InputError(
                f"{path} has no row for each of the {self.tokens} tokens of a packed batch: exclude it, or "
                "train without packing"
            )
        real = self.real.reshape(*self.real.shape, *[1] * (v.ndim - 1))
        return torch.where(real, v[self.index], torch.zeros((), dtype=v.dtype, device=v.device))


@dataclass(frozen=True, eq=False)
class Contract:
    """How the input and output gradient of one call of a layer become the cotangent of the block's slot.

    Args:
        plan: the stages of the transform that run inside the backward pass.
        layer: the layer as this call uses it.
        path: of its module, for messages.
        size: how many examples the rows of the call belong to; None: the call is one example's.
        tokens: how many tokens an example has, if every token has a row of its own.
        counts: 1 at the positions that the loss supervises, `[batch, positions]`, for a statistic of factors.
        padded: whether positions without a gradient are padding, for a statistic of factors without `counts`.
        segments: of examples that are packed into one row of tokens.

    Raises:
        InputError: the layer has no gradient of each token, or no factors, and the plan needs them.
    """

    plan: BlockPlan
    layer: Layer
    path: str
    size: int | None = None
    tokens: int | None = None
    counts: Tensor | None = None
    padded: bool = False
    segments: Segments | None = None

    def __post_init__(self):
        if self.tokens is not None and not self.layer.by_token:
            raise no_tokens(self.path)
        if self.plan.of_factors is not None and not self.layer.has_factors:
            raise no_factors(self.path, self.plan.of_factors)

    @property
    def _projects_late(self) -> bool:
        """Whether the right side waits for the backward pass, because it does not make the input smaller."""
        right = self.plan.kron.right
        reduces = right is None or right.ndim < 2 or len(right) < right.shape[1]
        return self.layer.projects_late and not reduces

    def save_input(self, x: Tensor) -> Tensor:
        """What the backward pass needs of the input: its projection if that is smaller, else the input."""
        return self.layer.save_input(x, None if self._projects_late else self.plan.kron.right)

    def pullback(self, saved: Tensor, g: Tensor) -> Tensor:
        """The cotangent `inside(L (sum_t g_t x_tᵀ) Rᵀ)` of every example, or of every token."""
        plan, g = self.plan, g.to(self.plan.dtype)
        saved = saved.to(plan.dtype) if saved.is_floating_point() else saved
        if self.segments is not None:
            saved, g = self.segments.cut(saved, self.path), self.segments.cut(g, self.path)
        elif self.size is not None and not self.layer.ragged:
            saved, g = _by_example(saved, self.size), _by_example(g, self.size)
        if plan.reduces_first and self.tokens is None and self.layer.sums_rows_first:
            saved, g = saved[None], g[None]
        if self._projects_late:
            if self._block_is_cheaper(saved):
                return self._reduced(saved, g, late=True)
            saved = self.layer.project(saved, plan.kron.right)
        if plan.of_factors:
            return self._of_factors(plan.of_factors, *self.layer.factors(saved, g, plan.kron))
        tokens = self.tokens is not None
        if self.tokens is not None:
            saved, g = _by_token(saved, self.tokens, self.path), _by_token(g, self.tokens, self.path)
        share = plan.share
        if share and self.layer.prefers_factors(g, plan.kron, len(share.queries), share.unit, tokens):
            return self.layer.score(saved, g, plan.kron, share.queries, share.unit, tokens)
        return self._of_tokens(saved, g) if tokens else self._reduced(saved, g)

    def _reduced(self, saved: Tensor, g: Tensor, late: bool = False) -> Tensor:
        """The cotangent from dense blocks, a few rows' at a time; `late`: the Kron acts on the blocks."""
        plan, step = self.plan, self.plan.rows_at_once
        whole = step >= len(g) or self.layer.ragged
        made = []
        for x, part in [(saved, g)] if whole else zip(saved.split(step), g.split(step), strict=True):
            G = self.layer.contract(x, part, Kron() if late else plan.kron, tokens=False)
            made.append(plan.within(plan.kron(G) if late else G))
        if len(made) == 1:
            return made[0]
        return reduce(torch.add, made) if plan.reduces else torch.cat(made)

    def _of_tokens(self, saved: Tensor, g: Tensor) -> Tensor:
        """The cotangent of every token, from the dense blocks of a few tokens at a time."""
        plan, size = self.plan, g.shape[:2]
        step = max(1, min(size[1], plan.rows_at_once // size[0]))
        made = []
        for x, part in zip(saved.split(step, 1), g.split(step, 1), strict=True):
            G = self.layer.contract(x, part, plan.kron, tokens=True)
            within = plan.within(G.flatten(0, 1))
            made.append(within if plan.reduces else within.unflatten(0, G.shape[:2]))
        return reduce(torch.add, made) if plan.reduces else torch.cat(made, 1)

    def _block_is_cheaper(self, saved: Tensor) -> bool:
        """Whether a Kron costs less on the blocks of the examples than on the factors of their positions."""
        if self.plan.of_factors or self.plan.share or self.tokens is not None:
            return False
        out, into = self.layer.out_features, self.layer.in_features
        return prod(saved.shape[1:-1]) * (out + into) * max(out, into) > out * into * (out + into)

    def _of_factors(self, statistic: FactorSum, x: Tensor, g: Tensor) -> Tensor:
        """A statistic of the factors `[batch, positions, ...]`, over the positions that count."""
        counts = g.new_ones(x.shape[:2])
        if self.counts is not None and self.counts.shape == counts.shape:
            counts = self.counts.to(counts)
        elif self.padded and x.shape[1] > 1:
            counts = (g != 0).any(-1).to(counts)  # padding has no gradient
        if self.tokens is not None:
            x, g, counts = (_by_token(v, self.tokens, self.path) for v in (x, g, counts[..., None]))
            x, g, counts = x.flatten(0, 1)[:, None], g.flatten(0, 1)[:, None], counts.flatten(0, 1)
        return statistic.of(x, g, counts)[None]


def no_tokens(path: str) -> InputError:
    """What to raise where a weight has no gradient of each token."""
    return InputError(f"{path} has no gradient of each token: add '{path}' to `exclude`")


def no_factors(path: str, statistic: FactorSum) -> InputError:
    """What to raise where a weight has no factors to fit a statistic from."""
    return InputError(
        f"{path} has no input and output gradient of its own, which {statistic.noun} is fitted from: "
        f"add '{path}' to `exclude`"
    )


def _by_example(v: Tensor, size: int) -> Tensor:
    """Give every example of a batch a row: split rows that are tokens, repeat one that all examples share."""
    if len(v) == size:
        return v
    return v.expand(size, *v.shape[1:]) if len(v) == 1 else v.unflatten(0, (size, -1))


def _by_token(v: Tensor, tokens: int, path: str) -> Tensor:
    """`[batch, tokens, ...]`, from itself or from `[batch, 1, tokens, ...]`."""
    v = v.squeeze(1) if v.ndim > 2 and v.shape[1] == 1 != tokens else v
    if v.ndim < (3 if v.is_floating_point() else 2) or v.shape[1] != tokens:  # ids have no features
        raise no_tokens(path)
    return v
