"""Scores of rows against queries, on the fly or from rows at hand, and their streamed top-k.

One convention of sign everywhere: a positive score is a proponent, a training step on that row lowers the
query's loss.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.data import offsets_of
from gradfn.engine.engine import Engine, probe_engine
from gradfn.engine.stream import (
    TOKEN_BATCH_SIZE,
    Progress,
    collect,
    result_numbers,
    results_per_row,
    stream_to_host,
)
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.model.losses import causal_lm_loss
from gradfn.model.sites import View
from gradfn.transforms import Dot, SelfDot, Transform, chain, dot, unit_normalize
from gradfn.transforms.precondition import Rotate, RotateFlat, precondition
from gradfn.types import Blocks, Data, LossFn

Norm = Literal["none", "cosine", "relative"]


@dataclass(frozen=True)
class Method:
    """An attribution method: `score(z, q) = <train(grad z), query(grad q)>`, in the geometry of a curvature.

    With a curvature H, an inner product takes `H^-1` on the query alone; a cosine takes `H^-1/2` on
    both sides and the norm after it. The rows are only rotated into the eigenbasis; powers and dampings are
    in what they are compared with, so several dampings cost one pass.

    Args:
        train: what is done to the gradients of training rows, before any curvature.
        query: what is done to the gradients of queries, before any curvature.
        curvature: one spectrum a block, of what `train` and `query` give.
        damping: of the curvature; for several, scores come for each of them.
        norm: "cosine" instead of an inner product, taken in the geometry of the curvature if there is one;
            "relative" divides an inner product by `|H^-1 g|` of the row, which keeps outliers from being
            everyone's proponents (RelatIF).
        solve: instead of a curvature: any other map of the queries, all at once.

    Source: RelatIF: Barshan et al., arXiv:2003.11630, section 4.
    """

    train: Transform
    query: Transform
    curvature: Mapping[str, Spectrum] | None = field(default=None, repr=False)
    damping: tuple[Damping | None, ...] = (Damping(),)
    norm: Norm = "none"
    solve: Callable[[Blocks], Blocks] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.damping:
            raise InputError("a method needs one damping or more (None is the pseudo-inverse)")
        if self.curvature is None and len(self.damping) > 1:
            raise InputError("several dampings need a curvature: fit one")
        if self.curvature is not None and self.solve is not None:
            raise InputError("a method has a curvature or solves for its queries, not both: leave one out")

    def scorer(self, queries: Blocks, *, by_block: bool = False) -> Transform:
        """What turns gradients of training rows into scores `[rows, dampings * queries]`.

        Args:
            queries: gradients of the queries after `query`.
            by_block: keep each block's share apart, see `dot`.
        """
        H, queries = self.curvature, self.solve(queries) if self.solve else queries
        if H is None:
            queries = unit_normalize()(queries) if self.norm == "cosine" else queries
            return chain(self.train, Dot(queries, unit=self.norm != "none", by_block=by_block))
        if self.norm == "none":
            powers = [precondition(H, -1.0, damping)(queries) for damping in self.damping]
            return chain(self.train, dot(_joined(powers), by_block=by_block))
        rotate = chain(Rotate(H), RotateFlat(H))
        parts = [self._compared(rotate(queries), damping) for damping in self.damping]  # pyright: ignore
        targets, weights = (_joined([part[i] for part in parts]) for i in (0, 1))
        return chain(self.train, rotate, Dot(targets, unit=True, by_block=by_block, weights=weights))

    def _compared(self, queries: Blocks, damping: Damping | None) -> tuple[Blocks, Blocks]:
        """In the eigenbasis: what rows meet, and the weights of the numbers in their norm, `[1, ...]`.

        Cosine: `<W g, u> / |W g|`, `W = H^-1/2`, `u = W q / |W q|`. Relative: `<g, H^-1 q> / |H^-1 g|`.
        """
        assert self.curvature is not None
        power = -0.5 if self.norm == "cosine" else -1.0
        weights = {name: self.curvature[name].power(power, damping) for name in queries}
        targets = {name: G * weights[name].to(G) for name, G in queries.items()}
        if self.norm == "cosine":
            targets = {name: G * weights[name].to(G) for name, G in unit_normalize()(targets).items()}
        return targets, {name: w[None] for name, w in weights.items()}

    def self_scorer(self, *, by_block: bool = False) -> Transform:
        """What turns gradients of rows into their self-influence `<g, H^-1 g>`, `[rows, dampings]`.

        Raises:
            InputError: a method that solves for the queries at hand.
        """
        if self.solve is not None:
            raise InputError(
                "this method solves for given queries, so it has no self-influence: use ekfac, say"
            )
        if self.curvature is None:
            return chain(self.train, SelfDot(by_block=by_block))
        H = self.curvature
        powers = [{name: one.power(-0.5, d)[None] for name, one in H.items()} for d in self.damping]
        return chain(self.train, Rotate(H), RotateFlat(H), SelfDot(_joined(powers), by_block))


def _joined(parts: Sequence[Blocks]) -> Blocks:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class TopK(NamedTuple):
    """The best rows of every query, best first: their scores and row numbers, both `[queries, k]`."""

    scores: Tensor
    rows: Tensor


def score(
    model: nn.Module,
    train: Data,
    query: Data,
    *,
    method: Method,
    loss: LossFn | None = None,
    query_loss: LossFn | None = None,
    view: View | None = None,
    by_block: bool = False,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> Blocks | Float[Tensor, "rows queries"]:
    """Score every training row against every query, without keeping any row's gradient.

    Args:
        model: the module to attribute.
        train: training examples.
        query: query examples; their gradients are held in memory.
        method: what to do to both sides, `grad_dot(...)` or `grad_cosine(...)`.
        loss: the training rows' loss; None means next-token cross-entropy.
        query_loss: the queries' loss; None means `loss`.
        by_block: keep each module's (or, by the view, each head's) share of a score apart.
        view, token_batch_size, progress: see `collect`.

    Returns:
        float scores `[rows, queries]`; positive = proponent. For several dampings the queries of one come
        after those of the other, `[rows, dampings * queries]`. By block `{module path: [rows, queries]}`,
        which sums to them. Where the view is by token, a row is a token of a training row, as in `collect`.

    >>> from gradfn.methods import grad_dot
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> data = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> score(net, data, data, method=grad_dot(), loss=loss)
    tensor([[1., 0.],
            [0., 4.]])
    """
    queries = _queries(model, query, method, query_loss or loss, view, token_batch_size)
    return collect(
        model, train, method.scorer(queries, by_block=by_block), loss=loss, view=view,
        token_batch_size=token_batch_size, progress=progress,
    )  # fmt: skip


def _queries(
    model: nn.Module,
    query: Data,
    method: Method,
    loss: LossFn | None,
    view: View | None,
    token_batch_size: int,
) -> Blocks:
    """The queries' gradients; a query is an example, also where training rows are seen by token."""
    view = replace(view or View(), tokens=False)
    queries = collect(model, query, method.query, loss=loss, view=view, token_batch_size=token_batch_size)
    if not isinstance(queries, dict):
        raise TypeError("the method's query transform must give blocks, not scores")
    return on_device_of(model, queries)


