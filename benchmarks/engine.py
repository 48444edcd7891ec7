"""Per-example gradients side by side: gradfn, its peer bergson, and what the stock passes cost.

    python benchmarks/engine.py --models neox-4k neox-50k --bergson-python PEER/bin/python

Models, all with random weights, for speed does not depend on them: `neox-4k` and `neox-50k` (GPT-NeoX, 6
layers x width 128, vocabularies 4,096 and 50,304), `gpt2` (GPT-2 small, 124M parameters) and `gpt2-4k` (the
same with a vocabulary of 4,096), `smollm2` (that of SmolLM2-135M), `resnet18` (the shape of ResNet-18, images
of 64 x 64). Data: documents of 200 to 600 random tokens, written as text that a word-level tokenizer maps
back to exactly these tokens (checked), so all sides read the same rows. Batches hold 2,048 tokens (GPT-2:
1,024), padding included, which is the most that bergson allows (the model's context); every side cuts its own
batches under this same budget. `--batch-tokens` gives all sides but bergson another one.

Sides:

* `ours`: `gf.collect(model, documents, gf.project(p, seed=0))`, the whole call, rows in memory; p = 0 folds
  the full gradients into their mean, for nobody keeps them.
* `ours-score`: `gf.score` of every row against one query, cosine of full gradients, nothing stored.
* `bergson`: `bergson build --projection_dim p --include_bias --loss_reduction mean` in its own environment
  and process; the time is what the progress bar of its collection loop ends on. Inside the bar: making the
  batches, projection matrices at their first use, rows into a memory-mapped file. Outside: imports, model,
  tokenisation, the last flush. It freezes all weights but the embedding, whose gradient it computes and
  drops, and passes no attention mask, for padding is on the right.
* `bergson-score`: `bergson score` at p = 16 against one row that its `build` wrote before; its bar again.
* `activations`: `model(input_ids, attention_mask, labels).loss.backward()` with all parameters frozen
  and the embedding's output requiring a gradient. No gradient of any weight and none per example: the cost
  that any method pays that runs the stock forward and backward.
* `full`: the same with every parameter requiring a gradient, dropped after every batch (training
  without an optimizer).
* `naive`: a backward of every example alone, with the gradients of the attributed weights.
* `vmap`: `vmap(grad)` of the attributed weights, 4 examples at a time, with eager attention.
* `ghost`: squared norms as Opacus's ghost clipping has them: hooks keep every linear layer's input, and the
  norm is `sum((x xᵀ) * (g gᵀ))`; on top of the stock passes.

Both collectors give `[rows, p, p]` for each attributed layer: `L G Rᵀ`, where G is the gradient of one
document's mean next-token loss with the bias as its last column, and L, R are random signs over sqrt(p).
(bergson's were checked against a batch-size-1 loop with its own L and R: equal to 1e-6.) The signs are each
one's own, and so are the values. Neither takes the LM head's or the embedding's weight into the rows; both
back-propagate through the LM head. The script stops when the number of rows, modules or values in a row is
not the same.

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

LENGTHS = (200, 600)
SIDES = {
    "ours": "gradfn `collect`",
    "ours-score": "gradfn `score`, full cosine",
    "bergson": "bergson `build`",
    "bergson-score": "bergson `score`",
    "activations": "stock forward + backward, activations only",
    "full": "stock forward + backward, all gradients",
    "naive": "one example at a time",
    "vmap": "`vmap(grad)`",
    "ghost": "ghost norms",
}
LANGUAGE_MODELS = ("neox-4k", "neox-50k", "gpt2", "gpt2-4k", "smollm2")
MODELS = (*LANGUAGE_MODELS, "resnet18")
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


def make_model(name: str):
    """A model of random weights."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if name.startswith("gpt2"):
        vocab = 4096 if name == "gpt2-4k" else 50257
        end = {"bos_token_id": vocab - 1, "eos_token_id": vocab - 1}
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=vocab, **end))
    if name == "smollm2":
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
    if name == "resnet18":
        return hf.ResNetForImageClassification(
            hf.ResNetConfig(
                embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic",
                num_labels=1000,
            )
        )  # fmt: skip
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size={"neox-4k": 4096, "neox-50k": 50304}[name], hidden_size=128, num_hidden_layers=6,
            num_attention_heads=8, intermediate_size=512, max_position_embeddings=2048,
        )
    )  # fmt: skip


