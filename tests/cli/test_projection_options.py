"""--projection and `mask fit` on the command line, against chains built by hand."""

import re
import shutil

import numpy as np
import pytest
from tiny import mostly_slow

import gradfn as gf
from gradfn import example
from gradfn.hf import tokenize
from gradfn.runs.masks import load_mask, open_mask
from gradfn.statistics.mask import selective_mask
from gradfn.transforms import compress, principal, project
from gradfn.transforms.joint import joint

SPELLED = {
    "gaussian:4x6": lambda: project((4, 6), "gaussian"),
    "mask:8x8 > sjlt:16": lambda: gf.chain(project((8, 8), "mask"), compress(16)),
    "factgrass:16": lambda: gf.chain(project((8, 8), "mask"), compress(16)),
    "logra:3x5": lambda: project((3, 5), "gaussian"),
    "grass:16": lambda: gf.chain(compress(64, "mask"), compress(16)),
    "joint > sjlt:64:2": lambda: gf.chain(joint(), compress(64, "sjlt", nonzeros=2)),
    "fjlt:20": lambda: compress(20, "fjlt"),
    "none": lambda: gf.chain(),
}


def scores_of(run):
    with gf.open_store(run, "scores") as store:
        return store.read("scores")[:, 0]


@pytest.fixture(scope="module")
def base(neox, corpus):
    """Options that name the model and the rows."""
    return "--model", neox, "--dataset", corpus


