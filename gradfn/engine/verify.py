"""What an engine learns of a model by running it: which weights a probe sees right, how modules are called.

Before the first batch, every block's gradient of two examples is made small, `L G Rᵀ` with random L and R of
eight rows: once by probes, both examples in one batch, and once by plain autograd, each example alone. A
weight of which the two differ is taken from the probes. What was learned is kept beside the model, for the
next engine of the same loss and weights.
"""

from collections.abc import Collection, Hashable, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from gradfn.data import IGNORED
from gradfn.linalg.kron import Kron
from gradfn.model.layers import Linear
from gradfn.model.params import params_of
from gradfn.model.sites import Site
from gradfn.transforms import project
from gradfn.types import Batch, Blocks, Example, LossFn, Params

PARAMS = "__dataclass_params__"
SKETCH = 8
"""Gradients are compared by so many numbers of each side of a block."""
LOOK_TOKENS = 16
"""Tokens of a sequence that are enough to look at."""


class Call(NamedTuple):
    """How the rows of a module's input belong to the examples of a batch: so many to each; 0: one to all."""

    rows: int
    lengths: tuple[tuple[str, int], ...]

    def covers(self, other: "Call") -> bool:
        """Whether another call is of this kind: as many rows an example, or as many a token."""
        if self.rows == other.rows:
            return True
        lengths = dict(other.lengths)
        return any(self.rows * lengths.get(key, 0) == other.rows * length for key, length in self.lengths)


@dataclass
class Look:
    """What was looked at of batches of one kind (the same keys).

    Args:
        examples: how many were seen to have a gradient, in one batch.
        calls: how each module was called then.
    """

    examples: int = 0
    calls: dict[str, set[Call]] = field(default_factory=dict)


@dataclass
class Known:
    """What is known of a model under a loss.

    Args:
        unprobed: blocks that probes do not see right.
        shared: blocks whose modules are called more than once in a forward.
        copies: whether the model writes to what its modules return, so that probes must give it a copy.
        singly: whether its code cannot be mapped over by `vmap`.
        looks: by the keys of the batches.
    """

    unprobed: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    copies: bool = False
    singly: bool = False
    looks: dict[frozenset[str], Look] = field(default_factory=dict)

    def look(self, batch: Batch) -> Look:
        """What was looked at of batches like this one."""
        return self.looks.setdefault(frozenset(batch), Look())


_KNOWN: MutableMapping[nn.Module, dict[Hashable, Known]] = WeakKeyDictionary()


