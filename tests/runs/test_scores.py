"""Scores on disk, of a model and of stored gradients."""

import tracemalloc

import numpy as np
import pytest
import torch
from matrices import score

import gradfn as gf
from gradfn.errors import InputError
from gradfn.linalg.spectrum import Damping, Spectrum
from gradfn.methods.attribution import Joined
from gradfn.methods.inner_product import InnerProduct
from gradfn.model.sites import View
from gradfn.runs import scores as runs
from gradfn.scores import SHARES, Columns, Scores, extremes
from gradfn.statistics import ekfac
from gradfn.store import open_writer
from gradfn.types import Rows


def test_stored_scores_are_scores_on_the_fly(model, documents, tmp_path, transform):
    queries = documents.select([2, 5])
    gf.build(tmp_path / "run", model, documents, transform)
    blocks = gf.collect(model, queries, transform)
    live = score(model, documents, queries, method=gf.methods.InnerProduct(transform, transform))
    with gf.open_store(tmp_path / "run") as store:
        chunks = list(runs.stored_scores(store, gf.dot(blocks), rows_per_chunk=3))
        (whole,) = runs.stored_scores(store, gf.dot(blocks))
    assert [len(chunk) for chunk in chunks] == [3, 3, 2]
    torch.testing.assert_close(torch.cat(chunks), live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole, live, rtol=1e-4, atol=1e-4)


def test_rows_are_read_a_bounded_part_at_a_time(llama, documents, tmp_path, monkeypatch):
    gf.build(tmp_path / "run", llama, documents, gf.project(4))
    blocks = gf.collect(llama, documents.select([0]), gf.project(4))
    row = 2 * 4 * 16 * len(blocks) + runs.RANKED_BYTES
    monkeypatch.setattr(runs, "READ_BYTES", 2 * row)
    many = {name: block.expand(100, -1, -1) for name, block in blocks.items()}
    with gf.open_store(tmp_path / "run") as store:
        assert [len(chunk) for chunk in runs.stored_scores(store, gf.dot(blocks))] == [2, 2, 2, 2]
        assert [len(chunk) for chunk in runs.stored_scores(store, gf.dot(blocks), memory=3 * row)] == [
            3,
            3,
            2,
        ]
        memory = 4 * (row + 99 * runs.RANKED_BYTES)
        assert [len(chunk) for chunk in runs.stored_scores(store, gf.dot(many), memory=memory)] == [4, 4]


def test_a_finished_run_makes_no_gradients_of_queries(llama, documents, tmp_path):
    def scored(queries):
        return runs.score_run(tmp_path, llama, documents, queries, gf.grad_dot(), query_ids=["a", "b"])

    def refuse():
        raise AssertionError("the scores are there")

    done = scored(lambda: documents.select([0, 1]))
    again = scored(refuse)
    assert (again.path, again.rows, again.zero) == (done.path, done.rows, done.zero)
    assert again.resumed == done.rows
    memory = 3 * 2 * runs.RANKED_BYTES
    assert [len(chunk) for chunk in runs.score_chunks(tmp_path, memory=memory)] == [3, 3, 2]


