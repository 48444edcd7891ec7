"""Scores by module, head and token: shares sum to the score, and stores give what is made on the fly."""

import json
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from tiny import mostly_slow

import gradfn as gf

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")


@pytest.fixture(scope="module")
def base(model, corpus):
    return ("--model", model, "--dataset", corpus, "--precision", "fp64")


@pytest.fixture(scope="module")
def loaded(model, corpus):
    """The model in float64, the documents and the query."""
    tokens = gf.load_tokenizer(model)
    documents = gf.tokenize(gf.load_rows(corpus), tokens)
    return gf.load_model(model, precision="fp64"), documents, gf.text_query(tokens, ASK[1], ASK[3])


def scores_in(run):
    with h5py.File(run / "scores.h5") as file:
        shares = {}
        if "scores_by" in file:
            file["scores_by"].visititems(
                lambda name, item: (
                    shares.update({name: item[:, 0]}) if isinstance(item, h5py.Dataset) else None
                )
            )
        return file["scores"][:, 0], shares


def table_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gradients(loaded, which, view=None):
    net, documents, query = loaded
    return gf.collect(net, query if which == "query" else documents, view=view)


def unit(blocks):
    norms = sum(value.flatten(1).square().sum(1) for value in blocks.values()).sqrt()
    return {name: value / norms[:, None, None] for name, value in blocks.items()}


@pytest.mark.parametrize("method", ["grad-dot", "grad-cosine"])
@pytest.mark.parametrize("by", ["module", "head"])
def test_shares_are_the_dot_products_of_blocks(ok, base, loaded, tmp_path, by, method):
    ok("score", tmp_path / "run", *base, *ASK, "--by", by, "--method", method, "--projection-dim", 0)
    scores, shares = scores_in(tmp_path / "run")
    view = gf.View(heads=by == "head")
    rows, query = gradients(loaded, "rows", view), gradients(loaded, "query", view)
    if method == "grad-cosine":
        rows, query = unit(rows), unit(query)
    assert shares.keys() == rows.keys()
    assert any("[1]" in name for name in shares) == (by == "head")
    for name, share in shares.items():
        expected = torch.einsum("bij,qij->bq", rows[name], query[name])
        np.testing.assert_allclose(share, expected.numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sum(shares.values()), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by", ["module", "head"])
def test_by_changes_no_score(ok, base, tmp_path, by):
    ok("score", tmp_path / "a", *base, *ASK, "--projection-dim", 0)
    ok("score", tmp_path / "b", *base, *ASK, "--projection-dim", 0, "--by", by)
    np.testing.assert_allclose(scores_in(tmp_path / "a")[0], scores_in(tmp_path / "b")[0], rtol=1e-5)


@pytest.mark.parametrize("unit", [(), ("--unit-normalize",)])
@pytest.mark.parametrize("by", mostly_slow(["module", "head", "token"], "head"))
def test_a_store_queried_is_the_score_on_the_fly(ok, base, tmp_path, by, unit):
    stored = "example" if by == "module" else by
    table = ("--top", 300, "--jsonl")
    ok("build", tmp_path / "store", *base, "--by", stored)
    ok("query", tmp_path / "store", *ASK, *unit, "--by", by, *table, tmp_path / "stored.jsonl")
    ok("score", *base, *ASK, *unit, "--by", by, *table, tmp_path / "live.jsonl")
    ok("score", tmp_path / "run", *base, *ASK, *unit, "--by", by, *table, tmp_path / "kept.jsonl")
    value, name = ("score", "row") if by == "token" else ("share", "module")
    tables = [
        {(line["row"], line[name]): line for line in table_of(tmp_path / f"{source}.jsonl")}
        for source in ("stored", "live", "kept")
    ]
    assert len(tables[0]) > 12
    # A token at the end of a document has no loss behind it: its score is a rounding error, or none.
    keys = [key for key, line in tables[1].items() if abs(line[value]) > 1e-9]
    assert len(keys) > 12
    for other in (tables[0], tables[2]):
        for key in keys:
            assert other[key][value] == pytest.approx(tables[1][key][value], rel=1e-4, abs=1e-7)
            assert other[key]["score"] == pytest.approx(tables[1][key]["score"], rel=1e-4, abs=1e-7)
            assert other[key]["text"] == tables[1][key]["text"]
            assert other[key]["id"] == tables[1][key]["id"]


def test_query_takes_the_view_of_the_store(ok, base, tmp_path):
    for by, words in (("head", r"q_proj\[1\]"), ("token", r"doc-peru:\d")):
        ok("build", tmp_path / by, *base, "--by", by)
        assert re.search(words, ok("query", tmp_path / by, *ASK, "--top", 8))
    out = ok("query", tmp_path / "head", *ASK, "--by", "example", "--top", 8)
    assert "q_proj" not in out


def test_tokens_sum_to_the_document_and_are_where_they_are_said_to_be(ok, base, loaded, tmp_path):
    ok("score", tmp_path / "run", *base, *ASK, "--by", "token", "--projection-dim", 0)
    net, documents, query = loaded
    expected = gf.score(net, documents, query, method=gf.grad_dot()).matrix.numpy()
    with gf.open_store(tmp_path / "run", "scores") as store:
        scores, owners = store.read("scores")[:, 0], store.read("rows/document")
        offsets = store.index_array("tokens/offsets")
        assert store.index_array("documents/id").tolist() == documents.ids
        assert store.read("rows/token").tolist() == documents.input_ids.tolist()
        positions = store.read("rows/position")
        assert "scores_by" not in str(store.names())
    assert offsets.tolist() == documents.offsets.tolist()
    assert positions.tolist() == [t for length in documents.lengths for t in range(length)]
    sums = np.zeros((12, 1))
    np.add.at(sums, owners, scores.astype(np.float64))
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-5)
    by_token = gf.collect(net, documents, view=gf.View(tokens=True))
    asked = gf.collect(net, query)
    by_hand = sum(torch.einsum("bij,qij->bq", by_token[name], asked[name]) for name in asked)
    np.testing.assert_allclose(scores, by_hand.numpy(), rtol=1e-4, atol=1e-6)


