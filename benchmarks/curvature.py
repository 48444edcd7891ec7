"""Curvatures side by side: EK-FAC influence, TrackStar, and what a sweep of dampings costs.

    python benchmarks/curvature.py --bergson-python BERGSON/bin/python \\
        --kronfluence-python KRONFLUENCE/bin/python

All models have random weights and all data are random, for speed does not depend on them; every side reads
the same files.

* `ekfac-gpt2`: the shape of GPT-2 small, 16 documents of 128 tokens, the first of which is the query. Fit
  EK-FAC over the documents with the data's labels (two passes and the eigendecompositions), precondition the
  query's full gradient with damping 0.1 of the mean eigenvalue, score every document. All sides: batches of
  1,024 tokens, float32, eigendecompositions in float64. `--layers` takes fewer layers.
* `ekfac-resnet`: the same with a ResNet of three stages of 64, 128 and 256 channels, a basic block each, and
  64 images of 32 x 32 in batches of 16. Convolutions and the last layer; batch norms stand still. bergson has
  no convolutions of images.
* `trackstar`: 1,000 documents of 64 tokens and 8 queries, GPT-NeoX of 6 layers and width 128, vocabulary
  4,096, p = 16, second moments of both mixed. `gradfn score --method trackstar` against `bergson trackstar`
  (with unit norms, as the paper has it, which is not its default): whole processes, from text to scores on
  disk, each with batches of its own default, 4,096 and 2,048 tokens (the context, which bergson's cannot
  exceed).
* `sweep-trackstar`, `sweep-ekfac`: on the same documents ten dampings against one, of TrackStar (p = 16) and
  of EK-FAC (full gradients), from the fit to the scores. Both are our own, so they take turns in one process.

kronfluence knows no Conv1D of transformers: it gets GPT-2 with these layers as nn.Linear, made before the
clock starts. It keeps factors and scores on disk, and so does bergson; we return them.

Every other measurement is a fresh process, the sides alternate within each repeat; the table gives medians.
`seconds` is the whole process from start to end, imports and loading of the model included; `job` is without
these (of `trackstar` it is not told apart). The ratio is that of `job` where there is one. Peak memory is the
process's high-water mark. The last column is the largest difference of a side's scores from the first side's,
over the largest of these: a check that both did the same. TrackStar's is empty, for each side has projections
of its own. On a machine that is busy with something else two threads wait for each other; the processor time
printed beside each measurement then shows it.
"""

# The peers are installed in their own environments.
# pyright: reportMissingImports=false

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

P = 16
SWEEP = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
JOBS = {
    "ekfac-gpt2": ("ours", "kronfluence", "bergson"),
    "ekfac-resnet": ("ours", "kronfluence"),
    "trackstar": ("ours", "bergson"),
    "sweep-trackstar": ("one", "ten"),
    "sweep-ekfac": ("one", "ten"),
}


@dataclass(frozen=True)
class Size:
    """Rows, tokens or pixels a row, queries, and rows a batch."""

    rows: int
    length: int
    queries: int
    batch: int


SIZES = {
    "ekfac-gpt2": Size(16, 128, 1, 8),
    "ekfac-resnet": Size(64, 32, 1, 16),
    "trackstar": Size(1000, 64, 8, 32),
    "sweep-trackstar": Size(1000, 64, 8, 32),
    "sweep-ekfac": Size(1000, 64, 8, 32),
}
TINY = {
    "ekfac-gpt2": Size(6, 16, 1, 3),
    "ekfac-resnet": Size(6, 16, 1, 3),
    "trackstar": Size(12, 16, 3, 4),
    "sweep-trackstar": Size(12, 16, 3, 4),
    "sweep-ekfac": Size(12, 16, 3, 4),
}


# --- models and data


