"""The production engine: probes, zero-valued inputs whose cotangents are the statistics wanted.

    forward:   probe(y, x, slot) = y                 # slot: zeros shaped like the statistic
    backward:  dL/dy = g,  dL/dslot = pullback(x, g)

A forward hook puts a probe behind every attributed layer; one `autograd.grad` with respect to the slots then
gives per-example statistics of all layers. No weight and no embedding gradient is computed, and a
layer's factors live only while its own backward runs.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from gradfn.attention import fast_attention
from gradfn.errors import InputError
from gradfn.layers import Site, find_sites, output_head
from gradfn.losses import CausalLMLoss
from gradfn.per_example import params_of
from gradfn.transforms import Transform, chain, lower
from gradfn.transforms.lower import BlockPlan, Lowered
from gradfn.types import Batch, Blocks, LossFn, Rows


class _Probe(torch.autograd.Function):
    """The identity on `y`; the cotangent of `slot` is `pullback(kept, dL/dy)`."""

    @staticmethod
    def forward(y, slot, kept, pullback):
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])
        ctx.pullback = inputs[3]

    @staticmethod
    def backward(ctx, *grads):
        (kept,) = ctx.saved_tensors
        return grads[0], ctx.pullback(kept, grads[0]), None, None

    @staticmethod
    def vmap(info, in_dims, y, slot, kept, pullback):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Under vmap the examples' axis is moved to the front and the batched probe does the rest."""
        y, slot, kept = (
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip((y, slot, kept), in_dims[:3], strict=True)
        )
        return _Probe.apply(y, slot, kept, pullback), 0


@dataclass(frozen=True, eq=False)
class _Factors:
    """How one module's factors become its slot's cotangent."""

    plan: BlockPlan
    bias: bool

    @property
    def projects_right(self) -> bool:
        right = self.plan.kron.right
        return right is not None and right.ndim == 2

    def keep(self, x: Tensor) -> Tensor:
        """What the backward needs of the input: its projection where there is one, else itself."""
        right = self.plan.kron.right
        if right is None or right.ndim == 1:
            return x
        if not self.bias:
            return F.linear(x.to(right.dtype), right)
        return F.linear(x.to(right.dtype), right[:, :-1], right[:, -1])

    def pullback(self, kept: Tensor, g: Tensor) -> Tensor:
        """`inside(L (sum_t g_t x_tᵀ) Rᵀ)` for every example."""
        dtype = self.plan.dtype
        kept = kept.reshape(len(kept), -1, kept.shape[-1]).to(dtype)
        g = g.reshape(len(g), -1, g.shape[-1]).to(dtype)
        left, right = self.plan.kron.left, self.plan.kron.right
        if left is not None:
            g = F.linear(g, left) if left.ndim == 2 else g * left
        G = g.mT @ kept
        if not self.projects_right:
            if self.bias:
                G = torch.cat([G, g.sum(1)[..., None]], -1)
            G = G if right is None else G * right
        for function in self.plan.inside:
            G = function(G)
        return G


