"""Selection of rows: greedy against a search of all candidates, and what it becomes without interference."""

from itertools import combinations

import pytest
import torch
from torch.func import vmap

import gradfn as gf
from gradfn.train import reweight, select


def problem(seed, rows=7):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    return torch.randn(rows, generator=generator, dtype=torch.float64), factor @ factor.T / rows


def gain(values, gram, chosen, row):
    return float(values[row] - sum(gram[row, other] for other in chosen))


@pytest.mark.parametrize("seed", range(5))
def test_each_choice_is_the_best_of_all_that_are_left(seed):
    values, gram = problem(seed)
    chosen = select(values, gram, k=5).tolist()
    for number, row in enumerate(chosen):
        left = [i for i in range(7) if i not in chosen[:number]]
        assert row == max(left, key=lambda i: gain(values, gram, chosen[:number], i))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_exhaustive_where_rows_interfere_little(seed, k):
    values, gram = problem(seed)
    gram = 0.02 * gram * (1 - torch.eye(7, dtype=torch.float64))

    def utility(rows):
        return sum(float(values[i]) for i in rows) - sum(float(gram[i, j]) for i, j in combinations(rows, 2))

    best = max(combinations(range(7), k), key=utility)
    assert sorted(select(values, gram, k=k).tolist()) == sorted(best)


def test_without_interference_the_largest_values_are_chosen_and_the_first_of_equal_ones():
    values = torch.tensor([1.0, 3.0, 3.0, -2.0])
    assert select(values, k=4).tolist() == [1, 2, 0, 3]
    assert select(values, torch.zeros(4, 4), k=2).tolist() == [1, 2]


def test_selection_maps():
    pairs = [problem(seed) for seed in range(3)]
    values, gram = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    found = vmap(lambda v, m: select(v, m, k=4))(values, gram)
    assert torch.equal(found, torch.stack([select(v, m, k=4) for v, m in pairs]))


@pytest.mark.parametrize("k", [0, 8])
def test_more_rows_than_there_are_are_refused(k):
    with pytest.raises(gf.InputError, match="give a k from 1 to 7"):
        select(problem(0)[0], k=k)


def test_weights_are_the_positive_shares():
    values = torch.tensor([[2.0, -3.0, 6.0], [-1.0, -2.0, 0.0]])
    assert torch.equal(reweight(values), torch.tensor([[0.25, 0.0, 0.75], [0.0, 0.0, 0.0]]))
