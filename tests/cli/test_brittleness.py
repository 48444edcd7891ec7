import json

import pytest
import torch
from evaluated import QUERIES, World, refused, write_truth

from gradfn.evaluate.brittleness import brittleness_subsets
from gradfn.evaluate.lds import predicted


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def test_a_removal_of_which_no_model_is_left_is_refused(ok, command, world, tmp_path):
    subsets = brittleness_subsets(world.near, [2], controls=3)
    numbers = torch.arange(len(subsets)).repeat_interleave(2)
    losses = (4 - predicted(world.influence, subsets))[numbers]
    made = [
        write_truth(tmp_path / str(len(lost)), subsets, losses, numbers, diverged=lost, independent=True)
        for lost in ((1,), (2, 3))
    ]
    assert "2 independent seeds" in ok("evaluate", "brittleness", made[0])
    assert "every model of a subset diverged, so a removal is missing" in refused(
        command, "brittleness", made[1]
    )


def test_brittleness_compares_with_random_removals(ok, command, world, tmp_path):
    scores = world.near
    subsets = brittleness_subsets(scores, [2, 4], controls=3)
    losses = 4 - predicted(world.influence, subsets)
    truth = write_truth(tmp_path / "removed", subsets, losses, torch.arange(len(subsets)))
    out = ok("evaluate", "brittleness", truth, "--jsonl", tmp_path / "t.jsonl")
    table = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for row, k in zip(table, (2, 4), strict=True):
        best = scores.argsort(dim=0, descending=True)[:k]
        assert row["k"] == k
        assert row["rise"] == pytest.approx(world.influence.gather(0, best).sum(0).mean().item())
        assert row["by_chance"] < row["rise"]
        assert row["lost"] is None
        assert f"{row['rise']:+.3f}" in out
    assert "8 queries x 2 sizes, 3 random removals of each size, 1 shared seed" in out
    assert "are not those of a test of brittleness" in refused(command, "brittleness", world.truth)
    lost = write_truth(tmp_path / "lost", subsets, losses, torch.arange(len(subsets)), diverged=(2,))
    assert "so a removal is missing: retrain with a lower" in refused(command, "brittleness", lost)


def test_brittleness_compares_models_of_the_same_seeds(ok, world, tmp_path):
    """The second seed adds 9 to every loss, and the full model of it diverged."""
    subsets = brittleness_subsets(world.near, [2], controls=3)
    numbers = torch.arange(len(subsets)).repeat_interleave(2)
    losses = (4 - predicted(world.influence, subsets))[numbers] + 9 * (torch.arange(len(numbers)) % 2)[
        :, None
    ]
    truth = write_truth(tmp_path / "removed", subsets, losses, numbers, diverged=(1,))
    out = ok("evaluate", "brittleness", truth, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    best = world.near.argsort(dim=0, descending=True)[:2]
    assert row["rise"] == pytest.approx(world.influence.gather(0, best).sum(0).mean().item())
    assert f"1 of {len(numbers)} models; left out" in out
    assert "3 random removals of each size, 1 shared seed" in out


def test_answers_are_lost_where_the_loss_is_that_of_an_answer(ok, world, tmp_path):
    subsets = brittleness_subsets(world.near, [2], controls=3)
    losses = torch.full((len(subsets), QUERIES), 0.1).double()
    losses[1:3] = 3.0
    sums = {"query_loss": {"criterion": "cross_entropy", "reduction": "sum", "label_smoothing": 0.0}}
    means = {"query_loss": {**sums["query_loss"], "reduction": "mean"}}
    smooth = {"query_loss": {**sums["query_loss"], "label_smoothing": 0.1}}
    one_token, several = ({**means, "subsets": {"answer_tokens": n}} for n in (1, 2))
    for number, (settings, told) in enumerate(((means, False), (smooth, False), (several, False),
                                               (one_token, True))):  # fmt: skip
        truth = write_truth(
            tmp_path / str(number), subsets, losses, torch.arange(len(subsets)), settings=settings
        )
        assert ("answers lost" in ok("evaluate", "brittleness", truth)) == told
    truth = write_truth(tmp_path / "t", subsets, losses, torch.arange(len(subsets)), settings=sums)
    out = ok("evaluate", "brittleness", truth, "--jsonl", tmp_path / "t.jsonl")
    row = json.loads((tmp_path / "t.jsonl").read_text())
    assert (row["lost"], row["lost_by_chance"]) == (2 / 8, 0.0)
    assert "answers lost" in out


def test_predictions_flip_where_there_are_classes(ok, world, tmp_path):
    subsets = brittleness_subsets(world.near, [2, 4], controls=3)
    numbers = torch.arange(len(subsets)).repeat_interleave(2)
    margins = torch.randn(len(numbers), QUERIES, generator=torch.Generator().manual_seed(5)).double()
    margins[:2, :6], margins[:2, 6:] = 1.0, -1.0
    loss = {"query_loss": {"criterion": "cross_entropy", "reduction": "sum", "label_smoothing": 0.0}}
    truth = write_truth(tmp_path / "truth", subsets, torch.rand(len(numbers), QUERIES).double(), numbers,
                        margins=margins, settings=loss)  # fmt: skip
    out = ok("evaluate", "brittleness", truth, "--jsonl", tmp_path / "t.jsonl")
    means = [(margins[2 * n] + margins[2 * n + 1]) / 2 for n in range(len(subsets))]
    for place, line in enumerate((tmp_path / "t.jsonl").read_text().splitlines()):
        row = json.loads(line)
        best = [bool(means[1 + 2 * query + place][query] <= 0) for query in range(6)]
        first = 1 + 2 * QUERIES + 3 * place
        chance = [bool(means[c][query] <= 0) for query in range(6) for c in range(first, first + 3)]
        assert row["right"] == 6
        assert row["flipped"] == pytest.approx(sum(best) / 6)
        assert row["flipped_by_chance"] == pytest.approx(sum(chance) / 18)
        assert row["lost"] is None
        assert f"{sum(best) / 6:.0%}, {sum(chance) / 18:.0%} by chance" in out
    assert "6 of 8 queries right, which are those that can flip" in " ".join(out.split())
    assert "answers lost" not in out


def test_nothing_flips_where_nothing_is_right_or_there_are_no_classes(ok, world, tmp_path):
    subsets = brittleness_subsets(world.near, [2], controls=3)
    numbers, losses = torch.arange(len(subsets)), torch.rand(len(subsets), QUERIES).double()
    for margins, right in ((-torch.ones(len(subsets), QUERIES).double(), 0), (None, None)):
        truth = write_truth(tmp_path / str(right), subsets, losses, numbers, margins=margins)
        out = ok("evaluate", "brittleness", truth, "--jsonl", tmp_path / f"{right}.jsonl")
        row = json.loads((tmp_path / f"{right}.jsonl").read_text())
        assert (row["right"], row["flipped"], row["flipped_by_chance"]) == (right, None, None)
        assert "predictions flip" not in out
        assert ("0 of 8 queries right" in " ".join(out.split())) == (right == 0)
