"""`gradfn score --training RUN --method magic`: exact derivatives through a recorded training."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tiny import DOCUMENTS, write_jsonl

import gradfn as gf
from gradfn.scores import Scores
from gradfn.train import Training, metagradient
from gradfn.train.course import Course
from gradfn.train.magic import Magic
from gradfn.train.replay import Replay

SMALL = ("--epochs", 2, "--batch-size", 3, "--save-every", 3, "--learning-rate", 0.01, "--schedule", "linear",
         "--normalize", "tokens", "--token-batch-size", 40, "--eps", 1e-4)  # fmt: skip


@pytest.fixture(scope="module")
def rows(folder):
    return write_jsonl(folder / "seven.jsonl", DOCUMENTS[:7])


@pytest.fixture(scope="module")
def asked(folder):
    pairs = [{"id": f"q{number}", "prompt": "The capital is", "completion": word}
             for number, word in enumerate((" Lima", " Paris"))]  # fmt: skip
    return write_jsonl(folder / "asked.jsonl", pairs)


@pytest.fixture(scope="module")
def run(ok, folder, model, rows):
    ok("train", folder / "through", "--model", model, "--dataset", rows, *SMALL)
    return folder / "through"


@pytest.fixture(scope="module")
def base(run, asked):
    return ("--training", run, "--query", asked, "--method", "magic")


@pytest.fixture(scope="module")
def library(model, rows, asked):
    """The course, its start and the queries, as a program would make them."""
    net, tokens = gf.load_model(model), gf.load_tokenizer(model)
    data = gf.tokenize(gf.load_rows(rows), tokens)
    queries = gf.tokenize(gf.load_rows(asked), tokens, prompt_column="prompt", completion_column="completion")
    training = Training(2, 3, 0.01, schedule="linear", eps=1e-4)
    course = Course(gf.causal_lm_loss(net), data, training, normalize="tokens", token_batch_size=40)
    return course, gf.model.params_of(net), queries


@pytest.fixture(scope="module")
def whole(ok, folder, base):
    """What the command printed, and the scores it wrote."""
    told = ok("score", folder / "magic", *base)
    return told, Scores.load(folder / "magic")


def test_it_is_the_metagradient_of_the_library(ok, folder, whole, library, run):
    told, scores = whole
    made = metagradient(*library)
    torch.testing.assert_close(scores.matrix, made.values.float(), rtol=1e-5, atol=1e-9)
    assert scores.matrix.abs().max() > 1e-4
    lines = dict(line.split(maxsplit=1) for line in told.splitlines() if line)
    assert lines["training"] == f"{run}, 6 steps"
    assert lines["method"] == "magic, derivatives through the training"
    assert "100% of" in told
    assert scores.settings["method"]["magic"]["window"] == [0, None]
    assert "magic" in ok("info", folder / "magic")
    assert not (folder / "magic/replay").exists()
    ok("verify", folder / "magic")


def test_what_changes_no_result_and_what_counts_some_steps(ok, folder, whole, base, library, tmp_path):
    ok("score", tmp_path / "few", *base, "--replay-slots", 1, "--csv", tmp_path / "t.csv")
    assert torch.equal(Scores.load(tmp_path / "few").matrix, whole[1].matrix)
    assert (tmp_path / "t.csv").read_text().count("q1") == 6
    assert "1.000" in ok("evaluate", "overlap", folder / "magic", tmp_path / "few", "--top", 3)
    ok("score", tmp_path / "late", *base, "--steps", "4:")
    late = metagradient(*library, window=(4, None)).values.float()
    torch.testing.assert_close(Scores.load(tmp_path / "late").matrix, late, rtol=1e-5, atol=1e-9)


def test_another_curvature_is_that_of_the_library_and_goes_into_no_run_of_the_exact_one(
    ok, command, folder, whole, base, library, tmp_path
):
    told = ok("score", tmp_path, *base, "--curvature", "gauss_newton")
    assert "gauss_newton, so the derivatives are not exact" in " ".join(told.split())
    made = metagradient(*library, replay=Replay(curvature="gauss_newton")).values.float()
    scores = Scores.load(tmp_path)
    torch.testing.assert_close(scores.matrix, made, rtol=1e-5, atol=1e-9)
    assert (scores.matrix - whole[1].matrix).norm() > 1e-3 * whole[1].matrix.norm()
    assert scores.settings["method"]["magic"]["curvature"] == "gauss_newton"
    assert "curvature" not in whole[1].settings["method"]["magic"]
    result = command("score", folder / "magic", *base, "--curvature", "gauss_newton")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "magic.curvature" in result.err


def test_tokens_sum_to_rows(ok, whole, base, tmp_path):
    ok("score", tmp_path, *base, "--by", "token")
    tokens = Scores.load(tmp_path)
    sums = torch.zeros_like(whole[1].matrix).index_add(0, tokens.documents, tokens.matrix)
    torch.testing.assert_close(sums, whole[1].matrix, rtol=1e-4, atol=1e-8)


def test_killed_it_goes_on_and_ends_with_the_same_bits(ok, command, whole, base, tmp_path, monkeypatch):
    """Each pull is written; the process dies in the one after next."""
    monkeypatch.setattr("gradfn.train.kept.SECONDS", 0.0)
    pull, steps, until = gf.train.magic.pull, [], [2]

    def dying(course, state, *more, **how):
        if len(steps) == until[0]:
            raise RuntimeError("killed")
        steps.append(int(state.taken))
        return pull(course, state, *more, **how)

    monkeypatch.setattr("gradfn.train.magic.pull", dying)
    for until[0] in (2, 3):
        assert command("score", tmp_path, *base).status == 1
        assert (tmp_path / "replay/queries-0.pt").exists()
    until[0] = 99
    ok("score", tmp_path, *base)
    assert steps == [5, 4, 3, 2, 1, 0]
    assert torch.equal(Scores.load(tmp_path).matrix, whole[1].matrix)
    assert not (tmp_path / "replay").exists()


DYING = """
import atexit, os, signal, sys
import torch
torch.set_num_threads(int(sys.argv.pop(1)))
left = int(sys.argv.pop(1))
import gradfn.train.kept, gradfn.train.magic
from gradfn.cli import main
gradfn.train.kept.SECONDS, pull = 0.0, gradfn.train.magic.pull
def dying(*args, **how):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return pull(*args, **how)
gradfn.train.magic.pull = dying
atexit.register(lambda: print("steps left", left, file=sys.stderr))
main()
"""


@pytest.mark.slow
def test_killed_by_the_system_it_goes_on_and_ends_with_the_same_bits(whole, base, tmp_path):
    """Six steps in five processes: four are killed in the middle, one of them before it did anything."""
    for steps in (1, 0, 2, 1, 99):
        line = [sys.executable, "-c", DYING, torch.get_num_threads(), steps, "score", tmp_path, *base]
        ended = subprocess.run([str(word) for word in line], capture_output=True, text=True)
        assert ended.returncode == (0 if steps == 99 else -signal.SIGKILL), ended.stderr
    assert "steps left 97" in ended.stderr
    assert torch.equal(Scores.load(tmp_path).matrix, whole[1].matrix)
    assert not (tmp_path / "replay").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [(("--projection-dim", 4), "--projection-dim does not go with"), (("--self",), "--self does not go"),
     (("--damping", "0.1"), "--damping does not"), (("--include", "*mlp*"), "--include does not"),
     (("--by", "module"), "use --by example, or token"), (("--shard", "1/2"), "--shard does not"),
     (("--steps", "4:9"), "--steps 4:9 is no part of a training of 6"), (("--steps", "x"), "give 100:200"),
     (("--replay-slots", 0), "--replay-slots must be 1 or more"), (("--labels", "model"), "--labels does"),
     (("--query-path", "x"), "--query-path does not"), (("--dataset", "x"), "--dataset is of the training")],
)  # fmt: skip
def test_options_that_it_does_not_have(command, base, more, words):
    result = command("score", *base, *more)
    assert (result.status, result.err.count("\n"), result.out) == (2, 1, ""), result.err
    assert words in result.err


def test_without_a_training_it_says_what_to_give(command, model, rows, asked):
    result = command("score", "--model", model, "--dataset", rows, "--query", asked, "--method", "magic")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "goes back through a training: give the run of gradfn train with --training" in result.err
    result = command("score", "--model", model, "--dataset", rows, "--query", asked, "--steps", "1:")
    assert (result.status, result.err) == (2, "gradfn: --steps is of --method magic: leave it out\n")
    result = command("score", "--model", model, "--dataset", rows, "--query", asked, "--curvature", "hessian")
    assert (result.status, result.err) == (2, "gradfn: --curvature is of --method magic: leave it out\n")
    with pytest.raises(gf.errors.InputError, match=r"give `gf\.train"):
        gf.score(gf.load_model(model), [], [], method="magic")


def test_a_training_that_is_another_by_now(command, run, base, tmp_path, monkeypatch):
    def refused(change, words):
        copy = shutil.copytree(run, tmp_path / words[-9:])
        change(copy)
        result = command("score", "--training", copy, *base[2:])
        assert (result.status, result.err.count("\n")) == (2, 1), result.err
        assert words in result.err

    def optimizer(copy):
        state = torch.load(copy / "checkpoint-3/optimizer.pt", weights_only=True)
        state["state"][0]["exp_avg"] += 1e-9
        torch.save(state, copy / "checkpoint-3/optimizer.pt")

    refused(optimizer, "step 6 came to another state than before")
    refused(lambda copy: shutil.rmtree(copy / "checkpoint-0"), "checkpoint-0 is gone")
    monkeypatch.setattr("gradfn.__version__", "9.9")
    refused(lambda copy: None, "and this is 9.9, whose steps may round otherwise")


def test_the_method_says_what_it_depends_on(library):
    course, start, _ = library
    assert Magic(course, start, (1, None)).settings()["magic"]["window"] == [1, None]
