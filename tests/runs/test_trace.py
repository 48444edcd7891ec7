"""A loop of one's own finds the stored rows that a query of its loss finds."""

from contextlib import suppress

import pytest
import torch
from tiny import language_model

import gradfn as gf
from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.runs import query_best
from gradfn.testing.strategies import randomize

ROWS = make_documents([[1, 2, 3, 4], [5, 6, 7], [8, 9, 3, 2, 1], [4, 4, 2]], ids=["a", "b", "c", "d"])
ASKED = make_documents([[2, 3, 4, 1], [7, 6, 5, 1]])
IDS = torch.tensor([[2, 3, 4, 1], [7, 6, 5, 1]])


@pytest.fixture
def model():
    return language_model("llama").requires_grad_(True)


def step(model, ids=IDS):
    """The sum of the rows' mean losses, which is what queries are asked with."""
    for row in ids:
        model(row[None], labels=row[None]).loss.backward()


def same(result, want):
    for best, expected in zip((result.proponents, result.opponents), want, strict=True):
        assert best.rows.tolist() == expected.rows.tolist()
        torch.testing.assert_close(best.scores, expected.scores, check_dtype=False, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("index", [None, "Flat"])
def test_it_is_a_query(model, tmp_path, unit, index):
    gf.build(tmp_path, model, ROWS, gf.project(2))
    want = query_best(tmp_path, model, ASKED, 2, unit_norm=unit)
    with gf.trace(model, tmp_path, k=2, unit_norm=unit, index=index) as result:
        step(model)
    same(result, want)
    assert result.ids == [[ROWS.ids[row] for row in found] for found in want[0].rows.tolist()]
    assert result.texts == [["", ""]] * 2
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


@pytest.mark.parametrize("view", [gf.View(heads=True), gf.View(tokens=True)], ids=["heads", "tokens"])
def test_with_a_curvature_in_another_view(model, tmp_path, view):
    gf.build(tmp_path, model, ROWS, gf.project(2), view=view)
    H = gf.fit(gf.second_moment(), model, ROWS, gf.project(2), view=gf.View(heads=view.heads))
    how = {"curvature": H, "damping": (gf.Damping(0.3),), "unit_norm": True}
    want = query_best(tmp_path, model, ASKED, 3, **how)
    with gf.trace(model, tmp_path, k=3, **how) as result:
        step(model)
    same(result, want)
    assert {name for found in result.ids for name in found} <= {*ROWS.ids}


def test_a_batch_of_a_mean_has_its_parts(model, tmp_path):
    gf.build(tmp_path, model, ROWS)
    want = query_best(tmp_path, model, ASKED, 2)
    with gf.trace(model, tmp_path, k=2) as result:
        model(IDS, labels=IDS).loss.backward()
    halves = [best._replace(scores=best.scores / 2) for best in want]
    same(result, halves)


def test_rows_behind_an_optimizer(model, tmp_path):
    adam = gf.fit(gf.adam_moments(), model, ROWS)
    gf.build(tmp_path, model, ROWS, gf.chain(adam, gf.project(2), gf.unit_normalize()))
    want = query_best(tmp_path, model, ASKED, 2, normalize=adam)
    with gf.trace(model, tmp_path, k=2, normalize=adam) as result:
        step(model)
    same(result, want)


def test_the_result_is_there_at_the_end(model, tmp_path):
    gf.build(tmp_path, model, ROWS)
    with gf.trace(model, tmp_path) as result:
        step(model)
        with pytest.raises(InputError, match="searched at the end of the `with` block"):
            _ = result.rows
    assert result.rows.shape == (2, 4)  # there are no more rows
    with pytest.raises(InputError, match="no forward pass"), gf.trace(model, tmp_path):
        pass
    with suppress(ZeroDivisionError), gf.trace(model, tmp_path) as result:
        step(model)
        raise ZeroDivisionError
    with pytest.raises(InputError, match="searched at the end"):
        _ = result.scores


def test_what_cannot_be_traced_is_refused_before_the_pass(model, tmp_path):
    gf.build(tmp_path, model, ROWS)
    other = randomize(language_model("llama"), 1)
    for net, options, words in (
        (other, {}, "model is"),
        (model, {"k": 0}, "k must be 1 or more"),
        (model, {"index": "Nonsense"}, "FAISS has no index 'Nonsense'"),
    ):
        with pytest.raises(InputError, match=words), gf.trace(net, tmp_path, **options):
            pytest.fail("the block began")
