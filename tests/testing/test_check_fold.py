"""Each law of a fold refuses a fold that breaks it, and says which."""

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st

from gradfn.statistics.fold import FoldState
from gradfn.statistics.moments import AdamMoments, Mean, adam_moments, mean, total
from gradfn.testing import BrokenLawError, check_fold
from gradfn.transforms.row_sum import RowSum


def plus(a, b, scale=1.0):
    if not a.blocks or not b.blocks:
        return a if a.blocks else b
    sums = {name: (a.blocks[name] + b.blocks[name]) * scale for name in a.blocks}
    return FoldState(a.count + b.count, sums)


@dataclass(frozen=True)
class Averaged(Mean):
    """Chunks weigh the same, whatever their size."""

    def merge(self, a, b):
        return plus(a, b, 0.5)


@dataclass(frozen=True)
class BatchMeans(AdamMoments):
    """The square of a chunk's sum."""

    def stage(self):
        return RowSum(lambda name, G: G.double().sum(0).square())


@dataclass(frozen=True)
class InPlace(Mean):
    def merge(self, a, b):
        if not a.blocks or not b.blocks:
            return a if a.blocks else b
        for name, sums in a.blocks.items():
            sums += b.blocks[name]
        return FoldState(a.count + b.count, a.blocks)


@dataclass(frozen=True)
class LastWins(Mean):
    """Only merging of states that both come from rows is wrong."""

    def update(self, state, blocks):
        share = {name: G.double().sum(0) for name, G in blocks.items()}
        return plus(state, FoldState(len(next(iter(blocks.values()))), share))

    def merge(self, a, b):
        return FoldState(a.count + b.count, b.blocks or a.blocks)


@dataclass(frozen=True)
class NotNeutral(Mean):
    """A count of one for no rows."""

    def init(self):
        return FoldState(1, {})

    def merge(self, a, b):
        return FoldState(a.count + b.count, plus(a, b).blocks)


@dataclass(frozen=True)
class InPlaceWhole(Mean):
    """Count and sums: merged with itself, the mean of a state is what it was."""

    changed: int = 0

    def init(self):
        return [0, {}]

    def update(self, state, blocks):
        share = [len(next(iter(blocks.values()))), {name: G.double().sum(0) for name, G in blocks.items()}]
        return self.added(state, share)

    def added(self, a, b):
        return [a[0] + b[0], {name: a[1].get(name, 0) + sums for name, sums in b[1].items()} or a[1]]

    def merge(self, a, b):
        state = (a, b)[self.changed]
        state[:] = self.added(a, b)
        return [*state]

    def finalize(self, state):
        return {name: sums / state[0] for name, sums in state[1].items()}


@dataclass(frozen=True)
class ChangesRows(Mean):
    def update(self, state, blocks):
        for G in blocks.values():
            G *= 2
        return super().update(state, blocks)


@dataclass(frozen=True)
class FirstEight(AdamMoments):
    """Rows of a chunk beyond the eighth are forgotten."""

    def stage(self):
        return RowSum(lambda name, G: G[:8].double().square().sum(0))


@dataclass(frozen=True)
class AsArrays(InPlaceWhole):
    def merge(self, a, b):
        return self.added(a, b)

    def finalize(self, state):
        return {name: values.numpy() for name, values in super().finalize(state).items()}


BROKEN = [
    (Averaged(), "chunks one after the other are not all rows at once"),
    (BatchMeans(), "chunks one after the other are not all rows at once"),
    (InPlace(), "changes the state it is given|changes a state it is given|not all rows at once"),
    (LastWins(), "chunks merged are not all rows at once"),
    (NotNeutral(), "not all rows at once|is not the state"),
    (InPlaceWhole(), "merge changes the first state"),
    (InPlaceWhole(changed=1), "merge changes the second state"),
    (ChangesRows(), "update changes the rows it is given"),
    (FirstEight(), r"not all rows at once(.|\n)*blocks: {a: tensor \[\d+, 1, 1\]}"),
]


@pytest.mark.parametrize(("fold", "message"), BROKEN, ids=lambda value: type(value).__name__)
def test_a_broken_law_is_named(fold, message):
    with pytest.raises(BrokenLawError, match=message):
        check_fold(fold)


@pytest.mark.parametrize(
    "fold", [mean(), total(), AsArrays(), st.sampled_from([adam_moments(), adam_moments(0.1)])]
)
def test_folds_that_hold(fold):
    check_fold(fold)