def make_model(job: str, layers: int, tiny: bool) -> Any:
    """A model of random weights."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    if job == "ekfac-gpt2":
        config = hf.GPT2Config(n_layer=layers)
        if tiny:
            config = hf.GPT2Config(n_layer=layers, n_embd=32, n_head=2, vocab_size=128)
        return hf.GPT2LMHeadModel(config)
    if job == "ekfac-resnet":
        widths = [8, 16, 16] if tiny else [64, 128, 256]
        config = hf.ResNetConfig(
            embedding_size=widths[0], hidden_sizes=widths, depths=[1, 1, 1], layer_type="basic"
        )
        config.num_labels = 10
        return hf.ResNetForImageClassification(config)
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size=4096, hidden_size=32 if tiny else 128, num_hidden_layers=2 if tiny else 6,
            num_attention_heads=8, intermediate_size=64 if tiny else 512, max_position_embeddings=2048,
        )
    )  # fmt: skip


def prepare(folder: Path, job: str, layers: int, tiny: bool) -> None:
    """Write the model, its tokenizer, and rows and queries as numbers and as text."""
    import numpy as np

    model = make_model(job, layers, tiny)
    model.save_pretrained(folder / "model")
    size, rng = (TINY if tiny else SIZES)[job], np.random.default_rng(0)
    (folder / "size.json").write_text(json.dumps(vars(size)))
    if job == "ekfac-resnet":
        pixels = rng.standard_normal((size.rows, 3, size.length, size.length), dtype=np.float32)
        np.savez(folder / "images.npz", pixels=pixels, labels=rng.integers(0, 10, size.rows))
        return
    ids = rng.integers(0, model.config.vocab_size, (size.rows, size.length))
    np.save(folder / "tokens.npy", ids)
    save_tokenizer(folder, model.config.vocab_size)
    for name, rows in (("documents", ids), ("queries", ids[: size.queries])):
        lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer that maps `w7` to 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=2048).save_pretrained(folder / "model")


def size_of(folder: Path) -> Size:
    return Size(**json.loads((folder / "size.json").read_text()))


def load(folder: Path) -> tuple[Any, list[dict]]:
    """The model in eval mode, and its rows."""
    import numpy as np
    import torch
    import transformers as hf

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if (folder / "images.npz").exists():
        model = hf.ResNetForImageClassification.from_pretrained(folder / "model")
        with np.load(folder / "images.npz") as stored:
            pixels, labels = torch.from_numpy(stored["pixels"]), torch.from_numpy(stored["labels"])
        return model.eval(), [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    ids = torch.from_numpy(np.load(folder / "tokens.npy"))
    return model.eval(), [{"input_ids": row, "labels": row} for row in ids]


# --- the measured processes


@contextmanager
def watched(report: dict[str, Any], name: str) -> Iterator[None]:
    """Add the seconds and processor seconds of the block's body to a report."""
    processor, begin = time.process_time(), time.perf_counter()
    yield
    report[name] = time.perf_counter() - begin
    report[f"{name} processor"] = time.process_time() - processor


def run_ours_ekfac(folder: Path) -> dict[str, Any]:
    """Fit, query and score, in one call of `fit` and one of `score`; the first pass is timed apart."""
    import gradfn as gf

    model, data = load(folder)
    images = "pixel_values" in data[0]
    loss = gf.model_loss(model, "classification") if images else gf.causal_lm_loss(model, "sum")
    size = size_of(folder)
    options: dict[str, Any] = {"loss": loss, "token_batch_size": size.batch * (1 if images else size.length)}
    report: dict[str, Any] = {}
    with watched(report, "job"):
        with watched(report, "K-FAC"):
            basis = gf.fit(gf.kfac(), model, data, **options)
        with watched(report, "eigenvalues"):
            H = gf.fit(gf.ekfac().then(basis), model, data, **options)
        with watched(report, "query and scores"):
            method = gf.influence(H, damping=0.1)
            scores: Any = gf.score(model, data, data[: size.queries], method=method, **options).matrix
    return report | {"scores": scores.flatten().tolist()}


