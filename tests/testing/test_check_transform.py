"""Each law of a transform refuses a transform that breaks it, and says which."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.testing import BrokenLawError, chains, check_estimator, check_transform
from gradfn.transforms import adafactor, dot, project, unit_normalize
from gradfn.transforms.chain import Blockwise, Kronecker, Rowwise


@dataclass(frozen=True)
class Sign(Blockwise):
    linear = True

    def block(self, name, G):
        return G.sign()


@dataclass(frozen=True)
class Centre(Blockwise):
    def block(self, name, G):
        return G - G.mean(0) if len(G) else G


@dataclass(frozen=True)
class NotOfNone(Blockwise):
    def block(self, name, G):
        return G if len(G) else G.flatten(1)


@dataclass(frozen=True)
class Reshaped(Blockwise):
    """Of no rows, -1 may be any number."""

    def block(self, name, G):
        return G.reshape(len(G), 1, -1)


@dataclass(frozen=True)
class LastPart(Blockwise):
    """Takes 32 rows at a time, and forgets what is left of more."""

    def block(self, name, G):
        return G if len(G) <= 32 else torch.cat([G[:32], 0 * G[32:]])


@dataclass(frozen=True)
class Stored(Blockwise):
    """The matrix that it holds keeps its dtype."""

    def block(self, name, G):
        return G @ torch.eye(G.shape[-1], dtype=torch.float64)


@dataclass(frozen=True)
class Wider(Blockwise):
    def block(self, name, G):
        return G.double()


@dataclass(frozen=True)
class Callback(Blockwise):
    function: Callable

    def block(self, name, G):
        return self.function(G)


@dataclass(frozen=True)
class Unguarded(Rowwise):
    def __call__(self, blocks):
        return {name: G / G.flatten(1).norm(dim=1)[:, None, None] for name, G in blocks.items()}


@dataclass(frozen=True)
class InPlace(Blockwise):
    def block(self, name, G):
        return G.clamp_(-1, 1)


@dataclass(frozen=True)
class Dropped(Blockwise):
    def block(self, name, G):
        return G * torch.rand(G.shape)


@dataclass(frozen=True)
class Counted(Blockwise):
    calls: list = field(default_factory=list)

    def block(self, name, G):
        self.calls.append(name)
        return G


class Open(Blockwise):
    def block(self, name, G):
        return G


@dataclass(frozen=True)
class Unequal(Kronecker):
    """The dense form is not what the factors give."""

    def kron(self, spec):
        return Kron(torch.full(spec.shape[:1], 2.0, dtype=spec.dtype), None)

    def __call__(self, blocks):
        return {name: 3 * G for name, G in blocks.items()}


@dataclass(frozen=True)
class Tanh(Blockwise):
    """Not linear and saying so, hence behind the sum over the uses of a shared weight."""

    def block(self, name, G):
        return G.tanh()


BROKEN = {
    "it says that it is linear, but": Sign(),
    "rows are not independent: row 0 alone": Centre(),
    "of no rows it does not give no rows: a: shape": NotOfNone(),
    "of no rows it does not give no rows: RuntimeError: cannot reshape": Reshaped(),
    "rows are not independent: 33 copies of them do not give 33 times the same": LastPart(),
    "it does not take blocks in torch.float32: expected": Stored(),
    "of blocks in torch.float32 it gives torch.float64: end with": Wider(),
    "its settings cannot be stored: Object of type function": Callback(lambda G: G),
    "a gradient of zero gives numbers that are not finite": Unguarded(),
    "it changes the blocks it is given": InPlace(),
    "twice the same blocks give different rows": Dropped(),
    "using it changes its settings": Counted(),
    "Open is not a frozen dataclass": Open(),
    "lowered into the backward it gives other rows": Unequal(),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_law_is_named(message):
    with pytest.raises(BrokenLawError, match=message):
        check_transform(BROKEN[message], kinds=("mlp",))


@pytest.mark.parametrize("transform", [
    project(2), unit_normalize(), Tanh(), lambda shapes: chains(shapes, max_stages=2),
    lambda shapes: adafactor({name: torch.ones(shape) for name, shape in shapes.items()}),
    lambda shapes: dot({name: torch.ones(1, *shape) for name, shape in shapes.items()}),
], ids=["project", "unit", "nonlinear", "chains", "fitted", "scores"])  # fmt: skip
def test_transforms_that_hold(transform):
    check_transform(transform, kinds=("mlp",))


def test_convolutions_are_among_the_models():
    check_transform(unit_normalize(), kinds=("conv",))


def test_the_counterexample_is_small_and_the_same_every_time():
    messages = set()
    for _ in range(2):
        with pytest.raises(BrokenLawError) as caught:
            check_transform(Centre(), kinds=("mlp",))
        messages.add(str(caught.value))
    assert messages == {
        "check_transform: rows are not independent: row 0 alone is not what it is among the others: "
        "a: off by 1, allowed 1e-08 (0 instead of 1)\n"
        "  transform: Centre()\n  blocks: {a: [[[1.5]], [[-0.5]]]}"
    }


@dataclass(frozen=True)
class Affine(Blockwise):
    linear = True

    def block(self, name, G):
        return G + 1.0


def test_what_adds_a_constant_is_not_linear():
    with pytest.raises(BrokenLawError, match="it says that it is linear"):
        check_transform(Affine(), kinds=())


@pytest.mark.parametrize("kinds", ["mlp", ("mlps",)])
def test_models_that_there_are_not_are_refused(kinds):
    with pytest.raises(InputError, match="kinds are several of mlp, conv"):
        check_transform(project(2), kinds=kinds)
    with pytest.raises(InputError, match="kinds are several of mlp, conv"):
        check_estimator(lambda *case: torch.zeros(1), kinds=kinds)
