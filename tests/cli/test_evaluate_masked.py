"""Ground truths of several sizes of removals, and of masked rows."""

import json

import pytest
import torch
from evaluated import QUERIES, SUBSETS, World, refused, write_scores, write_truth

from gradfn.evaluate.lds import lds

MASK = {"removal": "mask"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def sizes(world, few):
    """The world's losses on subsets of which the first 8 lack `few` rows, and the others 4."""
    ranks = torch.rand(SUBSETS, 10, generator=torch.Generator().manual_seed(2)).argsort(1).argsort(1)
    left_out = torch.where(torch.arange(SUBSETS) < 8, few, 4)
    subsets = ranks >= left_out[:, None]
    noise = torch.randn(40, QUERIES, generator=torch.Generator().manual_seed(3)).double()
    return subsets, (4 - subsets.double() @ world.influence)[world.numbers] + 0.5 * noise


def test_each_fraction_of_a_truth_is_a_row_of_the_table(ok, world, tmp_path):
    subsets, losses = sizes(world, 1)
    truth = write_truth(tmp_path / "t", subsets, losses, world.numbers,
                        settings={"subsets": {"fraction": [0.9, 0.6]}})  # fmt: skip
    out = ok("evaluate", "lds", truth, world.close, "--jsonl", tmp_path / "t.jsonl",
             "--plot", tmp_path / "p.svg")  # fmt: skip
    table, means = rows_of(tmp_path / "t.jsonl"), losses.reshape(SUBSETS, 2, QUERIES).mean(1)
    for row, part, share in zip(table, (slice(0, 8), slice(8, None)), (0.1, 0.4), strict=True):
        expected = lds(world.near, subsets[part], means[part]).mean().item()
        assert (row["removed"], row["removal"]) == (pytest.approx(share), "drop")
        assert (row["lds"], row["subsets"]) == (pytest.approx(expected), len(means[part]))
        assert f"{expected:.3f}" in out
    assert ["10.00%", "close"] in [line.split()[:2] for line in out.splitlines()]
    assert ["40.00%", "noise", "ceiling"] in [line.split()[:3] for line in out.splitlines()]
    drawn = (tmp_path / "p.svg").read_text()
    assert "share of the rows removed" in drawn


def test_several_truths_are_rows_of_one_table(ok, command, world, tmp_path):
    other = write_truth(tmp_path / "other", world.subsets, world.losses, world.numbers, settings=MASK)
    out = ok("evaluate", "lds", f"{world.truth},{other}", world.close, "--jsonl", tmp_path / "t.jsonl",
             "--plot", tmp_path / "p.svg")  # fmt: skip
    table = rows_of(tmp_path / "t.jsonl")
    assert [row["removal"] for row in table] == ["drop", "mask"]
    assert [row["truth"] for row in table] == [str(world.truth), str(other)]
    drawn = (tmp_path / "p.svg").read_text()
    for name in ("close (drop)", "close (mask)", "noise ceiling (mask)"):
        assert name in drawn
    assert out.count("of the rows, dropped") == out.count("of the rows, masked") == 1
    assert "names no path, or an empty one" in refused(command, "lds", f"{world.truth},", world.close)


@pytest.mark.parametrize(("made", "settings", "says"), [
    ({"method": {"magic": {"seed": 0}}}, {}, "says what masking rows does to one training, and these models "
     "dropped them: retrain with --removal mask"),
    ({"recipe": "inrun", "seed": 0}, {}, "these models dropped them"),
    ({"method": {"magic": {"seed": 3}}}, MASK, "is of the order of seed 3, which is not that of all"),
    ({"method": {"magic": {"seed": 1}}}, MASK, None), ({"recipe": "inrun", "seed": 1}, MASK, None),
    ({"recipe": "ekfac"}, {}, None),
])  # fmt: skip
def test_scores_of_masked_rows_are_told_where_the_truth_is_another(ok, world, tmp_path, made, settings, says):
    run = write_scores(tmp_path / "run", world.near[None], settings=made)
    truth = write_truth(tmp_path / "t", world.subsets, world.losses, world.numbers, settings=settings)
    out = " ".join(ok("evaluate", "lds", truth, run).split())
    assert ("note" in out) == (says is not None)
    assert (says or "LDS") in out
