import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny import DOCUMENTS, mostly_slow, write_jsonl

import gradfn as gf

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")
PAIRS = ("--prompt-column", "prompt", "--completion-column", "completion")


def scores_of(run):
    with h5py.File(run / "scores.h5") as file:
        return file["scores"][:, 0]


def gradients_of(run):
    with gf.open_store(run) as store:
        return {name: store.read(name) for name in store.names("gradients")}


def everything_in(run):
    with gf.open_store(run) as store:
        return {name: store.read(name) for name in store.names()}


def shown_scores(ok, path, *arguments):
    """The scores of all rows that a query shows, `[rows, queries]`; those that it leaves out are zero."""
    ok("query", *arguments, "--top", 12, "--jsonl", path)
    table = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(row["query"] for row in table))
    scores = np.zeros((12, len(names)))
    for row in table:
        scores[row["row"], names.index(row["query"])] = row["score"]
    return scores


@pytest.mark.parametrize("method", ["grad-dot", "grad-cosine"])
@pytest.mark.parametrize("dim", [0, 16])
@pytest.mark.parametrize("which", mostly_slow(["model", "neox"], "neox"))
def test_a_store_queried_is_the_score_on_the_fly(ok, request, corpus, tmp_path, which, dim, method):
    base = ("--model", request.getfixturevalue(which), "--dataset", corpus, "--projection-dim", dim)
    ok("build", tmp_path / "store", *base)
    ok("score", tmp_path / "live", *base, *ASK, "--method", method)
    unit = ("--unit-normalize",) if method == "grad-cosine" else ()
    stored = shown_scores(ok, tmp_path / "t.jsonl", tmp_path / "store", *ASK, *unit)
    np.testing.assert_allclose(
        stored, scores_of(tmp_path / "live"), rtol=1e-4, atol=1e-4 if not unit else 1e-6
    )
    assert np.abs(stored).min() > 0


@pytest.mark.parametrize("distribution", ["gaussian", "orthonormal"])
def test_so_it_is_with_other_projections(ok, model, corpus, queries, tmp_path, distribution):
    options = ("--projection", distribution, "--projection-dim", 5, "--seed", 3, "--loss-reduction", "sum")
    base = ("--model", model, "--dataset", corpus, *options, "--exclude", "*q_proj", "--include", "*proj")
    ok("build", tmp_path / "store", *base, "--unit-normalize")
    ok("score", tmp_path / "live", *base, "--query", queries, "--unit-normalize")
    stored = shown_scores(ok, tmp_path / "t.jsonl", tmp_path / "store", "--query", queries)
    assert stored.shape == (12, 3)
    np.testing.assert_allclose(stored, scores_of(tmp_path / "live"), atol=1e-6)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
def test_reduce_aggregates_the_rows_of_build(ok, model, corpus, store, tmp_path, aggregation):
    ok("reduce", tmp_path / "run", "--model", model, "--dataset", corpus, "--aggregation", aggregation)
    reduced = gradients_of(tmp_path / "run")
    for name, rows in gradients_of(store).items():
        expected = getattr(rows.astype(np.float64), aggregation)(0, keepdims=True)
        np.testing.assert_allclose(reduced[name], expected, rtol=1e-4, atol=1e-5)


def test_reduce_normalizes_rows_before_it_aggregates(ok, model, corpus, tmp_path):
    base = ("--model", model, "--dataset", corpus, "--unit-normalize")
    ok("build", tmp_path / "rows", *base)
    ok("reduce", tmp_path / "mean", *base)
    mean = gradients_of(tmp_path / "mean")
    for name, rows in gradients_of(tmp_path / "rows").items():
        np.testing.assert_allclose(mean[name], rows.mean(0, keepdims=True), rtol=1e-4, atol=1e-6)