def test_the_table_of_tokens_marks_them(ok, base, loaded, model, tmp_path):
    files = [tmp_path / f"t.{kind}" for kind in ("csv", "jsonl", "parquet")]
    exports = ("--csv", files[0], "--jsonl", files[1], "--parquet", files[2])
    out = ok("score", *base, *ASK, "--by", "token", *exports)
    documents, tokenizer = loaded[1], gf.load_tokenizer(model)
    lines = table_of(files[1])
    for line in lines:
        at = int(documents.offsets[line["document"]]) + line["position"]
        assert line["row"] == at
        assert line["id"] == documents.ids[line["document"]]
        left, token, right = re.fullmatch("…?(.*)»(.*)«(.*?)…?", line["text"], re.DOTALL).groups()
        assert token == line["token"]
        assert token.strip() == tokenizer.decode([int(documents.input_ids[at])]).strip()
        assert left + token + right in tokenizer.decode(documents[line["document"]]["input_ids"])
        assert f"{line['id']}:{line['position']}" in out
    assert files[0].read_text().startswith("query,side,rank,score,row,id,text,document,position,token\n")
    import pyarrow.parquet

    assert pyarrow.parquet.read_table(files[2]).to_pylist() == lines


def test_the_table_of_modules_has_a_line_a_share(ok, base, tmp_path):
    out = ok("score", *base, *ASK, "--by", "module", "--top", 2, "--jsonl", tmp_path / "t.jsonl")
    lines = table_of(tmp_path / "t.jsonl")
    assert len(lines) % 14 == 0  # two layers of seven
    for row in {line["row"] for line in lines}:
        own = [line for line in lines if line["row"] == row]
        assert sum(line["share"] for line in own) == pytest.approx(own[0]["score"], rel=1e-5)
        sizes = [abs(line["share"]) for line in own]
        assert sizes == sorted(sizes, reverse=True)
        for line in own[:3]:
            assert re.search(rf"\{line['share']:+.4g} +{re.escape(line['module'])}", out)
        assert own[3]["module"] not in out.split(own[0]["id"])[1].split("doc-")[0]


