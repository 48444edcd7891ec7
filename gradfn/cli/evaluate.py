"""`gradfn evaluate`: what scores are worth, against retrained models, known answers and other scores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfn.cli.console import console
from gradfn.cli.evaluations import (
    BrittlenessRequest,
    ChangeRequest,
    ComparisonRequest,
    LdsRequest,
    LooRequest,
    MislabelRequest,
    OverlapRequest,
    RecallRequest,
)
from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import Estimate, mean_estimate
from gradfn.evaluate.brittleness import all_flips, brittleness, removals
from gradfn.evaluate.change import Agreement, Changes, agreement, changes, flat_weights
from gradfn.evaluate.comparison import Comparison, ceiling_of, compare, damping_curve
from gradfn.evaluate.correlation import correlation
from gradfn.evaluate.mislabel import check_k, marked
from gradfn.evaluate.overlap import jaccard, top_overlap
from gradfn.evaluate.retrieval import known_sources
from gradfn.evaluate.scored import (
    evaluated_scores,
    in_words,
    made_of,
    mismatch,
    refuse_other_data,
    sides_of,
)
from gradfn.evaluate.truth import Truth, open_truth
from gradfn.hf.datasets import load_rows, load_split, row_names
from gradfn.report.evaluation import (
    CEILING,
    between,
    change_facts,
    change_line,
    columns,
    comparison_facts,
    comparison_lines,
    comparison_row,
    comparison_table,
    ends,
    mislabel_row,
    recall_rows,
    removal_facts,
    removal_line,
    removal_row,
    removed,
)
from gradfn.report.exports import export_table
from gradfn.report.plots import Point, check_plot, plot_changes, plot_lds, plot_runs
from gradfn.report.tables import facts, rows_table
from gradfn.report.words import count
from gradfn.runs.provenance import DataSource
from gradfn.scores import Scores
from gradfn.store import storable


def run_lds(request: LdsRequest) -> None:
    """Compare runs of scores with models retrained on subsets."""
    _check_comparison(request)
    _compare(_parts(request.truth), request, title="Linear datamodeling score")


def run_loo(request: LooRequest) -> None:
    """The same for models retrained without one row each."""
    _check_comparison(request)
    truths = [(path, opened_truth(path).leaving_one_out()) for path in request.truth]
    _compare(truths, request, title="Leave-one-out correlation")


def _check_comparison(request: ComparisonRequest) -> None:
    """Refuse, before any work, what could not be drawn or written."""
    if abs(request.seed) >= 1 << 63:
        raise InputError(f"the seed {request.seed} is too large for random numbers: give one below 2^63")
    if request.plot is not None:
        check_plot(request.plot)
    request.table.check(request.output.overwrite, request.plot)


class _Compared(NamedTuple):
    """Runs beside one ground truth."""

    path: str
    truth: Truth
    told: Comparison
    ceiling: Estimate | None


def _parts(paths: Sequence[str]) -> list[tuple[str, Truth]]:
    """The ground truths, each size of subsets that was asked for on its own."""
    return [(path, part) for path in paths for part in opened_truth(path).by_fraction()]


def _compare(truths: Sequence[tuple[str, Truth]], request: ComparisonRequest, *, title: str) -> None:
    """Compare runs with ground truths: a table with a row for each of both."""
    runs, told, table = _opened(request.runs), list[dict[str, str]](), list[dict[str, Any]]()
    several, compared = len(truths) > 1, list[_Compared]()
    for path, truth in truths:
        for run, name in zip(runs, request.runs, strict=True):
            refuse_other_data(run, truth, name, path)
        subsets, losses = truth.targets()
        comparison = compare(runs, subsets, losses, seed=request.seed)
        ceiling = ceiling_of(truth, comparison.queries, request.seed)
        notes = [("note", note) for run in runs if (note := mismatch(run, truth))]
        console().print(facts([*comparison_facts(truth, comparison, ceiling, len(subsets), path), *notes]))
        which = {"truth": path} if len(request.truth) > 1 else {}
        which |= {"removed": f"{removed(subsets):.2%}"} if several else {}
        told += [{**which, **line} for line in comparison_lines(comparison, ceiling)]
        rows = [comparison_row(one, comparison, ceiling, truth, subsets) for one in comparison.runs]
        table += [{"truth": path, **row} for row in rows]
        compared.append(_Compared(path, truth, comparison, ceiling))
    console().print(comparison_table(told))
    export_table(table, tuple(table[0]), request.table.paths)
    if request.plot is not None:
        if several:
            _plot_fractions(compared, request.plot, title)
        else:
            _plot_runs(runs, compared[0], request, title)
        console().print(facts([("plot", str(request.plot))]))


def _plot_runs(runs: Sequence[Scores], compared: _Compared, request: ComparisonRequest, title: str) -> None:
    """A bar a run, and its dampings."""
    assert request.plot is not None
    (subsets, losses), told = compared.truth.targets(), compared.told
    plot_runs(
        {one.name: one.lds for one in told.runs}, request.plot, ceiling=compared.ceiling, title=title,
        dampings={run.name: damping_curve(run, subsets, losses, told.queries, seed=request.seed)
                  for run in runs if len(run.dampings) > 1},
        chosen={one.name: one.damping for one in told.runs},
    )  # fmt: skip


def _plot_fractions(compared: Sequence[_Compared], plot: Path, title: str) -> None:
    """A line a run over the shares of rows removed, and one for the ceilings, for each removal."""
    removals = {one.truth.removal for one in compared}
    points = [
        Point(name if len(removals) == 1 else f"{name} ({part.truth.removal})",
              removed(part.truth.subsets), *one)
        for part in compared
        for name, one in [*((run.name, run.lds) for run in part.told.runs), (CEILING, part.ceiling)]
        if one is not None
    ]  # fmt: skip
    plot_lds(points, plot, x_label="share of the rows removed", title=title)


def run_change(request: ChangeRequest) -> None:
    """What scores predict for models trained at other weights of rows, beside what came."""
    _check_comparison(request)
    runs, table = _opened(request.runs, tokens=True), list[dict[str, Any]]()
    drawn = dict[str, list[Changes]]()
    criteria = set()
    for path in request.truth:
        truth = opened_truth(path)
        if bool((truth.row_weights == 1).flatten(1).all(1).any()):
            truth = truth.whole_seeds()
        criteria.add(truth.settings.get("query_loss", truth.settings.get("loss", {})).get("criterion"))
        for number, (run, name) in enumerate(zip(runs, request.runs, strict=True)):
            refuse_other_data(sides_of(run), truth, name, path)
            weights = weights_of(run, truth, name, path)
            for damping, scores in zip(run.dampings, run.values, strict=True):
                found = changes(scores, weights, truth.targets()[1])
                if not number and damping == run.dampings[0]:
                    console().print(facts(change_facts(truth, path, found.of_all)))
                parts = [found.of_size(size) for size in found.size.unique().tolist()]
                table += [
                    change_line(run.name, damping, float(part.size[0]), len(part.size),
                                agreement(part, seed=request.seed))
                    for part in parts
                ]  # fmt: skip
                drawn.setdefault(f"{run.name} {damping}".strip(), []).extend(parts)
            if note := mismatch(run, truth):
                console().print(facts([("note", note)]))
    shown = [{**row, "step": f"{row['step']:.3g}", "models": f"{row['models']:,}"} for row in table]
    told = [f"{name} (95 % interval)" for name in Agreement._fields]
    console().print(rows_table(shown, ("run", "damping", "step", "models", *told)))
    exported = [*dict.fromkeys(table[0])]
    export_table(table, tuple(name for name in exported if name not in told), request.table.paths)
    if request.plot is not None:
        plot_changes(drawn, request.plot, unit="nats" if criteria == {"cross_entropy"} else "")
        console().print(facts([("plot", str(request.plot))]))


def weights_of(run: Scores, truth: Truth, name: str, path: str) -> Tensor:
    """The weights of what a run scores, rows or tokens, in a ground truth."""
    weights = truth.weighed()
    if (weights.ndim == 3) != (run.documents is not None):
        mine, theirs, by = ("rows", "tokens", "token") if weights.ndim == 3 else ("tokens", "rows", "example")
        raise InputError(
            f"{name} scores {mine}, and the models of {path} have weights of {theirs}: score with --by {by}"
        )
    return weights if run.documents is None else flat_weights(weights, run.documents.bincount())


def run_brittleness(request: BrittlenessRequest) -> None:
    """What removing each query's best proponents does, beside removing random rows."""
    request.table.check(request.output.overwrite)
    truth = opened_truth(request.truth)
    kept = truth.whole_seeds()
    subsets, losses = kept.targets()
    together = bool(truth.settings.get("subsets", {}).get("together"))
    full, parts = removals(subsets, losses, together=together)
    found = [brittleness(full, part, probabilities=kept.of_answers) for part in parts]
    flipped = all_flips(kept.mean_margins(), subsets, len(parts), together=together)
    console().print(facts(removal_facts(truth, kept, parts, full, flipped[0], request.truth)))
    each = [*zip([part.k for part in parts], found, flipped, strict=True)]
    shown, table = [removal_line(*one) for one in each], [removal_row(*one) for one in each]
    console().print(rows_table(shown, tuple(shown[0])))
    export_table(table, tuple(table[0]), request.table.paths)


