"""`gradfn import` and `gradfn export`."""

import json

import numpy as np
import pytest

SIZES = {"layers.0.mlp": 6, "lm_head": 5}


def index(path, rows, seed):
    path.mkdir()
    values = np.random.default_rng(seed).standard_normal((rows, 11)).astype(np.float32)
    values.tofile(path / "gradients.bin")
    info = {"num_grads": rows, "grad_sizes": SIZES, "base_dtype": "float32"}
    (path / "info.json").write_text(json.dumps(info))
    return values.astype(np.float64)


@pytest.mark.parametrize("options", [(), ("--index", "Flat", "--check")], ids=["exact", "index"])
def test_an_imported_index_is_searched(ok, tmp_path, options):
    rows, asked = index(tmp_path / "i", 12, 0), index(tmp_path / "q", 2, 1)
    assert "[12 rows]" in ok("import", tmp_path / "i", tmp_path / "rows")
    ok("import", tmp_path / "q", tmp_path / "asked")
    export = ("--top", 5, "--jsonl", tmp_path / "t.jsonl")
    out = ok("query", tmp_path / "rows", "--query-path", tmp_path / "asked", *options, *export)
    assert out.count("proponent 1") == 2
    assert "model" not in out
    table = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for query, want in enumerate(asked @ rows.T):
        for side, sign in (("proponent", 1), ("opponent", -1)):
            order = [row for row in np.argsort(-sign * want)[:5].tolist() if sign * want[row] > 0]
            lines = [line for line in table if (line["query"], line["side"]) == (str(query), side)]
            assert [line["row"] for line in lines] == order
            np.testing.assert_allclose([line["score"] for line in lines], want[order], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--query", "The capital of Peru is"),
            "was imported, and its projections are another program's",
        ),
        (("--query-path", "rows", "--rerank", 5), "was imported, without a model: leave out --rerank"),
    ],
)
def test_what_needs_a_model_is_refused(ok, command, tmp_path, monkeypatch, options, words):
    index(tmp_path / "i", 12, 0)
    monkeypatch.chdir(tmp_path)
    ok("import", "i", "rows")
    result = command("query", "rows", *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert words in result.err


def test_a_store_is_exported(ok, command, store, tmp_path):
    assert "g.npy [" in ok("export", store, tmp_path / "g.npy")
    assert np.load(tmp_path / "g.npy").shape[0] == 12
    result = command("export", store, tmp_path / "g.npy")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "g.npy exists: give another name, or --overwrite" in result.err
    ok("export", store, tmp_path / "g.npy", "--overwrite")


def test_what_is_no_index_is_refused(command, store, tmp_path):
    result = command("import", store, tmp_path / "run")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "is no index of Bergson: give the folder with info.json and gradients.bin in it" in result.err
