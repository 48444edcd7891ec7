"""Which stored rows answer for the gradient of a backward pass of the caller's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Unpack

from jaxtyping import Float, Int
from torch import Tensor, nn

from gradfn.engine.tap import tap
from gradfn.errors import InputError
from gradfn.model.sites import View
from gradfn.runs.gradients import open_gradients
from gradfn.runs.nearest import Faiss, empty_index, find
from gradfn.runs.provenance import describe_model, refuse_mismatch
from gradfn.runs.search import CompareOptions, method_of_store
from gradfn.scores import TopK
from gradfn.store import Store
from gradfn.types import Blocks


@dataclass(eq=False)
class Traced:
    """The rows of a store for the examples of passes inside a `trace`; there after its end.

    Args:
        store: whose rows are ranked.
    """

    store: Store = field(repr=False)
    _found: tuple[TopK, TopK] | None = field(default=None, repr=False)

    @property
    def proponents(self) -> TopK:
        """The rows with the highest scores, highest first.

        Raises:
            InputError: inside the `with` block, or after one that raised.
        """
        return self._both()[0]

    @property
    def opponents(self) -> TopK:
        """The rows with the lowest scores, lowest first; see `proponents`."""
        return self._both()[1]

    @property
    def rows(self) -> Int[Tensor, "examples k"]:
        """The numbers of the rows with the highest scores."""
        return self.proponents.rows

    @property
    def scores(self) -> Float[Tensor, "examples k"]:
        """Their scores."""
        return self.proponents.scores

    @property
    def ids(self) -> list[list[str]]:
        """Their names; where rows are tokens, those of their documents."""
        return self._told("rows/id", self.rows)

    @property
    def texts(self) -> list[list[str]]:
        """Their texts, as far as the store has them.

        Raises:
            InputError: rows are tokens, which have none.
        """
        if "rows/text" not in self.store.header.arrays:
            raise InputError("the rows of this store are tokens, which have no texts: read `ids`")
        return self._told("rows/text", self.rows)

    def _told(self, name: str, rows: Int[Tensor, "examples k"]) -> list[list[str]]:
        return [[self._of_row(name, row) if row >= 0 else "" for row in found] for found in rows.tolist()]

    def _of_row(self, name: str, row: int) -> str:
        if name in self.store.header.arrays:
            return str(self.store.read(name, row, row + 1)[0])
        document = int(self.store.read("rows/document", row, row + 1)[0])
        return str(self.store.index_array("documents/id")[document])

    def _both(self) -> tuple[TopK, TopK]:
        if self._found is None:
            raise InputError(
                "the store is searched at the end of the `with` block: run a forward and a backward pass "
                "inside it, and read the result after it"
            )
        return self._found


@contextmanager
def trace(
    model: nn.Module,
    run: str | Path,
    k: int = 5,
    *,
    rows: int | None = None,
    index: Faiss | str | None = None,
    memory: int | None = None,
    **options: Unpack[CompareOptions],
) -> Iterator[Traced]:
    """The rows of a store for a forward and a backward pass of your own.

    Inside the block the model is tapped (`gf.tap`): run it as you like, and call backward on any loss. At the
    end of the block the store is searched for the gradient of every example, behind the transform that the
    stored rows went through. A positive score is a proponent: a step on the row lowers your loss.

    If your loss is a mean over the batch, the gradient of an example is its part of this mean, and its scores
    are as much smaller; cosines (`unit_norm`) stay the same.

    Args:
        model: that of the store; any, where the store was recorded during training.
        run: what `build` wrote.
        k: how many rows to find for each example.
        rows: how many examples each forward pass has; None is the length of its first tensor argument.
        index, memory: see `find`; a text is the factory string of a `Faiss`.
        options: `curvature`, `damping`, `unit_norm` and `normalize`, see `query`.

    Returns:
        A context manager that gives a `Traced`. After the block it has `rows` and `scores` `[examples, k]`
        (for several dampings one after the other), `ids`, `texts`, `proponents` and `opponents`.

    Raises:
        InputError: the store is of another model; no forward pass, or one without a backward pass.

    >>> import tempfile
    >>> import torch
    >>> import gradfn as gf
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> run, data = tempfile.mkdtemp(), [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([0.0, 2.0])}]
    >>> _ = gf.build(run, net, data, loss=loss)
    >>> with trace(net, run, k=1) as result:
    ...     net(torch.tensor([[3.0, 1.0], [1.0, 3.0]])).sum().backward()
    >>> result.rows, result.scores, result.ids
    (tensor([[0],
            [1]]), tensor([[3.],
            [6.]]), [['0'], ['1']])
    """
    if k < 1:
        raise InputError(f"k must be 1 or more, not {k}")
    index = Faiss(index) if isinstance(index, str) else index
    with open_gradients(run) as store:
        made, base, method = method_of_store(store, options)
        view = View(**(made.layers or {}))
        here = replace(describe_model(model, None, view, base), version=None)
        refuse_mismatch(made, here, f"the store {run}")
        if index is not None:
            empty_index(store, index)
            method.sides()
        result = Traced(store)
        with tap(model, method.query_transform, view=replace(view, tokens=False), rows=rows) as tapped:
            yield result
        blocks: Blocks = tapped.blocks  # pyright: ignore[reportAssignmentType]
        queries = {name: block.detach().cpu() for name, block in blocks.items()}
        result._found = find(store, method, queries, k, index=index, memory=memory)
