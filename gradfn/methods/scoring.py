"""Scores of rows against queries, on the fly.

One convention of sign everywhere: a positive score is a proponent, a training step on that row lowers the
query's loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.data import check_rows, offsets_of
from gradfn.engine.stream import Progress, lengths_of, result_numbers, results_per_row, stream
from gradfn.errors import InputError
from gradfn.methods.attribution import Attribution, Queries, Scorer
from gradfn.methods.inner_product import EngineScorer, damping_names
from gradfn.methods.recipes import method_of
from gradfn.scores import SELF, Scores, TopK, extremes_of_parts
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.transforms import dot
from gradfn.types import Blocks, Data


def score(
    model: nn.Module | Subject,
    train: Data,
    query: Queries,
    *,
    method: Attribution | str,
    by_block: bool = False,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Scores:
    """Score every training row against every query, without keeping any row's gradient.

    Args:
        model: what is attributed: a `Subject`, or a module with a subject's `options` as keywords.
        train: training examples.
        query: query examples, whose gradients are held in memory, or these gradients; None: each row is
            scored against itself.
        method: how: `grad_dot(...)`, `influence(...)` or another, or its name, "ekfac", say, see `RECIPES`.
        by_block: keep each module's (or, by the view, each head's) share of a score apart, as `shares`.
        progress: called with the tokens done.
        options: `loss`, `query_loss`, `view`, `token_batch_size`; see `Subject`.

    Returns:
        `Scores`, `values [dampings, rows, queries]`; positive = proponent. Where the view is by token, a row
        is a token of a training row.

    >>> from gradfn.methods import grad_dot
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> data = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> score(net, data, data, method=grad_dot(), loss=loss).matrix
    tensor([[1., 0.],
            [0., 4.]])
    """
    subject = subject_of(model, **options)
    method = method_of(method, subject, train, query)
    dampings = damping_names(method)
    values, losses = method.scorer(subject, query, by_block=by_block)(train, progress=progress)
    shares = values if isinstance(values, dict) else {}
    total = sum(shares.values(), torch.zeros(())) if isinstance(values, dict) else values
    by_damping = {name: _by_damping(part, len(dampings)) for name, part in shares.items()}
    scores, queries = _by_damping(total, len(dampings)), names_of(query)
    if scores.shape[2] != len(queries):  # a joined attribution may be of other columns than the queries
        queries = [str(number) for number in range(scores.shape[2])]
    rows, documents, positions = names_of(train), None, None
    if subject.view.tokens:
        lengths = lengths_of(train)
        documents = torch.from_numpy(np.repeat(np.arange(len(train)), lengths))
        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
        rows = [rows[document] for document in documents.tolist()]
    losses = None if subject.view.tokens else losses
    return Scores(scores, rows, queries, dampings, documents, positions, by_damping, losses)


def _by_damping(values: Tensor, dampings: int) -> Float[Tensor, "dampings rows queries"]:
    return values.unflatten(1, (dampings, -1)).movedim(1, 0)


def names_of(examples: Queries) -> list[str]:
    """The names of examples, or of queries by their gradients: their ids, or else their numbers.

    >>> names_of([{}, {}]), names_of(None)
    (['0', '1'], ['self-influence'])
    """
    if examples is None:
        return [SELF]
    ids = getattr(examples, "ids", None)
    count = len(next(iter(examples.values()))) if isinstance(examples, dict) else len(examples)
    return [str(number) for number in range(count)] if ids is None else [str(name) for name in ids]


def dots(rows: Blocks, queries: Blocks) -> Float[Tensor, "rows queries"]:
    """Inner products of rows at hand with queries at hand, summed over blocks.

    >>> dots({"a": torch.eye(2)}, {"a": torch.tensor([[3.0, 4.0]])})
    tensor([[3.],
            [4.]])
    """
    return dot(queries)(rows)  # pyright: ignore[reportReturnType]


def _parts(
    scorer: Scorer, train: Data, progress: Progress | None
) -> Iterator[tuple[Tensor, Tensor | Blocks]]:
    """The numbers of some rows (tokens, where the view is by token) and their scores, a batch at a time.

    Of a scorer that is no engine these are all the rows at once.
    """
    if not isinstance(scorer, EngineScorer):
        values = scorer(train, progress=progress).values
        yield torch.arange(len(values if isinstance(values, Tensor) else next(iter(values.values())))), values
        return
    offsets, size = offsets_of(results_per_row(scorer.engine, train)), scorer.token_batch_size
    batches = stream(scorer.engine, train, token_batch_size=size, progress=progress, to_host=True)
    for rows, result in batches:
        yield torch.from_numpy(result_numbers(rows, offsets)), result.values


def extremes_of(
    scorer: Scorer, train: Data, k: int, *, progress: Progress | None = None
) -> tuple[TopK, TopK]:
    """The `k` highest and the `k` lowest rows of a scorer for every query.

    Of an inner product one batch of scores is held at a time, so any number of rows will do.

    Args:
        scorer: see `Attribution.scorer`; where the view is by token, a row is a token.
        train: training examples.
        k: how many of each.
        progress: called with the tokens done.
    """
    return extremes_of_parts(_parts(scorer, train, progress), k)  # pyright: ignore[reportArgumentType]


def best(
    model: nn.Module | Subject,
    train: Data,
    query: Data,
    k: int,
    *,
    method: Attribution | str,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> tuple[TopK, TopK]:
    """The `k` strongest proponents and the `k` strongest opponents of every query, in one pass.

    Equal to `extremes([score(...).matrix], k)`; of an inner product only one batch of scores is held at a
    time, so any number of rows will do. Where the view is by token, a row is a token of a training row.

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
    check_rows(train)
    if not len(train):
        raise InputError("the data has no rows: give at least one example")
    subject = subject_of(model, **options)
    scorer = method_of(method, subject, train, query).scorer(subject, query)
    return extremes_of(scorer, train, k, progress=progress)


