"""Models, their tokenizers and image processors, from a folder, a GGUF file or the hub."""

import hashlib
import json
from collections.abc import Callable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradfn.errors import InputError
from gradfn.hf.hub import hub_answers, is_hub_name, listing, quiet, summary
from gradfn.model.fingerprint import ORIGINAL, is_replaced

__all__ = [
    "check_device",
    "context_length",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "processor_fingerprint",
    "tokenizer_fingerprint",
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Kernels by the names that transformers gives them."""

MODEL_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "regression": "AutoModelForSequenceClassification",
}

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ADAPTER = "adapter_config.json"

_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_model(
    path: str | Path,
    task: str = "causal_lm",
    *,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A model in evaluation mode with all parameters frozen; a causal language model unless told otherwise.

    Args:
        path: a folder, a .gguf file, a folder with one .gguf file and no other weights, or a hub name.
        task: what its head is for: "causal_lm", "masked_lm", "seq2seq_lm", "classification" or "regression"
            (of sequences, both), or "image_classification".
        precision: "fp32", "bf16", "fp16" or "fp64"; quantised GGUF weights are expanded to it, other
            quantised weights stay what they are.
        device: where the parameters shall be.
        attention: "sdpa", "eager", "flash_attention_2" or "flash_attention_3" (on CUDA, in half precision),
            the kernel of attention; None is the one that transformers takes.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        InputError: there is no such model, it lacks weights, or it cannot be loaded as asked.

    >>> load_model("no/such/model")
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: no model 'no/such/model': no file or folder here has this name; check the path
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    if task not in MODEL_CLASSES:
        raise InputError(f"no task {task!r}: choose {', '.join(MODEL_CLASSES)}")
    check_device(device)
    _check_attention(attention, precision, torch.device(device))
    source, options = locate_model(path)
    adapter, local = _adapter_of(path, source, options), options
    base, options = (source, options) if adapter is None else _locate_base(adapter)
    options |= {"trust_remote_code": trust_remote_code, "dtype": PRECISIONS[precision]}
    options |= {} if attention is None else {"attn_implementation": attention}
    if options.get("local_files_only"):  # where peft is installed, transformers asks for adapters by itself
        options["adapter_kwargs"] = {"local_files_only": True}
    loader = _model_class(task).from_pretrained
    model, info = _load("model", path, loader, base, output_loading_info=True, **options)
    _refuse_other_attention(model, path, attention)
    if "gguf_file" in options:
        _forget_quantization(model)
    missing = set(info["missing_keys"])
    if adapter is not None:
        missing = _add_adapter(model, path, source, missing, PRECISIONS[precision], local)
    if missing:
        raise InputError(
            f"{path} lacks weights of {type(model).__name__}, {min(missing)} first of {len(missing)}, which "
            f"would be random numbers: give a model that was saved with its head for {task}"
        )
    if getattr(model, "is_quantized", False):
        _cast_unquantised(model, PRECISIONS[precision])
    if precision == "fp64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products of experts know no float64
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(
    path: str | Path, *, trust_remote_code: bool = False, vocabulary: int | None = None
) -> Any:
    """The tokenizer of a model: from its folder, from inside its GGUF file, or from the hub.

    Args:
        path: as for `load_model`.
        trust_remote_code: run Python code that comes with the tokenizer.
        vocabulary: how many tokens the model has, to take `number_tokenizer` for a folder without a
            tokenizer; None refuses it.

    Raises:
        InputError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if vocabulary is not None and _has_no_tokenizer(path):
        return number_tokenizer(vocabulary)
    source, options = _locate_tokenizer(path)
    options["trust_remote_code"] = trust_remote_code
    tokenizer = _load("tokenizer", path, AutoTokenizer.from_pretrained, source, **options)
    if len(tokenizer) == 0:
        raise InputError(
            f"the tokenizer of {path} has no tokens: save it there with tokenizer.save_pretrained"
        )
    return tokenizer


NUMBERS = "numbers"
"""The name of a tokenizer that writes tokens as their numbers."""


def number_tokenizer(vocabulary: int) -> Any:
    """A tokenizer for models that have none, of music or molecules, say: tokens are written as their numbers.

    Raises:
        InputError: when called, for a word that is not the number of a token.

    >>> number_tokenizer(100)("60 64 67")["input_ids"], number_tokenizer(100).decode([60, 64])
    ([60, 64, 67], '60 64')
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {str(token): token for token in range(vocabulary)}

    class Numbers(PreTrainedTokenizerFast):
        def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
            both = (side for side in (text, options.get("text_target")) if side is not None)
            texts = [one for side in both for one in ([side] if isinstance(side, str) else side)]
            for word in (word for one in texts for word in one.split()):
                if word not in known:
                    raise InputError(
                        f"{word!r} is not among the {vocabulary:,} tokens of the model, which has no "
                        "tokenizer: write texts as numbers of tokens, '12 7 30', say, or save its tokenizer "
                        "beside it"
                    )
            return super().__call__(text, *args, **options)

    words = Tokenizer(models.WordLevel(known))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return Numbers(tokenizer_object=words, name_or_path=NUMBERS)


def probe_word(tokenizer: Any) -> str:
    """A word that a tokenizer knows, to see what it adds to one; its alphabet may be that of proteins."""
    if writes_numbers(tokenizer):
        return "0"
    tokens = (token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids)
    words = chain("a", map(tokenizer.decode, tokens))
    return next((word for word in words if tokenizer(word, add_special_tokens=False)["input_ids"]), "a")


def writes_numbers(tokenizer: Any) -> bool:
    """Whether it is `number_tokenizer`'s."""
    return getattr(tokenizer, "name_or_path", None) == NUMBERS


def _has_no_tokenizer(path: str | Path) -> bool:
    """Whether a path is the folder of a model in which no tokenizer lies."""
    place = Path(path).expanduser()
    if not place.is_dir() or (place / _ADAPTER).is_file() or next(place.glob("*.gguf"), None):
        return False
    return not any((place / name).exists() for name in _TOKENIZER)


def load_processor(path: str | Path) -> Any:
    """The image processor of a model, which makes pixels of images with Pillow, on every machine alike.

    Args:
        path: as for `load_model`.

    Raises:
        InputError: Pillow is not here, or there is no image processor, or it cannot be loaded.
    """
    if find_spec("PIL") is None:
        raise InputError("images are read with Pillow, which is not here: pip install 'gradfn[images]'")
    from transformers import AutoImageProcessor

    source, options = _locate_processor(path)
    loader = AutoImageProcessor.from_pretrained
    return _load("image processor", path, loader, source, backend="pil", **options)


def _locate_processor(path: str | Path) -> tuple[str, dict[str, Any]]:
    place = Path(path).expanduser()
    if not place.exists():
        return _locate_hub("image processor", path)
    if any((place / name).is_file() for name in _PROCESSOR):
        return str(place), {}
    if (place / _ADAPTER).is_file() and (base := _base_of(place / _ADAPTER)):
        return _locate_processor(base)
    raise InputError(
        f"{path} holds no image processor ({_PROCESSOR[0]}), which makes pixels of images: save the model's "
        "there with processor.save_pretrained"
    )


def processor_fingerprint(processor: Any) -> str:
    """16 hex digits of all that decides which pixels an image becomes."""
    settings = [type(processor).__name__, processor.to_dict()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        settings: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer("a b").input_ids]
    else:
        settings = json.loads(backend.to_str())
        # Calls change the first two, and the last says only how tokens become text.
        settings.update(truncation=None, padding=None, decoder=None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model was made to see at once, or None if it does not say.

    >>> context_length(nn.Linear(1, 1)) is None
    True
    """
    modules: Any = model.named_modules()
    for name, module in modules:
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:  # RoBERTa counts from behind it
            return len(module.weight) - padding - 1
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def _model_class(task: str) -> Any:
    import transformers

    return getattr(transformers, MODEL_CLASSES[task])


def check_device(device: str | torch.device) -> None:
    """Refuse a device that is not here.

    >>> check_device("cpu")
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used here ({summary(error)}): try --device cpu"
        ) from error


def _check_attention(attention: str | None, precision: str, device: torch.device) -> None:
    """Refuse a kernel that is unknown, or that cannot run on this device in this precision."""
    if attention is None:
        return
    if attention not in ATTENTION:
        raise InputError(f"unknown attention {attention!r}: use one of {', '.join(ATTENTION)}")
    if "flash" in attention and (device.type != "cuda" or precision not in ("bf16", "fp16")):
        raise InputError(
            f"{attention} runs on CUDA in bf16 or fp16, not on {device} in {precision}: use sdpa or eager "
            "attention"
        )


def _refuse_other_attention(model: Any, path: str | Path, attention: str | None) -> None:
    """Refuse a model that was given another kernel than the one asked for."""
    given = getattr(model.config, "_attn_implementation", None)
    if attention is not None and given != attention:
        raise InputError(f"{path} has no {attention} attention, only {given}: use that, or leave it out")


def locate_model(path: str | Path) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` needs to find a model: a place and options."""
    place = Path(path).expanduser()
    if place.is_file():
        return _gguf(place)
    if not place.is_dir():
        return _locate_hub("model", path)
    if (place / _ADAPTER).is_file():
        if own := [*place.glob("model*.safetensors"), *place.glob("pytorch_model*.bin")]:
            raise InputError(
                f"folder {path} holds an adapter and the weights {own[0].name}, and either could be meant: "
                "move the adapter into a folder of its own"
            )
        _locate_base(place / _ADAPTER)
        return str(place), {}
    ggufs = sorted(place.glob("*.gguf"))
    if any(next(place.glob(pattern), None) for pattern in _WEIGHTS):
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


def _locate_tokenizer(path: str | Path) -> tuple[str, dict[str, Any]]:
    place = Path(path).expanduser()
    folder = place.parent if place.is_file() else place
    if folder.is_dir() and any((folder / name).exists() for name in _TOKENIZER):
        return str(folder), {}
    if place.is_file() or next(folder.glob("*.gguf"), None):
        return locate_model(path)
    if (folder / _ADAPTER).is_file() and (base := _base_of(folder / _ADAPTER)):
        return _locate_tokenizer(base)
    if folder.is_dir():
        raise InputError(
            f"folder {path} holds no tokenizer, only {listing(folder)}: "
            "save the model's tokenizer there with tokenizer.save_pretrained"
        )
    return _locate_hub("tokenizer", path)


def _adapter_of(path: str | Path, source: str, options: dict[str, Any]) -> Path | None:
    """The config of the adapter that lies where a model was located; None if it is a whole model."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if "gguf_file" in options:
        return None
    found = _load("model", path, find_adapter_config_file, source, **options)
    return None if found is None else Path(found)


def _base_of(config: Path) -> str | None:
    """The model that an adapter's config names as its base; None if it names none."""
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise InputError(f"{config} is no JSON ({summary(error)}): save the adapter again") from error


def _locate_base(config: Path) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` needs to find an adapter's base, which is looked for here."""
    from transformers import AutoConfig

    base = _base_of(config)
    if base is None:
        raise InputError(f"{config} names no base_model_name_or_path: save the adapter again")
    try:
        source, options = locate_model(base)
        _load("model", base, AutoConfig.from_pretrained, source, **options)
    except InputError as error:
        raise InputError(f"{config.parent} is an adapter, whose base is missing: {error}") from error
    return source, options


def _add_adapter(
    model: Any, path: str | Path, source: str, missing: set[str], dtype: torch.dtype, local: dict[str, Any]
) -> set[str]:
    """Put an adapter into its base; returns the weights that neither of the two has."""
    options = {"dtype": dtype, "hf_quantizer": getattr(model, "hf_quantizer", None), "adapter_kwargs": local}
    info = _load("adapter", path, model.load_adapter, source, **options)
    copied = {name.replace(f".{ORIGINAL}.", ".") for name in model.state_dict() if is_replaced(model, name)}
    return (missing - copied) | set(info.missing_keys)


def _gguf(file: Path) -> tuple[str, dict[str, Any]]:
    if file.suffix.lower() != ".gguf":
        raise InputError(
            f"{file} is no model: expected a .gguf file or the folder that save_pretrained wrote"
        )
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InputError(
                f"{file} does not start as a GGUF file does: it may be cut or empty; fetch it again"
            )
    return str(file.parent), {"gguf_file": file.name}


def _locate_hub(noun: str, path: str | Path) -> tuple[str, dict[str, Any]]:
    name = str(path)
    if name.endswith(".gguf") or isinstance(path, Path) or not is_hub_name(name):
        raise InputError(f"no {noun} {name!r}: no file or folder here has this name; check the path")
    return name, {} if hub_answers() else {"local_files_only": True}


def _load(noun: str, path: str | Path, loader: Callable[..., Any], source: str, **options: Any) -> Any:
    """Call `from_pretrained` or its like, in silence, and turn its failures into one sentence."""
    try:
        with quiet():
            return loader(source, **options)
    except ImportError as error:
        _refuse_kernel(error, path, options)
        extra = "pip install 'gradfn[gguf]'" if "gguf_file" in options else "install it"
        raise InputError(f"{path} needs a package that is not here ({summary(error)}): {extra}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever is raised here is about what lies at `path`
        _refuse_kernel(error, path, options)
        if options.get("local_files_only"):
            raise InputError(
                f"no {noun} {str(path)!r}: no file or folder here has this name, it is not among the cached "
                "downloads, and the hub does not answer; give the path of a folder, or go online"
            ) from error
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{path} comes with code of its own: read it, then allow trust_remote_code"
            ) from error
        raise InputError(f"the {noun} {str(path)!r} cannot be loaded ({summary(error)}): check it") from error


def _refuse_kernel(error: Exception, path: str | Path, options: dict[str, Any]) -> None:
    """Refuse a kernel of attention that the model or machine lacks, if that is what the error is about."""
    asked = options.get("attn_implementation")
    # The words of transformers, which has no error of its own for this.
    if asked is not None and any(sign in str(error) for sign in ("attention implementation", "Flash")):
        why = summary(error).split(". ")[0]
        raise InputError(
            f"{path} cannot have {asked} attention here ({why}): use another, or leave it out"
        ) from error


def _forget_quantization(model: Any) -> None:
    # The weights are plain numbers now; these marks of their past would keep the model from being saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None


def _cast_unquantised(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters that are not quantised the dtype asked for, as transformers does of other models."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
