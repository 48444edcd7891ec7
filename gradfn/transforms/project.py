"""Random projections of blocks: of both factors (a Kron), or of the flattened block."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import ClassVar, SupportsIndex, get_args

from torch import Tensor

from gradfn.errors import InputError
from gradfn.linalg.kron import Kron, Side, apply_side
from gradfn.linalg.maps import Kind, random_map
from gradfn.transforms.chain import BlockFn, Blockwise, Chain, Kronecker
from gradfn.types import BlockSpec

FLAT = "flat"
"""The side of a map of flattened blocks, in its key."""


@dataclass(frozen=True)
class Project(Kronecker):
    """`G -> L G Rᵀ`, random `L [dims[0], out]`, `R [dims[1], in]`; shorter sides stay; see `project`."""

    dims: tuple[int, int]
    kind: Kind = "rademacher"
    seed: int = 0
    nonzeros: int = 1
    strict: bool = field(default=False, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.kind}:{self.dims[0]}x{self.dims[1]}{_tail(self.nonzeros)}"

    def settings(self) -> dict[str, object]:
        """The projection as it is spelled, and the seed."""
        return {"transform": "Project", "projection": str(self), "seed": self.seed}

    def kron(self, spec: BlockSpec) -> Kron:
        """The two maps of one block; None where there is nothing to make smaller."""
        return Kron(self._side(spec, "left", 0), self._side(spec, "right", 1))

    def _side(self, spec: BlockSpec, which: str, axis: int) -> Side:
        if spec.shape[axis] <= self.dims[axis]:
            return None
        shape = (self.dims[axis], spec.shape[axis])
        return random_map(
            self.kind, self.seed, spec.name, which, shape, self.nonzeros, dtype=spec.dtype, device=spec.device
        )


@dataclass(frozen=True)
class Compress(Blockwise):
    """`vec(G) -> M vec(G)`, `[rows, out, in] -> [rows, 1, dim]`, with a random `M`; see `compress`."""

    dim: int
    kind: Kind = "sjlt"
    seed: int = 0
    nonzeros: int = 1
    strict: bool = field(default=False, compare=False, repr=False)
    linear: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{self.kind}:{self.dim}{_tail(self.nonzeros)}"

    def settings(self) -> dict[str, object]:
        """The projection as it is spelled, and the seed."""
        return {"transform": "Compress", "projection": str(self), "seed": self.seed}

    def bind(self, spec: BlockSpec) -> BlockFn:
        """The map of one block, drawn once; a block of no more than `dim` numbers stays."""
        size = spec.shape[0] * spec.shape[1]
        if size <= self.dim:
            return _same
        side = random_map(
            self.kind, self.seed, spec.name, FLAT, (self.dim, size), self.nonzeros, dtype=spec.dtype,
            device=spec.device,
        )  # fmt: skip
        return lambda G: apply_side(side, G.flatten(1))[:, None]


def _same(G: Tensor) -> Tensor:
    return G


def _tail(nonzeros: int) -> str:
    return "" if nonzeros == 1 else f":{nonzeros}"


def _check(dims: tuple[int, ...], kind: str, nonzeros: int) -> None:
    if kind not in get_args(Kind):
        raise InputError(f"no projection {kind!r}: choose {', '.join(get_args(Kind))}")
    if min(dims) < 1:
        raise InputError(f"a projection to {' x '.join(map(str, dims))} numbers: give 1 or more")
    if nonzeros != 1 and kind != "sjlt":
        raise InputError(f"{kind} has no number of nonzeros, which only sjlt has: leave out {nonzeros}")
    if nonzeros < 1 or any(dim % nonzeros for dim in dims):
        raise InputError(
            f"an sjlt to {' x '.join(map(str, dims))} numbers cannot have {nonzeros} nonzeros a column: "
            "give a divisor"
        )


def project(
    dim: SupportsIndex | Sequence[SupportsIndex], kind: Kind = "rademacher", seed: int = 0, nonzeros: int = 1
) -> Project | Chain:
    """Project both sides of every block at random, `[out, in] -> [dims[0], dims[1]]`.

    `E <P G, P H> = <G, H>` over seeds. A side that is no longer than its dimension is left as it is, which
    loses nothing. The projection acts on the factors of a gradient, before the dense one exists.

    Args:
        dim: `(out, in)` of the projected block; a number is both, and 0 the full gradient (no projection).
        kind: "rademacher", "gaussian", "orthonormal", "mask", "sjlt" or "fjlt"; see `gradfn.linalg.maps`.
        seed: key of the draw; maps are never stored.
        nonzeros: of each column of an sjlt.

    Raises:
        InputError: a dimension below 1 (below 0 for a single number), an unknown kind, nonzeros that do not
            divide the dimensions; when applied, a pair of dimensions that makes no block smaller.

    >>> import torch
    >>> project(4)({"mlp": torch.ones(7, 10, 20)})["mlp"].shape
    torch.Size([7, 4, 4])
    >>> project((2, 8), "mask")({"mlp": torch.ones(7, 10, 20)})["mlp"].shape
    torch.Size([7, 2, 8])

    Source: LoGra, arXiv:2405.13954, section 3.1; masks and sjlt of factors: GraSS, arXiv:2505.18976,
    section 3.3.
    """
    sides = [index(side) for side in (dim if isinstance(dim, Sequence) else (dim, dim))]
    if len(sides) != 2:
        raise InputError(f"a projection has a dimension for each of two sides, (out, in), not {dim}")
    dims = sides[0], sides[1]
    if not isinstance(dim, Sequence) and dims[0] < 0:
        raise InputError(f"the projection dimension must be 0 (the full gradient) or more, not {dim}")
    if not isinstance(dim, Sequence) and dims[0] == 0:
        return Chain()
    _check(dims, kind, nonzeros)
    return Project(dims, kind, seed, nonzeros, strict=isinstance(dim, Sequence))


def compress(dim: int, kind: Kind = "sjlt", seed: int = 0, nonzeros: int = 1) -> Compress:
    """Compress every flattened block at random, `[out, in] -> [1, dim]`.

    `E <C G, C H> = <G, H>` over seeds. A block of no more than `dim` numbers is left as it is. Behind masks
    of both sides this is FactGraSS, `chain(project((128, 128), "mask"), compress(4096))`: the full gradient
    never exists. Behind `joint()` it is a projection of the whole gradient.

    Args:
        dim: numbers a block.
        kind, seed, nonzeros: see `project`.

    Raises:
        InputError: see `project`.

    >>> import torch
    >>> compress(16)({"mlp": torch.ones(7, 10, 20)})["mlp"].shape
    torch.Size([7, 1, 16])

    Source: GraSS, arXiv:2505.18976, section 3.
    """
    _check((dim,), kind, nonzeros)
    return Compress(dim, kind, seed, nonzeros, strict=True)
