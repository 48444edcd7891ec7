"""What a model is for, as the names of its architectures say."""

import pytest
import transformers
from transformers.models.auto import modeling_auto

import gradfn as gf
from gradfn.model.tasks import default_loss, task_of

ENCODED = {"is_encoder_decoder": True}
SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 1}  # fmt: skip


@pytest.mark.parametrize(("name", "config", "task"), [
    ("GPT2LMHeadModel", {}, "causal_lm"),
    ("LlamaForCausalLM", {}, "causal_lm"),
    ("PeftModelForCausalLM", {}, "causal_lm"),
    ("AutoModelForCausalLM", {}, "causal_lm"),
    ("Gemma3ForConditionalGeneration", {}, "causal_lm"),
    ("BertForMaskedLM", {}, "masked_lm"),
    ("T5ForConditionalGeneration", ENCODED, "seq2seq_lm"),
    ("T5WithLMHeadModel", ENCODED, "seq2seq_lm"),
    ("MarianMTModel", ENCODED, "seq2seq_lm"),
    ("BartForSequenceClassification", ENCODED, "classification"),
    ("BertForSequenceClassification", {}, "classification"),
    ("BertForSequenceClassification", {"id2label": {"0": "x"}}, "regression"),
    ("BertForSequenceClassification", {"num_labels": 1, "problem_type": "single_label_classification"},
     "classification"),
    ("BertForSequenceClassification", {"problem_type": "regression"}, "regression"),
    ("ViTForImageClassification", {}, "image_classification"),
    ("DeiTForImageClassificationWithTeacher", {}, "image_classification"),
    ("BertForTokenClassification", {}, None),
    ("XLMWithLMHeadModel", {}, None),
    ("BertModel", {}, None),
])  # fmt: skip
def test_tasks_by_name(name, config, task):
    assert task_of([name], config) == task


KNOWN = {
    "CAUSAL_LM": "causal_lm",
    "MASKED_LM": "masked_lm",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq_lm",
    "SEQUENCE_CLASSIFICATION": "classification",
    "IMAGE_CLASSIFICATION": "image_classification",
}


UNSAID = {"ReformerModelWithLMHead", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel"}
SEQ2SEQ_AND_MASKED = {"BartForConditionalGeneration", "MBartForConditionalGeneration",
                      "MvpForConditionalGeneration"}  # fmt: skip


@pytest.mark.parametrize("mapping", KNOWN)
def test_the_names_that_transformers_has(mapping):
    listed = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
    names = {name for some in listed for name in ([some] if isinstance(some, str) else some)}
    if mapping == "MASKED_LM":
        names -= SEQ2SEQ_AND_MASKED
    config = ENCODED if mapping.startswith("SEQ_TO") else {}
    assert {name for name in names if task_of([name], config) != KNOWN[mapping]} <= UNSAID


def test_the_loss_of_a_model_is_that_of_its_class():
    config = transformers.BertConfig(**SMALL, num_labels=3)
    assert default_loss(transformers.BertForSequenceClassification(config)).task == "classification"
    with pytest.raises(gf.InputError, match=r'give loss=gf.model_loss\(model, "masked_lm"\)'):
        gf.Subject(transformers.BertForMaskedLM(config))
