"""`gradfn evaluate`: what scores are worth, against retrained models, known answers and other scores."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gradfn.cli.inputs import Options
from gradfn.cli.show import check_exports, clean, console, count, export_table, facts
from gradfn.errors import InputError
from gradfn.evaluate.bootstrap import Estimate, mean_estimate
from gradfn.evaluate.brittleness import Brittleness, Flips, Removal, brittleness, flips, removals
from gradfn.evaluate.ceiling import noise_ceiling_estimate
from gradfn.evaluate.comparison import Compared, Comparison, compare, damping_curve
from gradfn.evaluate.correlation import correlation
from gradfn.evaluate.mislabel import auroc, average_precision, check_k, precision_at
from gradfn.evaluate.overlap import jaccard, top_overlap
from gradfn.evaluate.retrieval import recall_at, reciprocal_rank, source_name
from gradfn.evaluate.scored import evaluated_scores, in_words, made_of, refuse_other_data
from gradfn.evaluate.subsets import FEWEST
from gradfn.evaluate.truth import Truth, open_truth
from gradfn.hf import load_rows, row_names
from gradfn.report.plots import check_plot, plot_runs
from gradfn.runs.provenance import DataSource
from gradfn.scores import Scores

Row = Mapping[str, Any]


def run_lds(**options: Any) -> None:
    """Compare runs of scores with models retrained on subsets."""
    _check(options)
    truth = _opened_truth(options["truth"])
    _show_comparison(truth, _opened(options["runs"]), options, title="Linear datamodeling score")


def run_loo(**options: Any) -> None:
    """The same for models retrained without one row each."""
    _check(options)
    truth = _leaving_one_out(_opened_truth(options["truth"]))
    _show_comparison(truth, _opened(options["runs"]), options, title="Leave-one-out correlation")


def run_brittleness(**options: Any) -> None:
    """What removing each query's best proponents does, beside removing random rows."""
    _check(options)
    truth = _opened_truth(options["truth"])
    kept = _whole_seeds(truth, options["truth"])
    subsets, losses = kept.targets()
    full, parts = removals(subsets, losses)
    told = [brittleness(full, part, probabilities=_of_answers(kept)) for part in parts]
    flipped = _flips(kept, subsets, len(parts))
    console().print(facts(_removal_facts(truth, kept, full, parts, flipped[0], options["truth"])))
    given = [*zip([part.k for part in parts], told, flipped, strict=True)]
    shown = [_removal_line(*one) for one in given]
    console().print(_table(shown, tuple(shown[0])))
    table = [_removal_row(*one) for one in given]
    _export(table, tuple(table[0]), options)


def run_mislabel(**options: Any) -> None:
    """Compare self-influence with the rows that are known to be wrong."""
    _check(options)
    run = evaluated_scores(options["run"])
    if made_of(run.settings).query != "self":
        raise InputError(
            f"{options['run']} has scores for {count(run.values.shape[2], 'query')}, expected those of every "
            "row with itself: make them with gradfn score --self"
        )
    wrong = _marked(run, options)
    k = int(wrong.sum()) if options["top"] is None else options["top"]
    table = [_mislabel_row(run, number, wrong, k) for number in range(len(run.dampings))]
    rows = f"{len(wrong):,}, {int(wrong.sum()):,} of them wrong ({float(wrong.double().mean()):.1%})"
    console().print(facts([("run", options["run"]), ("rows", rows)]))
    console().print(_table(table, ("run", "damping", "AUROC", "average precision", f"precision@{k}")))
    _export(table, ("run", "damping", "auroc", "average_precision", "precision_at_k", "k"), options)


def run_recall(**options: Any) -> None:
    """How often known sources are found."""
    _check(options)
    runs = _opened(options["runs"])
    for run, path in zip(runs[1:], options["runs"][1:], strict=True):
        refuse_other_data(run, runs[0], path, options["runs"][0])
    k = options["top"]
    check_k(k, len(runs[0].row_ids))
    sources, asked = _sources(runs[0], options)
    numbers = torch.tensor(asked)
    table = [row for run in runs for row in _recall_rows(run.of_queries(numbers), sources, k)]
    lines = [("queries", f"{len(asked):,} of {len(runs[0].query_ids):,} have a source among the rows")]
    console().print(facts(lines))
    shown = (1, k) if k != 1 else (1,)
    console().print(_table(table, ("run", "damping", *(f"recall@{n}" for n in shown), "MRR")))
    estimates = [name for what in ("recall_at_1", "recall_at_k", "mrr") for name in _ends(what)]
    _export(table, ("run", "damping", "k", *estimates, "queries"), options)