def run_kronfluence(folder: Path) -> dict[str, Any]:
    """`fit_all_factors` and `compute_pairwise_scores`."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    model, data = load(folder)
    size, report = size_of(folder), {}
    task = kronfluence_task(with_linear(model))
    with watched(report, "job"):
        output = str(folder / f"kronfluence-{os.getpid()}")
        analyzer = Analyzer(
            "a", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=output
        )
        with watched(report, "fit"):
            fisher = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
            analyzer.fit_all_factors("f", data, size.batch, factor_args=fisher)  # pyright: ignore[reportArgumentType]
        with watched(report, "query and scores"):
            # None is 0.1 times the mean eigenvalue.
            arguments = ScoreArguments(damping_factor=None)
            query: Any = data[: size.queries]
            analyzer.compute_pairwise_scores(
                "s", "f", query, data, size.queries, size.batch, score_args=arguments
            )  # pyright: ignore[reportArgumentType]
        scores = analyzer.load_pairwise_scores("s")["all_modules"]
    return report | {"scores": scores.T.flatten().tolist()}


def with_linear(model: Any) -> Any:
    """The same model with nn.Linear in the place of every Conv1D, which stores its weight as `[in, out]`."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf)
                linear.weight.data, linear.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(parent, name, linear)
    return model.eval()


def kronfluence_task(model: Any) -> Any:
    """Summed cross-entropy of tokens or classes; all linear layers and convolutions but the LM head."""
    import torch.nn.functional as F
    from kronfluence.task import Task
    from torch import nn

    kinds = nn.Linear, nn.Conv2d
    tracked = [n for n, m in model.named_modules() if isinstance(m, kinds) and not n.endswith("lm_head")]

    class Attribution(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            if "pixel_values" in batch:
                return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], reduction="sum")
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

        def get_attention_mask(self, batch: Any) -> Any:
            if "pixel_values" in batch:
                return None
            # The last position predicts nothing; the other sides leave it out of the covariances.
            mask = batch["labels"].new_ones(batch["labels"].shape)
            mask[:, -1] = 0
            return mask

    return Attribution()


def bergson_index(folder: Path, run: str, kind: str, **options: Any) -> Any:
    """Settings that both pipelines share: biases included, float32, documents as text."""
    from bergson import config

    size = size_of(folder)
    Index = config.IndexConfig if kind == "ekfac" else config.config.TrackstarIndexConfig
    return Index(
        run_path=str(folder / run), model=str(folder / "model"), precision="fp32", include_bias=True,
        data=config.DataConfig(dataset=str(folder / "documents.jsonl"), truncation=True),
        token_batch_size=size.batch * size.length, **options,
    )  # fmt: skip


def run_bergson_ekfac(folder: Path) -> dict[str, Any]:
    """`bergson ekfac`."""
    from bergson import config
    from bergson.cli.commands import Ekfac
    from bergson.data import load_scores

    run, report = f"bergson-{os.getpid()}", {}
    with watched(report, "job"):
        Ekfac(
            bergson_index(folder, run, "ekfac", loss_reduction="sum"),
            config.HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True),
            config.ScoreConfig(), config.PreprocessConfig(),
            config.HessianPipelineConfig(query=config.QuerySetConfig(dataset=str(folder / "queries.jsonl"))),
        ).execute()  # fmt: skip
    return report | {"scores": load_scores(folder / run / "scores")[:].flatten().tolist()}


def run_bergson_trackstar(folder: Path) -> dict[str, Any]:
    """`bergson trackstar`."""
    from bergson import config
    from bergson.cli.commands import Trackstar
    from bergson.data import load_scores

    run = f"bergson-{os.getpid()}"
    query = config.QuerySetConfig(dataset=str(folder / "queries.jsonl"), truncation=True)
    unit = config.PreprocessConfig(unit_normalize=True)
    index = bergson_index(folder, run, "trackstar", loss_reduction="mean", projection_dim=P)
    Trackstar(index, config.TrackstarConfig(query=query, preprocess_cfg=unit)).execute()
    return {"shape": list(load_scores(folder / run / "scores")[:].shape)}


def run_ours_trackstar(folder: Path) -> dict[str, Any]:
    """`gradfn score --method trackstar`."""
    import gradfn as gf
    from gradfn.cli import main

    run = folder / f"ours-{os.getpid()}"
    sys.argv = [
        "gradfn", "score", str(run), "--model", str(folder / "model"),
        "--dataset", str(folder / "documents.jsonl"), "--query", str(folder / "queries.jsonl"),
        "--method", "trackstar", "--projection-dim", str(P), "--truncation",
    ]  # fmt: skip
    main()
    with gf.open_store(run, "scores") as store:
        return {"shape": list(store.shape("scores"))}


