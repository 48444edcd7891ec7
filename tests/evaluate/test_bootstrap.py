from math import isnan

import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import correlation_estimate, counts_of_draws, grid_estimate, mean_estimate
from gradfn.evaluate.correlation import correlation


def correlated(subsets, queries, seed, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(subsets, queries, generator=generator).double()
    return a, a + noise * torch.randn(subsets, queries, generator=generator).double()


def test_draws_take_as_many_rows_as_there_are():
    counts = counts_of_draws(6, 500, torch.Generator().manual_seed(0))
    assert counts.sum(0).tolist() == [6.0] * 500
    # Binomial(6, 1/6): mean 1, variance 5/6.
    assert counts.mean().item() == 1.0
    assert counts.var().item() == pytest.approx(5 / 6, abs=0.05)


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    one, error = mean_estimate(values), (values.std() / 20).item()
    assert one.value == pytest.approx(values.mean().item())
    assert one.high - one.value == pytest.approx(1.96 * error, rel=0.12)
    assert one.value - one.low == pytest.approx(1.96 * error, rel=0.12)


def test_a_single_query_has_no_interval():
    with pytest.raises(InputError, match="there are no queries"):
        mean_estimate(torch.tensor([]))
    one = mean_estimate(torch.tensor([0.25]))
    assert (one.value, isnan(one.low), isnan(one.high)) == (0.25, True, True)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_the_interval_of_a_correlation_takes_subsets_and_queries_anew(kind):
    """By a plain loop over draws, with its own random numbers."""
    a, b = correlated(25, 8, 1)
    generator, means = torch.Generator().manual_seed(99), []
    for _ in range(2000):
        rows = torch.randint(25, (25,), generator=generator)
        columns = torch.randint(8, (8,), generator=generator)
        means.append(correlation(a[rows][:, columns], b[rows][:, columns], kind).mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    one = correlation_estimate(a, b, kind)
    assert one.value == pytest.approx(correlation(a, b, kind).mean().item(), abs=1e-12)
    assert one.high - one.low == pytest.approx(high - low, rel=0.12)
    assert one.low < one.value < one.high


def test_more_subsets_and_queries_narrow_the_interval():
    widths = [one.high - one.low for one in (correlation_estimate(*correlated(n, n, 2)) for n in (10, 40))]
    assert widths[1] < widths[0] / 2


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Independent columns, whose correlation is 0: 95 % of 60 intervals, or with many queries even more."""
    held = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 20, 4, generator=generator).double()
        one = correlation_estimate(a, b, draws=200)
        held += one.low <= 0 <= one.high
    assert held >= 53


def test_the_seed_decides_the_draws():
    a, b = correlated(20, 5, 3)
    assert correlation_estimate(a, b, seed=1) == correlation_estimate(a, b, seed=1)
    assert correlation_estimate(a, b, seed=1) != correlation_estimate(a, b, seed=2)


def test_the_interval_of_a_table_takes_rows_and_queries_anew():
    """By a plain loop over draws; rows that differ in all queries alike widen it."""
    made = torch.Generator().manual_seed(0)
    table = torch.randn(5, 30, generator=made).double() + torch.randn(5, 1, generator=made).double()
    generator, means = torch.Generator().manual_seed(99), []
    for _ in range(2000):
        rows = torch.randint(5, (5,), generator=generator)
        means.append(table[rows][:, torch.randint(30, (30,), generator=generator)].mean())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    one = grid_estimate(table)
    assert one.value == pytest.approx(table.mean().item())
    assert one.high - one.low == pytest.approx(high - low, rel=0.12)
    of_queries = mean_estimate(table.mean(0))
    assert one.high - one.low > 1.5 * (of_queries.high - of_queries.low)
    assert isnan(grid_estimate(table[:, :1]).low)
