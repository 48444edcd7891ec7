"""The pass of an engine through a sharded model."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradfn.engine.attention import fast_attention
from gradfn.engine.journal import as_function
from gradfn.engine.reference import one_number
from gradfn.engine.tap import Forward, RepeatedCallError, attached, recomputing
from gradfn.errors import InputError
from gradfn.model.sharded import check_turns, dropping, starts_of, turns_of
from gradfn.model.sites import Site
from gradfn.types import Batch, Blocks, LossFn


def check_sharded(model: nn.Module, loss: LossFn) -> None:
    """Refuse a sharded model that is not run in turns, or of whose loss only the definition is there.

    Raises:
        InputError: it is sharded, and one of these.
    """
    check_turns(model)
    if turns_of(model) is not None and not hasattr(loss, "batched"):
        raise InputError(
            "the loss is a function of whole weights, and the model is sharded: give a loss with a `batched` "
            "form, such as gf.causal_lm_loss(model)"
        )


@contextmanager
def not_again() -> Iterator[None]:
    """Say what a whole model would be run again for, with what was learned of it.

    Raises:
        InputError: a layer is used more than once, or written to.
    """
    try:
        yield
    except RepeatedCallError as error:
        raise InputError(
            f"{error.block} is used more than once in a forward pass of a sharded model: exclude it, or load "
            "the model whole"
        ) from error
    except RuntimeError as error:
        if "modified inplace" not in str(error):
            raise
        raise InputError(
            "the model writes to what its layers return, and is sharded: load it whole"
        ) from error


def sharded_blocks(
    model: nn.Module, sites: Sequence[Site], loss: Any, batch: Batch, forward: Forward
) -> tuple[Blocks, Tensor]:
    """The cotangents of the slots, and the losses, of a model whose blocks compute twice what they need.

    The probes stay attached in the backward pass, where a block is computed again.
    """
    assert forward.size is not None

    def use(*call: Any) -> Any:
        return forward.use(*call, recomputed=recomputing())

    with (
        as_function(model, drops=True), attached(sites, use), fast_attention(), dropping(model),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returns a probe, which nothing writes to
        losses = one_number(loss.batched(batch), forward.size)
        # All blocks are gone through, in all processes, whichever of them have a probe.
        inputs = [*forward.slots.values(), *starts_of(model)]
        grads = torch.autograd.grad(losses.sum(), inputs, materialize_grads=True)
    return dict(zip(forward.slots, grads, strict=False)), losses
