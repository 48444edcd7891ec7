"""dattri's ground truth, as gradfn reads it, gives dattri's own metrics."""

import pytest
import torch
from bridged import imported
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradfn as gf
from gradfn.bridges.dattri import truth
from gradfn.bridges.supervised import attributed, rows_of
from gradfn.errors import InputError


def lds_truth(rows=24, models=12, queries=6):
    draw = torch.Generator().manual_seed(3)
    numbers = torch.stack([torch.randperm(rows, generator=draw)[: rows // 2] for _ in range(models)])
    return torch.randn(models, queries, generator=draw), numbers


def scores_of(problem):
    made = attributed(problem.net, problem.train, nn.functional.cross_entropy, gf.grad_dot())
    return made.scores(rows_of(problem.queries)).T


def test_the_lds_is_that_of_dattri(problem):
    (metric,) = imported("dattri.metric")
    scores, given = scores_of(problem), lds_truth()
    ours = gf.evaluate.lds(scores, *truth(given, rows=24).targets())
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, metric.lds(scores, given)[0])


def test_leaving_one_out_is_that_of_dattri(problem):
    (metric,) = imported("dattri.metric")
    scores, lacking = scores_of(problem), torch.arange(24).float()  # dattri makes them of torch.empty
    losses = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    made = truth((losses, lacking), rows=24, metric="loo").leaving_one_out()
    ours = gf.evaluate.lds(scores, *made.targets(), correlate="pearson")
    torch.testing.assert_close(ours, metric.loo_corr(scores, (losses, lacking))[0])


def test_models_that_dattri_retrained_are_read(problem, tmp_path):
    """A folder as `retrain_lds` writes it, of models that are trained with gradfn's rows."""
    ground, retrain = imported("dattri.metric", "dattri.model_util.retrain")
    train = DataLoader(TensorDataset(*problem.train.tensors), batch_size=24)
    net = problem.net

    def trained(loader, seed=None, **_):
        torch.manual_seed(0 if seed is None else seed)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(20):
            for inputs, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
        return model

    def losses(path, loader):
        net.load_state_dict(torch.load(path, weights_only=True))
        with torch.no_grad():
            (inputs, labels), *_ = loader
            return nn.functional.cross_entropy(net(inputs), labels, reduction="none")

    retrain.retrain_lds(trained, train, str(tmp_path), num_subsets=8, subset_ratio=0.5, total_seed=1)
    asked = DataLoader(TensorDataset(*problem.queries), batch_size=6)
    given = ground.calculate_lds_ground_truth(losses, str(tmp_path), asked)
    made = truth(given, rows=24)
    assert made.subsets.sum(1).eq(12).all()
    first = made.subsets[0].nonzero()[:, 0].tolist()
    assert first == sorted(map(int, (tmp_path / "0" / "indices.txt").read_text().split()))
    torch.testing.assert_close(
        made.losses[0], losses(tmp_path / "0" / "model_weights_0.pt", asked), rtol=1e-6, atol=1e-6
    )
    scores = attributed(net, problem.train, nn.functional.cross_entropy, "ekfac").scores(
        rows_of(problem.queries)
    )
    torch.testing.assert_close(gf.evaluate.lds(scores.T, *made.targets()), ground.lds(scores.T, given)[0])


def test_a_benchmark_that_lies_on_the_disk_is_read(problem, tmp_path, monkeypatch):
    """The files that `load_benchmark` downloads, made here in its format."""
    (load,) = imported("dattri.benchmark.load")
    folder = tmp_path / "benchmark" / "mnist_lr"
    for part in ("models_full", "models_half", "lds"):
        (folder / part).mkdir(parents=True)
    values, numbers = lds_truth()
    torch.save(values, folder / "lds" / "target_values_lds.pt")
    torch.save(numbers, folder / "lds" / "indices_lds.pt")
    monkeypatch.setitem(load.SUPPORTED_DATASETS, "mnist", lambda path: (problem.train, problem.queries))
    inputs, given = load.load_benchmark("lr", "mnist", "lds", str(tmp_path))
    made = truth(given, rows=len(inputs["train_dataset"]))
    torch.testing.assert_close(made.losses, -values.double())


def test_names_and_what_diverged():
    values, numbers = lds_truth()
    values[2] = torch.nan
    made = truth((values, numbers), 24, query_ids=[*"abcdef"])
    assert made.query_ids == [*"abcdef"]
    assert made.row_ids[-1] == "23"
    assert made.diverged.tolist() == [number == 2 for number in range(12)]
    assert len(made.targets()[0]) == 11


def test_what_is_no_ground_truth_is_refused():
    values, numbers = lds_truth()
    with pytest.raises(InputError, match=r"shapes \[12, 6\] and \[12, 12\], expected .* and \[models\]"):
        truth((values, numbers), 24, "loo")
    with pytest.raises(InputError, match="choose lds or loo"):
        truth((values, numbers), 24, "auc")
    with pytest.raises(InputError, match="give as many `rows`"):
        truth((values, numbers), 20)
    with pytest.raises(InputError, match="a row twice"):
        truth((values, numbers * 0), 24)
    with pytest.raises(InputError, match=r"`row_ids` has 1 names, expected 24"):
        truth((values, numbers), 24, row_ids=["a"])
