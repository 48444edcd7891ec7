"""`gradfn retrain`: the ground truth of attribution, models retrained on subsets."""

from typing import Any

import torch
from torch import Tensor

from gradfn.cli.commands import RetrainRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, anchored, check_run, check_trained, checked, recorded
from gradfn.cli.queries import load_all
from gradfn.cli.request import flag
from gradfn.cli.subsets import SubsetOptions
from gradfn.data import Corpus
from gradfn.errors import InputError
from gradfn.evaluate.brittleness import brittleness_subsets
from gradfn.evaluate.change import padded_weights, step_weights
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
    subsets, weights, how = _subsets(options, seed, train, queries)
    console().print(facts(_subject_facts(loaded, train, queries, subsets, request)))
    if hasattr(loaded.model, "peft_config"):
        raise InputError(f"{loaded.name} has adapters, and whole models are retrained: merge them into it")
    given = request.training.init == "given"
    start = params_of(loaded.model) if given else lambda: fresh(loaded.model)
    retraining = Retraining(
        start, loaded.subject.loss, training, subsets, query_loss=loaded.subject.query_loss,
        seeds=options.seeds, seed=seed, seeding=options.seeding, removal=options.removed_by,
        weights=weights,
    )  # fmt: skip
    placed, _ = retraining.models().placed(options.removed_by)
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
    names = ("fraction", "leave_out", "remove_top", "step")
    given = [flag(name) for name in names if getattr(options, name) is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given[:2])} both say what a subset is: give one of them")
    for fraction in options.fraction or ():
        check_fraction(fraction)
    shares = options.fraction or ()
    if len(set(shares)) < len(shares):
        raise InputError(f"--fraction {','.join(map(str, shares))} has one twice: give each once")
    scored = options.remove_top is not None or options.step is not None
    if scored != (options.scores is not None):
        raise InputError("--remove-top and --step go by a run, --scores: give both, or neither")
    if scored and options.subsets is not None:
        raise InputError(f"{given[0]} says which subsets there are: leave out --subsets")
    if options.together and not scored:
        raise InputError("--together is of --remove-top and --step: give one of them, or leave it out")
    if options.step is not None and options.removal == "drop":
        raise InputError("--step needs rows that keep their places: leave out --removal, or give mask")


def _subsets(
    options: SubsetOptions, seed: int, train: Corpus, queries: Corpus
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The subsets, the weights of rows in them if not 1, and how both were made."""
    rows, number = len(train), options.subsets
    if options.scores is not None:
        return _scored(options, options.scores, seed, train, queries)
    if options.leave_out == 1:
        masks = leave_one_out(rows, rows if number is None else number, seed)
        return masks, None, {"leave_out": 1, "seed": seed}
    number = SUBSETS if number is None else number
    if options.leave_out is not None:
        masks = random_subsets(rows, number, leave_out=options.leave_out, seed=seed)
        return masks, None, {"leave_out": options.leave_out, "seed": seed}
    shares = (0.5,) if options.fraction is None else options.fraction
    masks = torch.cat([random_subsets(rows, number, fraction, seed=seed) for fraction in shares])
    return masks, None, {"fraction": shares[0] if len(shares) == 1 else [*shares], "seed": seed}


def _scored(
    options: SubsetOptions, run: str, seed: int, train: Corpus, queries: Corpus
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """The same by scores: without the best rows, or at steps against their direction."""
    scored, together = single_scores(run, train, queries, tokens=options.step is not None), options.together
    how: dict[str, Any] = {"scores": anchored(run), "first": "all rows"}
    if together:
        how["together"] = True
    if options.step is not None:
        weights = step_weights(scored.matrix, options.step, together=together)
        if scored.documents is not None:
            weights, how["by"] = padded_weights(weights, scored.documents.bincount()), "token"
        everywhere = torch.ones(len(weights), len(train), dtype=torch.bool)
        return everywhere, weights, {"step": [*options.step], **how}
    ks = [*(options.remove_top or ())]
    how |= {"seed": seed, "answer_tokens": _answer_tokens(queries)}
    masks = brittleness_subsets(scored.matrix, ks, controls=options.controls, seed=seed, together=together)
    return masks, None, {"remove_top": ks, **how}


def _answer_tokens(queries: Corpus) -> int:
    """Of the longest answer; a class is one."""
    return 1 if "labels" in getattr(queries, "extras", {}) else int(queries.supervised.max())


# --- what is said


def _subject_facts(
    loaded: Loaded, train: Corpus, queries: Corpus, subsets: Tensor, request: RetrainRequest
) -> Facts:
    options, seeds = request.training, request.subsets.seeds
    masked = ", others masked" if request.subsets.removed_by == "mask" else ""
    if request.subsets.step is not None:
        masked = f" at weights of their own, {count(len(request.subsets.step), 'step')} a direction"
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
