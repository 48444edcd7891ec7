"""`gradfn check`: what is attributed, whether it is right, how much of it is rounding."""

from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch

from gradfn.cli.commands import CheckRequest
from gradfn.cli.console import console
from gradfn.cli.inputs import Loaded, load_documents, load_subject, training_rows, with_task
from gradfn.cli.options import DataOptions
from gradfn.data import Corpus, Documents, collate, make_documents
from gradfn.engine.check import RANKS, Noise, advice, coverage, equality, noise
from gradfn.engine.engine import probe_engine
from gradfn.engine.precision import multiplying
from gradfn.engine.stream import pads
from gradfn.errors import InputError
from gradfn.hf.models import context_length
from gradfn.report.checks import (
    EQUAL,
    ROUNDED,
    coverage_table,
    equality_facts,
    noise_table,
    sample_line,
)
from gradfn.report.progress import progress_bar
from gradfn.report.summaries import batches_facts, coverage_facts, device_facts
from gradfn.report.tables import facts
from gradfn.subject import Subject
from gradfn.transforms import project

LIMITS = 32, 4096
"""Rows and tokens of a dataset, at most; they are enough to see noise, and cheap."""
RANDOM_ROWS, RANDOM_TOKENS = 12, 128
DIM = 16


def run_check(request: CheckRequest) -> None:
    """Load, then cover, compare, measure, advise; exit status 1 where the engine is not equal to autograd."""
    request = with_task(request)
    request.data.check(str(request.model.task))
    loaded, documents = _loaded(request)
    device = torch.device(request.model.device)
    engine = probe_engine(loaded.model, loaded.subject.loss, project(DIM), view=loaded.subject.view)
    out = console()
    out.print(facts([
        *loaded.notes,
        *device_facts(loaded.model, loaded.products),
        ("model", f"{loaded.name}, {_precision(loaded)}, {loaded.attention or 'its own'} attention"),
        ("rows", sample_line(documents, request.data.dataset is None, LIMITS)),
    ]))  # fmt: skip
    quantised = any(not p.is_floating_point() for p in loaded.model.parameters())
    pair = [{key: value.to(device) for key, value in example.items()} for example in _pair(documents)]
    with loaded.multiplying():
        if quantised:
            engine(collate(pair))
        errors = () if quantised else equality(engine, pair)
        padded = pads(engine, documents)
    out.print()
    covered = coverage(loaded.model, loaded.subject.view, sites=engine.sites)
    out.print(coverage_table(covered))
    out.print()
    equal = equality_facts(errors, len(pair), loaded.precision, loaded.products)
    out.print(facts([*equal, *batches_facts(padded)]))
    out.print()
    with multiplying("ieee", device):  # the reference's; the subject's is its own
        measured, verdict = _noise(loaded, documents, request)
    out.print(noise_table(measured, documents, loaded.precision))
    out.print()
    out.print(facts([("advice", verdict), *coverage_facts(covered)]))
    if errors and errors[0].error > EQUAL and loaded.precision not in ROUNDED:
        raise SystemExit(1)  # not rounding: the engine is wrong about this model


def _precision(loaded: Loaded) -> str:
    """The precision, and of tf32 what it comes to where that is something else."""
    rounded = loaded.products == "bf16"
    return f"{loaded.precision} ({loaded.products} products)" if rounded else loaded.precision


def _loaded(request: CheckRequest) -> tuple[Loaded, Corpus]:
    """The model, and the first rows of the dataset, or random tokens without one."""
    if (path := request.data.dataset) is None:
        if request.model.task != "causal_lm":
            raise InputError(
                f"random tokens are for causal-lm only: give --dataset with rows for {request.model.task}"
            )
        if given := request.gave(*(one.name for one in fields(DataOptions))):
            raise InputError(f"{given} is about a dataset: give one with --dataset")
        loaded = load_subject(request)
        return loaded, _random(loaded)
    rows, notes = training_rows(request)
    rows = rows.select(range(min(LIMITS[0], len(rows))))
    loaded = load_subject(request).noting(*notes)
    return loaded, _first(load_documents(loaded, rows, request.data, path))


def _first(documents: Corpus) -> Corpus:
    """The first rows with something to supervise, up to the limit of tokens; two at least."""
    chosen, total = [], 0
    for row in range(len(documents)):
        length = int(documents.lengths[row])
        if documents.supervised[row] and (len(chosen) < 2 or total + length <= LIMITS[1]):
            chosen.append(row)
            total += length
    if not chosen:
        raise InputError(
            f"the first rows of --dataset have nothing to predict: give others, up to {LIMITS[0]} are read"
        )
    return documents.select(chosen)


def _random(loaded: Loaded) -> Documents:
    """Rows of random tokens, of mixed lengths."""
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    longest = min(RANDOM_TOKENS, context_length(loaded.model) or RANDOM_TOKENS)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(4, longest, RANDOM_ROWS).long().tolist()
    return make_documents([torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths])


def _pair(documents: Corpus) -> list[Any]:
    """The shortest row and the middle one, which padding tells apart."""
    order = documents.lengths.argsort(kind="stable")
    chosen = dict.fromkeys([int(order[0]), int(order[len(order) // 2])])
    return [documents[row] for row in chosen]


def _noise(loaded: Loaded, documents: Corpus, request: CheckRequest) -> tuple[Noise, str]:
    """The noise of the settings asked about; where it is too much, of others too, and what to do."""
    reference = None
    if loaded.precision in ROUNDED:
        same = loaded.precision == "tf32"  # its weights are fp32
        exact = replace(request, model=replace(request.model, precision="fp32"))
        reference = loaded.subject if same else loaded.subject.at(load_subject(exact).model)

    def measure(
        subject: Subject, reference: Subject | None = None, inside: Any = loaded.multiplying
    ) -> Noise:
        total = int(documents.lengths.sum()) * (2 if reference is None else 3)
        with progress_bar("noise", total) as progress:
            return noise(
                subject, documents, project(DIM), reference=reference, inside=inside, progress=progress
            )

    here = measure(loaded.subject, reference)
    if here.worst_cosine >= RANKS:
        return here, advice(here.worst_cosine)
    others = {}
    if loaded.attention == "sdpa":
        eager = load_subject(replace(request, model=replace(request.model, attention="eager")))
        others["--attention eager"] = measure(loaded.subject.at(eager.model), reference).worst_cosine
    others["--token-batch-size 1"] = 1.0 if here.precision is None else here.precision.worst_cosine
    if reference is not None:
        others["--precision fp32"] = measure(reference, inside=nullcontext).worst_cosine
    return here, advice(here.worst_cosine, others)