def test_a_store_holds_the_rows_of_the_library(store, model, corpus):
    net = gf.load_model(model)
    documents = gf.tokenize(gf.load_rows(corpus), gf.load_tokenizer(model))
    expected = gf.collect(net, documents, gf.project(16))
    found = everything_in(store)
    for name, rows in expected.items():
        np.testing.assert_allclose(found[f"gradients/{name}"], rows.numpy(), rtol=1e-4, atol=1e-5)
    assert found["rows/id"].tolist() == [document["id"] for document in DOCUMENTS]
    assert found["rows/text"].tolist() == [document["text"] for document in DOCUMENTS]
    assert found["rows/length"].tolist() == documents.lengths.tolist()
    assert not found["rows/zero"].any()
    for row in (0, 11):
        ids = documents[row]["input_ids"][None]
        assert found["rows/loss"][row] == pytest.approx(net(ids, labels=ids).loss.item(), rel=1e-5)


def test_query_with_the_gradients_of_another_store(ok, store, model, queries, tmp_path):
    ok("build", tmp_path / "q", "--model", model, "--dataset", queries, *PAIRS)
    stored = shown_scores(ok, tmp_path / "a.jsonl", store, "--query-path", tmp_path / "q")
    asked = shown_scores(ok, tmp_path / "b.jsonl", store, "--query", queries)
    np.testing.assert_allclose(stored, asked, rtol=1e-4, atol=1e-4)


def test_query_counts_known_sources(ok, store, queries):
    out = ok("query", store, "--query", queries)
    assert "BM25       ranks the known source first for 3 of 3 queries" in out
    assert "The capital of Kenya is → Nairobi" in out


def test_query_takes_a_split_of_its_dataset(ok, store, queries):
    out = ok("query", store, "--query", queries, "--query-split", "train[1:2]")
    assert [line.split()[1] for line in out.splitlines() if line.startswith("query ")] == ["q-peru"]


@pytest.mark.parametrize("asked", ["--query-path", "--query"])
def test_a_split_of_no_dataset_is_refused(command, store, asked):
    value = store if asked == "--query-path" else "The capital"
    result = command("query", store, asked, value, "--query-split", "a[:1]")
    assert (result.status, result.out) == (2, "")
    assert "--query-split is of a dataset in --query, and none is given" in result.err


def test_query_takes_the_precision_of_the_store(ok, command, model, corpus, tmp_path):
    ok("build", tmp_path / "run", "--model", model, "--dataset", corpus, "--precision", "bf16")
    assert "proponent 1" in ok("query", tmp_path / "run", *ASK)
    result = command("query", tmp_path / "run", *ASK, "--precision", "fp32")
    assert result.status == 2
    assert re.search(r"\(model is \S+, bf16 there and \S+, fp32 here\)", result.err)


def test_query_when_the_model_has_moved(ok, command, model, corpus, tmp_path):
    there = Path(shutil.copytree(model, tmp_path / "copy")).resolve()
    ok("build", tmp_path / "run", "--model", there, "--dataset", corpus)
    there.rename(tmp_path / "moved")
    result = command("query", tmp_path / "run", *ASK)
    assert result.status == 2
    assert f"was {there}, which is not there any more: give --model" in result.err
    assert "proponent 1" in ok("query", tmp_path / "run", *ASK, "--model", tmp_path / "moved")


def test_build_again_does_nothing(ok, store, model, corpus):
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*.h5")}
    assert "resumed  from 12 rows that were there already" in ok(
        "build", store, "--model", model, "--dataset", corpus
    )
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*.h5")}


def test_overwrite_replaces_the_store_and_nothing_else(ok, model, corpus, tmp_path):
    run = tmp_path / "run"
    base = ("--model", model, "--dataset", corpus)
    ok("build", run, *base)
    ok("score", run, *base, *ASK)
    (run / "notes.txt").write_text("mine")
    before = scores_of(run)
    ok("build", run, *base, "--seed", 1, "--overwrite")
    assert gf.open_store(run).settings["transform"]["chain"][0]["seed"] == 1
    assert (run / "notes.txt").read_text() == "mine"
    assert (scores_of(run) == before).all()