def run_mislabel(request: MislabelRequest) -> None:
    """Compare self-influence with the rows that are known to be wrong."""
    request.table.check(request.output.overwrite)
    run = evaluated_scores(request.run)
    if made_of(run.settings).query != "self":
        raise InputError(
            f"{request.run} has scores for {count(run.values.shape[2], 'query')}, expected those of every "
            "row with itself: make them with gradfn score --self"
        )
    wrong = _marked(run, request)
    k = int(wrong.sum()) if request.table.top is None else request.table.top
    table = [mislabel_row(run, number, wrong, k) for number in range(len(run.dampings))]
    rows = f"{len(wrong):,}, {int(wrong.sum()):,} of them wrong ({float(wrong.double().mean()):.1%})"
    console().print(facts([("run", request.run), ("rows", rows)]))
    console().print(rows_table(table, ("run", "damping", "AUROC", "average precision", f"precision@{k}")))
    export_table(
        table, ("run", "damping", "auroc", "average_precision", "precision_at_k", "k"), request.table.paths
    )


def run_recall(request: RecallRequest) -> None:
    """How often known sources are found."""
    request.table.check(request.output.overwrite)
    runs, k = _opened(request.runs), request.table.top or 0
    for run, path in zip(runs[1:], request.runs[1:], strict=True):
        refuse_other_data(run, runs[0], path, request.runs[0])
    check_k(k, len(runs[0].row_ids))
    sources, asked = _sources(runs[0], request)
    numbers = torch.tensor(asked)
    table = [row for run in runs for row in recall_rows(run.of_queries(numbers), sources, k)]
    lines = [("queries", f"{len(asked):,} of {len(runs[0].query_ids):,} have a source among the rows")]
    console().print(facts(lines))
    shown = (1, k) if k != 1 else (1,)
    console().print(rows_table(table, ("run", "damping", *(f"recall@{n}" for n in shown), "MRR")))
    estimates = [name for what in ("recall_at_1", "recall_at_k", "mrr") for name in ends(what)]
    export_table(table, ("run", "damping", "k", *estimates, "queries"), request.table.paths)


