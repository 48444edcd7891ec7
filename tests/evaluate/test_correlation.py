import math

import pytest
import torch

from gradfn.evaluate.correlation import correlation, ranks, resampled_correlation


def naive_ranks(values):
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def naive_pearson(a, b):
    n = len(a)
    mean_a, mean_b = sum(a) / n, sum(b) / n
    both = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread_a, spread_b = sum((x - mean_a) ** 2 for x in a), sum((y - mean_b) ** 2 for y in b)
    return both / math.sqrt(spread_a * spread_b)


def naive(a, b, kind):
    a, b = a.tolist(), b.tolist()
    return naive_pearson(naive_ranks(a), naive_ranks(b)) if kind == "spearman" else naive_pearson(a, b)


def tied(rows, columns, seed):
    """Whole numbers, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, rows // 2, (rows, columns), generator=generator).double()


def test_ranks_are_the_mean_ranks_of_ties():
    values = tied(12, 4, 0)
    for column, found in zip(values.T, ranks(values).T, strict=True):
        assert found.tolist() == naive_ranks(column.tolist())


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_columns_are_correlated_one_by_one(kind):
    a, b = tied(12, 5, 1), tied(12, 5, 2)
    expected = [naive(a[:, q], b[:, q], kind) for q in range(5)]
    assert correlation(a, b, kind).tolist() == pytest.approx(expected, abs=1e-12)
    assert max(expected) - min(expected) > 0.1


def test_spearman_sees_order_alone_and_pearson_does_not():
    a, b = tied(15, 1, 3), tied(15, 1, 4)
    assert correlation(a.exp(), b).item() == pytest.approx(correlation(a, b).item())
    assert correlation(a.exp(), b, "pearson").item() != pytest.approx(correlation(a, b, "pearson").item())


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e9])
def test_a_constant_column_has_correlation_zero(kind, constant):
    a, b = torch.full((7, 1), constant).double(), tied(7, 1, 5)
    assert correlation(a, b, kind).tolist() == correlation(b, a, kind).tolist() == [0.0]


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_a_draw_is_the_correlation_of_the_rows_it_repeats(kind):
    a, b = tied(9, 1, 6)[:, 0], tied(9, 1, 7)[:, 0]
    drawn = torch.randint(9, (30, 9), generator=torch.Generator().manual_seed(8))
    counts = torch.stack([row.bincount(minlength=9) for row in drawn]).T.float()
    expected = [naive(a[rows], b[rows], kind) for rows in drawn]
    found = resampled_correlation(a, b, counts, kind)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_draw_of_one_row_alone_has_correlation_zero():
    counts = torch.tensor([[3.0], [0.0], [0.0]])
    a = torch.tensor([1.0, 2.0, 3.0])
    assert resampled_correlation(a, a, counts).tolist() == [0.0]
