"""Every bad input is one sentence with a remedy, status 2 (1 for the disk), and nothing is made or lost."""

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from tiny import DOCUMENTS, make_model, make_tokenizer, save, write_jsonl

import gradfn as gf
from gradfn.report.exports import WRITERS

ASK = ("--query", "The capital of Peru is", "--completion", " Lima")
HUB = "no file or folder here has this name; check the path"


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """Run a command that must be refused with these words and leave everything as it was."""
    monkeypatch.chdir(tmp_path)

    def run(words, *arguments, status=2):
        before = files_in(tmp_path), sorted(tmp_path.rglob("*"))
        result = command(*arguments)
        assert result.err.count("\n") == 1, result.err
        assert re.search(words, result.err), result.err
        assert result.err.startswith("gradfn: ")
        assert "gradfn's fault" not in result.err
        assert result.status == status
        assert (files_in(tmp_path), sorted(tmp_path.rglob("*"))) == before
        return result

    return run


@pytest.fixture
def data(tmp_path):
    def write(*rows, name="data.jsonl"):
        return write_jsonl(tmp_path / name, rows)

    return write


# --- options that do not fit, found before anything is loaded


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--query", "a b", "--query-path", "x"], "give one of --query .* and --query-path"),
        ([], "give one of --query .* and --query-path"),
        (["--query-path", "x", "--completion", "y"], "--completion follows a text"),
        (["--query", "q.csv", "--completion", "y"], "--completion follows a text"),
        (["--query", ""], "--query is empty: give a value, or leave it out"),
        (["--query", " \n "], "--query is empty"),
        (["--query", "a\udcff b"], "not valid UTF-8"),
        (["--query", "missing.jsonl"], rf"no dataset 'missing.jsonl': {HUB}"),
        (["--query", "MISSING.CSV"], rf"no dataset 'MISSING.CSV': {HUB}"),
        (["--query-path", "no-store"], "no-store does not exist: give the directory of a run"),
        (["--query", "a b", "--top", "0"], "--top must be 1 or more, not 0"),
        (["--query", "a b", "--top", "-3"], "--top must be 1 or more, not -3"),
        (["--query", "a b", "--token-batch-size", "0"], "--token-batch-size must be 1 or more, not 0"),
        (["--query", "a b", "--projection-dim", "-1"], "projection dimension must be 0 .* or more, not -1"),
        (
            ["--query", "a b", "--csv", "no/t.csv"],
            "cannot write no/t.csv: give a file in a folder that exists",
        ),
        (["--query", "a b", "--jsonl", "."], "cannot write .*: give a file in a folder that exists"),
        (["--query", "a b", "--csv", "t", "--parquet", "t"], "two exports have the same path"),
        (
            ["--query", "a b", "--method", "grad_dot", "--unit-normalize"],
            "grad_dot has no unit norm: leave out",
        ),
    ],
)
def test_options_of_score(refused, model, corpus, changes, words):
    refused(words, "score", "run", "--model", model, "--dataset", corpus, *changes)


@pytest.mark.parametrize("name", ["build", "reduce"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--projection-dim", "-1"], "projection dimension must be 0 .* or more, not -1"),
        (["--token-batch-size", "-5"], "--token-batch-size must be 1 or more, not -5"),
    ],
)
def test_options_of_build(refused, model, corpus, name, changes, words):
    refused(words, name, "run", "--model", model, "--dataset", corpus, *changes)


@pytest.mark.parametrize("name", ["score", "build", "reduce"])
def test_model_or_dataset_is_lacking(refused, model, corpus, name):
    query = ASK if name == "score" else ()
    refused("no --dataset", name, "run", "--model", model, *query)
    refused("no --model", name, "run", "--dataset", corpus, *query)


