"""What a few tokens show of a model before it is differentiated."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.model.params import evaluating
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
