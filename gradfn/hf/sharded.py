"""Loading a language model in shards: no process ever reads or holds the whole of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradfn.errors import InputError
from gradfn.hf.hub import quiet
from gradfn.hf.locate import load_pretrained, locate_model
from gradfn.hf.models import (
    MODEL_CLASSES,
    PRECISIONS,
    adapter_of,
    check_attention,
    check_device,
    check_saved_for,
    check_weights,
)
from gradfn.model.sharded import shard_model
from gradfn.model.spread import own_part

INDEX, ALONE = "model.safetensors.index.json", "model.safetensors"
"""The files of a checkpoint: what lies in which of several, or the only one."""


def load_sharded(
    path: str | Path,
    *,
    revision: str | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A causal LM in evaluation mode and frozen, 1/N of every weight in each of N processes.

    The model is made without memory for its weights and sharded (`gf.model.shard_model`). Then each process
    reads its rows of every weight from the safetensors files. All processes must call this, after
    `torch.distributed.init_process_group`; they run the model inside of `gf.model.in_turns`.

    Args:
        path: a folder, or a hub name, with weights in safetensors.
        revision, precision, device, attention, trust_remote_code: see `load_model`; a device of this process.

    Raises:
        InputError: there is no such model, or it cannot be loaded in shards: a GGUF file, an adapter,
            quantised weights, weights in other files than safetensors, or put together of several (experts).

    Source: `torch.distributed.fsdp.fully_shard`; safetensors, `get_slice`.

    >>> load_sharded("no/such/model")
    Traceback (most recent call last):
    gradfn.errors.InputError: no model 'no/such/model': no file or folder here has this name; check the path
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    check_device(device)
    check_attention(attention, precision, torch.device(device))
    source, hub = locate_model(path, revision)
    if "gguf_file" in hub or adapter_of(path, source, hub) is not None:
        kind = "a GGUF file" if "gguf_file" in hub else "an adapter"
        raise InputError(f"{path} is {kind}, which cannot be loaded in shards: load it whole, without --fsdp")
    hub["trust_remote_code"] = trust_remote_code
    model = _empty(path, source, hub, PRECISIONS[precision], attention)
    saved = _renamed(model, path, _files_of(path, source, hub))
    tied = _names_of(model)
    check_saved_for(model, path, "causal_lm", saved.keys() - {name for names in tied for name in names})
    if missing := {names[0] for names in tied if not saved.keys() & set(names)}:
        raise InputError(
            f"{path} lacks weights of {type(model).__name__}, such as {min(missing)} ({len(missing)} in "
            "all): give a model that was saved with its head, or load it whole, without --fsdp"
        )
    shard_model(model)
    model.to_empty(device=device)
    _fill(model, path, saved, tied)
    _fill_buffers(model, path)
    check_weights(model, path, "causal_lm", set())
    if precision == "fp64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # pyright: ignore[reportCallIssue]
    return model


def _files_of(path: str | Path, source: str, hub: dict[str, Any]) -> dict[str, str]:
    """The file of every saved tensor, by the tensor's name."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    given = {key: value for key, value in hub.items() if key != "trust_remote_code"}

    def find(name: str) -> str | None:
        missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo")}
        return load_pretrained("model", path, cached_file, source, filename=name, **missing, **given)

    if (index := find(INDEX)) is not None:
        held = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        places = {file: find(file) for file in sorted({*held.values()})}
        if absent := [file for file, place in places.items() if place is None]:
            raise InputError(f"{path} lacks {absent[0]}, which {INDEX} names: fetch the model again")
        return {name: str(places[file]) for name, file in held.items()}
    if (alone := find(ALONE)) is None:
        raise InputError(
            f"{path} has no {ALONE}, of which --fsdp reads a part: save it again with save_pretrained, or "
            "load it whole"
        )
    with safe_open(alone, "pt") as file:
        return dict.fromkeys(file.keys(), alone)