def test_rows_with_odd_text_are_stored(ok, model, tmp_path):
    texts = ["ends in NUL\0\0", "", "The capital " * 20, "e\u0301 \u202e 世界", "a"]
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": text, "id": f"{text[:3]}\0"} for text in texts])
    out = ok("build", tmp_path / "run", "--model", model, "--dataset", data)
    assert "1 row with nothing to supervise" in out
    found = everything_in(tmp_path / "run")
    assert found["rows/text"].tolist() == ["ends in NUL", *texts[1:]]
    assert found["rows/zero"].tolist() == [False, True, False, False, False]


def test_info(ok, store, model, corpus, tmp_path):
    out = ok("info", store)
    assert "14 blocks, such as model.layers.0.self_attn.q_proj [16 x 16]" in out
    assert "12, 238 tokens, mean loss" in out
    assert ok("info", store / "store.h5") == out
    ok("score", tmp_path / "run", "--model", model, "--dataset", corpus, *ASK)
    assert "12 rows x 1 query; positive = proponent" in ok("info", tmp_path / "run")
    mailed = (tmp_path / "run" / "scores.h5").rename(tmp_path / "for-you.h5")
    assert "12 rows x 1 query; positive = proponent" in ok("info", mailed)


SLOW_BUILD = """
import sys, time
from gradfn import store
write = store.Writer.write
def slowly(self, *args):
    write(self, *args)
    print("segment", flush=True)
    time.sleep(60 if len(self.done) == 3 else 0)
store.Writer.write = slowly
from gradfn.cli import main
main()
"""


def test_a_killed_build_resumes_and_gives_the_same_bits(ok, model, corpus, tmp_path):
    arguments = ("--model", model, "--dataset", corpus, "--token-batch-size", "1")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, "build", killed, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        lines = iter(process.stdout.readline, "")
        assert (
            sum(1 for _ in zip(range(3), (line for line in lines if line == "segment\n"), strict=False)) == 3
        )
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in (killed / "segments").glob("*.h5")}
    rows = sum(int(name[:-3].split("-")[2]) - int(name.split("-")[1]) for name in done)
    assert len(done) == 3
    assert not (killed / "store.h5").exists()
    (killed / "segments" / ".store-0000000000-0000000002.h5.tmp").write_bytes(b"half")
    assert f"from {rows} rows that were there already" in ok("build", killed, *arguments)
    ok("build", whole, *arguments)
    a, b = everything_in(killed), everything_in(whole)
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)
    after = {path.name: path.stat().st_mtime_ns for path in (killed / "segments").iterdir()}
    assert done.items() <= after.items()
    assert all(name.endswith(".h5") for name in after)


def test_memory_bounds_what_is_read_at_a_time_and_changes_nothing(
    command, ok, store, model, corpus, tmp_path
):
    ask = ("--query", "The capital of Peru is", "--completion", " Lima")
    run, base = tmp_path / "run", ("--model", model, "--dataset", corpus)
    for arguments in (("query", store, *ask), ("score", run, *base, *ask)):
        told = ok(*arguments)
        assert ok(*arguments, "--memory", 1).splitlines()[-8:] == told.splitlines()[-8:]
        for wrong in (0, -1, 1 << 40):
            assert "--memory is MiB, 1 or more" in command(*arguments, "--memory", wrong).err


def test_biases_may_be_left_out(ok, folder, neox, corpus, tmp_path):
    base = ("--model", neox, "--dataset", corpus, "--projection-dim", 0, "--include", "*.dense")
    ok("build", tmp_path / "all", *base)
    ok("build", tmp_path / "bare", *base, "--no-biases")
    whole, bare = gradients_of(tmp_path / "all"), gradients_of(tmp_path / "bare")
    for name, rows in whole.items():
        np.testing.assert_allclose(bare[name], rows[..., :-1], rtol=1e-5, atol=1e-7)
    with gf.open_store(tmp_path / "bare", "store") as store:
        assert store.settings["layers"]["biases"] is False
