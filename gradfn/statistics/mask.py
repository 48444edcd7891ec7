"""Selective masks: learning which coordinates of a gradient preserve its inner products with queries."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradfn.data import check_rows
from gradfn.engine.stream import collect
from gradfn.errors import InputError
from gradfn.linalg.kron import Kron
from gradfn.linalg.maps import Select
from gradfn.memory import free_memory
from gradfn.model.sites import find_sites
from gradfn.random import choice, normals
from gradfn.subject import Subject, SubjectOptions, subject_of
from gradfn.transforms import Kronecker, Transform, chain
from gradfn.transforms.fitted import SelectedFlat, SelectedSides, selected
from gradfn.types import Blocks, BlockSpec, Data

Dims = int | tuple[int, int]


@dataclass(frozen=True)
class MaskReport:
    """How well a mask preserves the inner products of one block.

    Both numbers are correlations, over rows, of inner products before and after the mask, averaged over
    queries.

    Args:
        kept: of the chosen coordinates.
        random: of as many random coordinates, for comparison.
        steps: the number of steps until the best mask.
    """

    kept: float
    random: float
    steps: int


@dataclass(frozen=True)
class MaskSearch:
    """How long and how fast to search for a mask, by Adam.

    Args:
        steps: at most.
        learning_rate: of Adam.
        patience: steps without a better mask after which the search stops.
    """

    steps: int = 300
    learning_rate: float = 0.05
    patience: int = 50


DEFAULT_SEARCH = MaskSearch()
Watch = Callable[[str, MaskReport], None]
"""Called with each block's name and report."""


def correlations(
    before: Float[Tensor, "rows queries"], after: Float[Tensor, "rows queries"]
) -> Float[Tensor, " queries"]:
    """Pearson's correlation over rows, for every query; 0 where one side does not vary.

    >>> a = torch.tensor([[1.0], [2.0], [3.0]])
    >>> correlations(a, 2 * a).round(decimals=4)
    tensor([1.])
    """
    return (_directions(before) * _directions(after)).sum(0)


def _directions(values: Tensor) -> Tensor:
    """Centred columns of norm 1, or 0. They are scaled first: squares could leave float32's range."""
    centred = values - values.mean(0)
    largest, size = (side.detach().abs().amax(0) for side in (centred, values))
    tiny, rounding = torch.finfo(values.dtype).tiny, len(values) * torch.finfo(values.dtype).eps * size
    scaled = torch.where(largest > rounding, centred / largest.clamp_min(tiny), 0.0)
    return scaled / scaled.square().sum(0).clamp_min(tiny).sqrt()


def fit_mask(
    rows: Blocks,
    queries: Blocks,
    dims: Dims,
    *,
    seed: int = 0,
    search: MaskSearch = DEFAULT_SEARCH,
    watch: Watch | None = None,
) -> tuple[SelectedSides | SelectedFlat, dict[str, MaskReport]]:
    """Choose the coordinates of every block that best preserve its inner products with queries.

    A coordinate has a number s, and the mask m is 1 on the k largest numbers and 0 elsewhere. (A mask of both
    sides is the outer product of two of these.) Starting from the coordinates with the most energy, Adam
    maximises

        mean_q corr_b(<G_b, Q_q>, <m G_b, Q_q>)

    with the gradient passed straight through m to sigmoid(s). The result is the best mask of all steps.

    (GraSS maximises the correlation under m = sigmoid(s) and an L1 penalty. But every uniform m has the
    correlation 1, so this does not say which coordinates to choose.)

    Args:
        rows: gradients of training rows, `{block: [rows, out, in]}`, 3 or more.
        queries: gradients of queries, with the same blocks.
        dims: the number of coordinates of the flattened block, or `(out, in)` of both sides. A block or side
            with fewer coordinates is taken whole.
        seed: of the noise that breaks ties, and of the random mask in the report.
        search: how long and how fast to search.
        watch: called with each block's name and report.

    Returns:
        The projection, and a report for every block.

    Raises:
        InputError: fewer than 3 rows, no query, dimensions below 1 or as large as all blocks, numbers that
            are not finite.

    >>> scale = torch.tensor([9, 1, 9, 1, 1, 1])
    >>> g = torch.randn(20, 1, 6, generator=torch.Generator().manual_seed(0)) * scale
    >>> fit_mask({"a": g}, {"a": g[:4]}, 2)[0].chosen["a"][0].tolist()
    [0, 2]

    Source: GraSS, arXiv:2505.18976, section 3.2.
    """
    _check_counts(rows, queries)
    check_dims([tuple(G.shape[1:]) for G in rows.values()], dims)
    chosen, reports = _fit_blocks(rows, queries, dims, seed, search, watch)
    return selected(chosen, {name: G.shape[1:] for name, G in rows.items()}), reports


def _fit_blocks(
    rows: Blocks, queries: Blocks, dims: Dims, seed: int, search: MaskSearch, watch: Watch | None
) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, MaskReport]]:
    """The chosen coordinates and the report of every block."""
    chosen, reports = {}, {}
    for name, G in rows.items():
        wanted = _Coordinates(tuple(G.shape[1:]), dims)
        chosen[name], reports[name] = _fit_block(G, queries[name].to(G), wanted, (seed, name), search)
        if watch is not None:
            watch(name, reports[name])
    return chosen, reports


