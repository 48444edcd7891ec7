"""`gradfn retrain --step`, and `gradfn evaluate change`."""

import json

import pytest
import torch
from evaluated import QUERIES, ROWS, World, refused, write_scores, write_truth

import gradfn as gf
from gradfn.evaluate.change import agreement, changes, padded_weights, step_weights
from gradfn.evaluate.truth import open_truth


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def stepped(world, run, **more):
    """A linear world at weights, whose losses rise by the scores times what is taken from the weights."""
    weights = step_weights(world.near, [0.1, 0.3])
    noise = 0.05 * torch.randn(len(weights), QUERIES, generator=torch.Generator().manual_seed(4)).double()
    losses = 3 - weights @ world.influence + noise
    ones = torch.ones_like(weights, dtype=torch.bool)
    settings = {"removal": "mask", "query_loss": {"criterion": "cross_entropy"}}
    write_truth(run, ones, losses, torch.arange(len(weights)), weights=weights, settings=settings, **more)
    return weights, losses


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_changes_are_those_of_the_library_for_each_size_run_and_damping(ok, world, tmp_path):
    weights, losses = stepped(world, tmp_path / "t")
    out = ok("evaluate", "change", tmp_path / "t", world.close, world.sweep, "--jsonl", tmp_path / "t.jsonl",
             "--plot", tmp_path / "p.svg")  # fmt: skip
    table = rows_of(tmp_path / "t.jsonl")
    scored = [("close", "", world.near), ("sweep", "1", world.far), ("sweep", "truncated:1e-06", world.near)]
    expected = [(*one, size) for one in scored for size in (0.1, 0.3)]
    assert len(table) == len(expected)
    for row, (run, damping, scores, size) in zip(table, expected, strict=True):
        told = agreement(changes(scores, weights, losses).of_size(size))
        assert (row["run"], row["damping"], row["step"], row["models"]) == (run, damping, size, QUERIES)
        assert (row["slope"], row["slope_low"], row["slope_high"]) == pytest.approx(told.slope)
        assert row["correlation"] == pytest.approx(told.correlation.value)
        assert f"{told.slope.value:.3f} ({told.slope.low:.2f} to {told.slope.high:.2f})" in out
    shown = " ".join(out.split())
    assert "17 trainings x 1 shared seed, rows at weights of their own" in shown
    assert "changes from the model of all rows" in shown
    drawn = (tmp_path / "p.svg").read_text()
    assert "predicted change of a query's loss (nats)" in drawn
    assert "sweep truncated:1e-06: slope" in drawn


def test_changes_of_random_subsets_are_from_their_mean(ok, world, tmp_path):
    truth = write_truth(tmp_path / "t", world.subsets, world.losses, world.numbers)
    out = " ".join(ok("evaluate", "change", truth, world.close).split())
    assert "changes from the mean over models" in out
    assert "rows dropped" in out


def test_a_step_whose_model_of_all_rows_diverged_is_refused(command, world, tmp_path):
    stepped(world, tmp_path / "t", diverged=(0,))
    assert "diverged, so a removal is missing" in refused(command, "change", tmp_path / "t", world.close)


def test_scores_of_other_rows_are_refused(command, world, tmp_path):
    stepped(world, tmp_path / "t")
    other = write_scores(tmp_path / "o", world.near[None], rows=[f"x{n}" for n in range(ROWS)])
    assert "are of different rows" in refused(command, "change", tmp_path / "t", other)


