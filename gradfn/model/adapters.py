"""What PEFT has added to a model, and so trained."""

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["adapter_parameters", "added_parameters"]


def added_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that a model has only with its adapters.

    >>> added_parameters(nn.Linear(2, 2))
    set()
    """
    names = set()
    for path, module in _adapter_layers(model):
        for own in module.adapter_layer_names:  # PEFT's name for what is trained
            part = getattr(module, own, None)
            if isinstance(part, nn.Module):
                names |= {f"{path}.{own}.{name}".lstrip(".") for name, _ in part.named_parameters()}
    return names


def adapter_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that adapters trained: their own, and those of modules, tokens and biases.

    >>> adapter_parameters(nn.Linear(2, 2))
    set()
    """
    biases = {getattr(config, "bias", "none") for config in getattr(model, "peft_config", {}).values()}
    own = {f"{path}.base_layer.bias" for path, _ in _adapter_layers(model)} if biases - {"none"} else set()
    return added_parameters(model) | {
        name
        for name, _ in model.named_parameters()
        if name in own or ("all" in biases and "bias" in name and ".original_module." not in name)
    }


def _adapter_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from ((path, one) for path, one in model.named_modules() if hasattr(one, "adapter_layer_names"))