def test_a_unit_norm_can_be_added_to_stored_rows(model, documents, tmp_path):
    gf.build(tmp_path / "run", model, documents, gf.project(4))
    cosine = gf.grad_cosine(gf.project(4))
    blocks = gf.collect(model, documents, cosine.query_transform)
    with gf.open_store(tmp_path / "run") as store:
        stored = torch.cat(list(runs.stored_scores(store, gf.grad_cosine().against(blocks))))
    torch.testing.assert_close(
        stored, score(model, documents, documents, method=cosine), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(stored.diag()[[0, 1, 2]], torch.ones(3))
    assert (stored[3] == 0).all()  # a row with nothing to supervise


def test_score_run_writes_what_load_reads(model, documents, tmp_path):
    queries, method = documents.select([1, 4]), gf.grad_dot(gf.project(4))
    summary = runs.score_run(
        tmp_path, model, documents, queries, method, query_texts=["a text that ends in NUL\0", "another"]
    )
    with gf.open_store(summary.path, "scores") as store:
        assert (store.read("scores").dtype, store.shape("scores")) == (np.float32, (8, 1, 2))
    scores = Scores.load(tmp_path)
    assert (scores.row_ids, scores.query_ids) == (documents.ids, ["row 1", "row 4"])
    assert scores.query_texts == ["a text that ends in NUL", "another"]
    assert (scores.dampings, scores.documents, scores.shares) == (("",), None, {})
    torch.testing.assert_close(scores.matrix, score(model, documents, queries, method=method))
    assert scores.losses is not None
    assert torch.equal(scores.losses == 0, torch.from_numpy(documents.supervised == 0))


def test_queries_are_named_after_their_numbers_where_they_have_no_names(llama, documents, tmp_path):
    gradients = gf.collect(llama, documents.select([1, 4]), gf.project(4))
    runs.score_run(tmp_path / "a", llama, documents, gradients, gf.grad_dot(gf.project(4)))
    runs.score_run(tmp_path / "b", llama, documents, None, gf.grad_dot(gf.project(4)))
    assert Scores.load(tmp_path / "a").query_ids == ["0", "1"]
    assert Scores.load(tmp_path / "b").query_ids == ["self-influence"]


def test_names_that_are_not_as_many_as_the_queries_are_refused(llama, documents, tmp_path):
    queries, method = documents.select([1, 4]), gf.grad_dot(gf.project(4))
    with pytest.raises(
        InputError, match="2 scores, which is not 1 for each of 1 dampings: give as many `query"
    ):
        runs.score_run(tmp_path, llama, documents, queries, method, query_ids=["one"])


def test_scores_of_tokens_sum_to_those_of_their_documents(llama, documents, tmp_path):
    queries, method = documents.select([1]), gf.grad_dot(gf.project(4))
    runs.score_run(tmp_path, llama, documents, queries, method, view=View(tokens=True))
    scores = Scores.load(tmp_path)
    assert scores.documents is not None
    assert scores.positions is not None
    assert scores.documents.bincount().tolist() == documents.lengths.tolist()
    assert scores.positions.tolist() == [at for length in documents.lengths.tolist() for at in range(length)]
    assert scores.row_ids == [documents.ids[row] for row in scores.documents.tolist()]
    sums = torch.zeros(8, 1).index_add_(0, scores.documents, scores.matrix)
    torch.testing.assert_close(sums, score(llama, documents, queries, method=method), rtol=1e-4, atol=1e-4)


def test_scores_at_hand_are_written_like_those_of_an_engine(llama, documents, tmp_path):
    queries, method = documents.select([1, 4]), gf.grad_dot(gf.project(4))
    runs.score_run(tmp_path / "a", llama, documents, queries, method)
    made = Scores.load(tmp_path / "a")
    columns = Columns(made.query_ids, made.query_texts, made.dampings)
    runs.write_scores(
        tmp_path / "b", documents, Rows(made.matrix, made.losses), columns, settings=made.settings
    )
    again = Scores.load(tmp_path / "b")
    assert torch.equal(again.values, made.values)
    assert (again.row_ids, again.query_ids) == (made.row_ids, made.query_ids)
    assert again.settings == made.settings


def test_rows_of_16_bits_are_summed_in_more(tmp_path):
    generator = np.random.default_rng(0)
    rows = (1000 * generator.standard_normal((50, 8, 64))).astype(np.float16)
    asked = (1000 * generator.standard_normal((3, 8, 64))).astype(np.float32)
    settings = {"transform": {"chain": []}}
    with open_writer(tmp_path, "store", settings, 50) as writer:
        writer.write(0, 50, {"gradients/a": rows})
        writer.finish()
    want = np.einsum("roi,qoi->rq", rows.astype(np.float64), asked.astype(np.float64))
    with gf.open_store(tmp_path) as store:
        got = torch.cat(list(runs.stored_scores(store, gf.dot({"a": torch.from_numpy(asked)}))))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_a_large_store_is_read_in_little_memory(tmp_path):
    rows, memory = np.ones((20_000, 32, 16), np.float16), 2 << 20
    with open_writer(tmp_path, "store", {"transform": {"chain": []}}, 40_000) as writer:
        for start in (0, 20_000):
            writer.write(start, start + 20_000, {"gradients/a": rows})
        writer.finish()
    scorer = gf.grad_cosine().against({"a": torch.full((4, 32, 16), 512**-0.5)})
    with gf.open_store(tmp_path) as store:
        tracemalloc.start()
        best, _ = extremes(runs.stored_scores(store, scorer, memory=memory), 5)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    np.testing.assert_allclose(best.scores.numpy(), 1.0, rtol=1e-5)
    assert peak < 2 * memory < 2 * rows.nbytes / 8


def test_shares_sum_to_the_scores(model, documents, tmp_path):
    queries = gf.collect(model, documents.select([1, 4]), gf.project(4))
    gf.runs.score_run(tmp_path, model, documents, queries, gf.grad_dot(gf.project(4)), by_block=True)
    gf.build(tmp_path, model, documents, gf.project(4))
    with gf.open_store(tmp_path, "scores") as scores, gf.open_store(tmp_path) as store:
        shares = {name.removeprefix(SHARES): scores.read(name)[:, 0] for name in scores.names(SHARES)}
        assert shares.keys() == queries.keys()
        np.testing.assert_allclose(sum(shares.values()), scores.read("scores")[:, 0], rtol=1e-4, atol=1e-5)
        for name, share in runs.stored_shares(store, 2, gf.dot(queries, by_block=True)).items():
            np.testing.assert_allclose(share.numpy(), shares[name][2], rtol=1e-4, atol=1e-5)
        unit = runs.stored_shares(store, 2, gf.grad_cosine().against(queries, by_block=True))
        (whole,) = runs.stored_scores(store, gf.grad_cosine().against(queries))
        torch.testing.assert_close(sum(unit.values()), whole[2], rtol=1e-4, atol=1e-6)


def test_scores_with_a_curvature_on_disk(llama, documents, tmp_path):
    H = gf.hessian(tmp_path, llama, documents, ekfac())
    method = gf.influence(H, damping=(Damping(0.1), Damping(1.0)))
    queries = gf.collect(llama, documents.select([1]))
    runs.score_run(tmp_path, llama, documents, queries, method)
    scores = Scores.load(tmp_path)
    assert scores.dampings == ("0.1", "1")
    live = score(llama, documents, documents.select([1]), method=method)
    torch.testing.assert_close(scores.values[:, :, 0].T, live, rtol=1e-4, atol=1e-4)


def test_dampings_of_joined_and_own_attributions():
    class Own:
        damping = (Damping(0.1), None)

        def scorer(self, subject, query, *, by_block=False):
            raise NotImplementedError

        def settings(self):
            return {}

    H = {"a": Spectrum(None, torch.eye(2), torch.ones(1, 2))}
    damped = InnerProduct(gf.chain(), gf.chain(), H, damping=(Damping(0.5), None))
    assert runs.damping_names(damped) == ("0.5", "none")
    assert runs.damping_names(Joined([(None, damped), (None, damped)])) == ("0.5", "none")
    assert runs.damping_names(Joined([(None, gf.grad_dot())])) == ("",)
    assert runs.damping_names(Own()) == ("0.1", "none")
