"""Models that do not go together, columns that are not there, and empty values are refused."""

import pytest
import torch
from tiny import DOCUMENTS, QUERIES, make_model, make_tokenizer, save, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

import gradfn as gf
from gradfn.cli.commands import ScoreRequest
from gradfn.cli.inputs import at_checkpoint, load_subject
from gradfn.cli.request import make
from gradfn.errors import InputError


def wide(seed=0, **sizes):
    torch.manual_seed(seed)
    plain = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**plain, **sizes}))


@pytest.mark.parametrize(("made", "words"), [
    (lambda: (make_model("neox"), make_tokenizer()), "is a GPTNeoXForCausalLM"),
    (lambda: (wide(intermediate_size=32), make_tokenizer()), "differs in model.layers.0.mlp.down_proj"),
    (lambda: (wide(num_hidden_layers=3), make_tokenizer()), "differs in model.layers.2."),
    (lambda: (wide(), make_tokenizer(words=["zebra zoo"] * 9)), "has a tokenizer of another vocabulary"),
])  # fmt: skip
def test_checkpoints_of_another_model(command, model, corpus, tmp_path, made, words):
    other = save(tmp_path / "other", *made())
    result = command("score", tmp_path / "run", "--model", model, "--dataset", corpus, "--query",
                     "Peru is far", "--checkpoints", f"{model},{model},{other}")  # fmt: skip
    assert (result.status, result.out) == (2, "")
    assert not (tmp_path / "run").exists()
    assert words in result.err
    assert "give checkpoints of the training of one model" in result.err


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of PEFT itself
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_a_base_and_an_adapter_of_it_are_checkpoints_of_one_training(more, model, tmp_path):
    peft = pytest.importorskip("peft")
    base = gf.load_model(model)
    base.name_or_path = str(model)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], **more)).save_pretrained(
        tmp_path
    )
    request = make(ScoreRequest, {"model": str(model), "task": "causal_lm", "include": ["*o_proj"]})
    loaded = load_subject(request)
    assert at_checkpoint(loaded, str(tmp_path), request.model).path == str(tmp_path)


@pytest.mark.parametrize(
    "rows", [DOCUMENTS, [{"input_ids": [1, 2, 3]}], [{"prompt": "a", "completion": "b"}]]
)
def test_a_text_column_that_is_not_there(command, model, corpus, tmp_path, rows):
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    result = command("build", tmp_path / "run", "--model", model, "--dataset", data, "--text-column", "typo")
    assert result.status == 2
    assert "no column 'typo' in the dataset" in result.err


def test_the_text_column_of_the_rows_is_none_of_the_queries(ok, model, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [{"body": row["text"]} for row in DOCUMENTS])
    asked = write_jsonl(tmp_path / "q.jsonl", QUERIES)
    ok("score", "--model", model, "--dataset", data, "--query", asked, "--text-column", "body")


def test_queries_of_a_store_without_the_text_column(command, store, queries):
    result = command("query", store, "--query", queries, "--text-column", "typo")
    assert result.status == 2
    assert "no column 'typo' in the dataset" in result.err


@pytest.mark.parametrize(
    "name", ["reward_column", "method", "dataset", "model", "csv", "hessian_path", "include"]
)
def test_empty_values_of_options(name):
    value = [""] if name == "include" else ""
    with pytest.raises(
        InputError, match=rf"--{name.replace('_', '-')} is empty: give a value, or leave it out"
    ):
        make(ScoreRequest, {name: value})
