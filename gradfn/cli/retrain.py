"""`gradfn retrain`: the ground truth of attribution, models retrained on subsets."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradfn.cli import inputs
from gradfn.cli.inputs import Options, Subject, anchored
from gradfn.cli.merge import next_facts
from gradfn.cli.queries import load_all
from gradfn.cli.show import console, count, facts, progress_bar
from gradfn.data import Corpus
from gradfn.errors import InputError
from gradfn.evaluate.brittleness import brittleness_subsets
from gradfn.evaluate.scored import evaluated_scores, refuse_other_data
from gradfn.evaluate.subsets import FEWEST, check_fraction, leave_one_out, random_subsets
from gradfn.evaluate.truth import Truth, retrain, subsets_of_models
from gradfn.model.params import params_of
from gradfn.random import words
from gradfn.runs.shards import parse_shard, shard_run
from gradfn.train import Start, Training

SUBSETS = 50
"""Random subsets, unless told."""
WHOLE: dict[str, Any] = {
    "by": "example", "include": None, "exclude": None, "query_path": None, "token_batch_size": 4096,
}  # fmt: skip
"""What other commands choose: here models are trained whole, and batches are of rows."""


def run_retrain(**options: Any) -> None:
    """Load, retrain, report."""
    inputs.check_run(options["run"])
    options = {**options, **WHOLE}
    inputs.check_options(options)
    for name in ("model", "dataset", "query"):
        if options[name] is None:
            raise InputError(f"no --{name}: retraining needs a model, a dataset and queries")
    _check_precision(options["precision"])
    shard, training = parse_shard(options["shard"]), training_of(options)
    ks = removed_of(options)
    subject, train, asked = load_all(options)
    subsets, how = _subsets(options, ks, train, asked)
    console().print(facts(_subject_facts(subject, train, asked, subsets, options)))
    start = start_of(subject, options)
    own = subsets_of_models(len(subsets), options["seeds"], shard)
    total = training.epochs * int(subsets.sum(1)[own].sum())
    with subject.multiplying(), progress_bar("retraining", total, "examples") as progress:
        truth = retrain(
            options["run"], start, train, asked, loss=subject.loss, query_loss=subject.query_loss,
            subsets=subsets, training=training, seeds=options["seeds"], seed=options["seed"], shard=shard,
            settings=_settings(subject, options, how), overwrite=options["overwrite"], progress=progress,
        )  # fmt: skip
    console().print(facts([*_truth_facts(truth, options, shard), *next_facts(options["run"], shard)]))


def _check_precision(precision: str | None) -> None:
    """Refuse weights of 16 bits before anything is loaded."""
    if precision in ("bf16", "fp16"):
        raise InputError(
            f"--precision {precision} rounds most steps of training to nothing: give fp32, or tf32, whose "
            "weights are float32 too"
        )


def training_of(options: Options) -> Training:
    """The training that the options name, refused before anything is loaded."""
    return Training(
        options["epochs"], options["batch_size"], options["learning_rate"], options["optimizer"].value,
        momentum=options["momentum"], weight_decay=options["weight_decay"],
        schedule=options["schedule"].value, warmup=options["warmup"],
    )  # fmt: skip


def removed_of(options: Options) -> list[int]:
    """The numbers of --remove-top; refuses sizes of subsets that do not go together."""
    given = [name for name in ("fraction", "leave_out", "remove_top") if options[name] is not None]
    if len(given) > 1:
        both = " and ".join(f"--{name.replace('_', '-')}" for name in given[:2])
        raise InputError(f"{both} both say what a subset is: give one of them")
    if options["fraction"] is not None:
        check_fraction(options["fraction"])
    text = options["remove_top"]
    if (text is None) != (options["scores"] is None):
        raise InputError("--remove-top removes the best rows of --scores, a run: give both, or neither")
    if text is not None and options["subsets"] is not None:
        raise InputError("--remove-top says which subsets there are: leave out --subsets")
    try:
        return [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise InputError(f"--remove-top {text} are not whole numbers: give 10,20, say") from None


def _subsets(options: Options, ks: list[int], train: Corpus, asked: Corpus) -> tuple[Tensor, dict[str, Any]]:
    """The subsets, and how they were made."""
    rows, number, seed = len(train), options["subsets"], options["seed"]
    if ks:
        how = {"remove_top": ks, "scores": anchored(options["scores"]), "first": "all rows", "seed": seed,
               "answer_tokens": _answer_tokens(asked)}  # fmt: skip
        return _without_best(options["scores"], ks, train, asked, seed), how
    if options["leave_out"] == 1:
        return _without_one(rows, number, seed), {"leave_out": 1, "seed": seed}
    number = SUBSETS if number is None else number
    if options["leave_out"] is not None:
        masks = random_subsets(rows, number, leave_out=options["leave_out"], seed=seed)
        return masks, {"leave_out": options["leave_out"], "seed": seed}
    fraction = 0.5 if options["fraction"] is None else options["fraction"]
    return random_subsets(rows, number, fraction, seed=seed), {"fraction": fraction, "seed": seed}


def _answer_tokens(asked: Corpus) -> int:
    """Of the longest answer; a class is one."""
    return 1 if "labels" in getattr(asked, "extras", {}) else int(asked.supervised.max())


def _without_one(rows: int, number: int | None, seed: int) -> Tensor:
    """Subsets without a row each: of all rows, or of so many drawn at random."""
    if number is not None and not FEWEST <= number <= rows:
        raise InputError(
            f"leaving out one of {rows:,} rows makes {FEWEST} to {rows:,} subsets, not {number:,}: give "
            "--subsets of these, or none for all"
        )
    order = torch.from_numpy(words(rows, "leave one out", seed).argsort(kind="stable"))
    return leave_one_out(rows)[order[:number]]


def _without_best(run: str, ks: list[int], train: Corpus, asked: Corpus, seed: int) -> Tensor:
    """All rows, those without the best of each query by scores of these rows and queries, and controls."""
    scored = evaluated_scores(run)
    fingerprints = {
        "data": {"fingerprint": train.fingerprint()},
        "query": {"fingerprint": asked.fingerprint()},
    }
    here = replace(scored, row_ids=list(train.ids), query_ids=list(asked.ids), settings=fingerprints)
    refuse_other_data(scored, here, run, "what is retrained")
    if len(scored.dampings) > 1:
        raise InputError(
            f"{run} has scores for {len(scored.dampings)} dampings, and rows are removed by one: score with "
            "one --damping"
        )
    return brittleness_subsets(scored.values[0], ks, seed=seed)


def start_of(subject: Subject, options: Options) -> Start:
    """The model's own weights, or what makes new ones of its architecture."""
    if hasattr(subject.model, "peft_config"):
        raise InputError(f"{subject.name} has adapters, and whole models are retrained: merge them into it")
    if options["init"] == "given":
        return params_of(subject.model)
    return _maker(subject.model)


