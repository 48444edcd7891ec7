"""What values of rows cost during training: a step with them over the same step without, as a Markdown table.

    python benchmarks/during.py --models neox-4k neox-50k gpt2 --repeats 5

Models have random weights: `neox-4k` and `neox-50k` (GPT-NeoX, 6 layers x width 128, vocabularies of 4,096
and 50,304) and `gpt2` (GPT-2 small). A step is forward, backward and AdamW on 16 rows of 256 random tokens,
the mean of their losses; 4 other rows of 256 tokens are the validation. Sides, each a whole step:

* `plain`: the step.
* `queries`: the step, and the gradients of the 4 validation losses one by one, which any method pays.
* `dots`: `queries`, and the inner products of every row with the 4 gradients, in the backward pass.
* `before`: `dots` with the directions of kind "before", the first-order values that a single pass can have.
* `shapley`: `queries`, and Aumann-Shapley values from the factors that the backward pass leaves.
* `record`: the step, and every row's gradient, projected to 16 x 16 a block, into a store (the default view).

Values are of all parameters, LM head and embedding too (`--view default`: of the weight matrices alone). The
sides take turns inside each repeat, in one process. The table gives medians; "over plain" is of processor
time, which a busy machine disturbs less. Peak memory is that of a process of its own for each side, over
what is resident after a plain step.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F

import gradfn as gf
from gradfn.train import optimizer_state, recording, step_direction, values

ROWS, TOKENS, QUERIES = 16, 256, 4
MODELS = ("neox-4k", "neox-50k", "gpt2")


def make_model(name):
    from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(use_cache=False)).eval()
    config = GPTNeoXConfig(
        vocab_size=4096 if name == "neox-4k" else 50304, hidden_size=128, num_hidden_layers=6,
        num_attention_heads=4, intermediate_size=512, max_position_embeddings=TOKENS, use_cache=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


class Task:
    """A model, its optimizer after one step, a batch and validation rows."""

    def __init__(self, name, view):
        self.model, self.view = make_model(name), view
        vocabulary = self.model.config.vocab_size
        self.batch = torch.randint(vocabulary, (ROWS, TOKENS))
        self.queries = torch.randint(vocabulary, (QUERIES, TOKENS))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.stack, self.recorder = ExitStack(), None
        self.plain()

    def loss(self, rows):
        logits = self.model(input_ids=rows).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def backward(self):
        self.optimizer.zero_grad()
        self.loss(self.batch).backward()

    def asked(self, v):
        return v.query_grads(*(lambda q=q: self.loss(self.queries[q : q + 1]) for q in range(QUERIES)))

    def plain(self):
        self.backward()
        self.optimizer.step()

    def query_gradients(self):
        with values(self.model, view=self.view) as v:
            self.asked(v)
        self.plain()

    def dots(self, before=False):
        with values(self.model, view=self.view) as v:
            directions = self.asked(v)
            if before:
                state = optimizer_state(self.model, self.optimizer)
                directions = step_direction(*state, None, directions, kind="before")
            v.aim(directions)
            self.backward()
            v.dots()
        self.optimizer.step()

    def shapley(self):
        with values(self.model, view=self.view) as v:
            queries = self.asked(v)
            self.backward()
            v.step(*optimizer_state(self.model, self.optimizer), queries)
        self.optimizer.step()

    def record(self):
        if self.recorder is None:  # opened once, and closed with the process
            run = self.stack.enter_context(tempfile.TemporaryDirectory())
            self.recorder = self.stack.enter_context(recording(self.model, run, transform=gf.project(16)))
            self.stack.enter_context(self.recorder.tapped.seeing(False))
        self.optimizer.zero_grad()
        with self.recorder.tapped.seeing(True):
            logits = self.model(input_ids=self.batch).logits[:, :-1].flatten(0, 1)
            losses = F.cross_entropy(logits, self.batch[:, 1:].flatten(), reduction="none")
            self.recorder.loss(losses.view(ROWS, -1).mean(1), range(ROWS)).mean().backward()
        self.optimizer.step()
        self.recorder.step()


SIDES = {
    "plain": Task.plain,
    "queries": Task.query_gradients,
    "dots": Task.dots,
    "before": lambda task: task.dots(before=True),
    "shapley": Task.shapley,
    "record": Task.record,
}


def times(task, sides, repeats):
    """Seconds of each side, which take turns, after a first turn that warms up."""
    found = {side: [] for side in sides}
    for _ in range(repeats + 1):
        for side in sides:
            start, cpu = time.perf_counter(), time.process_time()
            SIDES[side](task)
            found[side].append((time.perf_counter() - start, time.process_time() - cpu))
    return {side: taken[1:] for side, taken in found.items()}


def high_water():
    """The most memory that was resident, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak(model, side, view):
    """MiB that a side adds to what is resident, in a process of its own."""
    command = [sys.executable, __file__, "--models", model, "--sides", side, "--view", view, "--peak"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["neox-4k"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    parser.add_argument("--view", choices=("all", "default"), default="all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peak", action="store_true", help="print the peak of one side in MiB, and nothing else"
    )
    given = parser.parse_args()
    view = gf.View() if given.view == "default" else None
    if given.peak:
        task = Task(given.models[0], view)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = high_water()
        SIDES[given.sides[0]](task)
        task.stack.close()
        print((high_water() - before) // 1024)
        return
    print("| model | side | s a step | processor s | over plain | peak MiB |\n|---|---|---:|---:|---:|---:|")
    for name in given.models:
        peaks = {side: peak(name, side, given.view) for side in given.sides}  # while this process is small
        task = Task(name, view)
        found = times(task, given.sides, given.repeats)
        task.stack.close()
        base = statistics.median(cpu for _, cpu in found[given.sides[0]])
        for side, taken in found.items():
            wall, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
            print(
                f"| {name} | {side} | {wall:.2f} | {cpu:.2f} | {cpu / base:.2f} | {peaks[side]} |", flush=True
            )


if __name__ == "__main__":
    main()
