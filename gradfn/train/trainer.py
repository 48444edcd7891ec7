"""Training many models together, to the end or step by step.

Counterfactual models differ in their rows and their seed, and in nothing else, so they train together: `vmap`
over stacked parameters makes one large product of many small ones. Up to rounding, each model becomes what it
would become if it were trained alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.func import vmap

from gradfn.errors import InputError
from gradfn.memory import free_memory
from gradfn.train.optimizers import State, Update, first_state, update, update_in_place
from gradfn.train.spec import Training
from gradfn.train.stacked import (
    Start,
    alone_if_needed,
    check_start,
    initial_params,
    looped,
    losses_at,
    stacked_losses,
    stacked_params,
)
from gradfn.train.step import Losses, losses_of
from gradfn.train.table import Table, batches, orders, table_of
from gradfn.types import Batch, Data, LossFn, Params

CACHE_BYTES = 192 << 20
"""Memory of the models that train together on a CPU: beyond its caches, a step waits for memory."""
STATE_COPIES = 10
"""Memory of a step in sizes of the parameters: parameters, gradients and moments, old, new and in between."""
Progress = Callable[[int], None]
Weights = Float[Tensor, "models rows *tokens"] | None
"""What the losses of rows, or the parts of their tokens, are multiplied by in each model; None: 1."""


class TogetherOptions(TypedDict, total=False):
    """What may be said of models that train together, as keywords; see `train`."""

    weights: Weights
    chunk: int | None
    progress: Progress | None


class Step(NamedTuple):
    """One step of many models.

    Args:
        state: after it.
        rows: that it took; where a model has fewer than others, one of its own fills the batch.
        counts: how many of them are of the batch.
        weights: what their losses, or the parts of their tokens, were multiplied by, one over the size of the
            batch included.
        losses: before the step.
    """

    state: State
    rows: Int64[Tensor, "models batch"]
    counts: Int64[Tensor, " models"]
    weights: Float[Tensor, "models batch *tokens"]
    losses: Float[Tensor, "models batch"]


@dataclass(frozen=True, eq=False)
class Trained:
    """Models after their training.

    Args:
        params: `{name: [models, ...]}`.
        losses: the mean loss over the rows of the last epoch, each before its step, `[models]`; rows of
            weight 0 are left out.
        diverged: whether a loss or a parameter is not finite, `[models]`.
    """

    params: Params
    losses: Float64[Tensor, " models"]
    diverged: Bool[Tensor, " models"]


def train(
    start: Start,
    loss: LossFn,
    data: Data,
    subsets: Bool[Tensor, "models rows"],
    seeds: Sequence[int],
    training: Training,
    **options: Unpack[TogetherOptions],
) -> Trained:
    """Train one model for each subset, many at a time.

    Model m starts from `start`, is seeded with `seeds[m]`, and is trained on the rows of `subsets[m]` in an
    order that is a function of seed and epoch. All parameters are trained; dropout is off. A row outside a
    subset is dropped: it has no place in a batch. A row of weight 0 is masked: it keeps its place.

    Args:
        start: what makes a model, called under `torch.manual_seed(seeds[m])`, or the parameters of the start.
        loss: `loss(params, example) -> scalar`.
        data: the rows.
        subsets: which rows each model sees.
        seeds: one a model.
        training: optimizer, schedule, batches.
        options: `weights`, what the losses of rows are multiplied by, `[models, rows]`, or the parts of their
            tokens, `[models, rows, tokens]`, as many as the longest row has; 1 unless told. They change no
            batch, no denominator and no schedule, and a step is taken even where all of its rows have weight
            0, see `Course`. `chunk`, how many models train together, which changes no result; as
            many as fit in memory unless told. `progress`, called with the number of examples done since the
            last call.

    Raises:
        InputError: subsets, batches or a chunk that do not fit; see `make_trainer`.

    >>> def loss(p, e):
    ...     return (p["weight"] @ e["x"] - e["y"]).square().sum()
    >>> data = [{"x": torch.ones(2), "y": torch.tensor([float(i)])} for i in range(4)]
    >>> subsets = torch.tensor([[True, True, False, False], [False, False, True, True]])
    >>> settings = Training(epochs=50, batch_size=2, learning_rate=0.1, optimizer="sgd")
    >>> trained = train(lambda: torch.nn.Linear(2, 1, bias=False), loss, data, subsets, [0, 1], settings)
    >>> trained.params["weight"].sum((1, 2))
    tensor([0.5000, 2.5000])
    """
    trainer = make_trainer(start, loss, data, training)
    return trainer.train(subsets, seeds, **options)


def make_trainer(start: Start, loss: LossFn, data: Data, training: Training) -> "Trainer":
    """Prepare training over data: rows in memory, and the losses of many models, by `vmap` where they stack.

    Training replaces the parameters of the loss. Buffers are those of the model that the loss holds, not
    those of the models that `start` makes.

    Args:
        start: what makes a model (called once a seed), or the parameters that all models start from.
        loss: `loss(params, example) -> scalar`; its `batched`, where it has one, is used instead.
        data: the rows, all of which are put in memory.
        training: optimizer, schedule, batches.

    Raises:
        InputError: no rows, or rows of different keys; a start that cannot be trained, see `check_start`; a
            loss that is random, not one number an example, or does not depend on its `params`.

    >>> data = [{"x": torch.ones(2)}] * 3
    >>> trainer = make_trainer({"w": torch.ones(2)}, lambda p, e: p["w"] @ e["x"], data, Training(1, 3, 0.1))
    >>> next(trainer.trajectory(torch.ones(1, 3, dtype=torch.bool), [0])).losses
    tensor([[2., 2., 2.]])
    """
    params = check_start(start, loss)
    table = table_of(data, next(iter(params.values())).device)
    two = table.take(torch.tensor([0, len(table) - 1]))
    many, why = stacked_losses(loss, params, two, trained=True)
    table = alone_if_needed(table, data, many, params)
    if table.alone is not None:
        why = why or "padding would change their rows"
    return Trainer(start, loss, table, training, many, why)


@dataclass(frozen=True, eq=False)
class Trainer:
    """What training depends on, apart from subsets and seeds; see `make_trainer`.

    Args:
        start: what makes a model, or the parameters of the start.
        loss: of an example.
        table: the rows.
        training: optimizer, schedule, batches.
        losses: of stacked models.
        looped: why the models do not stack, or None where they do.
    """

    start: Start
    loss: LossFn
    table: Table
    training: Training
    losses: Losses
    looped: str | None

    def train(
        self,
        subsets: Bool[Tensor, "models rows"],
        seeds: Sequence[int],
        *,
        weights: Weights = None,
        chunk: int | None = None,
        progress: Progress | None = None,
    ) -> Trained:
        """Train the models to the end, as many at a time as fit in memory; see `train`."""
        self.check(subsets, seeds, weights)
        size = self.at_once(chunk)
        parts = [
            self._train_chunk(
                subsets[own], list(seeds[own]), weights if weights is None else weights[own], progress
            )
            for own in (slice(start, start + size) for start in range(0, len(seeds), size))
        ]
        return Trained(
            {name: torch.cat([part.params[name] for part in parts]) for name in parts[0].params},
            torch.cat([part.losses for part in parts]), torch.cat([part.diverged for part in parts]),
        )  # fmt: skip

    def trajectory(
        self, subsets: Bool[Tensor, "models rows"], seeds: Sequence[int], weights: Weights = None
    ) -> Iterator[Step]:
        """Train the models and yield every step; later steps do not change the states yielded before.

        Args:
            subsets: the rows of each model.
            seeds: of each model's initialisation and order.
            weights: of the rows, see `train`.

        Raises:
            InputError: subsets or weights that do not fit the rows, the seeds or the batches.
        """
        self.check(subsets, seeds, weights)
        return self._steps(subsets, seeds, weights, update)

    def _train_chunk(
        self, subsets: Tensor, seeds: Sequence[int], weights: Weights, progress: Progress | None
    ) -> Trained:
        sizes = subsets.sum(1)
        last_epoch = (self.training.epochs - 1) * -(-int(sizes.max()) // self.training.batch_size)
        sums, params = torch.zeros(len(seeds), dtype=torch.float64), {}
        seen = torch.zeros_like(sums)
        move = update_in_place if bool((sizes == sizes[0]).all()) else update
        for number, step in enumerate(self._steps(subsets, seeds, weights, move)):
            params, real = step.state.params, (step.weights.reshape(*step.losses.shape, -1) != 0).any(-1)
            if number >= last_epoch:
                sums = sums.to(real.device) + torch.where(real, step.losses, 0).sum(1, dtype=torch.float64)
                seen = seen.to(real.device) + real.sum(1)
            if progress is not None:
                progress(int(step.counts.sum()))
        losses = sums / seen.clamp_min(1)
        finite = torch.stack([p[..., None].isfinite().flatten(1).all(1) for p in params.values()]).all(0)
        return Trained(params, losses, ~(finite & losses.isfinite()))

    def _steps(self, subsets: Tensor, seeds: Sequence[int], weights: Weights, move: Update) -> Iterator[Step]:
        chosen = subsets.cpu().numpy()
        sizes = chosen.sum(1)
        params = stacked_params(self.start, seeds)
        device = next(iter(params.values())).device
        total = torch.from_numpy(self.training.epochs * -(-sizes // self.training.batch_size)).to(device)
        state = first_state(params, self.training, total)
        weights = weights if weights is None else weights.to(device)
        for epoch in range(self.training.epochs):
            for rows, counts in batches(orders(chosen, seeds, epoch), sizes, self.training.batch_size):
                step = self._step(state, torch.from_numpy(rows), torch.from_numpy(counts), weights, move)
                yield step
                state = step.state

    def _step(self, state: State, rows: Tensor, counts: Tensor, of_rows: Weights, move: Update) -> Step:
        """A step of many models: as `vmap` of `make_step`, but faster, by autograd of the summed losses.

        A model that has rows left takes the step, whatever their weights; `make_step` calls this "mask".
        """
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        device = next(iter(leaves.values())).device
        real = (torch.arange(rows.shape[1]) < counts[:, None]).to(device)
        by_token = of_rows is not None and of_rows.ndim == 3
        with torch.enable_grad():
            losses = losses_at(self.token_losses if by_token else self.losses, leaves, self.table, rows)
            shares = real.double() / counts.clamp_min(1)[:, None].to(device)
            if of_rows is not None:
                own = of_rows[torch.arange(len(rows), device=device)[:, None], rows.to(device)]
                shares = shares[..., None] * own[..., : losses.shape[2]] if by_token else shares * own
            weights = shares.to(losses.dtype)
            grads = torch.autograd.grad((losses * weights).sum(), [*leaves.values()], materialize_grads=True)
        with torch.no_grad():
            active = None if bool((counts > 0).all()) else (counts > 0).to(device)
            state = move(self.training, state, dict(zip(leaves, grads, strict=True)), active)
        return Step(state, rows, counts, weights, losses.detach().reshape(*rows.shape, -1).sum(2))

    @cached_property
    def token_losses(self) -> Losses:
        """The losses of stacked models by token, `[models, batch, tokens]`."""
        losses = losses_of(self.loss, tokens=True)
        return vmap(losses) if self.looped is None else looped(losses)

    def at_once(self, chunk: int | None = None) -> int:
        """How many models train together: `chunk`, or what fits in memory and, on a CPU, in its caches."""
        if chunk is not None:
            if chunk < 1:
                raise InputError(f"chunk must be 1 or more models at a time, not {chunk}: leave it out")
            return chunk
        params = initial_params(self.start, 0)
        device = next(iter(params.values())).device
        state = STATE_COPIES * sum(p.numel() * p.element_size() for p in params.values())
        rows = torch.arange(min(self.training.batch_size, len(self.table)))
        # Of one model, `vmap` would save the same tensors with another axis.
        losses = looped(losses_of(self.loss)) if self.looped is None else self.losses
        one = state + 2 * _saved_bytes(losses, params, self.table.take(rows))
        room = free_memory(device) // 2
        return max(1, (min(room, CACHE_BYTES) if device.type == "cpu" else room) // one)

    def check(self, subsets: Tensor, seeds: Sequence[int], weights: Weights = None) -> None:
        """Refuse subsets or weights that do not fit the rows, the seeds or the batches."""
        models, rows = subsets.shape
        if rows != len(self.table) or models != len(seeds) or not models:
            raise InputError(
                f"expected a subset of the {len(self.table)} rows for each of the {len(seeds)} seeds, got "
                f"{models} subsets of {rows} rows"
            )
        smallest = int(subsets.sum(1).min())
        if smallest < 1:
            raise InputError(f"subset {int(subsets.sum(1).argmin())} has no rows: give it at least one")
        if smallest < self.training.batch_size:
            raise InputError(
                f"a batch of {self.training.batch_size} is larger than the smallest subset, of {smallest} "
                f"rows: give a batch size of at most {smallest}"
            )
        if weights is None:
            return
        if weights.ndim == 3:
            losses_of(self.loss, tokens=True)
        longest = [self.table.columns["input_ids"].shape[1]] if weights.ndim == 3 else []
        if weights.shape != (models, rows, *longest) or not bool(weights.isfinite().all()):
            each = "token of a row" if longest else "row"
            raise InputError(
                f"expected `weights` of {[models, rows, *longest]} finite numbers, one for each {each} of "
                f"each model, got {list(weights.shape)}"
            )


def _saved_bytes(losses: Losses, params: Params, batch: Batch) -> int:
    """Bytes that the forward of one model saves for its backward."""
    sizes: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = {name: p.detach()[None].requires_grad_() for name, p in params.items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        losses(leaves, {key: value[None] for key, value in batch.items()})
    return sum(sizes.values())
