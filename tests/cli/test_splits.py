"""Datasets of several splits: which one rows and queries are of is said, or asked."""

import json

import datasets
import pytest
from tiny import DOCUMENTS, QUERIES


@pytest.fixture(scope="module")
def parts(folder):
    """Rows and queries, each a folder with a split for training and one for tests."""
    for name, rows in (("rows", DOCUMENTS), ("asked", QUERIES)):
        splits = {
            "train": datasets.Dataset.from_list(rows[:2]),
            "test": datasets.Dataset.from_list(rows[2:3]),
        }
        datasets.DatasetDict(splits).save_to_disk(str(folder / name))
    return folder / "rows", folder / "asked"


NOTE = "split train, of train, test: --split takes another"


@pytest.mark.parametrize("name", ["build", "reduce", "hessian", "score", "check"])
def test_the_first_lines_say_which_split_the_rows_are_of(ok, model, parts, tmp_path, name):
    asked = ("--query", parts[1], "--query-split", "test") if name == "score" else ()
    words = (name, model) if name == "check" else (name, tmp_path / "run", "--model", model)
    out = ok(*words, "--dataset", parts[0], *asked)
    assert NOTE in " ".join(out.split())
    if name == "build":
        assert "split" not in ok(*words, "--dataset", parts[0], "--split", "train")


def test_which_split_the_queries_are_of_is_asked(command, ok, store, model, parts, tmp_path):
    rows = ("--model", model, "--dataset", parts[0], "--split", "train")
    for words in (("score", *rows), ("query", store), ("retrain", tmp_path / "run", *rows)):
        refused = command(*words, "--query", parts[1])
        assert (refused.status, refused.out) == (2, "")
        assert "has the splits train, test: say which is meant with --query-split" in refused.err
    assert "query q-kenya" in ok("query", store, "--query", parts[1], "--query-split", "test")
    refused = command("query", store, "--query", parts[1], "--split", "test")
    assert (refused.status, refused.out) == (2, "")
    assert "the split of a dataset in --query is --query-split" in refused.err


def test_a_split_of_queries_that_are_none(command, model, corpus, store):
    for asked in (("--query", "Peru is"), ("--query-path", store), ("--self",)):
        refused = command("score", "--model", model, "--dataset", corpus, "--query-split", "test", *asked)
        assert refused.status == 2
        assert "leave" in refused.err
        assert "--query-split" in refused.err


def test_recall_reads_the_split_that_was_scored(command, ok, model, corpus, parts, tmp_path):
    run, table = tmp_path / "run", tmp_path / "t.jsonl"
    ok("score", run, "--model", model, "--dataset", corpus, "--query", parts[1], "--query-split", "test")
    ok("evaluate", "recall", run, "--jsonl", table)
    assert json.loads(table.read_text())["queries"] == 1
    refused = command("evaluate", "recall", run, "--query-split", "train")
    assert "give the --query that was scored" in refused.err
    refused = command("evaluate", "recall", run, "--query", parts[1])
    assert "say which is meant with --query-split" in refused.err