COMMANDS = ("score", "build", "reduce", "hessian", "mask fit", "retrain", "train")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_whose_place_is_taken_is_refused_before_any_work(refused, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("os.access", lambda path, *_: "closed" not in str(path))
    given = ("--model", "none", "--dataset", "none")
    for run in ("file", "file/a/run", "link", "link/run"):
        words = f"{run.split('/')[0]} is no folder, so {run} cannot be a run directory: give another one"
        refused(words, *name.split(), run, *given)
    refused("closed may not be written to by this user", *name.split(), "closed/run", *given)
    refused("'' is not the directory of a run", *name.split(), "", *given)


def test_an_export_is_not_replaced_unasked(refused, ok, model, corpus, tmp_path):
    (tmp_path / "t.csv").write_text("mine")
    arguments = ("score", "--model", model, "--dataset", corpus, *ASK, "--csv", "t.csv")
    refused("t.csv exists: give another name, or --overwrite to replace it", *arguments)
    ok(*arguments, "--overwrite")
    assert (tmp_path / "t.csv").read_text().startswith("query,side")


# --- models and datasets


def test_models_that_are_none(refused, corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    for model, words in (("./no/model", HUB), ("empty", "folder empty holds no model: expected config.json")):
        refused(words, "score", "run", "--model", model, "--dataset", corpus, *ASK)
        refused(words, "build", "run", "--model", model, "--dataset", corpus)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused, model, corpus):
    words = "device 'cuda' cannot be used here .*: use --device cpu"
    refused(words, "build", "run", "--model", model, "--dataset", corpus, "--device", "cuda")


def test_datasets_that_are_none(refused, model, data, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    data({"body": "a text", "n": 1}, name="columns.jsonl")
    for path, words in (
        ("missing.jsonl", HUB),
        ("empty.jsonl", "empty.jsonl' is an empty file: give one with rows"),
        ("columns.jsonl", "no column 'text' in the dataset, which has body, n: give another --text-column"),
    ):
        refused(words, "build", "run", "--model", model, "--dataset", path)
    path = tmp_path / "columns.jsonl"
    refused(
        "no column 'x' .* body, n", "build", "run", "--model", model, "--dataset", path, "--text-column", "x"
    )
    refused("column 'n' holds int64, not text", "build", "run", "--model", model, "--dataset", path,
            "--text-column", "n")  # fmt: skip
    words = "--prompt-column body is half of a row: give --completion-column too"
    refused(words, "build", "run", "--model", model, "--dataset", path, "--prompt-column", "body")
    refused("has no split 'test': it has train", "build", "run", "--model", model, "--dataset", path,
            "--split", "test")  # fmt: skip


@pytest.mark.parametrize("flag", ["--include", "--exclude"])
def test_globs_that_leave_nothing(refused, model, corpus, flag):
    layers = "the model's layers are model.embed_tokens, model.layers.0.self_attn.q_proj"
    ask = ("build", "run", "--model", model, "--dataset", corpus, flag)
    refused(rf"{flag} \*nothing\* matches no layer: {layers}", *ask, "*nothing*")
    if flag == "--exclude":
        refused(rf"no layer is left .* {layers}", *ask, "*")


def test_a_document_longer_than_the_context(refused, ok, model, data):
    path = data(*DOCUMENTS, {"id": "long", "text": "The capital " * 200})
    words = (
        r"row 12 \(id 'long'\) has \d+ tokens, more than the limit of 128: cut such rows with --truncation"
    )
    refused(words, "build", "run", "--model", model, "--dataset", path)
    assert "13 rows" in ok("build", "run", "--model", model, "--dataset", path, "--truncation")


def test_queries_that_cannot_be_used(refused, model, neox, corpus, data, tmp_path):
    def ask(words, query, which=model):
        refused(words, "score", "run", "--model", which, "--dataset", corpus, "--query", query)

    ask("in --query: the query 'a' leaves nothing to predict", "a", which=neox)
    ask(
        r"in --query: row 0 .* more than the limit of 128: cut such rows with --truncation",
        "The capital " * 200,
    )
    ask("query 1 has nothing to predict", data({"text": "a text"}, {"text": ""}))
    ask("in --query: no column 'text' in the dataset, which has x", data({"x": "a"}))
    # Longer than any file name, but not a file: a text.
    ask("in --query: row 0 .* has .* tokens", "世" * 250)


def test_a_loss_that_is_not_finite(refused, command, corpus, data, tmp_path):
    model, tokens = make_model("neox"), make_tokenizer(first=False)
    token = tokens("Oslo", add_special_tokens=False).input_ids[0]
    # The weights are finite, and their differences in the layer norm are not.
    model.gpt_neox.embed_in.weight.data[token] = 3e38
    model.gpt_neox.embed_in.weight.data[token, 0] = -3e38
    save(tmp_path / "model", model, tokens)
    refused("in --query: the loss of row 0 is NaN or infinite", "score", "run", "--model", "model",
            "--dataset", corpus, "--query", "Oslo is the capital of Norway")  # fmt: skip
    for name in ("build", "reduce"):
        result = command(name, tmp_path / name, "--model", "model", "--dataset", corpus)
        assert result.status == 2
        assert (
            "the loss of row 6 (id 'doc-norway') is NaN or infinite: mend or leave out that row" in result.err
        )
        assert not list((tmp_path / name).rglob("*.h5"))


# --- stores that do not fit


def test_a_store_of_another_model(refused, store, neox, folder, corpus):
    other = save(folder / "other", make_model(seed=1), make_tokenizer())
    words = (
        r"was made differently, .* \(model is \S*llama, fp32 there and \S*other, fp32 here; the first tensor "
        r"that differs is lm_head.weight\)"
    )
    refused(words, "query", store, *ASK, "--model", other)
    refused(words, "score", "run", "--model", other, "--dataset", corpus, "--query-path", store)


def test_a_store_of_another_tokenizer(refused, store, model, folder):
    other = save(folder / "retokenized", make_model(), make_tokenizer(words=["The capital of"] * 20))
    words = r"was made differently, .* \(tokenizer is not the same\)"
    refused(words, "query", store, *ASK, "--model", other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--projection-dim", "8"], r"chain.0.projection is rademacher:16x16 there and rademacher:8x8 here"),
        (["--projection-dim", "0"], r"transform.chain.0 is .*'rademacher:16x16'.* there and nothing here"),
        (["--seed", "5"], r"transform.chain.0.seed is 0 there and 5 here"),
        (["--projection", "gaussian"], r"projection is rademacher:16x16 there and gaussian:16x16 here"),
        (["--include", "*mlp*"], r"layers.include.0 is nothing there and \*mlp\* here"),
        (["--precision", "fp64"], r"\(model is \S*, fp32 there and \S*, fp64 here\)"),
    ],
)
def test_stored_queries_that_were_made_differently(refused, store, model, corpus, changes, words):
    base = ("score", "run", "--model", model, "--dataset", corpus, "--query-path", store)
    refused(f"{words}.*: use the same model and options, or make it again", *base, *changes)


def test_a_unit_norm_cannot_be_undone(refused, store, model, corpus, tmp_path, ok):
    ok("build", tmp_path / "unit", "--model", model, "--dataset", corpus, "--unit-normalize")
    words = "unit were made with unit norm, which cannot be undone: give --unit-normalize"
    refused(words, "score", "run", "--model", model, "--dataset", corpus, "--query-path", "unit")
    refused(words, "query", store, "--query-path", "unit")


def test_queries_of_a_store(refused, store):
    refused("give one of --query", "query", store)
    refused("give one of --query", "query", store, "--query", "a b", "--query-path", store)
    refused("--completion follows a text", "query", store, "--query-path", store, "--completion", "b")
    refused("--query is empty", "query", store, "--query", "")
    refused("no dataset 'missing.csv'", "query", store, "--query", "missing.csv")
    refused("--top must be 1 or more", "query", store, *ASK, "--top", "0")
    refused("--token-batch-size must be 1", "query", store, *ASK, "--token-batch-size", "0")
    refused("cannot write no/t: give a file", "query", store, *ASK, "--csv", "no/t")


# --- methods, curvatures and checkpoints


@pytest.fixture(scope="module")
def curved(folder, ok, model, corpus, queries):
    """Curvatures, and gradients of the queries in front of them and behind them."""
    rows, asked = ("--model", model, "--dataset", corpus), ("--model", model, "--dataset", queries)
    pair, made = ("--prompt-column", "prompt", "--completion-column", "completion"), folder / "curved"
    ok("hessian", made / "H", *rows)
    ok("hessian", made / "other", *asked, *pair)
    ok("hessian", made / "ekfac", *rows, "--method", "ekfac")
    ok("hessian", made / "ekfac2", *asked, *pair, "--method", "ekfac")
    ok("build", made / "plain", *asked, *pair)
    ok("build", made / "unit", *asked, *pair, "--unit-normalize")
    ok("build", made / "behind", *asked, *pair, "--hessian-path", made / "H")
    ok("build", made / "root", *asked, *pair, "--hessian-path", made / "H", "--unit-normalize")
    return made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--damping", "0.1"], "--damping belongs to a curvature: give --hessian-path, or a --method"),
        (["--method", "less", "--damping", "1"], "--damping belongs to a curvature: give --hessian-path"),
        (
            ["--method", "ekfac", "--damping", "much"],
            "'much' is not a damping: give one like 0.1 or absolute",
        ),
        (["--method", "ekfac", "--damping", "0.1,"], "'' is not a damping: give one like 0.1 or absolute"),
        (["--method", "ekfac", "--damping", "-1"], "a damping must be a number of 0 or more, not -1"),
        (["--method", "ekfac", "--damping", "some:1"], "no damping 'some': choose relative, absolute, trunc"),
        (
            ["--method", "ekfac", "--damping", "1,1.0"],
            "'1,1.0' has the same damping twice: give each once",
        ),
        (
            ["--method", "ekfac", "--damping", "factored:1"],
            "factored damping needs .* of ekfac .* kfac or shampoo or tkfac, or",
        ),
        (["--method", "datainf", "--damping", "1,2"], "datainf takes one relative damping"),
        (["--method", "best"], "no method 'best': choose grad_dot, .*, or FILE.py:NAME for your own"),
        (["--method", "mine.py:best"], "no file mine.py: --method FILE.py:NAME takes NAME from it"),
        (["--method", "ekfac", "--unit-normalize"], "ekfac has no unit norm: leave out --unit-normalize"),
        (["--method", "ekfac", "--partitions", "0"], "--partitions must be 1 or more, not 0"),
        (["--method", "ekfac", "--partitions", "99"], "99 partitions of 14 blocks: choose between 1 and 14"),
        (["--partitions", "2"], "--partitions is of a curvature that is fitted here, and none is: leave it"),
        (["--labels", "model"], "--labels is of a curvature that is fitted here, and none is: leave it out"),
        (
            ["--method", "kfac", "--labels", "model", "--loss", "log-odds"],
            "labels are drawn for a plain cross",
        ),
        (["--method", "trak", "--labels", "model"], "labels are drawn for a plain cross-entropy or squared"),
        (["--method", "trak", "--loss-reduction", "sum"], "leaves nothing: leave out --loss-reduction"),
        (["--method", "trak", "--by", "token"], "trak weighs whole rows by their loss: use --by example"),
        (
            ["--method", "trak", "--reward-column", "r", "--prompt-column", "p", "--completion-column", "c"],
            "a weight would change: leave out --reward-column",
        ),
        (
            ["--method", "trak", "--advantage-column", "a"],
            "a weight would change: leave out --advantage-column",
        ),
        (
            ["--method", "trackstar", "--target-downweight-components", "0"],
            "components must be 1 or more, no",
        ),
        (
            ["--method", "grad-dot", "--target-downweight-components", "20"],
            "components is of the curvatures that --method trackstar fits here, and none are: leave it out",
        ),
        (["--self"], "--self has no queries: leave out --query"),
        (["--group-column", "task"], "--group-column groups the queries of a dataset: give one with --query"),
        (
            ["--checkpoints", "a, ,b"],
            "'a, ,b' names no path, or an empty one: give paths with commas between",
        ),
        (["--checkpoints", "a,b", "--checkpoint-weights", "1"], "1 --checkpoint-weights for 2 --checkpoints"),
        (["--checkpoint-weights", "1"], "1 --checkpoint-weights for 0 --checkpoints: give one for each"),
        (
            ["--checkpoints", "a", "--checkpoint-weights", "x"],
            "-weights x are not numbers: give 0.1,0.05, say",
        ),
        (
            ["--checkpoints", "a", "--checkpoint-weights", "nan"],
            "-weights nan are not numbers: give 0.1,0.05",
        ),
        (["--checkpoints", "./missing"], HUB),
        (["--optimizer-state", "missing.pt"], "no optimizer state 'missing.pt': no file or folder here"),
    ],
)
def test_options_of_a_method(refused, model, corpus, changes, words):
    refused(words, "score", "run", "--model", model, "--dataset", corpus, *ASK[:2], *changes)


