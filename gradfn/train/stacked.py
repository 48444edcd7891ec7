"""Many models as one: stacked initial parameters, their losses by `vmap`, and what cannot be stacked."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import pad

from gradfn.engine.batching import full_gradients
from gradfn.engine.reference import refuse_constant
from gradfn.engine.stream import keeps_rows, labelled
from gradfn.errors import InputError
from gradfn.model.params import params_of, seeded_model
from gradfn.train.step import Losses, losses_of
from gradfn.train.table import Table
from gradfn.types import Batch, Data, LossFn, Params

Start = Callable[[], nn.Module] | Params
"""What makes a model, called once a seed; or the parameters that all models start from."""

RANDOM = "the loss is random (dropout?), but retraining must be repeatable: put its model in eval mode"


def initial_params(start: Start, seed: int) -> Params:
    """The parameters of a model before its training: those given, or a new model's after `manual_seed(seed)`.

    >>> a, b = (initial_params(lambda: nn.Linear(2, 1), seed=3)["weight"] for _ in range(2))
    >>> torch.equal(a, b)
    True
    """
    if isinstance(start, dict):
        return {name: value.detach() for name, value in start.items()}
    model = seeded_model(start, seed)
    _check_layers(model)
    return params_of(model)


def stacked_params(start: Start, seeds: Sequence[int]) -> Params:
    """The parameters of many models before their training, `{name: [models, ...]}`.

    >>> stacked_params({"w": torch.zeros(2)}, [0, 1, 2])["w"].shape
    torch.Size([3, 2])
    """
    made = {seed: initial_params(start, seed) for seed in {*seeds}}
    return {name: torch.stack([made[seed][name] for seed in seeds]) for name in made[seeds[0]]}


def stacked_losses(
    loss: LossFn, params: Params, batch: Batch, *, trained: bool = False
) -> tuple[Losses, str | None]:
    """The losses of many models, `(stacked params, {key: [models, batch, ...]}) -> [models, batch]`.

    They are computed by `vmap` over the models; or one by one, where a trial shows that `vmap` fails.

    Args:
        loss: of one model.
        params: of one model, for the trial.
        batch: two examples, for the trial.
        trained: whether the loss is one to train on, which needs a gradient.

    Returns:
        The function, and why it is a loop, or None where it is not.

    Raises:
        InputError: the loss is random, is not one number an example, or does not depend on its `params`.

    >>> many, why = stacked_losses(lambda p, e: p["w"] * e["x"], {"w": torch.ones(())}, {"x": torch.ones(2)})
    >>> many({"w": torch.tensor([1.0, 2.0])}, {"x": torch.ones(2, 3)})
    tensor([[1., 1., 1.],
            [2., 2., 2.]])
    """
    refuse_constant(loss, params, {key: value[0] for key, value in batch.items()}, differentiable=trained)
    both = [{name: torch.stack([v, v]) for name, v in given.items()} for given in (params, batch)]
    tries: list[Losses] = [vmap(losses_of(loss)), looped(losses_of(loss)), looped(_one_by_one(loss))]
    first, why = None, None
    for losses in tries:
        try:
            with torch.no_grad():
                check_repeatable(losses, *both)
        except (RuntimeError, NotImplementedError) as error:
            first = first or error
            why = str(first).strip().splitlines()[0]
            continue
        return losses, why
    assert first is not None
    raise first


def losses_at(losses: Losses, params: Params, table: Table, rows: Int64[Tensor, "models batch"]) -> Tensor:
    """The losses of rows of a table under stacked models, without padding where that would change them.

    Those by token, `[models, batch, tokens]`, are then padded with 0.

    >>> from gradfn.train.table import table_of
    >>> table = table_of([{"x": torch.tensor(1.0)}, {"x": torch.tensor(3.0)}])
    >>> losses_at(vmap(lambda p, b: p["w"] * b["x"]), {"w": torch.ones(1)}, table, torch.tensor([[1, 0]]))
    tensor([[3., 1.]])
    """
    if table.alone is None:
        return losses(params, table.take(rows))
    made = []
    for model, own in enumerate(rows):
        one = {name: value[model : model + 1] for name, value in params.items()}
        parts = [
            (places, losses(one, {key: value[None] for key, value in batch.items()})[0])
            for places, batch in table.unpadded(own)
        ]
        order = torch.tensor([place for places, _ in parts for place in places]).argsort()
        if parts[0][1].ndim == 2:
            longest = table.columns["input_ids"].shape[1]
            parts = [(places, pad(values, (0, longest - values.shape[1]))) for places, values in parts]
        made.append(torch.cat([values for _, values in parts])[order])
    return torch.stack(made)


def alone_if_needed(table: Table, data: Data, losses: Losses, params: Params) -> Table:
    """The table with its rows unpadded, where padding changes the loss or the gradient of one.

    Args:
        table: made of the data.
        losses: of stacked models, `[models, batch]`.
        params: of one model, for the comparison.
    """

    def of_one(params: Params, batch: Batch) -> Tensor:
        return losses(*({name: v[None] for name, v in given.items()} for given in (params, batch)))[0]

    if keeps_rows(full_gradients(of_one, params), params.values(), data):
        return table
    return replace(table, alone=[labelled(data, row) for row in range(len(data))])


def looped(losses: Losses) -> Losses:
    """The losses of many models, one model after another.

    >>> looped(lambda p, b: p["w"] * b["x"])({"w": torch.ones(2)}, {"x": torch.ones(2, 3)}).shape
    torch.Size([2, 3])
    """

    def of_all(params: Params, batch: Batch) -> Tensor:
        parts = {name: value.unbind() for name, value in params.items()}
        models = len(next(iter(batch.values())))
        return torch.stack([
            losses({name: of[m] for name, of in parts.items()}, {key: v[m] for key, v in batch.items()})
            for m in range(models)
        ])  # fmt: skip

    return of_all


def _one_by_one(loss: LossFn) -> Losses:
    """The losses of a batch, one example after another, for code that `vmap` refuses."""

    def losses(params: Params, batch: Batch) -> Tensor:
        size = len(next(iter(batch.values())))
        return torch.stack([loss(params, {key: v[row] for key, v in batch.items()}) for row in range(size)])

    return losses


def check_repeatable(losses: Losses, params: Params, batch: Batch) -> None:
    """Refuse losses that draw random numbers from PyTorch, or differ when computed again.

    Both checks are needed: losses at zero parameters may not change with the numbers drawn, and numbers of
    other generators do not change PyTorch's state.

    Raises:
        InputError: they do.

    >>> check_repeatable(lambda p, b: p["w"] * torch.rand(2), {"w": torch.ones(())}, {})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    gradfn.errors.InputError: the loss is random (dropout?), but ... its model in eval mode
    """
    device = next(iter(params.values())).device

    def generators() -> Tensor:
        states = [torch.get_rng_state()]
        return torch.cat(states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))

    before = generators()
    try:
        made, again = losses(params, batch), losses(params, batch)
    except RuntimeError as error:
        if "randomness" in str(error):
            raise InputError(RANDOM) from error
        raise
    drew = not torch.equal(before, generators())
    # Not bit for bit: GPUs may add in another order.
    if drew or not torch.allclose(made, again, rtol=1e-4, equal_nan=True):
        raise InputError(RANDOM)


def check_start(start: Start, loss: LossFn) -> Params:
    """The parameters of the first model; refused if models that start like this cannot be trained together.

    Raises:
        InputError: a BatchNorm, or a dropout that is on; parameters in 16 bits; parameters that the model of
            the loss does not have, or has in another shape; buffers that differ from seed to seed.

    >>> list(check_start(lambda: nn.Linear(2, 1), lambda p, e: p["bias"].sum()))
    ['weight', 'bias']
    """
    model: Any = getattr(loss, "model", None)
    model = model if isinstance(model, nn.Module) else None
    if model is not None:
        _check_layers(model)
    params = initial_params(start, 0)
    for name, value in params.items():
        if value.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"the parameter {name} is {str(value.dtype).removeprefix('torch.')}, in which most steps of "
                "training round to nothing: start from parameters in fp32 (tf32 has such, too)"
            )
    if model is not None:
        _check_names(start, params, model)
    if not isinstance(start, dict):
        _check_buffers(start)
    return params


def _check_layers(model: nn.Module) -> None:
    """Refuse layers that mix the rows of a batch, or that are random."""
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(
            module, nn.modules.instancenorm._InstanceNorm
        ):
            raise InputError(
                f"{path or 'the model'} is a BatchNorm, which mixes the rows of a batch and holds running "
                "statistics: use GroupNorm or LayerNorm in models that are retrained"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
            raise InputError(
                f"{path or 'the model'} is a Dropout that is on, but retraining must be repeatable: call "
                "model.eval()"
            )


def _check_names(start: Start, params: Params, model: nn.Module) -> None:
    """Refuse parameters that the model of the loss would not see."""
    theirs = {name: list(p.shape) for name, p in model.named_parameters()}
    ours = {name: list(p.shape) for name, p in params.items()}
    # A start of parameters may have only some of the model's: the others are not trained.
    for name in ours if isinstance(start, dict) else theirs | ours:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"the parameter {name} is {ours.get(name, 'absent')} in the start and "
                f"{theirs.get(name, 'absent')} in the model of the loss: make both of the same model"
            )


def _check_buffers(start: Callable[[], nn.Module]) -> None:
    """Refuse models that differ in more than their parameters: the loss has one set of buffers for all."""
    first, second = (dict(seeded_model(start, seed).named_buffers()) for seed in (0, 1))
    for name, buffer in first.items():
        if not torch.equal(buffer, second[name]):
            raise InputError(
                f"the buffer {name} differs from seed to seed, but training replaces only the parameters of "
                "the loss: draw the buffer from a seed of its own, or make it a parameter"
            )
