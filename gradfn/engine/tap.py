"""Probes attached to any forward and backward pass, the caller's own included.

    forward:   probe(y, x, slot) = y                 # slot: zeros shaped like the statistic
    backward:  dL/dy = g,  dL/dslot = pullback(x, g)

A hook puts a probe behind every attributed layer. The backward pass then gives each slot its cotangent, which
is the statistic of the block, and every parameter the gradient that it has without the probes.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradfn.engine.contract import Contract, Segments, lower_for, no_factors
from gradfn.errors import InputError
from gradfn.model.layers import Layer, in_full_precision
from gradfn.model.sharded import IDLE
from gradfn.model.sites import Site, View, find_sites
from gradfn.transforms import Transform, chain
from gradfn.transforms.lower import BlockPlan, Lowered
from gradfn.transforms.row_sum import sums_rows
from gradfn.types import Blocks


class Probe(torch.autograd.Function):
    """The identity on `y`; the cotangent of `slot` is `pullback(saved, dL/dy)`."""

    @staticmethod
    def forward(y, slot, saved, pullback, copy, mark):
        return y.clone() if copy else y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.pullback = inputs[3]

    @staticmethod
    def backward(ctx, *grads):
        (saved,) = ctx.saved_tensors
        with in_full_precision(grads[0]):
            cotangent = ctx.pullback(saved, grads[0])
        return grads[0], cotangent, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, y, slot, saved, pullback, copy, mark):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move the examples' axis to the front, where the probe of a batch has it.

        `mark` differs by example, so vmap calls this even if the layer's input and slot do not.
        """
        y, saved = (
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in ((y, in_dims[0]), (saved, in_dims[2]))
        )
        slot = slot if in_dims[1] is None else slot.movedim(in_dims[1], 0)  # None: one slot for a sum
        return Probe.apply(y, slot, saved, pullback, copy, None), 0


