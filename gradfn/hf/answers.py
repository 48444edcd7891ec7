"""What the model itself says: attributing an answer that it does not know finds nothing."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gradfn.data import IGNORED, Documents, collate
from gradfn.model.losses import ModelLoss, token_losses
from gradfn.types import Data

SAID_TOKENS = 24
"""The longest answer, in tokens, of which it is told what the model says instead."""


@dataclass(frozen=True)
class Answer:
    """How the model answers one query.

    Args:
        loss: mean negative log-likelihood of the supervised tokens, nats a token.
        probability: of all supervised tokens together.
        known: whether greedy decoding from the prompt gives exactly the supervised tokens; None if there is
            no prompt.
        says: what greedy decoding gives instead; empty if the answer is known, longer than 24 tokens, or
            without a prompt.
        glued: whether the answer continues the last word of the prompt, mostly for lack of a space.
    """

    loss: float
    probability: float
    known: bool | None
    says: str
    glued: bool = False


def answers(model: nn.Module, tokenizer: Any, queries: Documents) -> list[Answer]:
    """Ask the model every query.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer, to decode what the model says.
        queries: documents; tokens without a label at the beginning are the prompt, the rest is the answer.
    """
    return [_answer(model, tokenizer, queries[row]) for row in range(len(queries))]


@torch.no_grad()
def predicted_classes(loss: ModelLoss, rows: Data) -> list[int]:
    """The class that a classifier gives each row, one row at a time.

    Args:
        loss: of classification, which knows the model's inputs.
        rows: examples.
    """
    device = next(loss.model.parameters()).device
    batches = (collate([rows[row]]) for row in range(len(rows)))
    return [
        int(loss.logits({key: value.to(device) for key, value in batch.items()}).flatten().argmax())
        for batch in batches
    ]


@torch.no_grad()
def _answer(model: nn.Module, tokenizer: Any, query: dict[str, Tensor]) -> Answer:
    ids, labels = query["input_ids"], query["labels"]
    supervised = (labels[1:] != IGNORED).nonzero().flatten()
    if not len(supervised):
        return Answer(float("nan"), 1.0, None, "")
    device = next(model.parameters()).device
    logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, supervised.to(device)].cpu()
    targets = labels[1:][supervised]
    losses = token_losses(logits, targets).double()
    start = int(supervised[0]) + 1
    loss, probability = float(losses.mean()), float((-losses.sum()).exp())
    if not (labels[:start] == IGNORED).any():
        return Answer(loss, probability, None, "")
    if (logits.argmax(-1) == targets).all():
        return Answer(loss, probability, True, "")
    count, prompt = len(supervised), tokenizer.decode(ids[:start])
    says = "" if count > SAID_TOKENS else _continue(model, tokenizer, ids[:start].to(device), count)
    border = tokenizer.decode(ids)[len(prompt) - 1 :][:2]
    return Answer(loss, probability, False, says, border.isalnum() and len(border) == 2)


def _continue(model: nn.Module, tokenizer: Any, prompt: Int[Tensor, " tokens"], count: int) -> str:
    """Greedy decoding of a few tokens, without a cache, which not every model has."""
    ids = prompt
    for _ in range(count):
        token = int(model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, ids.new_tensor([token])])
    return tokenizer.decode(ids[len(prompt) :])
