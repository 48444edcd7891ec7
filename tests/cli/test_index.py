"""`gradfn query --index`: an index of FAISS beside the store finds what the exact search finds."""

import json
import re

import numpy as np
import pytest

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")


@pytest.fixture(scope="module")
def store(ok, folder, model, corpus):
    """A store of its own, beside which indexes are made."""
    ok("build", folder / "store", "--model", model, "--dataset", corpus)
    return folder / "store"


def table(ok, path, *arguments):
    out = ok("query", *arguments, "--top", 5, "--jsonl", path, "--overwrite")
    return out, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("options", [(), ("--unit-normalize",), ("--by", "module")], ids=str)
def test_an_index_of_all_rows_is_the_exact_search(ok, store, queries, folder, options):
    ask = (store, "--query", queries, *options)
    exact, want = table(ok, folder / "a.jsonl", *ask)
    found, got = table(ok, folder / "b.jsonl", *ask, "--index", "Flat", "--check")
    same = ("query", "side", "rank", "row", "id", "text")
    assert [{name: line[name] for name in same} for line in got] == [
        {name: line[name] for name in same} for line in want
    ]
    np.testing.assert_allclose([l["score"] for l in got], [l["score"] for l in want], rtol=1e-4, atol=1e-6)
    assert ", index Flat\n" in found
    assert "recall  100.0% of the 5 highest rows of each query, 100.0% of the 5 lowest\n" in found
    assert "recall" not in exact


def test_with_a_curvature(ok, command, store, model, corpus, queries, folder):
    ok("hessian", folder / "h", "--model", model, "--dataset", corpus, "--projection-dim", 16)
    ask = (store, "--query", queries, "--hessian-path", folder / "h")
    for options in (("--unit-normalize", "--damping", 0.2), ("--damping", "0.1,1")):
        _, want = table(ok, folder / "a.jsonl", *ask, *options)
        _, got = table(ok, folder / "b.jsonl", *ask, *options, "--index", "Flat")
        assert [line["row"] for line in got] == [line["row"] for line in want]
        np.testing.assert_allclose([l["score"] for l in got], [l["score"] for l in want], rtol=1e-3)
    result = command("query", store, *ASK, "--hessian-path", folder / "h", "--rerank", 5)
    assert (result.status, result.out) == (2, "")
    assert "a curvature is of projected gradients: leave out --hessian-path, or --rerank" in result.err


def test_less_effort_finds_fewer_and_says_so(ok, store, queries):
    out = ok("query", store, "--query", queries, "--index", "IVF6,Flat", "--nprobe", 1, "--check")
    found = re.search(
        r"recall  ([\d.]+)% of the 5 highest rows of each query, ([\d.]+)% of the 5 lowest", out
    )
    assert found
    assert all(float(share) < 100 for share in found.groups())
    assert out.count("proponent 1") == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--nprobe", 3), "--nprobe is of an index: give --index, or leave it out"),
        (("--check",), "--check is of --index or --rerank, and this search is exact: leave it out"),
        (
            ("--index", "Flat", "--nprobe", 3),
            "--nprobe is how many cells (IVF) or rows (HNSW) a search visits",
        ),
        (("--index", "Flat", "--nprobe", 0), "--nprobe must be 1 or more, not 0"),
        (("--index", "IVF100,Flat"), "'IVF100,Flat' has 100 cells for 12 rows"),
        (("--index", "Nonsense"), "FAISS has no index 'Nonsense'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(command, store, options, words):
    result = command("query", store, *ASK, *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert words in result.err


def test_one_damping_of_normalised_rows(ok, command, store, model, corpus, folder):
    ok("hessian", folder / "h2", "--model", model, "--dataset", corpus, "--projection-dim", 16)
    options = ("--hessian-path", folder / "h2", "--unit-normalize", "--damping", "0.1,1", "--index", "Flat")
    result = command("query", store, *ASK, *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert (
        "rows that are normalised behind a curvature are others for each damping: give one --d" in result.err
    )
