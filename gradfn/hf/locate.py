"""Where models, tokenizers and processors are, and loading them with one-sentence errors.

A place is what `from_pretrained` needs: a path or a name on the hub, and options.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradfn.errors import InputError
from gradfn.hf.hub import hub_answers, is_hub_name, listing, local, quiet, refuse_revision, summary
from gradfn.watch import WATCH

Place = tuple[str, dict[str, Any]]
"""The first argument of `from_pretrained`, and further ones."""

ADAPTER = "adapter_config.json"
_POINTER = b"version https://git-lfs"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def locate_model(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Place:
    """Where a model is: a folder, a GGUF file, or a name on the hub, at a revision of it.

    Args:
        weights: whether a folder needs weights, or its config is enough.

    Raises:
        InputError: nothing is there, or a folder holds no model or more than one; a revision of a folder.
    """
    place = local(path)
    refuse_revision(place, revision)
    if place.is_file():
        return _gguf(place)
    if not place.is_dir():
        return _locate_hub("model", path, revision)
    _check_readable(place)
    if (place / ADAPTER).is_file():
        if own := [*place.glob("model*.safetensors"), *place.glob("pytorch_model*.bin")]:
            raise InputError(
                f"folder {path} holds an adapter and also the weights {own[0].name}, so it is ambiguous: "
                "move the adapter into a folder of its own"
            )
        locate_base(place / ADAPTER)
        return str(place), {}
    ggufs = sorted(place.glob("*.gguf"))
    enough = _WEIGHTS if weights else ("config.json", *_WEIGHTS)
    if any(next(place.glob(pattern), None) for pattern in enough):
        return str(place), {}
    if len(ggufs) == 1:
        return _gguf(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise InputError(f"folder {path} holds {len(ggufs)} .gguf files: give the path of one of {names}")
    raise InputError(
        f"folder {path} holds no model: expected config.json with weights in .safetensors, or one .gguf "
        f"file, but it holds {listing(place)}; give the folder that save_pretrained wrote"
    )


def _check_readable(folder: Path) -> None:
    """Refuse files that may not be read, or that stand for weights which were never fetched."""
    for file in (folder / "config.json", *(one for kind in _WEIGHTS for one in folder.glob(kind))):
        if file.exists() and not os.access(file, os.R_OK):
            raise InputError(f"{file} may not be read by this user: change its permissions")
        if file.exists() and file.stat().st_size < 1024:
            with file.open("rb") as start:
                if start.read(len(_POINTER)) == _POINTER:
                    raise InputError(
                        f"{file} is a pointer of Git LFS and not the file itself: fetch it with git lfs pull"
                    )
    for index in folder.glob("*.index.json"):
        parts: set[str] = set()
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if absent := sorted(part for part in parts if not (folder / part).exists()):
            raise InputError(
                f"{folder} lacks {absent[0]} ({len(absent)} of {len(parts)} files of weights that "
                f"{index.name} names): fetch the model again"
            )


def locate_tokenizer(path: str | Path, revision: str | None = None) -> Place:
    """Where the tokenizer of a model is; that of an adapter without one is its base's.

    Raises:
        InputError: nothing is there, or a folder holds no tokenizer.
    """
    place = local(path)
    refuse_revision(place, revision)
    folder = place.parent if place.is_file() else place
    if folder.is_dir() and any((folder / name).exists() for name in _TOKENIZER):
        return str(folder), {}
    if place.is_file() or next(folder.glob("*.gguf"), None):
        return locate_model(path)
    if (folder / ADAPTER).is_file() and (base := _base_of(folder / ADAPTER)):
        return locate_tokenizer(base)
    if folder.is_dir():
        raise InputError(
            f"folder {path} holds no tokenizer, only {listing(folder)}: "
            "save the model's tokenizer there with tokenizer.save_pretrained"
        )
    return _locate_hub("tokenizer", path, revision)


def has_no_tokenizer(path: str | Path) -> bool:
    """Whether a path is the folder of a model without a tokenizer."""
    place = local(path)
    if not place.is_dir() or (place / ADAPTER).is_file() or next(place.glob("*.gguf"), None):
        return False
    return not any((place / name).exists() for name in _TOKENIZER)


def locate_processor(path: str | Path, revision: str | None = None) -> Place:
    """Where the image processor of a model is; that of an adapter without one is its base's.

    Raises:
        InputError: nothing is there, or a folder holds no image processor.
    """
    place = local(path)
    if not place.exists():
        return _locate_hub("image processor", path, revision)
    if any((place / name).is_file() for name in _PROCESSOR):
        return str(place), {}
    if (place / ADAPTER).is_file() and (base := _base_of(place / ADAPTER)):
        return locate_processor(base)
    raise InputError(
        f"{path} holds no image processor ({_PROCESSOR[0]}), which makes pixels of images: save that of the "
        "model there with processor.save_pretrained"
    )


def locate_base(config: Path) -> Place:
    """Where the base of an adapter is.

    Raises:
        InputError: the adapter names no base, or it is not there.
    """
    from transformers import PreTrainedConfig

    base = _base_of(config)
    if base is None:
        raise InputError(f"{config} names no base_model_name_or_path: save the adapter again")
    try:
        source, options = locate_model(base)
        # Not AutoConfig, which asks on the terminal whether to run code that comes with the base.
        load_pretrained("model", base, PreTrainedConfig.get_config_dict, source, **options)
    except InputError as error:
        raise InputError(f"{config.parent} is an adapter whose base is missing: {error}") from error
    return source, options


def _base_of(config: Path) -> str | None:
    """The model that an adapter's config names as its base; None if it names none."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{config} is not JSON ({summary(error)}): save the adapter again") from error
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else settings
    if base is not None and not isinstance(base, str):
        raise InputError(
            f"{config} is no config of an adapter, whose base_model_name_or_path is a text: save it again"
        )
    if base and local(base).resolve() == config.parent.resolve():
        raise InputError(f"{config} names its own folder as its base: give base_model_name_or_path another")
    return base or None