def prepare(folder: Path, name: str, tokens: int) -> None:
    """Write the model, its tokenizer, and the documents as token arrays and as text (or images)."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = make_model(name)
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    if name == "resnet18":
        count = max(2, tokens // 400)
        pixels = rng.standard_normal((count, 3, 64, 64)).astype(np.float32)
        np.savez(folder / "images.npz", pixels=pixels, labels=rng.integers(0, 1000, count))
        print(json.dumps({"rows": count, "tokens": count}))
        return
    vocab = model.config.vocab_size
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    context = model.config.max_position_embeddings
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=context)
    tokenizer.save_pretrained(folder / "model")

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
    (folder / "query.jsonl").write_text((folder / "documents.jsonl").read_text().splitlines()[0] + "\n")
    print(json.dumps({"rows": len(lengths), "tokens": len(ids)}))


def load(folder: Path, attention: str = "sdpa"):
    """The model in eval mode with all parameters frozen, its data, and the budget of a batch."""
    import numpy as np
    import torch
    import transformers as hf

    from gradfn.data import Documents

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if (folder / "images.npz").exists():
        model = hf.ResNetForImageClassification.from_pretrained(folder / "model")
        with np.load(folder / "images.npz") as stored:
            pixels, labels = torch.from_numpy(stored["pixels"]), torch.from_numpy(stored["labels"])
        data = [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
        return model.eval().requires_grad_(False), data, 16
    budget = int(os.environ["BATCH_TOKENS"])
    options = {"dtype": torch.float32, "attn_implementation": attention}
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model", **options)
    with np.load(folder / "tokens.npz") as stored:
        ids, offsets = stored["ids"], stored["offsets"]
    names = [str(i) for i in range(len(offsets) - 1)]
    data = Documents(input_ids=ids, labels=ids.copy(), offsets=offsets, ids=names, texts=names)
    return model.eval().requires_grad_(False), data, budget or model.config.max_position_embeddings


def loss_of(model, data):
    """The loss of language models or of images."""
    import gradfn as gf

    return gf.model_loss(model, "classification") if isinstance(data, list) else gf.causal_lm_loss(model)


def run_ours(folder: Path, p: int) -> dict:
    """Collect the rows; at full dimension, their mean."""
    import gradfn as gf
    from gradfn.engine.precision import multiplying

    model, data, budget = load(folder)
    options = {"loss": loss_of(model, data), "token_batch_size": budget}
    with multiplying(os.environ["PRODUCTS"], model.device), watched() as report:
        if p:
            blocks = gf.collect(model, data, gf.project(p, seed=0), **options)
        else:
            gf.fit(gf.mean(), model, data, **options)
    if p:
        report["rows"], report["modules"] = len(next(iter(blocks.values()))), len(blocks)
        report["values"] = sum(block[0].numel() for block in blocks.values())
    return report


def run_ours_score(folder: Path, p: int) -> dict:
    """Score every row against the first, full gradients (p is not used)."""
    import gradfn as gf

    model, data, budget = load(folder)
    query = data[:1] if isinstance(data, list) else data.select([0])
    options = {"loss": loss_of(model, data), "token_batch_size": budget}
    with watched() as report:
        gf.score(model, data, query, method=gf.grad_cosine(), **options)
    return report


def _bergson(folder: Path, run: str, command: str, data: str, *more: str) -> dict:
    """One command of bergson in this process, watched from the start of its loop to its end."""
    from bergson.__main__ import main
    from bergson.collector.collector import CollectorComputer

    collect = CollectorComputer.run_with_collector_hooks
    result = {}

    def collect_watched(self, *args, **kwargs):
        with watched() as report:
            collect(self, *args, **kwargs)
        result.update(report, modules=len(self.collector.target_info))

    context = json.loads((folder / "model" / "config.json").read_text())
    budget = str(context.get("max_position_embeddings") or context["n_positions"])
    CollectorComputer.run_with_collector_hooks = collect_watched
    paths = ["--model", str(folder / "model"), "--dataset", str(folder / data)]
    precision = "--index_cfg.precision" if command == "score" else "--precision"
    rows = ["--include_bias", "--loss_reduction", "mean", precision, "fp32", "--truncation"]
    sys.argv = ["bergson", command, str(folder / run), *paths, "--token_batch_size", budget, *rows, *more]
    try:
        main()
    finally:
        CollectorComputer.run_with_collector_hooks = collect
    return result


def run_bergson(folder: Path, p: int) -> dict:
    """`bergson build`."""
    run = folder / "bergson"
    result = _bergson(folder, "bergson", "build", "documents.jsonl", "--projection_dim", str(p))
    result["rows"] = json.loads((run / "info.json").read_text())["num_grads"]
    result["values"] = (run / "gradients.bin").stat().st_size // (4 * result["rows"])
    shutil.rmtree(run)
    return result


def run_bergson_score(folder: Path, p: int) -> dict:
    """`bergson score` against the first row."""
    dim = ("--projection_dim", str(p))
    _bergson(folder, "bergson-query", "build", "query.jsonl", *dim)
    query = ("--query_path", str(folder / "bergson-query"))
    result = _bergson(folder, "bergson-scores", "score", "documents.jsonl", *dim, *query)
    for name in ("bergson-query", "bergson-scores"):
        shutil.rmtree(folder / name)
    return result


def padded_batches(data, budget: int) -> list[dict]:
    """Right-padded batches within the budget, documents sorted by length, longest first."""
    import torch

    from gradfn.data import collate
    from gradfn.engine.batching import plan_batches
    from gradfn.engine.stream import lengths_of

    batches = []
    for rows in plan_batches(lengths_of(data), budget):
        examples = [dict(data[int(row)]) for row in rows]
        if not isinstance(data, list):
            for example in examples:
                example["attention_mask"] = torch.ones_like(example["input_ids"])
        batches.append(collate(examples))
    return batches


def run_stock(folder: Path, full: bool) -> dict:
    """Forward and backward of the stock model, with or without the weights' gradients."""
    model, data, budget = load(folder)
    batches = padded_batches(data, budget)
    if full:
        model.requires_grad_(True)
    elif isinstance(data, list):
        for batch in batches:
            batch["pixel_values"].requires_grad_()
    else:
        model.enable_input_require_grads()
    with watched() as report:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
    return report


