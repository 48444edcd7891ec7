"""Collect projected per-example gradients: gradfn, its peer bergson, and the cost of the backward pass alone.

    python benchmarks/collect.py --bergson-python PEER/bin/python

Model: GPT-NeoX, 6 layers x width 128 (8 heads, MLP 512, context 2,048), random weights, float32, on the CPU.
Speed does not depend on the weights. Data: documents of 200 to 600 random tokens, about 75,000 in all,
written as text that a word-level tokenizer maps back to exactly these tokens (checked), so every side reads
the same rows. Batches hold 2,048 tokens, padding included, which is the most that bergson allows (the model's
context); every side cuts its own batches under this same budget.

What each side does:

* gradfn: `gf.collect(model, documents, gf.project(16, seed=0), token_batch_size=2048)`, the whole call, rows
  in memory.
* bergson: `bergson build --projection_dim 16 --include_bias --loss_reduction mean` in its own environment and
  process; the time is what the progress bar of its collection loop ends on. Inside the bar: making the
  batches, projection matrices at their first use, rows into a memory-mapped file. Outside: imports, model,
  tokenisation, the last flush. It freezes all weights but the embedding, whose gradient it computes and
  drops, and passes no attention mask, for padding is on the right. (Its defaults, no bias and summed losses,
  take the same time.)
* stock, activations: `model(input_ids, attention_mask, labels).loss.backward()` with all parameters frozen
  and the embedding's output requiring a gradient. No gradient of any weight and none per example: the cost
  that any method pays that runs the stock forward and backward.
* stock, all gradients: the same with every parameter requiring a gradient, dropped after every batch
  (training without an optimizer).

Both collectors give `[rows, 16, 16]` for each of the 24 linear layers of the transformer's body: `L G Rᵀ`,
where G is the gradient of one document's mean next-token loss with the bias as its last column, and L, R are
random signs over sqrt(16). (bergson's were checked against a batch-size-1 loop with its own L and R: equal to
1e-6.) The signs are each one's own, and so are the values. Neither takes the LM head's or the embedding's
weight into the rows; both back-propagate through the LM head. The script stops when the number of rows,
modules or values in a row is not the same.

Every measurement is a fresh process. The sides alternate within each repeat, and the table gives medians. No
side has a warm-up outside its time. Peak memory is the growth of `ru_maxrss` over what is resident once model
and data are loaded, where the kernel lets the high-water mark be reset; otherwise over the high-water mark at
that point. On a machine that is busy with something else two threads wait for each other; the processor time
printed beside each measurement then shows it.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CONTEXT = 2048
PROJECTION_DIM = 16
LENGTHS = (200, 600)
SIDES = {
    "ours": "gradfn `collect`",
    "bergson": "bergson `build`",
    "activations": "stock forward + backward, activations only",
    "full": "stock forward + backward, all gradients",
}
FLOOR = "activations"
VERSIONS = """
import importlib.metadata as m, json
print(json.dumps({k: m.version(k) for k in ("bergson", "torch", "transformers")}))
"""


# The measured processes.


def peak_rss() -> int:
    """High-water mark of this process's resident memory, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def reset_peak() -> int:
    """Forget the peak of loading where the kernel allows it, and give the baseline in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_rss()


@contextlib.contextmanager
def watched() -> Iterator[dict]:
    """Fill a dictionary with the seconds, processor seconds and peak memory (bytes) of the block's body."""
    report: dict = {}
    baseline, processor, begin = reset_peak(), time.process_time(), time.perf_counter()
    yield report
    report["seconds"] = time.perf_counter() - begin
    report["processor"] = time.process_time() - processor
    report["peak"] = peak_rss() - baseline


def prepare(folder: Path, vocab: int, tokens: int) -> None:
    """Write the model, its tokenizer, and the documents as token arrays and as text."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder / "model")

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder / "model")

    rng = np.random.default_rng(0)
    mean = sum(LENGTHS) / 2
    lengths = rng.integers(LENGTHS[0], LENGTHS[1] + 1, size=max(2, round(tokens / mean)))
    ids = rng.integers(0, vocab, size=int(lengths.sum()), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    np.savez(folder / "tokens.npz", ids=ids, offsets=offsets)
    with open(folder / "documents.jsonl", "w") as file:
        for start, stop in itertools.pairwise(offsets):
            text = " ".join(f"w{i}" for i in ids[start:stop])
            if tokenizer(text)["input_ids"] != ids[start:stop].tolist():
                raise SystemExit("The tokenizer does not map the text back to its tokens.")
            file.write(json.dumps({"text": text}) + "\n")
    print(json.dumps({"rows": len(lengths), "tokens": len(ids)}))


def load(folder: Path):
    """The model in eval mode with all parameters frozen, and the documents' tokens."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with np.load(folder / "tokens.npz") as stored:
        return model.eval().requires_grad_(False), stored["ids"], stored["offsets"]


def ours(model, documents):
    """One projected gradient block per module path, `[rows, 16, 16]` each."""
    import gradfn as gf

    return gf.collect(model, documents, gf.project(PROJECTION_DIM, seed=0), token_batch_size=CONTEXT)