@pytest.mark.parametrize("method", ["grad-cosine", "less", "trackstar", "relatif", "datainf"])
def test_methods_in_which_a_row_has_no_influence_on_itself(refused, model, corpus, method):
    words = f"{method.replace('-', '_')} gives no self-influence: choose grad_dot, or a curvature, for --self"
    refused(words, "score", "run", "--model", model, "--dataset", corpus, "--self", "--method", method)


def test_rows_against_themselves_have_no_loss_of_queries(refused, model, corpus):
    base = ("score", "run", "--model", model, "--dataset", corpus, "--self")
    refused("--self has no queries: leave out --query-loss", *base, "--query-loss", "log_odds")


def test_what_is_of_one_model_has_no_several_checkpoints(refused, curved, neox, model, corpus):
    base = ("score", "run", "--model", model, "--dataset", corpus, "--checkpoints", f"{model},{neox}")
    words = "-path is of one model, and --checkpoints are several: "
    refused(f"--hessian{words}leave it out, for", *base, *ASK, "--hessian-path", curved / "H")
    refused(f"--query{words}give the queries themselves", *base, "--query-path", curved / "plain")


def test_what_is_of_one_model_goes_with_its_checkpoint(ok, curved, model, corpus, tmp_path):
    net = make_model()
    with torch.no_grad():
        net.lm_head.weight.mul_(2)
    later = save(tmp_path / "later", net, make_tokenizer())
    base = ("score", "--model", later, "--dataset", corpus, "--checkpoints")
    ok(*base, model, "--query-path", curved / "plain")
    ok(*base, f"{model},{model}", *ASK, "--hessian-path", curved / "H")


