"""What recording the rows of a training costs: a Trainer's steps plain and recorded, in turn, in one process.

    python benchmarks/recording.py [--recorder gradfn|bergson] [--width 256] [--rounds 5]

Each round trains the same small GPT-2 for some steps plain and recorded (16 x 16 numbers a block),
and takes the time of each step but the first two. Given are the medians over all steps, their ratio, and the
memory that the process had at most before and after the first recorded round. bergson is its
`GradientCollectorCallback`, run by the Python of an environment that has it.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

STEPS, BATCH, TOKENS = 12, 8, 128


class Clock(TrainerCallback):
    """The seconds of every step."""

    def __init__(self):
        self.seconds, self.last = [], time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def make_trainer(width, folder):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=2048, n_positions=TOKENS, n_embd=width, n_layer=6, n_head=4)
    )
    ids = torch.randint(0, 2048, (STEPS * BATCH, TOKENS)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=BATCH, num_train_epochs=1, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_strategy="no", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return Trainer(model, args, train_dataset=rows)


def record(trainer, recorder, folder):
    """The trainer, recorded."""
    if recorder == "gradfn":
        import gradfn as gf

        gf.train.record_trainer(trainer, folder / "run", transform=gf.project(16))
        return trainer
    from bergson.huggingface import GradientCollectorCallback, prepare_for_gradient_collection

    trainer.add_callback(
        GradientCollectorCallback(folder / "run", projection_dim=16, use_optimizer_state=False)
    )
    return prepare_for_gradient_collection(trainer)


def step_seconds(width, recorder):
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(width, Path(folder))
        clock = Clock()
        if recorder:
            trainer = record(trainer, recorder, Path(folder))
        trainer.add_callback(clock)  # after the recorder, whose work it counts
        trainer.train()
    return clock.seconds[2:]


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--recorder", choices=("gradfn", "bergson"), default="gradfn")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    plain, recorded, memory = [], [], []
    for _ in range(given.rounds):
        plain += step_seconds(given.width, None)
        memory.append(peak_mib())
        recorded += step_seconds(given.width, given.recorder)
        memory.append(peak_mib())
    a, b = (1e3 * statistics.median(seconds) for seconds in (plain, recorded))
    print(f"plain {a:.1f} ms, {given.recorder} {b:.1f} ms a step, ratio {b / a:.3f}")
    print(f"peak memory {memory[0]:.0f} MiB, {memory[1]:.0f} MiB with {given.recorder}")


if __name__ == "__main__":
    main()