class ProbeError(InputError):
    """A probe cannot see the weight of a module, because of how the module is called or what it returns."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path or 'root'} {reason}, so it has no gradient of each example: exclude it")
        self.path = path


class RepeatedCallError(InputError):
    """A block that was lowered for one use in a forward pass is used again."""

    def __init__(self, block: str):
        super().__init__(
            f"{block} is used more than once in a forward pass, and a stage of the transform is not linear: "
            f"give shared=[{block!r}], so that this stage acts on the sum of the uses"
        )
        self.block = block


def _once(site: Site) -> None:
    raise RepeatedCallError(site.block)


@dataclass(eq=False)
class Forward:
    """One forward pass, whose probes deliver to its own slots.

    Args:
        slots: of every block.
        contract: `contract(site, layer, size)`, how the factors of one call become a cotangent.
        size: how many examples the batch has; None: the pass is of one example, without a batch axis.
        mark: under vmap, where one example stands for all, any tensor that differs by example.
        copy: whether a probe gives the model a copy, because the model writes to what its modules return.
        packed: whether examples lie one after the other in the rows of a call; the contract takes them apart.
        on_repeat: called at every use of a block but the first; it may raise.
        on_rows: called with a site and how many rows of its call belong to an example (0: all share one row);
            it may raise.
    """

    slots: Blocks
    contract: Callable[[Site, Layer, int | None], Contract]
    size: int | None = None
    mark: Tensor | None = None
    copy: bool = False
    packed: bool = False
    on_repeat: Callable[[Site], None] = _once
    on_rows: Callable[[Site, int], None] = lambda site, rows: None
    uses: Counter[str] = field(default_factory=Counter)

    def use(
        self, sites: Sequence[Site], name: str, x: Any, y: Any, *call: Any, recomputed: bool = False
    ) -> Any:
        """Put the probes of a module's sites behind the output `y` of the weight `name`; see `OnUse`."""
        for site in sites:
            layer = site.layer.in_call(self.size, *call) if site.parameter == name else None
            if layer is None:
                continue
            self.uses[site.block] += not recomputed
            if self.uses[site.block] > 1 and not recomputed:
                self.on_repeat(site)
            if not isinstance(y, Tensor) or not isinstance(x, Tensor):
                raise ProbeError(site.path, "does not map a tensor to a tensor")
            y = self._probe(site, layer, x, y)
        return y

    def _probe(self, site: Site, layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        contract, slot = self.contract(site, layer, self.size), self.slots[site.block]
        saved = contract.save_input(x.detach())
        if self.size is None and self.mark is None:
            probed: Any = Probe.apply(y[None], slot, saved[None], contract.pullback, self.copy, None)
            return probed[0]
        if self.packed and layer.ragged:
            raise ProbeError(site.path, "has experts, whose rows do not say which packed example they are of")
        batched = not layer.ragged and not self.packed
        if self.size is not None and batched and not self._rows_of_each(site, self.size, saved, y):
            y = y.expand(self.size, *y.shape[1:])
        return Probe.apply(y, slot, saved, contract.pullback, self.copy, self.mark)  # pyright: ignore

    def _rows_of_each(self, site: Site, size: int, saved: Tensor, y: Tensor) -> int:
        """How many rows of a call belong to each example: 0 where all examples share one row."""
        if y.ndim < 2 or len(y) != len(saved) or (len(saved) % size and len(saved) != 1):
            shape = list(y.shape)
            raise ProbeError(site.path, f"returns the shape {shape} for a batch of {size} examples")
        rows = len(saved) // size
        self.on_rows(site, rows)
        return rows


_ATTACHED: WeakSet[nn.Module] = WeakSet()
"""The modules that have probes now."""


def refuse_attached(sites: Sequence[Site]) -> None:
    """Refuse to run a model whose modules have probes already."""
    if taken := next((site for site in sites if site.module in _ATTACHED), None):
        raise InputError(
            f"{taken.path or 'root'} has probes already: run an engine, or another tap of the same model, "
            "outside of the `with gf.tap(...)` block"
        )


@contextmanager
def attached(sites: Sequence[Site], use: Callable[..., Any]) -> Iterator[None]:
    """Call `use(sites of the module, name, x, y, *call)` wherever the module of a probed site uses a weight.

    Raises:
        InputError: a module has probes already.
    """
    by_module: dict[nn.Module, list[Site]] = {}
    for site in sites:
        if site.probed:
            by_module.setdefault(site.module, []).append(site)
    refuse_attached(sites)

    def seen(sites: Sequence[Site], name: str, x: Any, y: Any, *call: Any) -> Any:
        return y if IDLE.get() else use(sites, name, x, y, *call)

    with ExitStack() as undo:
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path does not call the modules' hooks
        for module, own in by_module.items():
            _ATTACHED.add(module)
            undo.callback(_ATTACHED.discard, module)
            undo.callback(own[0].attach(module, partial(seen, own)))
        yield


def make_slots(plans: Mapping[str, BlockPlan], size: int, tokens: Sequence[int] = ()) -> Blocks:
    """A slot for every block: zeros `[size, *tokens, ...]`, or `[1, ...]` for a sum, which take no memory."""
    return {
        name: torch.zeros((), dtype=plan.dtype, device=plan.device)
        .expand(*((1,) if plan.reduces else (size, *tokens)), *plan.shape)
        .requires_grad_()
        for name, plan in plans.items()
    }


def recomputing() -> bool:
    """Whether a backward pass is running: a forward inside it recomputes what checkpointing dropped."""
    return torch._C._current_graph_task_id() != -1


@dataclass(eq=False)
class Tapped:
    """The per-example blocks of the passes inside a `tap`; see there."""

    model: nn.Module
    sites: Sequence[Site]
    lowered: Lowered
    sums: bool
    rows: int | None
    copy: bool
    _forwards: list[Forward] = field(default_factory=list)
    _open: Forward | None = None
    _explicit: bool = False
    _off: bool = False

    @property
    def blocks(self) -> Blocks | Tensor:
        """`{module path: [rows, ...]}`, or `[rows, queries]` where the transform ends in `dot`.

        The rows of all forward passes since the start, or since `pop`, one pass after the other.

        Raises:
            InputError: there was no forward pass, or one whose loss had no backward pass.
        """
        forwards = [forward for forward in self._forwards if forward.uses and forward is not self._open]
        if not forwards:
            raise InputError(
                "no forward pass of the tapped model with gradients enabled: call the model, and backward on "
                "its loss, inside `with gf.tap(...)`"
            )
        parts = []
        for number, forward in enumerate(forwards, 1):
            if all(slot.grad is None for slot in forward.slots.values()):
                raise InputError(
                    f"forward pass {number} of {len(forwards)} had no backward pass: call backward on a loss "
                    "that depends on its output, or run it under torch.no_grad()"
                )
            grads = {n: torch.zeros_like(s) if s.grad is None else s.grad for n, s in forward.slots.items()}
            parts.append(self.lowered.finish(grads))
        join = partial(reduce, torch.add) if self.sums else torch.cat
        if isinstance(parts[0], Tensor):
            return join(parts)
        return {name: join([part[name] for part in parts]) for name in parts[0]}

    def pop(self) -> Blocks | Tensor:
        """The blocks so far, which are then forgotten: a tap may stay attached over many training steps."""
        blocks = self.blocks
        self._forwards = []
        return blocks

    @contextmanager
    def forward(self, rows: int, segments: Segments | None = None) -> Iterator[None]:
        """Take what runs inside for one forward pass, where the loss calls parts of the model by itself.

        Args:
            rows: how many examples the batch has.
            segments: where they are, if they are packed into one row of tokens.
        """
        self._begin(rows, segments)
        self._explicit = True
        try:
            yield
        finally:
            self._open, self._explicit = None, False

    @contextmanager
    def seeing(self, on: bool) -> Iterator[None]:
        """Whether forward passes inside are seen; else another tap of the model may see them."""
        modules, before = [site.module for site in self.sites if site.probed], self._off

        def switch(off: bool) -> None:
            self._off = off
            (_ATTACHED.difference_update if off else _ATTACHED.update)(modules)

        switch(not on)
        try:
            yield
        finally:
            switch(before)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        with attached(self.sites, self._use), self.called_by(self.model):
            yield

    @contextmanager
    def called_by(self, module: nn.Module) -> Iterator[None]:
        """Take a call of `module` for a forward pass: of the model, or of a wrapper that calls its parts."""
        with ExitStack() as undo:
            undo.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(self._after).remove)
            yield

    def _before(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not (recomputing() or self._explicit or self._off):
            rows = (len(v) for v in tree_leaves((args, named)) if isinstance(v, Tensor) and v.ndim)
            self._begin(self.rows or next(rows, 0))

    def _after(self, *_: Any) -> None:
        if not recomputing() and not self._explicit:
            self._open = None

    def _begin(self, rows: int, segments: Segments | None = None) -> None:
        if not rows:
            raise InputError("no argument of the forward pass is a tensor of examples: give rows=")
        self._forwards = [forward for forward in self._forwards if forward is not self._open]  # it raised
        slots = make_slots(self.lowered.plans, rows)
        for name, slot in slots.items():
            if not self.lowered.plans[name].linear:
                slot.register_post_accumulate_grad_hook(partial(_refuse_a_second, name, set()))
        contract = partial(self._contract, segments)
        packed = segments is not None
        self._open = Forward(slots, contract, rows, copy=self.copy, packed=packed, on_repeat=self._on_repeat)
        self._forwards.append(self._open)

    def _contract(self, segments: Segments | None, site: Site, layer: Layer, size: int | None) -> Contract:
        return Contract(self.lowered.plans[site.block], layer, site.path, size, segments=segments)

    def _on_repeat(self, site: Site) -> None:
        if not self.lowered.plans[site.block].linear:
            raise RepeatedCallError(site.block)

    def _use(self, sites: Sequence[Site], name: str, x: Any, y: Any, *call: Any) -> Any:
        if self._off or not torch.is_grad_enabled():
            return y
        path = sites[0].path or "root"
        if recomputing():
            # Only what a recomputed probe saves is used, which is the same for all passes of one batch size.
            if not self._forwards or not any(self._forwards[-1].uses[site.block] for site in sites):
                raise InputError(
                    f"{path} is checkpointed with use_reentrant=True, which hides its forward pass from "
                    "autograd: checkpoint with use_reentrant=False"
                )
            return self._forwards[-1].use(sites, name, x, y, *call, recomputed=True)
        if self._open is None:
            raise InputError(
                f"{path} was called outside of the tapped model's own forward: call the model, or say how "
                "many examples there are with `with tapped.forward(rows):`"
            )
        return self._open.use(sites, name, x, y, *call)


def _refuse_a_second(name: str, done: set[str], slot: Tensor) -> None:
    if name in done:
        raise InputError(
            f"a second backward pass went through the forward pass that {name} was used in, and a stage of "
            "the transform is not linear: add the losses up, and call backward on the sum"
        )
    done.add(name)


@contextmanager
def tap(
    model: nn.Module,
    transform: Transform | None = None,
    *,
    view: View | None = None,
    rows: int | None = None,
    shared: Collection[str] = (),
    copy: bool = False,
) -> Iterator[Tapped]:
    """Per-example gradients from a forward and a backward pass of your own, such as a training step.

    `blocks[b] = transform(d loss / d W of example b)`, where the loss is the one that you call backward on.
    If it is a mean over the batch, a block is the example's part of this mean: untransformed blocks add up to
    the gradient of the parameter. Nothing is frozen or switched: dropout stays on, and the gradients of all
    parameters are the same to the bit as without the tap. (A mixture with fused experts is the exception: the
    tap sums their outputs in another order.)

    Several forward passes inside the context add rows, one pass after the other (gradient accumulation).
    Passes under `torch.no_grad()` are left alone, and so is what `torch.utils.checkpoint` recomputes, if
    backward is called inside the context.

    A tap does not verify the model; `probe_engine(...).verify(batch)` does. Of a weight that the model also
    uses past its module, such as a tied weight in a fused loss, a tap sees the calls of the module.

    Args:
        model: the module whose forward you call.
        transform: applied to every example's blocks; None is the full gradient.
        view: which weights, by head or not; None is all linear layers, see `View`.
        rows: how many examples each forward pass has; None is the length of its first tensor argument.
        shared: blocks that a forward pass uses more than once. Only stages that are not linear need to know.
        copy: give the model a copy of each layer's output. Needed if it writes to what a layer returns;
            modules with `inplace=True` are noticed.

    Returns:
        A context manager that gives a `Tapped`: `.blocks` after the backward pass, inside the context or
        after it, and `.pop()`.

    Raises:
        InputError: no weight to attribute, a weight that probes cannot see, a view by token, a model with
            probes already.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    >>> with tap(net) as tapped:
    ...     net(torch.ones(5, 3)).square().sum().backward()
    >>> tapped.blocks["0"].shape
    torch.Size([5, 4, 4])
    >>> torch.allclose(tapped.blocks["2"].sum(0)[:, :-1], net[2].weight.grad)
    True
    """
    with tapping(Tapped, model, transform, view=view, rows=rows, shared=shared, copy=copy) as tapped:
        yield tapped


@contextmanager
def tapping(
    kind: type[Tapped],
    model: nn.Module,
    transform: Transform | None = None,
    *,
    view: View | None = None,
    rows: int | None = None,
    shared: Collection[str] = (),
    copy: bool = False,
) -> Iterator[Tapped]:
    """What `tap` does, for any kind of `Tapped`."""
    view = view or View()
    if view.tokens:
        raise InputError("a tap gives a row for each example, not for each token: give a view without tokens")
    sites, transform = find_sites(model, view), transform or chain()
    if bare := next((site for site in sites if not site.probed), None):
        raise InputError(f"{bare.path} is not the weight of a known kind of layer: exclude it")
    uses = Counter(site.block for site in sites)
    lowered = lower_for(sites, transform, {*shared, *(block for block, count in uses.items() if count > 1)})
    for site in sites:
        if statistic := lowered.plans[site.block].of_factors:
            raise no_factors(site.path, statistic)
    copy = copy or any(getattr(module, "inplace", False) is True for module in model.modules())
    tapped = kind(model, sites, lowered, sums_rows(transform), rows, copy)
    with tapped._attached():
        try:
            yield tapped
        except RuntimeError as error:
            if "modified inplace" not in str(error):
                raise
            raise InputError("the model writes to what a layer returns: give copy=True") from error
