"""`gradfn score --training RUN`: the model, the rows and the steps are those of a training."""

import shlex
import shutil

import pytest
import torch
from tiny import DOCUMENTS, write_jsonl

import gradfn as gf
from gradfn.cli.trained import unseen_facts
from gradfn.data import make_documents
from gradfn.scores import Scores
from gradfn.train.run import open_training


@pytest.fixture(scope="module")
def own(folder):
    """Rows whose text has another column than is usual."""
    return write_jsonl(folder / "own.jsonl", [{"words": row["text"]} for row in DOCUMENTS])


@pytest.fixture(scope="module")
def run(ok, folder, model, own):
    ok("train", folder / "run", "--model", model, "--dataset", own, "--text-column", "words", "--split",
       "train[:8]", "--loss-reduction", "sum", "--epochs", 3, "--batch-size", 4, "--save-every", 2,
       "--learning-rate", 0.01, "--schedule", "linear")  # fmt: skip
    return folder / "run"


def scores_of(ok, out, *words):
    ok("score", out, *words)
    return Scores.load(out)


def test_it_says_what_the_training_says_already(ok, run, own, queries, tmp_path):
    short = scores_of(ok, tmp_path / "a", "--training", run, "--query", queries, "--method", "grad-cosine")
    long = scores_of(
        ok, tmp_path / "b", "--model", run / "checkpoint-6", "--dataset", own, "--text-column", "words",
        "--split", "train[:8]", "--loss-reduction", "sum", "--query", queries, "--method", "grad-cosine",
    )  # fmt: skip
    assert torch.equal(short.values, long.values)
    assert short.settings == long.settings
    line = shlex.split(ok("info", tmp_path / "a", "--command"))
    assert line[3:] == ["--training", str(run), "--query", str(queries), "--method", "grad-cosine"]
    ok("rerun", tmp_path / "a", "--into", tmp_path / "c")
    assert torch.equal(Scores.load(tmp_path / "c").values, short.values)


def test_tracin_sums_the_learning_rates_before_each_checkpoint(ok, run, queries, tmp_path):
    out = ok("score", tmp_path, "--training", run, "--query", queries, "--method", "tracin")
    rates = open_training(run).steps["learning_rate"]
    sums = rates.reshape(3, 2).sum(1)
    assert f"{sums[0]:.4g}, {sums[1]:.4g}, {sums[2]:.4g}, of checkpoint-2, checkpoint-4, checkpoint-6" in out
    parts = [Scores.load(tmp_path / f"checkpoint-{number}").values for number in (1, 2, 3)]
    expected = sum(rate * part for rate, part in zip(sums, parts, strict=True))
    torch.testing.assert_close(Scores.load(tmp_path).values, expected.float())
    made = gf.open_store(tmp_path, "scores").settings
    assert [one["path"] for one in made["checkpoints"]] == [str(run / f"checkpoint-{n}") for n in (2, 4, 6)]


def test_checkpoints_that_are_named_stand_for_the_steps_since_the_one_before(ok, command, run, queries):
    base = ("score", "--training", run, "--query", queries, "--method", "tracin", "--checkpoints")
    rates = open_training(run).steps["learning_rate"]
    out = ok(*base, f"{run}/checkpoint-6,{run}/checkpoint-4")
    assert f"weights   {rates[:4].sum():.4g}, {rates[4:].sum():.4g}, of checkpoint-4, checkpoint-6" in out
    assert "weights   1, of checkpoint-0" in ok(*base, run / "checkpoint-0", "--checkpoint-weights", "1")
    for path in (run, f"{run}/checkpoint-0"):
        result = command(*base, path)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert "behind a step: give some of these" in result.err


