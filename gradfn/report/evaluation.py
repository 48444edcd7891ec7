"""Tables of evaluations: what is shown, and what is exported."""

from collections.abc import Sequence
from math import isnan
from typing import Any

from rich.table import Table
from torch import Tensor

from gradfn.evaluate.bootstrap import Estimate, mean_estimate
from gradfn.evaluate.brittleness import Brittleness, Flips, Removal
from gradfn.evaluate.change import Agreement
from gradfn.evaluate.comparison import Compared, Comparison
from gradfn.evaluate.mislabel import auroc, average_precision, precision_at
from gradfn.evaluate.retrieval import recall_at, reciprocal_rank
from gradfn.evaluate.truth import Truth
from gradfn.report.summaries import Facts
from gradfn.report.tables import rows_table
from gradfn.report.words import count
from gradfn.scores import Scores


def columns(name: str, one: Estimate | None) -> dict[str, float | None]:
    """An estimate with the ends of its interval in an exported table; what is not known is empty.

    >>> columns("lds", Estimate(0.5, 0.4, float("nan")))
    {'lds': 0.5, 'lds_low': 0.4, 'lds_high': None}
    """
    values = (None, None, None) if one is None else one
    return {key: None if value is None or isnan(value) else value
            for key, value in zip(ends(name), values, strict=True)}  # fmt: skip


def ends(name: str) -> tuple[str, str, str]:
    """The columns of an estimate."""
    return name, f"{name}_low", f"{name}_high"


def between(one: Estimate) -> str:
    """The interval of an estimate, where it has one."""
    return "" if isnan(one.low) else f"{one.low:.2f} to {one.high:.2f}"


# --- scores beside retrained models


def comparison_facts(
    truth: Truth, told: Comparison, ceiling: Estimate | None, subsets: int, path: str
) -> Facts:
    """What scores are compared with."""
    kept = truth.of_models(truth.averaged())
    made = f"{count(subsets, 'subset')} x {_seeds(kept)}, of {count(len(truth.row_ids), 'row')}"
    how = f"{removed(truth.subsets):.3g} of the rows, {'masked' if truth.removal == 'mask' else 'dropped'}"
    lines = [("truth", path), ("models", made), ("removed", how), *_diverged(truth, kept)]
    whole, reported = len(truth.query_ids), len(told.queries)
    if reported < whole:
        lines.append(
            ("queries", f"{reported:,} of {whole:,}; dampings are chosen on the other {whole - reported:,}")
        )
    else:
        lines.append(("queries", f"{whole:,}"))
    if ceiling is None:
        why = "unknown, with one seed left of each subset: retrain with a lower --learning-rate"
        if truth.replicates == 1:
            why = "unknown, with one seed a subset: gradfn retrain --seeds 2 tells it"
            if truth.removal == "mask" and truth.seeding == "shared":
                why = "none, for one training that is repeated but for its masked rows has no noise"
        lines.append(("noise ceiling", why))
    for one in told.runs:
        if one.constant:
            queries = count(one.constant, "query")
            lines.append(("note", f"{one.name} has one score for all rows of {queries}, which count as 0"))
    return lines


def _diverged(truth: Truth, kept: Truth) -> Facts:
    """How many models diverged, and what is left out with them."""
    if not (diverged := int(truth.diverged.sum())):
        return []
    models = f"{diverged:,} of {count(len(truth.diverged), 'model')}"
    if truth.seeding == "independent":
        return [("diverged", f"{models}, which are in no mean")]
    lost = {
        noun: len(getattr(truth, name).unique()) - len(getattr(kept, name).unique())
        for noun, name in (("subset", "numbers"), ("seed", "seeds"))
    }
    left_out = " and ".join(count(number, noun) for noun, number in lost.items() if number)
    return [("diverged", f"{models}; left out for the means to be over the same seeds: {left_out}")]


