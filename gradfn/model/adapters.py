"""What PEFT has added to a model, and so trained."""

from typing import Any

from torch import nn

__all__ = ["adapter_parameters"]


def adapter_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that adapters trained: their own, and those of modules, tokens and biases.

    >>> adapter_parameters(nn.Linear(2, 2))
    set()
    """
    names, own_biases = set(), set()
    modules: Any = model.named_modules()
    for path, module in modules:
        for own in getattr(module, "adapter_layer_names", ()):  # PEFT's name for what is trained
            own_biases.add(f"{path}.base_layer.bias")
            part = getattr(module, own, None)
            if isinstance(part, nn.Module):
                names |= {f"{path}.{own}.{name}".lstrip(".") for name, _ in part.named_parameters()}
    biases = {getattr(config, "bias", "none") for config in getattr(model, "peft_config", {}).values()}
    everywhere = "all" in biases
    return names | {
        name
        for name, _ in model.named_parameters()
        if (everywhere and "bias" in name and ".original_module." not in name)
        or (biases - {"none"} and name in own_biases)
    }
