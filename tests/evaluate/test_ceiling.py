import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.ceiling import noise_ceiling, noise_ceiling_estimate
from gradfn.evaluate.correlation import correlation


def retrained(subsets, seeds, queries, noise, key=0):
    """The expected losses of subsets, those of models with noise of a known size, and their subsets."""
    generator = torch.Generator().manual_seed(key)
    expected = torch.randn(subsets, queries, generator=generator).double()
    numbers = torch.arange(subsets).repeat_interleave(seeds)
    models = expected[numbers] + noise * torch.randn(len(numbers), queries, generator=generator).double()
    return expected, models, numbers


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_it_is_what_the_expectation_reaches_against_the_noisy_mean(kind, seeds):
    """Without Spearman-Brown, or without the root, it would be off by 0.06 to 0.35."""
    expected, models, numbers = retrained(1500, seeds, 6, noise=1.2)
    mean = models.reshape(1500, seeds, 6).mean(1)
    reached = correlation(expected, mean, kind)
    ceiling = noise_ceiling(models, numbers, correlate=kind, splits=20)
    assert ceiling == pytest.approx(reached.mean().item(), abs=0.012)
    half = models.reshape(1500, seeds, 6)
    halves = correlation(half[:, 0], half[:, 1], kind).mean().item()
    assert halves < reached.mean() - 0.06
    for wrong in (halves, halves**0.5, seeds * halves / (1 + (seeds - 1) * halves)):
        assert abs(wrong - reached.mean()) > 0.05


@pytest.mark.parametrize(("subsets", "bound"), [(25, 0.03), (100, 0.02)])
@pytest.mark.parametrize("reliability", [0.1, 0.3, 0.6])
def test_over_few_subsets_it_is_not_too_low(subsets, bound, reliability):
    """The mean of the queries' own roots is too low by more than the bound where noise is large."""
    noise = (2 * (1 - reliability) / reliability) ** 0.5
    pooled, own = [], []
    for key in range(12):
        _, models, numbers = retrained(subsets, 2, 30, noise, key=key)
        pooled.append(noise_ceiling(models, numbers, correlate="pearson", splits=4))
        each = [noise_ceiling(models[:, [q]], numbers, correlate="pearson", splits=4) for q in range(30)]
        own.append(sum(each) / 30)
    true = reliability**0.5
    assert sum(pooled) / 12 == pytest.approx(true, abs=bound)
    if reliability == 0.3:
        assert sum(own) / 12 < true - bound


def test_its_interval_ends_at_zero():
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    one = noise_ceiling_estimate(noise, torch.arange(25).repeat_interleave(2), splits=10, draws=100)
    assert 0 <= one.low <= one.high <= 1


def test_losses_that_are_not_finite_are_refused():
    _, models, numbers = retrained(10, 2, 2, noise=1.0)
    models[3, 1] = torch.nan
    for call in (noise_ceiling, noise_ceiling_estimate):
        with pytest.raises(InputError, match=r"^1 of the losses are not finite numbers: leave these models"):
            call(models, numbers)


def test_without_noise_it_is_one_and_without_signal_nearly_zero():
    _, models, numbers = retrained(30, 4, 3, noise=0.0)
    assert noise_ceiling(models, numbers) == pytest.approx(1.0)
    noise = torch.randn(800, 5, generator=torch.Generator().manual_seed(1)).double()
    assert noise_ceiling(noise, torch.arange(400).repeat_interleave(2)) < 0.35


def test_models_may_stand_in_any_order():
    _, models, numbers = retrained(200, 4, 3, noise=0.8)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(2))
    there, here = noise_ceiling(models, numbers), noise_ceiling(models[order], numbers[order])
    assert here == pytest.approx(there, abs=0.02)


def test_subsets_that_lost_seeds_count_with_those_they_have():
    """A third of the subsets have two seeds, the others four; the target is the mean over what there is."""
    expected, models, numbers = retrained(1500, 4, 6, noise=1.2)
    kept = ~((numbers % 3 == 0) & (torch.arange(len(numbers)) % 4 >= 2))
    means = torch.stack([models[kept & (numbers == n)].mean(0) for n in range(1500)])
    reached = correlation(expected, means).mean().item()
    ceiling = noise_ceiling(models[kept], numbers[kept], splits=20)
    assert ceiling == pytest.approx(reached, abs=0.015)


def test_the_interval_holds_what_is_reached():
    expected, models, _ = retrained(4000, 4, 4, noise=1.2, key=77)
    reached, held = correlation(expected, models.reshape(4000, 4, 4).mean(1)).mean().item(), 0
    for key in range(20):
        _, models, numbers = retrained(30, 4, 10, noise=1.2, key=key)
        one = noise_ceiling_estimate(models, numbers, splits=10, draws=200)
        assert one.low < one.value < one.high <= 1
        assert one.value == pytest.approx(noise_ceiling(models, numbers, splits=10))
        held += one.low <= reached <= one.high
    assert held >= 17


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_what_all_subsets_have_of_a_seed_is_no_noise(seeds):
    """The mean over seeds has it in every subset; halves that are drawn a subset each do not."""
    expected, models, numbers = retrained(600, seeds, 6, noise=0.5)
    of = torch.arange(seeds).repeat(600)
    shared = 3 * torch.randn(seeds, 6, generator=torch.Generator().manual_seed(5)).double()
    losses = models + shared[of]
    reached = correlation(expected, losses.reshape(600, seeds, 6).mean(1)).mean().item()
    order = torch.randperm(len(of), generator=torch.Generator().manual_seed(6))
    ceiling = noise_ceiling(losses[order], numbers[order], seeds=of[order] + 7000, splits=20)
    assert ceiling == pytest.approx(reached, abs=0.012)
    assert noise_ceiling(losses, numbers, splits=20) < reached - 0.2


def test_the_interval_holds_the_ceiling_of_seeds_that_are_shared():
    of = torch.arange(2).repeat(30)
    for key in range(5):
        expected, models, numbers = retrained(30, 2, 10, noise=0.5, key=key)
        shared = 3 * torch.randn(2, 10, generator=torch.Generator().manual_seed(key)).double()
        one = noise_ceiling_estimate(models + shared[of], numbers, seeds=of, splits=4, draws=200)
        reached = correlation(expected, models.reshape(30, 2, 10).mean(1)).mean().item()
        assert one.low <= reached <= one.high
        assert one.high - one.low < 0.2


@pytest.mark.parametrize("seeds", [[0, 1, 0, 1, 0, 2], [0, 1, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5]])
def test_seeds_that_differ_from_subset_to_subset_are_refused(seeds):
    _, models, numbers = retrained(3, 2, 2, noise=1.0)
    for call in (noise_ceiling, noise_ceiling_estimate):
        with pytest.raises(
            InputError, match=r"not the same in every subset, each once: leave out the models"
        ):
            call(models, numbers, seeds=torch.tensor(seeds))


def test_one_seed_a_subset_is_refused():
    _, models, numbers = retrained(10, 1, 2, noise=1.0)
    for call in (noise_ceiling, noise_ceiling_estimate):
        with pytest.raises(
            InputError, match=r"with two seeds or more, and 0 have them: retrain with more seeds"
        ):
            call(models, numbers)
