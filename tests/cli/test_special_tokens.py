"""Texts that begin with the tokenizer's first token already."""

import pytest
from tiny import DOCUMENTS, write_jsonl

import gradfn as gf


@pytest.fixture
def begun(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", [{**row, "text": f"<s>{row['text']}"} for row in DOCUMENTS])


def rows_of(run):
    with gf.open_store(run) as store:
        return store.read("rows/length").tolist(), store.read("rows/loss").tolist()


def test_a_first_token_that_comes_twice_is_said_and_left_out(ok, model, corpus, begun, tmp_path):
    plain = ok("build", tmp_path / "plain", "--model", model, "--dataset", corpus)
    assert "twice" not in plain
    said = ok("build", tmp_path / "twice", "--model", model, "--dataset", begun)
    assert "12 of the rows begin with <s> twice, once in their text: give --no-special-tokens" in " ".join(
        said.split()
    )
    said = ok("build", tmp_path / "once", "--model", model, "--dataset", begun, "--no-special-tokens")
    assert "twice" not in said
    assert rows_of(tmp_path / "once") == rows_of(tmp_path / "plain") != rows_of(tmp_path / "twice")


def test_queries_of_a_store_without_special_tokens(command, ok, model, begun, tmp_path):
    ok("build", tmp_path / "run", "--model", model, "--dataset", begun, "--no-special-tokens")
    ask = ("query", tmp_path / "run", "--query", "<s>The capital of Peru is", "--completion", " Lima")
    result = command(*ask)
    assert result.status == 2
    assert "tokenizer is" in result.err
    ok(*ask, "--no-special-tokens")