def run_ours(folder: Path) -> dict:
    """Watch `ours` over the documents."""
    from gradfn.data import Documents

    model, ids, offsets = load(folder)
    names = [str(i) for i in range(len(offsets) - 1)]
    documents = Documents(input_ids=ids, labels=ids.copy(), offsets=offsets, ids=names, texts=names)
    with watched() as report:
        blocks = ours(model, documents)
    report["rows"], report["modules"] = len(next(iter(blocks.values()))), len(blocks)
    report["values"] = sum(block[0].numel() for block in blocks.values())
    return report


def run_bergson(folder: Path) -> dict:
    """`bergson build` in this process, watched from the start of its collection loop to its end."""
    from bergson.__main__ import main
    from bergson.collector.collector import CollectorComputer

    collect = CollectorComputer.run_with_collector_hooks
    result = {}

    def collect_watched(self, *args, **kwargs):
        with watched() as report:
            collect(self, *args, **kwargs)
        result.update(report, modules=len(self.collector.target_info))

    CollectorComputer.run_with_collector_hooks = collect_watched
    run = folder / "bergson"
    paths = ["--model", str(folder / "model"), "--dataset", str(folder / "documents.jsonl")]
    rows = ["--include_bias", "--loss_reduction", "mean", "--precision", "fp32", "--truncation"]
    sizes = ["--token_batch_size", str(CONTEXT), "--projection_dim", str(PROJECTION_DIM)]
    sys.argv = ["bergson", "build", str(run), *paths, *sizes, *rows]
    main()
    result["rows"] = json.loads((run / "info.json").read_text())["num_grads"]
    result["values"] = (run / "gradients.bin").stat().st_size // (4 * result["rows"])
    shutil.rmtree(run)
    return result


def run_stock(folder: Path, full: bool) -> dict:
    """Forward and backward of the stock model on padded batches, with or without the weights' gradients."""
    model, ids, offsets = load(folder)
    if full:
        model.requires_grad_(True)
    else:
        model.enable_input_require_grads()
    batches = padded_batches(ids, offsets)
    with watched() as report:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
    return report


def padded_batches(ids, offsets) -> list[dict]:
    """Right-padded batches of at most `CONTEXT` tokens, documents sorted by length, longest first."""
    import torch

    documents = [torch.from_numpy(ids[a:b]).long() for a, b in itertools.pairwise(offsets)]
    documents.sort(key=len, reverse=True)
    groups: list[list] = [[]]
    for document in documents:
        if groups[-1] and len(groups[-1][0]) * (len(groups[-1]) + 1) > CONTEXT:
            groups.append([])
        groups[-1].append(document)
    pad = torch.nn.utils.rnn.pad_sequence
    return [
        {
            "input_ids": pad(group, batch_first=True),
            "labels": pad(group, batch_first=True, padding_value=-100),
            "attention_mask": pad([torch.ones_like(row) for row in group], batch_first=True),
        }
        for group in groups
    ]


def worker(task: str, folder: Path, *numbers: str) -> None:
    """Run one side in this process and print what it measured as the last line."""
    if task == "prepare":
        return prepare(folder, *map(int, numbers))
    runs = {
        "ours": run_ours,
        "bergson": run_bergson,
        "activations": lambda folder: run_stock(folder, full=False),
        "full": lambda folder: run_stock(folder, full=True),
    }
    print("\n" + json.dumps(runs[task](folder)))


# The process that measures. It imports nothing heavy: a child's ru_maxrss starts at its parent's.


def start(python: str, arguments: list[str], threads: int, folder: Path) -> tuple[dict, str]:
    """Run a worker; give the JSON of its last line and its standard error."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "TQDM_BAR_FORMAT": "{desc} {n_fmt}/{total_fmt} {elapsed_s:.3f} s",
    }
    command = [python, __file__, "worker", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{arguments[0]} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def measure(side: str, python: str, threads: int, folder: Path) -> dict:
    """One fresh-process measurement of one side; bergson's seconds come from its own progress bar."""
    result, stderr = start(python, [side, str(folder)], threads, folder)
    if side == "bergson":
        bars = re.findall(r"Collecting gradients (\d+)/(\d+) ([\d.]+) s", stderr)
        if not bars or bars[-1][0] != bars[-1][1]:
            sys.exit("bergson's progress bar did not reach its end.")
        result["seconds"] = float(bars[-1][2])
    return result