def on_device_of(model: nn.Module, blocks: Blocks) -> Blocks:
    """Blocks on the device where the model's gradients are made."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in blocks.items()}


def dots(rows: Blocks, queries: Blocks) -> Float[Tensor, "rows queries"]:
    """Inner products of rows at hand with queries at hand, summed over blocks.

    >>> dots({"a": torch.eye(2)}, {"a": torch.tensor([[3.0, 4.0]])})
    tensor([[3.],
            [4.]])
    """
    return dot(queries)(rows)  # pyright: ignore[reportReturnType]


def top_k(chunks: Iterable[Tensor], k: int, *, largest: bool = True) -> TopK:
    """The `k` best rows of every query from a stream of chunks of the score matrix, in row order.

    Only `[queries, k]` numbers are kept. Equal scores keep the order of their rows.

    Args:
        chunks: consecutive rows of the score matrix.
        k: how many; fewer are returned where there are fewer rows.
        largest: proponents, highest first; False: opponents, lowest first.

    >>> top_k([torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0]])], 2).rows
    tensor([[1, 2]])
    """
    proponents, opponents = extremes(chunks, k)
    return proponents if largest else opponents


def extremes(chunks: Iterable[Tensor], k: int) -> tuple[TopK, TopK]:
    """The `k` highest and the `k` lowest rows of every query, in one pass over the chunks; see `top_k`.

    >>> proponents, opponents = extremes([torch.tensor([[1.0], [5.0], [-3.0]])], 1)
    >>> proponents.rows, opponents.rows
    (tensor([[1]]), tensor([[2]]))
    """

    def numbered() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for chunk in chunks:
            yield torch.arange(start, start + len(chunk)), chunk
            start += len(chunk)

    return _extremes(numbered(), k)


def extremes_of(
    engine: Engine,
    data: Data,
    k: int,
    *,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> tuple[TopK, TopK]:
    """The `k` highest and `k` lowest rows of an engine that gives scores; a batch of these is held at a time.

    Args:
        engine: its transform ends in `dot`; where its view is by token, a row is a token.
        data, token_batch_size, progress: see `stream`.
        k: how many of each.
    """
    offsets = offsets_of(results_per_row(engine, data))
    results = stream_to_host(engine, data, token_batch_size=token_batch_size, progress=progress)
    numbered = ((torch.from_numpy(result_numbers(rows, offsets)), scores) for rows, (scores, _) in results)
    return _extremes(numbered, k)  # pyright: ignore[reportArgumentType]


def _extremes(chunks: Iterable[tuple[Tensor, Tensor]], k: int) -> tuple[TopK, TopK]:
    """The highest and the lowest of chunks `(row numbers, scores [rows, queries])`, in whatever order."""
    if k < 1:
        raise InputError(f"top must be 1 or more, not {k}")
    highest: TopK | None = None
    lowest: TopK | None = None
    for rows, scores in chunks:
        highest = _extend(highest, scores, rows, k, largest=True)
        lowest = _extend(lowest, scores, rows, k, largest=False)
    if highest is None or lowest is None:
        raise InputError("no rows to rank")
    return highest, lowest


def _extend(kept: TopK | None, chunk: Tensor, rows: Tensor, k: int, largest: bool) -> TopK:
    """The best of those kept and of a chunk; equal scores stand in the order of their rows."""
    by_row = rows.argsort()
    new = _first(TopK(chunk[by_row].T, rows[by_row].expand(chunk.shape[1], -1)), k, largest)
    if kept is None:
        return new
    scores, rows = torch.cat([kept.scores, new.scores], 1), torch.cat([kept.rows, new.rows], 1)
    by_row = rows.argsort(dim=1)
    return _first(TopK(scores.gather(1, by_row), rows.gather(1, by_row)), k, largest)


def _first(ranked: TopK, k: int, largest: bool) -> TopK:
    """The best of candidates in the order of their rows."""
    order = ranked.scores.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return TopK(ranked.scores.gather(1, order), ranked.rows.gather(1, order))


def best(
    model: nn.Module,
    train: Data,
    query: Data,
    k: int,
    *,
    method: Method,
    loss: LossFn | None = None,
    query_loss: LossFn | None = None,
    view: View | None = None,
    token_batch_size: int = TOKEN_BATCH_SIZE,
    progress: Progress | None = None,
) -> tuple[TopK, TopK]:
    """The `k` strongest proponents and the `k` strongest opponents of every query, in one pass.

    Equal to `extremes([score(...)], k)`, but only one batch of scores is held at a time, so any number of
    rows will do. Where the view is by token, a row is a token of a training row, as in `score`.

    Args:
        k: how many of each; fewer are returned where there are fewer rows.
        model, train, query, method, loss, query_loss, view, token_batch_size, progress: see `score`.

    Returns:
        Proponents, highest first, and opponents, lowest first.

    >>> from gradfn.methods import grad_dot
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> data = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> best(net, data, data, 1, method=grad_dot(), loss=loss)[0].rows
    tensor([[0],
            [1]])
    """
    if k < 1:
        raise InputError(f"top must be 1 or more, not {k}")
    if not len(train):
        raise InputError("the data has no rows: give at least one example")
    queries = _queries(model, query, method, query_loss or loss, view, token_batch_size)
    engine = probe_engine(model, loss or causal_lm_loss(model), method.scorer(queries), view=view)
    return extremes_of(engine, train, k, token_batch_size=token_batch_size, progress=progress)
