"""`gradfn query --rerank`: what the store finds is ranked by whole gradients."""

import json

import numpy as np
import pytest
from tiny import DOCUMENTS, write_jsonl

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")


@pytest.fixture(scope="module")
def store(ok, folder, model, corpus):
    ok("build", folder / "store", "--model", model, "--dataset", corpus, "--projection-dim", 2)
    return folder / "store"


def table(ok, path, command, *arguments):
    out = ok(command, *arguments, "--top", 5, "--jsonl", path, "--overwrite")
    return out, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("unit", [(), ("--unit-normalize",)], ids=["dot", "cosine"])
@pytest.mark.parametrize("index", [(), ("--index", "Flat")], ids=["exact", "index"])
def test_all_rows_as_candidates_are_scored_as_on_the_fly(
    ok, store, model, corpus, queries, folder, unit, index
):
    live = ("score", "--model", model, "--dataset", corpus, "--query", queries, "--projection", "none", *unit)
    _, want = table(ok, folder / "a.jsonl", *live)
    ask = ("query", store, "--query", queries, "--rerank", 12, "--check", *unit, *index)
    out, got = table(ok, folder / "b.jsonl", *ask)
    same = ("query", "side", "rank", "row", "id", "text")
    assert [[line[name] for name in same] for line in got] == [[line[name] for name in same] for line in want]
    np.testing.assert_allclose(
        [line["score"] for line in got], [line["score"] for line in want], rtol=1e-4, atol=1e-7
    )
    assert "rerank  12 candidates on each side, by whole gradients\n" in out
    assert "recall  100.0% of the 5 highest of all rows were candidates, 100.0% of the 5 lowest\n" in out


def test_fewer_candidates_say_what_they_miss(ok, store, queries, folder):
    ask = ("query", store, "--query", queries)
    _, first = table(ok, folder / "a.jsonl", *ask)
    out, second = table(ok, folder / "b.jsonl", *ask, "--rerank", 5, "--check")
    for query in {line["query"] for line in first}:
        rows = [{line["row"] for line in lines if line["query"] == query} for lines in (first, second)]
        assert rows[1] <= rows[0] | rows[1]
        assert len(rows[1]) >= 5
    assert "before  " in out
    assert "recall  100.0% of the 5 highest" not in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--rerank", 3), "--rerank is how many candidates to rank: give 5 or more, not 3"),
        (("--rerank", 8, "--top", 9), "give 9 or more, not 8"),
        (("--rerank", 5, "--by", "module"), "--rerank is of whole rows, and scores are by module"),
        (
            ("--rerank", 5, "--query-loss", "log_odds"),
            "rows would have the queries' loss: leave out --query-loss",
        ),
    ],
)
def test_what_has_no_second_stage_is_refused(command, store, options, words):
    result = command("query", store, *ASK, *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert words in result.err


def test_rows_that_changed_are_refused(ok, command, model, tmp_path):
    corpus = write_jsonl(tmp_path / "c.jsonl", DOCUMENTS)
    ok("build", tmp_path / "s", "--model", model, "--dataset", corpus)
    write_jsonl(corpus, DOCUMENTS[:-1])
    result = command("query", tmp_path / "s", *ASK, "--rerank", 5)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "are not those that" in result.err


def test_a_mean_of_rows_has_no_candidates(ok, command, model, corpus, tmp_path):
    ok("reduce", tmp_path / "m", "--model", model, "--dataset", corpus)
    result = command("query", tmp_path / "m", *ASK, "--rerank", 5)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "is of gradfn reduce, and --rerank takes what build wrote" in result.err
