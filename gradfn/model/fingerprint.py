"""Which model this is: a digest of its weights, and of what else its function depends on."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradfn.model.sharded import GATHER, turns_of
from gradfn.model.spread import class_of, whole
from gradfn.watch import watched

__all__ = ["model_fingerprint"]

ORIGINAL = "original_module"
"""Peft's name of a module that an adapter replaces."""


NO_FUNCTION = {
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "dtype", "experts_implementation",
    "initializer_range", "output_attentions", "output_hidden_states", "return_dict", "torch_dtype",
    "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip
"""Values of a config that change no output, or that tensors say better."""
NO_ADAPTER_FUNCTION = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
}  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits of all parameters and saved buffers, and of what else the function depends on.

    Names, types, shapes and values of tensors enter; the class of every module; and the configs of the
    model and of its adapters, but for values that change no output. Where the model has no config, it is
    what every module prints of itself: the epsilon of a norm, the stride of a convolution.

    Values enter as position-weighted sums of their bits, `sum_i (2i + 1) v_i` modulo 2^64 in blocks of
    65,536 (float64 as two values): exact, the same on every device, and different when any one value changes
    or two trade places.
    A tied weight counts once, so tying matters too. Of a sharded model, one weight after the other is
    gathered, in all processes.

    >>> layer = nn.Linear(2, 2)
    >>> before = model_fingerprint(layer)
    >>> _ = layer.weight.data[0].neg_()
    >>> before == model_fingerprint(layer)
    False
    """
    digest = hashlib.sha256()
    if (turns := turns_of(model)) is not None:
        turns.take(GATHER)
    for name, tensor in watched(
        "fingerprint of the weights", [*_saved_tensors(model)], "tensors", timed=False
    ):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_checksums(whole(tensor.detach())).numpy().astype("<i8").tobytes())
    config = getattr(model, "config", None)
    modules = [
        [name, class_of(one).__qualname__, one.extra_repr() if config is None else ""]
        for name, one in model.named_modules()
    ]
    settings = [modules, _settings(config, NO_FUNCTION)]
    for name, adapter in getattr(model, "peft_config", {}).items():
        settings.append([name, _settings(adapter, NO_ADAPTER_FUNCTION)])
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _settings(config: Any, without: set[str]) -> Any:
    """A config, or a value in one, as JSON that is equal for equal settings."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {str(key): _settings(value, without) for key, value in config.items() if key not in without}
    if isinstance(config, set | frozenset):
        return sorted(map(str, config))
    if isinstance(config, list | tuple):
        return [_settings(value, without) for value in config]
    return f"{config:.6g}" if isinstance(config, float) else config  # GGUF files hold float32


def is_replaced(model: nn.Module, name: str) -> bool:
    """Whether a weight is the base's of a module that an adapter has a copy of its own of."""
    owner, found, _ = f".{name}".rpartition(f".{ORIGINAL}.")
    return bool(found) and hasattr(model.get_submodule(owner.lstrip(".")), "modules_to_save")


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then the buffers that are saved with them, then scales; sorted by name.

    What an adapter has replaced is left out: it is not used, and may be random.
    """
    every = model.named_parameters(remove_duplicate=False)
    used = {id(value): (name, value) for name, value in [*every][::-1] if not is_replaced(model, name)}
    yield from sorted(used.values())
    saved = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    buffers = (item for item in model.named_buffers() if item[0] in saved)
    yield from sorted(item for item in buffers if not is_replaced(model, item[0]))
    yield from _scales(model)


def _scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is saved beside quantised weights, without which these are no numbers; sorted by name."""
    if all(parameter.is_floating_point() for parameter in model.parameters()):
        return
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers()}
    saved = sorted(model.state_dict().items(), key=lambda one: one[0])
    yield from (one for one in saved if one[0] not in known and isinstance(one[1], Tensor))


def _checksums(tensor: Tensor, width: int = 1 << 16) -> Tensor:
    """Position-weighted sums of the bits of each `width` values, int64 on the CPU; float64 is seen in halves,
    for an even number of flipped signs would cancel modulo 2^64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = torch.int32 if tensor.is_floating_point() and tensor.element_size() == 8 else None
    flat = tensor.contiguous().flatten().view(kind or kinds[tensor.element_size()])
    # Odd, and so far apart that neither one change nor one exchange can cancel modulo 2^64.
    weights = 2 * torch.arange(width, device=flat.device) + 1
    sums = [(block.long() * weights[: len(block)]).sum() for block in flat.split(width)]
    return torch.stack(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)