def run_sweep(folder: Path, kind: str) -> dict[str, Any]:
    """From the fit to the scores, for one damping and for several in turns: the seconds of each turn."""
    import gradfn as gf
    from gradfn.methods.recipes import recipe_named

    model, data = load(folder)
    size = size_of(folder)
    projection = gf.project(P if kind == "trackstar" else 0, seed=0)
    turns: dict[str, list[float]] = {"one": [], "ten": []}
    for _ in range(int(os.environ["REPEATS"])):
        for side, dampings in (("one", (0.1,)), ("ten", SWEEP)):
            subject = gf.Subject(model, token_batch_size=size.batch * size.length)
            problem = gf.methods.Problem(
                subject, data, data[: size.queries], projection=projection,
                damping=tuple(map(gf.Damping, dampings)),
            )  # fmt: skip
            begin = time.perf_counter()
            method = recipe_named(kind).method(problem)
            gf.score(subject, data, problem.query, method=method)
            turns[side].append(time.perf_counter() - begin)
    return {"turns": turns}


RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ekfac-ours": run_ours_ekfac,
    "ekfac-kronfluence": run_kronfluence,
    "ekfac-bergson": run_bergson_ekfac,
    "trackstar-ours": run_ours_trackstar,
    "trackstar-bergson": run_bergson_trackstar,
    "sweep-trackstar": lambda folder: run_sweep(folder, "trackstar"),
    "sweep-ekfac": lambda folder: run_sweep(folder, "ekfac"),
}


