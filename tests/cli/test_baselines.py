"""`--baseline`: what words or meaning alone find, in the table, in exports and in a run."""

import csv
import json

import numpy as np
import pytest
from tiny import DOCUMENTS, QUERIES

from gradfn.evaluate.lexical import bm25_scores
from gradfn.hf.embeddings import embeddings
from gradfn.scores import Scores

TEXTS = [row["text"] for row in DOCUMENTS]
ASKED = [row["prompt"] + row["completion"] for row in QUERIES]


@pytest.fixture(scope="module")
def base(model, corpus, queries):
    return ("--model", model, "--dataset", corpus, "--query", queries)


def test_baselines_stand_beside_the_scores(ok, base, model, tmp_path):
    both = ("--baseline", "bm25", "--baseline", f"embedding:{model}")
    out = ok("score", tmp_path / "run", *base, *both, "--csv", tmp_path / "t.csv")
    states = embeddings(model, [*TEXTS, *ASKED])
    expected = {"bm25": bm25_scores(TEXTS, ASKED), "embedding": (states[:12] @ states[12:].T).numpy()}
    for name, values in expected.items():
        stored = Scores.load(tmp_path / "run" / f"baseline-{name}")
        np.testing.assert_allclose(stored.matrix, values, rtol=1e-5, atol=1e-6)
        assert stored.query_ids == [row["id"] for row in QUERIES]
        assert f"{name} " in out.split("query q-france")[0]
        for line in csv.DictReader((tmp_path / "t.csv").read_text().splitlines()):
            row, query = int(line["row"]), stored.query_ids.index(line["query"])
            assert float(line[name]) == pytest.approx(values[row, query], rel=1e-5, abs=1e-6)
            order = stored.top(12).rows[query].tolist()
            assert int(line[f"{name}_rank"]) == order.index(row) + 1
    line = next(line for line in out.splitlines() if "proponent 1" in line)
    assert "  bm25 #" in line
    assert ", embedding #" in line


def test_a_baseline_is_a_run_like_any_other(ok, base, tmp_path):
    run = tmp_path / "run"
    ok("score", run, *base, "--baseline", "bm25", "--method", "kfac", "--damping", "0.1,1")
    ok("score", run, *base, "--baseline", "bm25", "--method", "kfac", "--damping", "0.1,1")
    assert Scores.load(run / "baseline-bm25").query_ids == [row["id"] for row in QUERIES]
    out = ok("select", run / "baseline-bm25", "--top-per-query", 1, "-o", tmp_path / "s.jsonl")
    assert "note" not in out
    kept = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert {row["id"] for row in kept} == {"doc-france", "doc-peru", "doc-kenya"}
    ok("evaluate", "recall", run, run / "baseline-bm25")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--baseline", "tfidf"), "no baseline 'tfidf': give bm25, or embedding:FOLDER of a model"),
        (("--baseline", "embedding:nowhere"), "no folder nowhere with an embedding model"),
        (("--baseline", "bm25", "--baseline", "bm25"), "--baseline is given twice for one kind"),
        (("--baseline", "bm25", "--by", "token"), "a baseline is of whole rows, and these are tokens"),
        (("--baseline", "bm25", "--group-column", "id"), "--group-column leaves none: leave out --baseline"),
    ],
)
def test_what_has_no_baseline_is_refused(command, base, tmp_path, options, words):
    result = command("score", tmp_path / "run", *base, *options)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert words in result.err
    assert not (tmp_path / "run").exists()
