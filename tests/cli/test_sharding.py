"""Commands whose model is sharded over processes (--fsdp): what one process makes, and what is refused."""

import json
import shutil

import pytest
import torch
from started import torchrun
from tiny import DOCUMENTS, write_jsonl

from gradfn.cli.commands import BuildRequest, HessianRequest, ScoreRequest
from gradfn.cli.request import make
from gradfn.cli.together import run_together
from gradfn.errors import InputError
from gradfn.runs.curvatures import load_curvature
from gradfn.runs.processes import TURNS, Processes
from gradfn.scores import Scores
from gradfn.store import open_store

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(scope="module")
def base(model, corpus):
    return "--model", model, "--dataset", corpus, "--precision", "fp64"


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--include", "*"), ("--by", "token", "--token-batch-size", "30")])
def test_a_store_is_that_of_one_process(ok, base, tmp_path, more):
    asked = (*base, *more, "--projection", "none")
    status, out, said = torchrun(2, "build", tmp_path / "two", *asked, "--fsdp")
    assert (status, out.count("[2 shards]")) == (0, 1), said
    ok("build", tmp_path / "one", *asked)
    with open_store(tmp_path / "one") as one, open_store(tmp_path / "two") as two:
        assert one.settings == two.settings  # the fingerprint of the weights too
        for name in one.names("gradients/"):
            torch.testing.assert_close(*(torch.tensor(each.read(name)) for each in (two, one)), **EXACT)
    assert "resumed" in ok("build", tmp_path / "two", *asked)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["data", "model"])
def test_a_curvature_in_two_passes_with_more_processes_than_rows(ok, neox, tmp_path, labels):
    few = write_jsonl(tmp_path / "few.jsonl", DOCUMENTS[:2])
    asked = (
        "--model",
        neox,
        "--dataset",
        few,
        "--precision",
        "fp64",
        "--method",
        "ekfac",
        "--labels",
        labels,
    )
    status, _, said = torchrun(3, "hessian", tmp_path / "three", *asked, "--fsdp")
    assert status == 0, said
    ok("hessian", tmp_path / "one", *asked)
    three, one = (load_curvature(tmp_path / name) for name in ("three", "one"))
    for name in one:
        torch.testing.assert_close(three[name].values, one[name].values, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ekfac", "trackstar", "trak"])
def test_scores_and_what_is_shown(ok, base, queries, method, tmp_path):
    asked = (*base, "--query", queries, "--method", method, "--top", "1")
    status, out, said = torchrun(
        2, "score", tmp_path / "two", *asked, "--fsdp", "--csv", tmp_path / "table.csv"
    )
    assert status == 0, said
    alone = ok("score", tmp_path / "one", *asked)
    two, one = (Scores.load(tmp_path / name) for name in ("two", "one"))
    torch.testing.assert_close(two.matrix, one.matrix, rtol=1e-6, atol=1e-6 * float(one.matrix.abs().max()))
    assert out.partition("query q-france")[2] == alone.partition("query q-france")[2]
    assert (tmp_path / "table.csv").exists()


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_all(base, tmp_path, model):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 25}))
    status, _, said = torchrun(2, "build", tmp_path / "run", "--model", broken, *base[2:], "--fsdp")
    assert status == 1
    assert "of shape [24, 16], and its model one of [25, 16]" in said[0]


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        (
            ScoreRequest,
            {"method": "cg"},
            "cg multiplies with the curvature itself, which takes whole weights",
        ),
        (ScoreRequest, {"method": "lissa"}, "lissa multiplies with the curvature itself"),
        (ScoreRequest, {"method": "magic"}, "magic goes back through a training"),
        (ScoreRequest, {"method": "source"}, "source scores several checkpoints"),
        (ScoreRequest, {"checkpoints": "a,b"}, "--checkpoints is of several models, and --fsdp shards one"),
        (ScoreRequest, {"query_loss": "kl"}, "kl runs a second model"),
        (HessianRequest, {"loss": "kl"}, "kl runs a second model"),
        (BuildRequest, {"task": "classification"}, "--fsdp shards models of the task causal-lm"),
        (BuildRequest, {"shard": "1/2"}, "--shard is a part of one's own"),
    ],
)
def test_what_takes_whole_weights_is_refused(kind, given, words, model, corpus, tmp_path):
    asked = {"run": str(tmp_path / "run"), "model": str(model), "dataset": str(corpus), "fsdp": True, **given}
    before = TURNS.set(None)
    try:
        with pytest.raises(InputError, match=words):
            run_together(make(kind, asked), lambda request: pytest.fail("it ran"), Processes(0, 2, 0))
    finally:
        TURNS.reset(before)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("build", "run", "--fsdp"),
            "--fsdp shards the model over processes, and this is the only one: start",
        ),
        (
            ("retrain", "run", "--fsdp"),
            "--fsdp is no option here: it shards the model of build, hessian and s",
        ),
        (("reduce", "run", "--fsdp"), "--fsdp is no option here"),
    ],
)
def test_commands_of_one_process_are_refused(command, arguments, words):
    result = command(*arguments)
    assert result.status == 2
    assert words in result.err