def run_overlap(request: OverlapRequest) -> None:
    """How far two runs agree on the strongest proponents, and on the order of all rows."""
    request.table.check(request.output.overwrite)
    first, second = _opened([request.run, request.other])
    refuse_other_data(first, second, request.run, request.other)
    for run, path in ((first, request.run), (second, request.other)):
        if len(run.dampings) > 1:
            raise InputError(
                f"{path} has scores for {len(run.dampings)} dampings, and an overlap is of two scores: score "
                "with one --damping"
            )
    a, b, k = first.values[0], second.values[0], request.table.top or 0
    found = {
        "overlap": mean_estimate(top_overlap(a, b, k)),
        "jaccard": mean_estimate(jaccard(a, b, k)),
        "spearman": mean_estimate(correlation(a, b)),
    }
    share = f"top {k} of {len(a):,} rows; {k / len(a):.1%} of them agree by chance"
    names = f"{first.name} and {second.name}"
    console().print(facts([("runs", f"{names}, {count(a.shape[1], 'query')}"), ("compared", share)]))
    words = {"overlap": f"in both top {k}", "jaccard": "Jaccard index", "spearman": "rank correlation"}
    lines = [{"over queries": words[name], "mean": f"{one.value:.3f}", "95 % interval": between(one)}
             for name, one in found.items()]  # fmt: skip
    console().print(rows_table(lines, ("over queries", "mean", "95 % interval"), left=("over queries",)))
    row = {"run": first.name, "other": second.name, "k": k, "queries": a.shape[1]}
    for name, one in found.items():
        row |= columns(name, one)
    export_table([row], tuple(row), request.table.paths)