def test_directions_of_a_curvature_that_is_given(refused, curved, model, corpus):
    base = ("score", "run", "--model", model, "--dataset", corpus, *ASK, "--hessian-path", curved / "H")
    components = ("--target-downweight-components", 20)
    for method in ((), ("--method", "trackstar")):
        refused("trackstar fits here, and none are: leave it out", *base, *method, *components)


def test_checkpoints_and_what_they_are_told_apart_by(refused, model, corpus):
    base = ("score", "run", "--model", model, "--dataset", corpus, *ASK)
    for by, flags in (("module", ("--checkpoints", model)), ("head", ("--method", "less"))):
        refused(f"joined scores are not told apart by {by}: use --by example", *base, *flags, "--by", by)


def test_a_group_column_that_is_none(refused, model, corpus, queries):
    words = "--group-column task is no column of --query, which has id, prompt, completion, source"
    base = ("score", "run", "--model", model, "--dataset", corpus, "--query", queries)
    refused(words, *base, "--group-column", "task")


def test_options_of_a_fit(refused, command, model, corpus, tmp_path):
    base = ("hessian", "run", "--model", model, "--dataset", corpus)
    refused("--partitions must be 1 or more, not 0", *base, "--partitions", 0)
    refused("labels are drawn for a plain cross-entropy", *base, "--labels", "model", "--loss", "log-odds")
    refused("no --dataset: a curvature needs a model and a dataset", *base[:4])
    optimizer = torch.optim.AdamW((net := make_model()).parameters())
    net(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "adam.pt")
    for name in ("kfac", "ekfac", "tkfac"):
        flags = ("--dataset", corpus, "--method", name, "--optimizer-state", "adam.pt")
        words = r"kfac is fitted from factors, so Adam\(eps=1e-08\) cannot come before it: leave it out"
        refused(words, "score", "run", "--model", model, *flags, *ASK)
        result = command("hessian", name, "--model", model, *flags)
        assert (result.status, result.err.count("\n")) == (2, 1)
        assert re.search(words, result.err)
        assert not list((tmp_path / name).rglob("*.h5"))


