"""A model that processes hold together: what each makes of its rows is what a whole model makes of them."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from alone import alone
from tiny import make_model, mostly_slow

import gradfn as gf
from gradfn.model.sharded import BACKWARD, END, FORWARD, GATHER, WAIT, Turns

WORKER = Path(__file__).parents[1] / "sharded_processes.py"


@pytest.mark.parametrize("count", mostly_slow([2, 3], 2))
def test_rows_memory_and_verification(count, tmp_path):
    make_model().save_pretrained(tmp_path)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone",
            str(WORKER), str(tmp_path)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count(f"of {count} is done") == count


def test_blocks_compute_again_what_they_dropped_until_the_backward_pass():
    rows = [{"input_ids": torch.arange(1, 9)}]
    with alone():
        plain = make_model().double()
        model = gf.model.shard_model(copy.deepcopy(plain).requires_grad_(False))
        calls = []
        model.model.layers[1].mlp.act_fn.register_forward_pre_hook(lambda *_: calls.append(1))
        with gf.model.in_turns(model):
            loss = gf.causal_lm_loss(model)
            gf.collect(model, rows, loss=loss)  # which verifies the probes
            calls.clear()
            got = gf.collect(model, rows, loss=loss)
    want = gf.collect(plain, rows)
    assert len(calls) == 2
    assert all(torch.equal(got[name], want[name]) for name in want)


class Played(Turns):
    """Turns in which the others want what is written here, one after the other."""

    def __init__(self, others):
        super().__init__()
        self.others, self.done = list(others), []

    def _agree(self, turn):
        return min(turn, self.others.pop(0))

    def _idle(self, turn):
        self.done.append(turn)

    def _sorted(self):
        self.done.append(GATHER)
        return []


@pytest.mark.parametrize(
    ("wanted", "others", "done"),
    [
        (FORWARD, [BACKWARD], []),
        (BACKWARD, [FORWARD, GATHER], [FORWARD]),
        (WAIT, [BACKWARD, BACKWARD, GATHER, END], [BACKWARD, BACKWARD, GATHER]),
        (WAIT, [WAIT], []),
        (END, [WAIT, FORWARD, WAIT, END], [FORWARD]),
    ],
)
def test_a_process_does_what_the_others_need_until_it_is_its_turn(wanted, others, done):
    turns = Played(others)
    turns.take(wanted)
    assert (turns.done, turns.others) == (done, [])


def test_an_idle_pass_is_seen_by_nobody_and_leaves_nothing():
    with alone():
        model = gf.model.shard_model(make_model().double().eval())
        seen = []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
        turns = Turns()
        undo = turns.attach(model)
        with gf.tap(model) as tapped:
            turns._idle(BACKWARD)
            assert seen
            with pytest.raises(gf.InputError, match="no forward pass of the tapped model"):
                tapped.blocks  # noqa: B018
        assert all(parameter.grad is None for parameter in model.parameters())
        undo()
        assert gf.model.sharded.turns_of(model) is None
        assert not torch.is_inference_mode_enabled()
