"""quanda's metrics of gradfn's explainer are those that are computed by hand from the same scores."""

import pytest
import torch
import torch.nn.functional as F
from bridged import imported
from torch.utils.data import TensorDataset

import gradfn as gf
from gradfn.testing.strategies import randomize

(quanda,) = imported("quanda")
pytestmark = pytest.mark.filterwarnings("ignore")
Explainer = gf.bridges.quanda.Explainer


@pytest.fixture
def explained(problem):
    explainer = Explainer(problem.net, problem.train, method="ekfac")
    return explainer, explainer.explain(*problem.queries)


def test_explanations_are_scores_of_gradfn(problem, explained):
    explainer, scores = explained
    loss = gf.bridges.supervised.SupervisedLoss(problem.net, F.cross_entropy)
    rows, queries = map(gf.bridges.supervised.Rows, (problem.train, TensorDataset(*problem.queries)))
    expected = gf.score(problem.net, rows, queries, method="ekfac", loss=loss).matrix.T
    torch.testing.assert_close(scores, expected)
    assert isinstance(explainer, quanda.Explainer)
    assert issubclass(Explainer, quanda.Explainer)


def test_detection_of_classes(problem, explained):
    metric = quanda.metrics.downstream_eval.ClassDetectionMetric(problem.net, problem.train, s=3)
    metric.update(explained[1], problem.queries[1])
    best = gf.top_k([explained[1].T], 3).rows
    same = problem.train.tensors[1][best] == problem.queries[1][:, None]
    assert metric.compute()["score"] == pytest.approx(float(same.double().mean()))


def test_a_benchmark_takes_the_class(problem, explained, tmp_path):
    torch.save(problem.net.state_dict(), path := str(tmp_path / "net.pt"))
    benchmark = quanda.ClassDetection(
        model=problem.net, train_dataset=problem.train, eval_dataset=TensorDataset(*problem.queries),
        checkpoints=[path], checkpoints_load_func=quanda.utils.common.get_load_state_dict_func("cpu"), s=3,
    )  # fmt: skip
    with torch.no_grad():
        problem.net[0].weight.zero_()  # the checkpoint is loaded
    made = benchmark.evaluate(Explainer, {"method": "ekfac"}, batch_size=4)
    metric = quanda.metrics.downstream_eval.ClassDetectionMetric(problem.net, problem.train, s=3)
    metric.update(explained[1], problem.queries[1])
    assert made["score"] == pytest.approx(metric.compute()["score"])


def test_detection_of_wrong_labels(problem):
    """quanda makes the explainer itself, from the class; its ranking adds 1e-4 a row."""
    wrong = [0, 7, 11, 15]
    metric = quanda.metrics.downstream_eval.MislabelingDetectionMetric(
        problem.net, problem.train, wrong, explainer_cls=Explainer, expl_kwargs={"method": gf.grad_dot()}
    )
    suspicion = problem.gradients(*problem.train.tensors).square().sum(1)
    torch.testing.assert_close(metric.explainer.self_influence(), suspicion)
    found = [row in wrong for row in (suspicion + 1e-4 * torch.arange(24)).argsort(descending=True).tolist()]
    curve = torch.tensor(found).double().cumsum(0) / len(wrong)
    assert metric.compute()["score"] == pytest.approx(float(torch.trapezoid(curve)) / 24)


def test_shortcuts_and_mixed_datasets_are_average_precisions(problem, explained):
    marks = torch.zeros(24, dtype=torch.int64)
    marks[::6] = 1  # rows of class 0
    ours = sum(gf.evaluate.average_precision(row, marks) for row in explained[1]) / 6
    shortcut = quanda.metrics.downstream_eval.ShortcutDetectionMetric(
        problem.net, problem.train, marks.nonzero()[:, 0].tolist(), 0, filter_by_non_shortcut=False,
        filter_by_shortcut_pred=False,
    )  # fmt: skip
    shortcut.update(explained[1])
    assert shortcut.compute()["score"] == pytest.approx(ours, rel=1e-5)
    mixed = quanda.metrics.heuristics.MixedDatasetsMetric(
        problem.net, problem.train, marks, filter_by_prediction=False
    )
    mixed.update(explained[1])
    assert mixed.compute()["score"] == pytest.approx(ours, rel=1e-5)


def test_cardinality_of_the_best_rows(problem, explained):
    metric = quanda.metrics.heuristics.TopKCardinalityMetric(problem.net, problem.train, top_k=4)
    metric.update(explained[1])
    best = gf.top_k([explained[1].T], 4).rows
    assert metric.compute()["score"] == len(best.unique()) / best.numel()


def test_the_lds_is_gradfns(problem, explained):
    draw = torch.Generator().manual_seed(0)
    numbers = [torch.randperm(24, generator=draw)[:12].tolist() for _ in range(10)]
    logits = {model: torch.randn(6, 3, generator=draw).double() for model in range(10)}
    metric = quanda.metrics.ground_truth.LinearDatamodelingMetric(
        problem.net, problem.train, m=10, subset_ids=numbers, subset_ckpt_filenames=[""] * 10
    )
    metric.update(explained[1], problem.queries[1], problem.queries[0], subset_logits=logits)
    losses = torch.stack([
        gf.model.losses.token_losses(logits[model], problem.queries[1], "log_odds") for model in range(10)
    ])  # fmt: skip
    subsets = torch.zeros(10, 24).scatter_(1, torch.tensor(numbers), 1).bool()
    ours = gf.evaluate.lds(explained[1].T, subsets, losses)
    assert metric.compute()["score"] == pytest.approx(float(ours.mean()), abs=1e-5)


def test_a_model_whose_weights_are_drawn_anew(problem, explained, tmp_path):
    """quanda writes and reads the checkpoints itself."""
    torch.save(problem.net.state_dict(), path := str(tmp_path / "net.pt"))
    metric = quanda.metrics.heuristics.ModelRandomizationMetric(
        model=problem.net, train_dataset=problem.train, model_id="net", cache_dir=str(tmp_path),
        checkpoints=[path], explainer_cls=Explainer, expl_kwargs={"method": gf.grad_dot()},
    )  # fmt: skip
    metric.update(explained[1], *problem.queries)
    other = (
        problem.gradients(*problem.queries, metric.rand_model)
        @ problem.gradients(*problem.train.tensors, metric.rand_model).T
    )
    ours = gf.evaluate.correlation.correlation(explained[1].T, other.T, "spearman")
    assert metric.compute()["score"] == pytest.approx(float(ours.mean()), abs=1e-5)


def test_a_model_of_transformers_has_rows_that_are_mappings():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    model = randomize(BertForSequenceClassification(config), 0)
    ids = torch.randint(1, 20, (9, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    rows = [
        {"input_ids": ids[row], "attention_mask": mask[row], "labels": torch.tensor(row % 3), "idx": row}
        for row in range(9)
    ]
    explainer = Explainer(model, rows[:7], "text_classification", method=gf.grad_dot())
    found = explainer.explain({"input_ids": ids[7:], "attention_mask": mask[7:]}, torch.tensor([1, 2]))
    for row in rows:
        del row["idx"]
    expected = gf.score(model, rows[:7], rows[7:], method=gf.grad_dot()).matrix.T
    torch.testing.assert_close(found, expected)
    assert explainer.self_influence().shape == (7,)
