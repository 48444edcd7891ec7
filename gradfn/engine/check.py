"""Checks of an engine: which weights it covers, whether its gradients are right, and how far they are
rounded.

`coverage` lists the model's parameters, `equality` compares the engine with the definition, and `noise`
measures the rounding that batches and the precision cause.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.data import check_rows
from gradfn.engine.engine import Engine
from gradfn.engine.reference import naive_blocks
from gradfn.engine.stream import Progress, collect, gather, labelled, lengths_of
from gradfn.errors import InputError
from gradfn.model.layers import KINDS
from gradfn.model.left_out import uncovered
from gradfn.model.sites import Site, View, all_sites, find_sites, output_head
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.transforms import Transform, project
from gradfn.types import Blocks, Data, Example

EngineName = Literal["probe", "vmap(grad)"]
FINE = 0.999
"""From this cosine on, rounding does not matter."""
RANKS = 0.99
"""From this cosine on, rounding does not change rankings."""


@dataclass(frozen=True)
class Covered:
    """The parameters of one kind whose modules have the same path except for numbers.

    Args:
        pattern: the modules' path, numbers as `*`: `model.layers.*.mlp.up_proj`.
        kind: linear, convolution, experts, embedding, norm, LM head or other; several if a weight is tied.
        modules: how many modules the pattern stands for.
        parameters: how many numbers their weights and biases have. A tied weight counts once, under its first
            name.
        engine: what computes their gradient; None if they are not attributed.
        reason: why they are not attributed: left out by default, excluded, not included, or not an adapter.
            Empty if they are.
    """

    pattern: str
    kind: str
    modules: int
    parameters: int
    engine: EngineName | None
    reason: str


def coverage(
    model: nn.Module, view: View | None = None, *, sites: Sequence[Site] | None = None
) -> tuple[Covered, ...]:
    """List what computes the gradient of each parameter of the model, or why it is not attributed.

    Args:
        model: any module.
        view: which weights are attributed; None is the default of `View`.
        sites: `engine.sites` of an engine of this view that has verified its probes, and so knows which
            weights have none. None: before any verification.

    Returns:
        The attributed parameters first, by kind, in the model's order; `parameters` add up to the model's.

    Raises:
        InputError: no weight is left to attribute; see `find_sites`.

    >>> [(row.pattern, row.kind, row.parameters, row.engine) for row in coverage(nn.Sequential(
    ...     nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))]
    [('*', 'linear', 26, 'probe'), ('*', 'norm', 8, None)]
    """
    view = view or View()
    sites = find_sites(model, view) if sites is None else sites
    owners: dict[str, list[Site]] = {}
    for site in all_sites(model):
        for name in site.names:
            owners.setdefault(name, []).append(site)
    left = uncovered(model, sites)
    probed = {name for site in sites if site.probed for name in site.names}
    head, adapters = output_head(model), hasattr(model, "peft_config")
    groups: dict[tuple[str, str, EngineName | None, str], list[tuple[str, int]]] = {}
    for name, parameter in model.named_parameters():
        engine: EngineName | None = "probe" if name in probed else "vmap(grad)"
        engine = None if name in left else engine
        kinds = ("LM head" if site.module is head else site.layer.kind for site in owners[name])
        reason = "" if engine else _reason(owners[name], view, adapters)
        path = name.removesuffix("weight").removesuffix("bias").removesuffix(".") or "root"
        key = (_pattern(path), ", ".join(dict.fromkeys(kinds)), engine, reason)
        groups.setdefault(key, []).append((path, parameter.numel()))
    rows = [
        Covered(pattern, kind, len({path for path, _ in found}), sum(size for _, size in found), engine, why)
        for (pattern, kind, engine, why), found in groups.items()
    ]
    return tuple(sorted(rows, key=_place))


_ORDER = (*(kind for kind in KINDS if kind != "other"), "LM head", "other")


def _place(row: Covered) -> tuple[bool, int, str, str]:
    """Sort attributed parameters first, then by kind, then by engine or reason."""
    return row.engine is None, _ORDER.index(row.kind.split(", ")[0]), row.kind, row.engine or row.reason


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def _reason(owners: Sequence[Site], view: View, adapters: bool) -> str:
    if any(fnmatchcase(site.path or "root", glob) for site in owners for glob in view.exclude):
        return "excluded"
    if view.include:
        return "not included"
    if adapters and not any("lora_" in site.path for site in owners):
        return "not an adapter"
    return "left out by default"


@dataclass(frozen=True)
class BlockError:
    """How far the engine's gradient of one block is from the definition's, over all rows together.

    Args:
        block: its name.
        error: `|got - want| / |want|`.
        cosine: between the two.
    """

    block: str
    error: float
    cosine: float


def equality(engine: Engine, rows: Sequence[Example]) -> tuple[BlockError, ...]:
    """Compare an engine with the definition, block by block, on a few rows.

    The engine sees them as one padded batch, or where padding changes a row as batches of one length.

    The definition is plain autograd of the engine's loss, one unpadded example at a time, and then the
    engine's transform. The error of a block is relative to its norm, or to the rounding of the whole gradient
    if that is larger.

    Args:
        engine: see `probe_engine`; its view is by example.
        rows: a few examples with the same keys, preferably of different lengths.

    Returns:
        The error of every block, the largest first.

    Raises:
        InputError: a view by token, a transform that ends in scores, or weights that are not floating point.

    >>> from gradfn.engine.engine import probe_engine
    >>> net = nn.Linear(2, 1)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).square().sum()
    >>> equality(probe_engine(net, loss), [{"x": torch.ones(2)}])[0].error < 1e-6
    True
    """
    if engine.view.tokens:
        raise InputError("the definition gives a gradient of each example: view the engine by example")
    fixed = next((n for n, p in engine.model.named_parameters() if not p.is_floating_point()), None)
    if fixed is not None:
        raise InputError(
            f"{fixed} is quantised, so autograd has no gradient of it: check the model unquantised"
        )
    check_rows(rows)
    rows = [labelled(rows, row) for row in range(len(rows))]
    together = len(rows) * int(lengths_of(rows).max())
    got = gather(engine, rows, token_batch_size=together).values
    parts = [engine.transform(naive_blocks(engine.loss, engine.model, [row], engine.view)) for row in rows]
    if not isinstance(got, dict):
        raise InputError("scores have no blocks: check an engine whose transform does not end in dot")
    want = {name: torch.cat([part[name].cpu() for part in parts]) for name in got}  # pyright: ignore
    dtype = next(p.dtype for p in engine.model.parameters())
    floor = torch.finfo(dtype).eps * float(_flat(want).norm())
    errors = [_block_error(name, got[name].cpu(), want[name], floor) for name in got]
    return tuple(sorted(errors, key=lambda error: -error.error))


def _block_error(name: str, got: Tensor, want: Tensor, floor: float) -> BlockError:
    a, b = got.double().flatten(), want.double().flatten()
    size = max(float(b.norm()), floor)
    if size == 0:
        return BlockError(name, float(a.norm()), 1.0 if not bool(a.any()) else 0.0)
    cosine = 1.0 if float(b.norm()) <= floor else float(_cosines(a[None], b[None]))
    return BlockError(name, float((a - b).norm()) / size, cosine)


@dataclass(frozen=True)
class Difference:
    """How far rows of gradients are from the same rows computed in another way, over all blocks together.

    Args:
        cosine, worst_cosine: between the two, the median and the lowest of the rows.
        error, worst_error: `|a - b| / |b|`, the median and the highest of the rows.
        row: the number of the row with the lowest cosine.
    """

    cosine: float
    worst_cosine: float
    error: float
    worst_error: float
    row: int


@dataclass(frozen=True)
class Noise:
    """What rounding does to rows of gradients.

    Args:
        batching: rows computed in batches, compared with the same rows computed alone.
        precision: rows computed alone, compared with those of the reference; None without a reference.
    """

    batching: Difference
    precision: Difference | None

    @property
    def worst_cosine(self) -> float:
        """The lowest cosine of any row, in either comparison."""
        return min(part.worst_cosine for part in (self.batching, self.precision) if part is not None)


def row_difference(got: Blocks, want: Blocks) -> Difference:
    """Compare rows with the same rows computed in another way; two zero rows are equal.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> row_difference({"a": rows + torch.tensor([[0.0], [0.1]])}, {"a": rows}).row
    1
    """
    a, b = _flat(got), _flat(want)
    gaps, sizes = (a - b).norm(dim=1), b.norm(dim=1)
    errors = torch.where(gaps == 0, 0.0, gaps / sizes)
    cosines = _cosines(a, b)
    row = int(cosines.argmin())
    return Difference(
        float(cosines.median()), float(cosines[row]), float(errors.median()), float(errors.max()), row
    )


def _flat(blocks: Blocks) -> Float[Tensor, "rows numbers"]:
    return torch.cat([value.cpu().double().flatten(1) for value in blocks.values()], 1)


def _cosines(a: Float[Tensor, "rows numbers"], b: Float[Tensor, "rows numbers"]) -> Float[Tensor, " rows"]:
    """The cosines of the rows: 1 if both are zero, 0 if one is."""
    both = (a.norm(dim=1) == 0) & (b.norm(dim=1) == 0)
    return torch.where(both, 1.0, torch.cosine_similarity(a, b, eps=0)).nan_to_num(0.0).clamp(-1, 1)


def noise(
    model: nn.Module | Subject,
    data: Data,
    transform: Transform | None = None,
    *,
    reference: Subject | None = None,
    inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Progress | None = None,
    **options: Unpack[SubjectOptions],
) -> Noise:
    """Measure what batches and the precision do to rows of gradients.

    In exact arithmetic a row does not depend on its batch. In floating point it does, because another shape
    is summed in another order, by another kernel.

    Args:
        model: what is measured, in its precision: a `Subject`, or a module with a subject's `options`.
        data: examples of different lengths, so that padding matters.
        transform: of the rows that are compared; None is `project(16)`.
        reference: the same in float32; `model` itself, to measure the effect of `inside`.
        inside: a context for the model's rows, but not for the reference's; see
            `gradfn.engine.precision.multiplying`.
        progress, options: see `collect`.

    Raises:
        InputError: see `collect`.

    >>> net = nn.Linear(3, 1)
    >>> def loss(params, e):
    ...     return torch.func.functional_call(net, params, e["x"]).square().sum()
    >>> noise(net, [{"x": torch.ones(3)}] * 4, loss=loss).worst_cosine > 0.999999
    True
    """
    subject = subject_of(model, **options)

    def rows(subject: Subject, size: int) -> Blocks:
        one = replace(subject, token_batch_size=size)
        made = collect(one, data, transform or project(16), progress=progress)
        if not isinstance(made, dict):
            raise InputError("scores are not rows of gradients: give a transform that does not end in dot")
        return made

    with inside():
        alone, together = rows(subject, 1), rows(subject, subject.token_batch_size)
    exact = None if reference is None else row_difference(alone, rows(reference, 1))
    return Noise(row_difference(together, alone), exact)


def advice(worst_cosine: float, measured: Mapping[str, float] | None = None) -> str:
    """What to do about noise, in one sentence.

    If the worst row has a cosine of at least 0.999, the settings are fine; from 0.99 on they are fine for
    ranking. Below, the sentence recommends the first of the other settings that reaches 0.99, or the best one
    that helps.

    Args:
        worst_cosine: `Noise.worst_cosine` of the settings in question.
        measured: the same for other settings, the cheapest first.

    >>> advice(0.9999)
    'fine: the worst row keeps a cosine of 0.999900'
    >>> advice(0.5, {"--attention eager": 0.6, "--precision fp32": 0.999})
    'use --precision fp32: the worst row keeps a cosine of 0.999000 there, and of 0.500000 here'
    """
    here = f"the worst row keeps a cosine of {worst_cosine:.6f}"
    if worst_cosine >= FINE:
        return f"fine: {here}"
    if worst_cosine >= RANKS:
        return f"fine for ranking: {here}"
    better = {name: cosine for name, cosine in (measured or {}).items() if cosine > worst_cosine}
    if not better:
        return f"none of the settings tried helps: {here}"
    best = next((name for name in better if better[name] >= RANKS), max(better, key=better.__getitem__))
    there = f"the worst row keeps a cosine of {better[best]:.6f} there"
    return f"use {best}: {there}, and of {worst_cosine:.6f} here"
