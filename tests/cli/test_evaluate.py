import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from evaluated import (
    QUERIES,
    QUERY_IDS,
    ROW_IDS,
    ROWS,
    SEEDS,
    SOURCES,
    SUBSETS,
    World,
    refused,
    write_scores,
    write_truth,
)
from tiny import write_jsonl

from gradfn.evaluate.bootstrap import mean_estimate
from gradfn.evaluate.ceiling import noise_ceiling
from gradfn.evaluate.correlation import correlation
from gradfn.evaluate.lds import lds
from gradfn.evaluate.mislabel import auroc, average_precision, precision_at
from gradfn.evaluate.overlap import jaccard, top_overlap
from gradfn.evaluate.retrieval import recall_at, reciprocal_rank
from gradfn.evaluate.selection import halves
from gradfn.store import open_writer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def line_of(out, name):
    return next(line for line in out.splitlines() if line.startswith(name))


def test_lds_shows_what_the_library_says(ok, world, tmp_path):
    out = ok("evaluate", "lds", world.truth, world.close, "--csv", tmp_path / "t.csv",
             "--jsonl", tmp_path / "t.jsonl", "--parquet", tmp_path / "t.parquet")  # fmt: skip
    (row,) = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    expected = lds(world.near, world.subsets, world.means()).mean().item()
    ceiling = noise_ceiling(world.losses, world.numbers, seeds=torch.arange(SEEDS).repeat(SUBSETS))
    assert row["lds"] == pytest.approx(expected)
    assert row["ceiling"] == pytest.approx(ceiling)
    assert row["share_of_ceiling"] == pytest.approx(expected / ceiling)
    assert row["pearson"] == pytest.approx(
        lds(world.near, world.subsets, world.means(), correlate="pearson").mean().item()
    )
    assert row["lds_low"] < row["lds"] < row["lds_high"]
    assert row["ceiling_low"] < row["ceiling"] < row["ceiling_high"]
    assert (row["subsets"], row["models"], row["diverged"], row["queries"]) == (SUBSETS, 40, 0, QUERIES)
    assert line_of(out, "models").split() == [
        "models",
        "20",
        "subsets",
        "x",
        "2",
        "shared",
        "seeds,",
        "of",
        "10",
        "rows",
    ]
    shown = line_of(out, "close").split()
    assert shown[1] == f"{expected:.3f}"
    assert f"{expected / ceiling:.0%}" in shown
    assert f"{ceiling:.3f}" in line_of(out, "noise ceiling")
    assert "damping" not in out
    assert pyarrow.parquet.read_table(tmp_path / "t.parquet").to_pylist() == [row]
    with (tmp_path / "t.csv").open() as file:
        assert float(next(csv.DictReader(file))["lds"]) == pytest.approx(expected)


def test_a_damping_is_chosen_on_the_other_half_and_every_run_is_reported_on_this_one(ok, world, tmp_path):
    out = ok("evaluate", "lds", world.truth, world.sweep, world.close, "--jsonl", tmp_path / "t.jsonl",
             "--seed", 3, "--plot", tmp_path / "p.svg")  # fmt: skip
    sweep, close = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    report = halves(QUERIES, seed=3).report
    expected = lds(world.near[:, report], world.subsets, world.means()[:, report]).mean().item()
    assert (sweep["damping"], close["damping"]) == ("truncated:1e-06", "")
    assert sweep["lds"] == close["lds"] == pytest.approx(expected)
    assert sweep["queries"] == close["queries"] == 4
    assert "4 of 8; dampings are chosen on the other 4" in out
    assert "LDS against damping" in (tmp_path / "p.svg").read_text()


