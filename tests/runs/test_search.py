"""A store asked from Python gives the scores that the model itself gives."""

import pytest
import torch
from tiny import language_model

import gradfn as gf
from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.runs import Faiss
from gradfn.testing.strategies import randomize

ROWS = make_documents([[1, 2, 3, 4], [5, 6, 7], [8, 9, 3, 2, 1]], ids=["a", "b", "c"])
ASKED = make_documents([[2, 3, 4], [7, 6, 5, 1]], ids=["p", "q"])
DAMPINGS = (gf.Damping(0.1), gf.Damping(1.0))


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


@pytest.fixture(params=["examples", "heads", "tokens"])
def view(request):
    return gf.View(heads=request.param == "heads", tokens=request.param == "tokens")


def close(got, want):
    torch.testing.assert_close(got.values, want.values, rtol=1e-4, atol=1e-4 * float(want.values.abs().max()))
    assert (got.row_ids, got.query_ids, got.dampings) == (want.row_ids, want.query_ids, want.dampings)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("stored_unit", [False, True])
def test_scores_are_those_of_the_model(model, view, tmp_path, unit, stored_unit):
    stages = [gf.project(2), *([gf.unit_normalize()] if stored_unit else [])]
    gf.build(tmp_path, model, ROWS, gf.chain(*stages), view=view)
    got = gf.query(tmp_path, model, ASKED, unit_norm=unit)
    method = gf.grad_cosine(gf.project(2)) if unit or stored_unit else gf.grad_dot(gf.project(2))
    want = gf.score(model, ROWS, ASKED, method=method, view=view)
    close(got, want)
    if view.tokens:
        assert (got.documents.tolist(), got.positions.tolist()) == (
            want.documents.tolist(), want.positions.tolist()
        )  # fmt: skip


@pytest.mark.parametrize("unit", [False, True])
def test_curvatures_and_dampings(model, tmp_path, unit):
    gf.build(tmp_path, model, ROWS, gf.project(2))
    H = gf.fit(gf.second_moment(), model, ROWS, gf.project(2))
    got = gf.query(tmp_path, model, ASKED, curvature=H, damping=DAMPINGS, unit_norm=unit)
    method = gf.influence(H, gf.project(2), damping=DAMPINGS, norm="cosine" if unit else "none")
    close(got, gf.score(model, ROWS, ASKED, method=method))


def test_a_store_behind_an_optimizer_wants_its_state(model, tmp_path):
    adam = gf.fit(gf.adam_moments(), model, ROWS)
    gf.build(tmp_path, model, ROWS, gf.chain(adam, gf.project(2)))
    with pytest.raises(InputError, match="Adam cannot be made from a store's settings"):
        gf.query(tmp_path, model, ASKED)
    got = gf.query(tmp_path, model, ASKED, normalize=adam)
    close(got, gf.score(model, ROWS, ASKED, method=gf.grad_dot(gf.chain(adam, gf.project(2)))))


def test_a_store_of_something_else_is_refused(model, tmp_path):
    gf.build(tmp_path, model, ROWS)
    for other, options, words in (
        (randomize(language_model("llama"), 1), {}, "model is"),
        (model, {"view": gf.View(exclude=["*mlp*"])}, "layers.exclude"),
    ):
        with pytest.raises(InputError, match=words):
            gf.query(tmp_path, other, ASKED, **options)


@pytest.mark.parametrize("index", [None, "Flat", Faiss("IVF2,Flat", 2)])
def test_the_best_rows_are_those_of_all_scores(model, tmp_path, index):
    gf.build(tmp_path, model, ROWS, gf.project(2))
    H = gf.fit(gf.second_moment(), model, ROWS, gf.project(2))
    how = {"curvature": H, "damping": DAMPINGS[:1], "unit_norm": True}
    scores = gf.query(tmp_path, model, ASKED, **how)
    found = gf.runs.query_best(tmp_path, model, ASKED, 2, index=index, **how)
    for best, largest in zip(found, (True, False), strict=True):
        want = scores.top(2, largest=largest)
        assert best.rows.tolist() == want.rows.tolist()
        torch.testing.assert_close(best.scores.float(), want.scores.float(), rtol=1e-4, atol=1e-5)
