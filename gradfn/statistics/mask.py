"""Selective masks: which coordinates of a gradient keep the inner products with queries, learned."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
    """How much of one block's inner products a mask keeps: mean correlations over queries, over rows.

    Args:
        kept: of the chosen coordinates.
        random: of a random mask of as many, for comparison.
        steps: steps of training until the best one.
    """

    kept: float
    random: float
    steps: int


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
    """Centred columns of norm 1, or 0; scaled before they are squared, for squares leave float32's range."""
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
    steps: int = 300,
    learning_rate: float = 0.05,
    patience: int = 50,
    watch: Watch | None = None,
    whole: bool = False,
) -> tuple[SelectedSides | SelectedFlat, dict[str, MaskReport]]:
    """Choose the coordinates of every block that keep its inner products with queries, one block at a time.

    The mask m is 1 on the k largest of the numbers s, one a coordinate, and 0 elsewhere (for both sides an
    outer product of two such). By Adam it maximises

        mean_q corr_b(<G_b, Q_q>, <m G_b, Q_q>)

    with the gradient passed straight through m to sigmoid(s), from the coordinates of most energy on, and
    gives the best mask of all steps. (GraSS maximises the correlation under m = sigmoid(s) and an L1 penalty;
    but every uniform m has the correlation 1, so that says nothing about which coordinates to keep.)

    Args:
        rows: gradients of training rows, `{block: [rows, out, in]}`, 3 or more.
        queries: gradients of queries, alike.
        dims: coordinates of the flattened block to keep, or `(out, in)` of both sides. A block or side that
            has no more is kept whole.
        seed: of the noise that breaks ties, and of the random mask in the report.
        steps, learning_rate: of the maximisation.
        patience: steps without a better mask after which it stops.
        watch: called with each block's name and report.
        whole: whether a mask may leave nothing out of all these blocks.

    Returns:
        The projection, and for every block the correlation that is kept, beside a random mask's.

    Raises:
        InputError: fewer than 3 rows, dimensions below 1 or of no block's size, numbers that are not finite.

    >>> scale = torch.tensor([9, 1, 9, 1, 1, 1])
    >>> g = torch.randn(20, 1, 6, generator=torch.Generator().manual_seed(0)) * scale
    >>> fit_mask({"a": g}, {"a": g[:4]}, 2)[0].chosen["a"][0].tolist()
    [0, 2]

    Source: GraSS, arXiv:2505.18976, section 3.2.
    """
    _check(rows, queries)
    if not whole:
        check_dims([tuple(G.shape[1:]) for G in rows.values()], dims)
    chosen, reports = {}, {}
    for name, G in rows.items():
        Q = queries[name].to(G)
        keep = _Keep(tuple(G.shape[1:]), dims)
        chosen[name], reports[name] = _fit_block(G, Q, keep, (seed, name), steps, learning_rate, patience)
        if watch is not None:
            watch(name, reports[name])
    return selected(chosen, {name: G.shape[1:] for name, G in rows.items()}), reports


def _check(rows: Blocks, queries: Blocks) -> None:
    if (
        min(len(next(iter(side.values()))) for side in (rows, queries)) < 1
        or len(next(iter(rows.values()))) < 3
    ):
        raise InputError("a mask is fitted to correlations over rows: give 3 rows or more, and a query")


def _told(dims: Dims) -> str:
    return str(dims) if isinstance(dims, int) else f"{dims[0]} x {dims[1]}"


def check_dims(sizes: Sequence[tuple[int, ...]], dims: Dims) -> None:
    """Refuse a mask of nothing, and one that leaves nothing out of blocks of these shapes.

    Raises:
        InputError: naming the largest block.
    """
    if min((dims,) if isinstance(dims, int) else dims) < 1:
        raise InputError(f"a mask of {_told(dims)} coordinates: give 1 or more")
    if all(_Keep(shape, dims).whole for shape in sizes):
        largest = " x ".join(map(str, max(sizes, key=prod)))
        raise InputError(
            f"a mask of {_told(dims)} leaves nothing out, for the largest block has "
            f"{largest}: give fewer coordinates"
        )