# --- what was retrained, and what was scored


def opened_truth(path: str) -> Truth:
    """The retrained models of a run, of which not all diverged."""
    truth = open_truth(path)
    if bool(truth.diverged.all()):
        raise InputError(
            f"all {count(len(truth.diverged), 'model')} of {path} diverged: retrain with a lower "
            "--learning-rate"
        )
    return truth


def _opened(paths: Sequence[str], *, tokens: bool = False) -> list[Scores]:
    """The runs, by the last part of their path, or the whole of it where that names two."""
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"a run is given twice in {', '.join(paths)}: give each once")
    runs = [evaluated_scores(path, tokens=tokens) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=path) for run, path in zip(runs, paths, strict=True)]


# --- known answers


def _marked(run: Scores, request: MislabelRequest) -> Tensor:
    """Which rows of the run are wrong, by the column of the dataset."""
    column, recorded = request.label_column, made_of(run.settings).data or DataSource()
    path = request.dataset or recorded.path
    if path is None:
        raise InputError(f"no dataset is known for {request.run}: give the one that was scored as --dataset")
    at = recorded.revision if request.dataset is None else None
    rows = load_rows(path, request.split or recorded.split or "train", revision=at)
    if column not in rows.column_names:
        raise InputError(
            f"no column {column!r} in the dataset, which has {', '.join(rows.column_names)}: "
            "name another with --label-column"
        )
    refuse_other_ids(rows, run.row_ids, request.run, path, "--dataset")
    return marked(rows[column], column)


def _sources(run: Scores, request: RecallRequest) -> tuple[Tensor, list[int]]:
    """Which rows are known sources, `[rows, queries asked]`, and the numbers of the queries that have one."""
    told = made_of(run.settings).query
    known, recorded = (told.path, told.split) if isinstance(told, DataSource) else (None, None)
    path = request.query or known
    if path is None:
        raise InputError(f"no dataset of queries is known for {run.name}: give the one scored as --query")
    split = request.query_split or (recorded if request.query is None else None)
    rows, _ = load_split(path, split, argument="query_split")
    if "source" not in rows.column_names:
        raise InputError(
            f"{path} has no column 'source' with the id of the row that is known to teach the answer, it has "
            f"{', '.join(rows.column_names)}: add one"
        )
    refuse_other_ids(rows, run.query_ids, run.name, path, "--query")
    sources, asked = known_sources(rows["source"], run.row_ids)
    if not asked:
        raise InputError(f"none of the sources in {path} is among the rows scored: score the rows they name")
    return sources, asked


def refuse_other_ids(rows: Any, ids: Sequence[str], run: str, path: str, option: str) -> None:
    """Refuse a dataset of which the rows are not those that a run names."""
    here = storable(row_names(rows))
    if here != [*ids] and sorted(here) == sorted(ids):
        raise InputError(
            f"{run} and {path} have the same ids in another order: give the {option} that was scored"
        )
    if here != [*ids]:
        raise InputError(
            f"{run} has scores of {in_words(ids, here)} and {path} has {in_words(here, ids)}: give "
            f"the {option} that was scored"
        )
