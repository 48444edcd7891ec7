"""--chunk-length, --tokenizer, --revision."""

import pytest
from tiny import DOCUMENTS, make_model, make_tokenizer, save, write_jsonl

import gradfn as gf


@pytest.fixture(scope="module")
def long(folder):
    rows = [{"id": "a", "text": "one two three " * 9}, {"id": "b", "text": "one"}]
    return write_jsonl(folder / "long.jsonl", rows)


def test_chunks_are_rows(ok, model, long, tmp_path):
    ok("build", tmp_path / "run", "--model", model, "--dataset", long, "--chunk-length", 8)
    store, tokenizer = gf.open_store(tmp_path / "run"), gf.load_tokenizer(model)
    tokens = gf.tokenize(gf.load_rows(long), tokenizer)
    ids = list(store.read("rows/id"))
    assert ids[:2] == ["a:0", "a:1"]
    assert ids[-1] == "b"
    assert len(ids) == -(-tokens.lengths[0] // 8) + 1
    first = gf.hf.chunked(tokens, 8, tokenizer).select([1])
    expected = gf.collect(gf.load_model(model), first, gf.project(16))
    for block, value in expected.items():
        assert store.read(f"gradients/{block}")[1] == pytest.approx(value[0].numpy(), abs=1e-5)
    out = ok("score", "--model", model, "--dataset", long, "--chunk-length", 8, "--query", long)
    assert "query a " in out  # queries stay whole
    assert "a:1" in out


@pytest.mark.parametrize(("asked", "words"), [
    (("--prompt-column", "prompt", "--completion-column", "completion"), "--prompt-column is of whole rows"),
    (("--truncation",), "--truncation is of whole rows: leave one of them out"),
    (("--task", "seq2seq-lm"), "seq2seq_lm is of whole rows: leave it out"),
    (("--chunk-length", 1), "--chunk-length must be 2 tokens or more, not 1"),
    (("--chunk-length", 999), "chunks of 999 tokens are longer than the model's context of"),
])  # fmt: skip
def test_what_is_not_cut_into_chunks(command, model, corpus, tmp_path, asked, words):
    ask = ("build", tmp_path / "run", "--model", model, "--dataset", corpus, "--chunk-length", 8)
    refused = command(*ask, *asked)
    assert refused.status == 2
    assert words in refused.err


def test_columns_that_are_found_are_not_cut_either(command, model, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in DOCUMENTS]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    refused = command("build", tmp_path / "run", "--model", model, "--dataset", pairs, "--chunk-length", 8)
    assert "are not cut into chunks: leave out --chunk-length, or give a --text-column" in refused.err


@pytest.mark.parametrize("given", ["prompt", "completion"])
def test_half_a_row_says_what_to_do(command, store, model, corpus, given):
    other = {"prompt": "completion", "completion": "prompt"}[given]
    for words in (("score", "--model", model, "--dataset", corpus), ("query", store)):
        refused = command(*words, "--query", corpus, f"--{given}-column", given)
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert f"give --{other}-column too" in refused.err
        assert f"or --text-column {given} to" in refused.err


def test_another_tokenizer(command, ok, folder, model, corpus, tmp_path):
    other = save(folder / "other", make_model(), make_tokenizer(words=["zebra zoo capital"] * 9))
    ask = ("--dataset", corpus, "--projection-dim", 4)
    ok("build", tmp_path / "run", "--model", model, *ask, "--tokenizer", other)
    made = gf.open_store(tmp_path / "run").settings["tokenizer"]
    assert made["path"] == str(other)
    assert made["fingerprint"] == gf.hf.tokenizer_fingerprint(gf.load_tokenizer(other))
    ok("query", tmp_path / "run", "--query", "The capital of Peru is")  # with the tokenizer that is recorded
    refused = command("query", tmp_path / "run", "--query", "Peru is", "--tokenizer", model)
    assert refused.status == 2
    assert "tokenizer is" in refused.err
    bare = folder / "bare"
    make_model().save_pretrained(bare)
    ok("check", bare, "--tokenizer", model)
    ok("build", tmp_path / "words", "--model", bare, *ask, "--tokenizer", model)
    refused = command("build", tmp_path / "x", "--model", model, *ask, "--tokenizer", bare)
    assert "holds no tokenizer" in refused.err


def test_a_local_place_has_no_revisions(command, model, corpus, tmp_path):
    ask = ("build", tmp_path / "run", "--model", model, "--dataset", corpus)
    for name, place in (("--revision", model), ("--dataset-revision", corpus)):
        refused = command(*ask, name, "v2")
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert f"{place} lies on this machine and has no revisions" in refused.err
