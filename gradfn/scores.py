"""Scores of rows against queries, as one value, and the rows that score highest.

One convention of sign everywhere: a positive score is a proponent, a training step on that row lowers the
query's loss.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradfn.errors import InputError
from gradfn.selection import Rule, Selection, select_rows
from gradfn.store import Overwrite, Store, open_store, open_writer, storable

KIND = "scores"
"""The kind of store, and in it the array `[rows, dampings, queries]`."""
SHARES = "scores_by/"
"""Below this name, each block's share of the scores."""
SELF = "self-influence"
"""The name of the one query where rows are scored against themselves."""


class TopK(NamedTuple):
    """The best rows of every query, best first: their scores and row numbers, both `[queries, k]`."""

    scores: Tensor
    rows: Tensor


class Columns(NamedTuple):
    """What the scores of a row are of: each query at each damping.

    Args:
        query_ids, query_texts: of the queries; there may be no texts.
        dampings: as the command line spells them; `("",)` where the method leaves no choice.
    """

    query_ids: Sequence[str]
    query_texts: Sequence[str] = ()
    dampings: tuple[str, ...] = ("",)

    def arrays(self) -> dict[str, Sequence[str]]:
        """What the index of scores says of them."""
        texts = {"queries/text": storable(self.query_texts)} if self.query_texts else {}
        return {"queries/id": storable(self.query_ids), **texts, "dampings": list(self.dampings)}


