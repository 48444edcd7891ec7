"""The task is that which a model was saved for, unless it is given."""

import json

import pytest
import torch
import transformers
from tiny import DOCUMENTS, make_model, make_tokenizer, save, write_jsonl

import gradfn as gf

SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip


@pytest.fixture(scope="module")
def labelled(folder):
    rows = [{**row, "label": number % 3} for number, row in enumerate(DOCUMENTS)]
    return write_jsonl(folder / "labelled.jsonl", rows)


@pytest.fixture(scope="module")
def bert(folder):
    """`bert(head, labels)` is the folder of a model with this head."""

    def make(head, labels=3):
        torch.manual_seed(0)
        config = transformers.BertConfig(**SIZES, num_labels=labels)
        return save(
            folder / f"{head}{labels}", getattr(transformers, f"Bert{head}")(config), make_tokenizer()
        )

    return make


@pytest.mark.parametrize(("head", "labels", "task"), [
    ("ForSequenceClassification", 3, "classification"),
    ("ForSequenceClassification", 1, "regression"),
    ("ForMaskedLM", 3, "masked_lm"),
])  # fmt: skip
def test_the_task_is_inferred_and_said(ok, bert, labelled, tmp_path, head, labels, task):
    model = bert(head, labels)
    asked = () if task == "masked_lm" else ("--label-column", "label")
    known = f"{task.replace('_', '-')}, which a Bert{head} is for"
    if task == "masked_lm":
        vocabulary = transformers.AutoTokenizer.from_pretrained(model)
        vocabulary.add_special_tokens({"mask_token": vocabulary.convert_ids_to_tokens(5)})
        vocabulary.save_pretrained(model)
    out = ok("build", tmp_path / "run", "--model", model, "--dataset", labelled, *asked)
    assert " ".join(out.splitlines()[0].split()) == f"task {known}"
    assert gf.open_store(tmp_path / "run").settings["loss"]["name"] == task
    said = ok("hessian", tmp_path / "h", "--model", model, "--dataset", labelled, *asked, "--task", task)
    assert "which a Bert" not in said
    assert type(gf.load_model(model)).__name__ == f"Bert{head}"


def test_a_model_that_says_nothing_is_asked_about(command, ok, bert, model, corpus, tmp_path):
    tasks = "so give --task, which may be causal_lm, masked_lm, seq2seq_lm, classification"
    refused = command("build", tmp_path / "run", "--model", bert("Model"), "--dataset", corpus)
    assert (refused.status, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert f"was saved as BertModel, {tasks}" in refused.err
    silent = save(tmp_path / "silent", make_model(), make_tokenizer())
    config = json.loads((silent / "config.json").read_text())
    (silent / "config.json").write_text(json.dumps({**config, "architectures": None}))
    refused = command("check", silent)
    assert f"names no architecture in its config, {tasks}" in refused.err
    ok("build", tmp_path / "run", "--model", silent, "--dataset", corpus, "--task", "causal-lm")


def test_another_head_is_refused_with_the_task_to_give(command, bert, model, labelled, tmp_path):
    for path, task, other in (
        (bert("ForSequenceClassification"), "causal_lm", "classification"),
        (model, "masked-lm", "causal_lm"),
    ):
        refused = command("build", tmp_path / "run", "--model", path, "--dataset", labelled, "--task", task)
        assert refused.status == 2
        assert refused.err.endswith(f" --task {other}\n"), refused.err


def test_the_task_of_an_adapter_is_its_own(ok, model, labelled, folder):
    peft = pytest.importorskip("peft")
    for kind, task in (("SEQ_CLS", "classification"), ("CAUSAL_LM", "causal-lm"), (None, "causal-lm")):
        where = folder / f"adapter {kind}"
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=kind)
        config.base_model_name_or_path = str(model)
        config.save_pretrained(str(where))
        assert gf.hf.models.infer_task(where) == task.replace("-", "_")
