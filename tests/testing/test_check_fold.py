"""Each law of a fold refuses a fold that breaks it, and says which."""

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st

from gradfn.fold import AdamMoments, Mean, Sums, adam_moments, mean, total
from gradfn.testing import BrokenLawError, check_fold
from gradfn.transforms.summed import Summed


def plus(a, b, scale=1.0):
    if not a.blocks or not b.blocks:
        return a if a.blocks else b
    sums = {name: (a.blocks[name] + b.blocks[name]) * scale for name in a.blocks}
    return Sums(a.count + b.count, sums)


@dataclass(frozen=True)
class Averaged(Mean):
    """Chunks weigh the same, whatever their size."""

    def merge(self, a, b):
        return plus(a, b, 0.5)


@dataclass(frozen=True)
class BatchMeans(AdamMoments):
    """The square of a chunk's sum."""

    def stage(self):
        return Summed(lambda name, G: G.double().sum(0).square())


@dataclass(frozen=True)
class InPlace(Mean):
    def merge(self, a, b):
        if not a.blocks or not b.blocks:
            return a if a.blocks else b
        for name, sums in a.blocks.items():
            sums += b.blocks[name]
        return Sums(a.count + b.count, a.blocks)


@dataclass(frozen=True)
class LastWins(Mean):
    """Only merging of states that both come from rows is wrong."""

    def update(self, state, blocks):
        share = {name: G.double().sum(0) for name, G in blocks.items()}
        return plus(state, Sums(len(next(iter(blocks.values()))), share))

    def merge(self, a, b):
        return Sums(a.count + b.count, b.blocks or a.blocks)


@dataclass(frozen=True)
class NotNeutral(Mean):
    """A count of one for no rows."""

    def init(self):
        return Sums(1, {})

    def merge(self, a, b):
        return Sums(a.count + b.count, plus(a, b).blocks)


BROKEN = [
    (Averaged(), "chunks one after the other are not all rows at once"),
    (BatchMeans(), "chunks one after the other are not all rows at once"),
    (InPlace(), "changes the state it is given|changes a state it is given|not all rows at once"),
    (LastWins(), "chunks merged are not all rows at once"),
    (NotNeutral(), "not all rows at once|is not the state"),
]


@pytest.mark.parametrize(("fold", "message"), BROKEN, ids=lambda value: type(value).__name__)
def test_a_broken_law_is_named(fold, message):
    with pytest.raises(BrokenLawError, match=message):
        check_fold(fold)


@pytest.mark.parametrize("fold", [mean(), total(), st.sampled_from([adam_moments(), adam_moments(0.1)])])
def test_folds_that_hold(fold):
    check_fold(fold)
