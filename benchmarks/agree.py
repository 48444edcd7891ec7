"""The numbers of gradfn beside those of its peers, on models that take a second.

    python benchmarks/agree.py --bergson-python BERGSON/bin/python --kronfluence-python KRONFLUENCE/bin/python

A random GPT-NeoX (2 layers, width 32, vocabulary 128), 16 documents of 8 to 24 tokens and 3 queries, and for
kronfluence also a small MLP. Each peer runs in its own interpreter, in float64 wherever it lets one, and
writes what it found into one file; this process computes the same with gradfn in float64 and prints

    max|ours - theirs| / max|theirs|

over the entries of a block, the largest over blocks. A line with a bound fails the run when it is beyond it.
A line without one is a difference of convention: its reason stands beside it, and where there is a conversion
a line makes it. What the lines mean is in docs/agreement.md.
"""

# The peers are installed in their own environments.
# pyright: reportMissingImports=false

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXACT, SINGLE = 1e-9, 1e-4
"""Bounds where both sides compute in float64, and where the peer holds a step in float32."""
P = 4
DAMPINGS = {"relative": None, "absolute": 1e-8}
"""kronfluence's damping factors: None is a tenth of the mean eigenvalue, 1e-8 its default."""
DAMPING_WORDS = {"relative": "0.1 of the mean", "absolute": "1e-8"}
MIXING: dict[str, tuple[dict[str, list[float]], dict[str, list[float]], int]] = {
    "two blocks": ({"a": [3.0, 1.0], "b": [2.0, 0.5]}, {"a": [1.0, 0.25], "b": [4.0, 2.0]}, 3),
    "more components than eigenvalues": ({"a": [3.0, 1.0]}, {"a": [5.0, 2.0]}, 1000),
    "no such direction in the queries": ({"a": [3.0, 0.0]}, {"a": [5.0, 2.0]}, 2),
    "no such direction in training": ({"a": [3.0, 1.0]}, {"a": [5.0, 0.0]}, 2),
    "in neither": ({"a": [3.0, 0.0]}, {"a": [5.0, 0.0]}, 2),
    "no components": ({"a": [3.0, 1.0]}, {"a": [5.0, 2.0]}, 0),
    "a block of the queries alone": ({"a": [3.0, 1.0], "b": [2.0, 1.5]}, {"a": [5.0, 2.5]}, 2),
}
"""Eigenvalues of the queries' and the training rows' curvature by block, and the components to count less."""


# --- what every side reads


def prepare(folder: Path) -> None:
    """Write the model, its tokenizer, documents, queries, optimizer states, and the MLP with its data."""
    import torch
    import transformers as hf
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = hf.GPTNeoXConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    model = hf.GPTNeoXForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    hf.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64).save_pretrained(folder / "model")

    lengths = torch.randint(8, 25, (16,)).tolist()
    documents = [torch.randint(0, 128, (length,)).tolist() for length in lengths]
    queries = [torch.randint(0, 128, (12,)).tolist() for _ in range(3)]
    write_rows(folder / "documents.jsonl", [{"input_ids": ids} for ids in documents])
    write_rows(folder / "queries.jsonl", [{"input_ids": ids} for ids in queries])
    half = [[-100] * (len(ids) // 2) + ids[len(ids) // 2 :] for ids in documents]
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(documents, half, strict=True)]
    write_rows(folder / "completions.jsonl", rows)
    write_optimizer_states(folder, model)

    x, y = torch.randn(43, 12, dtype=torch.float64), torch.randint(0, 4, (43,))
    save_file({"x": x, "y": y}, folder / "mlp-data.safetensors")
    save_file(make_mlp().state_dict(), folder / "mlp.safetensors")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_optimizer_states(folder: Path, model: Any) -> None:
    """States of Adam and of transformers' Adafactor as its Trainer saves them, with random moments."""
    import torch

    def moments(shape: tuple[int, ...]):
        return 0.1 + torch.rand(shape, dtype=torch.float64)

    adam, adafactor = {}, {}
    for number, parameter in enumerate(model.parameters()):
        v = moments(tuple(parameter.shape))
        # So late a step that the correction of Adam's bias, which bergson leaves out, is a factor of 1.
        adam[number] = {"exp_avg_sq": v, "step": torch.tensor(1e9)}
        sides = {"exp_avg_sq_row": v.mean(-1), "exp_avg_sq_col": v.mean(-2)} if v.ndim == 2 else {}
        adafactor[number] = {**(sides or {"exp_avg_sq": v}), "step": 10**9}
    group = {"params": list(adam), "eps": 1e-8, "betas": (0.9, 0.999)}
    torch.save({"state": adam, "param_groups": [group]}, folder / "adam.pt")
    group = {"params": list(adam), "eps": (1e-30, 1e-3), "decay_rate": -0.8}
    torch.save({"state": adafactor, "param_groups": [group]}, folder / "adafactor.pt")


def make_mlp() -> Any:
    """Three layers of tanh, for units of ReLU may be dead and their eigenvectors then arbitrary."""
    from torch import float64, nn

    layers = nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 4)
    return nn.Sequential(*layers).to(float64)


