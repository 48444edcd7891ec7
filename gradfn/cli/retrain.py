"""`gradfn retrain`: the ground truth of attribution, models retrained on subsets."""

from typing import Any

import torch
from torch import Tensor

from gradfn.cli.commands import RetrainRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, anchored, check_run, check_trained, checked, recorded
from gradfn.cli.queries import load_all
from gradfn.cli.subsets import SubsetOptions
from gradfn.data import Corpus
from gradfn.errors import InputError
from gradfn.evaluate.brittleness import brittleness_subsets
from gradfn.evaluate.scored import single_scores
from gradfn.evaluate.subsets import check_fraction, leave_one_out, random_subsets
from gradfn.evaluate.truth import Retraining, Truth, retrain, shard_of_models
from gradfn.hf.models import fresh
from gradfn.model.params import params_of
from gradfn.report.progress import progress_bar
from gradfn.report.summaries import Facts, device_facts, next_facts
from gradfn.report.tables import facts
from gradfn.report.words import count
from gradfn.runs.shards import shard_run

SUBSETS = 50
"""Random subsets, unless told."""


NEEDS = "retraining needs a model, a dataset and queries"


def run_retrain(request: RetrainRequest) -> None:
    """Load, retrain, report."""
    check_run(request.run)
    _check_subsets(request)
    if request.query.query is None:
        raise InputError(f"no --query: {NEEDS}")
    check_trained(request)
    request = checked(request, NEEDS)
    shard, training = request.output.shard, request.training.training()
    loaded, train, asked = load_all(request)
    assert asked is not None
    queries, options, seed = asked.documents, request.subsets, request.seed
    subsets, how = _subsets(options, seed, train, queries)
    console().print(facts(_subject_facts(loaded, train, queries, subsets, request)))
    if hasattr(loaded.model, "peft_config"):
        raise InputError(f"{loaded.name} has adapters, and whole models are retrained: merge them into it")
    given = request.training.init == "given"
    start = params_of(loaded.model) if given else lambda: fresh(loaded.model)
    retraining = Retraining(
        start, loaded.subject.loss, training, subsets, query_loss=loaded.subject.query_loss,
        seeds=options.seeds, seed=seed, seeding=options.seeding, removal=options.removal,
    )  # fmt: skip
    placed, _ = retraining.models().placed(options.removal)
    own = shard_of_models(len(placed), shard)
    total = training.epochs * int(placed[own.start : own.stop].sum())
    known = {key: value for key, value in loaded.settings().items() if key != "layers"}
    query_loss = {"query_loss": loaded.loss_settings(loaded.subject.query_loss)}
    with loaded.multiplying(), progress_bar("retraining", total, "examples") as progress:
        truth = retrain(
            request.run, retraining, train, queries, shard=shard, overwrite=request.output.overwrite,
            settings={**known, **query_loss, **recorded(request), "subsets": how}, progress=progress,
        )  # fmt: skip
    path = f"{shard_run(request.run, shard) / 'truth.h5'}"
    console().print(facts([*_truth_facts(truth, path), *next_facts(request.run, shard)]))


def _check_subsets(request: RetrainRequest) -> None:
    """Refuse sizes of subsets that do not go together."""
    options = request.subsets
    given = [name for name in ("fraction", "leave_out", "remove_top") if getattr(options, name) is not None]
    if len(given) > 1:
        both = " and ".join(f"--{name.replace('_', '-')}" for name in given[:2])
        raise InputError(f"{both} both say what a subset is: give one of them")
    for fraction in options.fraction or ():
        check_fraction(fraction)
    if len(set(options.fraction or ())) < len(options.fraction or ()):
        raise InputError(
            f"--fraction {', '.join(map(str, options.fraction or ()))} has one twice: give each once"
        )
    if (options.remove_top is None) != (options.scores is None):
        raise InputError("--remove-top removes the best rows of --scores, a run: give both, or neither")
    if options.remove_top is not None and options.subsets is not None:
        raise InputError("--remove-top says which subsets there are: leave out --subsets")


def _subsets(
    options: SubsetOptions, seed: int, train: Corpus, queries: Corpus
) -> tuple[Tensor, dict[str, Any]]:
    """The subsets, and how they were made."""
    rows, number = len(train), options.subsets
    if options.remove_top is not None and options.scores is not None:
        how = {"remove_top": list(options.remove_top), "scores": anchored(options.scores),
               "first": "all rows", "seed": seed, "answer_tokens": _answer_tokens(queries)}  # fmt: skip
        scores = single_scores(options.scores, train, queries)
        return brittleness_subsets(scores, list(options.remove_top), seed=seed), how
    if options.leave_out == 1:
        masks = leave_one_out(rows, rows if number is None else number, seed)
        return masks, {"leave_out": 1, "seed": seed}
    number = SUBSETS if number is None else number
    if options.leave_out is not None:
        masks = random_subsets(rows, number, leave_out=options.leave_out, seed=seed)
        return masks, {"leave_out": options.leave_out, "seed": seed}
    shares = options.fraction or (0.5,)
    masks = torch.cat([random_subsets(rows, number, fraction, seed=seed) for fraction in shares])
    return masks, {"fraction": [*shares] if len(shares) > 1 else shares[0], "seed": seed}


def _answer_tokens(queries: Corpus) -> int:
    """Of the longest answer; a class is one."""
    return 1 if "labels" in getattr(queries, "extras", {}) else int(queries.supervised.max())


# --- what is said


def _subject_facts(
    loaded: Loaded, train: Corpus, queries: Corpus, subsets: Tensor, request: RetrainRequest
) -> Facts:
    options, seeds = request.training, request.subsets.seeds
    masked = ", others masked" if request.subsets.removal == "mask" else ""
    of_its_own = ", none shared" if request.subsets.seeding == "independent" else ""
    found = sorted({*subsets.sum(1).tolist()})
    of = f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
    numbers = sum(p.numel() for p in loaded.model.parameters())
    init = "its own" if options.init == "given" else "new"
    schedule = "" if options.schedule == "constant" else f", {options.schedule} schedule"
    return [
        *loaded.notes,
        *device_facts(loaded.model, loaded.products),
        ("model", f"{loaded.name} ({count(numbers, 'parameter')}, all trained, from {init} weights)"),
        ("train", f"{count(len(train), 'row')}, {count(int(train.lengths.sum()), 'token')}"),
        ("queries", f"{len(queries):,}"),
        ("models", f"{len(subsets) * seeds:,} ({count(len(subsets), 'subset')} of {of} rows{masked}, "
                   f"{count(seeds, 'seed')} each{of_its_own})"),
        ("training", f"{count(options.epochs, 'epoch')} of {options.optimizer}, batches of "
                     f"{options.batch_size}, learning rate {options.learning_rate:g}{schedule}"),
    ]  # fmt: skip


def _truth_facts(truth: Truth, path: str) -> Facts:
    models, queries = truth.losses.shape
    good = ~truth.diverged
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
