"""`gradfn score --method source` through a short training, against the library, and what it refuses."""

import shutil

import pytest
import torch
from tiny import make_model, make_tokenizer, save

import gradfn as gf
from gradfn.cli.options import MethodOptions
from gradfn.cli.source import of_training
from gradfn.methods.source import Checkpoint, source
from gradfn.subject import Subject
from gradfn.train import Training

RATES = (0.3, 0.2, 0.4)


@pytest.fixture(scope="module")
def steps(folder):
    """Three checkpoints of a training, each with the state of an AdamW."""
    paths, net = [], make_model()
    optimizer = torch.optim.AdamW(net.named_parameters(), 1e-3)
    for number in (1, 2, 3):
        net(input_ids=(ids := torch.arange(number, number + 9)[None]), labels=ids).loss.backward()
        optimizer.step()
        paths.append(save(folder / f"step-{number}", net, make_tokenizer()))
        torch.save(optimizer.state_dict(), paths[-1] / "optimizer.pt")
    return paths


@pytest.fixture
def asked(steps, corpus, queries):
    return ("--model", steps[-1], "--dataset", corpus, "--query", queries, "--method", "source",
            "--checkpoints", ",".join(map(str, steps)), "--checkpoint-weights", ",".join(map(str, RATES)),
            "--segments", 2)  # fmt: skip


def scores_of(run):
    with gf.open_store(run, "scores") as store:
        return torch.from_numpy(store.read("scores"))[:, 0]


def expected(steps, corpus, queries, *, tokens=False, scale=None, **dynamics):
    """The same by the library."""

    def at(path):
        net = gf.load_model(path)
        return Subject(net, gf.causal_lm_loss(net), view=gf.View(tokens=tokens))

    tokenizer = gf.load_tokenizer(steps[-1])
    train = gf.tokenize(gf.load_rows(corpus), tokenizer)
    asked = gf.tokenize(
        gf.load_rows(queries), tokenizer, prompt_column="prompt", completion_column="completion"
    )
    points = [
        Checkpoint(at(path), rate, scale and scale(path)) for path, rate in zip(steps, RATES, strict=True)
    ]
    method = source(points, train, segments=2, dynamics=gf.methods.Dynamics(**dynamics))
    return gf.score(at(steps[-1]), train, asked, method=method).matrix


def assert_same(got, made):
    torch.testing.assert_close(got, made.float(), rtol=1e-3, atol=1e-5 * float(made.abs().max()))


@pytest.mark.slow
def test_scores_are_those_of_the_library_and_are_resumed(ok, asked, steps, corpus, queries, tmp_path):
    how = ("--optimizer", "sgd:momentum=0.9,weight_decay=0.01", "--normalize", "tokens")
    out = ok("score", tmp_path / "run", *asked, *how)
    assert "source, full gradients" in out
    made = expected(steps, corpus, queries, momentum=0.9, weight_decay=0.01, normalize="tokens")
    got = scores_of(tmp_path / "run")
    assert_same(got, made)
    ok("score", *asked, *how, "--jsonl", tmp_path / "t.jsonl")  # without a run
    kept = [*(tmp_path / "run").glob("segment-*/hessian.h5"), tmp_path / "run/checkpoint-1/scores.h5"]
    times = [path.stat().st_mtime_ns for path in kept]
    for path in (tmp_path / "run/checkpoint-3", tmp_path / "run/segments"):
        shutil.rmtree(path)
    (tmp_path / "run/scores.h5").unlink()
    assert "resumed" in ok("score", tmp_path / "run", *asked, *how)
    torch.testing.assert_close(scores_of(tmp_path / "run"), got, rtol=0, atol=0)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert len(kept) == 3


