import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from gradfn.data import make_documents
from gradfn.engine.engine import probe_engine
from gradfn.engine.stream import (
    BATCHES_AHEAD,
    ahead,
    collect,
    gather,
    lengths_of,
    row_name,
    stream,
)
from gradfn.errors import InputError
from gradfn.testing import assert_blocks_close, naive_blocks
from gradfn.testing.strategies import randomize, squared_error
from gradfn.transforms import dot, project

MODEL = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0)
LOSS = squared_error(MODEL)
GENERATOR = torch.Generator().manual_seed(0)
ROWS = [
    {"x": torch.randn(3, generator=GENERATOR, dtype=torch.float64), "y": torch.zeros(2, dtype=torch.float64)}
    for _ in range(7)
]


class Named(list):
    """Rows with lengths and ids of their own, as `Documents` has."""

    lengths = np.array([1, 5, 2, 9, 3, 3, 1])
    ids = ("a", "1", "c", "d", "e", "f", "g")


def test_lengths_come_from_the_data_or_its_tokens():
    documents = make_documents([[1, 2, 3], [4]])
    assert lengths_of(documents).tolist() == [3, 1]
    assert lengths_of([documents[0], documents[1]]).tolist() == [3, 1]
    assert lengths_of(ROWS[:2]).tolist() == [1, 1]


def test_rows_are_named_by_number_and_id():
    assert row_name(ROWS, 2) == "row 2"
    assert row_name(Named(ROWS), 2) == "row 2 (id 'c')"
    assert row_name(Named(ROWS), 1) == "row 1"


@pytest.mark.parametrize("budget", [1, 9, 10, 1000])
def test_results_stand_in_the_order_of_the_rows_whatever_their_lengths(budget):
    expected = naive_blocks(LOSS, MODEL, ROWS)
    assert_blocks_close(collect(MODEL, Named(ROWS), loss=LOSS, token_batch_size=budget), expected)


def test_batches_stay_under_the_budget_longest_first_and_cover_every_row():
    data = Named(ROWS)
    batches = [numbers for numbers, _ in stream(probe_engine(MODEL, LOSS), data, token_batch_size=9)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(7))
    assert batches[0].tolist() == [3]
    assert all(len(numbers) * max(data.lengths[numbers]) <= 9 for numbers in batches)


def test_a_range_of_rows_gives_those_rows():
    engine = probe_engine(MODEL, LOSS)
    got = gather(engine, Named(ROWS), rows=range(2, 6), token_batch_size=6)
    assert_blocks_close(got.values, {name: G[2:6] for name, G in naive_blocks(LOSS, MODEL, ROWS).items()})
    params = dict(MODEL.named_parameters())
    assert_blocks_close(got.losses, torch.stack([LOSS(params, row).detach() for row in ROWS[2:6]]))


def test_scores_are_gathered_as_one_matrix():
    blocks = naive_blocks(LOSS, MODEL, ROWS)
    scores = collect(MODEL, Named(ROWS), dot(blocks), loss=LOSS, token_batch_size=4)
    assert scores.shape == (7, 7)
    assert_blocks_close(scores, dot(blocks)(blocks))


