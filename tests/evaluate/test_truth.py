from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from gradfn.errors import InputError
from gradfn.evaluate import truth as module
from gradfn.evaluate.retraining import Retraining, model_seed
from gradfn.evaluate.subsets import random_subsets
from gradfn.evaluate.truth import Truth, open_truth, retrain
from gradfn.model.losses import model_loss
from gradfn.runs.shards import Shard, join_shards
from gradfn.train import Trainer, Training, initial_params, train

TRAINING = Training(epochs=2, batch_size=3, learning_rate=0.05, optimizer="adam")
NET = nn.Linear(4, 3).double()


def make_net():
    return nn.Linear(4, 3).double()


def rows_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(4, generator=generator).double(), "y": torch.randint(3, (), generator=generator)}
        for _ in range(count)
    ]


ROWS, QUERIES = rows_of(12, 0), rows_of(5, 1)


def loss(params, example):
    return F.cross_entropy(functional_call(NET, params, (example["x"],)), example["y"])


def margin(params, example):
    return -functional_call(NET, params, (example["x"],))[example["y"]]


def made(run, *, settings=None, shard=None, progress=None, **changes):
    given = {"query_loss": margin, "seeds": 2, "seed": 3, **changes}
    subsets, training = given.pop("subsets", random_subsets(12, 4)), given.pop("training", TRAINING)
    retraining = Retraining(make_net, loss, training, subsets, **given)
    return retrain(run, retraining, ROWS, QUERIES, settings=settings, shard=shard, progress=progress)


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("subsets", "numbers", "seeds", "losses", "train_losses", "diverged")
    )


