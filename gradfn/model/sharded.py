"""Models whose parameters are sharded over processes (FSDP2), and how these take turns in running them.

A process holds 1/N of every block. Before a block runs, the processes gather its weights, and then drop them
again; so all must run the same passes in the same order, while each has rows of its own, and maybe fewer.
Here they agree before every pass. A process that has no such pass to run now, or is done, runs one of two
tokens, of which nothing is used.
"""

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradfn.errors import InputError
from gradfn.model.params import evaluating
from gradfn.model.sites import output_head
from gradfn.model.spread import sharding, whole

FORWARD, BACKWARD, GATHER, WAIT, END = range(5)
"""What processes agree on: a pass without gradients, one with, all weights one by one, going on, stopping."""
IDLE: ContextVar[bool] = ContextVar("IDLE", default=False)
"""Whether this process runs the model for the others only, so that nothing looks at its layers."""
_TURNS: "MutableMapping[nn.Module, Turns]" = WeakKeyDictionary()
"""The turns that the processes of a model take."""


class Turns:
    """The turns of processes that hold the shards of one model: all run its passes together.

    Args:
        group: of `torch.distributed`, which must take tensors on the CPU; None is all processes.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.model: Any = None
        self.start: Tensor | None = None
        """What the blocks of the last pass began with."""

    def take(self, turn: int) -> None:
        """Go on when it is the turn of what this process is to do, and do what the others need until then.

        The smallest number that any process wants comes first. Those at their end hold up nobody.
        """
        while (agreed := self._agree(turn)) != turn:
            if agreed == GATHER:
                for tensor in self._sorted():
                    whole(tensor)
            elif agreed < GATHER:
                self._idle(agreed)

    def _agree(self, turn: int) -> int:
        first = torch.tensor(turn)
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN, self.group)
        return int(first)

    def _sorted(self) -> list[Tensor]:
        """The parameters in the order in which a fingerprint reads them."""
        return [parameter for _, parameter in sorted(self.model.named_parameters(), key=lambda one: one[0])]

    def _idle(self, turn: int) -> None:
        """Run a pass for the others."""
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(self.model.parameters()).device)
        before = IDLE.set(True)
        try:
            with (
                evaluating(self.model), torch.inference_mode(False), torch.set_grad_enabled(turn == BACKWARD)
            ):  # fmt: skip
                logits = self.model(input_ids=ids, use_cache=False).logits
                if turn == BACKWARD:
                    assert self.start is not None
                    torch.autograd.grad(logits.sum(), self.start)
        finally:
            IDLE.reset(before)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Run a model in turns."""
        with ExitStack() as stack:
            stack.callback(self.attach(model))
            yield

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Run a model in turns from now on; returns the function that undoes this.

        Raises:
            InputError: it is not sharded, or has no embedding of tokens to begin with.
        """
        if sharding(model) != "fsdp":
            raise InputError(
                f"the parameters of {type(model).__name__} are not sharded by blocks: load it with "
                "gf.hf.load_sharded, or call gf.model.shard_model on it"
            )
        getter: Any = getattr(model, "get_input_embeddings", None)
        embedding = getter() if callable(getter) else None
        if not isinstance(embedding, nn.Module):
            raise InputError(
                f"{type(model).__name__} has no get_input_embeddings, with which its passes begin"
            )
        self.model, _TURNS[model] = model, self
        undo = ExitStack()
        # Before the hook of FSDP2 that gathers weights.
        undo.callback(model.register_forward_pre_hook(self._before, prepend=True).remove)
        # The backward pass gathers where what a module returned has a gradient. To be the same in all
        # processes, with a probe or without, that of the embedding always has one, before the hook of FSDP2,
        # and that of the head is no longer that of the model, behind it.
        undo.callback(embedding.register_forward_hook(self._begin, prepend=True).remove)
        if (head := output_head(model)) is not None:
            undo.callback(head.register_forward_hook(_copied).remove)
        undo.callback(_TURNS.pop, model, None)
        return undo.close

    def _before(self, *_: Any) -> None:
        if not IDLE.get():
            self.take(BACKWARD if torch.is_grad_enabled() else FORWARD)

    def _begin(self, _: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        """Differentiate with respect to the embeddings, so that a backward pass goes through all blocks."""
        if torch.is_grad_enabled():
            self.start = y.requires_grad_()
        return y


def _copied(_: nn.Module, inputs: Any, y: Tensor) -> Tensor:
    return y.clone() if torch.is_grad_enabled() else y


def turns_of(model: nn.Module) -> Turns | None:
    """The turns that the processes of a sharded model take; None where it is not sharded.

    >>> turns_of(nn.Linear(1, 1)) is None
    True
    """
    return _TURNS.get(model)


def check_turns(model: nn.Module) -> None:
    """Refuse a sharded model whose processes do not take turns.

    Raises:
        InputError: it is sharded, and runs outside of `in_turns`.
    """
    if turns_of(model) is None and sharding(model) == "fsdp":
        raise InputError(
            "the model is sharded over processes, which have to run it in turns: do this inside of "
            "`with gf.model.in_turns(model):`, in all of them"
        )


def starts_of(model: nn.Module) -> tuple[Tensor, ...]:
    """What a backward pass through a sharded model must reach beside the slots: the input of its blocks."""
    turns = turns_of(model)
    return () if turns is None or turns.start is None else (turns.start,)


@contextmanager
def in_turns(model: nn.Module, group: Any = None) -> Iterator[None]:
    """Let the processes of a sharded model run it, each on rows of its own, and wait at the end for all.

    Inside, every function that only runs the model, or takes gradients at its layers, works as for a whole
    one: `collect`, `fit` and `score`, with the rows of this process. All processes must enter, with the same
    model.

    Args:
        model: a causal LM of transformers from `gf.hf.load_sharded` or `shard_model`.
        group: of `torch.distributed`; None is all processes.

    Raises:
        InputError: the model is not sharded.

    >>> with in_turns(nn.Linear(1, 1)): pass
    Traceback (most recent call last):
    gradfn.errors.InputError: the parameters of Linear are not sharded by blocks: load it with ...
    """
    turns = Turns(group)
    with turns.of(model):
        yield
        turns.take(END)


# --- sharding


def blocks_to_shard(model: nn.Module) -> list[nn.Module]:
    """The modules that are sharded each by itself: blocks, and embedding and head if they are not tied.

    Raises:
        InputError: the model does not say what its blocks are, or two of them share a weight.
    """
    kinds = getattr(model, "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise InputError(
            f"{type(model).__name__} does not say what its blocks are (`_no_split_modules`), so it cannot be "
            "sharded: run it whole"
        )
    ends: list[Any] = [model.get_input_embeddings(), output_head(model)]  # pyright: ignore[reportCallIssue]
    ends = [end for end in ends if end is not None]
    if len({id(end.weight) for end in ends}) == len(ends):
        blocks += ends
    owners: dict[int, nn.Module] = {}
    for block in blocks:
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), block) is not block:
                raise InputError(
                    f"two blocks of {type(model).__name__} share a weight, so it cannot be sharded by blocks"
                    ": run it whole"
                )
    return blocks


def shard_model(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Shard a language model of transformers over processes: 1/N of the rows of every weight to each.

    The blocks are sharded by `torch.distributed.fsdp.fully_shard`, and the rest with the model itself. All
    weights are dropped after use, so a process holds 1/N of the model and the block that runs (and the one
    that is gathered ahead of it). The model is changed in place; all processes must call this.

    Args:
        model: on the meta device, or with the same weights in all processes.
        mesh: of `torch.distributed`, with one dimension; None is all processes, on the model's device (on the
            CPU, where it is on the meta device).

    Raises:
        InputError: the model does not say what its blocks are, two of them share a weight, or
            `torch.distributed` is not initialised.

    Source: `torch.distributed.fsdp.fully_shard`; PyTorch FSDP, arXiv:2304.11277.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise InputError(
            "a model is sharded over processes: start them with torchrun, and call "
            "torch.distributed.init_process_group"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if mesh is None:
        kind = next(model.parameters()).device.type
        mesh = init_device_mesh("cpu" if kind == "meta" else kind, (torch.distributed.get_world_size(),))
    for block in [*blocks_to_shard(model), model]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return model


# --- what runs inside the passes of a sharded model


def at_head(
    model: nn.Module, input_ids: Int[Tensor, "batch tokens"], of_hidden: Callable[[Tensor], Tensor]
) -> Tensor:
    """`of_hidden` of the hidden states, where the model would make logits of them and its head is whole."""
    head: Any = output_head(model)
    stock = head.forward

    def forward(hidden: Float[Tensor, "batch tokens dim"]) -> Tensor:
        return stock(hidden) if IDLE.get() else of_hidden(hidden)

    with patch.object(head, "forward", forward):
        return model(input_ids=input_ids, use_cache=False).logits


@contextmanager
def dropping(model: nn.Module) -> Iterator[None]:
    """Have the blocks of a sharded model keep their input alone, and compute the rest again in the backward.

    The backward pass must run inside too. A block gathers its weights once for both.

    Source: `torch.utils.checkpoint`; Chen et al., arXiv:1604.06174.
    """
    from torch.distributed.fsdp import FSDPModule

    def forward(stock: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if IDLE.get() or not torch.is_grad_enabled():
            return stock(*args, **named)
        return checkpoint(stock, *args, use_reentrant=False, preserve_rng_state=False, **named)

    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, FSDPModule) and module is not model and any(module.children()):
                undo.enter_context(patch.object(module, "forward", partial(forward, module.forward)))
        yield


@contextmanager
def replacing(model: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Have `replace(name, parameter)` in the place of every parameter of a sharded model while it runs.

    A replacement must have the numbers of the parameter in the same memory, which is filled again for the
    backward pass.
    """
    from torch.distributed.fsdp import FSDPModule

    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def of_block(module: nn.Module) -> Iterator[nn.Module]:
        yield module
        for child in module.children():
            if not isinstance(child, FSDPModule):
                yield from of_block(child)

    def put(places: list[tuple[nn.Module, str, str]], *_: Any) -> None:
        for owner, key, name in () if IDLE.get() else places:
            parameter: Any = owner._parameters[key]
            owner._parameters[key] = replace(name, parameter)  # pyright: ignore[reportArgumentType]

    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                places = [
                    (part, key, names[id(parameter)])
                    for part in of_block(module)
                    for key, parameter in part._parameters.items()
                    if parameter is not None
                ]
                undo.callback(module.register_forward_pre_hook(partial(put, places)).remove)
        yield
