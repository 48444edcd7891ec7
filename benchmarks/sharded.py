"""The peak memory of processes that build a store, with whole models and with one that they hold together.

    python benchmarks/sharded.py --processes 1 2 4

The model is a Llama of 325 million random parameters in float32, the rows are eight of the example's corpus.
Memory is the largest resident set of a process, less that of one that only imports gradfn and transformers.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gradfn.example import CORPUS, MODEL

WATCHED = """
import atexit, os, resource, sys
import transformers.models.llama.modeling_llama, gradfn.cli.build, gradfn.cli.together
folder = sys.argv.pop(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
out = folder + "/peak-" + os.environ.get("RANK", "0")
atexit.register(lambda: open(out, "w").write(str(peak() - before)))
from gradfn.cli import main
main()
"""


def make(folder: Path) -> float:
    """A model with the tokenizer of the example; returns the MiB of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24,
                         num_attention_heads=16, bos_token_id=0, eos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model", max_shard_size="300MB")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20


def measure(folder: Path, count: int) -> tuple[float, float]:
    """The peak of the process that takes most, in MiB, and the seconds that all take."""
    (folder / "watched.py").write_text(WATCHED)
    start = [sys.executable]
    if count > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
    asked = [str(folder / "watched.py"), str(folder), "build", str(folder / f"run-{count}"), "--model",
             str(folder / "model"), "--dataset", str(CORPUS), "--split", "train[:8]", "--quiet"]  # fmt: skip
    begin = time.perf_counter()
    subprocess.run(
        [*start, *asked, *["--fsdp"] * (count > 1)], check=True, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    peaks = [float(path.read_text()) for path in folder.glob("peak-*")]
    for path in folder.glob("peak-*"):
        path.unlink()
    assert len(peaks) == count
    return max(peaks), time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    counts = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as name:
        weights = make(Path(name))
        print(f"weights: {weights:,.0f} MiB\n")
        print("| processes | peak of one, MiB | seconds |\n|---:|---:|---:|")
        for count in counts:
            peak, seconds = measure(Path(name), count)
            print(f"| {count} | {peak:,.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
