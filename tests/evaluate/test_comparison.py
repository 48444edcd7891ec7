import pytest
import torch

from gradfn.errors import InputError
from gradfn.evaluate.comparison import compare, damping_curve
from gradfn.evaluate.lds import lds, lds_estimate, predicted
from gradfn.evaluate.selection import chosen, halves
from gradfn.scores import Scores

ROWS, QUERIES = 12, 10


@pytest.fixture
def world():
    generator = torch.Generator().manual_seed(0)
    subsets = torch.rand(30, ROWS, generator=generator) < 0.5
    influence = torch.randn(ROWS, QUERIES, generator=generator).double()
    return influence, subsets, -predicted(influence, subsets)


def noisy(influence, *noises):
    """Scores that are the further from the truth, the larger the noise; one set for each."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([influence + s * torch.randn(ROWS, QUERIES, generator=generator) for s in noises])


def scored(name, scores, dampings):
    return Scores(scores, [*map(str, range(ROWS))], [*map(str, range(QUERIES))], dampings, name=name)


def test_halves_are_disjoint_complete_and_seeded():
    for queries in (2, 7, 10):
        choose, report = halves(queries, seed=3)
        assert sorted([*choose.tolist(), *report.tolist()]) == [*range(queries)]
        assert len(choose) == queries // 2
    assert halves(20, seed=0).choose.tolist() != halves(20, seed=1).choose.tolist()


def test_the_choice_looks_at_the_given_queries_alone():
    each = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.0, 0.6]])
    assert chosen(each, torch.tensor([0, 2])) == 1
    assert chosen(each, torch.tensor([1])) == 0


def test_without_a_choice_all_queries_are_reported(world):
    influence, subsets, losses = world
    scores = noisy(influence, 0.5)
    told = compare([scored("one", scores, ("",))], subsets, losses)
    assert told.queries.tolist() == [*range(QUERIES)]
    assert told.runs[0].lds == lds_estimate(scores[0], subsets, losses)
    assert told.runs[0].pearson == lds_estimate(scores[0], subsets, losses, correlate="pearson")


def test_a_damping_is_chosen_on_other_queries_than_are_reported(world):
    """The best on the queries to choose on is the worst on those reported, and is reported nevertheless."""
    influence, subsets, losses = world
    choose, report = halves(QUERIES, seed=5)
    good, bad = noisy(influence, 0.2, 50.0)
    scores = torch.stack([good, bad])
    scores[0, :, choose], scores[1, :, choose] = bad[:, choose], good[:, choose]
    run, other = scored("two", scores, ("1", "0.1")), scored("one", good[None], ("",))
    told = compare([run, other], subsets, losses, seed=5)
    assert told.queries.tolist() == report.tolist()
    assert [one.damping for one in told.runs] == ["0.1", ""]
    expected = lds(scores[1][:, report], subsets, losses[:, report]).mean().item()
    assert told.runs[0].lds.value == pytest.approx(expected)
    assert expected < 0.3 < told.runs[1].lds.value
    assert told.runs[1].lds.value == pytest.approx(
        lds(good[:, report], subsets, losses[:, report]).mean().item()
    )


def test_reported_queries_do_not_move_the_choice(world):
    influence, subsets, losses = world
    scores = noisy(influence, 0.2, 1.0, 3.0)
    report = halves(QUERIES).report
    before = compare([scored("one", scores, ("a", "b", "c"))], subsets, losses).runs[0].damping
    changed = scores.clone()
    changed[:, :, report] = noisy(influence, 3.0, 1.0, 0.2)[:, :, report]
    assert (
        compare([scored("one", changed, ("a", "b", "c"))], subsets, losses).runs[0].damping == before == "a"
    )


def test_constant_scores_are_counted(world):
    influence, subsets, losses = world
    scores = noisy(influence, 0.5)
    scores[:, :, 4] = 0.0
    assert compare([scored("one", scores, ("",))], subsets, losses).runs[0].constant == 1


def test_the_curve_has_every_damping_on_the_queries_given(world):
    influence, subsets, losses = world
    scores, some = noisy(influence, 0.2, 1.0), torch.tensor([1, 4, 5])
    curve = damping_curve(scored("one", scores, ("1", "0.1")), subsets, losses, some)
    assert [*curve] == ["1", "0.1"]
    for number, one in enumerate(curve.values()):
        assert one == lds_estimate(scores[number][:, some], subsets, losses[:, some])


def test_one_query_cannot_be_chosen_on_and_reported(world):
    influence, subsets, losses = world
    run = Scores(noisy(influence, 0.2, 1.0)[:, :, :1], [*map(str, range(ROWS))], ["q"], ("1", "0.1"))
    with pytest.raises(
        InputError, match=r"chosen on some queries and reported on others, so 1 are too few: give"
    ):
        compare([run], subsets, losses[:, :1])