def test_a_curvature_that_does_not_fit(refused, curved, model, neox, corpus, store):
    H, base = ("--hessian-path", curved / "H"), ("--dataset", corpus)
    for command in (("score", "run", *ASK), ("build", "run"), ("reduce", "run")):
        refused(
            "model is .*llama, fp32 there and .*neox.*; in config.json, ",
            *command,
            *base,
            "--model",
            neox,
            *H,
        )
        mine = (*command, *base, "--model", model)
        refused(
            "projection is rademacher:16x16 there and rademacher:8x8 here", *mine, *H, "--projection-dim", 8
        )
        refused("nowhere does not exist: give the directory of a run", *mine, "--hessian-path", "nowhere")
        refused("has no hessian.h5: give the directory of a run", *mine, "--hessian-path", store)
    score = ("score", "run", *base, "--model", model, *ASK)
    refused("grad_dot has no curvature: leave out --hessian-path", *score, *H, "--method", "grad-dot")
    refused("datainf takes no curvature that was fitted before", *score, *H, "--method", "datainf",
            "--projection-dim", 16)  # fmt: skip
    ekfac = ("--hessian-path", curved / "ekfac", "--projection-dim", 0)
    refused("factored damping needs a curvature that is a product", *score, *ekfac, "--damping", "factored:1")
    refused("--labels is of a curvature that is fitted here", *score, *H, "--labels", "model")
    refused("nowhere does not exist", "query", store, *ASK, "--hessian-path", "nowhere")
    refused("--damping belongs to a curvature: give --hessian-path", "query", store, *ASK, "--damping", "1")
    refused("'x' is not a damping", "query", store, *ASK, *H, "--damping", "x")


