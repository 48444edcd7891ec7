import os
import signal
from copy import deepcopy
from math import ceil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded import ROWS, built, contents, loss_of, network, read, rows_of_numbers, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfn as gf
from gradfn.data import make_documents
from gradfn.errors import InputError, StorageError
from gradfn.hf.optimizer_state import second_moments
from gradfn.runs import merge_run
from gradfn.runs.shards import Shard, shard_run
from gradfn.store.growing import GrowingWriter
from gradfn.testing.strategies import randomize
from gradfn.train import record, recording


def assert_rows(found, expected, rows, tolerance=1e-5):
    """Recorded gradients are those that `build` has of the same rows."""
    blocks = [name for name in expected if name.startswith("gradients/")]
    assert blocks
    assert {name for name in found if name.startswith("gradients/")} == {*blocks}
    for name in blocks:
        scale = np.abs(expected[name]).max()
        assert np.abs(found[name][: len(rows)] - expected[name][rows]).max() <= tolerance * scale, name


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("transform", [None, gf.project(2), gf.chain(gf.project(2), gf.unit_normalize())])
def test_rows_of_the_first_step_are_those_of_build(tmp_path, accumulation, transform):
    net, data = network(), rows_of_numbers()
    expected = built(tmp_path, net, data, transform, loss=loss_of(net))
    with recording(net, tmp_path / "run", data, transform=transform) as rec:
        train(net, data, rec, accumulation=accumulation)
    found = read(tmp_path / "run")
    first = found["visits/row"][found["visits/step"] == 0]
    assert len(first) == 3 * accumulation
    assert_rows(found, expected, first)
    assert np.allclose(found["rows/loss"][: len(first)], expected["rows/loss"][first])
    assert found["rows/id"].tolist() == [str(row) for row in found["visits/row"]]
    assert found["visits/microstep"].max() == accumulation - 1
    windows = ceil(ceil(ROWS / 3) / accumulation)  # the last is ragged
    assert found["visits/step"].max() == 2 * windows - 1
    visits = [*zip(found["visits/row"].tolist(), found["visits/epoch"].tolist(), strict=True)]
    assert sorted(visits) == [(row, epoch) for row in range(ROWS) for epoch in range(2)]
    assert not found["visits/duplicate"].any()
    assert not found["visits/skipped"].any()


def test_later_rows_are_at_the_parameters_before_their_step(tmp_path):
    net, data, states = network(), rows_of_numbers(), []
    with recording(net, tmp_path / "run") as rec:
        train(net, data, rec, after=lambda step, _: states.append(deepcopy(net.state_dict())))
    found = read(tmp_path / "run")
    net.load_state_dict(states[3])
    expected = built(tmp_path, net, data, loss=loss_of(net))
    these = {name: array[found["visits/step"] == 4] for name, array in found.items()}
    assert_rows(these, expected, these["visits/row"])


