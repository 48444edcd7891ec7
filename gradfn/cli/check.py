"""`gradfn check`: what is attributed, whether it is right, how much of it is rounding."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from gradfn.cli import inputs
from gradfn.cli import options as o
from gradfn.cli.inputs import Options, Subject
from gradfn.cli.show import clean, console, count, facts, progress_bar
from gradfn.data import Corpus, Documents, Images, collate, make_documents
from gradfn.engine.check import (
    RANKS,
    BlockError,
    Covered,
    Difference,
    Noise,
    advice,
    coverage,
    equality,
    noise,
)
from gradfn.engine.engine import probe_engine
from gradfn.engine.precision import EPS, multiplying
from gradfn.errors import InputError
from gradfn.hf import context_length, load_rows
from gradfn.hf.models import PRECISIONS
from gradfn.transforms import project

ROWS, TOKENS = 32, 4096
"""Of a dataset, at most; it is enough to see noise, and cheap."""
RANDOM_ROWS, RANDOM_TOKENS = 12, 128
DIM = 16
EQUAL = 1e-4
"""A relative error that only rounding in fp32 or better stays below."""
ROUNDED = ("tf32", "bf16", "fp16")
"""What is measured against fp32."""
FIXED = {"loss": "cross_entropy", "loss_reduction": "mean", "label_smoothing": 0.0, "reference": None,
         "by": "example", "seed": 0}  # fmt: skip


def run_check(**options: Any) -> None:
    """Load, then cover, compare, measure, advise; exit status 1 where the engine is not equal to autograd."""
    options = {**options, **FIXED}
    inputs.check_columns(options, str(options["task"]))
    if options["dataset"] is None:
        _check_random(options)
    rows = None if options["dataset"] is None else load_rows(options["dataset"], options["split"])
    if rows is not None:
        rows = rows.select(range(min(ROWS, len(rows))))
    subject = inputs.load_subject(options)
    documents = _random(subject) if rows is None else _first(inputs.load_documents(subject, rows, options))
    engine = probe_engine(subject.model, subject.loss, project(DIM), view=subject.view)
    out = console()
    out.print(facts([
        ("model", f"{subject.name}, {_precision(subject)}, {subject.attention or 'its own'} attention"),
        ("rows", _rows_line(documents, rows is None)),
    ]))  # fmt: skip
    quantised = any(not p.is_floating_point() for p in subject.model.parameters())
    pair = _pair(documents)
    with subject.multiplying():
        if quantised:
            engine(collate([_on(example, options["device"]) for example in pair]))
        errors = () if quantised else equality(engine, [_on(example, options["device"]) for example in pair])
    out.print()
    out.print(_coverage_table(coverage(subject.model, subject.view, sites=engine.sites)))
    out.print()
    out.print(facts(_equality_lines(errors, subject, len(pair))))
    out.print()
    with multiplying("ieee", torch.device(options["device"])):  # the reference's; the subject's is its own
        measured, verdict = _noise(subject, documents, options)
    out.print(_noise_table(measured, documents, subject.precision))
    out.print()
    out.print(facts([("advice", verdict)]))
    if errors and errors[0].error > EQUAL and subject.precision not in ROUNDED:
        raise SystemExit(1)  # not rounding: the engine is wrong about this model


def _check_random(options: Options) -> None:
    """Refuse what random tokens cannot be: rows of another task, or what is read of a dataset."""
    if str(options["task"]) != "causal_lm":
        raise InputError(
            f"random tokens are for causal-lm only: give --dataset with rows for {options['task']}"
        )
    for name, (_, default) in {**o.DATASET, **o.COLUMNS}.items():
        if options[name] != default:
            raise InputError(f"--{name.replace('_', '-')} is about a dataset: give one with --dataset")


def _first(documents: Corpus) -> Corpus:
    """The first rows with something to supervise, up to the limit of tokens; two at least."""
    chosen, total = [], 0
    for row in range(len(documents)):
        length = int(documents.lengths[row])
        if documents.supervised[row] and (len(chosen) < 2 or total + length <= TOKENS):
            chosen.append(row)
            total += length
    if not chosen:
        raise InputError(
            f"the first rows of --dataset have nothing to predict: give others, up to {ROWS} are read"
        )
    return documents.select(chosen)


def _random(subject: Subject) -> Documents:
    """Rows of random tokens, of mixed lengths."""
    vocabulary = subject.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    longest = min(RANDOM_TOKENS, context_length(subject.model) or RANDOM_TOKENS)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(4, longest, RANDOM_ROWS).long().tolist()
    return make_documents([torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths])


def _rows_line(documents: Corpus, random: bool) -> str:
    sizes = f"{count(len(documents), 'row')}, {count(int(documents.lengths.sum()), 'token')}"
    lengths = f"{int(documents.lengths.min())} to {int(documents.lengths.max())} each"
    if random:
        return f"{sizes} at random, {lengths}; give --dataset to measure on your own"
    padded = isinstance(documents, Images) or len(set(documents.lengths.tolist())) > 1
    same = "" if padded else "; of one length, so padding is not tried"
    return f"the first {sizes}, {lengths} (at most {ROWS} rows, {TOKENS:,} tokens){same}"


def _pair(documents: Corpus) -> list[Any]:
    """The shortest row and the middle one, which padding tells apart."""
    order = documents.lengths.argsort(kind="stable")
    chosen = dict.fromkeys([int(order[0]), int(order[len(order) // 2])])
    return [documents[row] for row in chosen]


def _on(example: Any, device: str) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in example.items()}


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _share(part: int, whole: int) -> str:
    share = part / whole
    return f"{share:.1%}" if share >= 0.001 or part == 0 else "<0.1%"


def _coverage_table(rows: Sequence[Covered]) -> Table:
    """By kind, a line a place in the model's pattern; then the sums."""
    whole = sum(row.parameters for row in rows)
    table = _table("layers", "parameters", "share")

    def add(name: str, part: int) -> None:
        table.add_row(Text(clean(name)), f"{part:,}", _share(part, whole))

    for (kind, how), group in groupby(rows, key=lambda row: (row.kind, row.engine or row.reason)):
        table.add_row(Text(f"{kind}: {how}", style="bold"))
        for row in group:
            # Not through `clean`, which would take the indent.
            name = f"  {clean(row.pattern)}" + (f" x {row.modules}" if row.modules > 1 else "")
            table.add_row(Text(name), f"{row.parameters:,}", _share(row.parameters, whole))
    for engine, name in (("probe", "by probe"), ("vmap(grad)", "by vmap(grad)"), (None, "not attributed")):
        part = sum(row.parameters for row in rows if row.engine == engine)
        if part:
            add(name, part)
    add("all parameters", whole)
    return table


