"""Verifying probes: comparing what they give with plain autograd, before the engine relies on them.

A probe is right only if its module does what its class says, if the loss uses the weight through the module
alone, and if the rows of the module are those of the examples. The engine cannot read this off the code, so
it compares: before the first batch it takes two examples, and projects the gradient of every block to
`L G Rᵀ`, with random L and R of eight rows. Probes give this for both examples in one batch, plain autograd
for each example alone. A weight whose blocks differ has no probe from then on. What the engine found is
remembered with the model, for the next engine of the same loss and weights.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from gradfn.data import IGNORED
from gradfn.engine.journal import as_function
from gradfn.engine.reference import one_number
from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.model.params import params_of
from gradfn.model.sharded import replacing, turns_of
from gradfn.model.sites import Site
from gradfn.transforms import project
from gradfn.types import Batch, Blocks, Example, LossFn, Params

PARAMS = "__dataclass_params__"
SKETCH = 8
"""The rows of the random L and R: blocks are compared by at most 8 x 8 numbers."""
VERIFY_TOKENS = 16
"""The tokens of a long sequence that are enough to compare gradients."""

COPIES = 64
"""How many copies of a row tell whether experts drop tokens of a large batch."""


class Call(NamedTuple):
    """How many rows of a module's input belong to one example (0: all examples share one row).

    Args:
        rows: how many.
        lengths: of the sequences in the batch, by key.
    """

    rows: int
    lengths: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, rows: int, batch: Batch) -> "Call":
        """A call in a forward pass of a batch."""
        return cls(rows, tuple((key, v.shape[1]) for key, v in batch.items() if v.ndim in (2, 3)))

    @property
    def is_plain(self) -> bool:
        """Whether the rows are the examples, or whole tokens of them."""
        return (
            self.rows <= 1 or not self.lengths or any(self.rows % length == 0 for _, length in self.lengths)
        )

    def covers(self, other: "Call") -> bool:
        """Whether another call has as many rows an example, or as many a token."""
        if self.rows == other.rows:
            return True
        lengths = dict(other.lengths)
        return any(self.rows * lengths.get(key, 0) == other.rows * length for key, length in self.lengths)


@dataclass
class Verified:
    """What is verified for batches with the same keys.

    Args:
        examples: how many examples with a gradient were compared in one batch.
        calls: how each module was called in it.
    """

    examples: int = 0
    calls: dict[str, set[Call]] = field(default_factory=dict)

    def note(self, path: str, rows: int, batch: Batch) -> bool:
        """Remember a call of the comparison; False if its rows cannot be told apart by example."""
        call = Call.of(rows, batch)
        if call.is_plain:
            self.calls.setdefault(path, set()).add(call)
        return call.is_plain

    def covers(self, path: str, rows: int, batch: Batch) -> bool:
        """Whether a call is like one in the comparison, or of one example alone."""
        call, alone = Call.of(rows, batch), len(next(iter(batch.values()))) == 1
        return call.is_plain and (alone or any(seen.covers(call) for seen in self.calls.get(path, ())))


@dataclass
class ModelFacts:
    """What engines found out about a model under a loss.

    Args:
        unprobed: blocks whose probes are wrong.
        shared: blocks whose modules are called more than once in a forward pass.
        copies: whether the model writes to what its modules return, so that probes must give it a copy.
        singly: whether a batch is computed one row at a time: `vmap` cannot map over the model's code, or a
            row depends on the other rows.
        plain: whether weights without a probe go through plain autograd, because `vmap(grad)` could crash.
            None: not known yet.
        unpadded: whether padding changes a row, by the keys of the batches and whether much was compared.
        verified: by the keys of the batches.
    """

    unprobed: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    copies: bool = False
    singly: bool = False
    plain: bool | None = None
    unpadded: dict[tuple[frozenset[str], bool], bool] = field(default_factory=dict)
    verified: dict[frozenset[str], Verified] = field(default_factory=dict)

    def of(self, batch: Batch) -> Verified:
        """What is verified for batches with the keys of this one."""
        return self.verified.setdefault(frozenset(batch), Verified())


_FACTS: MutableMapping[nn.Module, dict[Hashable, ModelFacts]] = WeakKeyDictionary()


def facts_of(model: nn.Module, loss: LossFn, sites: Sequence[Site]) -> ModelFacts:
    """The facts about a model, its weights and a loss, which are empty for a loss that may have changed.

    Only a frozen dataclass shows by its fields that it is the same function as before. A model is another one
    after a module was replaced, patched or given a hook.
    """
    if isinstance(loss, type) or not is_dataclass(loss) or not getattr(loss, PARAMS).frozen:
        return ModelFacts()
    try:
        function = type(loss), *(_same(getattr(loss, f.name), model) for f in fields(loss))
        weights = tuple((s.path, s.block, s.parameter, s.weight.dtype, s.weight.device) for s in sites)
        modules = tuple(
            (id(m), id(m.__dict__.get("forward")), len(m._forward_hooks), len(m._forward_pre_hooks))
            for m in model.modules()
        )
        return _FACTS.setdefault(model, {}).setdefault((function, weights, modules), ModelFacts())
    except TypeError:  # a field that has neither a hash nor a weak reference
        return ModelFacts()


def _same(value: Any, model: nn.Module) -> Hashable:
    """What tells whether a field is the same as before, without a strong reference to it."""
    if value is model or value is None or isinstance(value, str | int | float | tuple | frozenset):
        hash(value)
        return None if value is model else (value,)
    return ref(value)


def two_rows(batch: Batch) -> Batch:
    """Two examples to verify with, each with a supervised token if possible, cut to a few tokens if long."""
    labels, rows = batch.get("labels"), torch.arange(min(2, len(next(iter(batch.values())))))
    if labels is not None and labels.ndim == 2 and not labels.is_floating_point():
        silent = (labels[:, 1:] == IGNORED).all(1).to(torch.uint8)
        rows = silent.argsort(stable=True)[: len(rows)].cpu()
    return _window({key: value[rows.to(value.device)] for key, value in batch.items()})


def _window(batch: Batch) -> Batch:
    """Cut long sequences with a label for every token to a few tokens around the first supervised one."""
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if ids is None or labels is None or ids.shape != labels.shape or ids.shape[1] <= VERIFY_TOKENS:
        return batch
    firsts = (labels[:, 1:] != IGNORED).to(torch.uint8).argmax(1)
    starts = (firsts - VERIFY_TOKENS // 2).clamp(0, ids.shape[1] - VERIFY_TOKENS).tolist()

    def of(value: Tensor) -> Tensor:
        return torch.stack([v[start : start + VERIFY_TOKENS] for v, start in zip(value, starts, strict=True)])

    return {key: of(value) if value.shape[:2] == ids.shape else value for key, value in batch.items()}


def tolerance(weights: Collection[torch.dtype]) -> tuple[float, float]:
    """How far rounding may move a block: relative to its own norm, and to the largest norm of the example."""
    bits = min(torch.finfo(weight).bits for weight in weights)
    if bits != 32:
        return (0.5, 1e-2) if bits < 32 else (1e-6, 1e-10)
    return (0.1, 1e-3) if _rounds_products() else (2e-3, 1e-5)


def rebinds_modules(loss: LossFn, model: nn.Module, weights: Sequence[Tensor], example: Example) -> bool:
    """Whether a forward pass sets modules or parameters; see `Journal`.

    Raises:
        InputError: the loss is not one number, or reads one of the weights past its `params`.
    """
    own = [weight for weight in weights if weight.is_floating_point()]
    try:
        for weight in own:
            weight.requires_grad_(True)
        with as_function(model) as journal:
            value = one_number(loss(params_of(model), example))
        past = torch.autograd.grad(value, own, allow_unused=True) if value.requires_grad else ()
    finally:
        for weight in own:
            weight.requires_grad_(False)
    if any(grad is not None for grad in past):
        raise InputError(
            "the loss reads weights of the model past its `params`, so its gradient would be incomplete: "
            "call the model with torch.func.functional_call(model, params, ...)"
        )
    return journal.rebinds


def drops_tokens(loss: Any, model: nn.Module, pair: Batch) -> bool:
    """Whether rows depend on the other rows: experts of limited capacity drop what a large batch sends them.

    Copies of one row fill the same experts, so they tell.
    """
    if not any("expert" in name or "router" in name for name, _ in model.named_modules()):
        return False
    copies = {key: torch.cat([value[:1]] * COPIES) for key, value in pair.items()}
    with torch.no_grad(), as_function(model):
        losses = loss.batched(copies)
    spread = float(losses.max() - losses.min())
    return spread > loss_tolerance(model.parameters()) * (1 + float(losses.abs().max()))


def loss_tolerance(weights: Iterable[Tensor]) -> float:
    """How far rounding may move a loss, relative to one and itself: the root of the weights' precision."""
    dtypes = {p.dtype for p in weights if p.is_floating_point()}
    rounded = torch.float32 in dtypes and _rounds_products()
    return max([torch.finfo(dtype).eps for dtype in dtypes] + [2.0**-7] * rounded) ** 0.5