@pytest.mark.parametrize(
    "more", [("--model", "x"), ("--dataset", "x"), ("--text-column", "text"), ("--split", "train[:8]"),
             ("--loss-reduction", "sum"), ("--precision", "fp64"), ("--task", "causal-lm"), ("--seed", 1)],
)  # fmt: skip
def test_what_the_training_decides_is_refused(command, run, queries, more):
    result = command("score", "--training", run, "--query", queries, *more)
    assert (result.status, result.err.count("\n"), result.out) == (2, 1, "")
    assert result.err.startswith(f"gradfn: {more[0]} is of the training that --training names")


def test_a_training_that_is_not_what_it_was(ok, command, run, own, store, queries, tmp_path):
    def refused(run, words):
        result = command("score", "--training", run, "--query", queries)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err

    refused(tmp_path / "absent", "does not exist")
    refused(store, "training")
    gone = shutil.copytree(run, tmp_path / "gone")
    shutil.rmtree(gone / "checkpoint-6")
    refused(gone, f"checkpoint-6 is gone, which the training in {gone} wrote: put it back, or train again")
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    (unfinished / "training.h5").unlink()
    refused(unfinished, "is unfinished: run gradfn train")
    before = own.read_text()
    own.write_text(before.replace("Peru", "Chile", 1))
    try:
        refused(run, f"the rows of {own} are not those that {run} was trained on: put these back")
    finally:
        own.write_text(before)


def test_what_each_checkpoint_adds_to_a_score(ok, command, run, queries, tmp_path):
    base = ("--training", run, "--query", queries, "--method", "tracin")
    out = ok(
        "score", tmp_path / "a", *base, "--by", "time", "--top", 1, "--show", 1, "--csv", tmp_path / "t.csv"
    )
    found = Scores.load(tmp_path / "a")
    assert [*found.shares] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    torch.testing.assert_close(torch.stack([*found.shares.values()]).sum(0), found.values)
    torch.testing.assert_close(found.values, scores_of(ok, tmp_path / "b", *base).values)
    assert out.index("checkpoint-2", out.rindex("query ")) < out.index("checkpoint-4", out.rindex("query "))
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0].endswith(",time,share")
    assert ",checkpoint-2," in lines[1]
    for more in (("--method", "grad-dot"), ("--method", "less", "--checkpoints", f"{run}/checkpoint-4")):
        result = command("score", "--training", run, "--query", queries, *more, "--by", "time")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert "parts over time where they are sums over checkpoints" in result.err


def test_source_goes_through_the_training_as_it_was_recorded(ok, command, run, own, queries, tmp_path):
    short = scores_of(ok, tmp_path / "a", "--training", run, "--query", queries, "--method", "source")
    rates = open_training(run).steps["learning_rate"].reshape(3, 2).sum(1)
    long = scores_of(
        ok, tmp_path / "b", "--model", run / "checkpoint-6", "--dataset", own, "--text-column", "words",
        "--split", "train[:8]", "--loss-reduction", "sum", "--query", queries, "--method", "source",
        "--checkpoints", ",".join(f"{run}/checkpoint-{n}" for n in (2, 4, 6)),
        "--checkpoint-weights", ",".join(str(rate) for rate in rates), "--optimizer", "adamw",
    )  # fmt: skip
    torch.testing.assert_close(short.values, long.values, rtol=1e-4, atol=1e-9)
    result = command(
        "score", "--training", run, "--query", queries, "--method", "source", "--optimizer", "sgd"
    )
    assert result.err.startswith("gradfn: --optimizer is of the training that --training names")


def test_tokens_that_no_row_of_the_training_has_are_told():
    class Words:
        def decode(self, ids):
            return f"w{ids[0]}"

    train = make_documents([[1, 2, 3], [4, 5]])
    asked = make_documents([[9, 1, 2], [1, 7, 8, 7], [4, 6]])  # the first token of a row is not asked for
    asked.labels[-1] = -100
    words = '1 query asks for tokens that no row of the training has ("w7", "w8")'
    assert unseen_facts(train, asked, Words()) == [("note", words)]
    assert unseen_facts(train, train, Words()) == []
