"""`gradfn smoothness RUN`: whether a training is smooth enough for its derivatives to mean something."""

import json
import shutil

import pytest
from tiny import DOCUMENTS, write_jsonl

import gradfn as gf
from gradfn.train import Training, metasmoothness
from gradfn.train.course import Course


@pytest.fixture(scope="module")
def rows(folder):
    return write_jsonl(folder / "five.jsonl", DOCUMENTS[:5])


@pytest.fixture(scope="module")
def run(ok, folder, model, rows):
    ok("train", folder / "measured", "--model", model, "--dataset", rows, "--epochs", 1, "--batch-size", 3,
       "--optimizer", "sgd", "--learning-rate", 0.01)  # fmt: skip
    return folder / "measured"


def facts_of(told):
    return dict(line.split(maxsplit=1) for line in told.splitlines() if " " in line)


def test_it_is_the_librarys_and_scores_know_it(ok, run, model, rows, queries, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    score = ("score", "--training", run, "--query", queries, "--method", "magic", "--show", 0)
    note = facts_of(ok(*score))["note"]
    assert note == (
        f"whether these derivatives say what removals do is told by: gradfn smoothness {run} --query "
        f"{queries}"
    )
    lines = facts_of(ok("smoothness", run, "--query", queries, "--fraction", 0.04, "--directions", 1))
    net, tokens = gf.load_model(model), gf.load_tokenizer(model)
    data, asked = (
        gf.tokenize(gf.load_rows(rows), tokens),
        gf.tokenize(gf.load_rows(queries), tokens, prompt_column="prompt", completion_column="completion"),
    )
    course = Course(gf.causal_lm_loss(net), data, Training(1, 3, 0.01, "sgd"))
    found = metasmoothness(course, gf.model.params_of(net), asked, h=0.2, directions=1)
    assert lines["agreement"].startswith(f"{found.agreement:.3f}, ")
    assert lines["bend"].startswith(f"{found.bend:.3f}, ")
    assert lines["removals"] == "of 0.04 of 5 rows, as seen by 3 queries in 3 trainings"
    assert found.verdict == "smooth"
    assert lines["verdict"] == "smooth: scores of --method magic say what such removals do"
    held = json.loads((run / "smoothness.json").read_text())
    assert held["bend"] == pytest.approx(found.bend, rel=1e-3)
    assert facts_of(ok(*score))["note"].startswith("smooth: scores of --method magic say what such removals")
    rough = {**held, "agreement": 0.6}
    (run / "smoothness.json").write_text(json.dumps(rough))
    warning = facts_of(ok(*score))["warning"]
    assert warning.startswith("rough: ")
    assert "agreement 0.600, bend" in warning
    for damaged in ("{", json.dumps({**rough, "training": "another"}), json.dumps({"bend": 1})):
        (run / "smoothness.json").write_text(damaged)
        assert "is told by: gradfn smoothness" in facts_of(ok(*score))["note"]


def test_a_rough_training_is_told_what_helps(ok, model, rows, queries, tmp_path):
    ok("train", tmp_path, "--model", model, "--dataset", rows, "--epochs", 2, "--batch-size", 1,
       "--learning-rate", 0.3, "--max-grad-norm", 1)  # fmt: skip
    lines = facts_of(ok("smoothness", tmp_path, "--query", queries, "--directions", 1))
    assert lines["verdict"].startswith("rough: ")
    for word in (
        "--learning-rate than 0.3",
        "--batch-size than 1",
        "not 1e-08",
        "--eps-root",
        "no --max-grad",
    ):
        assert word in lines["what"]


@pytest.mark.parametrize(
    ("more", "words"),
    [(("--fraction", 0), "between 0 and 1"), (("--directions", 0), "1 direction or more"),
     (("--query", ""), "--query is empty")],
)  # fmt: skip
def test_bad_input_is_one_sentence(command, run, queries, more, words):
    result = command("smoothness", run, "--query", queries, *more)
    assert (result.status, result.err.count("\n"), result.out) == (2, 1, "")
    assert words in result.err


def test_what_is_no_training_is_refused(command, store, queries, tmp_path):
    for run in (store, tmp_path / "absent"):
        result = command("smoothness", run, "--query", queries)
        assert (result.status, result.err.count("\n"), result.out) == (2, 1, "")
