"""Every architecture of the installed transformers, made small, against a loop over unpadded rows.

    python benchmarks/architectures.py --results build/architectures.jsonl

Each model type with a causal, masked, encoder-decoder, text or image classification head is made small from
its own config, with random weights. The gradients of four rows of very different lengths are compared:

* `gather(engine, rows)`: the engine, with the rows in as few batches as it takes;
* a loop: a fresh copy of the model for each row, an unpadded forward pass by the model's own code, and
  `torch.autograd.grad`.

The error is `|engine - loop| / |loop|` of the worst row's whole gradient, in float64 where the model runs
in it, else in float32: of the default view, and of all parameters (`include=["*"]`). Coverage is the share
of the small model's parameters that the default view attributes.

Each model has a process of its own, with a limit of time and memory, so a crash is a line of the table.
Results are lines of JSON. Types that have one are run again only if named. docs/coverage.md gets the table.
"""

import argparse
import copy
import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

import gradfn as gf
from gradfn.engine import gather, probe_engine
from gradfn.engine.stream import pads
from gradfn.hf.models import MODEL_CLASSES
from gradfn.model.left_out import uncovered
from gradfn.model.sites import blocks_of

HEADS = {
    "causal_lm": ("CAUSAL_LM", "Next tokens"),
    "masked_lm": ("MASKED_LM", "Masked tokens"),
    "seq2seq_lm": ("SEQ_TO_SEQ_CAUSAL_LM", "Encoder-decoder"),
    "classification": ("SEQUENCE_CLASSIFICATION", "Classes of texts"),
    "image_classification": ("IMAGE_CLASSIFICATION", "Classes of images"),
}
VOCABULARY, PIXELS, CLASSES = 67, 32, 3
FIRST_WORD = 5
"""Smaller ids are special tokens."""
LENGTHS = (5, 24, 21, 9)
"""Of the rows: one is much shorter than the others, and most are longer than a window of attention."""
MEMORY = 12 << 30
PARAMETERS = 5_000_000
EQUAL = 1e-5
"""Up to here a row is the loop's. (Models that compute in float32 inside differ by 1e-7.)"""
COVERAGE = 0.6
"""A type of which less is attributed by default has a line of its own in the table."""
BEGIN, END = "<!-- architectures -->", "<!-- architectures end -->"

