"""`gradfn score RUN --method inrun`: the values that a training measured, shown like any scores."""

import csv
import shutil

import pytest

from gradfn.scores import Scores


@pytest.fixture(scope="module")
def base(model, corpus):
    return ("--model", model, "--dataset", corpus, "--batch-size", 6)


@pytest.fixture(scope="module")
def valued(folder, ok, base, queries):
    """A training that valued the first of its two steps."""
    told = ok("train", folder / "valued", *base, "--epochs", 1, "--values", queries, "--values-every", 2,
              "--values-kind", "influence")  # fmt: skip
    assert told.splitlines()[-1] == f"next    gradfn score {folder}/valued --method inrun"
    return folder / "valued"


@pytest.fixture(scope="module")
def plain(folder, ok, base):
    ok("train", folder / "unvalued", *base, "--epochs", 1)
    return folder / "unvalued"


def test_values_are_shown_ranked_and_exported(ok, valued, tmp_path):
    out = ok("score", valued, "--method", "inrun", "--top", 2, "--show", 1, "--csv", tmp_path / "t.csv")
    assert "scores.h5 [12 rows, 3 queries]" in out
    assert "inrun, influence, every 2 steps" in out
    assert "6 rows have values of 0" in out
    scores = Scores.load(valued)
    best = scores.top(2)
    table = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    mine = [row for row in table if row["side"] == "proponent" and row["query"] == "q-peru"]
    column = list(scores.query_ids).index("q-peru")
    assert [int(row["row"]) for row in mine] == best.rows[column].tolist()
    assert [float(row["score"]) for row in mine] == best.scores[column].tolist()
    assert [row["id"] for row in mine] == [scores.row_ids[row] for row in best.rows[column]]
    assert scores.query_texts[0].split("\xa0")[0] in out
    assert table[0]["text"] in out


def test_what_each_epoch_adds_to_a_value(ok, command, valued, base, queries, tmp_path):
    ok("train", tmp_path / "two", *base, "--epochs", 2, "--values", queries)
    out = ok("score", tmp_path / "two", "--method", "inrun", "--by", "time", "--top", 1, "--show", 1)
    scores = Scores.load(tmp_path / "two")
    assert [*scores.shares] == ["epoch 1", "epoch 2"]
    row = int(scores.top(1).rows[0, 0])
    for share in scores.shares.values():
        assert f"{share[0, row, 0]:+.4g}" in out
    result = command("score", valued, "--method", "inrun", "--by", "time")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "has one epoch, and so no parts over time" in result.err


def test_a_run_without_values_is_refused(command, valued, plain, store, tmp_path):
    unfinished, lost = (shutil.copytree(valued, tmp_path / name) for name in ("unfinished", "lost"))
    (unfinished / "training.h5").unlink()
    (lost / "scores.h5").unlink()
    for run, words in (
        ((), "shows what a training measured: give the RUN of gradfn train RUN --values QUERIES"),
        ((tmp_path / "absent",), "does not exist"),
        ((store,), "training"),
        ((plain,), "measured no values of its rows: train again with --values QUERIES"),
        ((unfinished,), f"is unfinished: run gradfn train {unfinished}"),
        ((lost,), f"measured are not summed: run gradfn train {lost}"),
    ):
        result = command("score", *run, "--method", "inrun")
        assert (result.status, result.err.count("\n"), result.out) == (2, 1, ""), result.err
        assert words in result.err


def test_scores_beside_another_training_are_refused(command, valued, tmp_path):
    run = shutil.copytree(valued, tmp_path / "run")
    scores = Scores.load(run)
    settings = {**scores.settings, "seed": 7}
    Scores(scores.values, scores.row_ids, scores.query_ids, settings=settings).save(run, overwrite=True)
    result = command("score", run, "--method", "inrun")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "other scores than the values of the training beside it" in result.err


@pytest.mark.parametrize(
    "more", [("--model", "x"), ("--query", "a text"), ("--damping", "0.1"), ("--projection", "none"),
             ("--checkpoints", "a,b"), ("--self",), ("--shard", "1/2"), ("--by", "module")],
)  # fmt: skip
def test_options_of_scores_that_are_computed_are_refused(command, more):
    result = command("score", "absent", "--method", "inrun", *more)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"gradfn: {more[0]} is of scores that are computed")
    assert result.err.endswith("leave it out\n")


def test_scores_have_a_directory_of_their_own(command, plain, model, tmp_path):
    """The checkpoints of a training, and the parts of joined scores, have names alike."""
    trainer = tmp_path / "trainer"
    shutil.copytree(model, trainer / "checkpoint-1")
    before = sorted(tmp_path.rglob("*")), sorted(plain.rglob("*"))
    for run, words in ((plain, "holds a training"), (trainer, "checkpoint-1 is a checkpoint of a model")):
        result = command("score", run, "--model", model, "--dataset", "absent.jsonl", "--query", "a text")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err
        assert "a directory of their own" in result.err
    assert (sorted(tmp_path.rglob("*")), sorted(plain.rglob("*"))) == before


def test_evaluations_take_the_values_and_know_their_queries(ok, valued, base, queries, tmp_path):
    out = ok("evaluate", "recall", valued, "--top", 2)
    assert "3 of 3 have a source among the rows" in out
    training = (*base, "--query", queries, "--seeds", 1)
    ok("retrain", tmp_path / "truth", *training, "--remove-top", "2", "--scores", valued)
    assert "valued" in ok("evaluate", "recall", valued)
    assert "random" in ok("evaluate", "brittleness", tmp_path / "truth")