def compare(sides: dict[str, str], vocab: int, options: argparse.Namespace) -> list[str]:
    """Measure every side on one vocabulary, alternating, and give the table's lines."""
    results: dict[str, list[dict]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, _ = start(
            sys.executable, ["prepare", name, str(vocab), str(options.tokens)], options.threads, folder
        )
        for repeat in range(options.repeats):
            for side, python in sides.items():
                results[side].append(measure(side, python, options.threads, folder))
                wall, processor = results[side][-1]["seconds"], results[side][-1]["processor"]
                label = f"vocabulary {vocab:,}, repeat {repeat + 1}, {side}"
                print(f"{label}: {wall:.2f} s, processor {processor:.2f} s", file=sys.stderr)
    check_rows(results, data["rows"])
    floor = statistics.median(r["seconds"] for r in results[FLOOR])
    return [line(side, vocab, results[side], floor, data["tokens"]) for side in sides]


def check_rows(results: dict[str, list[dict]], rows: int) -> None:
    """Refuse to compare collectors that did not collect the same rows."""
    shapes = {
        side: (runs[0]["rows"], runs[0]["modules"], runs[0]["values"])
        for side, runs in results.items()
        if "rows" in runs[0]
    }
    expected = (rows, 24, 24 * PROJECTION_DIM**2)
    for side, shape in shapes.items():
        if shape != expected:
            sys.exit(f"{side} gave (rows, modules, values in a row) {shape}, expected {expected}.")


def line(side: str, vocab: int, runs: list[dict], floor: float, tokens: int) -> str:
    """One row of the table."""
    seconds = [run["seconds"] for run in runs]
    middle, peak = statistics.median(seconds), statistics.median(run["peak"] for run in runs)
    spread = f"{middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    cells = [
        SIDES[side],
        f"{vocab:,}",
        spread,
        f"{tokens / middle:,.0f}",
        f"{middle / floor:.2f}",
        f"{peak / 2**20:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def start_up(label: str, command: list[str], repeats: int) -> str:
    """A row with the median time of a whole process, after one run that fills the file cache."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        seconds.append(time.perf_counter() - begin)
    seconds = seconds[1:]
    return (
        f"| {label} | | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | | | |"
    )


def start_ups(peer: str | None) -> list[str]:
    """The start-up rows: help and import of gradfn (7 runs each), help of bergson (3 runs)."""
    lines = []
    command = Path(sys.executable).with_name("gradfn")
    if command.exists():
        lines.append(start_up("`gradfn --help`", [str(command), "--help"], 7))
        lines.append(start_up("`import gradfn`", [sys.executable, "-c", "import gradfn"], 7))
    else:
        print("Skipping the start-up of gradfn: it is not installed beside this Python.", file=sys.stderr)
    if peer:
        lines.append(start_up("`bergson --help`", [peer, "-m", "bergson", "--help"], 3))
    return lines


def find_peer(python: str | None) -> tuple[str | None, dict[str, str]]:
    """The peer's interpreter and its versions, or None with the reason printed."""
    if python is None:
        reason = "no --bergson-python was given"
    elif not (found := shutil.which(python)):
        reason = "--bergson-python is not an executable file"
    else:
        python = os.path.abspath(found)
        asked = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True)
        if not asked.returncode:
            return python, json.loads(asked.stdout)
        reason = "bergson is not installed for --bergson-python"
    print(f"Skipping bergson: {reason}.", file=sys.stderr)
    return None, {}


def find_ours() -> bool:
    """Whether gradfn can be measured here; prints the reason when not."""
    asked = subprocess.run(
        [sys.executable, "-P", "-c", "import gradfn; gradfn.collect"], capture_output=True, text=True
    )
    if asked.returncode:
        print(f"Skipping gradfn: {asked.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return not asked.returncode


def header(peer_versions: dict[str, str], threads: int) -> list[str]:
    """Date, hardware, versions and command, without paths."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    versions = []
    for name in ("gradfn", "torch", "transformers"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} (not installed)")
    peer = ", ".join(f"{name} {version}" for name, version in peer_versions.items())
    words = [
        "PATH" if before == "--bergson-python" else word
        for before, word in zip(sys.argv, sys.argv[1:], strict=False)
    ]
    words = [re.sub(r"^(--bergson-python=).*", r"\1PATH", word) for word in words]
    return [
        f"{datetime.date.today()}, {cpu}, {os.cpu_count()} cores, threads: {threads}, "
        + ", ".join([f"Python {platform.python_version()}", *versions])
        + (f"; the peer's environment: {peer}" if peer else "")
        + ".",
        "",
        f"`{' '.join(['python benchmarks/collect.py', *words])}`",
        "",
        "| side | vocabulary | seconds, median (range) | tokens/s | over stock floor | peak memory, MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]


def main() -> None:
    """Measure every side and print one markdown table."""
    parser = argparse.ArgumentParser(description="Collection of per-example gradients, side by side.")
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 50304], help="vocabulary sizes")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument("--bergson-python", metavar="PATH", help="interpreter of an environment with bergson")
    parser.add_argument("--threads", type=int, default=2, help="threads of every side")
    parser.add_argument("--tokens", type=int, default=75_000, help="about how many tokens of documents")
    options = parser.parse_args()

    peer, peer_versions = find_peer(options.bergson_python)
    present = {"ours": find_ours(), "bergson": bool(peer)}
    sides = {
        side: peer if peer and side == "bergson" else sys.executable
        for side in SIDES
        if present.get(side, True)
    }
    lines = [row for vocab in options.vocab for row in compare(sides, vocab, options)]
    print("\n".join(header(peer_versions, options.threads) + lines + start_ups(peer)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
    else:
        main()
