"""`gradfn select`: the rows that scores say to keep, of the dataset that was scored and of no other."""

import json
import shutil
from importlib import import_module

import pytest
import torch
from tiny import DOCUMENTS, make_tokenizer, write_jsonl
from transformers import BertConfig, BertForMaskedLM

import gradfn as gf
from gradfn.scores import Scores

SCORE = ("--query", "The capital of Peru is", "--completion", " Lima")


@pytest.fixture(scope="module")
def rows(folder):
    """The corpus with columns that no model reads, which can be changed."""
    kinds = [{**row, "kind": "ab"[number > 6], "tags": ["x", number]} for number, row in enumerate(DOCUMENTS)]
    return write_jsonl(folder / "rows.jsonl", [{**row, "tags": [row["kind"]]} for row in kinds])


@pytest.fixture(scope="module")
def run(folder, ok, model, rows, queries):
    ok("score", folder / "run", "--model", model, "--dataset", rows, "--query", queries)
    return folder / "run"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(rows):
    return [row["id"] for row in rows]


def test_rows_are_written_with_all_their_columns(ok, run, rows, tmp_path):
    out = ok("select", run, "--keep", 0.5, "-o", tmp_path / "s.jsonl")
    assert "rows    6 of 12 (50.0%)" in out
    assert "ranked  mean over 3 queries, highest first; equal scores by row number" in out
    written, mean = lines(tmp_path / "s.jsonl"), Scores.load(run).matrix.double().mean(1)
    order = mean.argsort(descending=True, stable=True).tolist()
    original = lines(rows)
    assert [row["gradfn_row"] for row in written] == sorted(order[:6])
    for row in written:
        number = row["gradfn_row"]
        told = {"gradfn_row": number, "gradfn_score": mean[number].item(),
                "gradfn_rank": order.index(number) + 1}  # fmt: skip
        assert row == {**original[number], **told}


@pytest.mark.parametrize("rule", [("--keep", 0.3), ("--drop-worst", 3), ("--top-per-query", 2)])
@pytest.mark.parametrize("by", [(), ("--by", "kind")])
def test_the_command_selects_as_the_library(ok, run, rows, tmp_path, rule, by):
    ok("select", run, *rule, *by, "-o", tmp_path / "s.parquet")
    groups = [row["kind"] for row in lines(rows)] if by else None
    chosen = Scores.load(run).select(**{rule[0][2:].replace("-", "_"): rule[1]}, by=groups)
    written = gf.load_rows(tmp_path / "s.parquet")
    assert written["gradfn_row"][:] == chosen.rows.tolist()
    assert written["gradfn_score"][:] == chosen.scores.tolist()
    assert written["gradfn_rank"][:] == chosen.ranks.tolist()
    if chosen.queries is not None:
        ids = Scores.load(run).query_ids
        assert written["gradfn_query"][:] == [ids[number] for number in chosen.queries.tolist()]


def test_a_subset_can_be_scored_and_selected_from_again(ok, run, model, queries, tmp_path):
    ok("select", run, "--keep", 0.9, "-o", tmp_path / "part")
    ok("score", tmp_path / "again", "--model", model, "--dataset", tmp_path / "part", "--query", queries)
    out = ok("select", tmp_path / "again", "--drop-worst", 9, "-o", tmp_path / "last.json")
    assert "are of an earlier selection: replaced" in out
    assert [*gf.load_rows(tmp_path / "last.json")["gradfn_rank"][:]].count(1) == 1
    assert len(gf.load_rows(tmp_path / "last.json")) == 2


def test_of_self_influence_the_lowest_are_best(ok, model, corpus, tmp_path):
    ok("score", tmp_path / "run", "--model", model, "--dataset", corpus, "--self")
    ok("select", tmp_path / "run", "--drop-worst", 2, "-o", tmp_path / "s.jsonl")
    outliers = Scores.load(tmp_path / "run").top(2)
    left_out = {row["id"] for row in DOCUMENTS} - {*names(lines(tmp_path / "s.jsonl"))}
    assert left_out == {DOCUMENTS[row]["id"] for row in outliers.rows[0].tolist()}
    ok("select", tmp_path / "run", "--keep", 0.1, "--best", "highest", "-o", tmp_path / "o.jsonl")
    assert {*names(lines(tmp_path / "o.jsonl"))} == left_out