def worker(run: str, folder: Path) -> None:
    """Run one side in this process and print what it measured as the last line."""
    report = RUNS[run](folder)
    scale = 1 if sys.platform == "darwin" else 1024
    report["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    report["processor"] = time.process_time()
    print("\n" + json.dumps(report))


# --- the process that measures; it imports nothing heavy: a child's ru_maxrss starts at its parent's


def start(
    python: str, arguments: list[str], threads: int, folder: Path, repeats: int = 1
) -> tuple[dict[str, Any], float]:
    """Run a worker; give the JSON of its last line and its seconds from start to end."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "REPEATS": str(repeats),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    begin = time.perf_counter()
    done = subprocess.run(
        [python, __file__, *arguments], env=environment, capture_output=True, text=True, cwd=folder
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{' '.join(arguments[:2])} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}, seconds


def measure(job: str, side: str, python: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One fresh-process measurement of one side."""
    run = f"{job.removesuffix('-gpt2').removesuffix('-resnet')}-{side}"
    report, seconds = start(python, ["worker", run, str(folder)], options.threads, folder)
    for path in folder.glob(f"{side}-*"):
        subprocess.run(["rm", "-r", str(path)], check=True)
    report["seconds"] = seconds
    parts = {name: value for name, value in report.items() if isinstance(value, float) and name != "peak"}
    print(
        f"{job}, {side}: " + ", ".join(f"{n} {v:.2f} s" for n, v in parts.items()),
        file=sys.stderr,
        flush=True,
    )
    return report


def measure_turns(job: str, options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Both sides of a sweep, measured in turns in one process."""
    report, _ = start(sys.executable, ["worker", job, str(folder)], options.threads, folder, options.repeats)
    print(f"{job}: {report['turns']}", file=sys.stderr, flush=True)
    return {
        side: [{"seconds": one, "job": one, "peak": report["peak"]} for one in turns]
        for side, turns in report["turns"].items()
    }


def compare(job: str, pythons: dict[str, str], options: argparse.Namespace) -> list[str]:
    """Measure every side of a job, alternating, and give the table's lines."""
    sides = {
        side: pythons.get(side, sys.executable) for side in JOBS[job] if side in pythons or side not in PEERS
    }
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layers = options.layers or (2 if options.tiny else 12)
        start(
            sys.executable,
            ["prepare", name, job, str(layers), str(int(options.tiny))],
            options.threads,
            folder,
        )
        if job.startswith("sweep"):
            results = measure_turns(job, options, folder)
        for _ in range(0 if job.startswith("sweep") else options.repeats):
            for side, python in sides.items():
                results[side].append(measure(job, side, python, options, folder))
    check_shapes(job, results)
    first = next(iter(results.values()))
    return [line(job, side, runs, first) for side, runs in results.items()]


def check_shapes(job: str, results: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse to compare sides that did not score the same rows against the same queries."""
    shapes = {side: runs[0].get("shape", len(runs[0].get("scores", []))) for side, runs in results.items()}
    if len({str(shape) for shape in shapes.values()}) > 1:
        sys.exit(f"The sides of {job} differ in their scores' shapes: {shapes}.")


def line(job: str, side: str, runs: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    """One row of the table."""

    def median(key: str, of: list[dict[str, Any]]) -> float:
        return statistics.median(run[key] for run in of)

    seconds = [run["seconds"] for run in runs]
    middle = statistics.median(seconds)
    job_seconds = f"{median('job', runs):.2f}" if "job" in runs[0] else ""
    base = "job" if "job" in runs[0] else "seconds"
    cells = [
        job,
        side,
        f"{middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
        job_seconds,
        f"{median(base, runs) / median(base, first):.2f}",
        f"{median('peak', runs) / 2**20:,.0f}",
        difference(runs[0], first[0]),
    ]
    return "| " + " | ".join(cells) + " |"


def difference(run: dict[str, Any], first: dict[str, Any]) -> str:
    """The largest difference of the scores from those of the first side, over the largest of these."""
    if run is first or "scores" not in run:
        return ""
    pairs = zip(run["scores"], first["scores"], strict=True)
    return f"{max(abs(a - b) for a, b in pairs) / max(map(abs, first['scores'])):.1e}"


PEERS = ("bergson", "kronfluence")


def find_peers(options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """The interpreters of the peers that are there, and what is installed in them; the reason for others."""
    pythons, versions = {}, []
    for peer in PEERS:
        python = getattr(options, f"{peer}_python")
        code = f"import importlib.metadata as m; print(m.version({peer!r}), m.version('torch'))"
        if python is None:
            print(f"Skipping {peer}: no --{peer}-python was given.", file=sys.stderr)
            continue
        python = os.path.abspath(python)
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if asked.returncode:
            sys.exit(f"{peer} is not installed for --{peer}-python")
        pythons[peer] = python
        versions.append("{} {} (torch {})".format(peer, *asked.stdout.split()))
    return pythons, versions


def header(versions: list[str], threads: int) -> list[str]:
    """Date, hardware, versions and command, without paths."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0] if names else cpu
    ours = [f"{name} {importlib.metadata.version(name)}" for name in ("gradfn", "torch", "transformers")]
    words = [re.sub(r"^(--\w+-python)=.*", r"\1=PATH", word) for word in sys.argv]
    words = ["PATH" if before.endswith("-python") else word for before, word in itertools.pairwise(words)]
    return [
        f"{datetime.date.today()}, {cpu}, {os.cpu_count()} cores, threads: {threads}, "
        + ", ".join([f"Python {platform.python_version()}", *ours, *versions])
        + ".",
        "",
        f"`{' '.join(['python benchmarks/curvature.py', *words])}`",
        "",
        "| job | side | seconds, median (range) | job | over the first | peak, MiB | scores differ by |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]


def main() -> None:
    """Measure every side of every job and print one markdown table."""
    parser = argparse.ArgumentParser(description="Curvatures, side by side.")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    for peer in PEERS:
        parser.add_argument(
            f"--{peer}-python", metavar="PATH", help=f"interpreter of an environment with {peer}"
        )
    parser.add_argument("--threads", type=int, default=2, help="threads of every side")
    parser.add_argument("--layers", type=int, help="layers of ekfac-gpt2; its own 12 if not given")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    options = parser.parse_args()
    pythons, versions = find_peers(options)
    lines = [row for job in options.jobs for row in compare(job, pythons, options)]
    print("\n".join(header(versions, options.threads) + lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["prepare"]:
        prepare(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5] == "1")
    else:
        main()