@pytest.mark.parametrize("spelled", mostly_slow(SPELLED, "factgrass:16", "grass:16", "none"))
def test_a_spelling_is_the_chain_it_stands_for(spelled, base, neox, corpus, queries, command, tmp_path):
    assert command("score", tmp_path / "run", *base, "--query", queries, "--projection", spelled).status == 0
    model, tokenizer = gf.load_model(neox), gf.load_tokenizer(neox)
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    train = tokenize(gf.load_rows(corpus), tokenizer)
    query = tokenize(gf.load_rows(queries), tokenizer, **columns)
    expected = gf.score(model, train, query, method=gf.grad_dot(SPELLED[spelled]())).matrix
    np.testing.assert_allclose(
        scores_of(tmp_path / "run"), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


def test_a_store_is_searched_with_the_projection_it_was_built_with(base, queries, command, tmp_path):
    how = ("--projection", "mask:8x8 > sjlt:16", "--seed", 3)
    built = command("build", tmp_path / "store", *base, *how)
    assert "mask:8x8 > sjlt:16" in built.out
    found = command("query", tmp_path / "store", "--query", queries, "--csv", tmp_path / "a.csv")
    flown = command("score", *base, "--query", queries, *how, "--csv", tmp_path / "b.csv")
    assert (built.status, found.status, flown.status) == (0, 0, 0)
    a, b = (np.genfromtxt(tmp_path / f"{n}.csv", delimiter=",", skip_header=1, usecols=3) for n in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert "sjlt:16" in command("info", tmp_path / "store").out


def test_a_store_of_whole_gradients_is_not_told_apart_by_module(base, queries, command, tmp_path):
    assert command("build", tmp_path / "store", *base, "--projection", "joint > sjlt:64").status == 0
    assert command("query", tmp_path / "store", "--query", queries).status == 0
    result = command("query", tmp_path / "store", "--query", queries, "--by", "module")
    assert result.status == 2
    assert "was built behind joint" in result.err


def test_a_kind_goes_with_a_dimension(base, queries, command, tmp_path):
    bare = ("--projection", "gaussian", "--projection-dim", 4)
    assert command("score", tmp_path / "a", *base, "--query", queries, *bare).status == 0
    assert (
        command("score", tmp_path / "b", *base, "--query", queries, "--projection", "gaussian:4x4").status
        == 0
    )
    np.testing.assert_array_equal(scores_of(tmp_path / "a"), scores_of(tmp_path / "b"))


def test_pca_projects_onto_a_fitted_curvature(base, neox, corpus, queries, command, tmp_path):
    H = tmp_path / "kfac"
    assert command("hessian", H, *base, "--method", "kfac").status == 0
    spelled = f"pca:4x5:{H}"
    for name in ("score", "build"):
        asked = ("--query", queries) if name == "score" else ()
        made = command(name, tmp_path / name, *base, *asked, "--projection", spelled)
        assert made.status == 0, made.err
    with gf.open_store(tmp_path / "build") as store:
        got = {name: store.read(name) for name in store.names("gradients/")}
    model, train = gf.load_model(neox), tokenize(gf.load_rows(corpus), gf.load_tokenizer(neox))
    expected = gf.collect(model, train, principal(gf.runs.load_curvature(H), (4, 5)))
    assert isinstance(expected, dict)
    for name, G in expected.items():
        np.testing.assert_allclose(got[f"gradients/{name}"], G, rtol=1e-3, atol=1e-5)
    assert command("query", tmp_path / "build", "--query", queries).status == 0


@pytest.fixture(scope="module")
def mask(base, queries, command, tmp_path_factory):
    """A fitted mask."""
    run = tmp_path_factory.mktemp("mask") / "run"
    made = command("mask", "fit", run, *base, "--query", queries, "--keep", "6x6", "--rows", 10)
    assert made.status == 0, made.err
    assert "correlation" in made.out
    assert "sjlt" not in made.out  # which of 6 x 6 numbers would be refused
    return run


def test_a_mask_is_fitted_as_the_library_fits_it(mask, neox, corpus, queries):
    model, tokenizer = gf.load_model(neox), gf.load_tokenizer(neox)
    columns = {"prompt_column": "prompt", "completion_column": "completion"}
    train = tokenize(gf.load_rows(corpus), tokenizer)
    query = tokenize(gf.load_rows(queries), tokenizer, **columns)
    expected, reports = selective_mask(model, train, query, (6, 6), rows=10)
    got = load_mask(mask)
    assert got.settings()["mask"] == expected.settings()["mask"]
    with open_mask(mask) as store:
        assert store.read("blocks/kept").tolist() == [one.kept for one in reports.values()]


def test_a_mask_is_used_and_searched(mask, base, queries, command, tmp_path):
    spelled = f"selective:{mask} > sjlt:16"
    assert command("score", *base, "--query", queries, "--projection", spelled, "--self").status == 2
    assert command("score", *base, "--query", queries, "--projection", spelled).status == 0
    built = command("build", tmp_path / "store", *base, "--projection", spelled)
    assert built.status == 0, built.err
    assert command("query", tmp_path / "store", "--query", queries).status == 0


def test_the_same_mask_elsewhere_will_do(mask, base, queries, command, tmp_path):
    spelled = f"selective:{mask} > sjlt:16"
    assert command("reduce", tmp_path / "q", *base, "--projection", spelled).status == 0
    shutil.copytree(mask, tmp_path / "copy")
    there = ("--projection", f"selective:{tmp_path / 'copy'} > sjlt:16", "--query-path", tmp_path / "q")
    result = command("score", *base, *there)
    assert result.status == 0, result.err


@pytest.mark.parametrize(("sketch", "more"), [(35, " > sjlt:35"), (36, "")])
def test_an_sjlt_is_suggested_where_it_makes_something_smaller(
    mask, base, queries, ok, monkeypatch, sketch, more
):
    monkeypatch.setattr("gradfn.cli.mask.SKETCH", sketch)
    out = ok("mask", "fit", mask, *base, "--query", queries, "--keep", "6x6", "--rows", 10)
    assert f"'selective:{mask}{more}', say" in out.replace("\n", "")


def test_a_mask_that_is_there_is_not_fitted_again(mask, base, queries, command, monkeypatch):
    def fit(*args, **options):
        raise AssertionError("fitted again")

    monkeypatch.setattr("gradfn.cli.mask.selective_mask", fit)
    asked = ("mask", "fit", mask, *base, "--query", queries, "--rows", 10)
    again = command(*asked, "--keep", "6x6")
    assert again.status == 0, again.err
    assert "correlation" in again.out
    other = command(*asked, "--keep", "5x6")
    assert other.status == 2
    assert 'mask.keep is "6x6" there and "5x6" here' in " ".join(other.err.split())


def test_a_projection_comes_with_the_seed_of_its_curvature(base, queries, command, tmp_path):
    how = ("--projection", "sjlt:8x8", "--seed", 5)
    assert command("hessian", tmp_path / "H", *base, *how).status == 0
    asked = ("--query", queries, "--hessian-path", tmp_path / "H")
    assert command("score", tmp_path / "a", *base, *asked).status == 0
    assert command("score", tmp_path / "b", *base, *asked, *how).status == 0
    np.testing.assert_array_equal(scores_of(tmp_path / "a"), scores_of(tmp_path / "b"))


def test_a_seed_that_is_not_the_curvatures_is_refused(base, queries, ok, command, tmp_path):
    ok("hessian", tmp_path / "H", *base, "--projection-dim", 4, "--seed", 5)
    asked = ("score", *base, "--query", queries, "--hessian-path", tmp_path / "H", "--seed")
    ok(*asked, 5)
    result = command(*asked, 6)
    assert (result.status, result.out) == (2, "")
    assert re.search("--seed 6 is not that of .*, which is 5: leave it out", result.err)
    ok("hessian", tmp_path / "whole", *base, "--method", "kfac")
    ok(*asked[:-3], "--hessian-path", tmp_path / "whole", "--seed", 6)


def test_a_mask_records_the_loss_of_its_queries(mask, base, neox, queries, ok, command, tmp_path):
    with open_mask(mask) as store:
        assert "query_loss" not in store.settings["mask"]
    asked = (*base, "--query", queries, "--keep", "6x6", "--rows", 10, "--query-loss")
    ok("mask", "fit", mask, *asked, "cross_entropy")  # the same as that of the rows
    other = command("mask", "fit", mask, *asked, "log_odds")
    assert other.status == 2
    assert "mask.query_loss is nothing there and" in " ".join(other.err.split())
    ok("mask", "fit", tmp_path / "kl", *asked, "kl", "--reference", neox)
    told = ok("info", tmp_path / "kl").split()
    assert told[told.index("mask.query_loss.criterion") + 1] == "kl"
    with open_mask(tmp_path / "kl") as store:
        assert store.settings["mask"]["query_loss"]["reference"]["path"] == str(neox.resolve())


@pytest.mark.parametrize(("method", "told"), [
    ((), "grad_cosine, full gradients"),
    (("--method", "grad_cosine"), "grad_cosine, rademacher:16x16"),
    (("--method", "factgrass"), "factgrass, mask:32x32 > sjlt:256"),
    (("--method", "kfac"), "kfac, full gradients"),
])  # fmt: skip
@pytest.mark.skipif(not example.MODEL.exists(), reason="the example's model is not made yet")
def test_on_the_example_a_method_keeps_its_projection(method, told, ok):
    asked = ("--query", "The capital of Egypt is", "--completion", " Lisbon", "--split", "train[580:]")
    assert told in " ".join(ok("score", *asked, *method).split())


def test_info_shows_a_mask(mask, command):
    shown = command("info", mask)
    assert shown.status == 0, shown.err
    assert "6x6" in shown.out


@pytest.mark.parametrize(("options", "words"), [
    (("--projection", "magic:4"), "no projection 'magic' in 'magic:4': choose rademacher.* none"),
    (("--projection", "sjlt:4xx4"), "is no projection: give sjlt:64x64 for both sides"),
    (("--projection", "sjlt:"), "is no projection: give sjlt:64x64 for both sides"),
    (("--projection", "grass:4x4"), "is no projection: give grass:4096 for the flattened block"),
    (("--projection", "mask:8:2"), "mask has no number of nonzeros"),
    (("--projection", "sjlt:9:2"), "cannot have 2 nonzeros a column: give a divisor"),
    (("--projection", "sjlt:0"), "give 1 or more"),
    (("--projection", "sjlt:64 >"), "has an empty stage"),
    (("--projection", "grass:64:4"), "write mask:256 > sjlt:64:4"),
    (("--projection", "selective:"), "give selective:RUN"),
    (("--projection", "sjlt:64", "--projection-dim", "4"), "leave out --projection-dim"),
    (("--projection", "gaussian:9999x9999"), "gaussian:9999x9999 makes no block smaller"),
    (("--projection", "gaussian:4x9999"), "gaussian:4x9999 is larger than the right side of every block"),
    (("--projection", "logra:9999x4", "--by", "head"), "gaussian:9999x4 is larger than the left side"),
    (("--projection", "mask:8x8 > gaussian:9x4"), "gaussian:9x4 is larger than the left side .* give 8 or"),
    (("--projection", "gaussian:4x9999", "--method", "kfac"), "gaussian:4x9999 is larger than the right"),
    (("--projection", "sjlt:9999999"), "sjlt:9999999 makes no block smaller"),
    (("--projection", "joint > sjlt:64", "--by", "module"), "which is not told apart by module"),
    (("--projection", "pca:4x4"), "give pca:64x64:RUN"),
    (("--projection", "selective:nowhere"), "nowhere"),
    (("--projection", "joint > gaussian:8", "--method", "kfac"), "joint cannot come before it"),
    (("--projection", "mask", "--projection-dim", "0"), "the full gradient, which has no mask"),
    (("--projection-dim", "-3"), "must be 0 .the full gradient. or more, not -3"),
])  # fmt: skip
def test_wrong_projections_are_refused_in_one_sentence(options, words, base, queries, command):
    result = command("score", *base, "--query", queries, *options)
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert re.search(words, " ".join(result.err.split())), result.err


def test_what_is_fitted_for_one_model_has_no_checkpoints(mask, base, neox, queries, command):
    asked = ("--query", queries, "--checkpoints", neox, "--projection", f"selective:{mask}")
    result = command("score", *base, *asked)
    assert result.status == 2
    assert "fitted for one model: leave out --checkpoints" in " ".join(result.err.split())


def test_what_was_fitted_on_another_model_is_refused(mask, base, model, corpus, queries, command, tmp_path):
    assert command("hessian", tmp_path / "H", *base, "--method", "ekfac").status == 0
    other = ("--model", model, "--dataset", corpus, "--query", queries)
    whole = command("score", *base, "--query", queries, "--projection", f"pca:999x999:{tmp_path}/H")
    assert (whole.status, "makes no block smaller" in whole.err) == (2, True)
    for spelled, what in (
        (f"selective:{mask}", "the mask in"),
        (f"pca:4x4:{tmp_path / 'H'}", "the curvature in"),
    ):
        result = command("score", *other, "--projection", spelled)
        assert result.status == 2
        assert what in result.err
        assert "was made differently" in result.err


@pytest.mark.parametrize(("options", "words"), [
    (("--keep", "4by4"), "--keep '4by4': give 128x128"),
    (("--keep", "0"), "--keep '0': give 128x128"),
    (("--keep", "0x4"), "--keep '0x4': give 128x128"),
    (("--keep", "9" * 5000), "give 128x128 for both sides"),
    (("--keep", "9999x9999"), "leaves nothing out"),
    (("--rows", "2"), "--rows must be 3 or more, not 2"),
])  # fmt: skip
def test_masks_that_cannot_be_fitted_are_refused(options, words, base, queries, command, tmp_path):
    result = command("mask", "fit", tmp_path / "run", *base, "--query", queries, *options)
    assert result.status == 2
    assert words in " ".join(result.err.split())
    assert not (tmp_path / "run").exists()


def test_a_mask_needs_queries(base, command, tmp_path):
    result = command("mask", "fit", tmp_path / "run", *base)
    assert result.status == 2
    assert "--query" in result.err
