"""Linear maps of vectors that are drawn at random from a key, `v [dim] -> M v [p]`, with `E[Mᵀ M] = I`.

Dense ones are matrices. The others are never written out: they cost what they touch.

| kind | M | time a vector |
|---|---|---|
| rademacher, gaussian | i.i.d. entries over `sqrt(p)` | `p dim` |
| orthonormal | orthonormal rows, times `sqrt(dim / p)` | `p dim` |
| mask | `p` coordinates without replacement, times `sqrt(dim / p)` | `p` |
| sjlt | every coordinate, with a sign, added to s of the outputs | `s dim` |
| fjlt | random signs, a Walsh-Hadamard transform, `p` of its outputs | `dim log dim` |
"""

from dataclasses import dataclass, field
from functools import cache
from math import isqrt, prod, sqrt
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.memory import free_memory
from gradfn.random import choice, normals, signs, words

Kind = Literal["rademacher", "gaussian", "orthonormal", "mask", "sjlt", "fjlt"]
DENSE: tuple[Kind, ...] = ("rademacher", "gaussian", "orthonormal")
DRAW_ELEMENTS = 1 << 22
"""Numbers of a dense matrix drawn at a time; a multiple of these has a key for each part."""
SMALL_RUN, GATHERED = 1 << 13, 1 << 20
"""Numbers of an sjlt's run below which runs are gathered, and numbers a row gathered at a time."""
SHORT_RUN = 1 << 16
"""Numbers of an sjlt's run, of all rows, up to which runs are added two at a time."""
STRIP = 64
"""Columns of a map that are written out at a time."""
CACHED = 1 << 20
"""Numbers that a Walsh-Hadamard transform works on at a time: about what a cache holds."""
RADIX = 32
"""Size of the Hadamard matrices that a Walsh-Hadamard transform is made of: larger costs more time."""


class Map:
    """A linear map of the last dimension, `[..., dim] -> [..., p]`, that is not held as a matrix."""

    ndim = 2
    shape: tuple[int, int]

    def __call__(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def with_one(self, v: Float[Tensor, "*rest short"]) -> Float[Tensor, "*rest p"]:
        """The map of `v` with one more number, 1, behind the others."""
        return self(torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], -1))

    def dense(
        self, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Float[Tensor, "p dim"]:
        """The map as a matrix, made of a few columns at a time."""
        dim, strips = self.shape[1], []
        for start in range(0, dim, STRIP):
            unit = torch.zeros(min(STRIP, dim - start), dim, dtype=dtype, device=device)
            unit[torch.arange(len(unit)), torch.arange(start, start + len(unit))] = 1.0
            strips.append(self(unit))
        return torch.cat(strips).T

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, eq=False)
class Select(Map):
    """`p` coordinates of `dim`, times a scale.

    >>> Select(torch.tensor([2, 0]), 3, 10.0)(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[30., 10.]])
    """

    index: Tensor
    dim: int
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.index), self.dim

    def __call__(self, v: Tensor) -> Tensor:
        return v.index_select(-1, self.index.to(v.device)) * self.scale

    def with_one(self, v: Tensor) -> Tensor:
        """The last coordinate is the 1; no copy of `v` is made for it."""
        index = self.index.to(v.device)
        taken = v.index_select(-1, index.clamp_max(self.dim - 2))
        return taken.masked_fill_(index == self.dim - 1, 1.0) * self.scale