@pytest.mark.parametrize("name", ["build", "reduce"])
def test_gradients_are_written_for_one_damping(refused, curved, model, corpus, name):
    base = (name, "run", "--model", model, "--dataset", corpus)
    words = "gradients are written for one damping: give one, or several to score or query"
    refused(words, *base, "--hessian-path", curved / "H", "--damping", "0.1,1")
    refused("--damping belongs to a curvature: give --hessian-path", *base, "--damping", "0.1")


@pytest.mark.parametrize(
    ("stored", "flags", "words"),
    [
        (
            "behind",
            ["H", "--unit-normalize"],
            r"multiplied by H\^-1, and a cosine needs H\^-0.5 on both sides",
        ),
        ("root", ["H"], r"multiplied by H\^-0.5, and an inner product H\^-1 on one side: make them again"),
        ("behind", ["other"], "multiplied by another curvature: give theirs as --hessian-path"),
        ("behind", ["H", "--damping", "0.5"], "were damped by 0.1: give --damping 0.1"),
        ("behind", ["H", "--damping", "0.1,1"], "were damped by 0.1: give --damping 0.1"),
        ("unit", ["H"], "have unit norm, which comes after a curvature: make them again without it"),
        ("behind", [], r"were multiplied by H\^-1: give that curvature as --hessian-path"),
    ],
)
def test_stored_queries_and_curvatures(refused, curved, store, model, corpus, stored, flags, words):
    flags = ["--hessian-path", curved / flags[0], *flags[1:]] if flags else []
    asked = ("--query-path", curved / stored, *flags)
    refused(words, "query", store, *asked)
    refused(words, "score", "run", "--model", model, "--dataset", corpus, *asked)


def test_stored_queries_and_methods_that_fit(refused, curved, model, corpus, monkeypatch):
    """They are looked at before the fit, which takes long."""

    def fit(*args, **options):
        raise AssertionError("a curvature was fitted")

    monkeypatch.setattr("gradfn.methods.recipes.fit", fit)
    base = ("score", "run", "--model", model, "--dataset", corpus, "--query-path")
    refused("transform.chain.0 is .*'rademacher:16x16'.* there and nothing here", *base, curved / "plain",
            "--method", "ekfac")  # fmt: skip
    words = "have unit norm or are behind a curvature, and logra fits one of its own: make them again"
    for stored in ("unit", "behind", "root"):
        refused(words, *base, curved / stored, "--method", "logra", "--projection-dim", 16)
    plain = (*base, curved / "plain", "--method")
    refused(
        "trackstar fits a curvature over the queries: give --query, or --hessian-path", *plain, "trackstar"
    )
    refused("trak projects all layers together, which stored gradients are not: give --query", *plain, "trak")