def test_diverged_models_are_left_out_and_counted(ok, world, tmp_path):
    truth = write_truth(tmp_path / "truth", world.subsets, world.losses, world.numbers, diverged=(0, 1, 4))
    out = ok("evaluate", "lds", truth, world.close, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    kept = torch.tensor([1, *range(3, SUBSETS)])
    expected = lds(world.near, world.subsets[kept], world.means()[kept]).mean().item()
    assert row["lds"] == pytest.approx(expected)
    whole = torch.isin(world.numbers, kept)
    seeds = torch.arange(SEEDS).repeat(18)
    assert row["ceiling"] == noise_ceiling(world.losses[whole], world.numbers[whole], seeds=seeds)
    assert (row["subsets"], row["models"], row["diverged"]) == (18, 40, 3)
    shown = " ".join(out.split())
    assert "3 of 40 models; left out for the means to be over the same seeds: 2 subsets" in shown
    assert "18 subsets x 2 shared seeds, of 10 rows" in out


def test_models_with_seeds_of_their_own_lose_no_more_than_those_that_diverged(ok, world, tmp_path):
    """A subset's mean over the models left, and a ceiling of subsets that are split each on its own."""
    lost = torch.tensor([0, 1, 4])
    truth = write_truth(
        tmp_path / "truth", world.subsets, world.losses, world.numbers, diverged=lost.tolist(),
        independent=True,
    )  # fmt: skip
    out = " ".join(ok("evaluate", "lds", truth, world.close, "--jsonl", tmp_path / "t.jsonl").split())
    row = json.loads((tmp_path / "t.jsonl").read_text())
    means = world.means()
    means[2] = world.losses[5]
    assert row["lds"] == pytest.approx(lds(world.near, world.subsets[1:], means[1:]).mean().item())
    left = ~torch.isin(torch.arange(40), lost)
    assert row["ceiling"] == noise_ceiling(world.losses[left], world.numbers[left])
    assert (row["subsets"], row["seeding"]) == (19, "independent")
    assert "19 subsets x 2 independent seeds, of 10 rows" in out
    assert "3 of 40 models, which are in no mean" in out


def test_one_seed_has_no_ceiling_and_says_so(ok, world, tmp_path):
    truth = write_truth(tmp_path / "one", world.subsets, world.means(), torch.arange(SUBSETS))
    out = ok("evaluate", "lds", truth, world.close, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert row["ceiling"] is row["ceiling_low"] is row["share_of_ceiling"] is None
    assert "unknown, with one seed a subset: gradfn retrain --seeds 2 tells it" in out
    assert "of ceiling" not in out


def test_queries_with_constant_scores_are_told(ok, world, tmp_path):
    scores = world.near.clone()
    scores[:, :2] = 0.0
    run = write_scores(tmp_path / "flat", scores[None])
    assert "flat has one score for all rows of 2 queries, which count as 0" in " ".join(
        ok("evaluate", "lds", world.truth, run).split()
    )


def test_loo_takes_the_models_without_one_row(ok, world, tmp_path):
    subsets = torch.cat([world.subsets[:2], ~torch.eye(ROWS, dtype=torch.bool), torch.ones(1, ROWS).bool()])
    losses = torch.randn(13, QUERIES, generator=torch.Generator().manual_seed(1)).double()
    truth = write_truth(tmp_path / "loo", subsets, losses, torch.arange(13))
    ok("evaluate", "loo", truth, world.close, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    # Without a proponent the loss is higher.
    assert row["lds"] == pytest.approx(correlation(world.near, losses[2:12]).mean().item())
    assert row["subsets"] == 10


def test_mislabel_takes_self_influence_and_a_column(ok, tmp_path):
    generator = torch.Generator().manual_seed(0)
    wrong = torch.arange(ROWS) % 3 == 0
    scores = torch.randn(2, ROWS, 1, generator=generator) + wrong[:, None]
    marked = [
        {"id": name, "text": "a", "is_wrong": int(bad)} for name, bad in zip(ROW_IDS, wrong, strict=True)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", marked)
    run = write_scores(tmp_path / "self", scores, dampings=("1", "0.1"), queries=["self-influence"],
                       settings={"query": "self", "data": {"path": str(data), "split": "train"}})  # fmt: skip
    out = ok("evaluate", "mislabel", run, "--jsonl", tmp_path / "t.jsonl")
    table = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for row, damping, column in zip(table, ("1", "0.1"), scores[:, :, 0], strict=True):
        assert row == {"run": "self", "damping": damping, "auroc": auroc(column, wrong), "k": 4,
                       "average_precision": average_precision(column, wrong),
                       "precision_at_k": precision_at(column, wrong, 4)}  # fmt: skip
    assert "10, 4 of them wrong (40.0%)" in out
    assert f"{table[0]['auroc']:.3f}" in out
    assert ok("evaluate", "mislabel", run, "--dataset", data, "--top", 2).count("precision@2") == 1


def test_recall_counts_the_queries_with_a_source_among_the_rows(ok, world, tmp_path):
    named = [f"r{n}" for n in SOURCES.tolist()]
    named[2], named[5] = None, "elsewhere"
    rows = [{"id": name, "text": "a", "source": at} for name, at in zip(QUERY_IDS, named, strict=True)]
    queries = write_jsonl(tmp_path / "queries.jsonl", rows)
    out = ok("evaluate", "recall", world.close, world.sweep, "--query", queries, "--top", 3,
             "--jsonl", tmp_path / "t.jsonl")  # fmt: skip
    table = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [(row["run"], row["damping"]) for row in table] == [
        ("close", ""), ("sweep", "1"), ("sweep", "truncated:1e-06")
    ]  # fmt: skip
    asked = torch.tensor([0, 1, 3, 4, 6, 7])
    sources = torch.zeros(ROWS, 6, dtype=torch.bool)
    sources[SOURCES[asked], torch.arange(6)] = True
    for row, scores in zip(table, (world.near, world.far, world.near), strict=True):
        scores = scores[:, asked]
        for name, each in (("recall_at_1", recall_at(scores, sources, 1)),
                           ("recall_at_k", recall_at(scores, sources, 3)),
                           ("mrr", reciprocal_rank(scores, sources))):  # fmt: skip
            assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == mean_estimate(each)
        assert (row["k"], row["queries"]) == (3, 6)
    assert "6 of 8 have a source among the rows" in out
    assert "recall@3" in out


def test_overlap_compares_two_runs(ok, world, tmp_path):
    other = write_scores(tmp_path / "far", world.far[None])
    out = ok("evaluate", "overlap", world.close, other, "--top", 3, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    for name, each in (("overlap", top_overlap(world.near, world.far, 3)),
                       ("jaccard", jaccard(world.near, world.far, 3)),
                       ("spearman", correlation(world.near, world.far))):  # fmt: skip
        assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == mean_estimate(each)
        assert f"{row[name]:.3f}" in out
    assert "30.0% of them agree by chance" in out


def test_runs_of_one_name_are_told_by_their_paths(ok, world, tmp_path):
    (tmp_path / "b").mkdir()
    other = write_scores(tmp_path / "b" / "close", world.far[None])
    ok("evaluate", "lds", world.truth, world.close, other, "--jsonl", tmp_path / "t.jsonl")
    table = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert [row["run"] for row in table] == [str(world.close), str(other)]


def test_joined_scores_are_read_by_their_first_checkpoint(ok, world, tmp_path):
    first = {"data": {"fingerprint": "d"}}
    run = write_scores(
        tmp_path / "joined", torch.stack([world.far, world.near]), dampings=("1", "0.1"),
        settings={"checkpoints": [{"settings": first}]},
    )  # fmt: skip
    ok("evaluate", "lds", world.truth, run, "--jsonl", tmp_path / "t.jsonl")
    assert json.loads((tmp_path / "t.jsonl").read_text())["damping"] == "0.1"


def test_scores_of_other_rows_queries_or_data_are_refused(command, world, tmp_path):
    scores = world.near[None]
    renamed = write_scores(tmp_path / "rows", scores, rows=[*ROW_IDS[:9], "x"])
    err = refused(command, "lds", world.truth, renamed)
    assert "are of different rows, 10 ('x') there and 10 ('r9') here: make both with" in err
    fewer = write_scores(tmp_path / "fewer", scores[:, :, :7], queries=QUERY_IDS[:7])
    assert "are of different queries, 7 there and 8 ('q7') here" in refused(
        command, "lds", world.truth, fewer
    )
    for key, noun in (("data", "training data"), ("query", "queries")):
        other = write_scores(tmp_path / key, scores, settings={key: {"fingerprint": "e"}})
        err = refused(command, "lds", world.truth, other)
        assert f"are of different {noun} under the same names (other texts or labels)" in err
        assert f"are of different {noun}" in refused(command, "overlap", world.close, other)


def test_what_cannot_be_evaluated_is_refused_in_one_sentence(command, world, tmp_path):
    few = write_truth(tmp_path / "few", world.subsets, world.losses[:2], torch.arange(2))
    assert "a correlation needs 3 subsets or more, not 2: retrain on" in refused(
        command, "lds", few, world.close
    )
    assert "0 of the 40 retrained models leave out one row each" in refused(
        command, "loo", world.truth, world.close
    )
    assert "is given twice" in refused(command, "lds", world.truth, world.close, world.close)
    assert "has no truth.h5" in refused(command, "lds", world.close, world.close)
    far = write_scores(tmp_path / "far", world.far[None])
    assert "number of rows, 10, not 11" in refused(command, "overlap", world.close, far, "--top", 11)
    lost = write_scores(
        tmp_path / "lost", torch.where(torch.arange(QUERIES) == 1, torch.nan, world.near)[None]
    )
    assert "10 scores in" in refused(command, "lds", world.truth, lost)


def test_scores_of_tokens_are_refused(command, world, tmp_path):
    with open_writer(tmp_path / "tokens", "scores", {}, 2) as writer:
        writer.write(0, 2, {"scores": np.zeros((2, 1, 1), np.float32), "rows/document": np.arange(2)})
        writer.finish({"queries/id": ["q"], "dampings": [""], "documents/id": ["a", "b"]})
    err = refused(command, "lds", world.truth, tmp_path / "tokens")
    assert "scores tokens, not rows: score with --by example" in err


def test_a_column_that_is_not_0_or_1_is_refused(command, tmp_path):
    run = write_scores(tmp_path / "self", torch.zeros(1, ROWS, 1), queries=["self-influence"],
                       settings={"query": "self"})  # fmt: skip
    rows = [{"id": name, "text": "a", "is_wrong": 0, "note": n} for n, name in enumerate(ROW_IDS)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    ask = ("mislabel", run, "--dataset", data)
    assert "0 of 10 rows are wrong, but detection needs wrong and right ones" in refused(command, *ask)
    err = refused(command, *ask, "--label-column", "note")
    assert "row 2 has 2 in column 'note', expected 1 for a wrong row and 0 for a right one: mend it" in err
    assert "no column 'bad' in the dataset" in refused(command, *ask, "--label-column", "bad")
    other = write_jsonl(tmp_path / "other.jsonl", rows[:9])
    assert "has scores of 10 ('r9') and" in refused(command, "mislabel", run, "--dataset", other)
    assert "no dataset is known" in refused(command, "mislabel", run)


def test_scores_of_one_query_are_no_self_influence(command, tmp_path):
    run = write_scores(tmp_path / "one", torch.zeros(1, ROWS, 1), queries=["q0"])
    err = refused(command, "mislabel", run)
    assert "has scores for 1 query, expected those of every row with itself: make them with gradfn" in err


def test_sources_may_be_numbers_of_which_some_are_missing(ok, tmp_path):
    run = write_scores(tmp_path / "run", torch.eye(ROWS)[None, :, :QUERIES], rows=[*map(str, range(ROWS))])
    cells = ["0", "", "2", "3", "", "5", "6", "7"]
    lines = [f"{name},a,{cell}" for name, cell in zip(QUERY_IDS, cells, strict=True)]
    asked = tmp_path / "q.csv"
    asked.write_text("\n".join(["id,prompt,source", *lines]) + "\n")
    ok("evaluate", "recall", run, "--query", asked, "--top", 1, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert (row["recall_at_1"], row["queries"]) == (1.0, 6)


@pytest.mark.parametrize("seed", [99999999999999999999, -(1 << 63)])
@pytest.mark.parametrize("name", ["lds", "loo"])
def test_a_seed_that_is_too_large_is_refused(command, world, name, seed):
    err = refused(command, name, world.truth, world.close, "--seed", seed)
    assert f"--seed {seed} is no number of this machine: give one below" in err


def test_known_sources_must_be_known(command, world, tmp_path):
    assert "no dataset of queries is known for close: give" in refused(command, "recall", world.close)
    rows = [{"id": name, "text": "a"} for name in QUERY_IDS]
    plain = write_jsonl(tmp_path / "plain.jsonl", rows)
    assert "has no column 'source'" in refused(command, "recall", world.close, "--query", plain)
    lost = write_jsonl(tmp_path / "lost.jsonl", [{**row, "source": "x"} for row in rows])
    assert "none of the sources" in refused(command, "recall", world.close, "--query", lost)
    assert "number of rows, 10, not 11" in refused(
        command, "recall", world.close, "--query", lost, "--top", 11
    )


def test_files_that_cannot_be_written_are_refused_before_any_work(command, world, tmp_path):
    (tmp_path / "t.csv").touch()
    ask = ("lds", world.truth, world.close)
    assert "exists: give another name, or --overwrite" in refused(command, *ask, "--csv", tmp_path / "t.csv")
    assert "cannot plot to" in refused(command, *ask, "--plot", tmp_path / "t.doc")


def test_dampings_of_scores_cannot_overlap(command, world):
    err = refused(command, "overlap", world.close, world.sweep)
    assert "has scores for 2 dampings, and an overlap is of two scores: score with one --damping" in err
    assert "expected those of every row with itself: make them with gradfn score --self" in refused(
        command, "mislabel", world.close
    )


def test_all_rows_of_an_id_are_its_source(ok, world, tmp_path):
    """Pieces of one document: the first of them has the lowest score, the second the highest."""
    scores = torch.arange(ROWS).float()[:, None].expand(ROWS, QUERIES)
    run = write_scores(tmp_path / "run", scores[None], rows=["r0", *ROW_IDS[1:-1], "r0"])
    asked = write_jsonl(
        tmp_path / "q.jsonl", [{"id": name, "prompt": "a", "source": "r0"} for name in QUERY_IDS]
    )
    ok("evaluate", "recall", run, "--query", asked, "--top", 2, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert (row["recall_at_1"], row["recall_at_k"], row["mrr"]) == (0.5, 0.5, 1.0)


def test_a_truth_of_models_that_all_diverged_is_told(command, world, tmp_path):
    gone = range(len(world.numbers))
    truth = write_truth(tmp_path / "t", world.subsets, world.losses, world.numbers, diverged=[*gone])
    for name in ("lds", "loo"):
        said = refused(command, name, truth, world.close)
        assert f"all 40 models of {truth} diverged: retrain with a lower --learning-rate" in said


def test_a_seed_that_diverged_is_left_out_of_all_subsets(ok, world, tmp_path):
    truth = write_truth(
        tmp_path / "t",
        world.subsets,
        world.losses,
        world.numbers,
        diverged=[*range(4, len(world.numbers), 2)],
    )
    out = " ".join(ok("evaluate", "lds", truth, world.close).split())
    assert "unknown, with one seed left of each subset: retrain with a lower --learning-rate" in out
    assert "18 of 40 models; left out for the means to be over the same seeds: 1 seed" in out
    assert "20 subsets x 1 shared seed" in out


def test_a_run_is_one_however_it_is_spelled(command, world):
    assert "is given twice" in refused(command, "overlap", world.close, f"{world.close}/")


def test_rows_in_another_order_are_told(command, world, tmp_path):
    other = write_scores(tmp_path / "other", world.near[None], rows=ROW_IDS[::-1])
    assert "have the same rows in another order" in refused(command, "overlap", world.close, other)


def test_one_query_has_no_interval(ok, world, tmp_path):
    one = write_scores(tmp_path / "one", world.near[None, :, :1], queries=QUERY_IDS[:1])
    two = write_scores(tmp_path / "two", world.far[None, :, :1], queries=QUERY_IDS[:1])
    out = ok("evaluate", "overlap", one, two, "--top", 3, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert row["overlap"] is not None
    assert (row["overlap_low"], row["overlap_high"]) == (None, None)
    assert "nan" not in out


def test_info_tells_a_truth_by_its_models_and_what_was_removed(ok, world, tmp_path):
    assert "models 40, rows outside a subset dropped" in " ".join(ok("info", world.truth).split())
    masked = write_truth(tmp_path / "t", world.subsets, world.losses, world.numbers,
                         settings={"removal": "mask"})  # fmt: skip
    assert "models 40, rows outside a subset masked" in " ".join(ok("info", masked).split())