def _rounds_products() -> bool:
    """Whether float32 matrices are multiplied in a lower precision."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore
    return any(getattr(backend, "fp32_precision", "none") not in ("none", "ieee") for backend in backends)


def unequal_blocks(
    found: Blocks, krons: dict[str, Kron], loss: LossFn, model: nn.Module, sites: Sequence[Site], batch: Batch
) -> tuple[set[str], int]:
    """The blocks whose projected gradients differ from plain autograd, and how many examples had a gradient.

    Args:
        found: the projected gradient of every block `[rows, p, q]`, from probes.
        krons: the maps that projected them.
        loss, model, sites, batch: what they are gradients of. Quantised weights have no gradient to compare.
    """
    params = _floats(model)
    sites = [site for site in sites if {*site.names} <= params.keys()]
    rows = range(len(next(iter(batch.values()))))
    if not sites:
        return set(), len(rows)
    relative, floor = tolerance({site.weight.dtype for site in sites})
    wrong, count = set[str](), 0
    for row in rows:
        example = {key: value[row] for key, value in batch.items()}
        alone = _Alone(sites, params, krons)
        alone.run(loss, model, example)
        largest = max(alone.norms.values())
        count += largest > 0
        beyond = {
            name: float((found[name][row] - value).norm()) - relative * alone.norms[name]
            for name, value in alone.values.items()
        }
        if max(beyond.values()) > floor * largest:  # or all are rounding, next to weights not attributed
            largest = max(largest, _largest(loss, model, params.keys(), example))
        wrong |= {name for name, error in beyond.items() if error > floor * largest}
    return wrong, count


def _largest(loss: LossFn, model: nn.Module, names: Collection[str], example: Example) -> float:
    """The largest norm of an example's gradient with respect to any of these parameters."""
    norms = [0.0]

    def take(_: str, grad: Tensor) -> None:
        norms.append(float(grad.norm()))

    _differentiate(loss, model, names, example, take)
    return max(norms)


