"""Which rows a run has, in how many segments, and what lies beside them."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import make_model
from torch import nn

import gradfn as gf
from gradfn.errors import InputError
from gradfn.model.sites import View
from gradfn.runs import rows as runs
from gradfn.runs.gradients import read_gradients


def gradients_of(run):
    with gf.open_store(run) as store:
        return read_gradients(store)


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
        assert store.read("rows/text").tolist() == ["é" * 4096, *documents.texts[1:]]


@pytest.mark.parametrize("tokens", [False, True])
def test_what_takes_longer_than_a_minute_is_cut_and_a_batch_is_not(
    llama, documents, tmp_path, monkeypatch, tokens
):
    def spans(run):
        gf.build(run, llama, documents, gf.project(4), token_batch_size=10, view=View(tokens=tokens))
        return sorted(tuple(map(int, p.stem.split("-")[1:])) for p in (run / "segments").glob("*.h5"))

    rows = int(documents.lengths.sum()) if tokens else len(documents)
    assert spans(tmp_path / "whole") == [(0, rows)]
    monkeypatch.setattr(runs, "FIRST_TOKENS", 0)
    monkeypatch.setattr(runs, "SEGMENT_SECONDS", 0.0)
    cut = spans(tmp_path / "cut")
    assert len(cut) > 3
    assert [row for span in cut for row in range(*span)] == list(range(rows))
    a, b = gradients_of(tmp_path / "whole"), gradients_of(tmp_path / "cut")
    for block in a:
        torch.testing.assert_close(a[block], b[block], rtol=1e-4, atol=1e-5)


def test_a_run_that_is_stopped_says_what_it_keeps(llama, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEGMENT_BATCHES", 1)

    def build(stop_after):
        left = [stop_after]

        def progress(_):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        gf.build(tmp_path, llama, documents, gf.project(4), token_batch_size=10, progress=progress)

    with pytest.raises(
        KeyboardInterrupt, match=f"nothing is complete in {tmp_path}: the same command begins"
    ):
        build(1)
    with pytest.raises(KeyboardInterrupt, match=f"2 of 8 rows are kept in {tmp_path}: the same command does"):
        build(3)
    build(100)
    assert gf.open_store(tmp_path).rows == 8


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


def test_a_loss_that_is_not_finite_names_the_row_and_keeps_what_is_complete(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEGMENT_BATCHES", 1)
    model = make_model().requires_grad_(False)
    model.model.embed_tokens.weight[documents[5]["input_ids"][0]] = torch.nan
    with pytest.raises(InputError, match=r"the loss of row 5 \(id 'row 5'\) is NaN or infinite"):
        gf.build(tmp_path, model, documents, gf.project(4), token_batch_size=5)
    assert [path.stem.split("-")[2] for path in sorted((tmp_path / "segments").glob("*.h5"))][
        -1
    ] == "0000000005"


def test_layers_in_words():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    assert runs.layer_summary(net) == "2 linear layers, 72% of 29 parameters"
    assert runs.layer_summary(net, View(exclude=["2"])) == "1 linear layer, 55% of 29 parameters"


def test_tokens_of_a_store_sum_to_its_documents(model, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "SEGMENT_BATCHES", 1)
    summary = gf.build(tmp_path, model, documents, gf.project(4), view=View(tokens=True), token_batch_size=8)
    assert summary.rows == documents.lengths.sum()
    assert len(list((tmp_path / "segments").glob("*.h5"))) > 2
    expected = gf.collect(model, documents, gf.project(4))
    with gf.open_store(tmp_path) as store:
        owners = store.read("rows/document")
        for name, rows in read_gradients(store).items():
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
