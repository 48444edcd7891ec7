"""Models from a folder, a GGUF file or the hub."""

import json
import logging
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradfn.errors import InputError
from gradfn.hf.hub import summary
from gradfn.hf.locate import Place, load_pretrained, locate_base, locate_model
from gradfn.hf.quantised import multiply_exactly
from gradfn.model.fingerprint import ORIGINAL, is_replaced
from gradfn.model.params import seeded_model
from gradfn.model.spread import own_part
from gradfn.model.tasks import task_of

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


_PADDED = ("classification", "regression", "seq2seq_lm")
"""Tasks whose models look for a padding token."""
_HEAD = re.compile(
    r"For((?:Sequence|Token|Image)Classification|QuestionAnswering|MultipleChoice|MaskedLM|CausalLM)$"
)
"""Names of heads that do not stand for each other."""
_ADAPTED = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_CLS": "ForSequenceClassification",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
}
"""Names of heads by what adapters call their tasks."""
_HEADS = re.compile(r"(score|classifier|classification_head|qa_outputs)\.")
_SPARE = re.compile(r"pooler|inv_freq|position_ids|masked_bias|att(n|ention)\.bias$")
"""Weights of a body that a head may do without, and buffers that older versions saved."""


def load_model(
    path: str | Path,
    task: str | None = None,
    *,
    revision: str | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A model in evaluation mode with all parameters frozen.

    Args:
        path: a folder, a .gguf file, a folder with one .gguf file and no other weights, or a hub name.
        task: what its head is for: "causal_lm", "masked_lm", "seq2seq_lm", "classification" or "regression"
            (of sequences, both), or "image_classification". None is what the model was saved for.
        revision: the branch, tag or commit of a model on the hub.
        precision: "fp32", "bf16", "fp16" or "fp64"; quantised GGUF weights are expanded to it, other
            quantised weights stay quantised (those of bitsandbytes multiply as the numbers that they stand
            for, see `gradfn.hf.quantised`).
        device: where to put the parameters.
        attention: the kernel of attention: "sdpa", "eager", "flash_attention_2" or "flash_attention_3" (on
            CUDA, in half precision); None is the default of transformers.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        InputError: there is no such model, it lacks weights, or it cannot be loaded like this.

    >>> load_model("no/such/model")
    Traceback (most recent call last):
    ...
    gradfn.errors.InputError: no model 'no/such/model': no file or folder here has this name; check the path
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    if task is None:
        task = infer_task(path, revision)
    if task not in MODEL_CLASSES:
        raise InputError(f"no task {task!r}: choose {', '.join(MODEL_CLASSES)}")
    check_device(device)
    check_attention(attention, precision, torch.device(device))
    source, options = locate_model(path, revision)
    adapter, place = adapter_of(path, source, options), (source, options)
    base, options = place if adapter is None else locate_base(adapter)
    if adapter is not None:
        _check_adapter(path, adapter.parent)
    options |= {"trust_remote_code": trust_remote_code, "dtype": PRECISIONS[precision]}
    options |= {} if attention is None else {"attn_implementation": attention}
    if options.get("local_files_only"):  # if peft is installed, transformers looks for adapters
        options["adapter_kwargs"] = {"local_files_only": True}
    model, info = _load_base(path, task, revision, base, options)
    given = getattr(model.config, "_attn_implementation", None)
    if attention is not None and given != attention:
        raise InputError(f"{path} has no {attention} attention, only {given}: use that, or leave it out")
    if "gguf_file" in options:
        _forget_quantization(model)
    missing = set(info["missing_keys"])
    if adapter is not None:
        missing = _add_adapter(model, path, place, missing, PRECISIONS[precision])
    check_weights(model, path, task, missing)
    if adapter is None or task.endswith("_lm"):  # an adapter may bring the head of a classifier
        check_saved_for(model, path, task, info["unexpected_keys"])
    if getattr(model, "is_quantized", False):
        _cast_unquantised(model, PRECISIONS[precision])
    if precision == "fp64" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products of experts have no float64
    return multiply_exactly(model.to(device).eval().requires_grad_(False))


def _load_base(
    path: str | Path, task: str, revision: str | None, base: str, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model without an adapter, and what was missing; masks alone say what is padding in it.

    A padding token that is none of the model's tokens becomes -1, which equals none. For no padding token at
    all, transformers would refuse batches, and of some models any row.
    """
    try:
        model, info = _load_with_head(path, task, revision, base, options)
    except InputError as error:
        if "Padding_idx must be within" not in str(error):
            raise
        model, info = _load_with_head(path, task, revision, base, {**options, "pad_token_id": None})
    _leave_padding_to_masks(model, task)
    return model, info


def _leave_padding_to_masks(model: Any, task: str) -> None:
    """Give a model whose padding token is none of its tokens -1 for it."""
    for config in (model.config, model.config.get_text_config()) if task in _PADDED else ():
        size, pad = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
        if size and (pad is None or not 0 <= pad < size):
            config.pad_token_id = -1
    for module in model.modules():
        if getattr(module, "padding_idx", 0) is None and not isinstance(module, nn.Embedding):
            module.padding_idx = -1  # by which RoBERTa numbers positions


def infer_task(path: str | Path, revision: str | None = None, *, weights: bool = True) -> str:
    """The task that a model was saved for, by the names of its architectures; of an adapter by its own task.

    Args:
        path, revision: see `load_model`.
        weights: see `locate_model`.

    Raises:
        InputError: there is no such model, or its config does not say.
    """
    from transformers import PreTrainedConfig

    source, options = locate_model(path, revision, weights=weights)
    if "gguf_file" in options:
        return "causal_lm"
    own = []
    if (adapter := adapter_of(path, source, options)) is not None:
        own = [_ADAPTED.get(str(json.loads(adapter.read_text(encoding="utf-8")).get("task_type")), "")]
        source, options = locate_base(adapter)
    # Not AutoConfig, which asks on the terminal whether to run code that comes with a model.
    config, _ = load_pretrained("model", path, PreTrainedConfig.get_config_dict, source, **options)
    if not config:
        raise InputError(f"the model {str(path)!r} has no config.json, which says what it is: put it there")
    names = [*(config.get("architectures") or ()), *(config.get("auto_map") or ())]
    if (task := task_of([*own, *names], config)) is None:
        said = f"was saved as {names[0]}" if names else "names no architecture in its config"
        raise InputError(f"{path} {said}, so give `task`, which may be {', '.join(MODEL_CLASSES)}")
    return task


def _load_with_head(
    path: str | Path, task: str, revision: str | None, base: str, options: dict[str, Any]
) -> tuple[Any, Any]:
    """A model with the head for a task, and what loading tells of it."""
    import transformers

    loader = getattr(transformers, MODEL_CLASSES[task]).from_pretrained
    try:
        return load_pretrained("model", path, loader, base, output_loading_info=True, **options)
    except InputError as error:
        if (
            "Unrecognized configuration class" not in str(error)
            or (own := infer_task(path, revision)) == task
        ):
            raise
        raise InputError(f"models such as {path} have no head for {task}: give `task={own}`") from error


def check_weights(model: nn.Module, path: str | Path, task: str, missing: set[str]) -> None:
    """Refuse a model with weights that are no numbers, or that it was saved without."""
    wrong = [name for name, p in model.named_parameters() if not bool(own_part(p).isfinite().all())]
    if wrong:
        raise InputError(
            f"{path} has weights that are NaN or infinite, in {wrong[0]} ({len(wrong)} in all), from a "
            "training that diverged or a precision too low for them: give another checkpoint, or precision"
        )
    if missing:
        raise InputError(
            f"{path} lacks weights of {type(model).__name__}, such as {min(missing)} ({len(missing)} in "
            f"all), which would be random numbers: give a model that was saved with its head for {task}"
            f"{_saved_task(model, task)}"
        )


def check_saved_for(model: Any, path: str | Path, task: str, unexpected: Iterable[str]) -> None:
    """Refuse a model that was saved with another head, or with layers that its config does not have.

    A head that is tied to the embedding is never missing, whatever the weights are of.
    """
    saved = model.config.architectures or []
    here = _HEAD.search(re.sub(r"LMHeadModel$", "ForCausalLM", type(model).__name__))
    heads = [found[1] for found in map(_HEAD.search, saved) if found]
    if here is not None and heads and here[1] not in heads:
        raise InputError(
            f"{path} was saved as {saved[0]}, not as a {type(model).__name__} for {task}: give a model that "
            f"was saved with this head{_saved_task(model, task) or ', or another task'}"
        )
    body = f"{model.base_model_prefix}."
    foreign = sorted(
        key for key in unexpected if _HEADS.match(key) or (key.startswith(body) and not _SPARE.search(key))
    )
    if foreign:
        raise InputError(
            f"{path} has weights that {type(model).__name__} has no place for, such as {foreign[0]} "
            f"({len(foreign)} in all): give a model that was saved for {task}, with its own config.json"
        )


def _saved_task(model: Any, task: str) -> str:
    """What to give instead, where the config of a model says what it was saved for."""
    saved = task_of(model.config.architectures or [], model.config.to_dict())
    return "" if saved in (None, task) else f", or `task={saved}`"


def context_length(model: nn.Module) -> int | None:
    """The most tokens that the model can read at once, or None if it does not say.

    >>> context_length(nn.Linear(1, 1)) is None
    True
    """
    modules: Any = model.named_modules()
    for name, module in modules:
        padding = getattr(module, "padding_idx", None)
        if (
            name.endswith("position_embeddings") and padding is not None
        ):  # RoBERTa numbers positions from behind it
            return len(module.weight) - padding - 1
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if hasattr(config, "relative_attention_num_buckets"):  # T5 records a length that limits nothing
        return None
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def check_device(device: str | torch.device) -> None:
    """Refuse a device that this machine does not have.

    >>> check_device("cpu")
    """
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("its tensors hold no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {str(device)!r} cannot be used here ({summary(error)}): use device='cpu'"
        ) from error


def check_attention(attention: str | None, precision: str, device: torch.device) -> None:
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


def adapter_of(path: str | Path, source: str, options: dict[str, Any]) -> Path | None:
    """The config of the adapter at the place of a model; None if a whole model is there."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if "gguf_file" in options:
        return None
    found = load_pretrained("model", path, find_adapter_config_file, source, **options)
    return None if found is None else Path(found)


def _adapter_config(folder: str) -> tuple[Any, Any]:
    """The config of an adapter, and PEFT's class for adapters of its kind."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    config: Any = PeftConfig.from_pretrained(folder)
    return config, PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)


def _check_adapter(path: str | Path, folder: Path) -> None:
    """Refuse an adapter that is not made of weights in the layers of its base."""
    config, tuner = load_pretrained("adapter", path, _adapter_config, str(folder))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
        raise InputError(
            f"{path} is an adapter of the kind {kind}, which adds tokens to a text and no weights to layers, "
            "so there is nothing to attribute: give its base, or an adapter such as LoRA"
        )
    if getattr(tuner, "uses_shared_state", tuner is None):
        raise InputError(
            f"{path} is an adapter of the kind {kind}, whose layers share weights that lie outside of them: "
            "merge it into its base, with merge_and_unload() of PEFT, and give what save_pretrained wrote"
        )


def _add_adapter(
    model: Any, path: str | Path, place: Place, missing: set[str], dtype: torch.dtype
) -> set[str]:
    """Put an adapter into its base; returns the weights that neither of the two has."""
    quantizer = getattr(model, "hf_quantizer", None)
    options = {"dtype": dtype, "hf_quantizer": quantizer, "adapter_kwargs": place[1]}
    info = load_pretrained("adapter", path, model.load_adapter, place[0], **options)
    # AdaLoRA never saves its rank, which it has from the config.
    lost = {name for name in info.missing_keys if ".ranknum." not in name}
    if lost:  # transformers does not know all weights that adapters have, such as DoRA's magnitudes
        fill = partial(_fill_adapter, model, lost)
        lost &= load_pretrained("adapter", path, fill, place[0], **place[1])
    copied = {name.replace(f".{ORIGINAL}.", ".") for name in model.state_dict() if is_replaced(model, name)}
    return (missing - copied) | lost


def _fill_adapter(model: Any, lost: set[str], source: str, **hub: Any) -> set[str]:
    """Load the weights of an adapter as PEFT does; returns what it has none of, of what seems lost."""
    from peft import set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    weights = load_peft_weights(source, device="cpu", **hub)
    plain = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    try:
        return set(set_peft_model_state_dict(model, plain).missing_keys)
    except KeyError:  # a weight of a module that was saved whole
        return lost


def _forget_quantization(model: Any) -> None:
    """Remove the marks of quantised weights, which are plain numbers now: the model could not be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None


def _cast_unquantised(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters that are not quantised the dtype asked for, as transformers does with other models."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def new_model(
    path: str | Path,
    task: str,
    *,
    seed: int = 0,
    revision: str | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """A model with random weights, a function of the seed, in evaluation mode with all parameters frozen.

    Args:
        path: a folder with a config.json, or whatever `load_model` takes.
        seed: of the weights.
        task, revision, precision, device, attention, trust_remote_code: see `load_model`.

    Raises:
        InputError: there is no such config, or no model can be made of it like this.
    """
    import transformers

    check_device(device)
    check_attention(attention, precision, torch.device(device))
    source, hub = locate_model(path, revision, weights=False)
    hub["trust_remote_code"] = trust_remote_code
    config = load_pretrained("model", path, transformers.AutoConfig.from_pretrained, source, **hub)
    how: dict[str, Any] = {"dtype": PRECISIONS[precision], "trust_remote_code": trust_remote_code}
    how |= {} if attention is None else {"attn_implementation": attention}
    make = getattr(transformers, MODEL_CLASSES[task]).from_config
    model = seeded_model(lambda: load_pretrained("model", path, lambda _: make(config, **how), source), seed)
    _leave_padding_to_masks(model, task)
    return model.to(device).eval().requires_grad_(False)


def blank_model(path: str | Path, task: str, *, revision: str | None = None) -> nn.Module:
    """A model without the numbers of its weights, which takes no memory: what its config says, and shapes.

    Args:
        path, task, revision: see `new_model`.

    Raises:
        InputError: there is no such config, or no model can be made of it, without code of its own.
    """
    import transformers

    source, hub = locate_model(path, revision, weights=False)
    if (adapter := adapter_of(path, source, hub)) is not None:
        source, hub = locate_base(adapter)
    hub["trust_remote_code"] = False
    config = load_pretrained("model", path, transformers.AutoConfig.from_pretrained, source, **hub)
    make = getattr(transformers, MODEL_CLASSES[task]).from_config
    with torch.device("meta"):
        return load_pretrained("model", path, lambda _: make(config), source)


def fresh(model: nn.Module) -> nn.Module:
    """A model of the same architecture, dtype and device with new random weights, in evaluation mode."""
    config: Any = model.config
    like, make = next(model.parameters()), type(model)
    return make(config).to(like.device, like.dtype).eval()  # pyright: ignore[reportCallIssue]


class _Once(logging.Filter):
    """Lets a message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        new = record.getMessage() not in self.known
        self.known.add(record.getMessage())
        return new


def say_once(logger: str) -> None:
    """Let each message of a library through once, of one that says the same at every product."""
    found = logging.getLogger(logger)
    if not any(isinstance(known, _Once) for known in found.filters):
        found.addFilter(_Once())
