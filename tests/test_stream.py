import numpy as np
import pytest
import torch
from torch import nn

from gradfn.data import make_documents
from gradfn.errors import InputError
from gradfn.probes import probe_engine
from gradfn.stream import collect, gather, lengths_of, row_name, stream
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
    assert row_name(Named(ROWS), 2) == "row 2 (id c)"
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
    with pytest.raises(InputError, match=r"the loss of row 4 \(id e\) is NaN or infinite"):
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
