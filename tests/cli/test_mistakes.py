"""Ordinary mistakes are told in one sentence, with exit status 2, and not as a fault of gradfn."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import make_model

from gradfn.cli.app import report
from gradfn.cli.commands import ScoreRequest
from gradfn.cli.request import make
from gradfn.errors import InputError

LONG = "x" * 300


@pytest.fixture
def refused(command):
    """Run a command that must be refused in one sentence."""

    def run(words, *arguments):
        result = command(*arguments)
        assert (result.status, result.err.count("\n")) == (2, 1), result.err
        assert words in result.err

    return run


@pytest.mark.parametrize(("option", "value", "words"), [
    ("--query", f"{LONG}.jsonl", "cannot be looked for (File name too long): check the path"),
    ("--query", "~nouser/q.jsonl", "cannot be looked for (Could not determine home directory)"),
    ("--checkpoints", LONG, "cannot be used as a path (File name too long)"),
    ("--hessian-path", LONG, "cannot be used as a path (File name too long)"),
    ("--csv", LONG, "cannot be used as a path (File name too long)"),
    ("--device", "meta", "device 'meta' cannot be used here (its tensors hold no numbers)"),
    ("--damping", "1e-300", "a damping of 1e-300 is lost in float32"),
])  # fmt: skip
def test_values_of_score(refused, model, corpus, option, value, words):
    asked = () if option == "--query" else ("--query", "Peru is far away")
    method = ("--method", "datainf") if option == "--damping" else ()
    refused(words, "score", "--model", model, "--dataset", corpus, *asked, *method, option, value)


@pytest.mark.parametrize("name", ["score", "info", "merge", "rerun"])
def test_runs_of_names_that_are_too_long(refused, model, corpus, name):
    more = ("--model", model, "--dataset", corpus, "--query", "Peru is far") if name == "score" else ()
    refused("cannot be used as a path (File name too long): check it", name, LONG, *more)


def test_numbers_of_twenty_digits():
    with pytest.raises(
        InputError, match=r"--top 99999999999999999999 is no number of this machine: give one"
    ):
        make(ScoreRequest, {"top": 99999999999999999999})


@pytest.mark.parametrize(("number", "status"), [(errno.EACCES, 2), (errno.EPIPE, 1), (errno.ENOSPC, 1)])
def test_errors_of_the_system(capsys, number, status):
    assert report(OSError(number, os.strerror(number), "place")) == status
    said = capsys.readouterr().err
    assert os.strerror(number) in said
    assert "fault" not in said


def test_a_closed_output():
    code = "import sys; sys.argv = ['gradfn', '--version']; from gradfn.cli import main; main()"
    done = subprocess.run(f'{sys.executable} -c "{code}" >&-', shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("ask", "words"), [
    (("--hessian-path", "{}/store.h5"), "holds store, not a curvature: give a run that hessian or mix wrote"),
    (("--query-path", "{}/scores.h5"), "holds scores, not gradients"),
])  # fmt: skip
def test_a_file_of_another_kind(refused, ok, store, model, corpus, tmp_path, ask, words):
    base = ("--model", model, "--dataset", corpus)
    if "scores" in ask[1]:
        ok("score", tmp_path, *base, "--query", "Peru is far")
    run = tmp_path if "scores" in ask[1] else store
    asked = () if ask[0] == "--query-path" else ("--query", "Peru is far")
    refused(words, "score", *base, *asked, ask[0], ask[1].format(run))


def test_evaluations_of_a_file_of_another_kind(refused, store, queries):
    file = store / "store.h5"
    refused("holds store, not losses of retrained models", "evaluate", "brittleness", file)
    refused(
        "holds store, not scores: give a run that score wrote", "evaluate", "recall", file, "--query", queries
    )


@pytest.mark.parametrize(("config", "words"), [
    ([1], "is no config of an adapter"),
    ({"base_model_name_or_path": 5}, "is no config of an adapter"),
    ({"base_model_name_or_path": "."}, "names its own folder as its base"),
    ({}, "names no base_model_name_or_path"),
])  # fmt: skip
def test_configs_of_adapters(refused, corpus, tmp_path, monkeypatch, config, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(words, "score", "--model", tmp_path, "--dataset", corpus, "--query", "Peru is far")


def test_a_model_of_numbers_that_are_none(refused, corpus, model, tmp_path):
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight[3, 5] = torch.nan
    broken.save_pretrained(tmp_path)
    words = "has weights that are NaN or infinite, in lm_head.weight (1 in all)"
    refused(words, "score", "--model", tmp_path, "--dataset", corpus, "--query", "Peru is far")


def test_weights_that_were_never_fetched(refused, corpus, tmp_path):
    make_model().save_pretrained(tmp_path / "pointer")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "pointer" / "model.safetensors").write_text(pointer)
    ask = ("--dataset", corpus, "--query", "Peru is far")
    refused("is a pointer of Git LFS and not the file itself: fetch it", "score", "--model",
            tmp_path / "pointer", *ask)  # fmt: skip
    make_model().save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    first, *_ = sorted((tmp_path / "shards").glob("*.safetensors"))
    first.unlink()
    refused(f"lacks {first.name} (1 of", "score", "--model", tmp_path / "shards", *ask)


def test_weights_that_may_not_be_read(refused, corpus, tmp_path, monkeypatch):
    folder = tmp_path / "m"
    make_model().save_pretrained(folder)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "model.safe" not in str(path) and access(path, mode))
    refused("may not be read by this user: change its permissions", "score", "--model", folder, "--dataset",
            corpus, "--query", "Peru is far")  # fmt: skip
