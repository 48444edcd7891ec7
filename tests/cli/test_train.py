"""`gradfn train`: what it writes is a model for every other command, and its training is known."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import DOCUMENTS, make_tokenizer, save, write_jsonl
from transformers import BertConfig, BertForSequenceClassification

import gradfn as gf
from gradfn.cli.commands import RetrainRequest, TrainRequest
from gradfn.cli.request import slots_of
from gradfn.cli.training import TrainingOptions, TrainOptions
from gradfn.scores import Scores
from gradfn.train import Training
from gradfn.train.course import Course
from gradfn.train.run import open_training

SMALL = ("--epochs", 2, "--batch-size", 5, "--save-every", 4, "--learning-rate", 0.01, "--schedule", "linear",
         "--max-grad-norm", 2.0)  # fmt: skip


@pytest.fixture(scope="module")
def base(model, corpus, queries):
    return ("--model", model, "--dataset", corpus, "--validation", queries)


@pytest.fixture(scope="module")
def run(folder):
    return folder / "trained"


@pytest.fixture(scope="module", autouse=True)
def told(ok, base, run):
    """What the command printed."""
    return ok("train", run, *base, *SMALL)


def weights(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*")) if path.name != "optimizer.pt"}


def test_it_says_what_it_does_and_what_came_of_it(told, run):
    lines = dict(line.split(maxsplit=1) for line in told.splitlines())
    assert "all trained, from its own weights, dropout off" in lines["model"]
    assert lines["train"].startswith("12 rows, ")
    assert lines["steps"] == "6, with 3 checkpoints"
    assert lines["checkpoints"] == f"{run}/: checkpoint-0, checkpoint-4, checkpoint-6 [3]"
    done = open_training(run)
    losses = done.steps["loss"]
    assert lines["loss"] == f"{losses[0]:.4g} at the first step, {losses[3:].mean():.4g} over the last epoch"
    assert losses[3:].mean() < losses[0]
    assert f"{done.steps['validation_loss'][-1]:.4g} at the last" in lines["validation"]


def test_it_is_the_training_of_the_library(run, model, corpus, queries):
    net, tokens = gf.load_model(model), gf.load_tokenizer(model)
    rows = gf.tokenize(gf.load_rows(corpus), tokens)
    training = Training(2, 5, 0.01, schedule="linear", max_grad_norm=2.0)
    course, done = Course(gf.causal_lm_loss(net), rows, training), open_training(run)
    first = load_file(run / "checkpoint-0/model.safetensors")
    assert all(torch.equal(first[name], value) for name, value in gf.model.params_of(net).items())
    for taken, loss, rate in zip(
        course.steps(course.start(gf.model.params_of(net))), done.steps["loss"], done.steps["learning_rate"],
        strict=True,
    ):  # fmt: skip
        assert (taken.loss, taken.learning_rate) == (loss, rate)
        last = taken
    saved = load_file(run / "checkpoint-6/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in last.state.params.items())
    other = gf.tokenize(gf.load_rows(queries), tokens, prompt_column="prompt", completion_column="completion")
    expected = course.mean_loss(last.state.params, other)
    assert done.steps["validation_loss"][-1] == pytest.approx(expected, rel=1e-6)


def test_the_log_has_every_step(run):
    with (run / "log.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    steps = open_training(run).steps
    assert [int(line["step"]) for line in lines] == [1, 2, 3, 4, 5, 6]
    for name, values in steps.items():
        found = [float(line[name] or "nan") for line in lines]
        np.testing.assert_array_equal(found, values)


def test_the_next_command_works(ok, told, run, queries):
    (line,) = (line for line in told.splitlines() if line.startswith("next"))
    words = shlex.split(line)[1:]
    assert words == ["gradfn", "score", "--training", str(run), "--query", str(queries), "--method", "tracin"]
    assert ok(*words[1:]).count("query ") == 3


def test_checkpoints_are_models_for_other_commands(ok, run, corpus, queries, tmp_path):
    last, first = run / "checkpoint-6", run / "checkpoint-4"
    base = ("--model", last, "--dataset", corpus)
    assert "less, Adam(eps=1e-08)" in ok("score", *base, "--query", queries, "--method", "less",
                                         "--optimizer-state", last)  # fmt: skip
    ok("build", tmp_path / "store", "--model", first, "--dataset", corpus)
    ok("query", tmp_path / "store", "--query", queries)
    ok("retrain", tmp_path / "truth", *base, "--query", queries, "--subsets", 3, "--epochs", 1, "--seeds", 1,
       "--batch-size", 4)  # fmt: skip
    again = ok("train", tmp_path / "more", *base, "--epochs", 1, "--optimizer", "sgd", "--momentum", 0.9)
    assert "from its own weights" in again


def test_a_complete_run_says_so_and_other_settings_are_refused(ok, command, base, run):
    before = (run / "training.h5").read_bytes(), weights(run / "checkpoint-6")
    told = ok("train", run, *base, *SMALL)
    assert "complete     all steps were there already, and none was taken again" in told
    for more, words in (
        (("--seed", 1), "seed is 0 there and 1 here"),
        (("--learning-rate", 0.02), "training.learning_rate is 0.01 there and 0.02 here"),
        (("--save-every", "epoch"), 'training.save_every is 4 there and "epoch" here'),
        (("--normalize", "tokens"), 'training.normalize is "rows" there and "tokens" here'),
    ):
        result = command("train", run, *base, *SMALL, *more)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert words in result.err
        assert "--overwrite" in result.err
    assert before == ((run / "training.h5").read_bytes(), weights(run / "checkpoint-6"))


def test_info_and_verify_know_it(ok, run):
    shown = " ".join(ok("info", run).split())
    assert "gradfn train" in shown
    assert "steps 6, loss " in shown
    assert shlex.split(ok("info", run, "--command"))[:2] == ["gradfn", "train"]
    assert json.loads(ok("info", run, "--json"))["files"][0]["kind"] == "training"
    assert "27 files" in ok("verify", run)


def test_killed_before_a_checkpoint_it_goes_on_from_the_one_before(ok, base, run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    (again / "training.h5").unlink()
    (again / "segments/training-0000000004-0000000006.h5").unlink()
    shutil.rmtree(again / "checkpoint-6")
    (again / ".checkpoint-6.tmp").mkdir()
    told = ok("train", again, *base, *SMALL)
    assert "from 4 steps that were there already" in told
    assert weights(again / "checkpoint-6") == weights(run / "checkpoint-6")
    one, other = (torch.load(at / "checkpoint-6/optimizer.pt") for at in (run, again))
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
    assert not (again / ".checkpoint-6.tmp").exists()


@pytest.mark.slow
def test_killed_for_real_it_ends_with_the_same_bits(model, corpus, tmp_path):
    words = [sys.executable, "-m", "gradfn", "train", "RUN", "--model", model, "--dataset", corpus,
             "--epochs", "12", "--batch-size", "1", "--save-every", "7"]  # fmt: skip

    def start(name):
        here = [str(tmp_path / name) if word == "RUN" else str(word) for word in words]
        with (tmp_path / "err").open("w") as err:
            return subprocess.Popen(here, stdout=subprocess.DEVNULL, stderr=err)

    assert start("whole").wait() == 0
    killed, seen = 0, -1
    while True:
        process = start("killed")
        for _ in range(6000):
            found = len([*(tmp_path / "killed").glob("checkpoint-*")])
            if process.poll() is not None or found > seen + 2 + killed % 3:
                break
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0, (tmp_path / "err").read_text()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed, seen = killed + 1, found
    assert killed >= 3
    names = sorted(os.listdir(tmp_path / "whole"))
    assert names == sorted(os.listdir(tmp_path / "killed"))
    for name in (name for name in names if name.startswith("checkpoint")):
        for file in sorted((tmp_path / "whole" / name).iterdir()):
            assert file.read_bytes() == (tmp_path / "killed" / name / file.name).read_bytes(), file


@pytest.fixture
def config(model, tmp_path):
    """A folder with the model's config and tokenizer, and no weights."""
    (tmp_path / "config").mkdir()
    for path in Path(model).iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path / "config")
    return tmp_path / "config"


