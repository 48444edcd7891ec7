"""What PEFT has added to a model, and so trained."""

from typing import Any

from torch import nn

__all__ = ["adapter_parameters"]


def adapter_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters of adapters: of every kind of them, and of modules and tokens of their own.

    >>> adapter_parameters(nn.Linear(2, 2))
    set()
    """
    names = set()
    modules: Any = model.named_modules()
    for path, module in modules:
        for own in getattr(module, "adapter_layer_names", ()):  # PEFT's name for what is trained
            part = getattr(module, own, None)
            if isinstance(part, nn.Module):
                names |= {f"{path}.{own}.{name}".lstrip(".") for name, _ in part.named_parameters()}
    return names