@dataclass(frozen=True, eq=False)
class Sketch(Map):
    """A sparse Johnson-Lindenstrauss transform, s nonzeros a column, one in each of s parts of the output.

    Each part, of `m = p / s` numbers: every run of m consecutive coordinates gets random signs, is shifted
    cyclically by a random number of places and added. Two coordinates of a run never meet, two of different
    runs with probability 1/m: no more than under independent hashing, so neither is the variance of inner
    products, which depends on pairs alone. Yet memory is read and written in order.

    >>> Sketch(2, ((torch.ones(5), torch.tensor([0, 1, 0])),))(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]))
    tensor([[10.,  5.]])

    Source: Kane and Nelson, arXiv:1012.1577, section 3; GraSS, arXiv:2505.18976, section 3.
    """

    p: int
    parts: tuple[tuple[Tensor, Tensor], ...] = field(repr=False)
    """The signs `[dim]` and the shift of every run `[runs]`, for each of the s parts."""

    @property
    def shape(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.p, len(self.parts[0][0])

    def __call__(self, v: Tensor) -> Tensor:
        flat = v.reshape(prod(v.shape[:-1]), v.shape[-1])
        m = self.p // len(self.parts)
        parts = [_sum_of_runs(flat, weights.to(v), shifts, m) for weights, shifts in self.parts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).view(*v.shape[:-1], self.p)


def _sum_of_runs(flat: Tensor, weights: Tensor, shifts: Tensor, m: int) -> Tensor:
    """The sum of all runs of `flat * weights`, shifted, `[rows, m]`."""
    if len(shifts) > 1 and len(flat) * m < SMALL_RUN:
        return _sum_of_small_runs(flat, weights, shifts, m)
    width, starts = 2 * m, shifts.tolist()  # no run goes round the end
    # vmap has no rule for a multiplication with its addition, nor for strides of one's own.
    mapped = torch._C._functorch.is_batchedtensor(flat)  # pyright: ignore
    # Of shorter runs two a call, for calls cost as much as sums do: two starts are always a stride apart.
    pairs_up = not mapped and len(flat) * m <= SHORT_RUN
    paired = flat.shape[1] // width * width if pairs_up else 0
    into = flat.new_zeros(len(flat), 2 if pairs_up else 1, width)
    pairs = flat[:, :paired].unflatten(1, (-1, 2, m)).unbind(1) if paired else ()
    for pair, flips, start, other in zip(
        pairs, weights.split(width), starts[::2], starts[1::2], strict=False
    ):
        strides = (2 * width, width + other - start, 1)
        into.as_strided(pair.shape, strides, start).addcmul_(pair, flips.view(2, m))
    left = zip(flat[:, paired:].split(m, 1), weights[paired:].split(m), starts[paired // m :], strict=False)
    for run, flips, start in left:
        one = into[:, 0, start : start + run.shape[1]]
        one.add_(run * flips) if mapped else one.addcmul_(run, flips)
    unfolded = into.sum(1) if pairs_up else into[:, 0]
    return unfolded[:, :m] + unfolded[:, m:]


def _sum_of_small_runs(flat: Tensor, weights: Tensor, shifts: Tensor, m: int) -> Tensor:
    """The same by gathering: many runs at a time, where one is less work than a call."""
    out, places = flat.new_zeros(len(flat), m), torch.arange(m, device=flat.device)
    step = max(1, GATHERED // m)
    for start in range(0, len(shifts), step):
        part = shifts[start : start + step].to(flat.device)
        columns = slice(start * m, (start + len(part)) * m)
        signed = flat[:, columns] * weights[columns]
        runs = F.pad(signed, (0, len(part) * m - signed.shape[1])).unflatten(1, (len(part), m))
        index = (places - part[:, None]) % m
        out = out + runs.gather(2, index.expand(len(flat), -1, -1)).sum(1)
    return out


@dataclass(frozen=True, eq=False)
class Hadamard(Map):
    """Random signs, a Walsh-Hadamard transform of the next power of two, `p` of its outputs over `sqrt(p)`.

    Source: Ailon and Chazelle, The fast Johnson-Lindenstrauss transform, SIAM J. Comput. 39(1), section 2;
    subsampled as in Tropp, arXiv:1011.1595, section 1.
    """

    signs: Tensor = field(repr=False)
    index: Tensor = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.index), len(self.signs)

    def __call__(self, v: Tensor) -> Tensor:
        count, dim = prod(v.shape[:-1]), v.shape[-1]
        n, step = power_of_two(dim), max(1, CACHED // power_of_two(dim))
        flips, index, taken = self.signs.to(v), self.index.to(v.device), []
        for part in v.reshape(count, dim).split(step):
            padded = F.pad(part * flips, (0, n - dim))
            taken.append(walsh_hadamard(padded).index_select(1, index))
        return (torch.cat(taken) / sqrt(len(index))).view(*v.shape[:-1], len(index))


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n.

    >>> power_of_two(5)
    8
    """
    return 1 << (n - 1).bit_length()


@cache
def _hadamard_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def walsh_hadamard(v: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """`H v`, not normalised, for n a power of two, in `n log n`: one axis of at most 32 numbers at a time.

    >>> walsh_hadamard(torch.tensor([[1.0, 2.0]]))
    tensor([[ 3., -1.]])
    """
    (rows, n), done = v.shape, 1
    while done < n:
        size = min(RADIX, n // done)
        H = _hadamard_matrix(size, v.dtype, v.device)
        if done == 1:
            v = (v.reshape(rows * (n // size), size) @ H).view(rows, n)
        else:
            v = (H @ v.view(rows * (n // size // done), size, done)).view(rows, n)
        done *= size
    return v


@dataclass(frozen=True, eq=False)
class Steps(Map):
    """Maps, matrices and diagonals, one after the other."""

    steps: tuple["Map | Tensor", ...]

    @property
    def shape(self) -> tuple[int, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.steps[-1].shape[0], self.steps[0].shape[-1]

    def __call__(self, v: Tensor) -> Tensor:
        for step in self.steps:
            v = step(v) if isinstance(step, Map) else (v * step if step.ndim == 1 else v @ step.T)
        return v


def random_matrix(
    seed: int,
    name: str,
    side: str,
    shape: tuple[int, int],
    kind: Kind = "rademacher",
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "p dim"]:
    """Draw a dense `M [p, dim]` with `E[Mᵀ M] = I`, so that inner products are unbiased.

    rademacher and gaussian: i.i.d. entries over `sqrt(p)`. orthonormal: rows orthonormal, times
    `sqrt(dim / p)`; for `p >= dim` the columns are orthonormal and the map is an isometry.

    Args:
        seed, name, side: the key; equal keys give equal matrices on every device.
        shape: `(p, dim)`, in the key too, so that two projections in one chain are independent.

    >>> M = random_matrix(0, "mlp", "right", (2, 64))
    >>> M.shape, M.square().sum(0).unique()
    (torch.Size([2, 64]), tensor([1.0000], dtype=torch.float64))
    """
    p, dim = shape
    _refuse_too_large(kind, name, shape, dtype)
    if kind == "orthonormal":
        return torch.from_numpy(_orthonormal(seed, name, side, shape) * max(1.0, np.sqrt(dim / p))).to(dtype)
    draw = signs if kind == "rademacher" else normals
    made, step = torch.empty(shape, dtype=dtype), max(1, DRAW_ELEMENTS // dim)
    for part, start in enumerate(range(0, p, step)):
        rows = min(step, p - start)
        key = (seed, name, side, f"{p}x{dim}", *([part] if part else []))
        made[start : start + rows] = torch.from_numpy(draw(rows * dim, *key).reshape(rows, dim) / np.sqrt(p))
    return made


def _refuse_too_large(kind: Kind, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Refuse a matrix that would not fit in memory, before it is drawn."""
    copies = 4 if kind == "orthonormal" else 1  # its decomposition, in float64
    size, free = shape[0] * shape[1] * (8 * copies if copies > 1 else dtype.itemsize), free_memory()
    if size > free:
        raise InputError(
            f"the matrix of {kind}:{shape[0]} for {name} takes {size >> 20:,} MiB and {free >> 20:,} are "
            "free: take sjlt, or project both sides of the block"
        )


def _orthonormal(seed: int, name: str, side: str, shape: tuple[int, int]) -> np.ndarray:
    """Orthonormal rows (columns, where there are more rows than columns), Haar-distributed."""
    wide = shape[0] <= shape[1]
    gaussian = normals(prod(shape), seed, name, side, f"{shape[0]}x{shape[1]}").reshape(shape)
    q, r = np.linalg.qr(gaussian.T if wide else gaussian)
    q = q * np.sign(np.diag(r))  # QR leaves the signs open; this choice makes them the Haar measure's
    return np.ascontiguousarray(q.T if wide else q)


def random_map(
    kind: Kind,
    seed: int,
    name: str,
    side: str,
    shape: tuple[int, int],
    nonzeros: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | None = None,
) -> Tensor | Map:
    """Draw a map `[p, dim]` of any kind, `p < dim`; see the table above.

    Args:
        kind: what to draw.
        seed, name, side: the key.
        shape: `(p, dim)`.
        nonzeros: of each column of an sjlt, a divisor of p.

    Raises:
        InputError: nonzeros that do not divide p.

    >>> random_map("mask", 0, "mlp", "left", (2, 3)).shape
    (2, 3)
    """
    p, dim = shape
    key = (seed, name, side, f"{p}x{dim}")
    match kind:
        case "mask":
            return Select(torch.from_numpy(choice(p, dim, *key)).to(device), dim, sqrt(dim / p))
        case "sjlt":
            return _sketch(shape, nonzeros, key, dtype, device)
        case "fjlt":
            flips = torch.from_numpy(signs(dim, *key)).to(device, dtype)
            taken = torch.from_numpy(choice(p, power_of_two(dim), *key, "rows")).to(device)
            return Hadamard(flips, taken)
    return random_matrix(seed, name, side, shape, kind, dtype).to(device)


def _sketch(
    shape: tuple[int, int],
    nonzeros: int,
    key: tuple[object, ...],
    dtype: torch.dtype,
    device: torch.device | None,
) -> Sketch:
    p, dim = shape
    if not 1 <= nonzeros <= p or p % nonzeros:
        raise InputError(
            f"an sjlt to {p} numbers cannot have {nonzeros} nonzeros a column: give a divisor of {p}"
        )
    m, parts = p // nonzeros, []
    for part in range(nonzeros):
        flips = torch.from_numpy(signs(dim, *key, "signs", part) / sqrt(nonzeros)).to(device, dtype)
        shifts = words(-(-dim // m), *key, "shifts", part) % np.uint64(m)
        parts.append((flips, torch.from_numpy(shifts.astype(np.int64)).to(device)))
    return Sketch(p, tuple(parts))


def square_side(k: int) -> int:
    """The side of the smallest square of k numbers or more.

    >>> square_side(17)
    5
    """
    return isqrt(k - 1) + 1
