import dataclasses

import numpy as np
import pytest
import torch
from tiny import make_model
from torch import nn

import gradfn as gf
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping
from gradfn.model.sites import View
from gradfn.runs import gradients as runs
from gradfn.statistics import ekfac

TRANSFORMS = {
    "full": gf.chain(),
    "projected": gf.project(4),
    "gaussian unit": gf.chain(gf.project(3, "gaussian", seed=7), gf.unit_normalize()),
    "unit": gf.chain(gf.unit_normalize()),
}


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request):
    return make_model(request.param).requires_grad_(False)


@pytest.fixture(scope="module")
def llama():
    return make_model().requires_grad_(False)


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 300, size).tolist() for size in (5, 3, 9, 1, 4, 7, 2, 6)]
    return gf.make_documents(rows, ids=[f"row {i}" for i in range(8)], texts=[f"text {i}" for i in range(8)])


def gradients_of(run):
    with gf.open_store(run) as store:
        return runs.read_gradients(store)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_build_writes_what_collect_returns(model, documents, tmp_path, name):
    summary = gf.build(tmp_path / "run", model, documents, TRANSFORMS[name], token_batch_size=2)
    expected = gf.collect(model, documents, TRANSFORMS[name])
    found = gradients_of(tmp_path / "run")
    assert found.keys() == expected.keys()
    for block in expected:
        torch.testing.assert_close(found[block], expected[block], rtol=1e-4, atol=1e-5)
    assert (
        summary == runs.Summary((tmp_path / "run" / "store.h5").resolve(), 8, 1, 1, 0)
        or summary.path.exists()
    )
    assert (summary.rows, summary.unsupervised, summary.zero, summary.resumed) == (8, 1, 1, 0)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_stored_scores_are_scores_on_the_fly(model, documents, tmp_path, name):
    queries = documents.select([2, 5])
    made = TRANSFORMS[name]
    gf.build(tmp_path / "run", model, documents, made)
    blocks = gf.collect(model, queries, made)
    live = gf.score(model, documents, queries, method=gf.methods.InnerProduct(made, made))
    with gf.open_store(tmp_path / "run") as store:
        chunks = list(runs.stored_scores(store, gf.dot(blocks), rows_per_chunk=3))
        (whole,) = runs.stored_scores(store, gf.dot(blocks))
    assert [len(chunk) for chunk in chunks] == [3, 3, 2]
    torch.testing.assert_close(torch.cat(chunks), live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole, live, rtol=1e-4, atol=1e-4)


def test_rows_are_read_a_bounded_part_at_a_time(llama, documents, tmp_path, monkeypatch):
    gf.build(tmp_path / "run", llama, documents, gf.project(4))
    blocks = gf.collect(llama, documents.select([0]), gf.project(4))
    monkeypatch.setattr(runs, "READ_BYTES", 2 * 4 * 16 * len(blocks))
    with gf.open_store(tmp_path / "run") as store:
        assert [len(chunk) for chunk in runs.stored_scores(store, gf.dot(blocks))] == [2, 2, 2, 2]


def test_a_unit_norm_can_be_added_to_stored_rows(model, documents, tmp_path):
    gf.build(tmp_path / "run", model, documents, gf.project(4))
    cosine = gf.grad_cosine(gf.project(4))
    blocks = gf.collect(model, documents, cosine.query_transform)
    with gf.open_store(tmp_path / "run") as store:
        stored = torch.cat(list(runs.stored_scores(store, gf.grad_cosine().against(blocks))))
    torch.testing.assert_close(
        stored, gf.score(model, documents, documents, method=cosine), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(stored.diag()[[0, 1, 2]], torch.ones(3))
    assert (stored[3] == 0).all()  # a row with nothing to supervise


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("name", ["projected", "gaussian unit"])
def test_reduce_is_the_mean_or_sum_of_collect(model, documents, tmp_path, aggregation, name):
    made = TRANSFORMS[name]
    summary = gf.reduce(tmp_path / "run", model, documents, made, aggregation=aggregation, token_batch_size=9)
    assert summary.rows == 1
    found = gradients_of(tmp_path / "run")
    for block, rows in gf.collect(model, documents, made).items():
        expected = getattr(rows.double(), aggregation)(0, keepdim=True)
        torch.testing.assert_close(found[block].double(), expected, rtol=1e-4, atol=1e-5)


def test_score_run_writes_float32_scores_and_what_is_known_of_the_queries(model, documents, tmp_path):
    queries = gf.collect(model, documents.select([1]), gf.project(4))
    fixed = {"queries/text": ["a query that ends in NUL\0"]}
    summary = gf.runs.score_run(tmp_path, model, documents, queries, gf.grad_dot(gf.project(4)), fixed=fixed)
    with gf.open_store(summary.path, "scores") as store:
        scores = store.read("scores")
        assert store.fixed("queries/text").tolist() == ["a query that ends in NUL"]
        assert store.read("rows/id").tolist() == documents.ids
    assert (scores.dtype, scores.shape) == (np.float32, (8, 1))
    expected = gf.score(model, documents, documents.select([1]), method=gf.grad_dot(gf.project(4)))
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-4, atol=1e-4)