def known_of(model: nn.Module, loss: LossFn, sites: Sequence[Site]) -> Known:
    """What is known of a model, its weights and a loss; nothing yet of a loss that may have changed since.

    Only a frozen dataclass says that it is the same function as before. A module that was exchanged, hooked
    or patched makes another model.
    """
    if isinstance(loss, type) or not is_dataclass(loss) or not getattr(loss, PARAMS).frozen:
        return Known()
    try:
        function = type(loss), *(_same(getattr(loss, f.name), model) for f in fields(loss))
        weights = tuple((s.path, s.block, s.parameter, s.weight.dtype, s.weight.device) for s in sites)
        modules = tuple(
            (id(m), id(m.__dict__.get("forward")), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        )
        return _KNOWN.setdefault(model, {}).setdefault((function, weights, modules), Known())
    except TypeError:  # a field that can be neither compared nor referred to
        return Known()


def _same(value: Any, model: nn.Module) -> Hashable:
    """What says whether a field is as before, without keeping it alive."""
    if value is model or value is None or isinstance(value, str | int | float | tuple | frozenset):
        hash(value)
        return None if value is model else (value,)
    return ref(value)


def trial(batch: Batch) -> Batch:
    """Two examples to look at, such as have something to learn from; of long sequences a few tokens."""
    labels, rows = batch.get("labels"), torch.arange(min(2, len(next(iter(batch.values())))))
    if labels is not None and labels.ndim == 2 and not labels.is_floating_point():
        silent = (labels[:, 1:] == IGNORED).all(1).to(torch.uint8)
        rows = silent.argsort(stable=True)[: len(rows)].cpu()
    return _window({key: value[rows.to(value.device)] for key, value in batch.items()})


def _window(batch: Batch) -> Batch:
    """Of long sequences with a label for every token some tokens, from before the first that counts."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or ids.shape != labels.shape or ids.shape[1] <= LOOK_TOKENS:
        return batch
    firsts = (labels[:, 1:] != IGNORED).to(torch.uint8).argmax(1)
    starts = (firsts - LOOK_TOKENS // 2).clamp(0, ids.shape[1] - LOOK_TOKENS).tolist()

    def of(value: Tensor) -> Tensor:
        return torch.stack([v[start : start + LOOK_TOKENS] for v, start in zip(value, starts, strict=True)])

    return {key: of(value) if value.shape[:2] == ids.shape else value for key, value in batch.items()}


def tolerance(weights: Collection[torch.dtype]) -> tuple[float, float]:
    """How far rounding may move a gradient: of its own norm, and of the largest of the example."""
    bits = min(torch.finfo(weight).bits for weight in weights)
    if bits != 32:
        return (0.5, 1e-2) if bits < 32 else (1e-6, 1e-10)
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore
    rounded = any(getattr(backend, "fp32_precision", "none") not in ("none", "ieee") for backend in backends)
    return (0.1, 1e-3) if rounded else (2e-3, 1e-5)


def differing(
    found: Blocks, krons: dict[str, Kron], loss: LossFn, model: nn.Module, sites: Sequence[Site], batch: Batch
) -> tuple[set[str], int]:
    """The blocks whose small gradients are not those of each example alone; how many examples had any.

    Args:
        found: of every block `[rows, p, q]`, by probes.
        krons: the maps that made them small.
        loss, model, sites, batch: of which; quantised weights have no gradient to compare with.
    """
    params = {n: p for n, p in params_of(model).items() if p.is_floating_point()}
    sites = [site for site in sites if {*site.names} <= params.keys()]
    rows = range(len(next(iter(batch.values()))))
    if not sites:
        return set(), len(rows)
    relative, floor = tolerance({site.weight.dtype for site in sites})
    lost, told = set[str](), 0
    for row in rows:
        alone = _Alone(sites, params, krons)
        alone.run(loss, params, {key: value[row] for key, value in batch.items()})
        largest = max(alone.norms.values())
        told += largest > 0
        for name, value in alone.values.items():
            error = float((found[name][row] - value).norm())
            if error > relative * alone.norms[name] + floor * largest:
                lost.add(name)
    return lost, told


def sketch() -> Any:
    """The projection that makes gradients small enough to keep and compare."""
    return replace(project((SKETCH, SKETCH), "gaussian"), strict=False)


class _Alone:
    """The small gradients of one example by plain autograd, and the norms of the whole ones.

    A gradient is made small as soon as there is one, so that no more than one or two are held at a time.
    """

    def __init__(self, sites: Sequence[Site], params: Params, krons: dict[str, Kron]):
        self.krons, self.by_block = krons, dict[str, list[Site]]()
        for site in sites:
            self.by_block.setdefault(site.block, []).append(site)
        self.names = {block: {n for s in some for n in s.names} for block, some in self.by_block.items()}
        self.leaves = {n: params[n].detach().requires_grad_() for names in self.names.values() for n in names}
        self.values, self.norms = dict[str, Tensor](), dict[str, float]()
        self._made: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            leaf.register_post_accumulate_grad_hook(partial(self._take, name))

    def run(self, loss: LossFn, params: Params, example: Example) -> None:
        """Take the gradient of the loss of an example."""
        value = loss({**params, **self.leaves}, example)
        if value.requires_grad:
            value.backward()
        for block in self.by_block.keys() - self.values.keys():  # the loss does not depend on all of it
            self._finish(block)

    def _take(self, name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self._made[name], leaf.grad = leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad, None
        for block, names in self.names.items():
            if name in names and names <= self._made.keys():
                self._finish(block)

    def _finish(self, block: str) -> None:
        names, site = self.names[block], self.by_block[block][0]
        weight, *bias = (
            self._made.get(n, torch.zeros_like(self.leaves[n])).detach()[None] for n in site.names
        )
        made = _small(site, weight, bias[0] if bias and site.layer.bias else None, self.krons[block])
        self.values[block], self.norms[block] = made[0], float(made[1])
        needed = {n for other in self.by_block if other not in self.values for n in self.names[other]}
        for name in names - needed:
            self._made.pop(name, None)


def _small(site: Site, weight: Tensor, bias: Tensor | None, kron: Kron) -> tuple[Tensor, Tensor]:
    """`L G Rᵀ` of one example and the norm of the block G, without a copy of a large weight."""
    layer, dtype, left, right = site.layer, site.spec.dtype, kron.left, kron.right
    plain = type(layer) is Linear and layer.rows is None and layer.columns is None
    if not plain or not isinstance(left, Tensor) or not isinstance(right, Tensor):
        G = layer.block(weight, bias)[0].to(dtype)
        return kron(G), G.norm()
    G = layer.block(weight, None)[0].to(dtype)
    if bias is None:
        return left @ G @ right.T, G.norm()
    b = bias[0].to(dtype)
    return left @ G @ right[:, :-1].T + (left @ b)[:, None] * right[:, -1], G.norm().hypot(b.norm())
