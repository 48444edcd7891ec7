"""Stores of different rows as one store."""

import copy

import pytest
import torch
from stored import one_sentence
from tiny import language_model

import gradfn as gf
from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.model.sites import View
from gradfn.runs.joining import join_stores
from gradfn.store import open_store
from gradfn.transforms import chain, project, unit_normalize

TEXTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2, 2, 3], [5, 1]]
HOW = {"transform": chain(project(3)), "view": View()}


@pytest.fixture(scope="module")
def model():
    return language_model("llama")


def documents(ids, start=0, stop=None):
    lists = TEXTS[start:stop]
    texts = [str(one) for one in lists]
    return make_documents(
        lists, ids=ids and [f"{ids}{start + row}" for row in range(len(lists))], texts=texts
    )


def build(run, model, data, tokens=False, transform=None):
    gf.build(
        run, model, data, chain(project(3)) if transform is None else transform, view=View(tokens=tokens)
    )
    return run


def holding(run):
    store = open_store(run)
    index = {name: store.index_array(name).tolist() for name in store.header.index_arrays}
    return {name: store.read(name).tolist() for name in store.names()}, index


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("ids", ["row", None])
def test_the_rows_are_those_of_one_store(tmp_path, model, ids, tokens):
    whole = build(tmp_path / "whole", model, documents(ids), tokens)
    cuts = [(0, 2), (2, 3), (3, 5)]
    parts = [build(tmp_path / f"{a}", model, documents(ids, a, b), tokens) for a, b in cuts]
    join_stores(tmp_path / "run", parts)
    (mine, index), (theirs, wanted) = holding(tmp_path / "run"), holding(whole)
    assert index == wanted
    assert mine.keys() == theirs.keys()
    for name, values in theirs.items():
        if name.startswith("gradients/"):
            torch.testing.assert_close(torch.tensor(mine[name]), torch.tensor(values), rtol=1e-4, atol=1e-6)
        elif name != "rows/loss":
            assert mine[name] == values, name
    scores = [gf.query(run, model, documents("q")).matrix for run in (tmp_path / "run", whole)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)


def test_what_was_joined_can_be_joined_again(tmp_path, model):
    parts = [build(tmp_path / f"{a}", model, documents(None, a, a + 1)) for a in range(3)]
    join_stores(tmp_path / "two", parts[:2])
    join_stores(tmp_path / "nested", [tmp_path / "two", parts[2]])
    join_stores(tmp_path / "flat", parts)
    assert holding(tmp_path / "nested") == holding(tmp_path / "flat")
    assert holding(tmp_path / "flat")[0]["rows/id"] == ["0", "1", "2"]


def test_rows_without_ids_are_counted_on_behind_names_that_repeat(tmp_path, model):
    parts = [build(tmp_path / "a", model, make_documents(TEXTS[:3], ids=["x", "x", "y"]))]
    parts.append(build(tmp_path / "b", model, documents(None, 3)))
    assert holding(join_stores(tmp_path / "run", parts).parent)[0]["rows/id"] == ["x", "x", "y", "3", "4"]


@pytest.mark.parametrize("ids", ["row", None])
def test_the_same_rows_are_not_joined_twice(tmp_path, model, ids):
    a, b = build(tmp_path / "a", model, documents(ids, 0, 2)), build(tmp_path / "b", model, documents(ids, 2))
    with pytest.raises(InputError) as error:
        join_stores(tmp_path / "run", [a, b, a])
    one_sentence(error, a, "hold the same rows", "give each store once")
    assert not (tmp_path / "run").exists()


def test_a_join_that_was_cut_off_goes_on_and_one_of_other_rows_is_refused(tmp_path, model):
    parts = [build(tmp_path / f"{a}", model, documents("row", a, a + 2)) for a in (0, 2)]
    join_stores(tmp_path / "run", parts)
    before = holding(tmp_path / "run")
    (tmp_path / "run" / "store.h5").unlink()
    (tmp_path / "run" / "segments" / "store-0000000002-0000000004.h5").unlink()
    join_stores(tmp_path / "run", parts)
    assert holding(tmp_path / "run") == before
    with pytest.raises(InputError, match="was made with other"):
        join_stores(tmp_path / "run", parts[::-1])
    join_stores(tmp_path / "run", parts[::-1], overwrite=True)
    assert holding(tmp_path / "run")[0]["rows/id"] == ["row2", "row3", "row0", "row1"]


def test_stores_that_do_not_go_together(tmp_path, model):
    one = build(tmp_path / "one", model, documents("a", 0, 2))
    more, changed = documents("b", 2, 4), copy.deepcopy(model)
    changed.lm_head.weight.data += 1e-3
    others = {
        "transform.chain": build(tmp_path / "seed", model, more, transform=chain(project(3, seed=1))),
        "UnitNormalize": build(tmp_path / "unit", model, more, transform=chain(project(3), unit_normalize())),
        "layers.tokens": build(tmp_path / "tokens", model, more, tokens=True),
        "model": build(tmp_path / "model", changed, more),
        "both have a row 'a0'": build(tmp_path / "same", model, documents("a", 0, 3)),
    }
    for words, other in others.items():
        with pytest.raises(InputError) as error:
            join_stores(tmp_path / "run", [one, other])
        one_sentence(error, words)
    gf.reduce(tmp_path / "mean", model, more, chain(project(3)))
    with pytest.raises(InputError) as error:
        join_stores(tmp_path / "run", [one, tmp_path / "mean"])
    one_sentence(error, "holds one mean and no rows")
    for stores, words in ([one], "give two or more"), ([one, tmp_path / "seed"], "is one of the stores"):
        with pytest.raises(InputError, match=words):
            join_stores(one, stores)
    assert not (tmp_path / "run").exists()