def test_the_truth_is_the_query_loss_of_each_retrained_model(tmp_path):
    result = made(tmp_path)
    masks = random_subsets(12, 4)
    assert result.numbers.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for m in range(8):
        seed = model_seed(3, m % 2)
        one = train(make_net, loss, ROWS, masks[m // 2 : m // 2 + 1], [seed], TRAINING)
        params = {name: value[0] for name, value in one.params.items()}
        wanted = torch.stack([margin(params, query) for query in QUERIES])
        torch.testing.assert_close(result.losses[m], wanted)
        torch.testing.assert_close(result.train_losses[m], one.losses[0])
        assert result.seeds[m] == seed
        assert torch.equal(result.subsets[m], masks[m // 2])
    chosen, targets = result.targets()
    assert torch.equal(chosen, masks)
    torch.testing.assert_close(targets, result.losses.reshape(4, 2, 5).mean(1))


def rival(params, example):
    """Minus the margin: the best logit of the other classes, less that of the right one."""
    logits = functional_call(NET, params, (example["x"],))
    others = torch.where(torch.arange(3) == example["y"], -torch.inf, logits)
    return others.max() - logits[example["y"]]


def test_margins_are_those_of_each_retrained_model_and_their_means(tmp_path):
    result = made(tmp_path, margin_loss=rival)
    expected = torch.zeros(8, 5).double()
    for m in range(8):
        seed = model_seed(3, m % 2)
        one = train(make_net, loss, ROWS, random_subsets(12, 4)[m // 2 : m // 2 + 1], [seed], TRAINING)
        for number, query in enumerate(QUERIES):
            z = (one.params["weight"][0] @ query["x"] + one.params["bias"][0]).tolist()
            y = int(query["y"])
            expected[m, number] = z[y] - max(other for v, other in enumerate(z) if v != y)
    torch.testing.assert_close(result.margins, expected)
    torch.testing.assert_close(result.mean_margins(), expected.reshape(4, 2, 5).mean(1))
    torch.testing.assert_close(open_truth(tmp_path).margins, expected)
    plain = made(tmp_path / "plain")
    assert (plain.margins, plain.mean_margins()) == (None, None)
    assert torch.equal(plain.losses, result.losses)


class Classifier(nn.Module):
    """What `model_loss` takes: a model whose output has logits."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))


@pytest.mark.parametrize("how", [
    {}, {"criterion": "log_odds"}, {"label_smoothing": 0.1}, {"task": "image_classification"},
])  # fmt: skip
def test_a_classifier_has_margins_whatever_its_loss_and_weights(tmp_path, how):
    net = Classifier().double()
    given = model_loss(net, **{"task": "classification", **how})
    rows = [{"x": row["x"], "labels": row["y"]} for row in ROWS]
    asked = [{**row, "weight": torch.tensor(-2.0).double()} for row in rows[:5]]
    start = {name: p.detach() for name, p in net.named_parameters()}
    subsets = random_subsets(12, 3, leave_out=1)
    result = retrain(tmp_path, Retraining(start, given, TRAINING, subsets), rows, asked)
    trained = train(start, given, rows, subsets, [0, 0, 0], TRAINING)
    for m in range(3):
        net.load_state_dict({name: value[m] for name, value in trained.params.items()})
        for number, row in enumerate(rows[:5]):
            z, y = net(row["x"]).logits.detach().tolist(), int(row["labels"])
            margin = z[y] - max(other for v, other in enumerate(z) if v != y)
            assert result.margins[m, number].item() == pytest.approx(margin)


def test_it_is_read_as_it_was_written(tmp_path):
    result = made(tmp_path, settings={"subsets": {"fraction": 0.5}})
    again = open_truth(tmp_path)
    assert same(result, again)
    assert again.row_ids == [str(row) for row in range(12)]
    assert again.query_ids == [str(row) for row in range(5)]
    assert again.settings["subsets"]["fraction"] == 0.5
    assert again.settings["training"] == {**TRAINING.settings(), "betas": [0.9, 0.999]}
    assert again.settings["init"]["kind"] == "random"
    assert again.looped == ""


def test_seeds_of_models_do_not_depend_on_how_many_there_are(tmp_path):
    few = made(tmp_path / "few", seeds=1, subsets=random_subsets(12, 3))
    many = made(tmp_path / "many", seeds=3, subsets=random_subsets(12, 5))
    assert torch.equal(few.seeds, many.seeds[::3][:3])
    torch.testing.assert_close(few.losses, many.losses[::3][:3])


def test_independent_seeds_are_one_a_model_whatever_the_subsets(tmp_path):
    few = made(tmp_path / "few", seeds=2, subsets=random_subsets(12, 3), seeding="independent")
    many = made(tmp_path / "many", seeds=3, subsets=random_subsets(12, 5), seeding="independent")
    assert (few.seeding, few.replicates, many.replicates) == ("independent", 2, 3)
    assert len(many.seeds.unique()) == 15
    assert torch.equal(few.seeds, many.seeds.reshape(5, 3)[:3, :2].flatten())
    for m, seed in enumerate(few.seeds.tolist()):
        assert seed == model_seed(3, m % 2, subset=m // 2)
        one = train(make_net, loss, ROWS, few.subsets[m : m + 1], [seed], TRAINING)
        params = {name: value[0] for name, value in one.params.items()}
        wanted = torch.stack([margin(params, query) for query in QUERIES])
        torch.testing.assert_close(few.losses[m], wanted)


def test_the_seeding_is_recorded_and_another_is_refused_in_one_run(tmp_path):
    shared = made(tmp_path)
    assert (shared.seeding, shared.settings["seeding"]) == ("shared", "shared")
    with pytest.raises(InputError, match="seeding"):
        made(tmp_path, seeding="independent")


def test_a_run_that_was_killed_resumes(tmp_path, monkeypatch):
    whole = made(tmp_path / "whole", chunk=2)
    real, seen = Trainer.train, []

    def dying(trainer, masks, seeds, **options):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(seeds))
        return real(trainer, masks, seeds, **options)

    monkeypatch.setattr(Trainer, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "run", chunk=2)
    monkeypatch.undo()
    with pytest.raises(InputError, match="unfinished"):
        open_truth(tmp_path / "run")
    done = []
    resumed = made(tmp_path / "run", chunk=2, progress=done.append)
    assert same(resumed, whole)
    assert done[0] == sum(done[1:]) == 2 * 6 * 4


def test_shards_join_to_the_whole(tmp_path):
    whole = made(tmp_path / "whole")
    parts = [made(tmp_path / "run", shard=Shard(number, 3)) for number in (1, 2, 3)]
    assert sum(len(part.seeds) for part in parts) == 8
    join_shards(tmp_path / "run", "truth")
    joined = open_truth(tmp_path / "run")
    torch.testing.assert_close(joined.losses, whole.losses)
    assert torch.equal(joined.seeds, whole.seeds)


def test_models_that_diverge_are_counted_and_left_out_of_means(tmp_path):
    data = [{"x": torch.tensor([1.0 if row < 5 else 1e30])} for row in range(6)]
    subsets = torch.ones(3, 6, dtype=torch.bool)
    subsets[0, 5] = subsets[2, 5] = False

    def square(params, example):
        return (params["w"] * example["x"] - 1).square().sum()

    training = Training(2, 2, 0.1, "sgd")
    retraining = Retraining({"w": torch.ones(1)}, square, training, subsets, margin_loss=square)
    result = retrain(tmp_path, retraining, data, data[:2])
    assert result.diverged.tolist() == [False, True, False]
    for values in (result.losses, result.margins):
        assert values.isnan().all(1).tolist() == [False, True, False]
    chosen, targets = result.targets()
    assert torch.equal(chosen, subsets[[0, 2]])
    assert targets.isfinite().all()
    assert torch.equal(result.mean_margins(), -targets)
    assert result.settings["init"]["kind"] == "given"


def truth_of(diverged, subsets=4, seeds=3, key=0):
    """Losses `f(subset) + g(seed)`, of which some models diverged."""
    generator = torch.Generator().manual_seed(key)
    numbers, replicates = torch.arange(subsets).repeat_interleave(seeds), torch.arange(seeds).repeat(subsets)
    of_subset, of_seed = (torch.randn(n, 2, generator=generator).double() for n in (subsets, seeds))
    lost = torch.isin(torch.arange(len(numbers)), torch.tensor(diverged, dtype=torch.int64))
    losses = torch.where(lost[:, None], torch.nan, of_subset[numbers] + 5 * of_seed[replicates])
    truth = Truth(torch.eye(subsets).bool()[numbers], numbers, replicates + 7000, losses,
                  torch.zeros(len(numbers)).double(), lost, [], [], {}, margins=-losses)  # fmt: skip
    return truth, of_subset


@pytest.mark.parametrize(("diverged", "subsets", "seeds"), [
    ([], [0, 1, 2, 3], [0, 1, 2]),
    ([4], [0, 2, 3], [0, 1, 2]),  # a subset less keeps 9 models, a seed less 8
    ([1, 4], [0, 1, 2, 3], [0, 2]),  # two subsets less are too few
    ([0, 1, 2, 4], [1, 2, 3], [0, 2]),  # nothing is left of the first
    ([0, 1, 2], [1, 2, 3], [0, 1, 2]),
])  # fmt: skip
def test_means_are_over_the_same_seeds_in_every_subset(diverged, subsets, seeds):
    truth, of_subset = truth_of(diverged)
    kept = truth.of_models(truth.averaged())
    assert kept.numbers.tolist() == [n for n in subsets for _ in seeds]
    assert kept.seeds.tolist() == [7000 + seed for seed in seeds] * len(subsets)
    chosen, targets = truth.targets()
    assert torch.equal(chosen, torch.eye(4).bool()[subsets])
    # What the seeds add is one number a query.
    added = targets - of_subset[subsets]
    torch.testing.assert_close(added, added[:1].expand_as(added))
    assert torch.equal(truth.mean_margins(), -targets)


def test_a_seed_that_diverges_often_is_left_out_of_all_subsets():
    truth, _ = truth_of([*range(1, 40, 2)][:14], subsets=20, seeds=2)
    kept = truth.of_models(truth.averaged())
    assert (len(kept.numbers), kept.seeds.unique().tolist()) == (20, [7000])


def test_losses_of_many_queries_are_those_of_each(tmp_path, monkeypatch):
    wanted = made(tmp_path / "all").losses
    seen = []
    real = module.query_losses

    def in_pieces(params, losses, table, batch_size):
        seen.append(len(table))
        return real(params, losses, table, 2)

    monkeypatch.setattr(module, "query_losses", in_pieces)
    torch.testing.assert_close(made(tmp_path / "pieces").losses, wanted)
    assert seen


def test_other_settings_are_refused_in_one_run(tmp_path):
    made(tmp_path)
    with pytest.raises(InputError, match=r"training\.learning_rate"):
        made(tmp_path, training=Training(2, 3, 0.1, "adam"))
    with pytest.raises(InputError, match=r"subsets\.digest"):
        made(tmp_path, subsets=random_subsets(12, 4, seed=5))


@pytest.mark.parametrize(("changes", "says"), [
    ({"subsets": torch.zeros(3, 12, dtype=torch.bool)}, "subset 0 has no rows"),
    ({"subsets": torch.ones(3, 11, dtype=torch.bool)}, "of 11 rows"),
    ({"training": Training(1, 7, 0.1)}, "a batch of 7 is larger than the smallest subset, of 6 rows"),
    ({"seeds": 0}, "1 to 999 seeds"), ({"chunk": 0}, "chunk must be 1 or more"),
    ({"chunk": -1}, "chunk must be 1 or more"),
])  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        made(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_models_differ_in_their_seed():
    a, b = (initial_params(make_net, model_seed(0, replicate))["weight"] for replicate in (0, 1))
    assert not torch.equal(a, b)


def test_subsets_without_a_class_are_refused_before_anything_is_written(tmp_path):
    rows = [{"x": row["x"], "labels": torch.tensor(int(number == 4))} for number, row in enumerate(ROWS)]

    def labelled(params, example):
        return F.cross_entropy(functional_call(NET, params, (example["x"],)), example["labels"])

    subsets = torch.ones(3, 12, dtype=torch.bool)
    subsets[1, 4] = False
    with pytest.raises(InputError, match="subset 1 leaves class 1 out"):
        retrain(tmp_path / "run", Retraining(make_net, labelled, TRAINING, subsets), rows, rows)
    assert not (tmp_path / "run").exists()


def test_subsets_of_other_rows_are_refused_where_there_are_classes(tmp_path):
    rows = [{"x": row["x"], "labels": row["y"]} for row in ROWS]

    def labelled(params, example):
        return F.cross_entropy(functional_call(NET, params, (example["x"],)), example["labels"])

    subsets = torch.ones(3, 11, dtype=torch.bool)
    with pytest.raises(InputError, match="of 11 rows"):
        retrain(tmp_path / "run", Retraining(make_net, labelled, TRAINING, subsets), rows, rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("masks", ["cpu", "cuda"])
def test_the_truth_of_classes_on_cuda_is_that_on_the_cpu(tmp_path, masks):
    rows = [{"x": row["x"], "labels": row["y"]} for row in ROWS]

    def on(device):
        net = nn.Linear(4, 3).double().to(device)
        start = {name: torch.full_like(value, 0.1) for name, value in net.named_parameters()}

        def labelled(params, example):
            return F.cross_entropy(functional_call(net, params, (example["x"],)), example["labels"])

        subsets = random_subsets(12, 3, leave_out=1).to(masks)
        return retrain(tmp_path / device, Retraining(start, labelled, TRAINING, subsets), rows, rows[:5])

    torch.testing.assert_close(on("cuda").losses, on("cpu").losses)
