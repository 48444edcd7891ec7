"""The production engine: per-example statistics of a model from one forward and one backward pass.

The engine taps the model (`gradfn.engine.tap`) and takes the gradient of the loss with respect to the slots
alone. The parameters are frozen, so no gradient of a weight is computed, and the two factors of a layer are
in memory only while the backward pass of that layer runs.

Before the first batch the engine verifies each probe (`gradfn.engine.verify`). A weight whose probe is wrong
goes through `vmap(grad)` instead.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from math import prod
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from gradfn.engine.attention import fast_attention
from gradfn.engine.contract import Contract, lower_for, no_factors, no_tokens
from gradfn.engine.journal import as_function
from gradfn.engine.reference import definition, one_number
from gradfn.engine.sharded import check_sharded, not_again, sharded_blocks
from gradfn.engine.tap import (
    Forward,
    ProbeError,
    RepeatedCallError,
    attached,
    make_slots,
    refuse_attached,
)
from gradfn.engine.verify import (
    ModelFacts,
    drops_tokens,
    facts_of,
    rebinds_modules,
    sketch,
    two_rows,
    unequal_blocks,
)
from gradfn.errors import InputError
from gradfn.memory import CountBytes
from gradfn.model.layers import Layer
from gradfn.model.left_out import dropped_matrices
from gradfn.model.params import evaluating, params_of
from gradfn.model.sharded import turns_of
from gradfn.model.sites import Site, View, blocks_of, find_sites, output_head
from gradfn.transforms import Transform, chain
from gradfn.transforms.lower import Lowered
from gradfn.transforms.row_sum import sums_rows
from gradfn.types import Batch, Blocks, Example, LossFn, Params, Rows

DROPPED_SHARE = 0.25
"""The share of weight matrices that the default view may leave out without a warning."""
Result = TypeVar("Result")
MakeContract = Callable[[Site, Layer, int | None], Contract]


class LearnedError(Exception):
    """The engine learned something about the model, and has to run again."""


class _Tentative(Contract):
    """The contract of a layer that is not verified: an error means that its class does not describe it."""

    def save_input(self, x: Tensor) -> Tensor:
        with _probe_error(self.path):
            return super().save_input(x)

    def pullback(self, saved: Tensor, g: Tensor) -> Tensor:
        with _probe_error(self.path):
            return super().pullback(saved, g)


@contextmanager
def _probe_error(path: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        raise ProbeError(path, "does not do what its class says") from error


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Freeze the parameters, and switch to eval mode and to activations out of place; then switch back."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    in_place = [m for m in model.modules() if getattr(m, "inplace", False) is True]
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # vmap has no rule for its kernels
        for parameter in trainable:
            parameter.requires_grad_(False)
        for module in in_place:
            # A probe returns a view, which must not be overwritten.
            module.inplace = False  # pyright: ignore[reportArgumentType]
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in in_place:
            module.inplace = True  # pyright: ignore[reportArgumentType]
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(eq=False)
class Engine:
    """Per-example statistics of a model, one batch at a time: `engine(batch) -> Rows`; see `probe_engine`."""

    model: nn.Module
    loss: LossFn
    transform: Transform
    sites: Sequence[Site]
    view: View = field(default_factory=View)
    facts: ModelFacts = field(default_factory=ModelFacts, repr=False)
    _verifying: bool = False
    _lowered: tuple[frozenset[str], Lowered] | None = None

    def __post_init__(self):
        uses = Counter(site.block for site in self.sites)
        self.facts.shared |= {block for block, count in uses.items() if count > 1}
        self._leave_unprobed()

    def lowered(self) -> Lowered:
        """The transform, lowered for this model."""
        shared = frozenset(self.facts.shared)
        if self._lowered is None or self._lowered[0] != shared:
            self._lowered = shared, lower_for(self.sites, self.transform, shared)
        return self._lowered[1]

    @property
    def row_bytes(self) -> int:
        """Bytes that the backward pass delivers for one row, or one token where the view is by token."""
        plans = [plan for plan in self.lowered().plans.values() if not plan.reduces]
        return sum(prod(plan.shape) * plan.dtype.itemsize for plan in plans)

    @property
    def result_bytes(self) -> int:
        """Bytes of the result of one row, or one token, after the last stage."""
        plans = self.lowered().plans.items()
        empty = {n: torch.empty(0, *plan.shape, dtype=plan.dtype, device=plan.device) for n, plan in plans}
        made = self.lowered().finish(empty)
        parts = made.values() if isinstance(made, dict) else [made]
        return sum(part.shape[1:].numel() * part.element_size() for part in parts)

    @property
    def summed(self) -> bool:
        """Whether results are sums over the rows of a batch."""
        return sums_rows(self.transform)

    def __call__(self, batch: Batch) -> Rows:
        with self._ready():
            self._retry(self._verify, batch)
            return self._retry(self._differentiate, batch)

    def verify(self, batch: Batch) -> None:
        """Compare the probes with plain autograd on two examples, once for batches with these keys.

        A weight whose blocks differ goes through `vmap(grad)` from then on. Its module may not do what its
        class says, the loss may use the weight past the module too, or the rows of the module may not be
        those of the examples. `engine(batch)` verifies by itself; short examples make it cheaper.
        """
        with self._ready():
            self._retry(self._verify, batch)

    def _sketching(self) -> "Engine":
        """The engine that projects the gradients of probed weights to a few numbers."""
        probes = [site for site in self.sites if site.probed]
        return replace(self, transform=sketch(), sites=probes, view=View(), _lowered=None)

    def sketch(self, batch: Batch) -> tuple[Float[Tensor, "batch numbers"], Float[Tensor, " batch"]]:
        """The projected gradients of all probed weights, and the losses: enough to compare rows by."""

        def made(batch: Batch) -> tuple[Blocks, Tensor]:
            return self._sketching()._probed_blocks(batch)

        with self._ready():
            self._retry(self._verify, batch)
            blocks, losses = self._retry(made, batch)
        parts = [value.flatten(1).to(losses) for value in blocks.values()]
        return torch.cat([*parts, losses.new_zeros(len(losses), 1)], 1), losses.detach()

    def activation_bytes(self, example: Example) -> int:
        """Bytes that the operations of a forward pass of one example return."""
        with self._ready(), torch.no_grad(), as_function(self.model), CountBytes() as made:
            self.loss(params_of(self.model), dict(example))
        return made.count

    @contextmanager
    def _ready(self) -> Iterator[None]:
        refuse_attached(self.sites)
        self._leave_unprobed()  # another engine may have found more of these
        with torch.inference_mode(False), torch.enable_grad(), _quiet(self.model):
            yield

    def _retry(self, run: Callable[[Batch], Result], batch: Batch) -> Result:
        """Run, and run again whenever that taught the engine something about the model."""
        if turns_of(self.model) is not None:
            with not_again():  # a pass that ends in the middle leaves the other processes in theirs
                return run(batch)
        while True:
            try:
                return run(batch)
            except LearnedError:
                pass
            except RepeatedCallError as repeated:
                if repeated.block in self.facts.shared:
                    raise
                self.facts.shared.add(repeated.block)
            except ProbeError as error:
                if not any(site.probed and site.path == error.path for site in self.sites):
                    raise
                self._unprobe({error.path})
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                verified, probed = self.facts.of(batch), {site.path for site in self.sites if site.probed}
                spread = probed & {
                    path for path, calls in verified.calls.items() if any(not call.rows for call in calls)
                }
                if not self.facts.copies and "modified inplace" in str(error):
                    self.facts.copies = True  # the model may not write to a view, but to a copy
                elif (
                    spread and not verified.examples
                ):  # a module with one row, which is not all examples' row
                    self._unprobe(spread)
                else:
                    raise

    def _unprobe(self, paths: Collection[str]) -> None:
        """Use no probes for these weights, nor for any other use of the same weights."""
        self.facts.unprobed |= {site.block for site in self.sites if site.path in paths}
        self._leave_unprobed()

    def _leave_unprobed(self) -> None:
        unprobed = self.facts.unprobed
        self.sites = [replace(s, probed=s.probed and s.block not in unprobed) for s in self.sites]
        bare = next((site for site in self.sites if not site.probed), None)
        if bare is not None and turns_of(self.model) is not None:
            raise InputError(
                f"the gradient of {bare.path} takes its whole weight, and the model is sharded: exclude it, "
                "or load the model whole"
            )

    def _verify(self, batch: Batch) -> None:
        size, verified = min(2, _size(batch)), self.facts.of(batch)
        probes = [site for site in self.sites if site.probed]
        if verified.examples >= size or (not probes and self.facts.plain is not None):
            return
        pair = two_rows(batch)
        self._examine(pair)
        if not probes:
            return
        verified.calls.clear()
        probed = replace(self._sketching(), _verifying=True)
        found, _ = probed._probed_blocks(pair)
        krons = {name: plan.kron for name, plan in probed.lowered().plans.items()}
        wrong, count = unequal_blocks(found, krons, self.loss, self.model, probes, pair)
        self._unprobe({site.path for site in probes if site.block in wrong})
        verified.examples = count

    def _examine(self, pair: Batch) -> None:
        """Find out, once, how the loss has to be computed, from plain autograd of one example."""
        if self.facts.plain is not None:
            return
        quantised = any(not site.weight.is_floating_point() for site in self.sites)
        # Whose weights autograd cannot have in one piece.
        if (quantised and hasattr(self.loss, "batched")) or turns_of(self.model) is not None:
            self.facts.plain, self.facts.singly = True, drops_tokens(self.loss, self.model, pair)
            return
        weights = [site.weight for site in self.sites]
        self.facts.plain = rebinds_modules(self.loss, self.model, weights, _example(pair, 0))
        if hasattr(self.loss, "batched"):
            self.facts.singly |= drops_tokens(self.loss, self.model, pair)
        else:
            self.facts.singly |= self.facts.plain

    def _differentiate(self, batch: Batch) -> Rows:
        lowered = self.lowered()
        blocks, losses = self._probed_blocks(batch)
        if blocks and not losses.requires_grad:
            raise InputError(
                "the loss does not depend on any attributed layer: check the loss, `include` and `exclude`"
            )
        blocks = blocks | self._unprobed_blocks(batch)
        blocks = {name: blocks[name] for name in lowered.plans}
        if self.view.tokens:
            ones = torch.ones_like(batch["input_ids"])
            real = batch.get("attention_mask", ones).bool()
            plans = lowered.plans
            blocks = {n: value if plans[n].reduces else value[real] for n, value in blocks.items()}
        return Rows(lowered.finish(blocks), losses.detach())

    def _probed_blocks(self, batch: Batch) -> tuple[Blocks, Tensor]:
        """The cotangents of the slots of all probed weights, and the losses."""
        if self.facts.singly and _size(batch) > 1:
            return self._one_by_one(batch)
        plans = self.lowered().plans
        probed = {site.block for site in self.sites if site.probed}
        tokens = batch["input_ids"].shape[1] if self.view.tokens else None
        positions = getattr(self.loss, "positions", None)
        slots = make_slots(
            {name: plan for name, plan in plans.items() if name in probed},
            _size(batch),
            () if tokens is None else (tokens,),
        )

        def contract(site: Site, layer: Layer, size: int | None) -> Contract:
            make, plan = _Tentative if self._verifying else Contract, plans[site.block]
            counts = positions(batch, site.path) if positions and plan.of_factors else None
            return make(plan, layer, site.path, size, tokens, counts, padded="input_ids" in batch)

        if turns_of(self.model) is not None:
            forward = self._forward(batch, slots, contract, _size(batch))
            return sharded_blocks(self.model, self.sites, self.loss, batch, forward)
        losses = self._losses(batch, slots, contract)
        if not slots or not losses.requires_grad:
            return {name: torch.zeros_like(slot) for name, slot in slots.items()}, losses
        grads = torch.autograd.grad(losses.sum(), list(slots.values()), materialize_grads=True)
        return dict(zip(slots, grads, strict=True)), losses

    def _one_by_one(self, batch: Batch) -> tuple[Blocks, Tensor]:
        """The same, one row of the batch at a time."""
        parts = []
        for row in range(_size(batch)):
            parts.append(self._probed_blocks({k: v[row : row + 1] for k, v in batch.items()}))
        plans, (blocks, losses) = self.lowered().plans, zip(*parts, strict=True)

        def join(name: str) -> Tensor:
            values = [part[name] for part in blocks]
            return reduce(torch.add, values) if plans[name].reduces else torch.cat(values)

        return {name: join(name) for name in blocks[0]}, torch.cat(losses)

    def _losses(self, batch: Batch, slots: Blocks, contract: MakeContract) -> Float[Tensor, " batch"]:
        """The losses of the batch, in one forward pass with a probe behind every attributed layer."""
        size = _size(batch)
        batched: Callable[[Batch], Tensor] | None = getattr(self.loss, "batched", None)

        def probes(
            slots: Blocks, size: int | None = None, mark: Tensor | None = None
        ) -> AbstractContextManager[None]:
            return attached(self.sites, self._forward(batch, slots, contract, size, mark).use)

        if batched is not None:
            with as_function(self.model), probes(slots, size), fast_attention():
                return one_number(batched(batch), size)
        params = params_of(self.model)
        if self.facts.singly:
            with as_function(self.model), probes(slots):
                return self.loss(params, _example(batch, 0))[None]

        def one(slots: Blocks, example: Batch) -> Tensor:
            with probes(slots, mark=next(iter(example.values()))):
                return self.loss(params, example)

        # The one slot of a sum over rows is the same for all examples.
        axes = {name: None if len(slot) != size else 0 for name, slot in slots.items()}
        try:
            with warnings.catch_warnings(), as_function(self.model):
                warnings.filterwarnings("ignore", "There is a performance drop")  # kernels without a rule
                return vmap(one, in_dims=(axes, 0))(slots, dict(batch))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "modified inplace" in str(error) and not self.facts.copies:
                raise
            self.facts.singly = True  # vmap cannot map over the model's code
            raise LearnedError from error

    def _forward(
        self,
        batch: Batch,
        slots: Blocks,
        contract: MakeContract,
        size: int | None,
        mark: Tensor | None = None,
    ) -> Forward:
        return Forward(
            slots, contract, size, mark, copy=self.facts.copies, on_repeat=self._on_repeat,
            on_rows=partial(self._on_rows, batch),
        )  # fmt: skip

    def _on_repeat(self, site: Site) -> None:
        if site.block not in self.facts.shared:
            raise RepeatedCallError(site.block)

    def _on_rows(self, batch: Batch, site: Site, rows: int) -> None:
        """Refuse a call whose rows may not be those of the examples: one of a kind that was not verified."""
        verified = self.facts.of(batch)
        if not (verified.note if self._verifying else verified.covers)(site.path, rows, batch):
            raise ProbeError(site.path, f"has {rows} rows for each example, of unknown tokens")

    def _unprobed_blocks(self, batch: Batch) -> Blocks:
        """The blocks of the weights that have no probe, from `vmap(grad)` of these parameters alone."""
        sites = [site for site in self.sites if not site.probed]
        if not sites:
            return {}
        if self.view.tokens:
            raise no_tokens(sites[0].path)
        fixed, plans = params_of(self.model), self.lowered().plans
        some = {name: fixed[name] for site in sites for name in site.names}

        def loss(params: Params, example: Example) -> Tensor:
            return self.loss({**fixed, **params}, example)

        for site in sites:
            if statistic := plans[site.block].of_factors:
                raise no_factors(site.path, statistic)
        blocks = blocks_of(sites, definition(loss, some, batch, self.model, plain=bool(self.facts.plain)))
        return {
            name: plans[name].within(plans[name].kron(G.to(plans[name].dtype))) for name, G in blocks.items()
        }


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _example(batch: Batch, row: int) -> Example:
    return {key: value[row] for key, value in batch.items()}


def _warn_of_dropped(model: nn.Module, sites: Sequence[Site]) -> None:
    """Warn once of weight matrices that the default view leaves out, if they are many."""
    dropped = dropped_matrices(model, sites)
    size, attributed = sum(dropped.values()), sum(site.weight.numel() for site in sites)
    if size > DROPPED_SHARE * (size + attributed):
        share, shown = size / (size + attributed), ", ".join([*dropped][:3])
        warnings.warn(
            f"{share:.0%} of the weight matrices of {type(model).__name__} are left out, of kinds not "
            f"known ({shown}{', ...' * (len(dropped) > 3)}): view=View(include=['*']) takes all",
            stacklevel=3,
        )


def probe_engine(
    model: nn.Module, loss: LossFn, transform: Transform | None = None, *, view: View | None = None
) -> Engine:
    """Make the function that gives every example's transformed gradient, `transform(d loss_b / d W)`.

    It equals `transform(blocks_of(sites, per_example_grads(loss, params, batch)))` and computes no gradient
    of a weight.

    Args:
        model: the module whose weights are attributed. While the engine runs, its parameters are frozen and
            it is in eval mode.
        loss: a pure loss of one example. If it has a `batched` form, the engine uses that.
        transform: applied to every example's blocks; None is the full gradient.
        view: which weights, by head or not, by token or not; see `View`.

    Returns:
        `engine(batch) -> Rows(values, losses)`: values `{module path: [batch, ...]}`, or `[batch, queries]`
        if the chain ends in `dot`, and losses `[batch]` in the unit of the loss. With a view by token, a row
        is a token: the tokens of the batch, one example after the other, without those that the batch's
        `attention_mask` masks.

    Raises:
        InputError: no weight to attribute; a sharded model outside of `gf.model.in_turns`, or with a loss
            that has no batched form.

    >>> net = nn.Linear(3, 1)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).square().sum()
    >>> probe_engine(net, loss)({"x": torch.ones(5, 3)}).values["root"].shape
    torch.Size([5, 1, 4])
    """
    view = view or View()
    sites = find_sites(model, view)
    check_sharded(model, loss)
    if not (view.include or view.exclude or hasattr(model, "peft_config")):
        _warn_of_dropped(model, sites)
    facts = facts_of(model, loss, sites)
    whole = getattr(loss, "with_whole_logits", None)
    if whole is not None and any(site.module is output_head(model) for site in sites):
        loss = whole()  # the head's own gradient needs its output
    return Engine(model, loss, transform or chain(), sites, view, facts)