def test_a_store_that_is_behind_a_curvature(refused, curved):
    for stored in ("behind", "root"):
        words = f"{stored} is behind a curvature, which is for queries: give it as --query-path"
        refused(words, "query", curved / stored, *ASK)
    words = "unit has unit norm, which comes after a curvature: build it without --unit-normalize"
    refused(words, "query", curved / "unit", *ASK, "--hessian-path", curved / "H")


def test_curvatures_that_do_not_mix(refused, curved, store):
    pair = (curved / "H", curved / "other")
    refused("a mixing coefficient must be between 0 and 1, not 2", "mix", "run", *pair, "--coefficient", 2)
    refused("-components must be 1 or more, not 0", "mix", "run", *pair, "--target-downweight-components", 0)
    both = ("--coefficient", 0.5, "--target-downweight-components", 20)
    refused("--coefficient is a weight, .*: leave one of them out", "mix", "run", *pair, *both)
    words = "two ekfac curvatures have two eigenbases and do not mix: fit one over both data sets"
    refused(words, "mix", "run", curved / "ekfac", curved / "ekfac2")
    refused("transform.chain.0 is", "mix", "run", curved / "H", curved / "ekfac")
    refused("has no hessian.h5: give the directory of a run", "mix", "run", curved / "H", store)


# --- runs that are unfinished, different or damaged


@pytest.fixture
def segmented(ok, model, corpus, tmp_path):
    """A store of several segments, and the command that made it."""
    made = ("build", tmp_path / "store", "--model", model, "--dataset", corpus, "--token-batch-size", 1)
    ok(*made)
    segments = sorted((tmp_path / "store" / "segments").glob("*.h5"))
    assert len(segments) > 2
    return tmp_path / "store", segments, made


def everything_in(run):
    with gf.open_store(run) as store:
        return {name: store.read(name).tolist() for name in store.names()}


def test_an_unfinished_store(refused, segmented):
    run, segments, _ = segmented
    (run / "store.h5").unlink()
    segments[0].unlink()
    words = "the store of .* is unfinished: run gradfn build .* again, which resumes"
    refused(words, "query", run, *ASK)
    refused(words, "info", run)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def corrupt(path):
    with h5py.File(path) as file:
        dataset = file["gradients/model.layers.0.self_attn.q_proj"]
        offset = dataset.id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"), [(truncate, "cut short"), (corrupt, "a checksum does not match")]
)
def test_a_damaged_segment(refused, ok, segmented, damage, reason):
    run, segments, made = segmented
    before = everything_in(run)
    damage(segments[1])
    again = rf"run (gradfn build {run} --model .*) again, which recomputes only it"
    refused(rf"{segments[1].name} is damaged \(.*{reason}\): delete it and {again}", "query", run, *ASK)
    segments[1].unlink()
    result = refused(f"{segments[1].name} is missing: {again}", "query", run, *ASK)
    command = shlex.split(re.search(again, " ".join(result.err.split()))[1])
    assert command == ["gradfn", *map(str, made)]
    assert "rows that were there already" in ok(*command[1:])
    assert everything_in(run) == before


def test_a_run_made_with_other_settings(refused, ok, segmented):
    run, _, made = segmented
    words = (
        r"was made with other settings \(transform.chain.0.seed is 0 there and 9 here, "
        r"loss.reduction is .mean. there and .sum. here|loss.reduction is .mean. there and .sum. here, "
        r"transform.chain.0.seed is 0 there and 9 here"
    )
    changed = (*made, "--seed", 9, "--loss-reduction", "sum")
    refused(words, *changed)
    refused("add --overwrite to replace it, or write to another directory", *changed)
    assert "from 12 rows" in ok(*made)
    ok(*changed, "--overwrite")
    assert gf.open_store(run).settings["loss"]["reduction"] == "sum"


