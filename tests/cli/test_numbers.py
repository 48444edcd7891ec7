"""A model of music has tokens and no tokenizer: rows are tokens, and texts are their numbers."""

import pytest
import torch
from tiny import write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

from gradfn.errors import InputError
from gradfn.hf import number_tokenizer

TUNES = [[60, 64, 67, 72], [62, 65, 69, 74], [60, 63, 67, 72, 67], [55, 59, 62, 67]] * 3


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """A model of 128 notes, and a dozen tunes."""
    folder = tmp_path_factory.mktemp("music")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    write_jsonl(
        folder / "tunes.jsonl", [{"input_ids": tune, "id": f"tune-{i}"} for i, tune in enumerate(TUNES)]
    )
    write_jsonl(folder / "texts.jsonl", [{"text": " ".join(map(str, tune))} for tune in TUNES])
    return folder


def test_rows_of_tokens_and_a_query_of_numbers(ok, music, tmp_path):
    result = ok("score", "--model", music / "model", "--dataset", music / "tunes.jsonl", "--query", "60 64",
                "--completion", " 67", "--projection-dim", 4)  # fmt: skip
    assert "the model has no tokenizer: tokens are written as their numbers" in " ".join(result.split())
    assert "62 65 69 74" in result
    shown = {}
    for name in ("tunes", "texts"):
        path = tmp_path / f"{name}.jsonl"
        ok("score", "--model", music / "model", "--dataset", music / f"{name}.jsonl", "--query", "60 64 67",
           "--projection-dim", 4, "--jsonl", path)  # fmt: skip
        shown[name] = [row.split('"score":')[1].split(",")[0] for row in path.read_text().splitlines()]
    assert shown["tunes"] == shown["texts"]


def test_a_store_of_tokens_is_asked_with_numbers(ok, music, tmp_path):
    ok("build", tmp_path / "run", "--model", music / "model", "--dataset", music / "tunes.jsonl",
       "--projection-dim", 4)  # fmt: skip
    assert "60 64 67 72" in ok("query", tmp_path / "run", "--query", "60 64 67", "--unit-normalize")


@pytest.mark.parametrize("text", ["do re mi", "60 64 500"])
def test_what_is_no_token_is_refused(command, music, text):
    result = command("score", "--model", music / "model", "--dataset", music / "tunes.jsonl", "--query", text)
    assert result.status == 2
    words = " ".join(result.err.split())
    assert "is not the number of one of the 128 tokens" in words


def test_a_reference_without_a_tokenizer_has_the_same_numbers(ok, music):
    result = ok("score", "--model", music / "model", "--dataset", music / "tunes.jsonl", "--loss", "kl",
                "--reference", music / "model", "--query", "60 64 67", "--query-loss", "cross_entropy",
                "--projection-dim", 4)  # fmt: skip
    assert "60 64 67 72" in result  # equal models: all scores are 0, and rows stand in order


def test_targets_are_numbers_too():
    tokenizer = number_tokenizer(10)
    assert tokenizer(text_target=["1 2"])["input_ids"] == [[1, 2]]
    with pytest.raises(InputError, match="'11' is not the number of one of the 10 tokens of the model"):
        tokenizer(text_target=["1 11"])
