"""Runs of scores and of retrained models for `gradfn evaluate`, without a model."""

import numpy as np
import torch

from gradfn.evaluate.lds import predicted
from gradfn.scores import Scores
from gradfn.store import open_writer

ROWS, QUERIES, SUBSETS, SEEDS = 10, 8, 20, 2
ROW_IDS = [f"r{n}" for n in range(ROWS)]
QUERY_IDS = [f"q{n}" for n in range(QUERIES)]
SOURCES = torch.arange(QUERIES) % 4


def write_scores(run, scores, *, dampings=("",), rows=None, queries=None, settings=None):
    """What `gradfn score RUN` writes, for scores `[dampings, rows, queries]` at hand."""
    queries = QUERY_IDS if queries is None else queries
    known = {"data": {"fingerprint": "d"}, "query": {"fingerprint": "q"}, **(settings or {})}
    Scores(scores.float(), rows or ROW_IDS, queries, tuple(dampings), settings=known).save(run)
    return run


def write_truth(run, subsets, losses, numbers, *, diverged=(), rows=None, settings=None,
                margins=None, independent=False, weights=None):  # fmt: skip
    """What `gradfn retrain` writes."""
    lost = torch.isin(torch.arange(len(numbers)), torch.tensor(diverged, dtype=torch.int64))
    arrays = {"subsets": subsets[numbers], "numbers": numbers,
              "seeds": torch.arange(len(numbers)) % (10**9 if independent else numbers.bincount().max()),
              "losses": torch.where(lost[:, None], torch.nan, losses),
              "train_losses": torch.zeros(len(numbers)).double(), "diverged": lost,
              **({} if margins is None else {"margins": margins}),
              **({} if weights is None else {"weights": weights[numbers]})}  # fmt: skip
    settings = {"data": {"fingerprint": "d"}, "query": {"fingerprint": "q"}, **(settings or {})}
    with open_writer(run, "truth", settings, len(numbers)) as writer:
        writer.write(0, len(numbers), {name: value.numpy() for name, value in arrays.items()})
        writer.finish({"rows/id": np.array(rows or ROW_IDS, object),
                       "queries/id": np.array(QUERY_IDS, object), "looped": [""]})  # fmt: skip
    return run


class World:
    """Influences, subsets and models whose losses are linear in them, with noise; scores near and far."""

    def __init__(self, folder):
        generator = torch.Generator().manual_seed(0)
        self.influence = torch.randn(ROWS, QUERIES, generator=generator).double()
        self.subsets = torch.rand(SUBSETS, ROWS, generator=generator) < 0.5
        self.numbers = torch.arange(SUBSETS).repeat_interleave(SEEDS)
        noise = torch.randn(len(self.numbers), QUERIES, generator=generator).double()
        self.losses = 4 - predicted(self.influence, self.subsets)[self.numbers] + 0.7 * noise
        near, far = (self.influence + s * torch.randn(ROWS, QUERIES, generator=generator) for s in (0.5, 3.0))
        self.near, self.far = near.float(), far.float()
        self.truth = write_truth(folder / "truth", self.subsets, self.losses, self.numbers)
        self.close = write_scores(folder / "close", self.near[None])
        self.sweep = write_scores(
            folder / "sweep", torch.stack([self.far, self.near]), dampings=("1", "truncated:1e-06")
        )

    def means(self):
        return self.losses.reshape(SUBSETS, SEEDS, QUERIES).mean(1)


def refused(command, *arguments):
    """The sentence with which a command refuses."""
    result = command("evaluate", *arguments)
    assert result.status == 2, result.out + result.err
    assert result.out == ""
    assert len(result.err.strip().splitlines()) == 1
    return result.err
