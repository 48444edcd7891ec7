"""Scores on disk: of rows that a model makes now, of scores at hand, and of gradients that are stored."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.methods.attribution import Attribution, Queries
from gradfn.methods.inner_product import InnerProduct, damping_names
from gradfn.methods.recipes import method_of
from gradfn.methods.scoring import names_of
from gradfn.runs.gradients import GRADIENTS, blocks_of, read_gradients
from gradfn.runs.output import Output, RunOptions, output_of
from gradfn.runs.provenance import Provenance, Settings, describe
from gradfn.runs.rows import RunRows, Summary, write_rows
from gradfn.runs.shards import Shard, shard_run
from gradfn.scores import KIND, SHARES, Columns
from gradfn.store import Overwrite, Store, open_part, open_store
from gradfn.subject import Subject
from gradfn.transforms import Transform
from gradfn.types import Blocks, Data, Rows

READ_BYTES = 256 << 20
"""What stored rows and their scores take at a time, unless told otherwise."""
RANKED_BYTES = 32
"""What a score takes: it is summed over blocks, copied once and compared, beside those of the part before."""


def score_run(
    run: str | Path,
    model: nn.Module | Subject,
    train: Data,
    queries: Queries | Callable[[], Queries],
    method: Attribution | str,
    *,
    by_block: bool = False,
    query_ids: Sequence[str] | None = None,
    query_texts: Sequence[str] = (),
    **options: Unpack[RunOptions],
) -> Summary:
    """Write the scores of every row against queries to `RUN/scores.h5`, which `Scores.load` reads.

    The file holds `/scores [rows, dampings, queries]`, float32, and what `build` writes beside the rows.

    Args:
        queries: query examples, or their gradients after the method's `query_transform`,
            `{block: [queries, ...]}`; None for the rows' self-influence; or a function that gives these,
            called where there are rows to score.
        method: see `score`.
        by_block: write each block's share of the scores too, `/scores_by/<block>`.
        query_ids: the names of the queries; None means those of the examples, or their numbers.
        query_texts: their texts, to be recognised by.
        run, model, train, options: see `build`.

    Raises:
        InputError: the directory holds scores made otherwise; a loss is not finite; more shards than rows;
            `query_ids` that are not as many as the queries.
    """
    output, subject = output_of(run, model, options)
    asked = queries if callable(queries) else lambda: queries
    method = method_of(method, subject, train, asked() if isinstance(method, str) else None)
    transform = method.row_transform if isinstance(method, InnerProduct) else None
    how: dict[str, Any] = {"by_block": by_block, "method": method.settings()}
    made = describe(subject, train, transform).merged(how).merged(output.settings)
    names = names_of(asked()) if query_ids is None else list(query_ids)
    columns = Columns(names, list(query_texts), damping_names(method))
    rows = RunRows(output, KIND, made, train, subject.view.tokens, columns.arrays())
    return write_rows(
        rows, lambda: method.scorer(subject, asked(), by_block=by_block),
        lambda values: _score_arrays(values, columns), subject.token_batch_size,
    )  # fmt: skip


def write_scores(
    run: str | Path,
    train: Data,
    result: Rows,
    columns: Columns,
    *,
    settings: Settings | Provenance,
    tokens: bool = False,
    overwrite: Overwrite = False,
    shard: Shard | None = None,
) -> Path:
    """Write scores at hand to `RUN/scores.h5`, with what lies beside the rows.

    Args:
        result: scores `[rows, dampings * queries]` and the rows' losses; of a shard, of its rows.
        columns: the queries and dampings that these are of.
        settings: all that the scores depend on.
        tokens: whether a row of the scores is a token.
        run, train, overwrite, shard: see `build`.
    """
    output, made = Output(run, overwrite=overwrite, shard=shard), Provenance.of(settings)
    rows = RunRows(output, KIND, made, train, tokens, columns.arrays())
    first, last = rows.span(rows.examples)
    with rows.open() as writer:
        arrays = {**_score_arrays(result.values, columns), **rows.arrays(rows.examples, result)}
        for start, stop in writer.missing([(first, last)]):
            part = {name: values[start - first : stop - first] for name, values in arrays.items()}
            writer.write(start, stop, part)
        return rows.finish(writer)


def _score_arrays(values: Blocks | Tensor, columns: Columns) -> Mapping[str, np.ndarray]:
    """Scores, and where they came by block the shares that they are the sum of, as a store holds them."""
    shares = values if isinstance(values, dict) else {}
    total = sum(values.values(), torch.zeros(())) if isinstance(values, dict) else values
    axes = len(columns.dampings), len(columns.query_ids)
    if total.shape[1] != axes[0] * axes[1]:
        raise InputError(
            f"a row has {total.shape[1]} scores, which is not {axes[1]} for each of {axes[0]} dampings: give "
            "as many `query_ids` as there are queries"
        )
    every = {KIND: total, **{SHARES + name: share for name, share in shares.items()}}
    return {name: scores.float().unflatten(1, axes).numpy() for name, scores in every.items()}


def stored_scores(
    store: Store, scorer: Transform, *, rows_per_chunk: int | None = None, memory: int | None = None
) -> Iterator[Tensor]:
    """Stream the scores of a store's rows against queries, chunk by chunk in row order: `[chunk, queries]`.

    Args:
        store: what `build` wrote.
        scorer: from stored rows to scores, an inner product's `against`.
        rows_per_chunk: rows in memory at a time; None: as many as `memory` holds.
        memory: bytes that the rows and their scores take at a time; None: 256 MiB.
    """
    names = store.names(GRADIENTS)
    if rows_per_chunk is None:
        zero = {name: np.zeros((1, *store.shape(name)[1:]), np.float32) for name in names}
        queries = scorer(blocks_of(zero)).shape[1]  # pyright: ignore[reportAttributeAccessIssue]
        rows_per_chunk = rows_that_fit(store, memory, RANKED_BYTES * queries)
    for _, _, arrays in store.parts(names, rows_per_chunk):
        yield scorer(blocks_of(arrays))  # pyright: ignore[reportReturnType]


def rows_that_fit(store: Store, memory: int | None = None, beside: int = 0) -> int:
    """How many stored rows of gradients to read at a time.

    Args:
        memory: bytes that they take; None: 256 MiB.
        beside: what else a row takes.
    """
    # Two parts of float32, since the one before is held until the next is there; or of 16 bits, and a copy.
    row_bytes = sum(2 * 4 * int(np.prod(store.shape(name)[1:])) for name in store.names(GRADIENTS))
    return max(1, (memory or READ_BYTES) // (row_bytes + beside))


def stored_shares(store: Store, row: int, scorer: Transform) -> Blocks:
    """Each block's share of a stored row's scores, `{block: [queries]}`; they sum to `stored_scores`."""
    shares: Any = scorer(read_gradients(store, row, row + 1))
    return {name: share[0] for name, share in shares.items()}


def score_chunks(
    run: str | Path, *, rows_per_chunk: int | None = None, memory: int | None = None
) -> Iterator[Tensor]:
    """Stream the scores of a run, `[chunk, dampings * queries]`, in row order; see `stored_scores`."""
    with open_store(run, KIND) as store:
        queries = int(np.prod(store.shape(KIND)[1:]))
        rows_per_chunk = rows_per_chunk or max(1, (memory or READ_BYTES) // (RANKED_BYTES * queries))
        for _, _, arrays in store.parts([KIND], rows_per_chunk):
            yield torch.from_numpy(arrays[KIND]).flatten(1)


def row_shares(store: Store, row: int) -> dict[str, np.ndarray]:
    """Each block's share of the scores of a row, as a run keeps them: `{block: [dampings * queries]}`."""
    arrays = store.read_all(store.names(SHARES), row, row + 1)
    return {name.removeprefix(SHARES): array.reshape(-1) for name, array in arrays.items()}


def read_part(run: str | Path, shard: Shard | None = None) -> tuple[Rows, Provenance]:
    """Scores `[rows, dampings * queries]` and losses of a run, or of a part of it, and what they are of."""
    with open_part(shard_run(run, shard), KIND) as store:
        there = "rows/loss" in store.names("rows")
        losses = torch.from_numpy(store.read("rows/loss", *store.span)) if there else torch.zeros(0)
        values = torch.from_numpy(store.read(KIND, *store.span)).flatten(1)
        return Rows(values, losses), Provenance.of(store.settings)
