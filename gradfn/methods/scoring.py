"""Scores of rows against queries, and their streamed top-k.

One convention of sign everywhere: a positive score is a proponent, a training step on that row lowers the
query's loss.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.data import offsets_of
from gradfn.engine.engine import Engine
from gradfn.engine.stream import Progress, result_numbers, results_per_row, stream_to_host
from gradfn.errors import InputError
from gradfn.methods.attribution import Attribution
from gradfn.methods.inner_product import EngineScorer
from gradfn.subject import TOKEN_BATCH_SIZE, Subject, SubjectOptions, subject_of
from gradfn.transforms import dot
from gradfn.types import Blocks, Data


class TopK(NamedTuple):
    """The best rows of every query, best first: their scores and row numbers, both `[queries, k]`."""

    scores: Tensor
    rows: Tensor


def score(
    model: nn.Module | Subject,
    train: Data,
    query: Data,
    *,
    method: Attribution,
    by_block: bool = False,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Blocks | Float[Tensor, "rows queries"]:
    """Score every training row against every query, without keeping any row's gradient.

    Args:
        model: what is attributed: a `Subject`, or a module with a subject's `options` as keywords.
        train: training examples.
        query: query examples; their gradients are held in memory.
        method: how, `grad_dot(...)` or `grad_cosine(...)`, say.
        by_block: keep each module's (or, by the view, each head's) share of a score apart.
        progress: called with the tokens done.
        options: `loss`, `query_loss`, `view`, `token_batch_size`; see `Subject`.

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
    scorer = method.scorer(subject_of(model, **options), query, by_block=by_block)
    return scorer(train, progress=progress).values


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
    model: nn.Module | Subject,
    train: Data,
    query: Data,
    k: int,
    *,
    method: Attribution,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> tuple[TopK, TopK]:
    """The `k` strongest proponents and the `k` strongest opponents of every query, in one pass.

    Equal to `extremes([score(...)], k)`; of an inner product only one batch of scores is held at a time, so
    any number of rows will do. Where the view is by token, a row is a token of a training row.

    Args:
        k: how many of each; fewer are returned where there are fewer rows.
        model, train, query, method, progress, options: see `score`.

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
    scorer = method.scorer(subject_of(model, **options), query)
    if isinstance(scorer, EngineScorer):
        size = scorer.token_batch_size
        return extremes_of(scorer.engine, train, k, token_batch_size=size, progress=progress)
    values = scorer(train, progress=progress).values
    assert isinstance(values, Tensor)
    return extremes([values], k)