def _maker(model: nn.Module) -> Callable[[], nn.Module]:
    config: Any = model.config
    like = next(model.parameters())
    make: Any = type(model)
    return lambda: make(config).to(like.device, like.dtype).eval()


def _settings(subject: Subject, options: Options, how: dict[str, Any]) -> dict[str, Any]:
    known = subject.settings()
    del known["layers"]
    return {
        **known,
        "query_loss": subject.loss_settings(subject.query_loss),
        "data": {"path": anchored(options["dataset"]), "split": options["split"]},
        "subsets": how,
    }


def _subject_facts(
    subject: Subject, train: Corpus, asked: Corpus, subsets: Tensor, options: Options
) -> list[tuple[str, str]]:
    sizes = sorted({*subsets.sum(1).tolist()})
    of = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    numbers = sum(p.numel() for p in subject.model.parameters())
    told = training_of(options)
    init = "its own" if options["init"].value == "given" else "new"
    rate = f"learning rate {told.learning_rate:g}"
    shown = "" if told.schedule == "constant" else f", {told.schedule} schedule"
    return [
        ("model", f"{subject.name} ({count(numbers, 'parameter')}, all trained, from {init} weights)"),
        ("train", f"{count(len(train), 'row')}, {count(int(train.lengths.sum()), 'token')}"),
        ("queries", f"{len(asked):,}"),
        ("models", f"{len(subsets) * options['seeds']:,} ({count(len(subsets), 'subset')} of {of} rows, "
                   f"{count(options['seeds'], 'seed')} each)"),
        ("training", f"{count(told.epochs, 'epoch')} of {told.optimizer}, batches of {told.batch_size}, "
                     f"{rate}{shown}"),
    ]  # fmt: skip


def _truth_facts(truth: Truth, options: Options, shard: Any) -> list[tuple[str, str]]:
    models, queries = truth.losses.shape
    good = ~truth.diverged
    path = shard_run(options["run"], shard) / "truth.h5"
    lines = [("truth", f"{path} [{count(models, 'model')}, {count(queries, 'query')}]")]
    if bool(good.any()):
        lines.append((
            "losses", f"{float(truth.train_losses[good].mean()):.4g} on the rows of the last epoch, "
                      f"{float(truth.losses[good].mean()):.4g} on the queries",
        ))  # fmt: skip
    if bad := int(truth.diverged.sum()):
        lines.append((
            "diverged", f"{count(bad, 'model')}, counted in no mean: lower --learning-rate if that is many",
        ))  # fmt: skip
    if truth.looped:
        lines.append(("note", f"these models do not stack and were trained one by one ({truth.looped})"))
    return lines