def _check_counts(rows: Blocks, queries: Blocks) -> None:
    if len(next(iter(rows.values()))) < 3 or len(next(iter(queries.values()))) < 1:
        raise InputError("a mask is fitted to correlations over rows: give 3 rows or more, and a query")


def check_dims(sizes: Sequence[tuple[int, ...]], dims: Dims) -> None:
    """Refuse a mask of no coordinates, and one of all coordinates of blocks with these shapes.

    Raises:
        InputError: the mask is refused; the message says how large the largest block is.
    """
    text = str(dims) if isinstance(dims, int) else f"{dims[0]} x {dims[1]}"
    if min((dims,) if isinstance(dims, int) else dims) < 1:
        raise InputError(f"a mask must have 1 or more coordinates, not {text}: give more")
    if all(_Coordinates(shape, dims).whole for shape in sizes):
        largest = " x ".join(map(str, max(sizes, key=prod)))
        raise InputError(
            f"a mask of {text} coordinates leaves nothing out of the largest block, {largest}: give fewer"
        )


@dataclass(frozen=True)
class _Only(Kronecker):
    """Some of the blocks; of all others no numbers are left."""

    names: frozenset[str]

    def kron(self, spec: BlockSpec) -> Kron:
        if spec.name in self.names:
            return Kron()
        return Kron(Select(torch.empty(0, dtype=torch.int64, device=spec.device), spec.shape[0]))


def selective_mask(
    model: nn.Module | Subject,
    train: Data,
    query: Data,
    dims: Dims,
    *,
    rows: int = 512,
    seed: int = 0,
    before: Transform | None = None,
    watch: Watch | None = None,
    **options: Unpack[SubjectOptions],
) -> tuple[SelectedSides | SelectedFlat, dict[str, MaskReport]]:
    """Fit a selective mask to a model's gradients: `fit_mask`, as many layers at a time as memory holds.

    Args:
        model: the module to attribute, with further options as keywords; or a `Subject`.
        train, query: training rows and queries.
        dims: see `fit_mask`.
        rows: how many training rows, and how many queries, to use at most; they are drawn at random.
        before: the transform before the mask (an optimizer's normalisation).
        seed, watch: see `fit_mask`.
        options: of the `Subject`: loss, query_loss, view, token_batch_size.

    Raises:
        InputError: see `fit_mask`; a layer whose gradients of so many rows do not fit in memory.
    """
    subject = subject_of(model, **options)
    sizes = {site.block: site.spec.shape for site in find_sites(subject.model, subject.view)}
    for data in (train, query):
        check_rows(data)
    some = [
        [data[row] for row in drawn_rows(len(data), rows, seed, name)]
        for data, name in ((train, "rows"), (query, "queries"))
    ]
    sides = subject, replace(subject, loss=subject.query_loss)

    def gradients(names: list[str]) -> list[Blocks]:
        only, gradients = chain(before or chain(), _Only(frozenset(names))), []
        for data, side in zip(some, sides, strict=True):
            made = collect(side, data, only)
            assert isinstance(made, dict)
            gradients.append({name: made[name] for name in names})
        return gradients

    return fit_by_parts(sizes, sum(map(len, some)), gradients, dims, seed=seed, watch=watch)


def fit_by_parts(
    sizes: Mapping[str, tuple[int, ...]],
    rows: int,
    gradients: Callable[[list[str]], Sequence[Blocks]],
    dims: Dims,
    *,
    seed: int = 0,
    watch: Watch | None = None,
) -> tuple[SelectedSides | SelectedFlat, dict[str, MaskReport]]:
    """`fit_mask`, as many blocks at a time as memory holds.

    Args:
        sizes: the shapes `(out, in)` of all blocks.
        rows: the number of rows and queries together.
        gradients: `gradients(names) -> (rows, queries)`, the gradients of the named blocks.
        dims, seed, watch: see `fit_mask`.

    Raises:
        InputError: see `fit_mask`; a block whose gradients of so many rows do not fit in memory.

    >>> G = {"a": torch.eye(6).view(6, 2, 3), "b": torch.eye(6).view(6, 1, 6)}
    >>> mask, _ = fit_by_parts({"a": (2, 3), "b": (1, 6)}, 12, lambda names: [G, G], 2)
    >>> [len(mask.chosen[name][0]) for name in mask.chosen]
    [2, 2]
    """
    check_dims(list(sizes.values()), dims)
    chosen: dict[str, tuple[Tensor, ...]] = {}
    reports: dict[str, MaskReport] = {}
    for names in list(_groups(sizes, rows)):
        train, query = gradients(names)
        _check_counts(train, query)
        some, report = _fit_blocks(train, query, dims, seed, DEFAULT_SEARCH, watch)
        chosen |= some
        reports |= report
    return selected(chosen, sizes), reports