def _gguf(file: Path) -> Place:
    if file.suffix.lower() != ".gguf":
        raise InputError(
            f"{file} is not a model: expected a .gguf file or the folder that save_pretrained wrote"
        )
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(
                f"{file} does not start like a GGUF file, so it may be cut or empty: fetch it again"
            )
    return str(file.parent), {"gguf_file": file.name}


def _locate_hub(noun: str, path: str | Path, revision: str | None) -> Place:
    name = str(path)
    if name.endswith(".gguf") or isinstance(path, Path) or not is_hub_name(name):
        raise InputError(f"no {noun} {name!r}: no file or folder here has this name; check the path")
    at = {} if revision is None else {"revision": revision}
    return name, at if hub_answers() else {**at, "local_files_only": True}


def load_pretrained(
    noun: str, path: str | Path, loader: Callable[..., Any], source: str, **options: Any
) -> Any:
    """Call `from_pretrained` or a similar function without its output, and make one sentence of its errors.

    Args:
        noun: what is loaded, for the message.
        path: where the user said it is, for the message.
        loader: the function.
        source, options: its arguments.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        with quiet(), WATCH.get()(f"loading the {noun} {path}"):
            return loader(source, **options)
    except ImportError as error:
        _refuse_kernel(error, path, options)
        extra = "pip install 'gradfn[gguf]'" if "gguf_file" in options else "install it"
        raise InputError(f"{path} needs a package that is not here ({summary(error)}): {extra}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever is raised here is about the file at `path`
        _refuse_kernel(error, path, options)
        if options.get("local_files_only"):
            raise InputError(
                f"no {noun} {str(path)!r}: no file or folder here has this name, it is not among the cached "
                "downloads, and the hub does not answer: give the path of a folder, or go online"
            ) from error
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{path} comes with code of its own: read it, then give trust_remote_code=True"
            ) from error
        raise InputError(f"the {noun} {str(path)!r} cannot be loaded ({summary(error)}): check it") from error


def _refuse_kernel(error: Exception, path: str | Path, options: dict[str, Any]) -> None:
    """Refuse a kernel of attention that the model or the machine lacks, if the error says so."""
    asked = options.get("attn_implementation")
    # transformers has no class of error for this, so it is recognised by its words.
    if asked is not None and any(sign in str(error) for sign in ("attention implementation", "Flash")):
        why = summary(error).split(". ")[0]
        raise InputError(
            f"{path} cannot have {asked} attention here ({why}): use another, or leave it out"
        ) from error
