from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import DOCUMENTS, make_model, make_tokenizer, save, write_jsonl
from transformers import BertConfig, BertForSequenceClassification

import gradfn as gf
from gradfn.cli import retrain as module
from gradfn.evaluate.retraining import model_seed
from gradfn.evaluate.subsets import random_subsets
from gradfn.evaluate.truth import open_truth
from gradfn.model.params import params_of
from gradfn.train import Training, train
from gradfn.train.course import Course

SMALL = ("--subsets", 3, "--epochs", 1, "--batch-size", 3)


@pytest.fixture(scope="module")
def base(model, corpus, queries):
    return ("--model", model, "--dataset", corpus, "--query", queries)


@pytest.fixture(scope="module")
def told(ok, folder, base):
    """What the command printed."""
    return ok("retrain", folder / "truth", *base, *SMALL, "--learning-rate", 0.01)


def test_the_truth_is_that_of_the_library(told, folder, model, corpus, queries):
    truth = open_truth(folder / "truth")
    net, tokens = gf.load_model(model), gf.load_tokenizer(model)
    rows = gf.tokenize(gf.load_rows(corpus), tokens)
    asked = gf.tokenize(gf.load_rows(queries), tokens, prompt_column="prompt", completion_column="completion")
    masks, loss = random_subsets(12, 3), gf.causal_lm_loss(net)
    assert torch.equal(truth.subsets, masks[[0, 0, 1, 1, 2, 2]])
    trained = train(params_of(net), loss, rows, masks[1:2], [model_seed(0, 1)], Training(1, 3, 0.01))
    params = {name: value[0] for name, value in trained.params.items()}
    wanted = torch.stack([loss(params, asked[number]) for number in range(3)]).double()
    torch.testing.assert_close(truth.losses[3], wanted, rtol=1e-4, atol=1e-4)
    assert truth.query_ids == asked.ids
    assert truth.settings["subsets"]["fraction"] == 0.5
    assert truth.settings["data"]["fingerprint"] == rows.fingerprint()


def test_it_says_what_was_trained_and_where_it_is(told):
    told = " ".join(told.split())
    assert "14,032 parameters, all trained, from its own weights" in told
    assert "6 (3 subsets of 6 rows, 2 seeds each)" in told
    assert "1 epoch of adamw, batches of 3, learning rate 0.01" in told
    assert "truth.h5 [6 models, 3 queries]" in told
    assert "diverged" not in told