@dataclass(frozen=True)
class _Only(Kronecker):
    """Nothing of the blocks but of some."""

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
        model: what is attributed: a `Subject`, or a module with a subject's `options` as keywords.
        train, query: training rows and queries.
        dims: see `fit_mask`.
        rows: how many training rows, drawn at random, and how many queries at most to look at.
        before: what is done to gradients before the mask (an optimizer's normalisation).
        options: see `Subject`.
        seed, watch: see `fit_mask`.

    Raises:
        InputError: see `fit_mask`; a layer whose gradients of so many rows do not fit in memory.
    """
    subject = subject_of(model, **options)
    sizes = {site.block: site.spec.shape for site in find_sites(subject.model, subject.view)}
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
        rows: how many there are, queries among them.
        gradients: gives those of the named blocks, of rows and of queries.
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
        mask, report = fit_mask(train, query, dims, seed=seed, watch=watch, whole=True)
        chosen |= mask.chosen
        reports |= report
    return selected(chosen, sizes), reports


def drawn_rows(rows: int, count: int, seed: int, name: str) -> list[int]:
    """The numbers of the rows (or queries) to look at: so many at most, drawn with the seed.

    >>> sorted(drawn_rows(3, 512, 0, "rows"))
    [0, 1, 2]
    """
    return choice(min(count, rows), rows, seed, "selective", name).tolist()


def _groups(sizes: Mapping[str, tuple[int, ...]], rows: int) -> Iterator[list[str]]:
    """Blocks whose gradients of all rows fit in a quarter of the free memory together."""
    budget, group, held = free_memory(torch.device("cpu")) // 4, [], 0
    for name, shape in sizes.items():
        size = 4 * rows * prod(shape)
        if size > budget:
            raise InputError(
                f"the gradients of {name} for {rows:,} rows and queries take {size >> 20:,} MiB, and "
                f"{budget >> 20:,} may be used: look at fewer rows"
            )
        if group and held + size > budget:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


@dataclass(frozen=True)
class _Keep:
    """How many coordinates of what to keep."""

    shape: tuple[int, ...]
    dims: Dims

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of coordinates to choose among."""
        return (prod(self.shape),) if isinstance(self.dims, int) else self.shape

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of coordinates to keep of them."""
        dims = (self.dims,) if isinstance(self.dims, int) else self.dims
        return tuple(min(k, size) for k, size in zip(dims, self.sizes, strict=True))

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.counts == self.sizes

    def weights(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The weight of every number of the flattened block."""
        return parts[0] if len(parts) == 1 else torch.outer(*parts).flatten()

    def hard(self, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The largest, in ascending order of their place."""
        pairs = zip(logits, self.counts, strict=True)
        return tuple(s.argsort(descending=True, stable=True)[:k].sort().values for s, k in pairs)

    def indicator(self, chosen: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """1 where a coordinate is chosen."""
        made = []
        for index, size in zip(chosen, self.sizes, strict=True):
            made.append(torch.zeros(size).index_fill_(0, index, 1.0))
        return tuple(made)


def _fit_block(
    G: Tensor, Q: Tensor, keep: _Keep, key: tuple[int, str], steps: int, learning_rate: float, patience: int
) -> tuple[tuple[Tensor, ...], MaskReport]:  # fmt: skip
    rows, queries = (_in_range(key[1], side.flatten(1)) for side in (G, Q))
    before = rows @ queries.T

    def kept(parts: tuple[Tensor, ...]) -> Tensor:
        weights = keep.weights(parts).to(rows)
        return correlations(before, rows @ (queries * weights).T).mean()

    picks = zip(keep.counts, keep.sizes, strict=True)
    others = tuple(torch.from_numpy(choice(k, n, *key, "random", i)) for i, (k, n) in enumerate(picks))
    random = float(kept(keep.indicator(others)))
    if keep.whole:
        return tuple(torch.arange(size) for size in keep.sizes), MaskReport(1.0, 1.0, 0)
    logits = tuple(s.requires_grad_() for s in _start(rows, queries, keep, key))
    optimizer = torch.optim.Adam(logits, learning_rate)
    chosen, at = keep.hard(tuple(s.detach() for s in logits)), 0
    best = float(kept(keep.indicator(chosen)))
    for step in range(steps):
        hard = keep.hard(tuple(s.detach() for s in logits))
        soft = [s.sigmoid() for s in logits]
        pairs = zip(keep.indicator(hard), soft, strict=True)
        now = kept(tuple(m.to(s) + s - s.detach() for m, s in pairs))
        reached = float(now.detach())
        if reached > best:
            best, chosen, at = reached, hard, step
        elif step - at >= patience:
            break
        optimizer.zero_grad()
        (-now).backward()
        optimizer.step()
    return chosen, MaskReport(best, random, at)


def _in_range(name: str, values: Tensor) -> Tensor:
    """Times a power of 2, which no correlation sees: inner products and squares then stay in range."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    largest = torch.maximum(values.amax(), -values.amin())
    if not bool(largest.isfinite()):
        raise InputError(
            f"a gradient of {name} is NaN or infinite: leave that row out, or use --precision fp32"
        )
    tiny = torch.finfo(values.dtype).tiny
    return torch.ldexp(values, -torch.frexp(largest.clamp_min(tiny)).exponent)


def _start(rows: Tensor, queries: Tensor, keep: _Keep, key: tuple[int, str]) -> tuple[Tensor, ...]:
    """The logarithm of every coordinate's energy, standardised, with a little noise."""
    energy = (rows.square().mean(0) * queries.square().mean(0)).sqrt()
    parts = [energy] if len(keep.sizes) == 1 else [energy.view(keep.shape).sum(1 - axis) for axis in (0, 1)]
    made = []
    for i, part in enumerate(parts):
        logs = part.clamp_min(torch.finfo(part.dtype).tiny).log()
        scaled = (logs - logs.mean()) / logs.std(correction=0).clamp_min(1e-6)
        made.append(scaled + torch.from_numpy(1e-3 * normals(len(part), *key, "start", i)).to(part))
    return tuple(made)