def _renamed(model: Any, path: str | Path, files: dict[str, str]) -> dict[str, tuple[str, str]]:
    """The file of every saved tensor and its name in it, by the name that the model has for it.

    Raises:
        InputError: a weight is made of others than it was saved as.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    every = get_model_conversion_mapping(model)
    renamings = [one for one in every if isinstance(one, WeightRenaming)]
    others: list[Any] = [one for one in every if not isinstance(one, WeightRenaming)]
    own, prefix = model.state_dict(), model.base_model_prefix
    named = {}
    for key, file in files.items():
        name, converted = rename_source_key(key, renamings, others, prefix, own)
        if converted is not None:
            raise InputError(
                f"{path} has {key}, of which {name} is put together when it is loaded, and --fsdp reads "
                "weights as they are: load it whole, without --fsdp"
            )
        named[name] = file, key
    return named


def _empty(
    path: str | Path, source: str, hub: dict[str, Any], dtype: torch.dtype, attention: str | None
) -> Any:
    """The model on the meta device, frozen."""
    import transformers

    config = load_pretrained("model", path, transformers.AutoConfig.from_pretrained, source, **hub)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{path} is quantised, and is not loaded in shards: load it whole, without --fsdp")
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": hub["trust_remote_code"]}
    how |= {} if attention is None else {"attn_implementation": attention}
    make = getattr(transformers, MODEL_CLASSES["causal_lm"]).from_config
    with torch.device("meta"):
        model = load_pretrained("model", path, lambda _: make(config, **how), source)
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    if kept and dtype in (torch.float16, torch.bfloat16):
        raise InputError(
            f"{path} keeps {sorted(kept)[0]} in float32, which --fsdp does not: give --precision fp32"
        )
    return model.eval().requires_grad_(False)


def _names_of(model: nn.Module) -> list[list[str]]:
    """The names of each parameter and saved buffer, of which a tied weight has several."""
    named: dict[int, list[str]] = {}
    buffers = ((name, value) for name, value in model.named_buffers() if _is_saved(model, name))
    for name, value in (*model.named_parameters(remove_duplicate=False), *buffers):
        named.setdefault(id(value), []).append(name)
    return [*named.values()]


def _is_saved(model: nn.Module, buffer: str) -> bool:
    owner, _, name = buffer.rpartition(".")
    return name not in model.get_submodule(owner)._non_persistent_buffers_set


def _fill(
    model: nn.Module, path: str | Path, saved: dict[str, tuple[str, str]], tied: list[list[str]]
) -> None:
    """Read this process's rows of every weight, one file after the other."""
    from safetensors import safe_open

    places: dict[str, list[tuple[str, str]]] = {}
    for names in tied:
        place, key = saved[next(name for name in names if name in saved)]
        places.setdefault(place, []).append((names[0], key))
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for place, pairs in places.items():
        with quiet(), safe_open(place, "pt") as file:
            for name, key in pairs:
                part, value = file.get_slice(key), values[name]
                if list(part.get_shape()) != list(value.shape):
                    raise InputError(
                        f"{path} has {key} of shape {list(part.get_shape())}, and its model one of "
                        f"{list(value.shape)}: give a model with its own config.json"
                    )
                _read(value, part)


@torch.no_grad()
def _read(value: Tensor, part: Any) -> None:
    """Read this process's rows of one tensor."""
    own = own_part(value)
    if own is value:
        value.copy_(part[:] if value.ndim else part[...])
    elif len(own):
        own.copy_(part[rows_of(value)])


def rows_of(value: Any) -> slice:
    """The rows of a sharded tensor that this process has: each has as many, but for the last ones."""
    mesh = value.device_mesh
    step = -(-value.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * step, value.shape[0])
    return slice(start, min(start + step, value.shape[0]))


def _fill_buffers(model: Any, path: str | Path) -> None:
    """Compute the buffers that are not saved, as transformers does after loading: frequencies of a rope, say.

    Raises:
        InputError: a buffer is not computed, or not in the same way twice.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # which `_init_weights` leaves as they are
    unsaved = [name for name, _ in model.named_buffers() if not _is_saved(model, name)]
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in unsaved}
    found = [dict(_computed(model, modules, fill)) for fill in (0, 1)]
    for name in unsaved:
        if not torch.equal(found[0][name], found[1][name]):
            raise InputError(
                f"{path} has a buffer {name} that is not saved, and its model does not say how to compute "
                "it: load it whole, without --fsdp"
            )


@torch.no_grad()
def _computed(model: Any, modules: dict[str, Any], fill: int) -> Iterator[tuple[str, Tensor]]:
    """The buffers by name, from `fill` on."""
    for name, module in modules.items():
        module._buffers[name.rpartition(".")[2]].fill_(fill)
    for module in {*modules.values()}:
        model._init_weights(module)
    for name, module in modules.items():
        yield name, module._buffers[name.rpartition(".")[2]].clone()
