"""The subject of attribution: a model, its losses, and which weights are seen how finely, as one value."""

from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.model.sites import View
from gradfn.model.tasks import default_loss
from gradfn.types import Data, LossFn

Normalize = Literal["rows", "tokens"]
"""What a training step takes the mean over: the losses of its rows, or all of their supervised tokens."""
TOKEN_BATCH_SIZE = 4096
"""Tokens a batch, padding included, unless told otherwise."""


class SubjectOptions(TypedDict, total=False):
    """What may be said of a bare model, as keywords; see `Subject`."""

    loss: LossFn | None
    query_loss: LossFn | None
    view: View | None
    token_batch_size: int


@dataclass(frozen=True, eq=False)
class Subject:
    """All that per-example gradients depend on, but for the data and the transform.

    Every function that runs an engine takes a subject, or a model with the same options as keywords:
    `gf.score(Subject(net, loss), ...)` is `gf.score(net, ..., loss=loss)`.

    Args:
        model: the module that is attributed.
        loss: the loss of training rows, `loss(params, example) -> scalar`; None means
            cross-entropy of what the class of the model says that it is for, such as next tokens.
        query_loss: the loss of queries; None means `loss`.
        view: which weights, by attention head or not, by token or not; None means all weight matrices.
        token_batch_size: tokens a batch, padding included. It changes no result.

    >>> net = nn.Linear(3, 1)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).square().sum()
    >>> import torch
    >>> Subject(net, loss).for_queries().loss is loss
    True
    """

    model: nn.Module
    loss: LossFn = None  # pyright: ignore[reportAssignmentType]
    query_loss: LossFn = None  # pyright: ignore[reportAssignmentType]
    view: View = None  # pyright: ignore[reportAssignmentType]
    token_batch_size: int = TOKEN_BATCH_SIZE

    def __post_init__(self) -> None:
        refuse_wrapper(self.model)
        if self.loss is None and not hasattr(self.model, "config"):
            raise InputError(
                f"a {type(self.model).__name__} has no loss of its own, as language models have: give one, "
                "`loss(params, example) -> scalar`"
            )
        loss = default_loss(self.model) if self.loss is None else self.loss
        object.__setattr__(self, "loss", loss)
        object.__setattr__(self, "query_loss", loss if self.query_loss is None else self.query_loss)
        object.__setattr__(self, "view", self.view or View())

    def for_queries(self) -> "Subject":
        """The same for queries: their loss, and whole gradients even where rows are seen by token."""
        return replace(self, loss=self.query_loss, view=replace(self.view, tokens=False))

    def at(self, model: nn.Module) -> "Subject":
        """The same at a checkpoint: another model of this architecture, in the losses too.

        Raises:
            InputError: a loss that does not say which model it is of.
        """
        loss = _moved(self.loss, self.model, model)
        query_loss = loss if self.query_loss is self.loss else _moved(self.query_loss, self.model, model)
        return replace(self, model=model, loss=loss, query_loss=query_loss)


def refuse_wrapper(model: Any) -> None:
    """Refuse what other packages put around a model, and say how to get at the model.

    Raises:
        InputError: nnsight's wrapper, which is no module, or TransformerLens's, which is called otherwise.

    >>> refuse_wrapper("model")
    Traceback (most recent call last):
    gradfn.errors.InputError: a str is no torch module: give one; that in a wrapper of nnsight is \
gf.bridges.nnsight.module(wrapper)
    """
    if type(model).__name__ == "TransformerBridge":
        raise InputError(
            "a TransformerBridge is around a model: give bridge.original_model, with "
            "view=gf.bridges.transformer_lens.view(bridge)"
        )
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a {type(model).__name__} is no torch module: give one; that in a wrapper of nnsight is "
            "gf.bridges.nnsight.module(wrapper)"
        )


def _moved(loss: Any, old: nn.Module, new: nn.Module) -> LossFn:
    if not is_dataclass(loss) or getattr(loss, "model", None) is not old:
        raise InputError(
            f"the loss {loss!r} does not hold the model in a field `model`: make a Subject for each "
            "checkpoint"
        )
    return replace(loss, model=new)  # pyright: ignore[reportArgumentType, reportReturnType]


def subject_of(model: nn.Module | Subject, **options: Unpack[SubjectOptions]) -> Subject:
    """The subject itself, or one made of a model and options.

    Raises:
        InputError: options beside a subject, which has its own.

    >>> subject_of(Subject(nn.Linear(1, 1), lambda p, e: p["weight"].sum()), token_batch_size=1)
    Traceback (most recent call last):
    gradfn.errors.InputError: a Subject has its own token_batch_size: change it with dataclasses.replace
    """
    if isinstance(model, Subject):
        if options:
            given = ", ".join(options)
            raise InputError(f"a Subject has its own {given}: change it with dataclasses.replace")
        return model
    given = {name: value for name, value in options.items() if value is not None}
    return Subject(model, **given)  # pyright: ignore[reportArgumentType]


def row_weights(
    loss: LossFn, data: Data, rows: Int64[np.ndarray, " batch"], normalize: Normalize = "rows"
) -> Float64[Tensor, " batch"]:
    """What the losses of a step's rows are multiplied by: `1 / rows`, or their share of supervised tokens.

    >>> row_weights(lambda p, e: p["w"], [], np.array([3, 1]))
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if normalize == "rows":
        return torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    tokens = torch.from_numpy(np.asarray(data.supervised)[rows]).double()  # pyright: ignore
    whole = tokens.sum().clamp_min(1)
    # The loss of a row is the sum over its tokens, or their mean.
    return (torch.ones_like(tokens) if getattr(loss, "reduction", "mean") == "sum" else tokens) / whole