def run_overlap(**options: Any) -> None:
    """How far two runs agree on the strongest proponents, and on the order of all rows."""
    _check(options)
    first, second = _opened([options["run"], options["other"]])
    refuse_other_data(first, second, options["run"], options["other"])
    for run, path in ((first, options["run"]), (second, options["other"])):
        if len(run.dampings) > 1:
            raise InputError(
                f"{path} has scores for {len(run.dampings)} dampings, and an overlap is of two scores: score "
                "with one --damping"
            )
    a, b, k = first.values[0], second.values[0], options["top"]
    found = {
        "overlap": mean_estimate(top_overlap(a, b, k)),
        "jaccard": mean_estimate(jaccard(a, b, k)),
        "spearman": mean_estimate(correlation(a, b)),
    }
    share = f"top {k} of {len(a):,} rows; {k / len(a):.1%} of them agree by chance"
    names = f"{first.name} and {second.name}"
    console().print(facts([("runs", f"{names}, {count(a.shape[1], 'query')}"), ("compared", share)]))
    words = {"overlap": f"in both top {k}", "jaccard": "Jaccard index", "spearman": "rank correlation"}
    lines = [{"over queries": words[name], "mean": f"{one.value:.3f}", "95 % interval": _between(one)}
             for name, one in found.items()]  # fmt: skip
    console().print(_table(lines, ("over queries", "mean", "95 % interval")))
    row = {"run": first.name, "other": second.name, "k": k, "queries": a.shape[1]}
    for name, one in found.items():
        row |= _columns(name, one)
    _export([row], tuple(row), options)


# --- lds and loo


def _show_comparison(truth: Truth, runs: list[Scores], options: Options, *, title: str) -> None:
    for run, path in zip(runs, options["runs"], strict=True):
        refuse_other_data(run, truth, path, options["truth"])
    subsets, losses = truth.targets()
    told = compare(runs, subsets, losses, seed=options["seed"])
    ceiling = _ceiling(truth, told.queries, options["seed"])
    console().print(facts(_truth_facts(truth, told, ceiling, len(subsets), options["truth"])))
    console().print(_comparison_table(told, ceiling))
    table = [_comparison_row(one, told, ceiling, truth, len(subsets)) for one in told.runs]
    _export(table, tuple(table[0]), options)
    if options["plot"] is not None:
        several = [run for run in runs if len(run.dampings) > 1]
        plot_runs(
            {one.name: one.lds for one in told.runs}, options["plot"], ceiling=ceiling, title=title,
            dampings={run.name: damping_curve(run, subsets, losses, told.queries, seed=options["seed"])
                      for run in several},
            chosen={one.name: one.damping for one in told.runs},
        )  # fmt: skip
        console().print(facts([("plot", str(options["plot"]))]))


def _leaving_one_out(truth: Truth) -> Truth:
    """The models that were trained without one row each."""
    alone = truth.subsets.sum(1) == truth.subsets.shape[1] - 1
    if len(truth.numbers[alone].unique()) < FEWEST:
        raise InputError(
            f"{int(alone.sum())} of the {len(alone)} retrained models leave out one row each, and a "
            f"correlation needs {FEWEST} or more such subsets: make them with gradfn retrain --leave-out 1"
        )
    return truth.of_models(alone)


def _ceiling(truth: Truth, queries: Tensor, seed: int) -> Estimate | None:
    """The noise ceiling of the queries reported; None where one seed is left of each subset."""
    kept = truth.kept()
    if len(truth.seeds[kept].unique()) == 1:
        return None
    losses, numbers, seeds = truth.losses[kept][:, queries], truth.numbers[kept], truth.seeds[kept]
    return noise_ceiling_estimate(losses, numbers, seeds=seeds, seed=seed)