def test_training_is_the_same_to_the_bit(tmp_path):
    data, plain, watched = rows_of_numbers(), network(), network()
    plain[2].p = watched[2].p = 0.3  # dropout draws the same numbers
    torch.manual_seed(5)
    train(plain, data, accumulation=2)
    torch.manual_seed(5)
    with recording(watched, tmp_path, transform=gf.project(2)) as rec:
        train(watched, data, rec, accumulation=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert read(tmp_path, "visits/row").size == 2 * ROWS


def test_a_skipped_step_of_a_loss_scaler_is_marked(tmp_path):
    net, data = network(), rows_of_numbers(6)
    expected = built(tmp_path, net, data, loss=loss_of(net))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with recording(net, tmp_path / "run") as rec:
        for step, rows in enumerate([[0, 1], [2, 3], [4, 5]]):
            x, y = (torch.stack([data[row][key] for row in rows]) for key in "xy")
            losses = rec.loss(F.cross_entropy(net(x), y, reduction="none"), rows)
            bad = losses * torch.tensor([torch.inf, 1.0]) if step == 1 else losses
            scaler.scale(bad.mean()).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            rec.step(skipped=scaler.get_scale() < before)
            optimizer.zero_grad()
    found = read(tmp_path / "run")
    assert found["visits/skipped"].tolist() == [False, False, True, True, False, False]
    assert found["rows/zero"].tolist() == [False, False, True, True, False, False]
    there = ~found["visits/skipped"]
    assert_rows({n: a[there] for n, a in found.items()}, expected, found["visits/row"][there])


def test_rows_that_are_not_finite_are_marked_and_never_stored(tmp_path):
    net, data = network(), rows_of_numbers(4)
    data[2]["x"][0] = torch.nan
    with recording(net, tmp_path) as rec:
        train(net, data, rec, epochs=1, size=2, lr=0.0)
    found = read(tmp_path)
    assert found["visits/skipped"].tolist() == [row == 2 for row in found["visits/row"]]
    assert all(np.isfinite(a).all() for name, a in found.items() if name.startswith("gradients/"))


@pytest.mark.parametrize("dies", [2, 5, 7])
def test_killed_and_resumed_has_the_bytes_of_one_run(tmp_path, dies, monkeypatch):
    monkeypatch.setattr("gradfn.runs.visits.SEGMENT_STEPS", 2)
    data, saved = rows_of_numbers(), tmp_path / "checkpoint.pt"

    def run_to(folder, start=0, die=None):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if start:
            there = torch.load(saved)
            net.load_state_dict(there["net"])
            optimizer.load_state_dict(there["optimizer"])
        with recording(net, folder, data, start=start, settings={"seed": 3}) as rec:

            def after(step, optimizer):
                if step % 3 == 0:
                    rec.flush()
                    if die is not None:
                        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, saved)
                if step == die:
                    os.kill(os.getpid(), signal.SIGKILL)

            train(net, data, rec, start=start, optimizer=optimizer, after=after)

    run_to(tmp_path / "whole")
    if (child := os.fork()) == 0:
        try:
            run_to(tmp_path / "killed", die=dies)
        finally:
            os._exit(1)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    at = dies // 3 * 3
    if at == 0:
        with pytest.raises(InputError, match="give `overwrite=True` to replace them, resume from"):
            run_to(tmp_path / "killed")
        return
    run_to(tmp_path / "killed", start=at)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_rows_after_the_checkpoint_are_removed_and_gaps_refused(tmp_path, monkeypatch):
    data = rows_of_numbers()
    with recording(network(), tmp_path, data) as rec:
        train(rec.tapped.model, data, rec, epochs=1)
    with pytest.raises(InputError, match=r"the steps before 5, and this training resumes at step 7"):
        recording(network(), tmp_path, data, start=7).__enter__()
    with recording(network(), tmp_path, data, start=2) as rec:  # in the middle of a segment
        assert rec.log.writer.rows == 6
    assert read(tmp_path, "visits/step").tolist() == [0] * 3 + [1] * 3
    with pytest.raises(InputError, match=r"other settings \(seed is nothing there and 1 here\)"):
        recording(network(), tmp_path, data, start=2, settings={"seed": 1}).__enter__()
    with pytest.raises(InputError, match="other settings"):
        recording(network(), tmp_path, data[:5], start=2).__enter__()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("transform", [None, gf.project(2)])
def test_rows_are_divided_by_the_optimizers_own_state(tmp_path, when, transform):
    net, data, states, divisors = network(), rows_of_numbers(), [], [{}]
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, eps=1e-3)

    def after(step, optimizer):
        states.append(deepcopy(net.state_dict()))
        exp, t = optimizer.state[net[3].weight]["exp_avg_sq"], optimizer.state[net[3].weight]["step"]
        assert torch.allclose(
            second_moments(optimizer, net)["3"][:, :-1], (exp / (1 - 0.999**t)).sqrt() + 1e-3
        )
        divisors.append({name: D.clone() for name, D in second_moments(optimizer, net).items()})

    options = {"normalize": when, "optimizer": optimizer, "transform": transform}
    with recording(net, tmp_path / "run", **options) as rec:
        train(net, data, rec, optimizer=optimizer, after=after)
    found = read(tmp_path / "run")
    step = 3
    net.load_state_dict(states[step - 1])
    rows = found["visits/row"][found["visits/step"] == step].tolist()
    raw = gf.collect(net, [data[row] for row in rows], loss=loss_of(net))
    scaled = {name: G / divisors[step + (when == "after")][name] for name, G in raw.items()}
    expected = gf.chain(transform or gf.chain())(scaled)
    for name, G in expected.items():
        block = found[f"gradients/{name}"][found["visits/step"] == step]
        assert np.abs(block - G.numpy()).max() < 1e-5 * G.abs().max(), name
    first = found["visits/step"] == 0
    assert found["visits/scaled"][first].tolist() == [when == "after"] * int(first.sum())
    assert found["visits/scaled"][~first].all()


