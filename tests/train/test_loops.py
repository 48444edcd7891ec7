"""Loops of other libraries, and several processes, record what a plain loop would."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorded import built, loss_of, network, read, rows_of_numbers

import gradfn as gf
from gradfn.runs import merge_run
from gradfn.train import recording

pytestmark = pytest.mark.slow


def loader(data):
    columns = [torch.arange(len(data)), *(torch.stack([row[key] for row in data]) for key in "xy")]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*columns), 4, shuffle=True)


def assert_first_step(run, expected):
    found = read(run)
    rows = found["visits/row"][found["visits/step"] == 0]
    assert len(rows) == 4
    for name in ("gradients/0", "gradients/3"):
        assert np.allclose(found[name][: len(rows)], expected[name][rows], atol=1e-5)
    assert sorted(found["visits/row"][found["visits/epoch"] == 1].tolist()) == [*range(13)]


def test_a_loop_of_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    net, data = network(), rows_of_numbers()
    expected = built(tmp_path, net, data, gf.project(2), loss=loss_of(net))
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net, optimizer, batches = accelerator.prepare(net, optimizer, loader(data))
    with recording(net, tmp_path / "run", transform=gf.project(2)) as rec:
        for epoch in range(2):
            for rows, x, y in batches:
                losses = rec.loss(F.cross_entropy(net(x), y, reduction="none"), rows)
                accelerator.backward(losses.mean())
                optimizer.step()
                optimizer.zero_grad()
                rec.step(epoch=epoch)
    assert_first_step(tmp_path / "run", expected)


def test_a_module_of_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, number):
            rows, x, y = batch
            return self.rec.loss(F.cross_entropy(self.net(x), y, reduction="none"), rows).mean()

        def on_train_batch_end(self, *_):
            self.rec.step(epoch=self.current_epoch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    data, module = rows_of_numbers(), Classifier(network())
    expected = built(tmp_path, module.net, data, gf.project(2), loss=loss_of(module.net))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        fit = lightning.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        with recording(module.net, tmp_path / "run", transform=gf.project(2)) as module.rec:
            fit.fit(module, loader(data))
    assert_first_step(tmp_path / "run", expected)


def test_two_processes_record_what_one_does(tmp_path):
    script = Path(__file__).parents[1] / "two_processes.py"

    def start(run, size, **more):
        command = [sys.executable, str(script), str(tmp_path / run), str(size)]
        return subprocess.Popen(command, env={**os.environ, **more}, cwd=tmp_path)

    alone = start("one", 4)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29631",
              "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    processes = [alone, *(start("two", 2, RANK=str(n), LOCAL_RANK=str(n), **shared) for n in range(2))]
    assert [process.wait(timeout=500) for process in processes] == [0, 0, 0]
    merge_run(tmp_path / "two")
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert two["visits/duplicate"].tolist() == [False] * 10 + [True] * 2
    first = two["visits/step"] < 2  # of the third step, two processes fill the batches
    for found in (one, two):
        order = np.lexsort((found["visits/row"], found["visits/step"]))
        found.update({name: values[order] for name, values in found.items()})
    for name in ("visits/row", "visits/step", "rows/loss", *(n for n in one if "gradients/" in n)):
        assert np.allclose(one[name][:8], two[name][first], rtol=1e-4, atol=1e-5), name