def _truth_facts(
    truth: Truth, told: Comparison, ceiling: Estimate | None, subsets: int, path: str
) -> list[tuple[str, str]]:
    rows = count(len(truth.row_ids), "row")
    kept = truth.of_models(truth.kept())
    made = f"{count(subsets, 'subset')} x {_seeds(kept)}, of {rows}"
    lines = [("truth", path), ("models", made), *_diverged(truth, kept)]
    whole, reported = len(truth.query_ids), len(told.queries)
    if reported < whole:
        lines.append(
            ("queries", f"{reported:,} of {whole:,}; dampings are chosen on the other {whole - reported:,}")
        )
    else:
        lines.append(("queries", f"{whole:,}"))
    if ceiling is None:
        lines.append(("noise ceiling", _why_unknown(truth)))
    for one in told.runs:
        if one.constant:
            queries = count(one.constant, "query")
            lines.append(("note", f"{one.name} has one score for all rows of {queries}, which count as 0"))
    return lines


def _why_unknown(truth: Truth) -> str:
    if len(truth.seeds.unique()) == 1:
        return "unknown, with one seed a subset: gradfn retrain --seeds 2 tells it"
    return "unknown, with one seed left of each subset: retrain with a lower --learning-rate"


def _diverged(truth: Truth, kept: Truth) -> list[tuple[str, str]]:
    """How many models diverged, and what is left out with them."""
    if not (diverged := int(truth.diverged.sum())):
        return []
    lost = {
        noun: len(getattr(truth, name).unique()) - len(getattr(kept, name).unique())
        for noun, name in (("subset", "numbers"), ("seed", "seeds"))
    }
    left_out = " and ".join(count(number, noun) for noun, number in lost.items() if number)
    models = f"{diverged:,} of {count(len(truth.diverged), 'model')}"
    return [("diverged", f"{models}; left out for the means to be over the same seeds: {left_out}")]


def _seeds(kept: Truth) -> str:
    """How many seeds every subset has."""
    return count(len(kept.seeds.unique()), "seed")


def _comparison_table(told: Comparison, ceiling: Estimate | None) -> Table:
    lines = [
        {"run": one.name, "damping": one.damping, "LDS": f"{one.lds.value:.3f}",
         "95 % interval": _between(one.lds), "of ceiling": _share(one.lds, ceiling),
         "Pearson": f"{one.pearson.value:.3f}", "95 % interval ": _between(one.pearson)}
        for one in told.runs
    ]  # fmt: skip
    columns = ("run", "damping", "LDS", "95 % interval", "of ceiling", "Pearson", "95 % interval ")
    if ceiling is not None:
        lines.append(
            {"run": "noise ceiling", "LDS": f"{ceiling.value:.3f}", "95 % interval": _between(ceiling)}
        )
    return _table(lines, columns)


def _comparison_row(
    one: Compared, told: Comparison, ceiling: Estimate | None, truth: Truth, subsets: int
) -> dict[str, Any]:
    return {
        "run": one.name, "damping": one.damping,
        **_columns("lds", one.lds), **_columns("pearson", one.pearson), **_columns("ceiling", ceiling),
        "share_of_ceiling": one.lds.value / ceiling.value if ceiling and ceiling.value > 0 else None,
        "subsets": subsets, "models": len(truth.diverged), "diverged": int(truth.diverged.sum()),
        "queries": len(told.queries),
    }  # fmt: skip


# --- brittleness


def _whole_seeds(truth: Truth, path: str) -> Truth:
    """The models of the seeds of which none diverged: each removal is compared, so all must be there."""
    kept = ~torch.isin(truth.seeds, truth.seeds[truth.diverged])
    if not bool(kept.any()):
        raise InputError(
            f"of every seed of {path} a model diverged, so a removal is missing: retrain with a lower "
            "--learning-rate"
        )
    return truth.of_models(kept)


def _flips(truth: Truth, subsets: Tensor, sizes: int) -> list[Flips | None]:
    """What becomes of predictions, for each number of rows removed; None where there are no classes."""
    margins = truth.mean_margins()
    if margins is None:
        return [None] * sizes
    full, parts = removals(subsets, margins)
    return [flips(full, part) for part in parts]


def _of_answers(truth: Truth) -> bool:
    """Whether a query's loss is minus the log-probability of its whole answer, which is no class."""
    if truth.margins is not None:
        return False
    loss, subsets = truth.settings.get("query_loss", {}), truth.settings.get("subsets", {})
    whole = loss.get("reduction") == "sum" or subsets.get("answer_tokens") == 1
    return loss.get("criterion") == "cross_entropy" and not loss.get("label_smoothing") and whole


