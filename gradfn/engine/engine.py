"""The production engine: probes, zero-valued inputs whose cotangents are the statistics wanted.

    forward:   probe(y, x, slot) = y                 # slot: zeros shaped like the statistic
    backward:  dL/dy = g,  dL/dslot = pullback(x, g)

A forward hook puts a probe behind every attributed layer; one `autograd.grad` with respect to the slots then
gives per-example statistics of all layers. No weight and no embedding gradient is computed, and a
layer's factors live only while its own backward runs.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from math import prod
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from gradfn.engine.attention import fast_attention
from gradfn.engine.reference import definition
from gradfn.engine.verify import Call, Known, differing, known_of, sketch, trial
from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.model.layers import AttentionInput, Conv, ExpertRouting, Experts, Layer, Linear
from gradfn.model.params import params_of
from gradfn.model.sites import Site, Tap, View, blocks_of, find_sites, output_head
from gradfn.transforms import Chain, Transform, chain, lower
from gradfn.transforms.lower import BlockPlan, Lowered
from gradfn.transforms.row_sum import FactorSum, RowSum
from gradfn.types import Batch, Blocks, Example, LossFn, Params, Rows


class _Probe(torch.autograd.Function):
    """The identity on `y`; the cotangent of `slot` is `pullback(kept, dL/dy)`."""

    @staticmethod
    def forward(y, slot, kept, pullback, copy, mark):
        return y.clone() if copy else y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.pullback = inputs[3]

    @staticmethod
    def backward(ctx, *grads):
        (kept,) = ctx.saved_tensors
        return grads[0], ctx.pullback(kept, grads[0]), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, y, slot, kept, pullback, copy, mark):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Under vmap the examples' axis is moved to the front and the batched probe does the rest.

        `mark` differs by example, so that this is called where the layer's input and slot do not.
        """
        y, kept = (
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in ((y, in_dims[0]), (kept, in_dims[2]))
        )
        slot = (
            slot if in_dims[1] is None else slot.movedim(in_dims[1], 0)
        )  # one slot for all: a sum over them
        return _Probe.apply(y, slot, kept, pullback, copy, None), 0


