"""`gradfn tune`: a method is recommended, time is kept, and what was done stays."""

import re
import shlex
import time
from importlib import import_module

import pytest
import torch
from tiny import DOCUMENTS, write_jsonl

from gradfn.scores import Scores

TUNE = import_module("gradfn.cli.tune")


@pytest.fixture(scope="module")
def base(folder, model):
    rows = [{"id": row["id"], "text": row["text"]} for row in DOCUMENTS]
    asked = [{"prompt": row["prompt"], "completion": row["completion"]} for row in DOCUMENTS[:4]]
    return ("--model", model, "--dataset", write_jsonl(folder / "rows.jsonl", rows),
            "--query", write_jsonl(folder / "asked.jsonl", asked), "--epochs", 1, "--learning-rate", 0.01,
            "--batch-size", 4, "--methods", "grad-dot,grad-cosine,logra", "--minutes", 5)  # fmt: skip


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(TUNE, "ROUNDS", 1)


@pytest.fixture(scope="module")
def tuned(folder, ok, base):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TUNE, "ROUNDS", 1)
        return folder / "tuned", ok("tune", folder / "tuned", *base)


def test_a_method_is_recommended_with_the_command(tuned, ok, tmp_path, monkeypatch):
    run, out = tuned
    assert "models   16 retrained on 8 halves of the rows" in out
    assert re.search(r"ceiling  \d\.\d+ \(", out)
    rows = re.findall(r"^(grad_dot|grad_cosine|logra) .*(?<!not )", out, re.MULTILINE)
    assert sorted(rows) == ["grad_cosine", "grad_dot", "logra"]
    trusted = re.search(r"^trust +(.*)$", out, re.MULTILINE)[1]
    assert rows[0] in trusted
    monkeypatch.chdir(tmp_path)
    command = shlex.split(re.search(r"^command +gradfn (.*)$", out, re.MULTILINE)[1])
    ok(*command)
    scores, known = Scores.load("scores"), Scores.load(run / rows[0])
    torch.testing.assert_close(
        scores.matrix, known.of_damping(scores.dampings[0]).matrix, rtol=1e-4, atol=1e-6
    )


def test_one_row_is_refused_before_the_run_is_made(command, base, tmp_path):
    options = [*base, "--split", "train[:1]"]
    result = command("tune", tmp_path / "run", *options)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "retrained on halves of the rows, and there is 1: give more rows" in result.err
    assert not (tmp_path / "run").exists()


def test_what_is_done_is_not_done_again(tuned, ok, base, monkeypatch):
    run, out = tuned
    monkeypatch.setattr(TUNE, "run_score", None)
    monkeypatch.setattr(TUNE, "retrain", None)
    assert ok("tune", run, *base) == out
    fewer = ok("tune", run, *base[:-3], "grad-dot", "--minutes", 1)
    assert "logra" not in fewer


@pytest.mark.slow
def test_more_time_retrains_more_models(ok, base, tmp_path, monkeypatch):
    ok("tune", tmp_path / "run", *base[:-3], "grad-dot")
    monkeypatch.setattr(TUNE, "ROUNDS", 2)
    out = ok("tune", tmp_path / "run", *base[:-3], "grad-dot")
    assert "models   32 retrained on 16 halves of the rows" in out


def test_what_is_late_is_left_for_later(ok, base, tmp_path, monkeypatch):
    score, run = TUNE.run_score, tmp_path / "run"

    def late(request):
        if request.method.name == "grad_cosine":
            raise TUNE.OutOfTime
        score(request)

    monkeypatch.setattr(TUNE, "run_score", late)
    out = ok("tune", run, *base)
    assert "not tried  grad_cosine, logra: the same command again goes on" in out
    assert "grad_dot" in out
    monkeypatch.setattr(TUNE, "run_score", score)
    assert "not tried" not in ok("tune", run, *base)


def test_time_that_is_too_short_is_told(ok, base, tmp_path, monkeypatch):
    def late(*given, **how):
        raise TUNE.OutOfTime

    monkeypatch.setattr(TUNE, "retrain", late)
    out = ok("tune", tmp_path / "run", *base)
    assert "too short  not even 16 models were retrained: the same command again goes on" in out


def test_every_model_that_is_done_is_kept_by_a_stop(ok, base, tmp_path, monkeypatch):
    retrain = TUNE.retrain

    def stopped(*given, progress, **how):
        done = 0

        def count(examples):
            nonlocal done
            done += int(examples)
            if done > 2.5 * len(DOCUMENTS):  # in the third model, of one epoch
                raise TUNE.OutOfTime

        return retrain(*given, progress=count, **how)

    monkeypatch.setattr(TUNE, "retrain", stopped)
    out = ok("tune", tmp_path / "run", *base)
    assert "too short  not even 16 models were retrained" in out
    kept = sorted(one.stem for one in (tmp_path / "run" / "round-1" / "segments").iterdir())
    assert [int(stop) - int(start) for _, start, stop in (name.split("-") for name in kept)] == [1, 1]


def test_the_alarm_rings_in_time_and_is_put_off():
    def forever():
        while True:
            time.sleep(0.001)

    begun = time.monotonic()
    TUNE._until(begun + 0.1, forever)
    assert 0.1 <= time.monotonic() - begun < 5
    done = []
    TUNE._until(time.monotonic() + 0.05, lambda: done.append(1))
    time.sleep(0.1)  # nothing rings
    TUNE._until(time.monotonic() - 1, lambda: done.append(2))
    assert done == [1]


@pytest.mark.slow
def test_a_method_that_cannot_be_had_is_left_out(ok, base, tmp_path):
    out = ok("tune", tmp_path / "run", *base[:-4], "--loss-reduction", "sum", "--methods", "grad-dot,trak")
    assert "left out trak: trak weighs a row by 1 - p" in " ".join(out.split())
    assert "trust" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--minutes", 0), "--minutes must be above 0, not 0"),
        (("--methods", "magic"), "no method 'magic' to try: choose from grad_dot"),
        (("--epochs", 2), "was tuned with another epochs: give what was given then, or a new RUN"),
    ],
)
def test_what_cannot_be_tuned_is_refused(command, base, tuned, options, words):
    kept = [one for pair in zip(base[::2], base[1::2], strict=True) if pair[0] != options[0] for one in pair]
    result = command("tune", tuned[0], *kept, *options)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert words in result.err


def test_a_directory_of_something_else_is_refused(command, base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = command("tune", tmp_path, *base)
    assert result.status == 2
    assert "holds something else: give tune a directory of its own" in result.err