def _differentiate(
    loss: Any, model: nn.Module, names: Collection[str], example: Example, take: Callable[[str, Tensor], None]
) -> None:
    """Plain autograd of one example: `take(name, gradient)` of these parameters, one in memory at a time.

    Those of a sharded model are differentiated while they are whole; its logits are whole too, because the
    head is one of the layers. A parameter that the loss does not depend on has no gradient.
    """
    leaves = Params()

    def taken(name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        grad, leaf.grad = leaf.grad, None
        take(name, grad.to_dense() if grad.is_sparse else grad)

    def leaf_of(name: str, parameter: Tensor) -> Tensor:
        if name in names and name not in leaves:
            leaves[name] = parameter.detach().requires_grad_()
            leaves[name].register_post_accumulate_grad_hook(partial(taken, name))
        return leaves.get(name, parameter)

    with as_function(model):
        if turns_of(model) is None:
            value = loss({name: leaf_of(name, p) for name, p in _floats(model).items()}, example)
        else:
            loss = getattr(loss, "with_whole_logits", lambda: loss)()
            with replacing(model, leaf_of):
                (value,) = loss.batched({key: part[None] for key, part in example.items()})
        if value.requires_grad:
            value.backward()


def _floats(model: nn.Module) -> Params:
    """The parameters by name, without the codes of quantised ones, which have no gradient."""
    return {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point()}


def sketch() -> Any:
    """The projection that makes gradients small enough to compare all blocks at once."""
    return replace(project((SKETCH, SKETCH), "gaussian"), strict=False)


class _Alone:
    """The projected gradients of one example by plain autograd, and the norms of the gradients.

    Each gradient is projected as soon as the backward pass makes it, so only one or two are in memory.
    """

    def __init__(self, sites: Sequence[Site], params: Params, krons: dict[str, Kron]):
        self.krons, self.by_block = krons, dict[str, list[Site]]()
        for site in sites:
            self.by_block.setdefault(site.block, []).append(site)
        self.names = {block: {n for s in some for n in s.names} for block, some in self.by_block.items()}
        self.params = params
        self.values, self.norms = dict[str, Tensor](), dict[str, float]()
        self._made: dict[str, Tensor] = {}

    def run(self, loss: LossFn, model: nn.Module, example: Example) -> None:
        """Differentiate the loss of an example."""
        wanted = {name for names in self.names.values() for name in names}
        _differentiate(loss, model, wanted, example, self._take)
        for block in (
            self.by_block.keys() - self.values.keys()
        ):  # these have a parameter that the loss does not depend on
            self._finish(block)

    def _take(self, name: str, grad: Tensor) -> None:
        self._made[name] = grad
        for block, names in self.names.items():
            if name in names and names <= self._made.keys():
                self._finish(block)

    def _grad(self, name: str) -> Tensor:
        like = self.params[name]
        made = self._made.get(name)
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device) if made is None else made

    def _finish(self, block: str) -> None:
        names, site = self.names[block], self.by_block[block][0]
        weight, *bias = (self._grad(name)[None].to(site.spec.dtype) for name in site.names)
        own_bias = bias[0] if bias and site.layer.bias else None
        made, norm = site.layer.projected_block(weight, own_bias, self.krons[block])
        self.values[block], self.norms[block] = made[0], float(norm)
        needed = {n for other in self.by_block if other not in self.values for n in self.names[other]}
        for name in names - needed:
            self._made.pop(name, None)