def load_mlp(folder: Path) -> tuple[Any, Any, Any]:
    """The MLP, inputs and classes."""
    from safetensors.torch import load_file

    mlp = make_mlp()
    mlp.load_state_dict(load_file(folder / "mlp.safetensors"))
    data = load_file(folder / "mlp-data.safetensors")
    return mlp.eval(), data["x"], data["y"]


def load_model(folder: Path) -> Any:
    import torch
    import transformers as hf

    options = {"dtype": torch.float64, "attn_implementation": "sdpa"}
    return hf.AutoModelForCausalLM.from_pretrained(folder / "model", **options).eval()


# --- bergson, in its own interpreter


def run_bergson(folder: Path) -> dict[str, Any]:
    """All of bergson's numbers, as arrays by name."""
    from bergson.utils.math import compute_lambda

    found: dict[str, Any] = {}
    for reduction in ("sum", "mean"):
        found |= _bergson_rows(folder, f"rows-{reduction}", loss_reduction=reduction)
    for state in ("adam", "adafactor"):
        found |= _bergson_rows(folder, f"rows-{state}", optimizer_state=str(folder / f"{state}.pt"))
    for name, data, reduction in [
        ("sum", "documents", "sum"), ("mean", "documents", "mean"), ("completions", "completions", "sum"),
    ]:  # fmt: skip
        found |= _bergson_factors(folder, name, data, reduction)
    found |= _bergson_projected(folder) | _bergson_scores(folder)
    for name, (query, train, components) in MIXING.items():
        sides = [{b: (_tensor(v), None) for b, v in side.items()} for side in (query, train)]
        found[f"mixing/{name}"] = compute_lambda(*sides, target_components=components)
    return found


def _tensor(values: list[float]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.float64)


def _index(folder: Path, run: str, data: str = "documents", **options: Any) -> Any:
    """Settings of a run: float64, biases included, summed loss unless told otherwise."""
    from bergson.config import DataConfig, IndexConfig

    settings: dict[str, Any] = {
        "precision": "fp64", "include_bias": True, "loss_reduction": "sum", "token_batch_size": 64,
    }  # fmt: skip
    return IndexConfig(
        run_path=str(folder / run), model=str(folder / "model"),
        data=DataConfig(dataset=str(folder / f"{data}.jsonl")), **(settings | options),
    )  # fmt: skip