@dataclass(frozen=True, eq=False)
class _Factors:
    """How one weight's factors become its slot's cotangent."""

    plan: BlockPlan
    layer: Layer
    path: str = ""
    tokens: int | None = None
    where: ExpertRouting | None = None
    counts: Tensor | None = None
    padded: bool = False

    @property
    def rotates(self) -> bool:
        """Whether the Kron does not make the input smaller, so that it may as well act on the block."""
        right = self.plan.kron.right
        reduces = right is None or right.ndim < 2 or len(right) < right.shape[1]
        return type(self.layer) is Linear and not reduces

    def keep(self, x: Tensor) -> Tensor:
        """What the backward needs of the input: its projection where there is one, else itself."""
        return self.layer.keep(x, None if self.rotates else self.plan.kron.right)

    def pullback(self, kept: Tensor, g: Tensor) -> Tensor:
        """`inside(L (sum_t g_t x_tᵀ) Rᵀ)` for every example, or for every token."""
        plan, g = self.plan, g.to(self.plan.dtype)
        kept = kept.to(plan.dtype) if kept.is_floating_point() else kept
        if plan.merged and self.tokens is None and isinstance(self.layer, Linear | Conv):
            kept, g = kept[None], g[None]  # the rows' sum is the gradient of one row with all their positions
        if self.rotates:
            if self._block_is_cheaper(kept):
                return self._rotated(kept, g)
            assert isinstance(self.layer, Linear)
            kept = replace(self.layer, columns=None).keep(kept, plan.kron.right)  # its columns were kept
        if self.where is not None:
            assert isinstance(self.layer, Experts)
            return plan.within(self.layer.contract_ragged(kept, g, plan.kron, self.where))
        if plan.of_factors:
            return self._of_factors(plan.of_factors, *self.layer.factors(kept, g, plan.kron))
        tokens = self.tokens is not None
        if self.tokens is not None:
            kept, g = _by_token(kept, self.tokens, self.path), _by_token(g, self.tokens, self.path)
        share = plan.share
        if share and self.layer.prefers_factors(g, plan.kron, len(share.queries), share.unit, tokens):
            return self.layer.score(kept, g, plan.kron, share.queries, share.unit, tokens)
        if tokens:
            return self._by_tokens(kept, g)
        step = plan.rows_at_once
        if step >= len(g):
            return plan.within(self.layer.contract(kept, g, plan.kron, tokens=False))
        parts = zip(kept.split(step), g.split(step), strict=True)
        made = (plan.within(self.layer.contract(*part, plan.kron, tokens=False)) for part in parts)
        return reduce(torch.add, made) if plan.total else torch.cat(list(made))

    def _by_tokens(self, kept: Tensor, g: Tensor) -> Tensor:
        """The same of every token, the dense blocks of some at a time."""
        plan, size = self.plan, g.shape[:2]
        step = max(1, min(size[1], plan.rows_at_once // size[0]))
        made = []
        for x, part in zip(kept.split(step, 1), g.split(step, 1), strict=True):
            G = self.layer.contract(x, part, plan.kron, tokens=True)
            within = plan.within(G.flatten(0, 1))
            made.append(within if plan.total else within.unflatten(0, G.shape[:2]))
        return reduce(torch.add, made) if plan.total else torch.cat(made, 1)

    def _block_is_cheaper(self, kept: Tensor) -> bool:
        """Whether a Kron costs less on the blocks of the examples than on the factors of their positions."""
        if self.plan.of_factors or self.plan.share or self.tokens is not None:
            return False
        out, into = self.layer.out_features, self.layer.in_features
        return prod(kept.shape[1:-1]) * (out + into) * max(out, into) > out * into * (out + into)

    def _rotated(self, kept: Tensor, g: Tensor) -> Tensor:
        plan, step = self.plan, self.plan.rows_at_once
        pairs = zip(kept.split(step), g.split(step), strict=True) if step < len(g) else [(kept, g)]
        made = [plan.within(plan.kron(self.layer.contract(*pair, Kron(), tokens=False))) for pair in pairs]
        return reduce(torch.add, made) if plan.total else torch.cat(made)

    def _of_factors(self, summed: FactorSum, x: Tensor, g: Tensor) -> Tensor:
        """The statistic of the factors `[batch, positions, ...]`, over the positions that count."""
        counts = g.new_ones(x.shape[:2])
        if self.counts is not None and self.counts.shape == counts.shape:
            counts = self.counts.to(counts)
        elif self.padded and x.shape[1] > 1:  # positions that the loss does not know of
            counts = (g != 0).any(-1).to(counts)  # padding has no gradient
        if self.tokens is not None:
            x, g, counts = (_by_token(v, self.tokens, self.path) for v in (x, g, counts[..., None]))
            x, g, counts = x.flatten(0, 1)[:, None], g.flatten(0, 1)[:, None], counts.flatten(0, 1)
        return summed.of(x, g, counts)[None]


def _no_tokens(path: str) -> InputError:
    return InputError(f"{path} has no gradient of each token: --exclude '{path}'")


def _no_factors(path: str, noun: str) -> InputError:
    return InputError(
        f"{path} has no input and output gradient of its own, which {noun} is fitted from: --exclude '{path}'"
    )


def _by_token(v: Tensor, tokens: int, path: str) -> Tensor:
    """`[batch, tokens, ...]`, from there or from one more axis of length 1 in front of the tokens."""
    v = v.squeeze(1) if v.ndim > 2 and v.shape[1] == 1 != tokens else v
    if v.ndim < (3 if v.is_floating_point() else 2) or v.shape[1] != tokens:  # ids have no features
        raise _no_tokens(path)
    return v


Result = TypeVar("Result")
Pullback = Callable[[Tensor, Tensor], Tensor]
MakeFactors = Callable[[Site, Layer, ExpertRouting | None], _Factors]


class _RepeatedCallError(Exception):
    """A module planned for one call a forward was called again."""

    def __init__(self, block: str):
        self.block = block


class _MixedError(Exception):
    """The rows of a module cannot be told apart by example."""

    def __init__(self, path: str):
        self.path = path


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters, switch to eval mode and out-of-place activations; all is put back."""
    modules = list(model.modules())
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in modules if m.training]
    in_place = [m for m in modules if getattr(m, "inplace", False) is True]
    # functional_call leaves plain tensors behind in a module that occurs twice.
    parameters = [(m, dict(m._parameters)) for m in modules if m._parameters]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it runs past the modules' hooks
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        for module in in_place:
            # What a probe returns must not be overwritten.
            module.inplace = False  # pyright: ignore[reportArgumentType]
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, own in parameters:
            module._parameters.update(own)
        for module in in_place:
            module.inplace = True  # pyright: ignore[reportArgumentType]
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@dataclass(eq=False)
class Engine:
    """Per-example statistics of a model, one batch at a time: `engine(batch) -> Rows`; see `probe_engine`."""

    model: nn.Module
    loss: LossFn
    transform: Transform
    sites: Sequence[Site]
    view: View = field(default_factory=View)
    known: Known = field(default_factory=Known, repr=False)
    _looking: bool = False
    _lowered: tuple[frozenset[str], Lowered] | None = None

    def __post_init__(self):
        uses = Counter(site.block for site in self.sites)
        self.known.shared |= {block for block, count in uses.items() if count > 1}
        self._leave_unprobed()

    def lowered(self) -> Lowered:
        """The transform, lowered for this model."""
        shared = frozenset(self.known.shared)
        if self._lowered is None or self._lowered[0] != shared:
            specs = {site.block: site.spec for site in self.sites}
            lowered = lower(self.transform, specs.values(), shared)
            # Only linear layers take maps that are no matrices on the factors.
            others = {site.block for site in self.sites if not isinstance(site.layer, Linear)}
            plans = {n: plan.with_matrices() if n in others else plan for n, plan in lowered.plans.items()}
            self._lowered = shared, replace(lowered, plans=plans)
        return self._lowered[1]

    @property
    def summed(self) -> bool:
        """Whether results are sums over the rows of a batch."""
        stages = self.transform.stages if isinstance(self.transform, Chain) else (self.transform,)
        return bool(stages) and isinstance(stages[-1], RowSum | FactorSum)

    def __call__(self, batch: Batch) -> Rows:
        with self._ready():
            self._retry(self._look, batch)
            return self._retry(self._differentiate, batch)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        self._leave_unprobed()  # another engine may have learned something
        with torch.inference_mode(False), torch.enable_grad(), _quiet(self.model):
            yield

    def _retry(self, run: Callable[[Batch], Result], batch: Batch) -> Result:
        """Run, and again with what was learned about the model."""
        while True:
            try:
                return run(batch)
            except _RepeatedCallError as repeated:
                # The weight's gradient is a sum over calls: what is not linear must wait behind it.
                self.known.shared.add(repeated.block)
            except _MixedError as mixed:
                self._unprobe({mixed.path})
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # What a probe returns is a view, which the model may not write to; a copy it may.
                look, probed = self.known.look(batch), {site.path for site in self.sites if site.probed}
                spread = {path for path, calls in look.calls.items() if any(not one.rows for one in calls)}
                if not self.known.copies and "modified inplace" in str(error):
                    self.known.copies = True
                elif spread & probed and not look.examples:  # one row in all, which is not for all examples
                    self._unprobe(spread & probed)
                else:
                    raise

    def _unprobe(self, paths: Collection[str]) -> None:
        """Take weights from the probes, with all uses of the same weight."""
        self.known.unprobed |= {site.block for site in self.sites if site.path in paths}
        self._leave_unprobed()

    def _leave_unprobed(self) -> None:
        unprobed = self.known.unprobed
        self.sites = [replace(s, probed=s.probed and s.block not in unprobed) for s in self.sites]

    def _differentiate(self, batch: Batch) -> Rows:
        lowered = self.lowered()
        blocks, losses = self._probed_blocks(batch)
        if blocks and not losses.requires_grad:
            raise InputError(
                "the loss does not depend on any attributed layer: check the loss, --include and --exclude"
            )
        blocks = blocks | self._unprobed_blocks(batch)
        blocks = {name: blocks[name] for name in lowered.plans}
        if self.view.tokens:
            ones = torch.ones_like(batch["input_ids"])
            real = batch.get("attention_mask", ones).bool()
            plans = lowered.plans
            blocks = {n: value if plans[n].total else value[real] for n, value in blocks.items()}
        return Rows(lowered.finish(blocks), losses.detach())

    def _probed_blocks(self, batch: Batch) -> tuple[Blocks, Tensor]:
        """The blocks of the weights that are probed, behind what acts inside them, and the losses."""
        lowered, size = self.lowered(), _size(batch)
        probed = {site.block for site in self.sites if site.probed}
        tokens = (batch["input_ids"].shape[1],) if self.view.tokens else ()
        slots = {
            name: torch.zeros((), dtype=plan.dtype, device=plan.device)
            .expand(*((1,) if plan.total else (size, *tokens)), *plan.shape)
            .requires_grad_()
            for name, plan in lowered.plans.items()
            if name in probed
        }
        positions = getattr(self.loss, "positions", None)

        def factors(site: Site, layer: Layer, where: ExpertRouting | None) -> _Factors:
            if tokens and (where is not None or isinstance(layer, Conv)):
                raise _no_tokens(site.path)
            plan = lowered.plans[site.block]
            if plan.of_factors is None:
                return _Factors(plan, layer, site.path, *tokens or (None,), where)
            if where is not None or not layer.has_factors:
                raise _no_factors(site.path, plan.of_factors.noun)
            counts = None if positions is None else positions(batch, site.path)
            return _Factors(
                plan, layer, site.path, *tokens or (None,), counts=counts, padded="input_ids" in batch
            )

        losses = self._losses(batch, slots, factors)
        if not slots or not losses.requires_grad:
            return {name: torch.zeros_like(slot) for name, slot in slots.items()}, losses
        grads = torch.autograd.grad(losses.sum(), list(slots.values()), materialize_grads=True)
        return dict(zip(slots, grads, strict=True)), losses

    def _losses(self, batch: Batch, slots: Blocks, factors: MakeFactors) -> Float[Tensor, " batch"]:
        """The losses of the batch, in one forward with a probe behind every attributed layer."""
        batched: Callable[[Batch], Tensor] | None = getattr(self.loss, "batched", None)
        if batched is not None:
            with self._probes(slots, factors, batch), fast_attention():
                return batched(batch)
        params = params_of(self.model)

        def one(slots: Blocks, example: Batch) -> Tensor:
            with self._probes(slots, factors, mark=next(iter(example.values()))):
                return self.loss(params, example)

        # A slot of one row for a batch of several is for a sum over them.
        size = _size(batch)
        shared = {name: None if len(slot) != size else 0 for name, slot in slots.items()}
        if not self.known.singly:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "There is a performance drop")  # of what is not batched
                    return vmap(one, in_dims=(shared, 0))(slots, dict(batch))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if "modified inplace" in str(error) and not self.known.copies:
                    raise
                self.known.singly = True  # the model's code cannot be mapped over
        losses = []
        for row in range(size):
            own = {
                name: slot if shared[name] is None else slot[row : row + 1] for name, slot in slots.items()
            }
            with self._probes(own, factors):
                losses.append(self.loss(params, _example(batch, row)))
        return torch.stack(losses)

    def _unprobed_blocks(self, batch: Batch) -> Blocks:
        """Blocks of the weights that no probe sees: `vmap(grad)` with respect to these parameters alone."""
        sites = [site for site in self.sites if not site.probed]
        if not sites:
            return {}
        if self.view.tokens:
            raise _no_tokens(sites[0].path)
        fixed = params_of(self.model)
        some = {name: fixed[name] for site in sites for name in site.names}

        def loss(params: Params, example: Example) -> Tensor:
            return self.loss({**fixed, **params}, example)

        for site in sites:
            if of := self.lowered().plans[site.block].of_factors:
                raise _no_factors(site.path, of.noun)
        blocks, plans = blocks_of(sites, definition(loss, some, batch)), self.lowered().plans
        return {
            name: plans[name].within(plans[name].kron(G.to(plans[name].dtype))) for name, G in blocks.items()
        }

    def look(self, batch: Batch) -> None:
        """Once, on two examples: do probes see what plain autograd sees of each example alone?

        A weight of which they do not, because the loss uses it past its module too, because its module is not
        what its class says, or because its rows cannot be told apart by example, is taken from the probes and
        goes through `vmap(grad)`. `engine(batch)` looks by itself; looking at short examples costs less.
        """
        with self._ready():
            self._retry(self._look, batch)

    def _look(self, batch: Batch) -> None:
        size, look = min(2, _size(batch)), self.known.look(batch)
        probes = [site for site in self.sites if site.probed]
        if look.examples >= size or not probes:
            return
        pair = trial(batch)
        look.calls.clear()
        probed = replace(self, transform=sketch(), sites=probes, view=View(), _lowered=None, _looking=True)
        found, _ = probed._probed_blocks(pair)
        krons = {name: plan.kron for name, plan in probed.lowered().plans.items()}
        lost, told = differing(found, krons, self.loss, self.model, probes, pair)
        self._unprobe({site.path for site in probes if site.block in lost})
        look.examples = told  # rows without a gradient tell nothing

    def _probed(
        self, site: Site, factors: _Factors, x: Tensor, y: Tensor, slot: Tensor, batch: Batch | None,
        mark: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`y` with a probe behind it."""
        keep, pullback = factors.keep, factors.pullback
        if self._looking:
            keep, pullback = (partial(_or_mixed, site.path, run) for run in (keep, pullback))
        kept = keep(x.detach())
        if batch is None and mark is None:
            probed: Any = _Probe.apply(y[None], slot, kept[None], pullback, self.known.copies, None)
            return probed[0]
        if batch is None or factors.where is not None:
            return _Probe.apply(y, slot, kept, pullback, self.known.copies, mark)  # pyright: ignore
        return self._by_example(site, pullback, kept, y, slot, batch)

    def _by_example(
        self, site: Site, pullback: Pullback, kept: Tensor, y: Tensor, slot: Tensor, batch: Batch
    ) -> Tensor:
        """One probe behind `y` of a batch; whatever is in front of it is split by example."""
        size = _size(batch)
        if y.ndim < 2 or len(y) != len(kept) or (len(kept) % size and len(kept) != 1):
            raise _MixedError(site.path)
        rows, lengths = len(kept) // size, {k: v.shape[1] for k, v in batch.items() if v.ndim in (2, 3)}
        if rows > 1 and lengths and all(rows % length for length in lengths.values()):
            raise _MixedError(site.path)  # some of the tokens, who knows whose
        call, calls = Call(rows, tuple(lengths.items())), self.known.look(batch).calls
        if self._looking:
            calls.setdefault(site.path, set()).add(call)
        elif size > 1 and not any(seen.covers(call) for seen in calls.get(site.path, ())):
            raise _MixedError(site.path)  # not called like this before, when gradients were compared
        if rows == 1:
            return _Probe.apply(y, slot, kept, pullback, self.known.copies, None)  # pyright: ignore
        if not rows:  # the same for all examples: positions, say
            kept, y = kept.expand(size, *kept.shape[1:]), y.expand(size, *y.shape[1:])
            return _Probe.apply(y, slot, kept, pullback, self.known.copies, None)  # pyright: ignore
        kept, y = kept.unflatten(0, (size, -1)), y.unflatten(0, (size, -1))
        probed: Any = _Probe.apply(y, slot, kept, pullback, self.known.copies, None)
        return probed.flatten(0, 1)

    @contextmanager
    def _probes(
        self, slots: Blocks, factors: MakeFactors, batch: Batch | None = None, mark: Tensor | None = None
    ) -> Iterator[None]:
        """Every probed weight's module calls a tap, which puts the weight's probes behind its output.

        Args:
            slots, factors: of the weights.
            batch: what goes through the model at once; None: one example.
            mark: where one example is a name for all of them, under vmap, a number that differs by example.
        """
        size = None if batch is None else _size(batch)
        calls: Counter[str] = Counter()
        by_module: dict[int, list[Site]] = {}
        for site in self.sites:
            if site.probed:
                by_module.setdefault(id(site.module), []).append(site)

        def make_tap(sites: Sequence[Site]) -> Tap:
            def tap(
                name: str,
                x: Any,
                y: Any,
                rows: tuple[int, int] | None = None,
                ragged: tuple[Tensor, Tensor, int] | None = None,
            ) -> Any:
                for site in sites:
                    layer = site.layer
                    if rows is not None and isinstance(layer, AttentionInput):
                        layer = layer.seen_in(*rows)
                    if site.parameter != name or layer is None:
                        continue
                    calls[site.block] += 1
                    if calls[site.block] > 1 and site.block not in self.known.shared:
                        raise _RepeatedCallError(site.block)
                    if not isinstance(y, Tensor) or not isinstance(x, Tensor):
                        raise _MixedError(site.path)
                    where = _where(ragged, size) if ragged else None
                    y = self._probed(site, factors(site, layer, where), x, y, slots[site.block], batch, mark)
                return y

            return tap

        with ExitStack() as undo:
            for sites in by_module.values():
                undo.callback(sites[0].attach(sites[0].module, make_tap(sites)))
            yield


def _or_mixed(path: str, run: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """Run what takes the module for what its class says; where it is not, it is not to be probed."""
    try:
        return run(*given)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise _MixedError(path) from error


def _where(ragged: tuple[Tensor, Tensor, int], size: int | None) -> ExpertRouting:
    """The example of every row of a mixture's experts, whose tokens lie example after example."""
    tokens, experts, count = ragged
    if size is None or count % size:
        raise InputError("a mixture of experts needs a loss with a batched form: exclude its experts")
    return ExpertRouting(tokens // (count // size), experts, size)


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _example(batch: Batch, row: int) -> Example:
    return {key: value[row] for key, value in batch.items()}


def probe_engine(
    model: nn.Module, loss: LossFn, transform: Transform | None = None, *, view: View | None = None
) -> Engine:
    """Make the function that gives every example's transformed gradient, `transform(d loss_b / d W)`.

    Equal to `transform(blocks_of(sites, per_example_grads(loss, params, batch)))`, without weight gradients.

    Args:
        model: the module whose layers are attributed; its parameters are frozen while the engine runs, and
            it runs in eval mode.
        loss: a pure loss of one example; its `batched` form is used where it has one.
        transform: applied to every example's blocks; None is the full gradient.
        view: which weights, by head or not, by token or not; see `View`.

    Returns:
        `engine(batch) -> Rows(values, losses)`: `{module path: [batch, ...]}`, or `[batch, queries]` where
        the chain ends in `dot`; losses `[batch]` in the loss's unit. By token, a row is a token: the tokens
        of the batch one example after the other, those that `attention_mask` leaves out not among them.

    Raises:
        InputError: nothing to attribute.

    >>> net = nn.Linear(3, 1)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).square().sum()
    >>> probe_engine(net, loss)({"x": torch.ones(5, 3)}).values["root"].shape
    torch.Size([5, 1, 4])
    """
    view = view or View()
    sites = find_sites(model, view)
    known = known_of(model, loss, sites)
    whole = getattr(loss, "with_whole_logits", None)
    if whole is not None and any(site.module is output_head(model) for site in sites):
        loss = whole()  # the head's own gradient needs its output
    return Engine(model, loss, transform or chain(), sites, view, known)