def test_reduce_by_head(ok, base, tmp_path):
    ok("build", tmp_path / "rows", *base, "--by", "head")
    ok("reduce", tmp_path / "mean", *base, "--by", "head")
    with gf.open_store(tmp_path / "rows") as rows, gf.open_store(tmp_path / "mean") as mean:
        assert rows.names("gradients") == mean.names("gradients")
        for name in rows.names("gradients"):
            np.testing.assert_allclose(mean.read(name)[0], rows.read(name).mean(0), rtol=1e-6, atol=1e-9)
    ok("score", tmp_path / "run", *base, "--by", "head", "--query-path", tmp_path / "mean")
    assert scores_in(tmp_path / "run")[0].shape == (12, 1)


def test_a_token_store_that_lost_a_segment_resumes(ok, base, tmp_path, monkeypatch):
    monkeypatch.setattr("gradfn.runs.rows.SEGMENT_BATCHES", 1)
    run, small = tmp_path / "run", ("--by", "token", "--token-batch-size", 40)
    ok("build", run, *base, *small)
    segments = sorted((run / "segments").glob("*.h5"))
    assert len(segments) > 3
    with gf.open_store(run) as store:
        before = {name: store.read(name) for name in store.names()}
        offsets = store.index_array("tokens/offsets")
    spans = [tuple(map(int, path.stem.split("-")[1:])) for path in segments]
    assert {edge for span in spans for edge in span} <= set(offsets.tolist())  # whole documents
    shutil.copytree(run, tmp_path / "cut")
    for path in (tmp_path / "cut" / "store.h5", tmp_path / "cut" / "segments" / segments[1].name):
        path.unlink()
    kept = len(before["rows/token"]) - (spans[1][1] - spans[1][0])
    out = ok("build", tmp_path / "cut", *base, "--by", "token", "--token-batch-size", 7)
    assert f"resumed  from {kept} tokens that were there already" in out
    with gf.open_store(tmp_path / "cut") as store:
        for name, values in before.items():
            found = store.read(name)
            if values.dtype.kind == "f":
                np.testing.assert_allclose(found, values, rtol=1e-9, atol=1e-12)
            else:
                assert (found == values).all()


def test_empty_documents_have_no_tokens(ok, model, tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [[], [5, 6, 7], [], [], [8, 9], []]
    data.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
    run = tmp_path / "run"
    ok("build", run, "--model", model, "--dataset", data, "--by", "token", "--token-batch-size", 1)
    with gf.open_store(run) as store:
        assert store.read("rows/document").tolist() == [1, 1, 1, 4, 4]
        assert store.read("rows/token").tolist() == [5, 6, 7, 8, 9]


def test_what_does_not_match_is_refused(ok, command, base, tmp_path):
    ok("build", tmp_path / "example", *base)
    ok("build", tmp_path / "head", *base, "--by", "head")
    ok("build", tmp_path / "token", *base, "--by", "token")
    for store, by, words in (
        ("example", "head", "gradients by example, so it can be asked --by example or module, not head"),
        ("example", "token", "make one with gradfn build --by token"),
        ("head", "module", "gradients by head, so it can be asked --by head or example, not module"),
        ("token", "example", "gradients by token, so it can be asked --by token, not example"),
    ):
        result = command("query", tmp_path / store, *ASK, "--by", by)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err
    for store, path, words in (
        ("example", "head", "layers.heads is True there and False here"),
        ("head", "token", "layers.heads is False there and True here"),
        ("token", "token", "layers.tokens is True there and False here"),
    ):
        result = command("query", tmp_path / store, "--query-path", tmp_path / path)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err
    result = command("reduce", tmp_path / "no", *base, "--by", "token")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "a mean over the tokens of all rows answers no question" in result.err
    assert not (tmp_path / "no").exists()
    out = ok("query", tmp_path / "token", "--query-path", tmp_path / "example", "--top", 1)
    assert "proponent 1" in out