def _bergson_rows(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    from bergson.cli.commands import Build
    from bergson.config import PreprocessConfig
    from bergson.data import column_offsets, load_gradients

    Build(_index(folder, name, **options), PreprocessConfig()).execute()
    rows = load_gradients(folder / name)
    sizes = json.loads((folder / name / "info.json").read_text())["grad_sizes"]
    return {f"{name}/{block}": rows[:, lo:hi] for block, (lo, hi) in column_offsets(sizes).items()}


def _bergson_factors(folder: Path, name: str, data: str, reduction: str) -> dict[str, Any]:
    """Sums of both factors, K-FAC's and EK-FAC's eigenvalues, and the number of positions."""
    import torch
    from bergson.cli.commands import Hessian
    from bergson.config import HessianConfig
    from safetensors.numpy import load_file

    run = folder / f"kfac-{name}"
    options = {"ev_correction": True, "hessian_dtype": "fp64", "use_dataset_labels": True}
    Hessian(
        HessianConfig(method="kfac", **options), _index(folder, run.name, data, loss_reduction=reduction)
    ).execute()
    positions = int(torch.load(run / "total_processed.pt", weights_only=True))
    parts = {
        "A": "activation_sharded", "S": "gradient_sharded", "values": "eigenvalue_sharded",
        "corrected": "eigenvalue_correction_sharded",
    }  # fmt: skip
    found = {}
    for key, part in parts.items():
        scale = 1 / positions if key in ("A", "S") else 1
        for block, value in load_file(run / part / "shard_0.safetensors").items():
            found[f"kfac-{name}/{key}/{block}"] = value * scale
    return found


def _bergson_projected(folder: Path) -> dict[str, Any]:
    """The projection matrices, and the second moments of rows and queries that they projected."""
    from bergson.cli.commands import Hessian
    from bergson.collector.collector import HookCollectorBase, create_module_projection_matrix
    from bergson.config import HessianConfig
    from bergson.gradients import GradientProcessor
    from torch import device, float64

    found = {}
    index = _index(folder, "moments", projection_dim=P)
    Hessian(HessianConfig(method="autocorrelation"), index).execute()
    processor = GradientProcessor.load(folder / "moments")
    for block, H in processor.hessians.items():
        found[f"moments/{block}"] = H
        found[f"moment-values/{block}"] = processor.hessians_eigen[block][0]
    targets = HookCollectorBase.discover_targets(load_model(folder).base_model, None, True)
    for block in processor.hessians:
        _, (out, into), bias = targets[block]
        for side, width in (("left", out), ("right", into + bias)):
            found[f"projection/{side}/{block}"] = create_module_projection_matrix(
                block, side, P, width, float64, device("cpu"), "rademacher", "jl", None
            )
    return found


def _bergson_scores(folder: Path) -> dict[str, Any]:
    """Cosines of full gradients, TrackStar's scores, and influence by EK-FAC."""
    from bergson import config
    from bergson.cli.commands import Build, Ekfac, Score, Trackstar

    Build(_index(folder, "queries", "queries"), config.PreprocessConfig()).execute()
    cosine = config.PreprocessConfig(unit_normalize=True)
    scores = config.ScoreConfig(query_path=str(folder / "queries"), precision="auto")
    Score(scores, _index(folder, "cosine"), cosine).execute()

    query = config.QuerySetConfig(dataset=str(folder / "queries.jsonl"))
    trackstar = config.TrackstarConfig(
        query=query, preprocess_cfg=config.PreprocessConfig(unit_normalize=True),
        score_cfg=config.ScoreConfig(precision="auto"), target_downweight_components=20,
    )  # fmt: skip
    Trackstar(_index(folder, "trackstar", projection_dim=P), trackstar).execute()

    hessian = config.HessianConfig(
        method="kfac", ev_correction=True, hessian_dtype="fp64", use_dataset_labels=True
    )
    Ekfac(
        _index(folder, "ekfac"), hessian, config.ScoreConfig(precision="auto"), config.PreprocessConfig(),
        config.HessianPipelineConfig(query=query),
    ).execute()  # fmt: skip
    runs = {"cosine": "cosine", "trackstar": "trackstar/scores", "ekfac": "ekfac/scores"}
    return {f"scores/{name}": read_bergson_scores(folder / run) for name, run in runs.items()}


def read_bergson_scores(run: Path) -> Any:
    """`[rows, queries]`."""
    from bergson.data import load_scores

    return load_scores(run)[:]


# --- kronfluence, in its own interpreter


def run_kronfluence(folder: Path) -> dict[str, Any]:
    """All of kronfluence's numbers, as arrays by name."""
    import torch
    import torch.nn.functional as F

    _, x, y = load_mlp(folder)
    rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    train, query = rows[:40], rows[40:]

    def mlp_loss(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")

    found = {}
    for strategy in ("ekfac", "kfac"):
        name, modules = f"mlp-{strategy}", ["0", "2", "4"]
        found |= _analyse(folder, name, strategy, load_mlp(folder)[0], modules, mlp_loss, train, query)

    def lm_loss(model: Any, batch: Any) -> Any:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")

    train, query = (_padded(folder / f"{name}.jsonl") for name in ("documents", "queries"))
    linear = [
        name
        for name, module in load_model(folder).named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("gpt_neox.")
    ]
    for name, last in (("lm-ekfac", False), ("lm-ekfac-masked", True), ("lm-kfac", False)):
        strategy = name.split("-")[1]
        found |= _analyse(
            folder, name, strategy, load_model(folder), linear, lm_loss, train, query, _mask(last)
        )
    return found


def _padded(path: Path) -> list[dict]:
    import torch

    rows = [row["input_ids"] for row in read_rows(path)]
    longest = max(map(len, rows))
    return [
        {
            "input_ids": torch.tensor(ids + [0] * (longest - len(ids))),
            "labels": torch.tensor(ids + [-100] * (longest - len(ids))),
        }
        for ids in rows
    ]


def _mask(last: bool) -> Callable[[Any], Any]:
    """The positions that covariances are made of: all but padding, or of these all but the last one."""

    def mask(batch: Any) -> Any:
        real = batch["labels"] != -100
        # The last position predicts nothing and its gradient is 0: it is in A alone.
        return (real if last else all_but_last(real)).long()

    return mask


def all_but_last(real: Any) -> Any:
    """Of the positions of a right-padded batch that are real, those with another one behind them."""
    from torch.nn.functional import pad

    return pad(real[:, 1:], (0, 1))


def _analyse(
    folder: Path, name: str, strategy: str, model: Any, modules: list[str], loss: Callable, train: list,
    query: list, mask: Callable | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Factors, eigenvalues and scores of one strategy, everything in float64."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task
    from kronfluence.utils.common.factor_arguments import pytest_factor_arguments
    from kronfluence.utils.common.score_arguments import pytest_score_arguments

    class Attribution(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Any:
            return loss(model, batch)

        def compute_measurement(self, batch: Any, model: Any) -> Any:
            return loss(model, batch)

        def get_influence_tracked_modules(self) -> list[str]:
            return modules

        def get_attention_mask(self, batch: Any) -> Any:
            return None if mask is None else mask(batch)

    task = Attribution()
    analyzer = Analyzer(
        name, prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(folder)
    )
    analyzer.fit_all_factors("f", train, 8, factor_args=pytest_factor_arguments(strategy))
    found: dict[str, Any] = {}
    covariances = analyzer.load_covariance_matrices("f")
    for side, key in (("activation", "A"), ("gradient", "S")):
        for block, total in covariances[f"{side}_covariance"].items():
            count = covariances[f"num_{side}_covariance_processed"][block]
            found[f"{name}/{key}/{block}"] = total / count
    if strategy == "ekfac":
        parts = analyzer.load_lambda_matrices("f")
        for block, total in parts["lambda_matrix"].items():
            found[f"{name}/corrected/{block}"] = total / parts["num_lambda_processed"][block]
    for kind, damping in DAMPINGS.items():
        arguments = pytest_score_arguments(damping_factor=damping)
        analyzer.compute_pairwise_scores(kind, "f", query, train, 4, 8, score_args=arguments)
        found[f"{name}/scores-{kind}"] = analyzer.load_pairwise_scores(kind)["all_modules"].T
    return found


# --- ours, and the comparison


@dataclass(frozen=True)
class Line:
    """One comparison: the largest relative difference, its bound, and why it is not rounding alone."""

    what: str
    peer: str
    difference: float
    bound: float | None
    reason: str = ""

    @property
    def holds(self) -> bool:
        return self.bound is None or self.difference <= self.bound

    def __str__(self) -> str:
        difference = "refused" if self.difference != self.difference else f"{self.difference:.1e}"
        verdict = "" if self.bound is None else f"{self.bound:.0e}" + ("" if self.holds else " EXCEEDED")
        return f"| {self.what} | {self.peer} | {difference} | {verdict} | {self.reason} |"


def relative(ours: Any, theirs: Any) -> float:
    """`max|a - b| / max|b|`; the difference itself where b is 0."""
    import torch

    a, b = (torch.as_tensor(side, dtype=torch.float64).flatten() for side in (ours, theirs))
    return float((a - b).abs().max() / (b.abs().max() or 1.0))


def worst(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> float:
    """The largest over blocks; both sides must have the same ones."""
    found = {name.removeprefix(prefix): value for name, value in theirs.items() if name.startswith(prefix)}
    if ours.keys() != found.keys() or not ours:
        sys.exit(f"{prefix}: we have the blocks {sorted(ours)}, the peer {sorted(found)}")
    return max(relative(ours[block], found[block]) for block in ours)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Both curvatures of some data, and by block A, S, K-FAC's eigenvalues and EK-FAC's."""

    kfac: Any
    ekfac: Any
    parts: dict[str, dict[str, Any]]


def fitted(model: Any, data: Any, loss: Any) -> Fitted:
    import gradfn as gf
    from gradfn.statistics.fold import sums_of
    from gradfn.statistics.kfac import kfac_factors

    fold = gf.kfac()
    sums, _ = sums_of(fold, gf.probe_engine(model, loss, gf.chain(fold.stage())), data)
    sides = {name: kfac_factors(value, sums.shapes[name]) for name, value in sums.blocks.items()}
    K, E = fold.finalize(sums), gf.fit(gf.ekfac(), model, data, loss=loss)
    parts = {"S": {name: side[0] for name, side in sides.items()},
             "A": {name: side[1] for name, side in sides.items()},
             "values": {name: one.values for name, one in K.items()},
             "corrected": {name: one.values for name, one in E.items()}}  # fmt: skip
    return Fitted(K, E, parts)


class Ours:
    """The model in float64 and its data; bergson names layers below the base model, `short` likewise."""

    def __init__(self, folder: Path):
        import gradfn as gf

        self.folder, self.model = folder, load_model(folder)
        self.documents, self.queries, self.completions = (
            gf.make_documents([r["input_ids"] for r in rows], [r.get("labels", r["input_ids"]) for r in rows])
            for rows in (
                read_rows(folder / f"{name}.jsonl") for name in ("documents", "queries", "completions")
            )
        )
        self.loss = gf.causal_lm_loss(self.model, "sum")

    def short(self, blocks: Mapping[str, Any]) -> dict[str, Any]:
        prefix = self.model.base_model_prefix + "."
        return {name.removeprefix(prefix): value for name, value in blocks.items()}

    def rows(self, transform: Any = None, loss: Any = None) -> dict[str, Any]:
        import gradfn as gf

        blocks: Any = gf.collect(self.model, self.documents, transform, loss=loss or self.loss)
        return self.short(blocks)


def compare_rows(ours: Ours, theirs: Mapping[str, Any]) -> list[Line]:
    import gradfn as gf
    from gradfn.hf.optimizer_state import load_optimizer_state

    mean = gf.causal_lm_loss(ours.model, "mean")
    lines = [
        Line("gradient rows, summed loss", "bergson", worst(ours.rows(), theirs, "rows-sum/"), EXACT),
        Line("gradient rows, mean loss", "bergson", worst(ours.rows(loss=mean), theirs, "rows-mean/"), EXACT),
    ]
    adam = ours.rows(load_optimizer_state(ours.folder / "adam.pt", ours.model))
    lines.append(Line("rows divided by Adam's state", "bergson", worst(adam, theirs, "rows-adam/"), EXACT))
    state = load_optimizer_state(ours.folder / "adafactor.pt", ours.model)
    reason = "its bias is divided by `sqrt(v + 1e-8)`, ours by `sqrt(v)`, what Adafactor does"
    rows = ours.rows(state)
    difference = worst(rows, theirs, "rows-adafactor/")
    lines.append(Line("rows divided by Adafactor's state", "bergson", difference, 1e-6, reason))
    their_weights = {}
    for block, G in rows.items():
        shaped = theirs[f"rows-adafactor/{block}"].reshape(G.shape)
        their_weights[f"weights/{block}"] = shaped[..., :-1]
    difference = worst(_without_bias(rows), their_weights, "weights/")
    lines.append(Line("the same without the bias column", "bergson", difference, EXACT))
    rows = ours.rows(_adafactor(ours))
    difference = worst(_without_bias(rows), their_weights, "weights/")
    return [*lines, Line("weights divided by `adafactor` of means", "bergson", difference, EXACT)]


def _without_bias(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {name: G[..., :-1] for name, G in rows.items()}


def _adafactor(ours: Ours) -> Any:
    """`gf.transforms.adafactor` of the saved row and column means; any mean will do for the bias column."""
    import torch

    import gradfn as gf

    state = torch.load(ours.folder / "adafactor.pt", weights_only=True)["state"]
    numbers = {name: number for number, (name, _) in enumerate(ours.model.named_parameters())}
    means = {}
    for site in gf.model.find_sites(ours.model):
        one = state[numbers[site.names[0]]]
        means[site.block] = one["exp_avg_sq_row"], torch.cat([one["exp_avg_sq_col"], torch.ones(1)])
    return gf.transforms.adafactor(means)


def compare_factors(ours: Ours, theirs: Mapping[str, Any]) -> list[Line]:
    """Factors and eigenvalues of a summed loss, of a mean loss as it is and converted, of completions."""
    import gradfn as gf

    def lines(
        name: str, data: Any, loss: Any, label: str, bound: float | None, reason: str = ""
    ) -> list[Line]:
        found = fitted(ours.model, data, loss).parts
        what = {"A": "K-FAC's A", "S": "K-FAC's S"}
        what |= {"values": "K-FAC's eigenvalues", "corrected": "EK-FAC's eigenvalues"}
        lines = []
        for key, noun in what.items():
            difference = worst(ours.short(found[key]), theirs, f"kfac-{name}/{key}/")
            lines.append(Line(f"{noun}, {label}", "bergson", difference, bound, reason))
        return lines

    summed, mean = ours.loss, gf.causal_lm_loss(ours.model, "mean")
    reason = "bergson divides a document's gradient by the root of its tokens, we by their number"
    prompts = "bergson counts a prompt's positions, we only those that predict a supervised token"
    return [
        *lines("sum", ours.documents, summed, "summed loss", EXACT),
        *lines("mean", ours.documents, mean, "mean loss", None, reason)[1:],  # A does not depend on it
        *lines("mean", ours.documents, AsBergson(summed, root=True), "mean loss, converted", EXACT),
        *lines("completions", ours.completions, summed, "prompts unsupervised", None, prompts),
        *lines("completions", ours.completions, AsBergson(summed), "the same, converted", EXACT),
    ]


@dataclass(frozen=True, eq=False)
class AsBergson:
    """A summed loss as bergson's curvatures take it.

    Args:
        loss: ours.
        root: divide by the root of the number of predicted tokens, what bergson does for mean losses: then
            an outer product of gradients is the sum's over the number.
    """

    loss: Any
    root: bool = False

    def __call__(self, params: Any, example: Any) -> Any:
        return self.loss(params, example) / self._scale(example["labels"][None])[0]

    def batched(self, batch: Any) -> Any:
        return self.loss.batched(batch) / self._scale(batch["labels"])

    def positions(self, batch: Any, path: str) -> Any:
        # Padding, labelled -100, is behind a document's last token, whose label is never masked here.
        return all_but_last((batch["labels"] != -100).flip(1).cummax(1).values.flip(1))

    def _scale(self, labels: Any) -> Any:
        return (labels[:, 1:] != -100).sum(1).double().pow(0.5 if self.root else 0.0)


def given(left: Mapping[str, Any], right: Mapping[str, Any]) -> Any:
    """A projection by the matrices of somebody else."""
    from gradfn.linalg.kron import Kron
    from gradfn.transforms import Kronecker

    class Given(Kronecker):
        def kron(self, spec: Any) -> Kron:
            return Kron(left[spec.name].to(spec.dtype), right[spec.name].to(spec.dtype))

    return Given()


def compare_projected(ours: Ours, theirs: Mapping[str, Any]) -> list[Line]:
    """Second moments and TrackStar's scores behind bergson's own projection."""
    import torch

    import gradfn as gf

    prefix = ours.model.base_model_prefix + "."
    sides = [
        {
            prefix + name.removeprefix(f"projection/{side}/"): torch.as_tensor(value)
            for name, value in theirs.items()
            if name.startswith(f"projection/{side}/")
        }
        for side in ("left", "right")
    ]
    stage = given(*sides)
    options = {"transform": stage, "loss": ours.loss}
    H = gf.fit(gf.second_moment(), ours.model, ours.documents, **options)
    H_query = gf.fit(gf.second_moment(), ours.model, ours.queries, **options)
    dense = ours.short({name: one.dense() for name, one in H.items()})
    values = ours.short({name: one.values for name, one in H.items()})
    mixed = gf.mix(H_query, H, gf.statistics.mixing_coefficient(H_query, H, 20))
    method = gf.trackstar(mixed, stage)
    scores = gf.score(ours.model, ours.documents, ours.queries, method=method, loss=ours.loss).matrix
    float32 = "bergson's sums are float32"
    return [
        Line(f"second moments, p = {P}", "bergson", worst(dense, theirs, "moments/"), SINGLE, float32),
        Line("their eigenvalues", "bergson", worst(values, theirs, "moment-values/"), SINGLE, float32),
        Line("TrackStar's scores", "bergson", relative(scores, theirs["scores/trackstar"]), SINGLE, float32),
    ]


def compare_scores(ours: Ours, theirs: Mapping[str, Any]) -> list[Line]:
    import gradfn as gf

    def scores(method: Any) -> Any:
        return gf.score(ours.model, ours.documents, ours.queries, method=method, loss=ours.loss).matrix

    H = gf.fit(gf.ekfac(), ours.model, ours.documents, loss=ours.loss)
    cosine, influence = scores(gf.grad_cosine()), scores(gf.influence(H, damping=0.1))
    return [
        Line("cosines of full gradients", "bergson", relative(cosine, theirs["scores/cosine"]), SINGLE,
             "bergson divides by norms in float32"),
        Line("EK-FAC influence, damping 0.1 of the mean", "bergson",
             relative(influence, theirs["scores/ekfac"]), SINGLE, "bergson applies H^-1 in float32"),
    ]  # fmt: skip


def compare_mixing(theirs: Mapping[str, Any]) -> list[Line]:
    """The mixing coefficient at its edges."""
    import torch

    import gradfn as gf
    from gradfn.linalg.spectrum import Spectrum

    def curvature(values: Mapping[str, list[float]]) -> Any:
        spectra = {n: Spectrum(None, torch.eye(len(v)), _tensor(v)[None]) for n, v in values.items()}
        return gf.statistics.Curvature("second_moment", spectra, 1)

    reasons = {
        "in neither": "undefined (0/0): bergson takes 0.99, we 0.5",
        "no components": "bergson takes 1, we refuse it",
        "a block of the queries alone": "bergson pools common blocks, we refuse it",
    }
    lines = []
    for name, (query, train, components) in MIXING.items():
        try:
            ours = gf.statistics.mixing_coefficient(curvature(query), curvature(train), components)
        except gf.InputError:
            ours = float("nan")
        difference, reason = relative(ours, theirs[f"mixing/{name}"]), reasons.get(name, "")
        lines.append(
            Line(f"mixing coefficient: {name}", "bergson", difference, None if reason else EXACT, reason)
        )
    return lines


def compare_kronfluence(ours: Ours, theirs: Mapping[str, Any]) -> list[Line]:
    """Factors, eigenvalues and scores of the MLP and the language model."""
    import torch

    mlp, x, y = load_mlp(ours.folder)
    rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]

    def loss(params: Any, example: Any) -> Any:
        return torch.nn.functional.cross_entropy(
            torch.func.functional_call(mlp, params, example["x"]), example["y"]
        )

    small, large = (
        Side(mlp, rows[:40], rows[40:], loss),
        Side(ours.model, ours.documents, ours.queries, ours.loss),
    )
    masked = "it takes its mask's positions, a document's last among them, which predicts nothing"
    scale = "its K-FAC is `S x A` without the factor positions / rows"
    return [
        *small.lines("mlp-ekfac", theirs, "MLP"),
        *small.lines("mlp-kfac", theirs, "MLP"),
        *large.lines("lm-ekfac", theirs, "LM"),
        *large.lines("lm-ekfac-masked", theirs, "LM, mask of padding", masked),
        *large.lines("lm-kfac", theirs, "LM", scale, keys=()),
        *large.lines("lm-kfac", theirs, "LM, converted", keys=(), scale=large.positions_a_row),
    ]


@dataclass(frozen=True, eq=False)
class Side:
    """A model with its data, to compare with what kronfluence found for it."""

    model: Any
    train: Any
    query: Any
    loss: Any

    @property
    def positions_a_row(self) -> float:
        return sum(len(row["labels"]) - 1 for row in self.train) / len(self.train)

    def lines(
        self, name: str, theirs: Mapping[str, Any], label: str, reason: str = "", *,
        keys: tuple[str, ...] = ("A", "S", "corrected"), scale: float = 1.0,
    ) -> list[Line]:  # fmt: skip
        """The factors and eigenvalues named by `keys`, and the scores with both dampings.

        Args:
            name: of kronfluence's run; its second word is the curvature.
            scale: how many times theirs our curvature is.
        """
        kind = name.split("-")[1]
        found, bound = fitted(self.model, self.train, self.loss), None if reason else EXACT
        noun = {"kfac": "K-FAC", "ekfac": "EK-FAC"}[kind]
        what = {"A": f"{noun}'s A", "S": f"{noun}'s S", "corrected": f"{noun}'s eigenvalues"}
        lines = [
            Line(f"{what[key]}, {label}", "kronfluence", worst(found.parts[key], theirs, f"{name}/{key}/"),
                 bound, reason)
            for key in keys
            if key != "corrected" or kind == "ekfac"
        ]  # fmt: skip
        for damping, values in self._scores(getattr(found, kind), scale).items():
            what_ = f"{noun} scores, {label}, damping {DAMPING_WORDS[damping]}"
            difference = relative(values, theirs[f"{name}/scores-{damping}"])
            lines.append(Line(what_, "kronfluence", difference, bound, reason))
        return lines

    def _scores(self, curvature: Any, scale: float) -> dict[str, Any]:
        """Scores for each damping, of the curvature divided by `scale`."""
        import gradfn as gf

        dampings = gf.Damping(0.1), gf.Damping(1e-8 * scale, "absolute")
        method = gf.influence(curvature, damping=dampings)
        scores = gf.score(self.model, self.train, self.query, method=method, loss=self.loss)
        return dict(zip(DAMPINGS, scores.values * scale, strict=True))


# --- the process that compares


PEERS: dict[str, Callable[[Path], dict[str, Any]]] = {"bergson": run_bergson, "kronfluence": run_kronfluence}


def worker(peer: str, folder: Path) -> None:
    """Run one peer and leave its numbers in `PEER.npz`."""
    import numpy as np

    found = PEERS[peer](folder)
    arrays: dict[str, Any] = {name.replace("/", "|"): np.asarray(v) for name, v in found.items()}
    np.savez(folder / f"{peer}.npz", **arrays)


def ask(peer: str, python: str, folder: Path) -> dict[str, Any]:
    """A peer's numbers, from its own interpreter."""
    import numpy as np

    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    home = folder / f"in-{peer}"
    shutil.copytree(folder, home, ignore=shutil.ignore_patterns("in-*", "hf"))
    command = [python, __file__, "worker", peer, str(home)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
    if done.returncode:
        sys.exit(f"{peer} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    with np.load(home / f"{peer}.npz") as stored:
        return {name.replace("|", "/"): stored[name] for name in stored.files}


def version_of(peer: str, python: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({peer!r}), m.version('torch'))"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        sys.exit(f"{peer} is not installed for --{peer}-python")
    version, torch = asked.stdout.split()
    return f"{peer} {version} (torch {torch})"


def main() -> None:
    """Ask the peers that are there, compare, and print one markdown table."""
    parser = argparse.ArgumentParser(description="Numbers of gradfn beside those of its peers.")
    for peer in PEERS:
        parser.add_argument(
            f"--{peer}-python", metavar="PATH", help=f"interpreter of an environment with {peer}"
        )
    options = parser.parse_args()
    pythons = {peer: getattr(options, f"{peer}_python") for peer in PEERS}
    pythons = {peer: os.path.abspath(python) for peer, python in pythons.items() if python}
    if not pythons:
        parser.error("give --bergson-python, --kronfluence-python or both")
    versions = [
        f"gradfn {importlib.metadata.version('gradfn')} (torch {importlib.metadata.version('torch')})"
    ]
    versions += [version_of(peer, python) for peer, python in pythons.items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        theirs = {peer: ask(peer, python, folder) for peer, python in pythons.items()}
        lines = compare(Ours(folder), theirs)
    print(", ".join(versions) + ", float64, CPU.\n")
    print("| what | peer | largest relative difference | bound | why it is not rounding alone |")
    print("\n".join(["|---|---|---:|---:|---|", *map(str, lines)]))
    if not all(line.holds for line in lines):
        sys.exit("A difference is beyond its bound.")


def compare(ours: Ours, theirs: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    lines: list[Line] = []
    if bergson := theirs.get("bergson"):
        for part in (compare_rows, compare_factors, compare_projected, compare_scores):
            lines += part(ours, bergson)
        lines += compare_mixing(bergson)
    if kronfluence := theirs.get("kronfluence"):
        lines += compare_kronfluence(ours, kronfluence)
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
