"""Inner products with queries, as the last stage of a chain."""

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.transforms.chain import Rowwise
from gradfn.transforms.normalize import inverse_norms, norms
from gradfn.types import Blocks


@dataclass(frozen=True, eq=False)
class Dot(Rowwise):
    """Scores of rows against queries; see `dot`.

    Inner products and squared norms are sums over blocks, so a block gives `[rows, queries (+ 1)]` numbers
    (`partial`) and the row needs only these (`finish`): no row of gradients is ever held.
    """

    queries: Blocks
    unit: bool = False
    by_block: bool = False
    weights: Blocks | None = None
    """Of the numbers in a row's norm, `[norms, ...]`: each norm is for its share of the queries, in order."""

    @property
    def linear_shares(self) -> bool:
        """Whether the shares are linear in the rows."""
        return not self.unit

    def partial(self, name: str, G: Float[Tensor, "rows *block"]) -> Float[Tensor, "rows k"]:
        """One block's share: inner products, and the norm where rows are to be unit."""
        if name not in self.queries:
            raise InputError(f"the queries have no block {name}: make rows and queries from the same layers")
        flat = G.flatten(1)
        query = self.queries[name].flatten(1).to(flat)
        if query.shape[1] != flat.shape[1]:
            raise InputError(
                f"a query's block {name} has {query.shape[1]} numbers, a row's {flat.shape[1]}: "
                "make both with the same transform"
            )
        dots = flat @ query.T
        if not self.unit:
            return dots
        return torch.cat([dots, _norms(flat, None if self.weights is None else self.weights[name])], 1)

    def finish(self, partials: Blocks) -> Blocks | Float[Tensor, "rows queries"]:
        """The sum over blocks (or each share), divided by the row's norm where rows are to be unit."""
        if extra := self.queries.keys() - partials.keys():
            raise InputError(
                f"the rows have no block {min(extra)}: make rows and queries from the same layers"
            )
        if not self.unit:
            return dict(partials) if self.by_block else reduce(torch.add, partials.values())
        count = 1 if self.weights is None else len(next(iter(self.weights.values())))
        scale = inverse_norms(norms(torch.stack([part[:, -count:] for part in partials.values()], -1)))
        shares = {
            name: (part[:, :-count].unflatten(1, (count, -1)) * scale[..., None]).flatten(1)
            for name, part in partials.items()
        }
        return shares if self.by_block else torch.stack(list(shares.values())).sum(0)

    def __call__(self, blocks: Blocks) -> Blocks | Tensor:
        return self.finish({name: self.partial(name, G) for name, G in blocks.items()})


@dataclass(frozen=True, eq=False)
class SelfDot(Rowwise):
    """`[rows, norms]`: squared norms of rows, `sum (w g)²` with weights `{block: [norms, ...]}`, or 1."""

    weights: Blocks | None = None
    by_block: bool = False
    linear_shares: ClassVar[bool] = False

    def partial(self, name: str, G: Float[Tensor, "rows *block"]) -> Float[Tensor, "rows k"]:
        """One block's share: its norm."""
        return _norms(G.flatten(1), None if self.weights is None else self.weights[name])

    def finish(self, partials: Blocks) -> Blocks | Float[Tensor, "rows norms"]:
        """The sum over blocks, or each share."""
        shares = {name: part.square() for name, part in partials.items()}
        return shares if self.by_block else torch.stack(list(shares.values())).sum(0)

    def __call__(self, blocks: Blocks) -> Blocks | Tensor:
        return self.finish({name: self.partial(name, G) for name, G in blocks.items()})


def _norms(
    flat: Float[Tensor, "rows n"], weights: Float[Tensor, "norms *block"] | None
) -> Float[Tensor, "rows norms"]:
    """`|w g|`; weighted before they are squared, for squares of powers of H leave float32's range."""
    if weights is None:
        return norms(flat)[:, None]
    return torch.stack([norms(flat * w) for w in weights.flatten(1).to(flat)], 1)


def dot(queries: Blocks, *, by_block: bool = False) -> Dot:
    """Score rows by their inner product with queries, `scores[b, q] = sum_blocks <row_b, query_q>`.

    Args:
        queries: `{block: [queries, ...]}`, the queries' gradients, transformed as the rows are.
        by_block: keep each block's share of the sum apart.

    Returns:
        A transform to `[rows, queries]`, or to `{block: [rows, queries]}`, which sums to it. Positive: a
        training step on the row lowers the query's loss.

    >>> dot({"a": torch.eye(2)})({"a": torch.tensor([[3.0, 4.0]])})
    tensor([[3., 4.]])
    """
    return Dot(queries, by_block=by_block)
