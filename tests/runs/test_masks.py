"""Masks fitted to stores, against masks fitted to the model; projections that name runs."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import gradfn as gf
from gradfn.errors import InputError
from gradfn.runs.curvatures import hessian
from gradfn.runs.masks import load_mask, mask_run, projection_named, stored_mask
from gradfn.statistics import kfac
from gradfn.statistics.mask import drawn_rows, selective_mask
from gradfn.store import open_store
from gradfn.transforms.projection import spell

NET = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double()
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [{"x": torch.randn(6, generator=GENERATOR, dtype=torch.float64)} for _ in range(20)]
QUERIES = [{"x": torch.randn(6, generator=GENERATOR, dtype=torch.float64)} for _ in range(7)]
EVERYTHING = gf.View(include=("*",))


def loss(params, example):
    return functional_call(NET, params, example["x"]).square().sum()


def other_loss(params, example):
    return functional_call(NET, params, example["x"]).sum()


def stored(run, data, transform=None, *, loss=loss, view=EVERYTHING):
    gf.build(run, NET, data, transform, loss=loss, view=view)
    return open_store(run)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return stored(folder / "rows", ROWS), stored(folder / "queries", QUERIES)


@pytest.mark.parametrize("dims", [7, (3, 4)])
@pytest.mark.parametrize(("rows", "seed"), [(512, 0), (9, 3)])
def test_of_stores_it_is_the_mask_of_the_model(stores, dims, rows, seed):
    got, told = stored_mask(*stores, dims, rows=rows, seed=seed)
    wanted, reports = selective_mask(
        NET, ROWS, QUERIES, dims, rows=rows, seed=seed, loss=loss, view=EVERYTHING
    )
    assert {name: [index.tolist() for index in parts] for name, parts in got.chosen.items()} == {
        name: [index.tolist() for index in parts] for name, parts in wanted.chosen.items()
    }
    assert got.settings() == wanted.settings()
    for name, one in reports.items():
        assert told[name] == pytest.approx(one)


def test_the_correlations_told_are_those_of_the_rows_drawn(stores):
    mask, reports = stored_mask(*stores, 5, rows=6, seed=1)
    sides = [
        drawn_rows(store.rows, 6, 1, name) for store, name in zip(stores, ("rows", "queries"), strict=True)
    ]
    for name, (index,) in mask.chosen.items():
        G, Q = (store.read(f"gradients/{name}")[drawn].reshape(6, -1)
                for store, drawn in zip(stores, sides, strict=True))  # fmt: skip
        before, after = G @ Q.T, G[:, index] @ Q[:, index].T
        naive = np.mean([np.corrcoef(before[:, q], after[:, q])[0, 1] for q in range(6)])
        assert reports[name].kept == pytest.approx(naive)


def test_blocks_that_do_not_fit_together_are_read_in_turns(stores, monkeypatch):
    whole = stored_mask(*stores, 7)
    monkeypatch.setattr("gradfn.statistics.mask.free_memory", lambda device: 4 * 4 * 27 * 36)
    parts = stored_mask(*stores, 7)
    assert whole[0].settings() == parts[0].settings()
    assert whole[1] == parts[1]


def test_an_optimizers_normalisation_leaves_gradients_whole(tmp_path):
    squares = {name: torch.rand(shape, generator=GENERATOR, dtype=torch.float64) + 0.1
               for name, shape in {"0": (5, 7), "3": (3, 6)}.items()}  # fmt: skip
    view, adam = gf.View(), gf.adam(squares)
    sides = [stored(tmp_path / name, data, adam, view=view) for name, data in (("a", ROWS), ("b", QUERIES))]
    wanted, _ = selective_mask(NET, ROWS, QUERIES, 7, before=adam, loss=loss)
    assert stored_mask(*sides, 7)[0].settings() == wanted.settings()
    with pytest.raises(InputError, match=r"the query gradients in .* was made differently"):
        stored_mask(sides[0], stored(tmp_path / "c", QUERIES, view=view), 7)


@pytest.mark.parametrize(("made", "words"), [
    ({"transform": gf.project(2)}, "are behind rademacher:2x2, and a mask is fitted to whole ones"),
    ({"transform": gf.unit_normalize()}, "are behind UnitNormalize, and a mask is fitted to whole ones"),
    ({"loss": other_loss}, "of another loss than those in .*name is other_loss there and loss here"),
    ({"view": gf.View()}, "was made differently"),
])  # fmt: skip
def test_stores_that_do_not_go_together_are_refused(stores, tmp_path, made, words):
    other = stored(tmp_path, QUERIES, **made)
    with pytest.raises(InputError, match=words):
        stored_mask(stores[0], other, 7)


def test_stores_that_are_too_small_or_of_another_model_are_refused(stores, tmp_path):
    with pytest.raises(InputError, match="has 2 rows, and a mask keeps correlations over them"):
        stored_mask(stored(tmp_path / "two", ROWS[:2]), stores[1], 7)
    with pytest.raises(InputError, match="leaves nothing out"):
        stored_mask(*stores, 99)
    with torch.no_grad():
        NET[0].bias += 1
    another = stored(tmp_path / "another", QUERIES)
    with torch.no_grad():
        NET[0].bias -= 1
    with pytest.raises(InputError, match="was made differently"):
        stored_mask(stores[0], another, 7)


@pytest.mark.parametrize("name", ["my>run", 'a "run"', "plain", 'a > "b" > c:d'])
def test_runs_of_any_name_are_spelled_and_read_again(stores, tmp_path, name):
    run, H = tmp_path / name, tmp_path / f"{name} kfac"
    mask_run(run, lambda: stored_mask(*stores, (2, 2)), blocks=3, settings={})
    hessian(H, NET, ROWS, kfac(), loss=loss)
    mask = load_mask(run)
    spelled = spell(gf.chain(mask, gf.compress(4)))
    read = projection_named(spelled)
    assert read.stages[0].path == str(run.resolve())
    assert spell(read) == spelled
    pca = projection_named(f'pca:2x2:"{str(H).replace(chr(34), 2 * chr(34))}"')
    assert pca.stages[0].path == str(H.resolve())
    assert spell(projection_named(spell(pca))) == spell(pca)


@pytest.mark.parametrize("gone", ["mask.h5", "segments/mask-0000000000-0000000003.h5"])
def test_a_mask_that_lost_a_file_is_made_again(stores, tmp_path, gone):
    """A run that is killed, or whose disk is full, between its segment and its index has the first alone."""

    def fitted():
        return mask_run(tmp_path, lambda: stored_mask(*stores, (2, 2)), blocks=3, settings={})

    mask, reports = fitted()
    (tmp_path / gone).unlink()
    again, told = fitted()
    assert (again.settings(), told) == (mask.settings(), reports)
    assert len(open_store(tmp_path, "mask").read("blocks/name")) == 3


def test_a_quote_is_closed():
    with pytest.raises(InputError, match="has a quote that is not closed"):
        projection_named('selective:"my>run')
    with pytest.raises(InputError, match="my>run does not exist"):
        projection_named('selective:"my>run" > sjlt:4')
    with pytest.raises(InputError, match="no projection 'run'"):
        projection_named("joint > run")


@pytest.mark.parametrize(("spelled", "words"), [
    ("grass:64:4", r"^grass takes no number of nonzeros, as in 'grass:64:4': write mask:256 > sjlt:64:4$"),
    ("factgrass:64:2", "^factgrass takes no number of nonzeros, .*: write mask:16x16 > sjlt:64:2$"),
    ("logra:4x6:2", "^logra takes no number of nonzeros, as in 'logra:4x6:2': write gaussian:4x6$"),
    ("joint:4", "^joint takes no number, as in 'joint:4': write joint > sjlt:4096, say$"),
    ("joint > joint", "^joint makes one block of all, and 'joint > joint' has it twice: leave one out$"),
    ("sjlt:64 >", "^'sjlt:64 >' has an empty stage: write one on each side of a >, or none alone$"),
    ("", "^'' has an empty stage"),
    ("none > sjlt:64", "^none is the full gradient and stands alone, not in 'none > sjlt:64': leave it out$"),
    ("selective", "^'selective' names no run: give selective:RUN, where `mask_run` wrote a mask$"),
    ("selective:", "^'selective' names no run"),
    ('selective:""', "^'selective' names no run"),
    ("pca:4x4:", "^'pca:4x4:' is no projection: give pca:64x64:RUN"),
    (f"sjlt:{'9' * 5000}", "is no projection: give sjlt:64x64 .* or sjlt:4096"),
    (f"sjlt:64:{'9' * 5000}", "is no projection: give sjlt:64x64"),
    (f"pca:4x{'9' * 5000}:run", "is no projection: give pca:64x64:RUN"),
])  # fmt: skip
def test_spellings_that_say_nothing(spelled, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        projection_named(spelled)