def test_from_scratch_a_config_is_enough(ok, command, config, model, corpus, tmp_path):
    made, how = {}, ("--epochs", 1, "--batch-size", 12, "--learning-rate", 1e-9, "--optimizer", "sgd")
    for name, path, seed in (("a", config, 0), ("b", model, 0), ("c", config, 1)):
        told = ok("train", tmp_path / name, "--model", path, "--dataset", corpus, "--from-scratch", *how,
                  "--seed", seed)  # fmt: skip
        assert "from new weights" in told
        made[name] = load_file(tmp_path / name / "checkpoint-1/model.safetensors")["lm_head.weight"]
    assert torch.equal(made["a"], made["b"])
    assert not torch.equal(made["a"], made["c"])
    result = command("train", tmp_path / "d", "--model", config, "--dataset", corpus)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "holds no model" in result.err


def test_a_classifier_is_trained(ok, folder, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    net = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=3))
    path = save(folder / "three", net, make_tokenizer())
    rows = [{"text": document["text"], "kind": number % 3} for number, document in enumerate(DOCUMENTS)]
    data = write_jsonl(folder / "three.jsonl", rows)
    base = ("--model", path, "--dataset", data, "--task", "classification", "--label-column", "kind")
    told = ok("train", tmp_path, *base, "--epochs", 10, "--batch-size", 4, "--learning-rate", 0.03,
              "--save-every", 30)  # fmt: skip
    losses = open_training(tmp_path).steps["loss"]
    assert losses[-3:].mean() < 0.7 * losses[:3].mean()
    (line,) = (line for line in told.splitlines() if line.startswith("next"))
    assert "self-influence" in ok(*shlex.split(line)[2:])