class _RepeatedCallError(Exception):
    """A module planned for one call a forward was called again."""

    def __init__(self, block: str):
        self.block = block


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters, switch to eval mode and out-of-place activations; all is put back."""
    modules = list(model.modules())
    trainable = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in modules if m.training]
    in_place = [m for m in modules if getattr(m, "inplace", False) is True]
    # functional_call leaves plain tensors behind in a module that occurs twice.
    parameters = [(m, dict(m._parameters)) for m in modules if m._parameters]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in training:
            module.training = False
        for module in in_place:
            # What a probe returns must not be overwritten.
            module.inplace = False  # pyright: ignore[reportArgumentType]
        yield
    finally:
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
    _shared: set[str] = field(default_factory=set)
    _called: set[str] = field(default_factory=set)
    _lowered: Lowered | None = None

    def __post_init__(self):
        uses = Counter(site.block for site in self.sites)
        self._shared |= {block for block, count in uses.items() if count > 1}

    def lowered(self) -> Lowered:
        """The transform, lowered for this model."""
        if self._lowered is None:
            specs = {site.block: site.spec for site in self.sites}
            self._lowered = lower(self.transform, specs.values(), frozenset(self._shared))
        return self._lowered

    def __call__(self, batch: Batch) -> Rows:
        while True:
            try:
                with torch.inference_mode(False), torch.enable_grad(), _quiet(self.model):
                    return self._differentiate(batch)
            except _RepeatedCallError as repeated:
                # The weight's gradient is a sum over calls: what is not linear must wait behind it.
                self._shared.add(repeated.block)
                self._lowered = None

    def _differentiate(self, batch: Batch) -> Rows:
        lowered = self.lowered()
        size = len(next(iter(batch.values())))
        slots = {
            name: torch.zeros((), dtype=plan.dtype, device=plan.device)
            .expand(size, *plan.shape)
            .requires_grad_()
            for name, plan in lowered.plans.items()
        }
        losses = self._losses(batch, slots)
        self._refuse_bypassed(batch, size)
        if not losses.requires_grad:
            raise InputError(
                "the loss does not depend on any attributed layer: check the loss, --include and --exclude"
            )
        grads = torch.autograd.grad(losses.sum(), list(slots.values()), materialize_grads=True)
        blocks = dict(zip(slots, grads, strict=True))
        return Rows(lowered.finish(blocks), losses.detach())

    def _losses(self, batch: Batch, slots: Blocks) -> Float[Tensor, " batch"]:
        """The losses of the batch, in one forward with a probe behind every attributed layer."""
        batched: Callable[[Batch], Tensor] | None = getattr(self.loss, "batched", None)
        if batched is not None:
            with self._probes(slots, size=len(next(iter(slots.values())))), fast_attention():
                return batched(batch)
        params = params_of(self.model)

        def one(slots: Blocks, example: Batch) -> Tensor:
            with self._probes(slots, size=None):
                return self.loss(params, example)

        return vmap(one)(slots, dict(batch))

    def _refuse_bypassed(self, batch: Batch, size: int) -> None:
        """Refuse a weight that the loss uses past its module, where no probe sees it; ask once a layer."""
        silent = {site.path for site in self.sites} - self._called
        self._called |= silent
        params = params_of(self.model)
        names = {name: path for path in silent if (name := f"{path}.weight".lstrip(".")) in params}
        if not names:
            return
        weights = [params[name].requires_grad_() for name in names]
        losses = [self.loss(params, {key: value[b] for key, value in batch.items()}) for b in range(size)]
        total = torch.stack(losses).sum()
        if not total.requires_grad:
            return
        grads = torch.autograd.grad(total, weights, allow_unused=True)
        for path, grad in zip(names.values(), grads, strict=True):
            if grad is not None:
                raise InputError(
                    f"the weight of {path} is used without calling {path}, so no probe sees its gradient: "
                    f"--exclude {path}"
                )

    @contextmanager
    def _probes(self, slots: Blocks, size: int | None) -> Iterator[None]:
        calls: Counter[str] = Counter()
        plans = self.lowered().plans
        with ExitStack() as hooks:
            for site in self.sites:
                factors = _Factors(plans[site.block], site.has_bias)
                hook = self._hook(site, factors, slots[site.block], calls, size)
                hooks.callback(site.module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _hook(self, site: Site, factors: _Factors, slot: Tensor, calls: Counter[str], size: int | None):
        def probe(module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], y: Tensor) -> Tensor:
            calls[site.block] += 1
            self._called.add(site.path)
            if calls[site.block] > 1 and site.block not in self._shared:
                raise _RepeatedCallError(site.block)
            x = (args[0] if args else next(iter(named.values()))).detach()
            if size is not None and len(x) != size:
                raise InputError(
                    f"{site.path} was given {len(x)} rows for a batch of {size} examples, so its gradients "
                    f"cannot be told apart by example: --exclude {site.path}"
                )
            return _Probe.apply(y, slot, factors.keep(x), factors.pullback)  # pyright: ignore[reportReturnType]

        return probe


def probe_engine(
    model: nn.Module,
    loss: LossFn,
    transform: Transform | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Engine:
    """Make the function that gives every example's transformed gradient, `transform(d loss_b / d W)`.

    Equal to `transform(blocks_of(sites, per_example_grads(loss, params, batch)))`, without weight gradients.

    Args:
        model: the module whose layers are attributed; its parameters are frozen while the engine runs, and
            it runs in eval mode.
        loss: a pure loss of one example; its `batched` form is used where it has one.
        transform: applied to every example's blocks; None is the full gradient.
        include, exclude: globs over module paths; see `find_sites`.

    Returns:
        `engine(batch) -> Rows(values, losses)`: `{module path: [batch, ...]}`, or `[batch, queries]` where
        the chain ends in `dot`; losses `[batch]` in the loss's unit.

    Raises:
        InputError: nothing to attribute, or a layer whose rows are not examples.

    >>> net = nn.Linear(3, 1)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).square().sum()
    >>> probe_engine(net, loss)({"x": torch.ones(5, 3)}).values["root"].shape
    torch.Size([5, 1, 4])
    """
    sites = find_sites(model, include=include, exclude=exclude)
    if isinstance(loss, CausalLMLoss) and any(site.module is output_head(model) for site in sites):
        loss = replace(loss, fused_head=False)  # the head's own gradient needs its output
    return Engine(model, loss, transform or chain(), sites)
