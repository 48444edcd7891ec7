"""Scores as a column of a dataset: those that there are, and those of new rows as a dataset is mapped."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Unpack
from uuid import uuid4

from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.hf.datasets import check_dataset, row_names
from gradfn.methods import Attribution
from gradfn.methods.attribution import Queries
from gradfn.scores import Scores
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.types import Data

if TYPE_CHECKING:
    import datasets

COLUMN = "gradfn_score"
"""What a column of scores is called, as in the datasets of `gradfn select`."""


def with_scores(rows: "datasets.Dataset", scores: Scores, *, column: str = COLUMN) -> "datasets.Dataset":
    """The dataset with a column of its scores: a number a row, or for several queries a list in their order.

    Scores find their row by its name, the column `id` or else its number, so a dataset that was shuffled or
    sorted will do.

    Args:
        rows: the rows that were scored, all of them.
        scores: at one damping; see `Scores.of_damping`, and `Scores.of_queries` for some of the queries.
        column: its name.

    Raises:
        InputError: another number of rows, or rows of other names; a column of this name; several dampings;
            scores of tokens.

    >>> import torch
    >>> from datasets import Dataset
    >>> scores = Scores(torch.tensor([[[3.0], [-1.0]]]), ["a", "b"], ["q"])
    >>> with_scores(Dataset.from_dict({"id": ["b", "a"]}), scores)["gradfn_score"][:]
    [-1.0, 3.0]
    """
    check_dataset(rows)
    if scores.documents is not None:
        raise InputError("these are scores of tokens, and rows get a column: score with `View(tokens=False)`")
    _check_column(column, rows.column_names)
    names, known = row_names(rows), [*scores.row_ids]
    if len(names) != len(known):
        raise InputError(
            f"the dataset has {len(names):,} rows and the scores are of {len(known):,}: give the rows that "
            "were scored"
        )
    values = scores.matrix
    if names != known:
        place = {name: number for number, name in enumerate(known)}
        if len(place) < len(known) or len({*names}) < len(names):
            raise InputError("several rows have one id, and their order differs: give the rows as scored")
        if other := next((name for name in names if name not in place), None):
            raise InputError(f"row {other!r} has no score: give the rows that were scored")
        values = values[[place[name] for name in names]]
    return rows.add_column(column, _cells(values))  # pyright: ignore[reportArgumentType]


def scorer(
    model: nn.Module | Subject,
    query: Queries,
    encode: "Callable[[datasets.Dataset], Data]",
    *,
    method: Attribution,
    column: str = COLUMN,
    **options: Unpack[SubjectOptions],
) -> Callable[[Mapping[str, Any]], dict[str, list[Any]]]:
    """What `dataset.map(..., batched=True)` calls to score rows, also of a dataset that is streamed.

    Gradients of the queries are computed once, and nothing is stored of a row but its scores. The scores
    are those of `gf.score`: the batches of `map` change none.

    Args:
        model, options: see `gf.score`.
        query: query examples, or their gradients; None: each row against itself.
        encode: makes examples of rows, `functools.partial(gf.tokenize, tokenizer=tokenizer)` say.
        method: one that is made, `gf.influence(curvature)` say; a name would be fitted to all rows.
        column: what to call the scores.

    Returns:
        A function of a batch of rows; it gives the column: a number a row, or for several queries a list.

    Raises:
        InputError: a method by its name; several dampings; a view by token.

    >>> import torch
    >>> from datasets import Dataset
    >>> import gradfn as gf
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> score = scorer(net, [{"x": torch.tensor([1.0, 2.0])}], lambda rows: rows.with_format("torch"),
    ...     method=gf.grad_dot(), loss=loss)
    >>> Dataset.from_dict({"x": [[1.0, 1.0], [0.0, 3.0]]}).map(score, batched=True)["gradfn_score"][:]
    [3.0, 6.0]
    """
    if isinstance(method, str):
        raise InputError(
            f"{method} by its name is fitted to all rows, which a map never sees: give what it is, "
            "gf.influence(gf.fit(gf.ekfac(), model, train)) say"
        )
    if len(method.damping) > 1:
        raise InputError(f"the method has {len(method.damping)} dampings, and a column one: give one")
    subject = subject_of(model, **options)
    if subject.view.tokens:
        raise InputError("rows get a column and no tokens: give `View(tokens=False)`")
    return _MapScorer(method.scorer(subject, query), encode, column)


class _MapScorer:
    """Scores batches of rows; a key of its own tells it from any other, so that no stale cache is read."""

    def __init__(self, score: Any, encode: Any, column: str):
        self.score, self.encode, self.column, self.key = score, encode, column, uuid4().hex

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        from datasets import Dataset

        _check_column(self.column, [*batch])
        values = self.score(self.encode(Dataset.from_dict(dict(batch)))).values
        return {self.column: _cells(values)}

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _elsewhere, (self.key,)  # `map` hashes what this is, and not a whole model


def _elsewhere(key: str) -> NoReturn:
    raise InputError("a scorer holds a model, which other processes have not: map without `num_proc`")


def _cells(values: Tensor) -> list[Any]:
    """A number a row, or a list where there are several queries."""
    return (values[:, 0] if values.shape[1] == 1 else values).tolist()


def _check_column(column: str, names: list[str]) -> None:
    if column in names:
        raise InputError(f"the dataset has a column {column!r} already: give another `column`, or drop it")
