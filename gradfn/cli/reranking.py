"""The second stage of `gradfn query --rerank`: candidates ranked by whole gradients."""

from dataclasses import dataclass
from typing import Any

from gradfn.cli.commands import BuildRequest, QueryRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, load_documents, training_rows
from gradfn.cli.options import By
from gradfn.cli.queries import Asked
from gradfn.cli.request import make
from gradfn.cli.rerun import recorded_request
from gradfn.data import Corpus
from gradfn.errors import InputError
from gradfn.methods.inner_product import InnerProduct
from gradfn.methods.scoring import best, rerank
from gradfn.report.rankings import ranks_needed
from gradfn.report.tables import facts
from gradfn.runs.provenance import SCALES
from gradfn.scores import TopK, recall
from gradfn.transforms import Transform, chain

Both = tuple[TopK, TopK]
"""Proponents and opponents."""


@dataclass(frozen=True, eq=False)
class SecondStage:
    """Ranks candidates by the gradients that the store's projection made smaller.

    Args:
        loaded: the model.
        train: the rows that the store is of.
        method: of whole gradients.
    """

    loaded: Loaded
    train: Corpus
    method: InnerProduct

    def rank(self, first: Both, asked: Asked, top: int, check: bool) -> Both:
        """The best of the candidates; says how much the order changed, and what was no candidate."""
        k, candidates = ranks_needed(top), first[0].rows.shape[1]
        subject, queries = self.loaded.subject, asked.documents
        with self.loaded.multiplying():
            found = rerank(first, subject, self.train, queries, k, method=self.method)
            exact = best(subject, self.train, queries, k, method=self.method) if check else None
        k = found[0].rows.shape[1]
        before = [TopK(best.scores[:, :k], best.rows[:, :k]) for best in first]
        stayed = [recall(one, other) for one, other in zip(before, found, strict=True)]
        lines = [
            ("rerank", f"{candidates} candidates on each side, by whole gradients"),
            ("before", f"{stayed[0]:.1%} of the {k} highest rows were among the {k} highest of the store, "
             f"{stayed[1]:.1%} of the {k} lowest"),
        ]  # fmt: skip
        if exact is not None:
            shares = [recall(one, other) for one, other in zip(found, exact, strict=True)]
            lines.append(
                ("recall", f"{shares[0]:.1%} of the {k} highest of all rows were candidates, "
                 f"{shares[1]:.1%} of the {k} lowest")
            )  # fmt: skip
        console().print(facts(lines))
        return found


def check_rerank(request: QueryRequest, by: By) -> None:
    """Refuse, before the model is loaded, what has no second stage."""
    count, top = request.search.rerank, request.table.top or 0
    if count is None:
        return
    if count < ranks_needed(top):
        raise InputError(
            f"--rerank is how many candidates to rank: give {ranks_needed(top)} or more, not {count}"
        )
    if by != "example":
        raise InputError(
            f"--rerank is of whole rows, and scores are by {by}: give --by example, or leave it out"
        )
    for name, why in (
        ("hessian_path", "a curvature is of projected gradients"),
        ("query_path", "stored queries are projected"),
        ("query_loss", "rows would have the queries' loss"),
    ):
        if given := request.gave(name):
            raise InputError(f"--rerank compares whole gradients, and {why}: leave out {given}, or --rerank")


def second_stage(
    loaded: Loaded, request: QueryRequest, settings: Any, base: Transform, unit: bool
) -> SecondStage:
    """Load the rows that the store is of, as the command that made it did.

    Raises:
        InputError: the store does not record them, or they have changed.
    """
    kind, given = recorded_request(request.store)
    if kind is not BuildRequest:
        raise InputError(f"{request.store} is of gradfn {kind.COMMAND}, and --rerank takes what build wrote")
    made: Any = make(kind, given)
    train = load_documents(loaded, training_rows(made)[0], made.data, str(made.data.dataset))
    if train.fingerprint() != settings["data"]["fingerprint"]:
        raise InputError(
            f"the rows in {made.data.dataset} are not those that {request.store} was made of, so candidates "
            "cannot be read again: make the store again, or leave out --rerank"
        )
    scaled = [stage for stage in chain(base).stages if type(stage).__name__ in SCALES]
    full = chain(*scaled)
    return SecondStage(loaded, train, InnerProduct(full, full, norm="cosine" if unit else "none"))