def test_values_of_a_training_and_joined_scores_are_selected_by(ok, model, corpus, queries, tmp_path):
    base = ("--model", model, "--dataset", corpus)
    ok("train", tmp_path / "t", *base, "--epochs", 1, "--batch-size", 6, "--values", queries)
    ok("score", tmp_path / "joined", *base, *SCORE, "--checkpoints", f"{model},{model}")
    ok("score", tmp_path / "trained", "--training", tmp_path / "t", "--query", queries, "--method", "tracin")
    for name in ("t", "joined", "trained"):
        out = ok("select", tmp_path / name, "--keep", 0.5, "--over", "max", "-o", tmp_path / f"{name}.jsonl")
        assert "note" not in out
        best = Scores.load(tmp_path / name).matrix.amax(1).argsort(descending=True, stable=True)[:6]
        assert [row["gradfn_row"] for row in lines(tmp_path / f"{name}.jsonl")] == sorted(best.tolist())


def test_one_of_several_dampings(ok, command, model, corpus, tmp_path):
    ok("score", tmp_path / "run", "--model", model, "--dataset", corpus, *SCORE, "--method", "kfac",
       "--damping", "0.1,10")  # fmt: skip
    result = command("select", tmp_path / "run", "--keep", 0.5, "-o", tmp_path / "s.jsonl")
    assert "has scores at the dampings 0.1, 10: take one with --damping 0.1" in result.err
    ok("select", tmp_path / "run", "--keep", 0.5, "-o", tmp_path / "s.jsonl", "--damping", "10")
    best = Scores.load(tmp_path / "run").of_damping("10").select(keep=0.5)
    assert [row["gradfn_row"] for row in lines(tmp_path / "s.jsonl")] == best.rows.tolist()


def test_masked_rows_are_masked_again(ok, corpus, tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=6, num_hidden_layers=1,
                        num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in DOCUMENTS])
    ok("score", tmp_path / "run", "--model", tmp_path / "bert", "--dataset", rows, "--self", "--seed", 3)
    out = ok("select", tmp_path / "run", "--keep", 0.5, "-o", tmp_path / "s.csv")
    assert "note" not in out