def _removal_facts(
    truth: Truth, kept: Truth, full: Tensor, parts: Sequence[Removal], flipped: Flips | None, path: str
) -> list[tuple[str, str]]:
    queries, controls = (
        count(len(full), "query"),
        count(min(len(part.random) for part in parts), "random removal"),
    )
    lines = [
        ("truth", path),
        ("models", f"{queries} x {count(len(parts), 'size')}, {controls} of each size, {_seeds(kept)}"),
        ("full model", f"mean loss {float(full.mean()):.3f}"),
    ]
    if flipped is not None:
        lines.append(("predictions", f"{flipped.right:,} of {queries} right, which are those that can flip"))
    return [*lines, *_diverged(truth, kept)]


def _removal_line(k: int, one: Brittleness, flipped: Flips | None) -> dict[str, str]:
    rises = {"removed": f"{k:,}", "loss rises by": _signed(one.rise), "by chance": _signed(one.by_chance),
             "above chance": f"{one.above_chance.value:.0%}"}  # fmt: skip
    if flipped is not None and flipped.flipped is not None and flipped.flipped_by_chance is not None:
        by_chance = f"{flipped.flipped_by_chance.value:.0%} by chance"
        return {**rises, "predictions flip": f"{flipped.flipped.value:.0%}, {by_chance}"}
    if one.lost is None or one.lost_by_chance is None:
        return rises
    return {**rises, "answers lost": f"{one.lost.value:.0%}, {one.lost_by_chance.value:.0%} by chance"}


def _removal_row(k: int, one: Brittleness, flipped: Flips | None) -> dict[str, Any]:
    nothing = dict.fromkeys(Flips._fields)
    more = nothing if flipped is None else flipped._asdict()
    row: dict[str, Any] = {"k": k, "right": more.pop("right")}
    for name, estimate in {**one._asdict(), **more}.items():
        row |= _columns(name, estimate)
    return row


def _signed(one: Estimate) -> str:
    return f"{one.value:+.3f}" + ("" if isnan(one.low) else f" ({one.low:.3f} to {one.high:.3f})")


# --- known answers


def _marked(run: Scores, options: Options) -> Tensor:
    """Which rows of the run are wrong, by the column of the dataset."""
    column, recorded = options["label_column"], made_of(run.settings).data or DataSource()
    path = options["dataset"] or recorded.path
    if path is None:
        raise InputError(
            f"no dataset is known for {options['run']}: give the one that was scored as --dataset"
        )
    rows = load_rows(path, options["split"] or recorded.split or "train")
    if column not in rows.column_names:
        raise InputError(
            f"no column {column!r} in the dataset, which has {', '.join(rows.column_names)}: "
            "name another with --label-column"
        )
    _refuse_other_ids(rows, run.row_ids, options["run"], path, "--dataset")
    values = list(rows[column])
    for number, value in enumerate(values):
        if value not in (0, 1):
            raise InputError(
                f"row {number} has {value!r} in column {column!r}, expected 1 for a wrong row and 0 for a "
                "right one: mend it, or name another --label-column"
            )
    return torch.tensor([bool(value) for value in values])


def _mislabel_row(run: Scores, number: int, wrong: Tensor, k: int) -> dict[str, Any]:
    scores = run.values[number, :, 0]
    found = auroc(scores, wrong), average_precision(scores, wrong), precision_at(scores, wrong, k)
    names = ("auroc", "average_precision", "precision_at_k")
    shown = ("AUROC", "average precision", f"precision@{k}")
    return {
        "run": run.name, "damping": run.dampings[number], "k": k, **dict(zip(names, found, strict=True)),
        **{name: f"{value:.3f}" for name, value in zip(shown, found, strict=True)},
    }  # fmt: skip


def _sources(run: Scores, options: Options) -> tuple[Tensor, list[int]]:
    """Which rows are known sources, `[rows, queries asked]`, and the numbers of the queries that have one."""
    told = made_of(run.settings).query
    path = options["query"] or (told.get("path") if isinstance(told, Mapping) else None)
    if path is None:
        raise InputError(f"no dataset of queries is known for {run.name}: give the one scored as --query")
    rows = load_rows(path, options["split"])
    if "source" not in rows.column_names:
        raise InputError(
            f"{path} has no column 'source' with the id of the row that is known to teach the answer, it has "
            f"{', '.join(rows.column_names)}: add one"
        )
    _refuse_other_ids(rows, run.query_ids, run.name, path, "--query")
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(run.row_ids):  # pieces of a document share its id
        numbers.setdefault(name, []).append(number)
    named = [source_name(value) for value in rows["source"]]
    known = [
        (query, numbers[name]) for query, name in enumerate(named) if name is not None and name in numbers
    ]
    if not known:
        raise InputError(f"none of the sources in {path} is among the rows scored: score the rows they name")
    sources = torch.zeros(len(run.row_ids), len(known), dtype=torch.bool)
    for column, (_, these) in enumerate(known):
        sources[these, column] = True
    return sources, [query for query, _ in known]


