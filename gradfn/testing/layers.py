"""The laws of a layer kind: its probe gives the gradient, whatever the form of the loss and the chain."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.engine.reference import definition, naive_blocks
from gradfn.errors import InputError
from gradfn.model.params import call, params_of
from gradfn.model.sites import View, blocks_of, find_sites
from gradfn.testing.models import Draw, randomize, seeds
from gradfn.testing.naive import chain_difference, difference
from gradfn.testing.search import first, refute
from gradfn.testing.strategies import chains, shapes_of
from gradfn.transforms import Transform, chain, dot, project
from gradfn.types import Batch, Example, Params

EVERYTHING = View(include=["*"])


class CalledTwice(nn.Module):
    """The module called two times in one forward, so that its gradient is a sum over the calls."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """`m(x) + m(x, last axis reversed)² / 2`."""
        once, again = (_tensor(self.module(value)) for value in (x, x.flip(-1)))
        return once + again.square() / 2


def _tensor(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


@dataclass(frozen=True, eq=False)
class WeightedOutput:
    """`sum (f(x)² / 2 + c f(x))`, `c` from -1 to 1, so that every output counts, and differently.

    >>> WeightedOutput(nn.Identity())({}, {"x": torch.tensor([1.0, 2.0])})
    tensor(3.5000)
    """

    model: nn.Module

    def _value(self, y: Tensor) -> Tensor:
        c = torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype)
        return (y.flatten(1).square() / 2 + y.flatten(1) * c).sum(1)

    def __call__(self, params: Params, example: Example) -> Tensor:
        return self._value(_tensor(call(self.model, params, example["x"][None])))[0]


class BatchedOutput(WeightedOutput):
    """The same, with the batched form."""

    def batched(self, batch: Batch) -> Tensor:
        """In one forward."""
        return self._value(_tensor(self.model(batch["x"])))


@dataclass(frozen=True, eq=False)
class Layered:
    """A module with random parameters, a chain and rows."""

    module: nn.Module
    chain: Transform
    rows: list[dict[str, Tensor]]


Inputs = tuple[int, ...] | st.SearchStrategy[Tensor]


@st.composite
def _layered(draw: Draw, make: Callable[[], nn.Module], inputs: Inputs) -> Layered:
    module = make()
    module = randomize(CalledTwice(module) if draw(st.booleans()) else module, draw(seeds()))
    count = draw(st.integers(2, 4))
    if isinstance(inputs, tuple):
        generator = torch.Generator().manual_seed(draw(seeds()))
        x = [torch.randn(inputs, generator=generator, dtype=torch.float64) for _ in range(count)]
    else:
        x = [draw(inputs) for _ in range(count)]
    rows = [{"x": value} for value in x]
    dense = naive_blocks(WeightedOutput(module), module, rows, EVERYTHING)
    made = draw(chains(shapes_of(dense), max_stages=3))
    if draw(st.booleans()):
        queries = made({name: G[:2].clone() for name, G in dense.items()})
        made = chain(made, dot(queries))
    return Layered(module, made, rows)


def _definition(tolerance: float, case: Layered) -> str:
    loss, module = WeightedOutput(case.module), case.module
    grads = definition(loss, params_of(module), collate(case.rows), module)
    got = blocks_of(find_sites(module, EVERYTHING), grads)
    wrong = difference(got, naive_blocks(loss, module, case.rows, EVERYTHING), tolerance)
    return f"vmap(grad) is not a loop of autograd: {wrong}" if wrong else ""


def _engine(tolerance: float, probed: bool, case: Layered) -> str:
    dense = naive_blocks(WeightedOutput(case.module), case.module, case.rows, EVERYTHING)
    for form in (WeightedOutput, BatchedOutput):
        loss = form(case.module)
        engine = probe_engine(case.module, loss, case.chain, view=EVERYTHING)
        meant = {site.path for site in engine.sites if site.probed}
        got = engine(collate(case.rows)).values
        if probed and (lost := sorted(meant - {site.path for site in engine.sites if site.probed})):
            return (
                f"the probe of {lost[0] or 'root'} does not give the naive gradient, so the engine takes "
                "vmap(grad) for it (if that is meant: probed=False)"
            )
        if wrong := chain_difference(got, case.chain, dense, tolerance):
            what = "under vmap" if form is WeightedOutput else "in one forward"
            return f"the probe, {what}, does not give the naive gradient: {wrong}"
    return ""


def _alone(tolerance: float, case: Layered) -> str:
    engine = probe_engine(case.module, BatchedOutput(case.module), project(2), view=EVERYTHING)
    together = engine(collate(case.rows)).values
    assert isinstance(together, dict)
    for b, row in enumerate(case.rows):
        among = {name: G[b : b + 1] for name, G in together.items()}
        if wrong := difference(engine(collate([row])).values, among, tolerance):
            return f"row {b} alone is not what it is among the others: {wrong}"
    return ""


def check_layer(
    make: Callable[[], nn.Module],
    inputs: Inputs,
    *,
    probed: bool = True,
    max_examples: int = 12,
    tolerance: float = 1e-9,
) -> None:
    """Check that the gradients of all weights of a kind of layer are those of a naive loop.

    `probe_engine` equals `vmap(grad)` and a loop of autograd in float64, with a loss of one example and with
    a batched loss, under random chains, when the module is called twice in a forward, whatever the batch.

    Args:
        make: gives the module, which maps `[batch, *one input]` to a tensor or to a tuple that begins with
            one; its parameters are drawn at random, float64, in eval mode.
        inputs: the shape of one example's input, or a strategy of such inputs (token ids, say).
        probed: whether the layer's probes must be right; False where the engine is to find that they are not,
            and to take `vmap(grad)` for them.
        max_examples: how many cases.
        tolerance: relative to the largest number of a block.

    Raises:
        BrokenLawError: naming the law, with the smallest case that breaks it.
        InputError: a module without parameters.

    >>> check_layer(lambda: nn.Linear(3, 2), (3,), max_examples=3)
    """
    if next(make().parameters(), None) is None:
        raise InputError("the module has no parameters, so no gradients: check one that has")
    laws = [partial(_definition, tolerance), partial(_engine, tolerance, probed), partial(_alone, tolerance)]
    refute("check_layer", partial(first, laws), _layered(make, inputs), max_examples)
