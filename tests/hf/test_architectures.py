"""The models of docs/coverage.md: each row of the first table, and the sweep of the others."""

import os
import signal
import sys
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import transformers as hf

from gradfn.data import collate
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import collect
from gradfn.model.losses import causal_lm_loss, model_loss
from gradfn.model.params import call
from gradfn.model.sites import View
from gradfn.testing import assert_blocks_close, naive_blocks, naive_causal_lm_loss
from gradfn.testing.strategies import randomize
from gradfn.transforms import chain, project, unit_normalize

EVERYTHING = View(include=["*"])
SIZES = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 16, "pad_token_id": 0}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 4}
MIXTURE = GROUPED | {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Model:
    """How to make a tiny model, its task, the parameters that go through `vmap(grad)`, and its own precision.

    (Gemma's norms compute in float32, whatever the model's dtype.)
    """

    make: object
    task: str = "causal_lm"
    unprobed: tuple = ()
    tolerance: float = 1e-8


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=2, n_head=4))


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=17, d_model=8, d_kv=2, d_ff=6, num_layers=2, num_heads=4, decoder_start_token_id=0,
            pad_token_id=0, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def vit():
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            image_size=8, patch_size=4, hidden_size=8, intermediate_size=6, num_hidden_layers=2,
            num_attention_heads=2, num_labels=3,
        )
    )  # fmt: skip


def resnet():
    return hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )


MODELS = {
    "GPT-2": Model(gpt2),
    "GPT-NeoX": Model(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES))),
    "Llama": Model(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))),
    "Llama, tied": Model(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True))),
    "Qwen2": Model(lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED))),
    "Qwen3": Model(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GEMMA))),
    "Gemma": Model(lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GEMMA)), tolerance=1e-5),
    "Gemma 3": Model(
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA, sliding_window=4)), tolerance=1e-5
    ),
    "Phi": Model(lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES))),
    "Phi-3": Model(lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED))),
    "Mixtral": Model(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTURE, num_local_experts=3)),
        unprobed=("mlp.gate.weight",),
    ),
    "Qwen3-MoE": Model(
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(**MIXTURE, head_dim=4, moe_intermediate_size=6, num_experts=3)
        ),
        unprobed=("mlp.gate.weight",),
    ),
    "BERT, masked tokens": Model(lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)), "masked_lm"),
    "BERT, classes": Model(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3)), "classification"
    ),
    "BERT, regression": Model(
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=1)), "regression"
    ),
    "T5": Model(t5, "seq2seq_lm", unprobed=("relative_attention_bias",)),
    "ViT": Model(vit, "image", unprobed=("cls_token", "position_embeddings")),
    "ResNet": Model(resnet, "image"),
}


def examples(task):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (5, 3, 4):
        ids = torch.randint(2, 17, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.long)
        label = torch.randint(0, 3, (), generator=generator)
        match task:
            case "causal_lm":
                rows.append({"input_ids": ids, "labels": ids})
            case "masked_lm":
                masked = torch.arange(length) % 2 == 0
                rows.append({"input_ids": ids.masked_fill(masked, 1), "attention_mask": mask,
                             "labels": ids.masked_fill(~masked, -100)})  # fmt: skip
            case "seq2seq_lm":
                rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.flip(0)[:-1]})
            case "classification":
                rows.append({"input_ids": ids, "attention_mask": mask, "labels": label})
            case "regression":
                rows.append({"input_ids": ids, "attention_mask": mask, "labels": label.double() / 2})
            case "image":
                pixels = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
                rows.append({"pixel_values": pixels, "labels": label})
    return rows


def loss_of(model, task):
    if task == "causal_lm":
        return causal_lm_loss(model)
    return model_loss(model, "classification" if task == "image" else task)


def plain_loss(model, task):
    """The same loss as HF computes it, one example at a time (of next tokens it does so in float32 only)."""
    if task == "causal_lm":
        return naive_causal_lm_loss(model)

    def loss(params, example):
        return call(model, params, **{key: value[None] for key, value in example.items()}).loss

    return loss


def make(case):
    """The model in float64, its experts one after the other, which is the only way in float64."""
    torch.manual_seed(0)
    model = randomize(case.make(), 0, scale=0.3)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


@pytest.mark.filterwarnings("ignore:.*(vmap|performance drop).*")
@pytest.mark.parametrize("name", MODELS)
def test_all_parameters_of_the_model_equal_the_naive_loop(name):
    case = MODELS[name]
    model, rows = make(case), examples(case.task)
    want = naive_blocks(plain_loss(model, case.task), model, rows, EVERYTHING)
    loss = loss_of(model, case.task)
    for transform in (chain(), chain(project(2), unit_normalize())):
        engine = probe_engine(model, loss, transform, view=EVERYTHING)
        got = engine(collate(rows))
        assert_blocks_close(got.values, transform(want), case.tolerance)
        unprobed = {site.path for site in engine.sites if not site.probed}
        assert all(path.endswith(case.unprobed) for path in unprobed), unprobed
        assert all(any(path.endswith(end) for path in unprobed) for end in case.unprobed)


@pytest.mark.filterwarnings("ignore:.*(vmap|performance drop).*")
@pytest.mark.parametrize("name", MODELS)
def test_the_layers_taken_by_default_do_not_depend_on_the_batch(name):
    case = MODELS[name]
    model, rows = make(case), examples(case.task)
    loss = loss_of(model, case.task)
    together = collect(model, rows, project(2), loss=loss)
    alone = [collect(model, [row], project(2), loss=loss) for row in rows]
    assert together
    assert_blocks_close(together, {k: torch.cat([part[k] for part in alone]) for k in together}, 1e-8)


@pytest.fixture(scope="module")
def architectures():
    """The script that measures all architectures of transformers."""
    path = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
    spec = spec_from_file_location("architectures", path)
    sys.modules["architectures"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["architectures"]


SWEPT = [
    ("falcon_h1", "causal_lm"), ("gpt_oss", "causal_lm"), ("jetmoe", "causal_lm"), ("mamba", "causal_lm"),
    ("opt", "causal_lm"), ("qwen3_next", "causal_lm"), ("deberta-v2", "masked_lm"), ("fnet", "masked_lm"),
    ("bart", "seq2seq_lm"), ("switch_transformers", "seq2seq_lm"), ("xlnet", "classification"),
    ("convnext", "image_classification"),
]  # fmt: skip
"""Of many kinds; benchmarks/architectures.py measures all types."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "head"), SWEPT)
def test_a_small_model_of_the_sweep_equals_the_loop(kind, head, architectures):
    result = architectures.measure(kind, head)
    assert (result.status, result.words, result.all_words) == ("run", "", "")
    assert max(result.error, result.error_all) < architectures.EQUAL


def test_a_model_that_kills_its_process_is_a_line_of_the_table(architectures, monkeypatch):
    monkeypatch.setattr(architectures, "measure", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    found = architectures.isolated("gpt2", "causal_lm", 60)
    assert (found.status, found.words) == ("failed", "the process died of SIGKILL")


def test_a_model_that_hangs_is_a_line_of_the_table(architectures, monkeypatch):
    monkeypatch.setattr(architectures, "measure", lambda *_: signal.pause())
    found = architectures.isolated("gpt2", "causal_lm", 0.1)
    assert (found.status, found.words) == ("failed", "no answer within 0 s")
