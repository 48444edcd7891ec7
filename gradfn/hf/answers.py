"""What the model itself makes of a query: attributing an answer that it does not know finds nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gradfn.data import IGNORED, Documents
from gradfn.losses import token_cross_entropy


@dataclass(frozen=True)
class Answer:
    """The model on one query.

    Args:
        loss: mean negative log-likelihood of the supervised tokens, nats a token.
        probability: of all supervised tokens together.
        known: whether greedy decoding from the prompt gives exactly the supervised tokens.
        says: what greedy decoding from the prompt gives instead; empty where it is known or there is no prompt.
    """

    loss: float
    probability: float
    known: bool
    says: str


def answers(model: nn.Module, tokenizer: Any, queries: Documents) -> list[Answer]:
    """Ask the model every query.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer, to show what the model says.
        queries: documents; where labels leave the prompt out, the rest is the answer.
    """
    return [_answer(model, tokenizer, queries[row]) for row in range(len(queries))]


@torch.no_grad()
def _answer(model: nn.Module, tokenizer: Any, query: dict[str, Tensor]) -> Answer:
    ids, labels = query["input_ids"], query["labels"]
    supervised = (labels[1:] != IGNORED).nonzero().flatten()
    if not len(supervised):
        return Answer(float("nan"), 1.0, False, "")
    device = next(model.parameters()).device
    logits = model(input_ids=ids[None].to(device), use_cache=False).logits[0, supervised.to(device)].cpu()
    targets = labels[1:][supervised]
    losses = token_cross_entropy(logits, targets).double()
    known = bool((logits.argmax(-1) == targets).all())
    start = int(supervised[0]) + 1
    has_prompt = bool((labels[:start] == IGNORED).any()) or start > 1
    says = (
        ""
        if known or not has_prompt
        else _continue(model, tokenizer, ids[:start].to(device), len(supervised))
    )
    return Answer(float(losses.mean()), float((-losses.sum()).exp()), known, says)


def _continue(model: nn.Module, tokenizer: Any, prompt: Int[Tensor, " tokens"], count: int) -> str:
    """Greedy decoding of a few tokens; repeating the forward, not caching it, works for any model."""
    ids, ending = prompt, _ending(tokenizer)
    for _ in range(count):
        token = int(model(input_ids=ids[None], use_cache=False).logits[0, -1].argmax())
        if token in ending:
            break
        ids = torch.cat([ids, ids.new_tensor([token])])
    return tokenizer.decode(ids[len(prompt) :])


def _ending(tokenizer: Any) -> Sequence[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