@dataclass(frozen=True, eq=False)
class Scores:
    """The score of every row for every query, at every damping; positive = proponent.

    Args:
        values: `[dampings, rows, queries]`.
        row_ids: the names of the rows; where rows are tokens, of their documents.
        query_ids: the names of the queries.
        dampings: as the command line spells them; `("",)` where the method leaves no choice.
        documents, positions: where rows are tokens, the document of each and its position there, `[rows]`.
        shares: each block's share, `{block: [dampings, rows, queries]}`, which sum to the values; empty where
            scores were not told apart by block.
        losses: of the rows in nats, `[rows]`, where they are known.
        query_texts: of the queries, where they are known.
        settings: all that the scores depend on, as plain JSON values.
        name: what to call the run in a table.

    Raises:
        InputError: names that are not as many as the values.

    >>> scores = Scores(torch.tensor([[[3.0], [-1.0], [2.0]]]), ["a", "b", "c"], ["q"])
    >>> scores.top(2).rows, scores.top(1, largest=False).scores
    (tensor([[0, 2]]), tensor([[-1.]]))
    """

    values: Float[Tensor, "dampings rows queries"] = field(repr=False)
    row_ids: Sequence[str] = field(repr=False)
    query_ids: Sequence[str] = field(repr=False)
    dampings: tuple[str, ...] = ("",)
    documents: Int[Tensor, " rows"] | None = field(default=None, repr=False)
    positions: Int[Tensor, " rows"] | None = field(default=None, repr=False)
    shares: Mapping[str, Float[Tensor, "dampings rows queries"]] = field(default_factory=dict, repr=False)
    losses: Float[Tensor, " rows"] | None = field(default=None, repr=False)
    query_texts: Sequence[str] = field(default=(), repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    name: str = ""

    def __post_init__(self) -> None:
        named = len(self.dampings), len(self.row_ids), len(self.query_ids)
        if tuple(self.values.shape) != named:
            raise InputError(
                f"scores of shape {list(self.values.shape)} have names for {list(named)} dampings, rows and "
                "queries: give each axis as many names as it is long"
            )

    @property
    def matrix(self) -> Float[Tensor, "rows queries"]:
        """The scores at the only damping.

        Raises:
            InputError: there are several.

        >>> sweep = Scores(torch.tensor([[[1.0]], [[2.0]]]), ["a"], ["q"], ("0.1", "1"))
        >>> sweep.of_damping("1").matrix
        tensor([[2.]])
        """
        if len(self.dampings) > 1:
            raise InputError(
                f"these scores are for {len(self.dampings)} dampings, {', '.join(self.dampings)}: take one "
                f"with `of_damping({self.dampings[0]!r})`"
            )
        return self.values[0]

    def of_damping(self, name: str) -> "Scores":
        """The same at one damping.

        Raises:
            InputError: there is no such damping.
        """
        if name not in self.dampings:
            raise InputError(f"there is no damping {name!r}: choose from {', '.join(self.dampings)}")
        one = slice(place := self.dampings.index(name), place + 1)
        shares = {block: share[one] for block, share in self.shares.items()}
        return replace(self, values=self.values[one], dampings=(name,), shares=shares)

    def of_queries(self, numbers: Int[Tensor, " part"]) -> "Scores":
        """The same for some of the queries."""
        chosen = numbers.tolist()
        return replace(
            self,
            values=self.values[:, :, numbers],
            query_ids=[self.query_ids[number] for number in chosen],
            query_texts=[self.query_texts[number] for number in chosen] if self.query_texts else (),
            shares={block: share[:, :, numbers] for block, share in self.shares.items()},
        )

    def top(self, k: int, largest: bool = True) -> TopK:
        """The `k` best rows of every query; see `top_k`.

        Args:
            k: how many; fewer are returned where there are fewer rows.
            largest: proponents, highest first; False: opponents, lowest first.

        Raises:
            InputError: several dampings; k below 1.
        """
        return top_k([self.matrix], k, largest=largest)

    def select(self, **rule: Unpack[Rule]) -> Selection:
        """The rows to keep by their scores at the only damping; see `gradfn.selection.select_rows`.

        Raises:
            InputError: several dampings; scores of tokens; see also `select_rows`.

        >>> scores = Scores(torch.tensor([[[3.0], [-1.0], [2.0]]]), ["a", "b", "c"], ["q"])
        >>> scores.select(drop_worst=1).rows
        tensor([0, 2])
        """
        if self.documents is not None:
            raise InputError(
                "these are scores of tokens, and rows are selected: score with `View(tokens=False)`"
            )
        return select_rows(self.matrix, **rule)

    def to_pandas(self) -> Any:
        """A long table: one line for every query, damping and row.

        Returns:
            A `pandas.DataFrame` with the columns query, damping, row, id and score; where rows are tokens,
            document and position too.

        >>> print(Scores(torch.tensor([[[3.0], [-1.0]]]), ["a", "b"], ["q"]).to_pandas().to_string())
          query damping  row id  score
        0     q            0  a    3.0
        1     q            1  b   -1.0
        """
        import pandas as pd

        dampings, rows, queries = self.values.shape
        query, damping, row = (axis.ravel() for axis in np.indices((queries, dampings, rows)))

        def named(names: Sequence[str], numbers: np.ndarray) -> np.ndarray:
            return np.array([*names], dtype=object)[numbers]

        of_tokens = {"document": self.documents, "position": self.positions}
        return pd.DataFrame({
            "query": named(self.query_ids, query), "damping": named(self.dampings, damping), "row": row,
            "id": named(self.row_ids, row),
            **{name: of_row.numpy()[row] for name, of_row in of_tokens.items() if of_row is not None},
            "score": self.values.permute(2, 0, 1).reshape(-1).numpy(),
        })  # fmt: skip

    def to_dataset(self) -> Any:
        """A dataset with one row for every training row, and for every query a column of its scores.

        It can stand beside the training set: `datasets.concatenate_datasets([train, scores], axis=1)`.

        Returns:
            A `datasets.Dataset` whose columns are named after the queries.

        Raises:
            InputError: several dampings; queries of one name.

        >>> dataset = Scores(torch.tensor([[[3.0], [-1.0]]]), ["a", "b"], ["q"]).to_dataset()
        >>> dataset[1]
        {'q': -1.0}
        """
        from datasets import Dataset

        if len({*self.query_ids}) < len(self.query_ids):
            raise InputError("two queries have one name, and columns need names of their own: rename them")
        return Dataset.from_dict(dict(zip(self.query_ids, self.matrix.T.numpy(), strict=True)))

    def save(self, run: str | Path, *, overwrite: Overwrite = False) -> Path:
        """Write the scores to `RUN/scores.h5`, which `load` reads.

        Args:
            run: the run directory.
            overwrite: replace scores that were made otherwise.

        Returns:
            The path of the file.

        Raises:
            InputError: the directory holds scores made otherwise.
            StorageError: the disk is full or failed.
        """
        count, ids = len(self.row_ids), storable(self.row_ids)
        shares = {SHARES + block: by_row(share) for block, share in self.shares.items()}
        beside = {"rows/loss": self.losses, "rows/document": self.documents, "rows/position": self.positions}
        arrays = {name: values.numpy() for name, values in beside.items() if values is not None}
        rows = {KIND: by_row(self.values), **shares, **arrays, "rows/id": ids}
        queries = Columns(self.query_ids, self.query_texts, self.dampings).arrays()
        names = {"rows/id": ids, "queries/id": queries["queries/id"]}
        with open_writer(run, KIND, self.settings, count, overwrite, names=names) as writer:
            for start, stop in writer.missing([(0, count)]):
                writer.write(start, stop, {name: values[start:stop] for name, values in rows.items()})
            return writer.finish(queries)

    @classmethod
    def load(cls, run: str | Path) -> "Scores":
        """Read the scores of a run.

        Args:
            run: the run directory, or its `scores.h5`.

        Raises:
            InputError: there are none, or they are damaged.

        >>> import tempfile
        >>> run = tempfile.mkdtemp()
        >>> path = Scores(torch.tensor([[[3.0], [-1.0]]]), ["a", "b"], ["q"]).save(run)
        >>> Scores.load(run).matrix.T
        tensor([[ 3., -1.]])
        """
        with open_store(run, KIND) as store:
            if store.header.kind != KIND:
                raise InputError(
                    f"{store.path} holds {store.header.kind}, not scores: give a run that score wrote"
                )
            query_ids, query_texts, dampings = columns_of(store)

            def by_damping(name: str) -> Tensor:
                values = torch.from_numpy(store.read(name))
                return values.reshape(store.rows, len(dampings), len(query_ids)).transpose(0, 1)

            beside = {
                name: torch.from_numpy(store.read(f"rows/{name}"))
                for name in ("loss", "document", "position")
                if f"rows/{name}" in store.header.arrays
            }
            if "rows/id" in store.header.arrays:
                row_ids = store.read("rows/id").tolist()
            else:
                row_ids = store.index_array("documents/id")[beside["document"].numpy()].tolist()
            return cls(
                by_damping(KIND), row_ids, query_ids, dampings, beside.get("document"),
                beside.get("position"),
                {name.removeprefix(SHARES): by_damping(name) for name in store.names(SHARES)},
                beside.get("loss"), query_texts, store.settings, Path(run).name or str(run),
            )  # fmt: skip


def by_row(values: Float[Tensor, "dampings rows queries"]) -> Float[np.ndarray, "rows dampings queries"]:
    """Scores as a store holds them, rows first."""
    return values.transpose(0, 1).contiguous().numpy()


def columns_of(store: Store) -> Columns:
    """What stored scores are of."""
    texts = store.index_array("queries/text").tolist() if "queries/text" in store.header.index_arrays else []
    if store.header.format == 1:
        return _columns_of_format_1(store, texts)
    return Columns(store.index_array("queries/id").tolist(), texts, tuple(store.index_array("dampings")))


def _columns_of_format_1(store: Store, texts: list[str]) -> Columns:
    """Of scores `[rows, dampings * queries]`, whose queries are named `query (damping x)`."""
    columns = store.shape(KIND)[1]
    named = "queries/id" in store.header.index_arrays
    names = store.index_array("queries/id").tolist() if named else [str(number) for number in range(columns)]
    joined = store.settings.get("checkpoints")
    made = joined[0]["settings"] if joined else store.settings
    given = made.get("method", {}).get("damping") or [""]
    dampings = tuple("none" if name is None else str(name) for name in given)
    if columns % len(dampings):  # the best over queries and dampings (less) is one column
        dampings = ("",)
    queries = columns // len(dampings)
    suffix = f" (damping {dampings[0]})" if len(dampings) > 1 else ""
    ids = [name.removesuffix(suffix) for name in names[:queries]]
    return Columns(ids, texts[:queries], dampings)


# --- the rows that score highest


def recall(found: TopK, exact: TopK) -> float:
    """The share of the exactly best rows that a search found, over all queries.

    >>> best = TopK(torch.tensor([[3.0, 2.0]]), torch.tensor([[7, 4]]))
    >>> recall(TopK(torch.tensor([[3.0, 1.0]]), torch.tensor([[7, 5]])), best)
    0.5
    """
    return float((found.rows[:, :, None] == exact.rows[:, None, :]).any(1).double().mean())


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

    return extremes_of_parts(numbered(), k)


def extremes_of_parts(chunks: Iterable[tuple[Tensor, Tensor]], k: int) -> tuple[TopK, TopK]:
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


def _extend(best: TopK | None, chunk: Tensor, rows: Tensor, k: int, largest: bool) -> TopK:
    """The best of those so far and of a chunk; equal scores stand in the order of their rows."""
    if not bool((rows[1:] > rows[:-1]).all()):
        by_row = rows.argsort()
        chunk, rows = chunk[by_row], rows[by_row]
    new = _best_of(TopK(chunk.T.contiguous(), rows.expand(chunk.shape[1], -1)), k, largest)
    if best is None:
        return new
    scores, rows = torch.cat([best.scores, new.scores], 1), torch.cat([best.rows, new.rows], 1)
    by_row = rows.argsort(dim=1)
    return _best_of(TopK(scores.gather(1, by_row), rows.gather(1, by_row)), k, largest)


def _best_of(ranked: TopK, k: int, largest: bool) -> TopK:
    """The best of candidates in the order of their rows."""
    if ranked.scores.shape[1] > 2 * k:
        places = _best_places(ranked.scores, k, largest)
        ranked = TopK(ranked.scores.gather(1, places), ranked.rows.gather(1, places))
    order = ranked.scores.argsort(dim=1, descending=largest, stable=True)[:, :k]
    return TopK(ranked.scores.gather(1, order), ranked.rows.gather(1, order))


def _best_places(scores: Tensor, k: int, largest: bool) -> Tensor:
    """Where the `k` best of every query stand, in order of place; of equal ones the first."""
    values, places = scores.topk(k, dim=1, largest=largest)
    worst = values.amin(1, keepdim=True) if largest else values.amax(1, keepdim=True)
    if bool(worst.isnan().any()):
        return scores.argsort(dim=1, descending=largest, stable=True)[:, :k].sort(dim=1).values
    # topk takes any of those that equal the worst of the best.
    tied = ((scores == worst).sum(1) > (values == worst).sum(1)).nonzero()[:, 0]
    if len(tied):
        some, edge = scores[tied], worst[tied]
        better = ~(some <= edge) if largest else some < edge
        equal = some == edge
        first = equal.cumsum(1, dtype=torch.int32) <= k - better.sum(1, keepdim=True)
        places[tied] = (better | equal & first).nonzero()[:, 1].view(-1, k)
    return places.sort(dim=1).values