def test_queries_are_divided_by_a_state_that_is_given(tmp_path):
    net, data = network(), rows_of_numbers()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    with recording(net, tmp_path, normalize="before", optimizer=optimizer, transform=gf.project(2)) as rec:
        train(net, data, rec, optimizer=optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    scale = gf.hf.load_optimizer_state(tmp_path / "optimizer.pt", net)
    with pytest.raises(
        InputError, match=r"second moment that the optimizer had at each step.*give `normalize"
    ):
        gf.query(tmp_path, net, data[:2], loss=loss_of(net))
    scores = gf.query(tmp_path, net, data[:2], loss=loss_of(net), normalize=scale)
    queries = gf.collect(net, data[:2], gf.chain(scale, gf.project(2)), loss=loss_of(net))
    found = read(tmp_path)
    expected = sum(
        np.einsum("rij,qij->rq", found[f"gradients/{name}"], q.numpy()) for name, q in queries.items()
    )
    assert np.abs(scores.matrix.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    with recording(net, tmp_path / "plain") as rec:
        train(net, data, rec)
    with pytest.raises(InputError, match="leave out `normalize`"):
        gf.query(tmp_path / "plain", net, data[:2], loss=loss_of(net), normalize=scale)


def language_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return randomize(GPT2LMHeadModel(config), 0).float()


def documents():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 11, (length,), generator=generator).tolist() for length in (8, 3, 5, 6)]
    labels = [[-100, *row[1:]] if number % 2 else [-100] * 2 + row[2:] for number, row in enumerate(rows)]
    return make_documents(rows, labels, ids=["a", "b", "c", "d"])


def test_a_mean_over_tokens_is_undone(tmp_path):
    net, data = language_model(), documents()
    expected = built(tmp_path, net, data)
    batch = gf.data.collate([data[row] for row in range(4)])
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    with recording(net, tmp_path / "run", data) as rec:
        loss = net(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        (rec.loss(loss, range(4), counts=counts) * 64).backward()
        rec.step()
        loss = net(input_ids=batch["input_ids"], labels=batch["labels"]).loss * counts.sum() / 9.5
        rec.loss(loss, range(4), counts=counts, total=9.5).backward()
        rec.step()
    found = read(tmp_path / "run")
    assert_rows(found, expected, [0, 1, 2, 3] * 2, 1e-4)
    assert found["rows/id"].tolist() == ["a", "b", "c", "d"] * 2
    assert found["rows/length"].tolist() == [8, 3, 5, 6] * 2


def test_products_are_in_float32_under_autocast_and_checkpointing_changes_nothing(tmp_path):
    net, data = network(), rows_of_numbers()
    expected = built(tmp_path, net, data, gf.project(2), loss=loss_of(net))
    x, y = (torch.stack([row[key] for row in data]) for key in "xy")

    def step(name, autocast, call, **options):
        with recording(net, tmp_path / name, transform=gf.project(2), **options) as rec:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses = rec.loss(F.cross_entropy(call(x), y, reduction="none"), range(ROWS))
            losses.mean().backward()
            rec.step()
        return read(tmp_path / name)

    rows = [*range(ROWS)]
    assert_rows(step("amp", True, net), expected, rows, 2e-2)
    whole = step("plain", False, net)
    assert_rows(whole, expected, rows)
    again = step("saved", False, lambda x: checkpoint(net, x, use_reentrant=False))
    assert all((again[name] == whole[name]).all() for name in whole if name != "rows/text")
    half = step("half", False, net, dtype=torch.float16)
    assert half["gradients/0"].dtype == np.float16
    assert_rows(half, expected, rows, 1e-3)
    with pytest.raises(InputError, match="use_reentrant=False"):
        step("old", False, lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=True))


def test_float16_refuses_what_it_does_not_hold(tmp_path):
    net = network()
    with recording(net, tmp_path, dtype=torch.float16) as rec:
        rec.loss(net(torch.full((2, 5), 1e-3)).sum(1) * 1e6, [4, 9]).sum().backward()
        with pytest.raises(InputError, match=r"row 4 in 0 at step 0 is too large for float16: record with"):
            rec.step()


def test_a_failing_write_keeps_what_was_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("gradfn.runs.visits.SEGMENT_STEPS", 2)
    append, data = GrowingWriter.append, rows_of_numbers()

    def full(self, arrays):
        if self.rows >= 6:
            raise StorageError("the disk is full: free some space")
        append(self, arrays)

    monkeypatch.setattr(GrowingWriter, "append", full)
    net = network()
    with pytest.raises(StorageError, match="the disk is full"), recording(net, tmp_path) as rec:
        train(net, data, rec)
    assert rec.number == 4  # raised at the end of the step
    monkeypatch.setattr(GrowingWriter, "append", append)
    with recording(network(), tmp_path, start=2):
        pass
    assert read(tmp_path, "visits/step").tolist() == [0, 0, 0, 1, 1, 1]