def test_seeds_may_be_independent(ok, command, folder, base, told):
    out = ok("retrain", folder / "own", *base, *SMALL, "--seeding", "independent")
    assert "6 (3 subsets of 6 rows, 2 seeds each, none shared)" in " ".join(out.split())
    truth = open_truth(folder / "own")
    assert truth.seeds.tolist() == [model_seed(0, m % 2, subset=m // 2) for m in range(6)]
    assert "seeding independent" in " ".join(ok("info", folder / "own").split())
    result = command("retrain", folder / "truth", *base, *SMALL, "--learning-rate", 0.01,
                     "--seeding", "independent")  # fmt: skip
    assert result.status == 2
    assert "seeding" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_rows_may_be_masked_at_several_fractions(ok, command, folder, base, model, corpus, queries):
    """The order is that of `gradfn train` with the seed, and so the models are those of its course."""
    given = (
        *base,
        *SMALL,
        "--batch-size",
        7,
        "--learning-rate",
        0.01,
        "--seed",
        3,
        "--fraction",
        "0.75,0.25",
    )
    out = ok("retrain", folder / "masked", *given, "--removal", "mask")
    assert "12 (6 subsets of 3 to 9 rows, others masked, 2 seeds each)" in " ".join(out.split())
    truth = open_truth(folder / "masked")
    assert truth.settings["subsets"]["fraction"] == [0.75, 0.25]
    assert (truth.removal, truth.seeds.tolist()) == ("mask", [3, 4] * 6)
    assert [part.subsets.sum(1).unique().tolist() for part in truth.by_fraction()] == [[9], [3]]
    net, tokens = gf.load_model(model), gf.load_tokenizer(model)
    rows = gf.tokenize(gf.load_rows(corpus), tokens)
    asked = gf.tokenize(gf.load_rows(queries), tokens, prompt_column="prompt", completion_column="completion")
    for number in (0, 7):
        course = Course(gf.causal_lm_loss(net), rows, Training(1, 7, 0.01), seed=3 + number % 2,
                        weights=truth.subsets[number].double())  # fmt: skip
        *_, last = course.steps(course.start(params_of(net)))
        wanted = course.row_losses(last.state.params, asked)
        torch.testing.assert_close(truth.losses[number], wanted, rtol=1e-4, atol=1e-4)
    assert "removal mask" in " ".join(ok("info", folder / "masked").split())
    assert "larger than the smallest subset" in command("retrain", folder / "less", *given).err


def test_new_weights_differ_from_model_to_model(ok, folder, base):
    ok("retrain", folder / "new", *base, *SMALL, "--init", "random", "--learning-rate", 1e-9)
    truth = open_truth(folder / "new")
    assert truth.settings["init"]["kind"] == "random"
    # One for each of a subset's seeds, which all subsets share.
    assert len({tuple(row) for row in truth.losses.round(decimals=4).tolist()}) == 2


def test_leaving_one_out_leaves_each_row_out_once(ok, folder, base):
    ok("retrain", folder / "one", *base, *SMALL[2:], "--leave-out", 1, "--seeds", 1)
    subsets = open_truth(folder / "one").subsets
    assert sorted((~subsets).nonzero()[:, 1].tolist()) == list(range(12))
    ok("retrain", folder / "four", *base, *SMALL[2:], "--leave-out", 1, "--subsets", 4, "--seeds", 1)
    assert torch.equal(open_truth(folder / "four").subsets, subsets[:4])


def test_the_best_rows_of_each_query_are_removed(ok, folder, base, model, queries):
    ok("score", folder / "scored", *base)
    ok("retrain", folder / "less", *base, *SMALL[2:], "--remove-top", "1,2", "--scores", folder / "scored",
       "--seeds", 1)  # fmt: skip
    truth = open_truth(folder / "less")
    assert truth.subsets.sum(1).tolist() == [12, *[11, 10] * 3, *[11] * 5, *[10] * 5]
    asked = gf.tokenize(gf.load_rows(queries), gf.load_tokenizer(model), prompt_column="prompt",
                        completion_column="completion")  # fmt: skip
    longest = max(int((asked[number]["labels"] != -100).sum()) for number in range(3))
    assert truth.settings["subsets"]["answer_tokens"] == longest
    with gf.open_store(folder / "scored", "scores") as store:
        best = store.read("scores")[:, 0].argmax(0)
    assert (~truth.subsets[1:7:2]).nonzero()[:, 1].tolist() == best.tolist()


def test_margins_of_classes_are_kept_and_of_tokens_there_are_none(ok, folder, told, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    net = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=3)).eval()
    path = save(folder / "classes", net, make_tokenizer())
    rows = [{"text": document["text"], "kind": number % 3} for number, document in enumerate(DOCUMENTS)]
    data = write_jsonl(folder / "classes.jsonl", rows)
    base = ("--model", path, "--dataset", data, "--query", data, "--task", "classification",
            "--label-column", "kind")  # fmt: skip
    ok("score", tmp_path / "scored", *base)
    ok("retrain", tmp_path / "truth", *base, *SMALL[2:], "--remove-top", 2, "--scores", tmp_path / "scored",
       "--learning-rate", 0.01, "--label-smoothing", 0.1)  # fmt: skip
    truth = open_truth(tmp_path / "truth")
    documents = gf.tokenize(gf.load_rows(data), gf.load_tokenizer(path))
    documents = replace(documents, extras={"labels": np.arange(12) % 3})
    loss = gf.model_loss(net, "classification", label_smoothing=0.1)
    trained = train(
        params_of(net), loss, documents, truth.subsets[3:4], [model_seed(0, 1)], Training(1, 3, 0.01)
    )
    net.load_state_dict({name: value[0] for name, value in trained.params.items()})
    for number in range(12):
        z = net(input_ids=documents[number]["input_ids"][None]).logits[0].tolist()
        margin = z[number % 3] - max(other for v, other in enumerate(z) if v != number % 3)
        assert truth.margins[3, number].item() == pytest.approx(margin, rel=1e-3, abs=1e-4)
    shown = " ".join(ok("evaluate", "brittleness", tmp_path / "truth").split())
    right = int((truth.margins[:2].mean(0) > 0).sum())
    assert f"predictions {right} of 12 queries right" in shown
    assert "predictions flip" in shown
    assert open_truth(folder / "truth").margins is None


def test_models_that_diverge_are_told(ok, folder, base):
    told = ok("retrain", folder / "wild", *base, *SMALL, "--learning-rate", 1e30, "--epochs", 3)
    assert "6 models, counted in no mean" in told
    assert open_truth(folder / "wild").diverged.all()


def test_shards_are_joined(ok, folder, base, told):
    given = (*base, *SMALL, "--learning-rate", 0.01)
    first = ok("retrain", folder / "parts", *given, "--shard", "1/2")
    assert "gradfn merge" in first
    ok("retrain", folder / "parts", *given, "--shard", "2/2")
    ok("merge", folder / "parts")
    torch.testing.assert_close(
        open_truth(folder / "parts").losses, open_truth(folder / "truth").losses, rtol=1e-4, atol=1e-4
    )


def test_the_progress_of_a_shard_is_over_its_own_models(ok, folder, base, monkeypatch):
    """3 subsets of 6 rows, 2 seeds and 2 epochs: 6 models, of which the second of 3 parts has 2."""
    totals, done = [], []

    @contextmanager
    def bar(label, total, unit):
        totals.append(total)
        yield done.append

    monkeypatch.setattr(module, "progress_bar", bar)
    ok("retrain", folder / "part", *base, *SMALL, "--epochs", 2, "--shard", "2/3")
    assert totals == [sum(done)] == [2 * 6 * 2]


def test_models_that_do_not_stack_are_told(ok, folder, base, monkeypatch):
    def awkward(self, batch):
        return original(self, batch) if bool(batch["input_ids"].sum() >= 0) else None

    from gradfn.model.losses import CausalLMLoss

    original = CausalLMLoss.batched
    monkeypatch.setattr(CausalLMLoss, "batched", awkward)
    assert "trained one by one" in ok("retrain", folder / "loop", *base, *SMALL)


@pytest.mark.parametrize(("more", "says"), [
    (("--subsets", 2), "at least 3 subsets"), (("--fraction", 0.01), "keeps 0 of 12 rows"),
    (("--fraction", "0.5,a"), "--fraction 0.5,a are not numbers: give 0.99,0.95, say"),
    (("--fraction", "0.5,0.5"), "has one twice"), (("--fraction", "0.5,2"), "above 0 and below 1, not 2"),
    (("--leave-out", 12), "leaving out 12 keeps 0"), (("--batch-size", 7), "larger than the smallest subset"),
    (("--fraction", 0.5, "--leave-out", 2), "give one of them"),
    (("--remove-top", "1"), "give both, or neither"),
    (("--remove-top", "1", "--scores", "x"), "leave out --subsets"),
    (("--remove-top", "a", "--scores", "x"), "--remove-top a are not whole numbers: give 10,20, say"),
    (("--learning-rate", 0), "--learning-rate must be above 0"),
    (("--leave-out", 1, "--subsets", 2), "makes 3 to 12 subsets, not 2: choose as many of these"),
    (("--leave-out", 1, "--subsets", 13), "makes 3 to 12 subsets, not 13"),
    (("--momentum", 0.9), "momentum and nesterov are settings of sgd"), (("--seeds", 0), "1 to 999 seeds"),
    (("--shard", "3/2"), "I from 1 to N"), (("--epochs", 0), "epochs must be"),
    *((("--fraction", share), f"above 0 and below 1, not {float(share)}")
      for share in ("nan", "inf", 0, 1, -0.5)),
    *((("--precision", half), f"--precision {half} rounds most steps of training to nothing: give fp32")
      for half in ("bf16", "fp16")),
])  # fmt: skip
def test_bad_options_are_one_sentence(command, tmp_path, base, more, says):
    result = command("retrain", tmp_path / "run", *base, *SMALL, *more)
    assert result.status == 2
    assert says in result.err
    assert result.err.count("\n") == 1


def test_numbers_of_rows_to_remove_are_whole(command, tmp_path, base):
    result = command("retrain", tmp_path / "run", *base, "--remove-top", "a", "--scores", "x")
    assert (result.status, "not whole numbers" in result.err) == (2, True)


def test_scores_of_other_queries_are_refused(command, ok, folder, base, model, corpus):
    ok("score", folder / "other", "--model", model, "--dataset", corpus, "--query", "The capital of Peru is")
    result = command("retrain", folder / "no", *base, "--remove-top", 1, "--scores", folder / "other")
    assert result.status == 2
    assert "different queries" in result.err


@pytest.mark.parametrize("lacking", ["--model", "--dataset", "--query"])
def test_what_is_lacking_is_named(command, tmp_path, base, lacking):
    at = base.index(lacking)
    result = command("retrain", tmp_path / "run", *base[:at], *base[at + 2 :])
    assert result.status == 2
    assert f"no {lacking}" in result.err


def test_a_neox_is_retrained_in_one_stack(ok, folder, corpus, queries):
    path = save(folder / "wide", make_model("neox", seed=1), make_tokenizer(first=False))
    told = ok("retrain", folder / "stack", "--model", path, "--dataset", corpus, "--query", queries, *SMALL)
    assert "one by one" not in told


@pytest.mark.parametrize("more", [("--precision", "bf16"), ("--fraction", "nan")])
def test_what_cannot_work_is_refused_before_anything_is_loaded(command, tmp_path, more):
    absent = tmp_path / "absent"
    result = command("retrain", tmp_path / "run", "--model", absent, "--dataset", absent, "--query", absent,
                     *more)  # fmt: skip
    assert result.status == 2
    assert f"{absent}" not in result.err
    assert more[1] in result.err
