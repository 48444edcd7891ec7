"""Cached rows give what the model gives, and are read wherever the pass allows it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradfn as gf
from gradfn.engine import cache
from gradfn.engine.cache import CachedRows
from gradfn.engine.stream import collect
from gradfn.methods.recipes import recipe_named
from gradfn.subject import Subject
from gradfn.types import Blocks

Watched = tuple[nn.Module, list[dict[str, torch.Tensor]], Callable[..., torch.Tensor], list[int]]


@pytest.fixture
def watched() -> Watched:
    """A network, its data and loss, and the numbers of forward calls over more than one row."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    data = [{"x": torch.randn(6, dtype=torch.float64)} for _ in range(7)]
    calls: list[int] = []

    def loss(params: Any, example: Any) -> torch.Tensor:
        calls.append(1)
        return torch.func.functional_call(net, params, example["x"]).square().sum()

    return net, data, loss, calls


def problem_of(watched: Watched, train: Any, projection: Any) -> gf.methods.Problem:
    net, data, loss, _ = watched
    return gf.methods.Problem(Subject(net, loss, token_batch_size=3), train, data[:2], projection=projection)


ANY = ["gaussian:2x3", "joint > sjlt:16", "mask:4x4 > sjlt:6"]
CASES = [(name, spelled) for name in ("trackstar", "logra", "trak") for spelled in ANY]
CASES += [("ekfac", ANY[0]), ("relatif", ANY[0])]


@pytest.mark.parametrize(("name", "spelled"), CASES)
def test_scores_are_those_of_two_passes(watched: Watched, name: str, spelled: str):
    net, data, loss, calls = watched
    projection = gf.transforms.parse_projection(spelled)

    def scores(train: Any) -> tuple[torch.Tensor, int]:
        method = recipe_named(name).method(problem_of(watched, train, projection))
        before = len(calls)
        made: Any = gf.score(net, train, data[:2], method=method, loss=loss, token_batch_size=3)
        return made, len(calls) - before

    (plain, many), (again, few) = scores(data), scores(CachedRows(data, projection))
    torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)
    assert few < many


def test_other_transforms_losses_models_and_tokens_are_made_again(watched: Watched):
    net, data, loss, _ = watched
    projection = gf.project(2, seed=1)
    rows = CachedRows(data, projection)
    gf.fit(gf.second_moment(), net, rows, projection, loss=loss)
    assert rows.cached == len(data)

    def halved(params: Any, example: Any) -> torch.Tensor:
        return loss(params, example) / 2

    other = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    def of_other(params: Any, example: Any) -> torch.Tensor:
        return torch.func.functional_call(other, params, example["x"]).square().sum()

    for model, transform, wanted in (
        (net, gf.project(2, seed=2), loss), (net, projection, halved), (other, projection, of_other),
    ):  # fmt: skip
        for view in (gf.View(), gf.View(exclude=["2"])):
            made, plain = (collect(model, d, transform, loss=wanted, view=view) for d in (rows, data))
            torch.testing.assert_close(made, plain)


def test_a_model_that_was_trained_on_is_another_one(watched: Watched):
    net, data, loss, _ = watched
    projection = gf.project(2)
    rows = CachedRows(data, projection)
    gf.fit(gf.second_moment(), net, rows, projection, loss=loss)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    loss(dict(net.named_parameters()), data[0]).backward()
    optimizer.step()
    made, plain = (collect(net, d, projection, loss=loss) for d in (rows, data))
    torch.testing.assert_close(made, plain)


def test_rows_that_take_too_much_are_not_cached(watched: Watched, monkeypatch: pytest.MonkeyPatch):
    net, data, loss, _ = watched
    projection = gf.project(2)
    monkeypatch.setattr(cache, "CACHE_BYTES", 7 * 2 * 4 * 8 - 1)
    rows = CachedRows(data, projection)
    H = gf.fit(gf.second_moment(), net, rows, projection, loss=loss)
    assert rows.cached == 0
    monkeypatch.setattr(cache, "CACHE_BYTES", 7 * 2 * 4 * 8)
    again = gf.fit(gf.second_moment(), net, rows, projection, loss=loss)
    assert rows.cached == len(data)
    for name, one in H.items():
        torch.testing.assert_close(again[name].dense(), one.dense())


def test_whole_gradients_and_plain_passes_are_not_cached(watched: Watched):
    net, data, loss, _ = watched
    rows = CachedRows(data, gf.chain())
    gf.fit(gf.ekfac(), net, rows, loss=loss)
    assert rows.cached == 0
    rows = CachedRows(data, gf.project(2))
    collect(net, rows, gf.project(2), loss=loss)
    gf.fit(gf.kfac(), net, rows, gf.project(2), loss=loss)
    assert rows.cached == 0


def test_a_pass_that_was_cut_off_is_not_taken_for_all(watched: Watched):
    net, data, loss, _ = watched
    projection, seen = gf.project(2), []

    def stop(tokens: int) -> None:
        seen.append(tokens)
        if len(seen) == 2:
            raise KeyboardInterrupt

    rows = CachedRows(data, projection)
    with pytest.raises(KeyboardInterrupt):
        gf.fit(gf.second_moment(), net, rows, projection, loss=loss, token_batch_size=2, progress=stop)
    assert 0 < rows.cached < len(data)
    made: Blocks | torch.Tensor = collect(net, rows, projection, loss=loss)
    torch.testing.assert_close(made, collect(net, data, projection, loss=loss))


def test_what_data_tells_of_its_rows_is_still_told():
    documents = gf.make_documents([[5, 6, 7], [8, 9]], ids=["a", "b"])
    rows = CachedRows(documents, gf.project(2))
    assert rows.ids == ["a", "b"]
    assert rows.lengths.tolist() == [3, 2]
    assert rows.fingerprint() == documents.fingerprint()
    assert not hasattr(rows, "colour")
