"""The law of an estimator: its scores are those of a plain one, whatever the model, rows and batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from gradfn.engine.reference import naive_blocks
from gradfn.errors import InputError
from gradfn.methods import grad_dot
from gradfn.methods.inner_product import InnerProduct
from gradfn.scores import Scores as Scored
from gradfn.testing.models import Draw
from gradfn.testing.search import refute
from gradfn.testing.strategies import Problem, check_kinds, problems
from gradfn.types import Example, LossFn, Params

Scores = Callable[[nn.Module, LossFn, Sequence[Example], Sequence[Example]], Tensor | Scored]
"""`scores(model, loss, train rows, query rows) -> [rows, queries]`, or `gf.Scores`; positive = proponent."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A model, its loss, rows to score and queries."""

    model: nn.Module
    loss: LossFn
    train: list[dict[str, Tensor]]
    query: list[dict[str, Tensor]]
    plain: Callable[[Params, Example], Tensor] = field(metadata={"shown": False})


@st.composite
def _asked(draw: Draw, cases: st.SearchStrategy[Problem]) -> Asked:
    problem = draw(cases)
    count = draw(st.integers(1, len(problem.rows) - 1))
    queries, rows = problem.rows[:count], problem.rows[count:]
    again = draw(st.sampled_from([0, 0, 0, 0, 8, 40]))  # an estimator may take some rows at a time
    rows = [*rows, *Random(0).choices(rows, k=again)]
    return Asked(problem.model, problem.loss, rows, queries, problem.reference)


def _plain_scores(method: InnerProduct, case: Asked) -> Tensor:
    """A method by its definition: its transforms, applied to gradients made one row at a time."""
    train, query = (naive_blocks(case.plain, case.model, rows) for rows in (case.train, case.query))
    query = method.query_transform(query)
    if not isinstance(query, dict) or not isinstance(method.row_transform(train), dict):
        raise InputError("a reference method must give blocks on both sides: leave the scores to the check")
    return method.against(query)(train)  # pyright: ignore[reportReturnType]


def _matrix(scores: Any) -> Any:
    """What an estimator of somebody's own gives, which may be anything, as a matrix where it is `Scores`."""
    return scores.matrix if isinstance(scores, Scored) else scores


def _copied(case: Asked) -> dict[str, Tensor]:
    """Every tensor that an estimator is given, by a name for it."""
    found = {f"the model's {name}": value for name, value in case.model.state_dict().items()}
    for side, rows in (("train", case.train), ("query", case.query)):
        found |= {f"{key} of {side} {i}": value for i, row in enumerate(rows) for key, value in row.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def _wrong_number(got: Tensor, want: Tensor, tolerance: float) -> str:
    off = (got - want).abs().nan_to_num(nan=torch.inf)
    if float(off.max()) <= tolerance * float(want.abs().max()) + 1e-13:
        return ""
    row, query = divmod(int(off.argmax()), got.shape[1])
    instead = f"{float(got[row, query]):.6g} instead of {float(want[row, query]):.6g}"
    return f"the score of train {row} for query {query} is {instead}"


def _wrong_scale(got: Tensor, want: Tensor, tolerance: float) -> str:
    """Each query may have one positive factor of its own."""
    for query in range(want.shape[1]):
        a, b = got[:, query], want[:, query]
        is_zero = float(b.abs().max()) <= 1e-13  # up to rounding
        factor = torch.ones(()) if is_zero else (a @ b) / (b @ b)
        if not factor > 0:
            return f"the scores for query {query} are {float(factor):.3g} times what they should be"
        if wrong := _wrong_number((a / factor)[:, None], b[:, None], tolerance):
            return f"{wrong.replace('query 0', f'query {query}')} (up to a factor of {float(factor):.3g})"
    return ""


def _wrong_order(got: Tensor, want: Tensor, tolerance: float) -> str:
    """Rows whose reference scores are the same up to rounding may stand in any order."""
    near = tolerance * float(want.abs().max()) + 1e-13
    above = (want[:, None] - want[None] > near) & ~(got[:, None] > got[None])
    if not bool(above.any()):
        return ""
    high, low, query = above.nonzero()[0].tolist()
    return (
        f"for query {query} train {high} should rank above train {low} "
        f"({float(want[high, query]):.4g} > {float(want[low, query]):.4g}), but the scores are "
        f"{float(got[high, query]):.6g} and {float(got[low, query]):.6g}"
    )


_COMPARE = {"exact": _wrong_number, "scale": _wrong_scale, "ranking": _wrong_order}


def check_estimator(
    scores: Scores,
    reference: InnerProduct | Scores | None = None,
    *,
    agreement: str = "exact",
    kinds: Sequence[str] = ("mlp", "lm"),
    tolerance: float = 1e-6,
    max_examples: int = 40,
) -> None:
    """Check an estimator against a plain one on small models, whatever the lengths and the number of rows.

    Args:
        scores: `scores(model, loss, train, query) -> [rows, queries]`; rows are examples, not padded, and
            `loss(params, example)` is the loss of one; positive scores are proponents.
        reference: what it should be: a method (`grad_cosine()`, say), whose transforms are applied to
            gradients made one row at a time, over the blocks that `View()` gives; or another function like
            `scores`, written plainly. None is `grad_dot()`.
        agreement: "exact"; "scale": up to one positive factor for each query; "ranking": the same order of
            rows for each query.
        kinds: the models to try it on, see `problems`.
        tolerance: relative to the largest reference score.
        max_examples: how many problems.

    Raises:
        BrokenLawError: with the smallest problem on which the two differ, or whose model or rows it changes.
        InputError: no such agreement or kind.

    >>> import gradfn as gf
    >>> def my_scores(model, loss, train, query):
    ...     return gf.score(model, train, query, method=gf.grad_dot(), loss=loss)
    >>> check_estimator(my_scores, max_examples=5)
    """
    if agreement not in _COMPARE:
        raise InputError(f"no agreement {agreement!r}: choose {', '.join(_COMPARE)}")
    check_kinds(kinds)
    plain = grad_dot() if reference is None else reference

    def law(case: Asked) -> str:
        asked = case.model, case.loss, case.train, case.query
        want = _plain_scores(plain, case) if isinstance(plain, InnerProduct) else _matrix(plain(*asked))
        before = _copied(case)
        got = _matrix(scores(*asked))
        if not isinstance(got, Tensor):
            return f"scores are a {type(got).__name__}: give a tensor [rows, queries]"
        for name, value in _copied(case).items():
            if name not in before or not torch.equal(value, before[name]):
                return f"it changes {name}: leave the model and the rows as they are"
        got = got.detach().to(want)
        if got.shape != want.shape:
            return f"scores have shape {list(got.shape)}, but rows and queries are {list(want.shape)}"
        return _COMPARE[agreement](got, want, tolerance)

    refute("check_estimator", law, _asked(problems(kinds, min_rows=2)), max_examples)