def _seeds(kept: Truth) -> str:
    """How many models a subset has, and whether subsets share their seeds."""
    return count(kept.replicates, f"{kept.seeding} seed")


CEILING = "noise ceiling"


def removed(subsets: Tensor) -> float:
    """The mean share of the rows that subsets leave out.

    >>> import torch
    >>> removed(torch.tensor([[True, False], [True, True]]))
    0.25
    """
    return 1 - float(subsets.double().mean())


def comparison_lines(told: Comparison, ceiling: Estimate | None) -> list[dict[str, str]]:
    """Correlations of runs with retrained models, and the noise ceiling below them, as they are shown."""
    lines = [
        {"run": one.name, "damping": one.damping, "LDS": f"{one.lds.value:.3f}",
         "95 % interval": between(one.lds), "of ceiling": _share(one.lds, ceiling),
         "Pearson": f"{one.pearson.value:.3f}", "95 % interval ": between(one.pearson)}
        for one in told.runs
    ]  # fmt: skip
    if ceiling is not None:
        lines.append({"run": CEILING, "LDS": f"{ceiling.value:.3f}", "95 % interval": between(ceiling)})
    return lines


def comparison_table(lines: Sequence[dict[str, str]]) -> Table:
    """The lines of all ground truths as a table."""
    names = ("truth", "removed", "run", "damping", "LDS", "95 % interval", "of ceiling", "Pearson",
             "95 % interval ")  # fmt: skip
    return rows_table(lines, names, left=("truth", "run", "damping"))


def _share(one: Estimate, ceiling: Estimate | None) -> str:
    return f"{one.value / ceiling.value:.0%}" if ceiling and ceiling.value > 0 else ""


def comparison_row(
    one: Compared, told: Comparison, ceiling: Estimate | None, truth: Truth, subsets: Tensor
) -> dict[str, Any]:
    """A run in the exported table."""
    return {
        "run": one.name, "damping": one.damping,
        **columns("lds", one.lds), **columns("pearson", one.pearson), **columns("ceiling", ceiling),
        "share_of_ceiling": one.lds.value / ceiling.value if ceiling and ceiling.value > 0 else None,
        "subsets": len(subsets), "removed": removed(subsets), "removal": truth.removal,
        "models": len(truth.diverged), "diverged": int(truth.diverged.sum()),
        "seeding": truth.seeding, "queries": len(told.queries),
    }  # fmt: skip


# --- brittleness


def removal_facts(
    truth: Truth, kept: Truth, parts: Sequence[Removal], full: Tensor, flipped: Flips | None, path: str
) -> Facts:
    """What was removed."""
    queries = count(len(full), "query")
    each = "all queries together" if truth.settings.get("subsets", {}).get("together") else queries
    controls = count(min(len(part.random) for part in parts), "random removal")
    lines = [
        ("truth", path),
        ("models", f"{each} x {count(len(parts), 'size')}, {controls} of each size, {_seeds(kept)}"),
        ("removed", f"rows are {'masked' if truth.removal == 'mask' else 'dropped'}"),
        ("full model", f"mean loss {float(full.mean()):.3f}"),
    ]
    if flipped is not None:
        lines.append(("predictions", f"{flipped.right:,} of {queries} right, which are those that can flip"))
    return [*lines, *_diverged(truth, kept)]


def removal_line(k: int, one: Brittleness, flipped: Flips | None) -> dict[str, str]:
    """What removing `k` rows does, as it is shown."""
    rises = {"removed": f"{k:,}", "loss rises by": _signed(one.rise), "by chance": _signed(one.by_chance),
             "above chance": f"{one.above_chance.value:.0%}",
             "standard errors": _in_errors(one.in_errors)}  # fmt: skip
    if flipped is not None and flipped.flipped is not None and flipped.flipped_by_chance is not None:
        by_chance = f"{flipped.flipped_by_chance.value:.0%} by chance"
        return {**rises, "predictions flip": f"{flipped.flipped.value:.0%}, {by_chance}"}
    if one.lost is None or one.lost_by_chance is None:
        return rises
    return {**rises, "answers lost": f"{one.lost.value:.0%}, {one.lost_by_chance.value:.0%} by chance"}


