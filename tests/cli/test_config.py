"""`--config FILE`: options from a file, and what is refused of one."""

import json
import re

import pytest

from gradfn.cli.commands import BuildRequest, LdsRequest, RetrainRequest, ScoreRequest
from gradfn.cli.request import make, read_config


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_file_gives_what_the_command_line_would(ok, model, corpus, tmp_path, write):
    path = write(f"""
        run = "{tmp_path / "a"}"
        model = "{model}"
        dataset = "{corpus}"
        projection-dim = 4
        seed = 3
        unit_normalize = true
        overwrite = false
        include = ["*mlp*", "*attn*"]
    """)
    told = ok("build", "--config", path).replace(str(tmp_path / "a"), "RUN")
    flags = (
        "--projection-dim",
        4,
        "--seed",
        3,
        "--unit-normalize",
        "--include",
        "*mlp*",
        "--include",
        "*attn*",
    )
    by_hand = ok("build", tmp_path / "b", "--model", model, "--dataset", corpus, *flags)
    assert told == by_hand.replace(str(tmp_path / "b"), "RUN")


def test_the_command_line_wins(ok, model, corpus, tmp_path, write):
    path = write(json.dumps({"model": str(model), "dataset": "nowhere.jsonl", "top": 1}), "run.json")
    asked = ("--dataset", corpus, "--query", "The capital of Peru")
    out = ok("score", "--config", path, *asked, "--top", 2)
    assert sum(" proponent " in line for line in out.splitlines()) == 2
    assert sum(" proponent " in line for line in ok("score", "--config", path, *asked).splitlines()) == 1


@pytest.mark.parametrize(
    ("request_type", "text", "given"),
    [
        (ScoreRequest, "damping = 0.1", {"damping": "0.1"}),
        (ScoreRequest, 'damping = [0.1, "absolute:1"]', {"damping": "0.1,absolute:1"}),
        (ScoreRequest, 'checkpoints = ["a", "b"]', {"checkpoints": "a,b"}),
        (ScoreRequest, 'checkpoints = "a, b"', {"checkpoints": "a, b"}),
        (ScoreRequest, 'include = "x"', {"include": ["x"]}),
        (ScoreRequest, 'task = "masked-lm"', {"task": "masked_lm"}),
        (ScoreRequest, "self = true", {"self": True}),
        (ScoreRequest, "self = false", {}),
        (RetrainRequest, "learning-rate = 1", {"learning_rate": 1.0}),
        (RetrainRequest, "remove_top = [10, 20]", {"remove_top": "10,20"}),
        (LdsRequest, 'truth = "t"\nruns = ["a", "b"]', {"truth": "t", "runs": ["a", "b"]}),
    ],
)
def test_values_are_those_of_the_command_line(write, request_type, text, given):
    path = write(text)
    assert read_config(request_type, path) == given
    assert make(request_type, {"run": "r", **given}).given == {"run": "r", **given}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("projecton = 'x'", "has 'projecton', which is no option of gradfn build: did you mean 'projection'"),
        ("zzz = 1", "has 'zzz', which is no option of gradfn build: did you mean '"),
        ("config = 'x'", "has 'config', which is no option of gradfn build"),
        ("seed = '3'", "seed in .* is '3', and --seed takes a whole number: give that"),
        ("seed = true", "seed in .* is True, and --seed takes a whole number"),
        ("seed = 1.0", "seed in .* is 1.0, and --seed takes a whole number"),
        ("seed = [1]", r"seed in .* is \[1\], and --seed takes a whole number"),
        ("truncation = 1", "truncation in .* is 1, and --truncation takes true or false"),
        ("label_smoothing = '1'", "--label-smoothing takes a number"),
        ("model = 3", "model in .* is 3, and --model takes a text"),
        ("model = ['a']", "--model takes a text"),
        ("task = 'vision'", "'vision', and --task takes one of causal-lm, seq2seq-lm"),
        ("include = [1, ['x']]", "--include takes texts"),
        ("include = []", r"include in .* is \[\], and --include takes texts"),
        ("[model]\npath = 'x'", "model in .* is a table, and --model takes a text"),
        ("seed = 1\nSeed = 2", "has 'Seed', which is no option"),
        ("projection-dim = 1\nprojection_dim = 2", "gives --projection-dim twice, once as 'projection_dim'"),
        ("seed = ", "cannot be read as toml .*: mend it"),
        ("seed = 1\nseed = 2", "cannot be read as toml .*: mend it"),
        ("shard = '9/8'", "a shard is I/N with I from 1 to N, not 9/8"),
        ("damping = 'x'", "'x' is not a damping"),
    ],
)
def test_what_is_refused(command, tmp_path, write, text, words):
    path = write(text)
    result = command("build", tmp_path / "run", "--config", path)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "run").exists()
    assert re.search(words, result.err), result.err


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.json", '{"seed": 1, "seed": 2}', "'seed' stands there twice"),
        ("run.json", "[1]", "is no table of options"),
        ("run.json", "{", "cannot be read as json"),
        ("run.json", '{"seed": null}', "takes a whole number"),
        ("run.json", '{"seed": NaN}', "takes a whole number"),
        ("run.yaml", "seed: 1", r"is no \.toml and no \.json"),
    ],
)
def test_other_files_that_are_refused(command, write, name, text, words):
    result = command("build", "--config", write(text, name))
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert re.search(words, result.err), result.err


def test_a_file_that_is_not_there(command, tmp_path):
    for path in (tmp_path / "no.toml", tmp_path / "folder.toml"):
        (tmp_path / "folder.toml").mkdir(exist_ok=True)
        result = command("build", "--config", path)
        assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
        assert "cannot read --config" in result.err


def test_an_argument_that_neither_gives_is_missing(command, write):
    result = command("build", "--config", write("seed = 1"))
    assert (result.status, result.err) == (2, "gradfn: Missing argument 'run': see gradfn build --help\n")
    assert read_config(BuildRequest, write("")) == {}


@pytest.mark.parametrize("ending", ["json", "toml"])
def test_a_file_that_is_nested_too_deep_is_refused(command, tmp_path, ending):
    equals = "model = " if ending == "toml" else '{"model": '
    (tmp_path / f"o.{ending}").write_text(equals + "[" * 9000 + "]" * 9000 + "}" * (ending == "json"))
    result = command("build", tmp_path / "run", "--config", tmp_path / f"o.{ending}")
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert f"cannot be read as {ending}" in result.err