def refused(command, *arguments):
    result = command("select", *arguments)
    assert (result.status, result.err.count("\n"), result.out) == (2, 1, "")
    return result.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep", 0.5), "nowhere to write the rows to: give --output subset.jsonl"),
        (("-o", "s.jsonl"), "rows are selected by one rule, and none is given: give --keep, --drop-worst or"),
        (("--keep", 0.5, "--drop-worst", 2, "-o", "s.jsonl"), "and --keep and --drop-worst are given"),
        (("--keep", 1.5, "-o", "s.jsonl"), "--keep is a share of the rows, above 0 and up to 1, not 1.5"),
        (("--drop-worst", 12, "-o", "s.jsonl"), "of which --drop-worst 12 would leave none"),
        (("--top-per-query", 13, "-o", "s.jsonl"), "--top-per-query 13 would take more"),
        (("--drop-worst", 6, "--by", "kind", "-o", "s.jsonl"), "group 'b' has 5 rows"),
        (("--keep", 0.5, "--by", "colour", "-o", "s.jsonl"), "no column 'colour' in the dataset, which"),
        (("--keep", 0.5, "--by", "tags", "-o", "s.jsonl"), "--by tags holds lists"),
        (("--keep", 0.5, "-o", "s.txt"), "s.txt has no ending of a dataset: give one of .jsonl"),
        (("--keep", 0.5, "-o", "s.csv"), "column 'tags' holds List, which a .csv file cannot hold"),
        (("--top-per-query", 2, "--over", "max", "-o", "s.jsonl"), "leave out --over"),
        (("--keep", 0.5, "-o", "no/s.jsonl"), "give a place in a folder that exists"),
        (("--keep", 0.5, "--damping", "3", "-o", "s.jsonl"), "there is no damping '3'"),
    ],
)  # fmt: skip
def test_what_cannot_be_selected_is_refused(command, run, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(command, run, *options)
    assert [*tmp_path.iterdir()] == []


def test_nothing_is_replaced_unasked(ok, command, run, rows, tmp_path):
    (tmp_path / "s.jsonl").write_text("mine")
    assert "exists: give another name, or --overwrite" in refused(
        command, run, "--keep", 0.5, "-o", tmp_path / "s.jsonl"
    )
    assert (tmp_path / "s.jsonl").read_text() == "mine"
    before = rows.read_text()
    assert "is the dataset itself" in refused(command, run, "--keep", 0.5, "-o", rows, "--overwrite")
    assert rows.read_text() == before
    ok("select", run, "--keep", 0.5, "-o", tmp_path / "s.jsonl", "--overwrite")
    assert len(lines(tmp_path / "s.jsonl")) == 6


def test_a_dataset_that_changed_is_refused(ok, command, run, rows, tmp_path):
    here, out = tmp_path / "rows.jsonl", ("--keep", 0.5, "-o", tmp_path / "s.jsonl")
    own = lines(rows)
    for changed, words in (
        (own[:-1], "has scores of 12 ('doc-iraq')"),
        ([*own[:3], {**own[3], "id": "doc-other"}, *own[4:]], "and"),
        (own[::-1], "have the same ids in another order"),
        ([*own[:3], {**own[3], "text": "The capital of Japan is Kyoto."}, *own[4:]],
         "are not what"),
    ):  # fmt: skip
        write_jsonl(here, changed)
        assert words in refused(command, run, *out, "--dataset", here)
    write_jsonl(here, [{**row, "kind": "c", "further": 1} for row in own])  # no model read these
    assert "note" not in ok("select", run, *out, "--dataset", here, "--by", "further")


def test_rows_whose_ids_are_longer_than_a_store_holds_are_those_that_were_scored(
    ok, command, model, tmp_path
):
    long = ["x" * 5000, "y" * 5000]
    rows = [{"id": name, "text": row["text"]} for name, row in zip(long, DOCUMENTS, strict=False)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    ok("score", tmp_path / "run", "--model", model, "--dataset", data, *SCORE)
    ok("select", tmp_path / "run", "--keep", 1, "-o", tmp_path / "all.jsonl")
    assert [row["id"] for row in lines(tmp_path / "all.jsonl")] == long
    write_jsonl(data, rows[::-1][:1])
    assert len(refused(command, tmp_path / "run", "--keep", 1, "-o", tmp_path / "s.jsonl")) < 1000


def test_chunks_and_tokens_are_not_rows(ok, command, model, rows, tmp_path):
    base = ("--model", model, "--dataset", rows, *SCORE)
    out = ("--keep", 0.5, "-o", tmp_path / "s.jsonl")
    ok("score", tmp_path / "chunks", *base, "--chunk-length", 8)
    assert "has scores of chunks of rows" in refused(command, tmp_path / "chunks", *out)
    ok("score", tmp_path / "tokens", *base, "--by", "token")
    assert "scores tokens, not rows: score with --by example" in refused(command, tmp_path / "tokens", *out)


def test_rows_whose_reader_is_gone_are_compared_by_name(ok, command, run, corpus, tmp_path):
    scores = Scores.load(run)
    Scores(scores.values, scores.row_ids, scores.query_ids).save(tmp_path / "python")
    out = ("--keep", 0.5, "-o", tmp_path / "s.jsonl")
    assert "no dataset is known for" in refused(command, tmp_path / "python", *out)
    told = ok("select", tmp_path / "python", *out, "--dataset", corpus)
    assert "rows were compared by their names alone, since no command of gradfn scored them" in told


def test_rows_whose_model_is_gone_are_compared_by_name(ok, model, corpus, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    ok("score", tmp_path / "run", "--model", tmp_path / "model", "--dataset", corpus, *SCORE)
    shutil.rmtree(tmp_path / "model")
    out = ok("select", tmp_path / "run", "--keep", 0.5, "-o", tmp_path / "s.jsonl")
    assert "rows were compared by their names alone" in out


def test_a_rule_that_cannot_be_is_refused_before_rows_are_read(command, run, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("gradfn.cli.select"), "load_rows", None)
    for rule, words in (
        (("--keep", 2), "is a share of the rows"),
        (("--drop-worst", 12), "would leave none"),
    ):
        result = command("select", run, *rule, "-o", tmp_path / "s.jsonl")
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err
