"""What a model is for, as the names of its architectures say, and the loss of that."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradfn.errors import InputError
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.types import LossFn

_HEADS = (
    (r"With(LMHeadModel|LMHead)$", None),  # of next tokens or of masked ones: the name does not say
    (r"(ForCausalLM|LMHeadModel|GenerationDecoder)$", "causal_lm"),
    (r"ForMaskedLM$", "masked_lm"),
    (r"ForSequenceClassification$", "classification"),
    (r"ForImageClassification", "image_classification"),
    (r"ForConditionalGeneration$", "causal_lm"),  # without an encoder: such as a Gemma 3 that sees images
)
_ENCODED = r"(ForConditionalGeneration|ForTextToText|LMHeadModel|MTModel|EncoderDecoderModel)$"


def task_of(architectures: Sequence[str], config: Mapping[str, Any]) -> str | None:
    """The task of a model; None where the names of its architectures do not say.

    Args:
        architectures: names of classes, such as those in a config; the first that says a task counts.
        config: the model's config as plain values.

    >>> task_of(["BertForMaskedLM"], {}), task_of(["BertForSequenceClassification"], {"num_labels": 1})
    ('masked_lm', 'regression')
    >>> task_of(["BertModel"], {})
    """
    for name in architectures:
        if config.get("is_encoder_decoder") and re.search(_ENCODED, name):
            return "seq2seq_lm"
        task = next((task for pattern, task in _HEADS if re.search(pattern, name)), None)
        if task == "classification" and _is_regression(config):
            return "regression"
        if task is not None:
            return task
    return None


def _is_regression(config: Mapping[str, Any]) -> bool:
    """Whether a classifier gives one number; of a kind of problem that is told, whether it is this one."""
    labels = config.get("id2label") or range(config.get("num_labels") or 2)
    return (config.get("problem_type") or ("regression" if len(labels) == 1 else "")) == "regression"


def default_loss(model: nn.Module) -> LossFn:
    """The loss of the task that the class of a model is for: of next tokens, unless its name says otherwise.

    Raises:
        InputError: a masked language model, of which the rows say what is masked.
    """
    config: Any = getattr(model, "config", None)
    task: Any = task_of([type(model).__name__], config.to_dict() if hasattr(config, "to_dict") else {})
    if task == "masked_lm":
        raise InputError(
            f"a {type(model).__name__} tells tokens that are masked: mask rows with gf.hf.mask_tokens, and "
            'give loss=gf.model_loss(model, "masked_lm")'
        )
    return causal_lm_loss(model) if task in (None, "causal_lm") else model_loss(model, task)