SIZES = (
    (r"n_group|num_expert_group|topk_group|.*shared_experts|first_k_dense_replace|.*_offset|n_groups"
     r"|mamba_n_groups|num_hidden_groups|num_groups", 1),
    (r".*vocab_size.*|encoder_hash_byte_group_vocab", VOCABULARY),
    (r".*(_|^)(key_value|kv|query)_(heads|groups)", 2),
    (r"mamba_(n|num)_heads|n_mamba_heads|.*linear_num_(value_)?heads", 8),
    (r"num_memory_blocks|.*(_|^)top_?k(_.*)?|moe_k|.*experts_per_tok(en)?|.*_(period|interval)|expand", 2),
    (r".*(_|^)experts|(.*_)?heads|n_head", 4),
    (r"(.*_)?(num_layers|n_layers?|layers|depth|num_blocks|num_self_attends_per_block)(_per_stack)?", 2),
    (r"qk_head_dim|global_head_dim", 16),
    (r".*(head_?dim|d_head|head_size|d_kv|dim_head|kv_channels|rotary_dim|_rank|d_state|state_size)", 8),
    (r".*(intermediate|ffn|feed_forward|inner|mlp|dim_ff|dff|d_ff).*", 48),
    (r"max_(2d_)?position_embeddings|.*(position_embeddings|positions|max_seq_len|n_ctx|context_length)", 64),
    (r".*(window|chunk)(_size|_len(gth)?)?|local_attention|.*_chunk_length|block_size", 8),
    (r"image_size|crop_size|input_size|(stem|base|stage|out)_(out_)?channels", PIXELS),
    (r"patch_size", 8),
    (r".*(hidden_size|hidden_dim|embed_dim|emb_dim|emb_size|embedding_size|embedding_dim|embedding_rank|proj_dim"
     r"|projection_dim|projection_size|output_size|output_dim|d_model|n_embd|bottleneck_size|d_latents"
     r"|linear_size|lru_width|mamba_d_ssm)|dim|ple_.*dim", 32),
    (r"num_latents|num_mel_bins|.*_channels?|prompt_length|entity.*", 16),
)  # fmt: skip
"""Names of a config's integers, and what they are at most; the first that matches decides."""
UNSET = {
    "head_dim": 8, "num_key_value_heads": 4, "vocab_size": VOCABULARY, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""What fields are that are None by default."""
LISTS = (
    (r"depths?|num_blocks|layers|num_block_repeats|block_repeats|layer_repeat|.*num_layers.*", 1),
    (r"hidden_sizes|.*channels|embed_dims?|hidden_dims?|encoder_hidden_sizes|decoder_hidden_sizes", 32),
    (r"num_heads|num_attention_heads", 2),
    (r"image_size|input_size", PIXELS),
    (r"intermediate_size", 48),
)
"""The same for each integer of a list."""
TYPES: dict[str, dict[str, Any]] = {
    "cvt": {"depth": [1, 2, 3]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "donut-swin": {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "efficientnet": {"width_coefficient": 0.05, "hidden_dim": 64},
    "esmc": {"vocab_size": VOCABULARY},
    "funnel": {"block_sizes": [1, 1]},
    "gemma3n_text": {
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": 48,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "levit": {"patch_size": 16, "image_size": 64},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mistral4": {"head_dim": 16},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilevitv2": {"width_multiplier": 0.25, "image_size": 64},
    "perceiver": {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "num_blocks": 1},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "swin": {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"]},
}
"""What the rules do not say of a type."""


# The small model.


def _limited(name: str, value: Any) -> Any:
    """The value of a config's field in a small model."""
    if isinstance(value, bool):
        return value
    if re.fullmatch(r".*token_(id|index)|(pad|bos|eos)_.*_?id", name):
        special = next((i for i, part in enumerate(("pad", "bos", "eos")) if name.startswith(part)), 3)
        return special if value is not None or special == 0 else None
    if isinstance(value, int):
        return min([value, *[most for names, most in SIZES if re.fullmatch(names, name)][:1]])
    if isinstance(value, list | tuple) and value and all(type(part) is int for part in value):
        most = next((most for names, most in LISTS if re.fullmatch(names, name)), None)
        return value if most is None else type(value)(min(part, most) for part in value)
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": [2, 1, 1]}
    return value


def small(config: Any) -> dict[str, Any]:
    """The fields of a config that are other ones in a small model of its type, nested configs too."""
    own, changed = vars(config), {}
    for name, value in own.items():
        if hasattr(value, "model_type"):
            changed[name] = small(value) | ({"model_type": value.model_type} if value.model_type else {})
        elif not name.startswith("_") and (limited := _limited(name, value)) != value:
            changed[name] = limited
    changed |= {name: value for name, value in UNSET.items() if name in own and own[name] is None}
    if own.get("num_key_value_heads") == own.get("num_attention_heads") is not None:
        changed["num_key_value_heads"] = changed.get("num_attention_heads")
    kinds = {str(kind) for key in ("layer_types", "layers_block_type") for kind in own.get(key) or ()}
    if len(kinds) > 1 and "num_hidden_layers" in changed:
        changed["num_hidden_layers"] = 4  # often each fourth layer is of another kind
    return changed | TYPES.get(config.model_type, {})


def make_config(kind: str, head: str) -> Any:
    """The config of a small model of a type."""
    default = configuration_auto.CONFIG_MAPPING[kind]()
    config = type(default)(**small(default))
    for part in (config, getattr(config, "text_config", None) or config):
        part.pad_token_id = 0
        part.is_decoder = head == "causal_lm" or getattr(part, "is_decoder", False)
    config.num_labels, config.architectures = CLASSES, []
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config


def make_model(kind: str, head: str) -> nn.Module:
    """A small model of a type with random weights, in float32.

    Raises:
        ValueError: it has too many parameters.
    """
    make = partial(getattr(modeling_auto, MODEL_CLASSES[head]).from_config, make_config(kind, head))
    torch.manual_seed(0)
    count = 0
    with suppress(Exception), torch.device("meta"):  # some constructors read numbers
        count = sum(p.numel() for p in make().parameters())
    if count > PARAMETERS:
        raise ValueError(f"still {count:,} parameters")
    model, generator = make().eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, model.parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            noise *= 0.25 if noise.ndim > 1 else 0.1
            parameter.copy_(parameter.nan_to_num().clamp(-3, 3) + noise)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products of experts have no float64
    return model


# The rows and the loop.


def make_rows(model: Any, head: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Four rows: texts of mixed lengths, or images."""
    generator = torch.Generator().manual_seed(1)
    config, rows = model.config, []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator)
        masked, mask = torch.arange(length) % 3 == 1, torch.ones(length, dtype=torch.long)
        label = torch.tensor(number % CLASSES)
        if head == "causal_lm":
            rows.append({"input_ids": ids, "labels": ids})
        elif head == "masked_lm":
            labels = ids.where(masked, torch.tensor(gf.data.IGNORED))
            rows.append({"input_ids": ids.masked_fill(masked, 4), "attention_mask": mask, "labels": labels})
        elif head == "seq2seq_lm":
            rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.flip(0)[: length // 2 + 1]})
        elif head == "classification":
            ids[-1] = 2  # an encoder-decoder classifies at the end token
            rows.append({"input_ids": ids, "attention_mask": mask, "labels": label})
        else:
            size = getattr(config, "image_size", None) or PIXELS
            size = size if isinstance(size, list | tuple) else (size, size)
            shape = (getattr(config, "num_channels", 3), *size)
            pixels = torch.randn(shape, generator=generator, dtype=dtype)
            rows.append({"pixel_values": pixels, "labels": label})
    return rows


def loop_loss(model: Any, head: str, row: dict[str, Tensor]) -> Tensor:
    """The loss of one row, by the model's own forward pass of this row alone."""
    inputs: dict[str, Any] = {key: value[None] for key, value in row.items()}
    labels = row["labels"]
    if head != "seq2seq_lm":
        del inputs["labels"]
    if head in ("causal_lm", "seq2seq_lm"):
        inputs["use_cache"] = False
    logits = model(**inputs).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head == "causal_lm":
        logits, labels = logits[:-1], labels[1:]
    return F.cross_entropy(logits, labels)


def loop(model: nn.Module, head: str, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of each row, `{parameter: [rows, *parameter]}`, each by a fresh copy of the model."""
    grads = []
    for row in rows:
        own = copy.deepcopy(model)
        for module in own.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # torch is wrong for one transposed row
                module.register_forward_hook(lambda _, x, y: y.register_hook(Tensor.contiguous) and None)
        parameters = [p.requires_grad_() for p in own.parameters() if p.is_floating_point()]
        loss = loop_loss(own, head, row)
        grads.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    return {
        name: torch.stack(parts).detach() for name, parts in zip(names, zip(*grads, strict=True), strict=True)
    }


# One model.


@dataclass
class Result:
    """What came of one model type under one head.

    Args:
        status: "run", "not made", "no loop" (the model itself fails), "refused" (by gradfn) or "failed".
        words: why, where it is not "run".
        dtype: of the model.
        error, error_all: the worst row's relative error, by default and of all parameters.
        coverage, unprobed: the share of the parameters attributed by default, and of these without probe.
        together: whether rows of unequal lengths share a batch.
        all_words: why all parameters could not be compared.
    """

    kind: str
    head: str
    status: str = "not made"
    words: str = ""
    dtype: str = ""
    error: float | None = None
    error_all: float | None = None
    coverage: float = 0.0
    unprobed: float = 0.0
    together: bool = True
    all_words: str = ""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def make_loss(model: nn.Module, head: str) -> Any:
    """gradfn's loss of the head."""
    return gf.causal_lm_loss(model) if head == "causal_lm" else gf.model_loss(model, head)


def _gradients(made: nn.Module, head: str) -> tuple[nn.Module, Any, Any]:
    """The model in the first precision that it runs in, its rows, and their gradients by the loop."""
    try:
        model = copy.deepcopy(made).double()
        rows = make_rows(model, head, torch.float64)
        want = loop(model, head, rows)
    except Exception:
        model, rows = made, make_rows(made, head, torch.float32)
        want = loop(model, head, rows)
    if not all(bool(value.isfinite().all()) for value in want.values()):
        raise ValueError("gradients that are not finite")
    return model, rows, want


def _error(engine: Any, rows: Any, want: Any) -> float:
    """The worst row's relative error; a row next to nothing is measured by a millionth of the largest."""
    got, blocks = gather(engine, rows).values, blocks_of(engine.sites, want)
    a, b = (torch.cat([part[n].double().flatten(1) for n in blocks], 1) for part in (got, blocks))
    sizes = b.norm(dim=1)
    return float(((a - b).norm(dim=1) / sizes.clamp_min(1e-6 * float(sizes.max()))).max())


def _compare(result: Result, model: nn.Module, rows: Any, want: Any) -> None:
    loss, sizes = make_loss(model, result.head), {name: p.numel() for name, p in model.named_parameters()}
    engine = probe_engine(model, loss)
    result.error = _error(engine, rows, want)
    result.coverage = 1 - sum(uncovered(model, engine.sites).values()) / sum(sizes.values())
    unprobed = {name for site in engine.sites if not site.probed for name in site.names}
    result.unprobed = sum(sizes[name] for name in unprobed) / sum(sizes.values())
    result.together = pads(engine, rows)
    try:
        result.error_all = _error(probe_engine(model, loss, view=gf.View(include=["*"])), rows, want)
    except Exception as error:
        result.all_words = _said(error)


def measure(kind: str, head: str) -> Result:
    """Compare the engine with the loop for one model type."""
    result = Result(kind, head)
    try:
        made = make_model(kind, head)
        result.status = "no loop"
        make_loss(made, head)
        model, rows, want = _gradients(made, head)
        result.dtype = str(next(iter(want.values())).dtype).removeprefix("torch.")
        result.status = "failed"
        _compare(result, model, rows, want)
        result.status = "run"
    except gf.errors.InputError as error:
        result.status, result.words = "refused", str(error)
    except Exception as error:
        result.words = _said(error)
    return result


# The sweep.


def _child(kind: str, head: str, back: Connection) -> None:
    """Measure in this process, silently."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    warnings.simplefilter("ignore")
    back.send(asdict(measure(kind, head)))


def isolated(kind: str, head: str, limit: float) -> Result:
    """`measure` in a process of its own; its death, or no answer within `limit` seconds, is the result."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, head, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            return Result(**ours.recv())
        return Result(kind, head, "failed", f"no answer within {limit:.0f} s")
    except EOFError:
        process.join()
        code = process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return Result(kind, head, "failed", f"the process died of {name}")
    finally:
        process.kill()
        process.join()


def candidates(heads: Sequence[str], kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The types of every head that transformers has, in alphabetical order."""
    for head in heads:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{HEADS[head][0]}_MAPPING_NAMES")
        yield from ((kind, head) for kind in sorted(mapping) if not kinds or kind in kinds)


def read(path: Path) -> dict[tuple[str, str], Result]:
    """The results of a file; of two for one model the last."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(r.kind, r.head): r for r in (Result(**json.loads(line)) for line in lines)}


def sweep(path: Path, heads: Sequence[str], kinds: Sequence[str], limit: float) -> None:
    """Measure what is not in the file yet, and the types that are named."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read(path)
    todo = [pair for pair in candidates(heads, kinds) if kinds or pair not in known]
    measure("llama", "causal_lm")  # imports once what the processes of all models need
    with path.open("a", encoding="utf-8") as file:
        for number, (kind, head) in enumerate(todo, 1):
            result = isolated(kind, head, limit)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            said = f"{result.status} {line(result)} {result.words}"
            print(f"{number}/{len(todo)} {head} {kind}: {said}", flush=True)


def notes(result: Result) -> str:
    """What is special in how a type was compared."""
    found = [result.dtype] * (result.dtype != "float64") + ["batches of one length"] * (not result.together)
    return _escaped("; ".join(found + [result.all_words] * bool(result.all_words)))


def line(result: Result) -> str:
    """A line of the table."""
    errors = ("" if error is None else f"{error:.0e}" for error in (result.error, result.error_all))
    return f"| {result.kind} | {' | '.join(errors)} | {result.coverage:.0%} | {notes(result)} |"


WHY = {"not made": "cannot be made small", "no loop": "does not run on these rows", "failed": "**fails**"}


def _escaped(words: str) -> str:
    return re.sub(r"[<>|*_\[\]`]", lambda found: f"\\{found[0]}", words)


def table(results: Sequence[Result]) -> str:
    """The part of docs/coverage.md that is written by this script."""
    errors = [result.error or 0.0 for result in results if result.status == "run"]
    parts = [
        f"Measured on {datetime.date.today()}, one thread of a CPU ({platform.machine()}), Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.\n"
        f"Of {sum(1 for _ in candidates(list(HEADS), ()))} pairs of type and head that transformers has, "
        f"{len(results)} were tried and {len(errors)} compared.\n{sum(e <= EQUAL for e in errors)} of these "
        f"are equal to the loop to {EQUAL:.0e} in every row; the largest error is {max(errors):.0e}.\n"
    ]
    for head, (_, title) in HEADS.items():
        if not (own := sorted((r for r in results if r.head == head), key=lambda r: r.kind)):
            continue
        made = [r for r in own if r.status == "run"]
        special = [r for r in made if notes(r) or r.coverage < COVERAGE or (r.error or 0.0) > EQUAL]
        names = ", ".join(r.kind for r in made if r not in special)
        parts += [f"### {title}: {len(made)} of {len(own)} types\n"]
        parts += [textwrap.fill(f"{names}.", 118, break_on_hyphens=False), ""]
        if special:
            parts += ["| type | error | of all parameters | coverage | |", "|---|---|---|---|---|"]
            parts += [*map(line, special), ""]
        others = (r for r in own if r.status != "run")
        parts += [*(f"- {r.kind} {WHY.get(r.status, r.status)}: {_escaped(r.words)}" for r in others), ""]
    return "\n".join(parts)


def write(page: Path, results: Sequence[Result]) -> None:
    """Write the table between its two marks on the page."""
    before, _, after = re.split(f"{BEGIN}|{END}", page.read_text(encoding="utf-8"))
    page.write_text(f"{before}{BEGIN}\n\n{table(results)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Run the sweep and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("build/architectures.jsonl"))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--types", nargs="+", default=(), help="only these, again")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a model")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "coverage.md")
    given = parser.parse_args()
    sweep(given.results, given.heads, given.types, given.limit)
    if not given.types:
        write(given.page, list(read(given.results).values()))


if __name__ == "__main__":
    sys.exit(main())