def attributed(model) -> list:
    """The weights of the layers that have a block."""
    from gradfn.model.sites import find_sites

    return [p for site in find_sites(model) for p in (site.weight, site.own_bias) if p is not None]


def run_naive(folder: Path, p: int) -> dict:
    """A backward an example."""
    model, data, _ = load(folder)
    for parameter in attributed(model):
        parameter.requires_grad_(True)
    batches = [batch for row in range(len(data)) for batch in padded_batches([data[row]], 1)]
    with watched() as report:
        for batch in batches:
            model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
    return report


def run_vmap(folder: Path, p: int) -> dict:
    """`vmap(grad)`, four examples at a time."""
    import gradfn as gf
    from gradfn.engine.reference import definition

    model, data, _ = load(folder, "eager")
    loss = loss_of(model, data)
    loss = loss.with_whole_logits() if hasattr(loss, "with_whole_logits") else loss
    wanted = {id(p) for p in attributed(model)}
    params = gf.model.params_of(model)
    some = {name: params[name] for name, p in model.named_parameters() if id(p) in wanted}
    batches = padded_batches(data, 4 * LENGTHS[1])
    with watched() as report:
        for batch in batches:
            batch.pop("attention_mask", None)
            definition(lambda theta, example: loss({**params, **theta}, example), some, batch)
    return report


def run_ghost(folder: Path, p: int) -> dict:
    """Squared norms of every example from the inputs and output gradients of linear layers."""
    import torch

    from gradfn.model.sites import find_sites

    model, data, budget = load(folder)
    batches = padded_batches(data, budget)
    model.enable_input_require_grads()
    sums: list = []

    def forward(module, args, y):
        x = args[0]
        y.register_hook(lambda g: sums.append(((x @ x.mT + 1) * (g @ g.mT)).sum((1, 2))))

    for site in find_sites(model):
        site.module.register_forward_hook(forward)
    with watched() as report:
        for batch in batches:
            model(**batch).loss.backward()
            torch.stack(sums).sum(0)
            sums.clear()
    return report


def worker(task: str, folder: Path, *words: str) -> None:
    """Run one side in this process and print what it measured as the last line."""
    if task == "prepare":
        return prepare(folder, words[0], int(words[1]))
    p = int(words[0])
    runs = {
        "ours": run_ours,
        "ours-score": run_ours_score,
        "bergson": run_bergson,
        "bergson-score": run_bergson_score,
        "activations": lambda folder, p: run_stock(folder, full=False),
        "full": lambda folder, p: run_stock(folder, full=True),
        "naive": run_naive,
        "vmap": run_vmap,
        "ghost": run_ghost,
    }
    print("\n" + json.dumps(runs[task](folder, p)))


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


def measure(side: str, p: int, python: str, threads: int, folder: Path) -> dict:
    """One fresh-process measurement of one side; bergson's seconds come from its own progress bar."""
    result, stderr = start(python, [side, str(folder), str(p)], threads, folder)
    if side.startswith("bergson"):
        bars = re.findall(r"[Gg]radients\S* (\d+)/(\d+) ([\d.]+) s", stderr)
        if not bars or bars[-1][0] != bars[-1][1]:
            sys.exit("bergson's progress bar did not reach its end.")
        result["seconds"] = float(bars[-1][2])
    return result