def test_what_is_stopped_is_finished_and_marked(tmp_path):
    net, data = network(), rows_of_numbers()

    def after(step, _):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recording(net, tmp_path) as rec:
        train(net, data, rec, after=after)
    with gf.open_store(tmp_path) as store:
        assert store.rows == 6
        assert store.index_array("visits/end").tolist() == ["stopped"]


def test_bad_loops_are_refused_in_a_sentence(tmp_path):
    net, x = network(), torch.randn(2, 5)
    with recording(net, tmp_path / "a") as rec:
        with pytest.raises(InputError, match="another run is writing"):
            recording(network(), tmp_path / "a").__enter__()
        with pytest.raises(InputError, match="the step has no rows"):
            rec.step()
        with pytest.raises(InputError, match=r"expected the losses of 3 rows, or one number, got .* \[2\]"):
            rec.loss(net(x).sum(1), [0, 1, 2])
        with pytest.raises(InputError, match="has no gradient"), torch.no_grad():
            rec.loss(net(x).sum(1), [0, 1])
    with recording(net, tmp_path / "b") as rec:
        net(x).sum().backward()
        rec.loss(net(x).sum(1), [0, 1]).sum().backward()
        with pytest.raises(InputError, match="the forward passes had 4 rows, and `loss` was told of 2"):
            rec.step()
    with recording(net, tmp_path / "c") as rec:
        (rec.loss(net(x).sum(1), [0, 1]).sum() + net[3].weight.square().sum()).backward()
        with pytest.raises(InputError, match=r"differ by .*% from the gradient that they should add up to"):
            rec.step()
    with recording(net, tmp_path / "d", rows_of_numbers(2)) as rec:
        rec.loss(net(x).sum(1), [0, 2]).sum().backward()
        with pytest.raises(InputError, match="row 2 is none of the 2 rows of the data"):
            rec.step()


def test_bad_models_and_options_are_refused(tmp_path):
    compiled, wrapped = network(), network()
    compiled._compiled_call_impl = compiled._call_impl  # what `compiled.compile()` sets
    wrapped._orig_mod = network()  # what `torch.compile(wrapped)` has
    for model in (compiled, wrapped):
        with pytest.raises(InputError, match=r"train it without torch\.compile"):
            recording(model, tmp_path).__enter__()
    for options, says in (
        ({"normalize": "during"}, "no normalize 'during': choose none, before, after"),
        ({"normalize": "before"}, "give `optimizer` with normalize"),
        ({"dtype": torch.bfloat16}, "a store has float32 or float16, not torch.bfloat16"),
    ):
        with pytest.raises(InputError, match=says):
            recording(network(), tmp_path, **options).__enter__()
    assert not [*tmp_path.iterdir()]


def test_a_recorded_store_is_read_like_any_other(tmp_path):
    net, data, start = network(), rows_of_numbers(), network()
    with recording(net, tmp_path / "run", data, transform=gf.project(2)) as rec:
        train(net, data, rec)
    for model in (start, net):  # rows are of many steps: any model of this kind asks
        scores = gf.query(tmp_path / "run", model, data[:2], loss=loss_of(model))
        queries = gf.collect(model, data[:2], gf.project(2), loss=loss_of(model))
        found = read(tmp_path / "run")
        expected = sum(
            found[f"gradients/{name}"].reshape(2 * ROWS, -1) @ q.flatten(1).numpy().T
            for name, q in queries.items()
        )
        assert np.allclose(scores.matrix.numpy(), expected, atol=1e-5)
    assert scores.row_ids == found["rows/id"].tolist()
    other = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    with pytest.raises(
        InputError, match="the queries have no block 3: make rows and queries from the same layers"
    ):
        gf.query(tmp_path / "run", other, data[:2], loss=loss_of(other))


def test_shards_of_processes_join_in_the_order_of_the_steps(tmp_path, monkeypatch):
    net, data = network(), rows_of_numbers(4)
    for number, rows in ((1, [0, 1]), (2, [2, 3, 0])):
        net = network()
        monkeypatch.setattr(record, "_own_run", lambda run, n=number: shard_run(run, Shard(n, 2)))
        with recording(net, tmp_path, data) as rec:
            for row in rows:
                rec.loss(net(data[row]["x"][None]).sum(1), [row]).sum().backward()
                rec.step()
    for _ in range(2):  # may be repeated
        assert [joined.shards for joined in merge_run(tmp_path)] == [2]
        found = read(tmp_path)
        assert found["rows/id"].tolist() == ["0", "2", "1", "3", "0"]
        assert found["visits/step"].tolist() == [0, 0, 1, 1, 2]
        assert found["visits/duplicate"].tolist() == [False] * 4 + [True]