@pytest.mark.slow
def test_tokens_of_a_training_by_adamw(ok, asked, steps, corpus, queries, tmp_path):
    ok("score", tmp_path / "run", *asked, "--optimizer", "adamw:weight_decay=0.01", "--by", "token")

    def scale(path):
        return lambda subject: gf.hf.load_optimizer_state(path, subject.model, subject.view)

    made = expected(steps, corpus, queries, tokens=True, scale=scale, optimizer="adamw", weight_decay=0.01)
    assert_same(scores_of(tmp_path / "run"), made)


def test_an_optimizer_that_scales_has_its_state_beside_each_checkpoint(
    command, asked, model, steps, tmp_path
):
    (bare := shutil.copytree(steps[0], tmp_path / "step-0") / "optimizer.pt").unlink()
    given = (*asked[:9], f"{bare.parent},{steps[1]}", "--checkpoint-weights", "1,1", "--optimizer", "adamw")
    result = command("score", tmp_path / "run", *given)
    assert result.status == 2
    assert "optimizer.pt" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            ["--damping", "0.1"],
            "source takes no inverse, and the length of the training bounds what small eig",
        ),
        (
            ["--projection", "gaussian:4x4"],
            "source takes whole gradients of all rows as they are: leave out --p",
        ),
        (["--shard", "1/2"], "source takes whole gradients of all rows as they are: leave out --shard"),
        (
            ["--advantage-column", "a"],
            "source takes whole gradients of all rows as they are: leave out --adv",
        ),
        (["--segments", "4"], "--segments must be between 1 and the number of checkpoints, 3, not 4"),
        (["--checkpoint-weights", "1,0,1"], "of source are sums of learning rates: give numbers above 0"),
        (["--checkpoint-weights", "1,1"], "2 --checkpoint-weights for 3 --checkpoints"),
        (["--checkpoints", "a-2,a-2,a-3"], "source goes through each checkpoint once"),
        (["--checkpoints", "a-2,a-10,a-3"], "a-3 comes after a-10: give --checkpoints in the order of"),
        (["--optimizer", "lion"], "no optimizer 'lion': choose sgd, adam, adamw"),
        (["--optimizer", "sgd:speed=1"], "no setting 'speed' of an optimizer"),
        (["--optimizer", "adam:weight_decay=1"], "train with adamw"),
        (["--method", "tracin"], "--segments is of --method source, not of tracin: leave it out"),
        (["--by", "module"], "joined scores are not told apart by module"),
    ],
)
def test_what_a_training_cannot_be_gone_through_with(command, asked, changes, words, tmp_path):
    result = command("score", tmp_path / "run", *asked, *changes)
    assert words in result.err
    assert result.status == 2
    assert not (tmp_path / "run").exists()


def test_queries_and_checkpoints_must_be_given(command, asked, store, tmp_path):
    for given, words in (
        ((*asked[:4], "--self", *asked[6:]), "source gives no self-influence"),
        ((*asked[:4], "--query-path", store, *asked[6:]), "give them with --query"),
        (asked[:8], "source goes through a training: give its --checkpoints"),
    ):
        result = command("score", tmp_path / "run", *given)
        assert words in result.err
        assert result.status == 2


def test_options_are_those_of_a_training():
    training = Training(2, 4, 0.1, "sgd", momentum=0.9, weight_decay=0.01)
    made = of_training(MethodOptions(), ["a", "b"], [1.0, 2.0], training, segments=2, normalize="tokens")
    assert (made.name, made.checkpoints, made.checkpoint_weights, made.segments, made.normalize) == (
        "source", ("a", "b"), (1.0, 2.0), 2, "tokens"
    )  # fmt: skip
    assert made.optimizer == gf.methods.Dynamics("sgd", 0.9, False, 0.01, 0.1)
    scheduled = of_training(MethodOptions(), ["a"], [1.0], Training(2, 4, 0.1, schedule="linear"))
    assert scheduled.optimizer == gf.methods.Dynamics("adamw")
    with pytest.raises(gf.InputError, match="eps_root"):
        of_training(MethodOptions(), ["a"], [1.0], Training(2, 4, 0.1, eps_root=1e-8))