def _refuse_other_ids(rows: Any, ids: Sequence[str], run: str, path: str, option: str) -> None:
    """Refuse a dataset of which the rows are not those that a run names."""
    here = row_names(rows)
    if here != [*ids] and sorted(here) == sorted(ids):
        raise InputError(
            f"{run} and {path} have the same ids in another order: give the {option} that was scored"
        )
    if here != [*ids]:
        raise InputError(
            f"{run} has scores of {in_words(ids, here)} and {path} has {in_words(here, ids)}: give "
            f"the {option} that was scored"
        )


def _recall_rows(run: Scores, sources: Tensor, k: int) -> list[dict[str, Any]]:
    table = []
    for damping, scores in zip(run.dampings, run.values, strict=True):
        first, among = (mean_estimate(recall_at(scores, sources, n)) for n in (1, k))
        mrr = mean_estimate(reciprocal_rank(scores, sources))
        row = {"run": run.name, "damping": damping, "k": k, "queries": sources.shape[1]}
        for name, one in (("recall_at_1", first), ("recall_at_k", among), ("mrr", mrr)):
            row |= _columns(name, one)
        shown = (("recall@1", first), (f"recall@{k}", among), ("MRR", mrr))
        table.append({**row, **{name: _told(one) for name, one in shown}})
    return table


# --- parts


def _check(options: Options) -> None:
    """Refuse, before any work, what could not be written."""
    seed = options.get("seed", 0)
    if abs(seed) >= 1 << 63:
        raise InputError(f"the seed {seed} is too large for random numbers: give one below 2^63")
    files = [options["csv"], options["jsonl"], options["parquet"], options.get("plot")]
    if options.get("plot") is not None:
        check_plot(options["plot"])
    check_exports(files, options["overwrite"])


def _opened_truth(path: str) -> Truth:
    truth = open_truth(path)
    if bool(truth.diverged.all()):
        raise InputError(
            f"all {count(len(truth.diverged), 'model')} of {path} diverged: retrain with a lower "
            "--learning-rate"
        )
    return truth


def _opened(paths: Sequence[str]) -> list[Scores]:
    """The runs, by the last part of their path, or the whole of it where that names two."""
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"a run is given twice in {', '.join(paths)}: give each once")
    runs = [evaluated_scores(path) for path in paths]
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    return [replace(run, name=path) for run, path in zip(runs, paths, strict=True)]


def _table(rows: Sequence[Row], columns: Sequence[str]) -> Table:
    """A borderless table: names to the left, numbers to the right, no column that is empty."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    for name in columns:
        left = name in ("run", "damping", "over queries")
        table.add_column(name.strip(), justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(str(row.get(name, "")))) for name in columns))
    return table


def _export(rows: Sequence[Row], columns: Sequence[str], options: Options) -> None:
    lines = [{name: row[name] for name in columns} for row in rows]
    paths = {f"{kind}_path": options[kind] for kind in ("csv", "jsonl", "parquet")}
    export_table(lines, columns, **paths)


def _between(one: Estimate) -> str:
    return "" if isnan(one.low) else f"{one.low:.2f} to {one.high:.2f}"


def _told(one: Estimate) -> str:
    return f"{one.value:.3f}" + (f" ({between})" if (between := _between(one)) else "")


def _share(one: Estimate, ceiling: Estimate | None) -> str:
    return f"{one.value / ceiling.value:.0%}" if ceiling and ceiling.value > 0 else ""


def _columns(name: str, one: Estimate | None) -> dict[str, float | None]:
    """An estimate in a table; what is not known is empty."""
    values = (None, None, None) if one is None else one
    return {key: None if value is None or isnan(value) else value
            for key, value in zip(_ends(name), values, strict=True)}  # fmt: skip


def _ends(name: str) -> tuple[str, str, str]:
    """The columns of an estimate."""
    return name, f"{name}_low", f"{name}_high"
