"""Scores of rows against queries, on the fly or from rows at hand, and their streamed top-k.

One convention of sign everywhere: a positive score is a proponent, a training step on that row lowers the
query's loss.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.layers import View
from gradfn.losses import causal_lm_loss
from gradfn.probes import probe_engine
from gradfn.stream import TOKEN_BATCH_SIZE, Progress, collect, stream
from gradfn.transforms import Transform, chain, dot
from gradfn.types import Blocks, Data, LossFn


@dataclass(frozen=True)
class Method:
    """An attribution method: `score(z, q) = <train(grad z), query(grad q)>`.

    Args:
        train: what is done to the gradients of training rows.
        query: what is done to the gradients of queries.
    """

    train: Transform
    query: Transform


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
        float scores `[rows, queries]`; positive = proponent. By block `{module path: [rows, queries]}`, which
        sums to them. Where the view is by token, a row is a token of a training row, as in `collect`.

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
        model, train, chain(method.train, dot(queries, by_block=by_block)), loss=loss, view=view,
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
    if k < 1:
        raise InputError(f"top must be 1 or more, not {k}")
    highest: TopK | None = None
    lowest: TopK | None = None
    start = 0
    for chunk in chunks:
        rows = torch.arange(start, start + len(chunk))
        highest = _extend(highest, chunk, rows, k, largest=True)
        lowest = _extend(lowest, chunk, rows, k, largest=False)
        start += len(chunk)
    if highest is None or lowest is None:
        raise InputError("no rows to rank")
    return highest, lowest


def _extend(best: TopK | None, chunk: Tensor, rows: Tensor, k: int, largest: bool) -> TopK:
    """The best of those kept and of a chunk; equal scores stand in the order of their rows."""
    scores, rows = chunk.T, rows.expand(chunk.shape[1], -1)
    if best is not None:
        scores, rows = torch.cat([best.scores, scores], 1), torch.cat([best.rows, rows], 1)
    by_row = rows.argsort(dim=1)
    scores, rows = scores.gather(1, by_row), rows.gather(1, by_row)
    order = scores.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return TopK(scores.gather(1, order), rows.gather(1, order))


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
    rows will do.

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
    view = view or View()
    if view.tokens:
        raise InputError("the best rows are examples: view them by example, and the best of them by token")
    queries = _queries(model, query, method, query_loss or loss, view, token_batch_size)
    engine = probe_engine(model, loss or causal_lm_loss(model), chain(method.train, dot(queries)), view=view)
    highest: TopK | None = None
    lowest: TopK | None = None
    for numbers, result in stream(engine, train, token_batch_size=token_batch_size, progress=progress):
        assert isinstance(result.values, Tensor)
        scores, rows = result.values.cpu(), torch.from_numpy(numbers)
        highest = _extend(highest, scores, rows, k, largest=True)
        lowest = _extend(lowest, scores, rows, k, largest=False)
    assert highest is not None
    assert lowest is not None
    return highest, lowest