@pytest.mark.slow
def test_models_step_against_their_scores_from_the_command_line(ok, command, folder, model, corpus, queries):
    base = ("--model", model, "--dataset", corpus, "--query", queries)
    ok("score", folder / "stepping", *base)
    given = (*base, "--epochs", 1, "--batch-size", 4, "--seeds", 1, "--scores", folder / "stepping")
    out = ok("retrain", folder / "steps", *given, "--step", "0.1,0.2", "--learning-rate", 0.01)
    assert "7 (7 subsets of 12 rows at weights of their own, 2 steps a direction" in " ".join(out.split())
    truth, scores = open_truth(folder / "steps"), gf.Scores.load(folder / "stepping").values[0]
    torch.testing.assert_close(truth.weights, step_weights(scores, [0.1, 0.2]))
    assert (truth.removal, truth.settings["subsets"]["step"]) == ("mask", [0.1, 0.2])
    again = ok("retrain", folder / "steps", *given, "--step", "0.1,0.2", "--learning-rate", 0.01)
    assert "7 models, 3 queries" in again
    assert "slope" in ok("evaluate", "change", folder / "steps", folder / "stepping")
    ok("retrain", folder / "one", *given, "--step=-0.1,0.1", "--together")
    assert open_truth(folder / "one").weights.shape == (3, 12)
    for more, says in (
        (("--step", "0.1", "--removal", "drop"), "--step needs rows that keep their places"),
        (("--step", "0.1,0.1"), "each once"),
        (("--step", "a"), "--step a are not numbers: give 0.05,0.1, say"),
        (("--step", "0.1", "--remove-top", 1), "--remove-top and --step both say what a subset is"),
        (("--step", "0.1", "--subsets", 3), "--step says which subsets there are"),
    ):
        result = command("retrain", folder / "bad", *given, *more)
        assert (result.status, len(result.err.strip().splitlines())) == (2, 1)
        assert says in result.err
    assert not (folder / "bad").exists()


def test_models_step_against_scores_of_tokens(ok, command, folder, model, corpus, queries):
    """Exact scores of one training predict what it would have lost at other weights of its tokens."""
    asked, few = ("--query", queries, "--query-split", "train[:1]"), ("--epochs", 1, "--batch-size", 4)
    how = (*few, "--learning-rate", 0.01, "--optimizer", "sgd")
    rows = ("--model", model, "--dataset", corpus)
    ok("train", folder / "course", *rows, *how)
    ok(
        "score",
        folder / "exact",
        "--training",
        folder / "course",
        *asked,
        "--method",
        "magic",
        "--by",
        "token",
    )
    given = (*rows, *asked, *how, "--scores", folder / "exact", "--seeds", 1)
    ok("retrain", folder / "weighed", *given, "--init", "given", "--step", "0.01,0.02")
    truth, scores = open_truth(folder / "weighed"), gf.Scores.load(folder / "exact")
    weights, lengths = step_weights(scores.matrix, [0.01, 0.02]), scores.documents.bincount()
    torch.testing.assert_close(truth.weights, padded_weights(weights, lengths))
    assert truth.settings["subsets"]["by"] == "token"
    out = " ".join(ok("evaluate", "change", folder / "weighed", folder / "exact", "--jsonl",
                      folder / "weighed.jsonl").split())  # fmt: skip
    assert "3 trainings x 1 shared seed, tokens at weights of their own" in out
    assert [row["slope"] for row in rows_of(folder / "weighed.jsonl")] == pytest.approx([1, 1], abs=0.05)
    ok("score", folder / "by-row", *rows, *asked)
    says = "by-row scores rows, and the models of"
    assert says in refused(command, "change", folder / "weighed", folder / "by-row")
    result = command("retrain", folder / "bad", *given, "--remove-top", 1)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "exact scores tokens, not rows" in result.err


def test_rows_are_removed_for_all_queries_together(ok, folder, model, corpus, queries):
    base = ("--model", model, "--dataset", corpus, "--query", queries)
    ok("score", folder / "tail", *base)
    ok("retrain", folder / "tails", *base, "--epochs", 1, "--batch-size", 12, "--seeds", 1, "--scores",
       folder / "tail", "--remove-top", 2, "--together", "--controls", 4, "--removal", "mask")  # fmt: skip
    truth = open_truth(folder / "tails")
    assert truth.subsets.sum(1).tolist() == [12, *[10] * 5]
    best = gf.Scores.load(folder / "tail").values[0].sum(1).topk(2).indices
    assert sorted((~truth.subsets[1]).nonzero()[:, 0].tolist()) == sorted(best.tolist())
    out = " ".join(ok("evaluate", "brittleness", folder / "tails").split())
    assert "all queries together x 1 size, 4 random removals of each size" in out
    assert "rows are masked" in out
    assert "standard errors" in out
