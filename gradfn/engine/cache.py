"""A cache of projected gradients: a fit fills it, and the passes after the fit read it.

A method with a curvature goes over the training rows twice, to fit and to score, and both passes begin with
the same projection. The projected rows are small, so the second pass reads them instead of running the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradfn.engine.engine import Engine
from gradfn.memory import free_memory
from gradfn.transforms import Chain, Transform, chain
from gradfn.transforms.row_sum import RowSum
from gradfn.types import Batch, Blocks, Data, Example, Rows

CACHE_BYTES = 1 << 30
"""The most that cached rows may take; larger ones are computed again."""


@dataclass(eq=False)
class CachedRows:
    """Data with a cache for the transformed gradients of its rows, which a fit over the data fills.

    A later pass of the same model, loss and view, whose chain begins with the same transform, reads the cache
    instead of running the model. Writing to a weight invalidates the cache. Results change by rounding alone.
    The cache is in the CPU's memory. It holds rows of a transform, never untransformed gradients, and only if
    they take at most `CACHE_BYTES` and a quarter of the free memory. Any other pass runs as over the data.

    Args:
        data: any examples.
        transform: the stages that both passes begin with: the method's normalisation and projection.

    >>> from torch import nn
    >>> import gradfn as gf
    >>> net = nn.Linear(2, 1, bias=False)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).sum()
    >>> rows = CachedRows([{"x": torch.tensor([1.0, 2.0])}] * 3, gf.project(1))
    >>> H = gf.fit(gf.second_moment(), net, rows, rows.transform, loss=loss)
    >>> rows.cached
    3
    """

    data: Data
    transform: Transform
    _made_by: tuple[Any, ...] = field(default=(), init=False, repr=False)
    _values: Blocks = field(default_factory=dict, init=False, repr=False)
    _losses: Tensor = field(default_factory=lambda: torch.zeros(0), init=False, repr=False)
    _there: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), init=False, repr=False)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Example:
        return self.data[row]

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the data: ids, texts, lengths, a fingerprint."""
        if name.startswith("_") or name == "data":
            raise AttributeError(name)
        return getattr(self.data, name)

    @property
    def cached(self) -> int:
        """How many rows are in the cache."""
        return int(self._there.sum())

    def reader(self, engine: Engine) -> Callable[[np.ndarray], Rows] | None:
        """A function from row numbers to the engine's results, from the cache; None if rows are missing."""
        rest = self._rest(engine)
        if rest is None or self._maker(engine) != self._made_by or self.cached < len(self):
            return None
        device = next(engine.model.parameters()).device

        def results(numbers: np.ndarray) -> Rows:
            at = torch.from_numpy(numbers)
            blocks = {name: value[at].to(device) for name, value in self._values.items()}
            return Rows(rest(blocks), self._losses[at].to(device))

        return results

    def writer(self, engine: Engine) -> Callable[[np.ndarray, Batch], Rows]:
        """A function that runs an engine over a batch, and caches the rows that the engine sums if it may."""
        rest = self._rest(engine) if engine.summed else None
        if rest is None:
            return lambda numbers, batch: engine(batch)
        base = replace(engine, transform=chain(self.transform), _lowered=None)
        if len(self) * base.result_bytes > min(CACHE_BYTES, free_memory() // 4):
            return lambda numbers, batch: engine(batch)
        if self._maker(engine) != self._made_by:
            self._made_by, self._values = self._maker(engine), {}
            self._there = np.zeros(len(self), bool)

        def run(numbers: np.ndarray, batch: Batch) -> Rows:
            made = base(batch)
            assert isinstance(made.values, dict)
            self._write(numbers, made.values, made.losses)
            return Rows(rest(made.values), made.losses)

        return run

    def _rest(self, engine: Engine) -> Chain | None:
        """The stages of an engine after the cached ones; None if it does not begin with these."""
        first, stages = chain(self.transform).stages, chain(engine.transform).stages
        by_factors = engine.summed and not isinstance(stages[-1], RowSum)
        if not first or by_factors or engine.view.tokens or stages[: len(first)] != first:
            return None
        return Chain(stages[len(first) :])

    def _maker(self, engine: Engine) -> tuple[Any, ...]:
        weights = [(weight.data_ptr(), weight._version) for weight in engine.model.parameters()]
        return engine.model, weights, engine.loss, engine.view, {site.block for site in engine.sites}

    def _write(self, numbers: np.ndarray, values: Blocks, losses: Tensor) -> None:
        if not self._values:
            self._losses = losses.new_empty(len(self), device="cpu")
            self._values = {n: v.new_empty(len(self), *v.shape[1:], device="cpu") for n, v in values.items()}
        at = torch.from_numpy(numbers)
        for name, value in values.items():
            self._values[name][at] = value.cpu()
        self._losses[at] = losses.cpu()
        self._there[numbers] = True