def test_values_of_rows_are_scores_that_evaluations_take(ok, model, corpus, queries, tmp_path):
    base = ("--model", model, "--dataset", corpus)
    told = ok("train", tmp_path / "run", *base, "--values", queries, "--epochs", 1, "--batch-size", 6,
              "--values-kind", "influence")  # fmt: skip
    assert f"{tmp_path}/run/scores.h5 [12 rows, 3 queries]" in told
    scores = Scores.load(tmp_path / "run")
    assert list(scores.query_ids) == ["q-france", "q-peru", "q-kenya"]
    assert (scores.values != 0).all()
    ok("retrain", tmp_path / "truth", *base, "--query", queries, "--subsets", 3, "--seeds", 1, "--epochs", 1,
       "--batch-size", 3)  # fmt: skip
    assert "Pearson" in ok("evaluate", "lds", tmp_path / "truth", tmp_path / "run")
    assert shlex.split(ok("info", tmp_path / "run", "--command"))[:2] == ["gradfn", "train"]


REFUSED = [
    (("--precision", "bf16"), "--precision bf16 rounds most steps of training to nothing"),
    (("--batch-size", 13), "a batch of 13 is larger than the data, of 12 rows: give a --batch-size"),
    (("--warmup", 7), "warmup of 7 steps is longer than the training, of 6"),
    (("--save-every", "0"), "--save-every 0: give a number of steps, 1 or more, or epoch"),
    (("--betas", "0.9"), "--betas 0.9 are not two numbers"),
    (("--betas", "0.9,1.0"), "betas must be at least 0 and below 1"),
    (("--momentum", 0.9), "momentum and nesterov are settings of sgd"),
    (("--max-grad-norm", 0), "above 0"),
    (("--validation", "absent.jsonl"), "absent.jsonl"),
    (("--learning-rate", 0), "learning"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_bad_input_is_one_sentence_before_any_work(command, base, tmp_path, more, words):
    result = command("train", tmp_path / "run", *base, *SMALL, *more)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert words in result.err
    assert not (tmp_path / "run").exists()


def test_a_validation_without_rows_to_split_is_refused(command, model, corpus, tmp_path):
    result = command("train", tmp_path / "run", "--model", model, "--dataset", corpus,
                     "--validation-split", "test")  # fmt: skip
    assert result.status == 2
    assert "leave it out" in result.err


def test_a_training_that_diverges_names_its_step(command, base, tmp_path):
    result = command("train", tmp_path, *base, "--optimizer", "sgd", "--learning-rate", 1e20,
                     "--save-every", 1, "--batch-size", 4)  # fmt: skip
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "of step " in result.err or "after step " in result.err
    assert "--learning-rate" in result.err


def test_options_that_retrain_has_share_one_declaration():
    ours, theirs = slots_of(TrainRequest), slots_of(RetrainRequest)
    shared = {name for name, slot in theirs.items() if slot.owner == "training"} - {"init"}
    assert shared
    for name in shared:
        assert ours[name].about is theirs[name].about
    assert issubclass(TrainOptions, TrainingOptions)