def _precision(subject: Subject) -> str:
    """The precision, and of tf32 what it comes to where that is something else."""
    return (
        f"{subject.precision} ({subject.products} products)"
        if subject.products == "bf16"
        else subject.precision
    )


def _equality_lines(errors: Sequence[BlockError], subject: Subject, rows: int) -> list[tuple[str, str]]:
    if not errors:
        return [("equality", "not compared: autograd has no gradient of quantised weights")]
    worst = errors[0]
    blocks = f"all {len(errors)} blocks" if len(errors) > 1 else "the one block"
    if worst.error <= EQUAL:
        found = f"equal to {worst.error:.1e} in {blocks}"
    else:
        found = (
            f"the worst of {count(len(errors), 'block')} is {worst.block}: relative error "
            f"{worst.error:.1e}, cosine {worst.cosine:.6f}"
        )
    how = f"{count(rows, 'row')} in one batch against plain autograd, a row at a time"
    return [("equality", f"{how}: {found}"), ("", _precision_line(subject, worst.error <= EQUAL))]


def _precision_line(subject: Subject, equal: bool) -> str:
    """What a precision means for the comparison above, and where more is to be seen."""
    precision = subject.precision
    if precision == "tf32":
        what, eps = "both factors of a product", EPS[subject.products]
    else:
        what, eps = "every number", torch.finfo(PRECISIONS[precision]).eps
    line = f"{precision} rounds {what} to 1 part in {1 / eps:,.0f}"
    if equal:
        return line
    finer = {"fp32": "fp64"}.get(precision, "fp32" if precision in ROUNDED else None)
    if finer is None:
        return f"{line}, which does not explain it: this should not be, please tell us"
    return f"{line}, on both sides; whether the engine is right is to be seen with --precision {finer}"


def _noise(subject: Subject, documents: Corpus, options: Options) -> tuple[Noise, str]:
    """The noise of the settings asked about; where it is too much, of others too, and what to do."""
    reference = None
    if subject.precision in ROUNDED:
        same = subject.precision == "tf32"  # its weights are fp32
        reference = subject.model if same else inputs.load_subject({**options, "precision": "fp32"}).model

    def measure(model: Any, reference: Any = None, inside: Any = subject.multiplying) -> Noise:
        total = int(documents.lengths.sum()) * (2 if reference is None else 3)
        with progress_bar("noise", total) as progress:
            return noise(
                model, documents, reference=reference, make_loss=lambda m: replace(subject.loss, model=m),
                transform=project(DIM), view=subject.view, token_batch_size=subject.token_batch_size,
                inside=inside, progress=progress,
            )  # fmt: skip

    here = measure(subject.model, reference)
    if here.worst_cosine >= RANKS:
        return here, advice(here.worst_cosine)
    others = {}
    if subject.attention == "sdpa":
        eager = inputs.load_subject({**options, "attention": "eager"})
        others["--attention eager"] = measure(eager.model, reference).worst_cosine
    others["--token-batch-size 1"] = 1.0 if here.precision is None else here.precision.worst_cosine
    if reference is not None:
        others["--precision fp32"] = measure(reference, inside=nullcontext).worst_cosine
    return here, advice(here.worst_cosine, others)


def _noise_table(measured: Noise, documents: Corpus, precision: str) -> Table:
    table = _table("noise: median (worst)", "cosine", "relative error", "worst row")

    def add(name: str, part: Difference) -> None:
        table.add_row(
            name, f"{part.cosine:.6f} ({part.worst_cosine:.6f})",
            f"{part.error:.1e} ({part.worst_error:.1e})", Text(clean(documents.ids[part.row], 18)),
        )  # fmt: skip

    add("batched against alone", measured.batching)
    if measured.precision is not None:
        add(f"{precision} against fp32", measured.precision)
    return table
