"""`gradfn report`: pages of real runs, what they say of the model and the rows, and what is refused."""

import json
import shutil

import pytest
import torch
from pages import tree
from tiny import DOCUMENTS, QUERIES, make_model, write_jsonl

from gradfn.scores import Scores


@pytest.fixture(scope="module")
def rows(folder):
    """The documents with a column of metadata."""
    return write_jsonl(
        folder / "rows.jsonl", [{**row, "kind": f"kind {n}"} for n, row in enumerate(DOCUMENTS)]
    )


@pytest.fixture(scope="module")
def base(model, rows, queries):
    return ("--model", model, "--dataset", rows, "--query", queries, "--method", "grad_dot")


@pytest.fixture(scope="module")
def runs(ok, folder, base):
    """Runs by row at two dampings, by token, and by head."""
    ok("score", folder / "rows", *base[:-1], "ekfac", "--damping", "0.1,1")
    ok("score", folder / "tokens", *base, "--by", "token")
    ok("score", folder / "heads", *base, "--by", "head")
    return [folder / name for name in ("rows", "tokens", "heads")]


@pytest.fixture(scope="module")
def page(ok, folder, runs):
    told = ok("report", *runs, "-o", folder / "page.html", "--top", 3)
    assert "page.html [12 rows, 3 queries, 3 runs; " in told
    return tree((folder / "page.html").read_text())


def written(path):
    return tree(path.read_text())


def notes(page):
    return [one.content for one in page.of_class("note")]


def test_a_page_shows_answers_sources_columns_and_the_commands(page, runs):
    assert notes(page) == []
    first = next(one for one in page.all("section") if one.attributes["class"] == "query")
    assert "The capital of France is → Paris" in " ".join(first.content.split())
    assert "The model does not know this answer, so there may be no source: probability" in first.content
    assert "known source doc-france" in first.of_class("about")[0].content
    assert "BM25 (words alone) finds doc-france" in " ".join(first.content.split())
    assert "kind 3" in page.content
    (footer,) = page.all("footer")
    for part in (
        f"gradfn report {runs[0]} ",
        "--output",
        f"gradfn score {runs[1]} --model",
        "model.fingerprint",
    ):
        assert part in footer.content


def test_tokens_of_a_row_are_summed_and_the_strongest_is_marked(ok, folder, runs):
    ok("report", runs[1], "-o", folder / "tokens.html", "--top", 12)
    scores = Scores.load(runs[1])
    page = written(folder / "tokens.html")
    first = next(one for one in page.all("section") if one.attributes["class"] == "query")
    cards = [one for one in first.all("li") if one.attributes.get("class") == "row"]
    assert len(cards) == 12
    for card in cards:
        row = int(card.attributes["data-row"])
        values = scores.values[0, scores.documents == row, 0]
        shown = float(card.of_class("score")[0].content.replace("\u2212", "-"))
        assert shown == pytest.approx(float(values.sum()), rel=1e-3)
        text = card.of_class("text")[0]
        assert text.content.removeprefix("<s>") == DOCUMENTS[row]["text"]
        side = "p4" if values[values.abs().argmax()] > 0 else "n4"
        assert text.of_class(side)


def test_runs_that_lack_tokens_or_blocks_say_how_to_get_them(ok, folder, runs, page):
    ok("report", runs[0], "-o", folder / "plain.html")
    plain = written(folder / "plain.html")
    (footer,) = plain.all("footer")
    assert "score with --by token" in footer.content
    assert "score with --by head" in footer.content
    assert not plain.of_class("heat")
    assert page.of_class("heat")
    (footer,) = page.all("footer")
    assert "To see more" not in footer.content


def test_a_model_that_changed_or_is_gone_is_not_asked(ok, folder, base, model, corpus, tmp_path):
    own = shutil.copytree(model, tmp_path / "model")
    ok("score", tmp_path / "run", "--model", own, *base[2:])
    ok("report", tmp_path / "run", "-o", tmp_path / "skipped.html", "--no-model")
    make_model(seed=5).save_pretrained(own)
    ok("report", tmp_path / "run", "-o", tmp_path / "changed.html")
    shutil.rmtree(own)
    ok("report", tmp_path / "run", "-o", tmp_path / "gone.html")
    for name, words in (
        ("skipped", "no model was loaded"),
        ("changed", "has other weights than the one that was scored"),
        ("gone", "the model's own answers are not shown, because"),
    ):
        page = written(tmp_path / f"{name}.html")
        (note,) = notes(page)
        assert words in note
        assert not [one for one in page.of_class("answer") if "The model" in one.content]
        assert DOCUMENTS[0]["text"] in page.content


