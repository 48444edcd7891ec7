"""`mask fit` from stores on the command line, against `mask fit` from the model."""

import pytest

from gradfn.runs.masks import load_mask, open_mask

WHOLE = ("--projection", "none", "--precision", "fp64")
PAIR = ("--prompt-column", "prompt", "--completion-column", "completion")
KEEP = ("--keep", "6x6", "--rows", 10, "--seed", 3)


@pytest.fixture(scope="module")
def rows(neox, corpus, ok, tmp_path_factory):
    run = tmp_path_factory.mktemp("rows") / "run"
    ok("build", run, "--model", neox, "--dataset", corpus, *WHOLE)
    return run


@pytest.fixture(scope="module")
def asked(neox, queries, ok, tmp_path_factory):
    run = tmp_path_factory.mktemp("queries") / "run"
    ok("build", run, "--model", neox, "--dataset", queries, *PAIR, *WHOLE)
    return run


@pytest.fixture(scope="module")
def mask(rows, asked, ok, tmp_path_factory):
    """A mask fitted to stores, in a run whose name has a `>`."""
    run = tmp_path_factory.mktemp("mask") / "my>run"
    told = ok("mask", "fit", run, "--store", rows, "--query-path", asked, *KEEP)
    assert f"""--projection 'selective:"{run}"', say""" in told.replace("\n", "")
    return run


def test_of_stores_it_is_the_mask_of_the_model(mask, neox, corpus, queries, ok, tmp_path):
    flown = ("--model", neox, "--dataset", corpus, "--query", queries, "--precision", "fp64")
    ok("mask", "fit", tmp_path / "flown", *flown, *KEEP)
    assert load_mask(mask).settings()["mask"] == load_mask(tmp_path / "flown").settings()["mask"]
    with open_mask(mask) as made, open_mask(tmp_path / "flown") as wanted:
        assert made.read("blocks/kept").tolist() == pytest.approx(wanted.read("blocks/kept").tolist())
        for key in ("layers", "transform", "tokenizer", "loss"):
            assert made.settings[key] == wanted.settings[key]


def test_it_is_used_on_the_same_model_and_no_other(mask, neox, model, corpus, queries, ok, command):
    how = ("--dataset", corpus, "--query", queries, "--projection", f'selective:"{mask}" > sjlt:16')
    ok("score", "--model", neox, "--precision", "fp64", *how)
    result = command("score", "--model", model, "--precision", "fp64", *how)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "was made differently" in result.err


def test_a_store_is_built_and_searched_behind_it(mask, neox, corpus, queries, ok, tmp_path):
    ok("build", tmp_path / "store", "--model", neox, "--dataset", corpus, "--precision", "fp64",
       "--projection", f'selective:"{mask}" > sjlt:16')  # fmt: skip
    ok("query", tmp_path / "store", "--query", queries)


def test_the_same_stores_are_not_fitted_again_and_others_are(mask, rows, asked, ok, command, monkeypatch):
    def fit(*args, **options):
        raise AssertionError("fitted again")

    monkeypatch.setattr("gradfn.cli.mask.stored_mask", fit)
    ok("mask", "fit", mask, "--store", rows, "--query-path", asked, *KEEP)
    other = command("mask", "fit", mask, "--store", rows, "--query-path", rows, *KEEP)
    assert other.status == 2
    assert "was made with other settings (mask.query.data" in other.err


def test_queries_may_be_reduced_to_one(rows, neox, queries, ok, tmp_path):
    ok("reduce", tmp_path / "mean", "--model", neox, "--dataset", queries, *PAIR, *WHOLE)
    ok("mask", "fit", tmp_path / "run", "--store", rows, "--query-path", tmp_path / "mean", *KEEP)


def test_a_mask_by_head_is_for_heads(neox, corpus, queries, ok, command, tmp_path):
    base = ("--model", neox, "--dataset", corpus, "--precision", "fp64")
    ok("build", tmp_path / "heads", *base, "--projection", "none", "--by", "head")
    ok("mask", "fit", tmp_path / "run", "--store", tmp_path / "heads", "--query-path", tmp_path / "heads",
       "--keep", "3x3", "--rows", 5)  # fmt: skip
    how = ("--query", queries, "--projection", f"selective:{tmp_path / 'run'}")
    ok("score", *base, *how, "--by", "head")
    assert "was made differently" in command("score", *base, *how).err


@pytest.mark.parametrize(("more", "words"), [
    (("--model", "m"), "the gradients of --store are made already: leave out --model"),
    (("--dataset", "d"), "leave out --dataset"), (("--query", "text"), "leave out --query"),
    (("--loss", "log_odds"), "leave out --loss"), (("--include", "*"), "leave out --include"),
    (("--optimizer-state", "s"), "leave out --optimizer-state"), (("--precision", "fp64"), "--precision"),
    (("--keep", "9999x9999"), "leaves nothing out"), (("--rows", 2), "--rows must be 3 or more, not 2"),
])  # fmt: skip
def test_what_has_no_effect_on_stores_is_refused(more, words, rows, asked, command, tmp_path):
    result = command("mask", "fit", tmp_path / "run", "--store", rows, "--query-path", asked, *more)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert words in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("how", "words"), [
    (("--projection-dim", 4), "are behind rademacher:4x4, and a mask is fitted to whole ones: build them"),
    (("--projection", "none", "--unit-normalize"), "are behind UnitNormalize, and a mask is fitted to"),
    (("--projection", "none", "--by", "token"), "are of tokens, and a mask is fitted to those of rows"),
    (("--projection", "none", "--split", "train[:2]"), "has 2 rows, and a mask keeps correlations"),
    (("--projection", "none", "--loss-reduction", "sum"), "reduction is mean there and sum here): build"),
    (("--projection", "none", "--include", "*dense*"), "was made differently"),
    (("--projection", "none", "--precision", "fp32"), "was made differently"),
])  # fmt: skip
def test_stores_that_do_not_go_together_are_refused(how, words, neox, corpus, asked, ok, command, tmp_path):
    fp64 = () if "--precision" in how else ("--precision", "fp64")
    ok("build", tmp_path / "store", "--model", neox, "--dataset", corpus, *fp64, *how)
    given = ("--store", tmp_path / "store", "--query-path", asked)
    result = command("mask", "fit", tmp_path / "run", *given, *KEEP)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert words in result.err
    assert not (tmp_path / "run").exists()


def test_stores_come_in_pairs(rows, asked, neox, corpus, command, tmp_path):
    alone = command("mask", "fit", tmp_path / "run", "--store", rows)
    assert (alone.status, "give the queries' with --query-path" in alone.err) == (2, True)
    mixed = command(
        "mask", "fit", tmp_path / "run", "--model", neox, "--dataset", corpus, "--query-path", asked
    )
    assert (mixed.status, "--query-path goes with --store" in mixed.err) == (2, True)
    absent = command("mask", "fit", tmp_path / "run", "--store", tmp_path / "no", "--query-path", asked)
    assert (absent.status, "does not exist" in absent.err) == (2, True)