def drawn_rows(rows: int, count: int, seed: int, name: str) -> list[int]:
    """The numbers of the rows (or queries) to use, at most `count`, drawn by the seed.

    >>> sorted(drawn_rows(3, 512, 0, "rows"))
    [0, 1, 2]
    """
    return choice(min(count, rows), rows, seed, "selective", name).tolist()


def _groups(sizes: Mapping[str, tuple[int, ...]], rows: int) -> Iterator[list[str]]:
    """The blocks in groups, the gradients of each of which fit in a quarter of the free memory."""
    budget, group, held = free_memory(torch.device("cpu")) // 4, [], 0
    for name, shape in sizes.items():
        size = 4 * rows * prod(shape)
        if size > budget:
            raise InputError(
                f"the gradients of {name} for {rows:,} rows and queries take {size >> 20:,} MiB, but "
                f"only {budget >> 20:,} may be used: use fewer rows"
            )
        if group and held + size > budget:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


@dataclass(frozen=True)
class _Coordinates:
    """How many coordinates of a block, or of its sides, to choose."""

    shape: tuple[int, ...]
    dims: Dims

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of coordinates of the flattened block, or of each side."""
        return (prod(self.shape),) if isinstance(self.dims, int) else self.shape

    @property
    def counts(self) -> tuple[int, ...]:
        """How many of them to choose."""
        dims = (self.dims,) if isinstance(self.dims, int) else self.dims
        return tuple(min(k, size) for k, size in zip(dims, self.sizes, strict=True))

    @property
    def whole(self) -> bool:
        """Whether all are chosen."""
        return self.counts == self.sizes

    def weights(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The weight of every number of the flattened block."""
        return parts[0] if len(parts) == 1 else torch.outer(*parts).flatten()

    def hard(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The places of the largest numbers, in ascending order."""
        pairs = zip(logits, self.counts, strict=True)
        return tuple(s.argsort(descending=True, stable=True)[:k].sort().values for s, k in pairs)

    def indicator(self, chosen: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """1 where a coordinate is chosen."""
        made = []
        for index, size in zip(chosen, self.sizes, strict=True):
            made.append(torch.zeros(size).index_fill_(0, index, 1.0))
        return tuple(made)


def _fit_block(
    G: Tensor, Q: Tensor, wanted: _Coordinates, key: tuple[int, str], search: MaskSearch
) -> tuple[tuple[Tensor, ...], MaskReport]:
    rows, queries = (_in_range(key[1], side.flatten(1)) for side in (G, Q))
    before = rows @ queries.T

    def kept(parts: tuple[Tensor, ...]) -> Tensor:
        weights = wanted.weights(parts).to(rows)
        return correlations(before, rows @ (queries * weights).T).mean()

    picks = zip(wanted.counts, wanted.sizes, strict=True)
    others = tuple(torch.from_numpy(choice(k, n, *key, "random", i)) for i, (k, n) in enumerate(picks))
    random = float(kept(wanted.indicator(others)))
    if wanted.whole:
        return tuple(torch.arange(size) for size in wanted.sizes), MaskReport(1.0, 1.0, 0)
    logits = tuple(s.requires_grad_() for s in _start(rows, queries, wanted, key))
    optimizer = torch.optim.Adam(logits, search.learning_rate)
    chosen, at = wanted.hard(tuple(s.detach() for s in logits)), 0
    best = float(kept(wanted.indicator(chosen)))
    for step in range(search.steps):
        hard = wanted.hard(tuple(s.detach() for s in logits))
        soft = [s.sigmoid() for s in logits]
        pairs = zip(wanted.indicator(hard), soft, strict=True)
        now = kept(tuple(m.to(s) + s - s.detach() for m, s in pairs))
        reached = float(now.detach())
        if reached > best:
            best, chosen, at = reached, hard, step
        elif step - at >= search.patience:
            break
        optimizer.zero_grad()
        (-now).backward()
        optimizer.step()
    return chosen, MaskReport(best, random, at)


def _in_range(name: str, values: Tensor) -> Tensor:
    """The values times a power of 2, so that squares stay in range; it changes no correlation."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    largest = torch.maximum(values.amax(), -values.amin())
    if not bool(largest.isfinite()):
        raise InputError(
            f"a gradient of {name} is NaN or infinite: leave that row out, or compute in float32"
        )
    tiny = torch.finfo(values.dtype).tiny
    return torch.ldexp(values, -torch.frexp(largest.clamp_min(tiny)).exponent)


def _start(rows: Tensor, queries: Tensor, wanted: _Coordinates, key: tuple[int, str]) -> tuple[Tensor, ...]:
    """The logarithm of every coordinate's energy, standardised, with a little noise."""
    energy = (rows.square().mean(0) * queries.square().mean(0)).sqrt()
    parts = (
        [energy] if len(wanted.sizes) == 1 else [energy.view(wanted.shape).sum(1 - axis) for axis in (0, 1)]
    )
    made = []
    for i, part in enumerate(parts):
        logs = part.clamp_min(torch.finfo(part.dtype).tiny).log()
        scaled = (logs - logs.mean()) / logs.std(correction=0).clamp_min(1e-6)
        made.append(scaled + torch.from_numpy(1e-3 * normals(len(part), *key, "start", i)).to(part))
    return tuple(made)