def plan(sides: dict[str, str], model: str, dims: list[int]) -> list[tuple[str, int]]:
    """Which side is measured at which projection: those that project at each, the others once."""
    projecting = ("ours", "bergson")
    language = model in LANGUAGE_MODELS
    skipped = () if language else ("bergson", "bergson-score", "ghost")
    return [
        (side, p)
        for side in sides
        if side not in skipped
        for p in (dims if side in projecting else [16 if side == "bergson-score" else 0])
        if not (side == "bergson" and p == 0)
    ]


def compare(sides: dict[str, str], model: str, options: argparse.Namespace) -> list[str]:
    """Measure every side on one model, alternating, and give the table's lines."""
    runs = plan(sides, model, options.dims)
    results: dict[tuple[str, int], list[dict]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, _ = start(
            sys.executable, ["prepare", name, model, str(options.tokens)], options.threads, folder
        )
        for repeat in range(options.repeats):
            for side, p in runs:
                result = measure(side, p, sides[side], options.threads, folder)
                results[side, p].append(result)
                wall, processor = result["seconds"], result["processor"]
                label = f"{model}, repeat {repeat + 1}, {side}, p {p}"
                print(f"{label}: {wall:.2f} s, processor {processor:.2f} s", file=sys.stderr, flush=True)
    check_rows(results, data["rows"])
    floor = statistics.median(r["seconds"] for r in results[FLOOR, 0])
    return [line(side, p, model, results[side, p], floor, data["tokens"]) for side, p in runs]


def check_rows(results: dict[tuple[str, int], list[dict]], rows: int) -> None:
    """Refuse to compare collectors that did not collect the same rows."""
    shapes: dict[int, dict[str, tuple]] = {}
    for (side, p), runs in results.items():
        if "values" in runs[0]:
            shapes.setdefault(p, {})[side] = (runs[0]["rows"], runs[0]["modules"], runs[0]["values"])
    for p, by_side in shapes.items():
        if len(set(by_side.values())) > 1 or any(shape[0] != rows for shape in by_side.values()):
            sys.exit(f"At p = {p} the sides differ in (rows, modules, values in a row): {by_side}.")


def line(side: str, p: int, model: str, runs: list[dict], floor: float, tokens: int) -> str:
    """One row of the table."""
    seconds = [run["seconds"] for run in runs]
    middle, peak = statistics.median(seconds), statistics.median(run["peak"] for run in runs)
    spread = f"{middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    cells = [
        SIDES[side],
        str(p) if side in ("ours", "bergson", "bergson-score") else "",
        model,
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
        f"| {label} | | | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | | | |"
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
        f"`{' '.join(['python benchmarks/engine.py', *words])}`",
        "",
        "| side | p | model | seconds, median (range) | tokens (images) a second | over stock floor | MiB |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]


def main() -> None:
    """Measure every side and print one markdown table."""
    parser = argparse.ArgumentParser(description="Per-example gradients, side by side.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["neox-4k", "neox-50k"])
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=["ours", "bergson", "activations", "full"]
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[16], help="projection dimensions")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument("--bergson-python", metavar="PATH", help="interpreter of an environment with bergson")
    parser.add_argument(
        "--products", choices=["ieee", "tf32", "bf16"], default="ieee",
        help="what `ours` may round factors to, see gradfn.engine.precision; elsewhere float32 is float32",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="threads of every side")
    parser.add_argument("--tokens", type=int, default=75_000, help="about how many tokens of documents")
    parser.add_argument(
        "--batch-tokens", type=int, default=0, help="tokens a batch, of all sides but bergson; 0: the context"
    )
    parser.add_argument("--start-up", action="store_true", help="measure help and import too")
    options = parser.parse_args()
    os.environ["BATCH_TOKENS"], os.environ["PRODUCTS"] = str(options.batch_tokens), options.products

    peer, peer_versions = find_peer(options.bergson_python)
    ours = find_ours()
    chosen = list(dict.fromkeys([*options.sides, FLOOR]))
    sides = {
        side: peer if peer and side.startswith("bergson") else sys.executable
        for side in chosen
        if (peer or not side.startswith("bergson")) and (ours or not side.startswith("ours"))
    }
    lines = [row for model in options.models for row in compare(sides, model, options)]
    ups = start_ups(peer) if options.start_up else []
    print("\n".join(header(peer_versions, options.threads) + lines + ups))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
    else:
        main()
