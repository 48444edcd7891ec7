"""Commands run in this process: tiny models, a dozen documents, and what a command printed."""

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
from tiny import DOCUMENTS, QUERIES, make_model, make_tokenizer, save, write_jsonl
from torch import nn

from gradfn.cli import main


@dataclass
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str


def gradfn(*arguments):
    """Run a command as the console script does."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = ["gradfn", *(str(argument) for argument in arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            status = end.code
    return Result(status, out.getvalue(), err.getvalue())


import_module(
    "gradfn.cli.app"
).LOADING_AFTER_S = 3600.0  # on a busy machine a test would see the line that loading takes long


@pytest.fixture(scope="session", autouse=True)
def no_terminal():
    """The width is fixed, and a slow machine gets no lines of progress."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COLUMNS", raising=False)
        patch.setattr("gradfn.report.progress.QUIET_BELOW_S", float("inf"))
        patch.setattr("gradfn.report.progress.FIRST_AFTER_S", float("inf"))
        patch.setattr("gradfn.report.progress.PLAIN_EVERY_S", float("inf"))
        yield


@pytest.fixture(scope="session", autouse=True)
def loaded_once():
    """Commands share what they load, which takes most of their time here; tests/hf is about loading."""
    with pytest.MonkeyPatch.context() as patch:
        for place in (
            "inputs.load_model",
            "inputs.load_tokenizer",
            "inputs.load_split",
            "queries.load_split",
        ):
            module, name = place.split(".")
            load = getattr(import_module(f"gradfn.cli.{module}"), name)
            patch.setattr(f"gradfn.cli.{place}", remembering(load))
        yield


def remembering(load):
    """The same function, which does not load again what has not changed."""
    known = {}

    def remember(path, *args, **options):
        if not os.path.exists(path):
            return load(path, *args, **options)
        state = [(file, os.stat(file).st_mtime_ns) for file in sorted([path, *Path(path).glob("*")], key=str)]
        key = str((state, args, sorted(options.items())))
        if key not in known or emptied(known[key]):
            known[key] = load(path, *args, **options)
        return known[key]

    return remember


def emptied(loaded):
    """Whether this is a model that was trained, which gave its parameters away."""
    return isinstance(loaded, nn.Module) and any(p.numel() == 0 for p in loaded.parameters())


@pytest.fixture(scope="session")
def command():
    """`command("score", "--model", ...)` gives status, out and err."""
    return gradfn


@pytest.fixture(scope="session")
def ok():
    """The same for a command that must succeed; gives what it printed."""

    def run(*arguments):
        result = gradfn(*arguments)
        assert (result.status, result.err) == (0, ""), result.err
        return result.out

    return run


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Where what all files of tests read lies; only the fixtures below write here."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory of one file of tests, in which its fixtures may give any name."""
    return tmp_path_factory.mktemp("file")


@pytest.fixture(scope="session")
def model(shared):
    """A Llama with a tokenizer that adds a first token."""
    return save(shared / "llama", make_model(), make_tokenizer())


@pytest.fixture(scope="session")
def neox(shared):
    """A GPT-NeoX, with biases, and a tokenizer that adds nothing."""
    return save(shared / "neox", make_model("neox"), make_tokenizer(first=False))


@pytest.fixture(scope="session")
def corpus(shared):
    return write_jsonl(shared / "corpus.jsonl", DOCUMENTS)


@pytest.fixture(scope="session")
def queries(shared):
    return write_jsonl(shared / "queries.jsonl", QUERIES)


@pytest.fixture(scope="session")
def store(shared, ok, model, corpus):
    """What `gradfn build` wrote, with nothing but the defaults."""
    ok("build", shared / "store", "--model", model, "--dataset", corpus)
    return shared / "store"