def removal_row(k: int, one: Brittleness, flipped: Flips | None) -> dict[str, Any]:
    """What removing `k` rows does, in the exported table."""
    more = dict.fromkeys(Flips._fields) if flipped is None else flipped._asdict()
    row: dict[str, Any] = {"k": k, "right": more.pop("right")}
    for name, estimate in {**one._asdict(), **more}.items():
        row |= columns(name, estimate)
    return row


def _in_errors(one: Estimate) -> str:
    """How far above chance, in standard errors."""
    if isnan(one.value):
        return ""
    return f"{one.value:+.1f}" + ("" if isnan(one.low) else f" ({one.low:.1f} to {one.high:.1f})")


def _signed(one: Estimate) -> str:
    return f"{one.value:+.3f}" + ("" if isnan(one.low) else f" ({one.low:.3f} to {one.high:.3f})")


# --- predicted and real changes


def change_facts(truth: Truth, path: str, of_all: bool) -> Facts:
    """What predicted changes are compared with."""
    kept = truth.of_models(truth.averaged())
    models = count(len(kept.numbers.unique()), "training")
    how = "rows masked" if truth.removal == "mask" else "rows dropped"
    if truth.weights is not None:
        how = f"{'rows' if truth.weights.ndim == 2 else 'tokens'} at weights of their own"
    return [
        ("truth", path),
        ("models", f"{models} x {_seeds(kept)}, {how}"),
        ("changes", "from the model of all rows" if of_all else "from the mean over models"),
        *_diverged(truth, kept),
    ]


def change_line(run: str, damping: str, size: float, models: int, told: Agreement) -> dict[str, Any]:
    """How changes agree at one size of steps: numbers, and beside them what is shown."""
    row: dict[str, Any] = {"run": run, "damping": damping, "step": size, "models": models}
    for name, one in told._asdict().items():
        row |= columns(name, one) | {f"{name} (95 % interval)": _between(one)}
    return row


def _between(one: Estimate) -> str:
    """An estimate of either sign with its interval."""
    return "" if isnan(one.value) else f"{one.value:.3f}" + ("" if isnan(one.low) else f" ({between(one)})")


# --- known answers


def mislabel_row(run: Scores, number: int, wrong: Tensor, k: int) -> dict[str, Any]:
    """How well self-influence at one damping finds wrong rows: numbers, and beside them what is shown."""
    scores = run.values[number, :, 0]
    found = auroc(scores, wrong), average_precision(scores, wrong), precision_at(scores, wrong, k)
    names = ("auroc", "average_precision", "precision_at_k")
    shown = ("AUROC", "average precision", f"precision@{k}")
    return {
        "run": run.name, "damping": run.dampings[number], "k": k, **dict(zip(names, found, strict=True)),
        **{name: f"{value:.3f}" for name, value in zip(shown, found, strict=True)},
    }  # fmt: skip


def recall_rows(run: Scores, sources: Tensor, k: int) -> list[dict[str, Any]]:
    """How often sources are found, a row a damping: numbers, and beside them what is shown."""
    table = []
    for damping, scores in zip(run.dampings, run.values, strict=True):
        first, among = (mean_estimate(recall_at(scores, sources, n)) for n in (1, k))
        mrr = mean_estimate(reciprocal_rank(scores, sources))
        row = {"run": run.name, "damping": damping, "k": k, "queries": sources.shape[1]}
        for name, one in (("recall_at_1", first), ("recall_at_k", among), ("mrr", mrr)):
            row |= columns(name, one)
        for name, one in (("recall@1", first), (f"recall@{k}", among), ("MRR", mrr)):
            row[name] = f"{one.value:.3f}" + (f" ({interval})" if (interval := between(one)) else "")
        table.append(row)
    return table
