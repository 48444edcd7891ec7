"""Values of rows, and inner products with their gradients, inside a training step of the caller's own.

Probes keep the factors of every layer from the step's own backward pass, `G_i = sum_t g_it x_itᵀ`. What the
optimizer does is known only then. Its direction u meets the factors afterwards, `<u, G_i> = sum_t g_itᵀ u
x_it`, so there is no second backward pass, and no gradient of a row is kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.engine.contract import Contract, Segments, lower_for
from gradfn.engine.tap import Tapped, tapping
from gradfn.errors import InputError
from gradfn.model.adapters import adapter_parameters
from gradfn.model.layers import Layer, in_full_precision
from gradfn.model.params import evaluating
from gradfn.model.sites import Site, View, blocks_of, find_sites
from gradfn.train.in_run import Kind, step_direction
from gradfn.train.optimizers import State
from gradfn.train.spec import Training
from gradfn.transforms import Transform, chain, dot
from gradfn.types import Blocks, Params

sum_of = partial(reduce, torch.add)
Held = list[tuple["_Holding", Tensor, Tensor]]
"""The calls of layers in one forward pass, each with its input and its output gradient."""


@dataclass(frozen=True, eq=False)
class _Holding(Contract):
    """Keeps the factors of one call instead of contracting them."""

    block: str = ""
    held: Held = field(default_factory=list)

    def pullback(self, saved: Tensor, g: Tensor) -> Tensor:
        assert self.size is not None
        self.held.append((self, saved, g))
        return g.new_zeros(self.size, 0, dtype=self.plan.dtype)


@dataclass(eq=False)
class Values(Tapped):
    """What `values` gives: the rows of the passes inside it, for `step` and `dots`."""

    _held: dict[int, Held] = field(default_factory=dict)
    _aimed: bool = False

    def step(
        self,
        training: Training,
        state: State,
        query_grads: Params,
        grads: Params | None = None,
        *,
        kind: Kind = "shapley",
        nodes: int = 8,
    ) -> Float[Tensor, "rows queries"]:
        """The values of the rows for the step that is about to be taken, see `in_run`; it forgets the rows.

        Args:
            training, state: of the optimizer before its step, see `optimizer_state`.
            query_grads: of the validation losses, `{name: [queries, *parameter]}`, see `query_grads`.
            grads: the gradient of the step before clipping; None: the `.grad` of the parameters.
            kind, nodes: see `step_direction`.

        Returns:
            `-<u, c_i g_i>`, with c_i the factor of row i in the loss that backward was called on, in units of
            the validation losses. Positive: the row lowers them.

        Raises:
            InputError: the rows do not add up to `grads`: a weight is used past its module, or the gradient
                was scaled; or see `dots`.
        """
        if grads is None:
            owned = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in owned}
        u = step_direction(training, state, grads, query_grads, kind=kind, nodes=nodes)
        dots = self.dots(u)
        self._refuse_missing(dots.sum(0), u, grads)
        return -dots

    def dots(self, directions: Params | None = None, *, keep: bool = False) -> Float[Tensor, "rows queries"]:
        """`<c_i g_i, d_q>` of every row with every direction, over the weights of the view.

        With `d_q` the gradient of a validation batch, this is what the row and the batch have in common.

        Args:
            directions: `{name: [queries, *parameter]}`; what it leaves out counts as 0. None: those of `aim`.
            keep: whether the rows are not forgotten, for another call.

        Raises:
            InputError: no backward pass, directions of unknown parameters, or none where none was aimed at.
        """
        if self._aimed != (directions is None):
            raise InputError("give `directions` either to `aim`, before the forward pass, or to `dots`")
        if directions is None:
            made = self.blocks
            assert isinstance(made, Tensor)
        else:
            blocks = self._aligned(directions)
            made = torch.cat([sum_of(part.values()) for part in self._contracted(dot(blocks), blocks)])
        if not keep:
            self.clear()
        return made

    def gram(self, *, keep: bool = False) -> Float[Tensor, "rows rows"]:
        """`<c_i g_i, c_j g_j>` of all pairs of rows, from the dense blocks of one weight at a time.

        Args:
            keep: whether the rows are not forgotten.
        """
        parts = self._contracted(chain())
        joined = [torch.cat([part[name] for part in parts]).flatten(1) for name in parts[0]]
        if not keep:
            self.clear()
        return sum_of(G @ G.T for G in joined)

    def aim(self, directions: Params | None) -> None:
        """Take the inner products inside the backward passes to come, so that nothing is kept for them.

        For directions that are known before the step: gradients of validation batches, and of values those
        of sgd without clipping and of kind "before". Micro-batches then need no more memory than one.

        Args:
            directions: see `dots`, which then gives the inner products; None: keep factors again.
        """
        self.clear()
        self._aimed = directions is not None
        queries = _nothing(self.sites) if directions is None else self._aligned(directions, every=True)
        self.lowered = lower_for(self.sites, dot(queries))

    def query_grads(self, *losses: Callable[[], Tensor]) -> Params:
        """The gradients of validation losses at the present parameters, unseen by the probes.

        The model is in eval mode meanwhile, and no `.grad` changes.

        Args:
            losses: each gives a scalar by calling the model.

        Returns:
            `{name: [losses, *parameter]}` of the parameters that are trained.
        """
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with self.seeing(False), evaluating(self.model), torch.enable_grad():
            made = [torch.autograd.grad(loss(), [*named.values()], materialize_grads=True) for loss in losses]
        return {name: torch.stack(parts) for name, parts in zip(named, zip(*made, strict=True), strict=True)}

    def clear(self) -> None:
        """Forget the rows so far."""
        self._forwards, self._held = [], {}

    def _aligned(self, directions: Params, *, every: bool = False) -> Blocks:
        """Directions as blocks, of the weights that they move; `every`: zeros for the others."""
        named = dict(self.model.named_parameters())
        if unknown := directions.keys() - named.keys():
            raise InputError(f"the model has no parameter {min(unknown)}: name directions as the model does")
        count = len(next(iter(directions.values())))
        sites = [site for site in self.sites if every or not directions.keys().isdisjoint(site.names)]
        if not sites:
            raise InputError("the directions move no weight of the view: give those of weights in it")
        given = {
            name: directions[name] if name in directions else named[name].new_zeros(count, *named[name].shape)
            for site in sites for name in site.names
        }  # fmt: skip
        return blocks_of(sites, given)

    def _contracted(self, transform: Transform, blocks: Blocks | None = None) -> list[Blocks]:
        """What a transform makes of the factors of each forward pass, of the given blocks or of all."""
        self.blocks  # noqa: B018  refuses passes without a backward
        sites = [site for site in self.sites if blocks is None or site.block in blocks]
        plans, parts = lower_for(sites, transform).plans, list[Blocks]()
        for held in self._held.values():
            shares: Blocks = {}
            size = held[0][0].size or 0
            for one, saved, g in held:
                if one.block in plans:
                    contract = Contract(
                        plans[one.block], one.layer, one.path, one.size, segments=one.segments
                    )
                    with in_full_precision(g):
                        share = contract.pullback(saved, g)
                    shares[one.block] = shares[one.block] + share if one.block in shares else share
            for name in plans.keys() - shares.keys():  # not used in this pass
                shares[name] = held[0][2].new_zeros(size, *plans[name].shape, dtype=plans[name].dtype)
            parts.append(shares)
        return parts

    def _refuse_missing(self, total: Tensor, u: Params, grads: Params) -> None:
        wanted, of_step = self._aligned(u), self._aligned({name: g[None] for name, g in grads.items()})
        size, whole = total.new_zeros(len(total)), total.new_zeros(len(total))
        for name, queries in wanted.items():
            flat, own = queries.flatten(1).to(total), of_step[name].flatten().to(total)
            whole, size = whole + flat @ own, size + flat.norm(dim=1) * own.norm()
        coarse = max(torch.finfo(g.dtype).eps for g in grads.values())
        if bool(((total - whole).abs() > coarse**0.5 * size).any()):
            raise InputError(
                "the gradients of the rows do not add up to the gradient of the step: exclude weights that "
                "are used past their module, and give `grads` as backward made them, not scaled or clipped"
            )

    def _contract(self, segments: Segments | None, site: Site, layer: Layer, size: int | None) -> Contract:
        made = super()._contract(segments, site, layer, size)
        if self._aimed:
            return made
        held = self._held.setdefault(len(self._forwards), [])
        return _Holding(made.plan, layer, site.path, size, segments=segments, block=site.block, held=held)


def _nothing(sites: Sequence[Site]) -> Blocks:
    """No queries, whose inner products take no memory."""
    return {site.block: torch.zeros(0, *site.spec.shape) for site in sites}


@contextmanager
def values(
    model: nn.Module, *, view: View | None = None, rows: int | None = None, copy: bool = False
) -> Iterator[Values]:
    """Values of the rows of a training step of your own; it changes no bit of the step.

        with gf.train.values(model) as v:
            queries = v.query_grads(lambda: loss(model, validation))
            loss(model, batch).backward()
            phi = v.step(*gf.train.optimizer_state(model, optimizer), queries)
        optimizer.step()

    `v.dots(directions)` gives plain inner products of the rows with any directions, such as `queries`.
    Several forward passes before `step` are one batch (accumulation of gradients). From the backward pass to
    `step` the inputs and output gradients of the layers stay in memory; `v.aim` avoids this where it can be.

    The values are the share of the weights in the view. By default it has all parameters (of a model with
    PEFT adapters: what these train). A parameter that no probe can see is refused by name: exclude it, and
    its share is not in the values.

    Args:
        model: the module whose forward you call.
        view: which weights; None is all of them.
        rows, copy: see `gf.tap`. Where the loss calls parts of the model, `with v.forward(rows):` around it.

    Raises:
        InputError: see `gf.tap`.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    >>> with values(net) as v:
    ...     queries = v.query_grads(lambda: net(torch.tensor([[1.0, 0.0]])).sum())
    ...     net(torch.tensor([[1.0, 3.0], [-2.0, 0.0]])).mean().backward()
    ...     phi = v.step(*optimizer_state(net, optimizer), queries)
    >>> phi
    tensor([[ 0.2500],
            [-0.5000]])

    Source: Data Shapley in one training run, arXiv:2406.11011, section 4.2 (the ghost dot product).
    """
    view = view or (View() if adapter_parameters(model) else View(include=["*"]))
    none = _nothing(find_sites(model, view))
    with tapping(Values, model, dot(none), view=view, rows=rows, copy=copy) as found:
        assert isinstance(found, Values)
        yield found


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, max_grad_norm: float | None = None
) -> tuple[Training, State]:
    """A PyTorch optimizer before its next step, as the values of this package.

    Args:
        model: whose parameters it moves.
        optimizer: SGD, Adam or AdamW, with the learning rate of the step. Groups may differ in the weight
            decay of SGD and AdamW, which no value depends on.
        max_grad_norm: what the loop clips gradients to, after it has asked for values.

    Raises:
        InputError: another optimizer, or settings that `Training` has not.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> optimizer_state(net, torch.optim.AdamW(net.parameters(), lr=0.1))[0].betas
    (0.9, 0.999)
    """
    kind: Any = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}.get(
        type(optimizer)
    )
    group, *others = optimizer.param_groups
    odd = [n for n in ("amsgrad", "maximize", "dampening") if group.get(n)]
    apart = {n for other in others for n in other.keys() - {"params", "weight_decay"} if other[n] != group[n]}
    coupled = kind == "adam" and any(other["weight_decay"] != group["weight_decay"] for other in others)
    if kind is None or odd or apart or coupled:
        why = ", ".join(odd) or f"groups that differ in {min(apart, default='weight_decay')}"
        what = "" if kind is None else f" with {why}"
        raise InputError(
            f"values need SGD, Adam or AdamW, not {type(optimizer).__name__}{what}: train with one of these, "
            "and with the same settings for all parameters"
        )
    adam = kind != "sgd"
    ours = {id(p) for each in optimizer.param_groups for p in each["params"]}
    named = {name: p for name, p in model.named_parameters() if id(p) in ours}
    keys = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",) if group["momentum"] else ()

    def of(key: str) -> Params:
        found = {
            name: optimizer.state[p].get(key) if p in optimizer.state else None for name, p in named.items()
        }
        return {name: torch.zeros_like(named[name]) if v is None else v for name, v in found.items()}

    steps = {int(optimizer.state[p]["step"]) for p in named.values() if "step" in optimizer.state.get(p, {})}
    if len(steps) > 1:
        raise InputError(
            f"parameters have taken {min(steps)} to {max(steps)} steps of Adam: values need one count"
        )
    rate, taken = float(group["lr"]), torch.tensor(max(steps, default=0))
    training = Training(
        1, 1, rate or 1.0, kind, momentum=0.0 if adam else float(group["momentum"]),
        nesterov=not adam and group["nesterov"], betas=group.get("betas", (0.9, 0.999)),
        eps=group.get("eps", 1e-8), weight_decay=float(group["weight_decay"]),
        schedule="constant" if rate else "linear",  # a schedule at its end has the rate 0
        max_grad_norm=max_grad_norm,
    )  # fmt: skip
    params = {name: p.detach() for name, p in named.items()}
    return training, State(params, tuple(of(key) for key in keys), taken, taken)