def test_rows_and_queries_that_changed_are_not_shown(ok, base, tmp_path, model):
    rows, queries = (
        write_jsonl(tmp_path / f"{name}.jsonl", of) for name, of in (("r", DOCUMENTS), ("q", QUERIES))
    )
    ok("score", tmp_path / "run", "--model", model, "--dataset", rows, "--query", queries)
    write_jsonl(rows, [{**row, "text": row["text"] + " So."} for row in DOCUMENTS])
    write_jsonl(queries, [{**row, "completion": " Rome"} for row in QUERIES])
    ok("report", tmp_path / "run", "-o", tmp_path / "page.html")
    page = written(tmp_path / "page.html")
    assert [note.split(" have changed")[0] for note in notes(page)] == ["run: the queries", "run: the rows"]
    assert "So." not in page.content
    assert "Rome" not in page.content


def test_rows_against_themselves_are_a_page_to_decide_on(ok, folder, model, rows):
    ok("score", folder / "own", "--self", "--model", model, "--dataset", rows)
    ok("report", folder / "own", "-o", folder / "own.html")
    page, scores = written(folder / "own.html"), Scores.load(folder / "own")
    cards = [one for one in page.all("li") if one.attributes.get("class") == "row"][:12]
    assert [int(card.attributes["data-row"]) for card in cards] == scores.top(12).rows[0].tolist()
    boxes = [one.attributes for one in cards[0].all("input")]
    assert [(box["type"], box["name"], box["value"]) for box in boxes] == [
        ("checkbox", name, cards[0].attributes["data-row"]) for name in ("wrong", "right")
    ]
    assert "doc-" in cards[0].of_class("near")[0].content
    assert "Which rows are suspicious?" in page.content


def test_values_inside_a_training_are_lines_that_end_at_the_scores(ok, folder, model, corpus, queries):
    ok("train", folder / "valued", "--model", model, "--dataset", corpus, "--batch-size", 4, "--epochs", 2,
       "--values", queries)  # fmt: skip
    ok("report", folder / "valued", "-o", folder / "valued.html", "--top", 4)
    page, scores = written(folder / "valued.html"), Scores.load(folder / "valued")
    caption = page.of_class("time")[0].content
    assert "first step to step 6" in caption
    low, high = (
        float(part.replace("\u2212", "-").strip(" \n")) for part in caption.split("from ")[1].split(" to ")
    )
    lines = [*page.of_class("lines")[0].all("polyline")]
    assert len(lines) == 8
    for line in lines:
        end = float(line.attributes["points"].split(",")[-1])
        score = float(scores.values[0, int(line.attributes["data-row"]), 0])
        assert low + (high - low) * (1 - end / 24) == pytest.approx(score, abs=(high - low) * 2e-3)
    assert notes(page) == []


def test_predicted_changes_are_drawn_beside_real_ones(ok, folder, runs, base):
    ok("retrain", folder / "truth", *base[:-2], "--subsets", 3, "--seeds", 1, "--epochs", 1,
       "--batch-size", 4)  # fmt: skip
    ok("report", runs[2], "-o", folder / "change.html", "--truth", folder / "truth")
    page = written(folder / "change.html")
    (figure,) = page.of_class("scatter")
    told = ok("evaluate", "change", folder / "truth", runs[2], "--jsonl", folder / "change.jsonl")
    (line,) = [json.loads(one) for one in (folder / "change.jsonl").read_text().splitlines()]
    assert told
    assert f"slope {line['slope']:.3f}" in figure.content
    assert len([*figure.all("circle")]) == 9


def test_what_cannot_be_a_page_is_refused_in_a_sentence(
    command, folder, runs, page, store, model, queries, corpus
):
    odd = folder / "odd"
    Scores(torch.zeros(1, 2, 1), ["a", "b"], ["q"]).save(odd)
    wrong = folder / "nan"
    Scores(torch.full((1, 2, 1), torch.nan), ["a", "b"], ["q"]).save(wrong)
    out = ("-o", folder / "new.html")
    for given, words in (
        ((folder / "absent", *out), "does not exist"),
        ((store, *out), "has no scores.h5"),
        ((wrong, *out), "are no finite numbers"),
        ((runs[0], odd, *out), "are of different rows"),
        ((runs[0], runs[0], *out), "a run is given twice"),
        ((runs[0],), "give --output page.html"),
        ((runs[0], "-o", folder / "page.html"), "exists: add --overwrite"),
        ((runs[0], "-o", folder), "is a folder"),
        ((runs[0], "-o", folder / "no" / "page.html"), "there is no folder"),
        ((runs[0], *out, "--top", 0), "must be 1 or more, not 0"),
        ((runs[0], *out, "--truth", folder / "absent"), "does not exist"),
    ):
        result = command("report", *given)
        assert (result.status, result.err.count("\n"), result.out) == (2, 1, ""), result.err
        assert words in result.err, result.err
    assert not (folder / "new.html").exists()
