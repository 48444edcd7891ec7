"""What a few tokens show of a model before it is differentiated."""

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.model.params import evaluating
from gradfn.model.sharded import IDLE, turns_of
from gradfn.model.sites import output_head
from gradfn.types import Batch

CAUSAL_TOLERANCE = 1e-5
"""How far rounding may move the logits of a causal model when a later token changes."""
CAUSAL_SETTINGS = {
    "is_decoder": True,
    "use_bidirectional_attention": False,
    "is_causal": True,
    "causal": True,
}
"""What the config of a causal model says, if it says anything."""


def _trial_ids(model: nn.Module) -> Int[Tensor, "one eight"]:
    """Eight tokens of the model's vocabulary."""
    head = output_head(model)
    count = len(head.weight) if isinstance(head, nn.Linear) else 8  # pyright: ignore[reportArgumentType]
    return torch.linspace(0, count - 1, 8, device=next(model.parameters()).device).long()[None]


def _trial_logits(model: nn.Module, *trials: Batch) -> list[Tensor]:
    """The logits of several batches, in eval mode."""
    with evaluating(model), torch.no_grad():
        return [model(**trial, use_cache=False).logits for trial in trials]


def refuse_unread_labels(model: nn.Module) -> None:
    """Refuse a model whose logits are the same for another first label: its decoder does not read labels."""
    ids = _trial_ids(model)
    other = torch.cat([ids[:, 3:4], ids[:, 1:]], 1)
    trials = ({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": x} for x in (ids, other))
    if torch.equal(*_trial_logits(model, *trials)):
        raise InputError(
            f"the logits of {type(model).__name__} do not depend on its labels, so its decoder does not read "
            "them: give an encoder-decoder that does, or another task"
        )


def refuse_later_tokens(model: nn.Module) -> None:
    """Refuse a model whose logits depend on later tokens, because the loss would let it read the answer.

    Compares the logits of eight tokens with those of the same tokens but for another last one.
    """
    ids = _trial_ids(model)
    other = torch.cat([ids[:, :-1], ids[:, 3:4]], 1)
    own, changed = (part[:, :-1] for part in _trial_logits(model, {"input_ids": ids}, {"input_ids": other}))
    rounding = max(CAUSAL_TOLERANCE, torch.finfo(own.dtype).eps)
    if float((own.float() - changed.float()).norm()) <= rounding * float(own.float().norm()):
        return
    config: Any = getattr(model, "config", None)
    wrong = [f"{n}={v}" for n, v in CAUSAL_SETTINGS.items() if getattr(config, n, v) != v]
    cure = f"set {wrong[0]} in its config, or give" if wrong else "give"
    raise InputError(
        f"the logits of {type(model).__name__} depend on later tokens, so it is no causal LM: {cure} another "
        "task, such as masked_lm"
    )


def decoder_of(model: nn.Module) -> Any:
    """The model without its head; of a model with PEFT adapters, that of the model that they are in."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return getattr(unwrap() if callable(unwrap) else model, "base_model", None)


def head_is_plain(model: nn.Module) -> bool:
    """Whether the model's logits are just `W h + b`: not scaled, capped or computed from something else.

    Compares the head applied to the hidden states with the model's own logits on a few tokens.
    """
    head = output_head(model)
    decoder = decoder_of(model)
    if not isinstance(head, nn.Linear) or decoder in (None, model):
        return False
    if turns_of(model) is not None:
        return _is_plain_in_one_pass(model, head, decoder)
    ids = _plain_ids(head)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        hidden = getattr(decoder(input_ids=ids, use_cache=False), "last_hidden_state", None)
        ours = head(hidden) if hidden is not None and hidden.shape[-1] == head.in_features else None
    if ours is None or ours.shape != own.shape:
        return False
    # A plain head runs the very same product, so there is hardly anything to tolerate.
    return float((ours - own).abs().max()) <= 4 * torch.finfo(own.dtype).eps * float(own.abs().max())


def _plain_ids(head: nn.Linear) -> Int[Tensor, "four two"]:
    """A few tokens of the vocabulary."""
    return torch.linspace(0, len(head.weight) - 1, 8, device=head.weight.device).long().view(4, 2)


def _is_plain_in_one_pass(model: nn.Module, head: nn.Linear, decoder: nn.Module) -> bool:
    """The same of a sharded model, of whose parts none runs alone: the head maps what the decoder gives."""
    seen: dict[str, Any] = {}
    with ExitStack() as undo:
        for name, module in (("decoder", decoder), ("head", head)):

            def note(_: nn.Module, args: Any, y: Any, name: str = name) -> None:
                if not IDLE.get():
                    seen[name] = (args, y)

            undo.callback(module.register_forward_hook(note).remove)
        with torch.no_grad():
            own = model(input_ids=_plain_ids(head), use_cache=False).logits
    hidden = getattr(seen.get("decoder", ((), None))[1], "last_hidden_state", None)
    read, made = seen.get("head", ((), None))
    return bool(read) and hidden is not None and torch.equal(hidden, read[0]) and torch.equal(made, own)
