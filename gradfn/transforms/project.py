"""Random projections of both factors of a block, drawn from (seed, block, side) wherever they are needed."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gradfn.errors import InputError
from gradfn.kron import Kron
from gradfn.transforms.chain import Chain, Kronecker
from gradfn.types import BlockSpec

Distribution = Literal["rademacher", "gaussian", "orthonormal"]


def _raw(seed: int, name: str, side: str, shape: tuple[int, int], count: int) -> np.ndarray:
    """`count` random 64-bit words of the Philox counter generator keyed by (seed, name, side, shape).

    The shape is in the key so that two projections in one chain are independent at one seed.
    """
    digest = sha256(f"{seed}\0{name}\0{side}\0{shape[0]}x{shape[1]}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8")
    return np.random.Philox(key=key).random_raw(count)  # the raw words are stable across numpy versions


def _rademacher(seed: int, name: str, side: str, shape: tuple[int, int]) -> np.ndarray:
    count = shape[0] * shape[1]
    words = _raw(seed, name, side, shape, -(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return (2.0 * bits - 1.0).reshape(shape)


def _gaussian(seed: int, name: str, side: str, shape: tuple[int, int]) -> np.ndarray:
    """Box and Muller's transform of pairs of uniform numbers."""
    half = -(-shape[0] * shape[1] // 2)
    uniform = (_raw(seed, name, side, shape, 2 * half) >> 11).astype(np.float64) + 0.5
    u, v = uniform.reshape(2, half) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(u)), 2.0 * np.pi * v
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: shape[0] * shape[1]].reshape(
        shape
    )


def _orthonormal(seed: int, name: str, side: str, shape: tuple[int, int]) -> np.ndarray:
    """Orthonormal rows (columns, where there are more rows than columns), Haar-distributed."""
    wide = shape[0] <= shape[1]
    gaussian = _gaussian(seed, name, side, shape)
    q, r = np.linalg.qr(gaussian.T if wide else gaussian)
    q = q * np.sign(np.diag(r))  # QR leaves the signs open; this choice makes them the Haar measure's
    return q.T if wide else q


def random_matrix(
    seed: int, name: str, side: str, shape: tuple[int, int], distribution: Distribution = "rademacher"
) -> Float[Tensor, "p dim"]:
    """Draw the projection matrix `M [p, dim]` with `E[Mᵀ M] = I`, so that inner products are unbiased.

    rademacher and gaussian: i.i.d. entries over `sqrt(p)`. orthonormal: rows orthonormal, times
    `sqrt(dim / p)`; for `p >= dim` the columns are orthonormal and the map is an isometry.

    Args:
        seed, name, side: the key; equal keys give equal matrices on every device.
        shape: `(p, dim)`.

    >>> M = random_matrix(0, "mlp", "right", (2, 64))
    >>> M.shape, M.square().sum(0).unique()
    (torch.Size([2, 64]), tensor([1.0000], dtype=torch.float64))
    """
    p, dim = shape
    if distribution == "rademacher":
        matrix = _rademacher(seed, name, side, shape) / np.sqrt(p)
    elif distribution == "gaussian":
        matrix = _gaussian(seed, name, side, shape) / np.sqrt(p)
    else:
        matrix = _orthonormal(seed, name, side, shape) * max(1.0, np.sqrt(dim / p))
    return torch.from_numpy(np.ascontiguousarray(matrix))


@dataclass(frozen=True)
class Project(Kronecker):
    """`G -> L G Rᵀ` with random `L [dim, out]` and `R [dim, in]`; sides up to `dim` stay; see `project`."""

    dim: int
    distribution: Distribution = "rademacher"
    seed: int = 0

    def kron(self, spec: BlockSpec) -> Kron:
        """The two matrices of one block; None where there is nothing to make smaller."""

        return Kron(self._side(spec, "left", spec.shape[0]), self._side(spec, "right", spec.shape[1]))

    def _side(self, spec: BlockSpec, which: str, width: int) -> Tensor | None:
        if width <= self.dim:
            return None
        matrix = random_matrix(self.seed, spec.name, which, (self.dim, width), self.distribution)
        return matrix.to(spec.dtype).to(spec.device)


def project(dim: int, distribution: Distribution = "rademacher", seed: int = 0) -> Project | Chain:
    """Project both sides of every block at random, `[out, in] -> [dim, dim]`.

    `E <P G, P H> = <G, H>` over seeds. A side that is no longer than `dim` is left as it is. `dim` 0 is the
    full gradient (no projection).

    Args:
        dim: side length of the projected block.
        distribution: "rademacher", "gaussian" or "orthonormal"; see `random_matrix`.
        seed: key of the draw; matrices are never stored.

    Raises:
        InputError: a negative dimension or an unknown distribution.

    >>> project(4)({"mlp": torch.ones(7, 10, 20)})["mlp"].shape
    torch.Size([7, 4, 4])

    Source: LoGra, arXiv:2405.13954, section 3.1.
    """
    if dim < 0:
        raise InputError(f"the projection dimension must be 0 (the full gradient) or more, not {dim}")
    if distribution not in get_args(Distribution):
        raise InputError(f"no projection {distribution!r}: choose {', '.join(get_args(Distribution))}")
    return Project(dim, distribution, seed) if dim else Chain()
