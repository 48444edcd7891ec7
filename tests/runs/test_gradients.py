"""Gradients on disk: built, reduced, read."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gradfn as gf
from gradfn.engine.engine import Engine
from gradfn.errors import InputError, StorageError
from gradfn.runs import gradients as runs


def gradients_of(run):
    with gf.open_store(run) as store:
        return runs.read_gradients(store)


def test_build_writes_what_collect_returns(model, documents, tmp_path, transform):
    summary = gf.build(tmp_path / "run", model, documents, transform, token_batch_size=2)
    expected = gf.collect(model, documents, transform)
    found = gradients_of(tmp_path / "run")
    assert found.keys() == expected.keys()
    for block in expected:
        torch.testing.assert_close(found[block], expected[block], rtol=1e-4, atol=1e-5)
    assert (
        summary == runs.Summary((tmp_path / "run" / "store.h5").resolve(), 8, 1, 1, 0)
        or summary.path.exists()
    )
    assert (summary.rows, summary.unsupervised, summary.zero, summary.resumed) == (8, 1, 1, 0)


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize(
    "made", [gf.project(4), gf.chain(gf.project(3, "gaussian", seed=7), gf.unit_normalize())]
)
def test_reduce_is_the_mean_or_sum_of_collect(model, documents, tmp_path, aggregation, made):
    summary = gf.reduce(tmp_path / "run", model, documents, made, aggregation=aggregation, token_batch_size=9)
    assert summary.rows == 1
    found = gradients_of(tmp_path / "run")
    for block, rows in gf.collect(model, documents, made).items():
        expected = getattr(rows.double(), aggregation)(0, keepdim=True)
        torch.testing.assert_close(found[block].double(), expected, rtol=1e-4, atol=1e-5)


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


def test_settings_of_another_run_are_refused(llama, documents, tmp_path):
    gf.build(tmp_path, llama, documents, gf.project(4), settings={"data": {"path": "a"}})
    words = r'data.path is "a" there and "b" here\): give `overwrite=True`'
    with pytest.raises(InputError, match=words):
        gf.build(tmp_path, llama, documents, gf.project(4), settings={"data": {"path": "b"}})
    gf.build(tmp_path, llama, documents, gf.project(4), settings={"data": {"path": "b"}}, overwrite=True)
    with pytest.raises(InputError, match=r'aggregation is nothing there and "mean" here'):
        gf.reduce(tmp_path, llama, documents, gf.project(4), settings={"data": {"path": "b"}})


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


def test_a_store_beyond_the_free_disk_is_refused_before_a_row_is_made(
    model, documents, tmp_path, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        StorageError, match=r"8 rows take 0\.0 GiB and 0\.0 GiB are free at .*: free some space"
    ):
        gf.build(tmp_path / "run", model, documents, gf.project(4))
    assert not [*(tmp_path / "run").rglob("*.h5")]
    monkeypatch.undo()
    assert gf.build(tmp_path / "run", model, documents, gf.project(4)).resumed == 0


def test_gradients_beyond_the_free_memory_are_refused_before_a_row_is_made(model, documents, monkeypatch):
    monkeypatch.setattr("gradfn.memory.SURE_BYTES", 0)
    monkeypatch.setattr("gradfn.memory.free_memory", lambda device: 1000)
    monkeypatch.setattr(Engine, "__call__", None)  # never called
    with pytest.raises(
        InputError, match=r"the results of 8 rows take .* GiB are free: project the gradients"
    ):
        gf.collect(model, documents)


def test_copies_of_queries_beyond_the_free_memory_are_refused(model, documents, monkeypatch):
    queries = gf.collect(model, documents, gf.project(4))
    method = gf.grad_dot(gf.project(4))
    monkeypatch.setattr("gradfn.memory.SURE_BYTES", 0)
    monkeypatch.setattr("gradfn.memory.free_memory", lambda device: 1000)
    with pytest.raises(InputError, match=r"of 8 queries take .*: ask fewer queries at a time"):
        method.against(queries)


def test_queries_beyond_the_free_memory_are_refused_before_a_curvature_is_fitted(
    model, documents, monkeypatch
):
    monkeypatch.setattr("gradfn.memory.SURE_BYTES", 0)
    monkeypatch.setattr("gradfn.memory.free_memory", lambda device: 1000)
    monkeypatch.setattr(Engine, "__call__", None)  # never called
    words = "the results of 8 queries take .* or take fewer queries at a time"
    with pytest.raises(InputError, match=words):
        gf.score(model, documents, documents, method="ekfac")