def test_progress_counts_the_tokens_of_the_rows_and_no_padding():
    seen = []
    collect(MODEL, Named(ROWS), loss=LOSS, token_batch_size=9, progress=seen.append)
    assert sum(seen) == Named.lengths.sum()
    assert len(seen) > 1


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no rows"):
        collect(MODEL, [], loss=LOSS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("budget", [1, 1000])
def test_a_loss_that_is_not_finite_names_its_row(bad, budget):
    rows = [dict(row) for row in ROWS]
    rows[4]["y"] = torch.full((2,), bad, dtype=torch.float64)
    with pytest.raises(InputError, match=r"the loss of row 4 \(id 'e'\) is NaN or infinite"):
        collect(MODEL, Named(rows), project(2), loss=LOSS, token_batch_size=budget)


def test_a_gradient_that_is_not_finite_names_its_row():
    """The square root has a finite value and an infinite slope at zero."""
    net = nn.Linear(1, 1, bias=False).double()

    def rooted(params, example):
        return torch.func.functional_call(net, params, (example["x"],)).square().sum().sqrt()

    rows = [{"x": torch.tensor([value], dtype=torch.float64)} for value in (1.0, 2.0, 0.0)]
    with pytest.raises(InputError, match="the gradient of row 2 is NaN or infinite"):
        collect(net, rows, loss=rooted)


def test_large_finite_numbers_whose_sum_overflows_are_fine():
    net = nn.Linear(1, 1, bias=False)

    def loss(params, example):
        return torch.func.functional_call(net, params, (example["x"],)).sum()

    rows = [{"x": torch.tensor([3e38])}, {"x": torch.tensor([3e38])}]
    with torch.no_grad():
        net.weight.fill_(0.5)
    assert collect(net, rows, loss=loss)["root"].flatten().tolist() == [rows[0]["x"].item()] * 2


@pytest.fixture
def overlapping(monkeypatch):
    """Streams work as with a device that computes on its own; no thread is left behind."""
    monkeypatch.setattr("gradfn.engine.stream._overlaps", lambda device: True)
    yield
    assert not batch_threads()


def batch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gradfn-batches")]


class Watched(Named):
    """Rows that note the threads that read them."""

    def __init__(self, rows):
        super().__init__(rows)
        self.readers = []

    def __getitem__(self, row):
        self.readers.append(threading.current_thread().name)
        return super().__getitem__(row)


@pytest.mark.parametrize("budget", [1, 9, 1000])
def test_batches_made_in_a_thread_change_no_result(overlapping, budget):
    data = Watched(ROWS)
    assert_blocks_close(
        collect(MODEL, data, loss=LOSS, token_batch_size=budget), naive_blocks(LOSS, MODEL, ROWS)
    )
    assert any(name.startswith("gradfn-batches") for name in data.readers)


def test_on_a_cpu_batches_are_made_where_they_are_used():
    data = Watched(ROWS)
    collect(MODEL, data, loss=LOSS, token_batch_size=9)
    assert set(data.readers) == {threading.current_thread().name}


@pytest.mark.parametrize("to_host", [False, True])
def test_batches_come_in_the_same_order_whether_or_not_they_overlap(to_host, monkeypatch):
    def batches():
        found = stream(probe_engine(MODEL, LOSS), Named(ROWS), token_batch_size=9, to_host=to_host)
        return [(numbers.tolist(), result.losses.tolist()) for numbers, result in found]

    plain = batches()
    monkeypatch.setattr("gradfn.engine.stream._overlaps", lambda device: True)
    assert batches() == plain
    assert len(plain) > 3


@pytest.mark.parametrize("to_host", [False, True])
def test_a_stream_that_is_left_early_ends_its_thread(overlapping, to_host):
    results = stream(probe_engine(MODEL, LOSS), Named(ROWS), token_batch_size=1, to_host=to_host)
    next(results)
    assert len(batch_threads()) == 1
    results.close()
    assert not batch_threads()


def test_a_batch_that_cannot_be_made_is_refused_in_its_turn(overlapping):
    rows = [*ROWS[:2], {"x": ROWS[0]["x"]}, *ROWS[3:]]  # rows 4, 5 and 2 are one batch
    results = stream(probe_engine(MODEL, LOSS), Named(rows), token_batch_size=9)
    assert [next(results)[0].tolist(), next(results)[0].tolist()] == [[3], [1]]
    with pytest.raises(InputError, match="need the same keys"):
        list(results)


def test_a_loss_that_is_not_finite_names_its_row_one_batch_later(overlapping):
    rows = [dict(row) for row in ROWS]
    rows[4]["y"] = torch.full((2,), float("nan"), dtype=torch.float64)
    with pytest.raises(InputError, match=r"the loss of row 4 \(id 'e'\) is NaN or infinite"):
        collect(MODEL, Named(rows), loss=LOSS, token_batch_size=3)


def test_ahead_keeps_the_order_and_makes_no_more_than_it_says():
    made, most = [], 0

    def make(item):
        made.append(item)
        return 2 * item

    for used, value in enumerate(ahead(make, range(50))):
        assert value == 2 * used
        time.sleep(1e-4)
        most = max(most, len(made) - used - 1)
    assert made == list(range(50))
    assert 0 < most <= BATCHES_AHEAD
    assert not batch_threads()


def test_ahead_raises_what_was_raised_behind_what_came_before():
    def make(item):
        if item == 3:
            raise KeyError("three")
        return item

    values = ahead(make, range(9))
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(values)
    assert not batch_threads()
    assert list(ahead(make, [])) == []


def test_closing_ahead_makes_nothing_more():
    made = []
    values = ahead(lambda item: made.append(item) or time.sleep(0.01), range(50))
    next(values)
    values.close()
    assert not batch_threads()
    assert len(made) <= 1 + BATCHES_AHEAD


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("budget", [1, 9, 1000])
def test_a_gpu_gives_what_the_cpu_gives(budget):
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 0).cuda()
    got = collect(model, Named(ROWS), loss=squared_error(model), token_batch_size=budget)
    assert {value.device.type for value in got.values()} == {"cpu"}
    assert_blocks_close(got, naive_blocks(LOSS, MODEL, ROWS))
    assert not batch_threads()