def rerank(
    first: tuple[TopK, TopK],
    model: nn.Module | Subject,
    train: Data,
    query: Queries,
    k: int,
    *,
    method: Attribution | str,
    **options: Unpack[SubjectOptions],
) -> tuple[TopK, TopK]:
    """The `k` best and the `k` lowest of candidates that a cheaper search found, by another method.

    Scores of the candidates alone are computed, so a method without a projection costs no pass over all rows.
    `recall(tuple of the first search, what this gives)` says how much the order changed: where much did, more
    candidates may change it further.

    Args:
        first: proponents and opponents of a first search, `[queries, candidates]` each; those of both are
            candidates for both. The row -1 is none.
        k: how many of each.
        model, train, query, method, options: see `score`; the view is not by token.

    Returns:
        Proponents and opponents, `[queries, k]`; fewer where all queries have fewer candidates. A place
        without a row has the row -1 and an infinite score of the other sign.

    Raises:
        InputError: candidates of other queries than these, or rows that are tokens.

    >>> from gradfn.methods import grad_dot
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> data = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}, {"x": torch.ones(2)}]
    >>> found = TopK(torch.zeros(1, 2), torch.tensor([[0, 2]]))
    >>> rerank((found, found), net, data, data[1:2], 1, method=grad_dot(), loss=loss)[0]
    TopK(scores=tensor([[2.]]), rows=tensor([[2]]))
    """
    if k < 1:
        raise InputError(f"top must be 1 or more, not {k}")
    subject = subject_of(model, **options)
    if subject.view.tokens:
        raise InputError("candidates are re-ranked by example or by head, not by token: give another view")
    wanted = torch.cat([found.rows for found in first], 1)
    rows = wanted[wanted >= 0].unique()
    if not len(rows):
        raise InputError("there is no candidate to rank: let the first search find some")
    select = getattr(train, "select", None)
    chosen: Data = [train[row] for row in rows.tolist()] if select is None else select(rows.numpy())
    values = method_of(method, subject, train, query).scorer(subject, query)(chosen).values
    assert isinstance(values, Tensor)
    if values.shape[1] != len(wanted):
        raise InputError(
            f"the candidates are of {len(wanted)} queries, and these have {values.shape[1]} scores a row: "
            "give the queries that the first search had"
        )
    own = torch.zeros(len(rows), len(wanted), dtype=torch.bool)
    query_of, place = (wanted >= 0).nonzero(as_tuple=True)
    own[torch.searchsorted(rows, wanted[query_of, place]), query_of] = True
    return _ranked(values, rows, own, k, -torch.inf), _ranked(values, rows, own, k, torch.inf)


def _ranked(values: Float[Tensor, "rows queries"], rows: Tensor, own: Tensor, k: int, nothing: float) -> TopK:
    """The best of each query's own rows; what is not its own scores `nothing`."""
    k = min(k, int(own.sum(0).max()))
    both = extremes_of_parts([(rows, values.cpu().masked_fill(~own, nothing))], k)
    best = both[0] if nothing < 0 else both[1]
    return TopK(best.scores, best.rows.masked_fill(best.scores == nothing, -1))


def shares_of(
    scorer: Scorer, data: Data, asked: Mapping[int, Sequence[int]], *, progress: Progress | None = None
) -> dict[tuple[int, int], dict[str, float]]:
    """Each block's share of some scores; of an inner product no more than a batch is held.

    Args:
        scorer: made with `by_block`.
        data: the rows that are asked about, in the order of `asked`.
        asked: the queries (columns of the scores) of each row, by what to call the row.
        progress: called with the tokens done.

    Returns:
        `{(row, query): {block: share}}`.
    """
    rows, shares = list(asked), {}
    for numbers, values in _parts(scorer, data, progress):
        assert isinstance(values, dict)
        for place, row in enumerate(rows[number] for number in numbers.tolist()):
            for query in asked[row]:
                shares[row, query] = {name: float(v[place, query]) for name, v in values.items()}
    return shares