def test_what_is_no_run(refused, segmented, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    for name, words in (
        ("nowhere", "nowhere does not exist: give the directory of a run"),
        ("empty", "empty has no store.h5: give the directory of a run that wrote one"),
        ("notes.txt", "notes.txt is no HDF5 file: give the directory of a run"),
        ("other.h5", "other.h5 was not written by gradfn"),
        (segmented[1][0], "is one segment of a run: open the run directory"),
    ):
        refused(words, "info", name)
        refused(words, "query", name, *ASK)


def test_scores_cannot_be_searched(refused, ok, model, corpus, tmp_path):
    ok("score", tmp_path / "run", "--model", model, "--dataset", corpus, *ASK)
    refused("run has no store.h5: give the directory of a run that wrote one", "query", "run", *ASK)
    refused("holds scores, not gradients", "query", "run/scores.h5", *ASK)
    refused("holds scores, not gradients", "score", "--model", model, "--dataset", corpus, "--query-path",
            "run/scores.h5")  # fmt: skip


# --- the disk


def test_a_full_disk_keeps_what_is_complete(command, ok, segmented, monkeypatch, tmp_path):
    run, segments, made = segmented
    before = everything_in(run)
    shutil.rmtree(run)
    write, calls = gf.store.file._write_file, []

    def full(path, fill):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, fill)

    monkeypatch.setattr("gradfn.store.file._write_file", full)
    result = command(*made)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert re.search(r"cannot write .*h5 \(No space left on device\): free some space and run", result.err)
    assert sorted(path.name for path in (run / "segments").iterdir()) == [s.name for s in segments[:2]]
    monkeypatch.undo()
    assert "rows that were there already" in ok(*made)
    assert everything_in(run) == before


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
from gradfn.cli import main
main()
"""


def test_a_file_that_may_not_grow(model, corpus, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, "build", tmp_path / "run", "--model", model, "--dataset", corpus,
         "--quiet"],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert re.match(r"gradfn: cannot write .*\.h5 \(File too large\): free some space", result.stderr)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".h5", ".tmp")]


def test_an_export_that_fails(command, model, corpus, tmp_path, monkeypatch):
    def full(rows, columns, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(WRITERS, "csv", full)
    result = command("score", "--model", model, "--dataset", corpus, *ASK, "--csv", tmp_path / "t.csv")
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "could not write" in result.err
    assert list(tmp_path.iterdir()) == []


# --- a recipe's own file


@pytest.mark.parametrize(("text", "words"), [
    ("def f(problem) return 1", r"m.py failed \(SyntaxError: .*\): mend it, --debug shows where"),
    ("import nosuchmodule", r"m.py failed \(ModuleNotFoundError: No module named 'nosuchmodule'\): mend it"),
    ("def f(problem):\n    return problem.nosuch", r"m.py:f failed \(AttributeError: .*nosuch.*\): mend it"),
    ("class f:\n    pass", r"m.py:f failed \(TypeError: .*\): mend it"),
    ("def f(problem):\n    return 3", "m.py:f gives int, not an attribution: return gf.methods.InnerProduct"),
])  # fmt: skip
def test_faults_of_a_recipes_own_file(refused, model, corpus, tmp_path, text, words):
    (tmp_path / "m.py").write_text(text)
    refused(words, "score", "--model", model, "--dataset", corpus, *ASK, "--method", "m.py:f")


def test_what_gradfn_refuses_of_a_recipe_is_told_as_ever(refused, model, corpus, tmp_path):
    (tmp_path / "m.py").write_text("import gradfn as gf\ndef f(problem):\n    gf.project(-1)\n")
    result = refused("", "score", "--model", model, "--dataset", corpus, *ASK, "--method", "m.py:f")
    assert "failed" not in result.err


def test_debug_shows_where_a_recipe_failed(command, model, corpus, tmp_path):
    (tmp_path / "m.py").write_text("def f(problem):\n    return problem.nosuch\n")
    with pytest.raises(gf.InputError, match="failed") as error:
        command("--debug", "score", "--model", model, "--dataset", corpus, *ASK, "--method",
                f"{tmp_path}/m.py:f")  # fmt: skip
    assert isinstance(error.value.__cause__, AttributeError)


def test_an_optimizer_state_is_of_one_checkpoint(refused, model, neox, corpus):
    ask = ("--model", model, "--dataset", corpus, *ASK, "--method", "less", "--checkpoints")
    refused(
        "--optimizer-state is of one model, and --checkpoints are several: leave it out, or score each",
        "score", *ask, f"{model},{neox}", "--optimizer-state", "optimizer.pt",
    )  # fmt: skip