def test_any_model_and_data_with_a_loss_of_their_own(tmp_path):
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    data = [{"x": torch.randn(3)} for _ in range(5)]

    def loss(params, example):
        return torch.func.functional_call(net, params, example["x"]).square().sum()

    gf.build(tmp_path, net, data, loss=loss)
    expected = gf.per_example_grads(
        loss, gf.model.params_of(net), {"x": torch.stack([row["x"] for row in data])}
    )
    found = gradients_of(tmp_path)["root"]
    torch.testing.assert_close(found[:, :, :3], expected["weight"])
    torch.testing.assert_close(found[:, :, 3], expected["bias"])
    with gf.open_store(tmp_path) as store:
        assert store.read("rows/id").tolist() == ["0", "1", "2", "3", "4"]
        assert store.settings["loss"]["name"].endswith("loss")


def test_a_run_resumes_where_it_was_cut(llama, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEGMENT_BATCHES", 1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    seen = []
    for run in (whole, cut):
        gf.build(run, llama, documents, gf.project(4), token_batch_size=10)
    segments = sorted((cut / "segments").glob("*.h5"))
    assert len(segments) > 3
    for path in (cut / "store.h5", segments[0], segments[2]):
        path.unlink()
    summary = gf.build(cut, llama, documents, gf.project(4), token_batch_size=10, progress=seen.append)
    lost = [range(*map(int, path.stem.split("-")[1:])) for path in (segments[0], segments[2])]
    assert summary.resumed == 8 - sum(map(len, lost))
    tokens = sum(int(documents.lengths[row]) for rows in lost for row in rows)
    assert seen[0] == documents.lengths.sum() - tokens
    assert sum(seen) == documents.lengths.sum()
    a, b = gradients_of(whole), gradients_of(cut)
    assert all(torch.equal(a[block], b[block]) for block in a)


def test_a_resumed_run_may_use_another_batch_size(llama, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEGMENT_BATCHES", 1)
    gf.build(tmp_path, llama, documents, gf.project(4), token_batch_size=10)
    before = gradients_of(tmp_path)
    for path in (tmp_path / "store.h5", sorted((tmp_path / "segments").glob("*.h5"))[1]):
        path.unlink()
    gf.build(tmp_path, llama, documents, gf.project(4), token_batch_size=4)
    after = gradients_of(tmp_path)
    for block in before:
        torch.testing.assert_close(after[block], before[block], rtol=1e-4, atol=1e-5)


def test_slices_cover_the_rows_and_keep_to_the_limits():
    lengths = np.array([5, 100, 3, 3, 3, 40, 1, 0, 0, 7])
    for tokens in (1, 3, 7, 1000):
        for row_bytes in (1, runs.SEGMENT_BYTES // 3, runs.SEGMENT_BYTES * 2):
            slices = runs.plan_slices(lengths, tokens, row_bytes)
            assert [row for start, stop in slices for row in range(start, stop)] == list(range(10))
            for start, stop in slices:
                alone = stop - start == 1
                assert alone or lengths[start:stop].sum() <= runs.SEGMENT_BATCHES * tokens
                assert alone or (stop - start) * row_bytes <= runs.SEGMENT_BYTES


def test_long_texts_are_kept_in_part(llama, documents, tmp_path):
    long = dataclasses.replace(documents, texts=["é" * 100_000, *documents.texts[1:]])
    gf.build(tmp_path, llama, long, gf.project(2))
    with gf.open_store(tmp_path) as store:
        assert store.read("rows/text").tolist() == ["é" * runs.TEXT_CHARACTERS, *documents.texts[1:]]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_comes_back_from_its_settings(transform):
    assert runs.transform_of({"transform": gf.chain(transform).settings()}) == gf.chain(transform)


def test_a_transform_that_holds_tensors_does_not_come_back():
    settings = {"transform": gf.chain(gf.adam({"a": torch.ones(1, 1)})).settings()}
    with pytest.raises(InputError, match="Adam cannot be made from a store's settings"):
        runs.transform_of(settings)


def made(transform, **model):
    return {
        "model": {"fingerprint": "f", **model},
        "layers": {"include": [], "exclude": []},
        "transform": gf.chain(transform).settings(),
    }


def test_what_was_made_alike_is_compared():
    plain, unit = made(gf.project(4)), made(gf.chain(gf.project(4), gf.unit_normalize()))
    runs.refuse_mismatch(plain, plain, "it")
    runs.refuse_mismatch(plain, unit, "it")
    runs.refuse_mismatch(unit, unit, "it")
    runs.refuse_mismatch({**plain, "tokenizer": {"fingerprint": "t"}}, plain, "it")
    runs.refuse_mismatch(made(gf.project(4), path="here"), made(gf.project(4), path="there"), "it")
    with pytest.raises(InputError, match="it was made with unit norm, which cannot be undone"):
        runs.refuse_mismatch(unit, plain, "it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"fingerprint": "g"}}, "model is f there and g here"),
        ({"model": {"fingerprint": "g", "path": "p"}}, r"model is f there and p \(fingerprint g\) here"),
        ({"layers": {"include": [], "exclude": ["*"]}}, r"layers.exclude.0 is nothing there and \* here"),
        (
            {"transform": gf.chain(gf.project(5)).settings()},
            "chain.0.projection is rademacher:4x4 there and rademacher:5x5 here",
        ),
        ({"tokenizer": {"fingerprint": "u"}}, "tokenizer is t there and u here"),
    ],
)
def test_what_was_made_otherwise_is_refused_with_both_values(change, words):
    stored = {**made(gf.project(4)), "tokenizer": {"fingerprint": "t"}}
    with pytest.raises(InputError, match=f"it was made differently, .*{words}.*make it again"):
        runs.refuse_mismatch(stored, {**stored, **change}, "it")


def test_settings_of_another_run_are_refused(llama, documents, tmp_path):
    gf.build(tmp_path, llama, documents, gf.project(4), settings={"data": {"path": "a"}})
    words = r'data.path is "a" there and "b" here\): add --overwrite'
    with pytest.raises(InputError, match=words):
        gf.build(tmp_path, llama, documents, gf.project(4), settings={"data": {"path": "b"}})
    gf.build(tmp_path, llama, documents, gf.project(4), settings={"data": {"path": "b"}}, overwrite=True)
    with pytest.raises(InputError, match=r'aggregation is nothing there and "mean" here'):
        gf.reduce(tmp_path, llama, documents, gf.project(4), settings={"data": {"path": "b"}})


def test_what_describes_a_run_changes_with_all_that_rows_depend_on(documents):
    def described(model, data=documents, transform=None, **options):
        return runs.describe(gf.Subject(model, **options), data, transform)

    model = make_model()
    variants = [
        described(model),
        described(make_model(seed=1)),
        described(model, documents.select(range(7))),
        described(model, transform=gf.project(4)),
        described(model, transform=gf.project(4, seed=1)),
        described(model, loss=gf.causal_lm_loss(model, "sum")),
        described(model, view=View(include=["*mlp*"])),
        described(model, view=View(exclude=["*mlp*"])),
    ]
    assert all(a != b for i, a in enumerate(variants) for b in variants[:i])
    assert described(model) == described(make_model(), loss=gf.causal_lm_loss(model))


def test_scores_are_no_gradients(llama, documents, tmp_path):
    queries = gf.collect(llama, documents.select([1]), gf.project(4))
    with pytest.raises(TypeError, match="must not end in scores"):
        gf.build(tmp_path / "run", llama, documents, gf.chain(gf.project(4), gf.dot(queries)))
    summary = gf.runs.score_run(tmp_path / "scores", llama, documents, queries, gf.grad_dot(gf.project(4)))
    with pytest.raises(InputError, match=r"scores\.h5 holds scores, not gradients"):
        runs.open_gradients(summary.path)


def test_unknown_aggregation(llama, documents, tmp_path):
    with pytest.raises(Exception, match=r"(?s)max"):
        gf.reduce(tmp_path / "run", llama, documents, aggregation="max")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_the_row_and_keeps_what_is_complete(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEGMENT_BATCHES", 1)
    model = make_model().requires_grad_(False)
    model.model.embed_tokens.weight[documents[5]["input_ids"][0]] = torch.nan
    with pytest.raises(InputError, match=r"the loss of row 5 \(id row 5\) is NaN or infinite"):
        gf.build(tmp_path, model, documents, gf.project(4), token_batch_size=5)
    assert [path.stem.split("-")[2] for path in sorted((tmp_path / "segments").glob("*.h5"))][
        -1
    ] == "0000000005"


def test_layers_in_words():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    assert runs.layer_summary(net) == "2 linear layers, 72% of 29 parameters"
    assert runs.layer_summary(net, View(exclude=["2"])) == "1 linear layer, 55% of 29 parameters"


def test_shares_sum_to_the_scores(model, documents, tmp_path):
    queries = gf.collect(model, documents.select([1, 4]), gf.project(4))
    gf.runs.score_run(tmp_path, model, documents, queries, gf.grad_dot(gf.project(4)), by_block=True)
    gf.build(tmp_path, model, documents, gf.project(4))
    with gf.open_store(tmp_path, "scores") as scores, gf.open_store(tmp_path) as store:
        shares = {name.removeprefix(runs.SHARES): scores.read(name) for name in scores.names(runs.SHARES)}
        assert shares.keys() == queries.keys()
        np.testing.assert_allclose(sum(shares.values()), scores.read("scores"), rtol=1e-4, atol=1e-5)
        for name, share in runs.stored_shares(store, 2, gf.dot(queries, by_block=True)).items():
            np.testing.assert_allclose(share.numpy(), shares[name][2], rtol=1e-4, atol=1e-5)
        unit = runs.stored_shares(store, 2, gf.grad_cosine().against(queries, by_block=True))
        (whole,) = runs.stored_scores(store, gf.grad_cosine().against(queries))
        torch.testing.assert_close(sum(unit.values()), whole[2], rtol=1e-4, atol=1e-6)


def test_tokens_of_a_store_sum_to_its_documents(model, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEGMENT_BATCHES", 1)
    summary = gf.build(tmp_path, model, documents, gf.project(4), view=View(tokens=True), token_batch_size=8)
    assert summary.rows == documents.lengths.sum()
    assert len(list((tmp_path / "segments").glob("*.h5"))) > 2
    expected = gf.collect(model, documents, gf.project(4))
    with gf.open_store(tmp_path) as store:
        owners = store.read("rows/document")
        for name, rows in runs.read_gradients(store).items():
            sums = np.zeros(expected[name].shape)
            np.add.at(sums, owners, rows.numpy().astype(np.float64))
            np.testing.assert_allclose(sums, expected[name].numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="by example or by head, not by token: use build"):
        gf.reduce(tmp_path / "no", model, documents, view=View(tokens=True))


class Scaled(nn.Module):
    """A linear layer whose output is scaled by a parameter that no layer kind knows."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.linear(x) * self.scale


def test_layers_that_no_probe_sees_are_named(tmp_path):
    net = Scaled()
    data = [{"x": torch.randn(3)} for _ in range(4)]

    def loss(params, example):
        return torch.func.functional_call(net, params, example["x"]).square().sum()

    assert gf.build(tmp_path / "a", net, data, loss=loss).unprobed == ()
    assert gf.build(tmp_path / "b", net, data, loss=loss, view=View(["*"])).unprobed == ("scale",)


def test_scores_with_a_curvature_on_disk(llama, documents, tmp_path):
    H = gf.hessian(tmp_path, llama, documents, ekfac())
    method = gf.influence(H, damping=(Damping(0.1), Damping(1.0)))
    queries = gf.collect(llama, documents.select([1]))
    summary = gf.runs.score_run(tmp_path, llama, documents, queries, method)
    with gf.open_store(summary.path, "scores") as store:
        got = store.read("scores")
        assert store.settings["method"]["damping"] == ["0.1", "1"]
    live = gf.score(llama, documents, documents.select([1]), method=method)
    np.testing.assert_allclose(got, live.numpy(), rtol=1e-4, atol=1e-4)
