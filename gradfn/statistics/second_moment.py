"""The second moment of (projected) gradients, one dense matrix a block."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from gradfn.linalg.rows import RowSpectrum
from gradfn.statistics.curvature import Curvature, decomposed, dense_spectrum
from gradfn.statistics.fold import Additive, FoldState, refuse_empty
from gradfn.transforms import Transform
from gradfn.transforms.row_sum import RowSum
from gradfn.types import Blocks
from gradfn.watch import watched


def _gram(name: str, G: Tensor) -> Tensor:
    flat = G.flatten(1).to(torch.promote_types(G.dtype, torch.float32))
    return flat.mT @ flat


@dataclass(frozen=True)
class SecondMoment(Additive[Curvature]):
    """`H = 1/N sum_b vec(P_b) vec(P_b)ᵀ`; see `second_moment`."""

    gives_curvature = True
    few_numbers: ClassVar[int] = 1024
    """Blocks of so many numbers or fewer are decomposed in no time, however few rows there are."""

    def stage(self) -> Transform:
        """The Gram matrix of the rows."""
        return RowSum(_gram)

    def finalize(self, state: FoldState) -> Curvature:
        """Divide and decompose."""
        refuse_empty(state)
        spectra = {
            name: decomposed(name, dense_spectrum, state.blocks[name] / state.count, state.dtype)
            for name in watched("decompositions", state.blocks, "blocks", timed=False)
        }
        return Curvature("second_moment", spectra, state.count)

    def wants_rows(self, shapes: Mapping[str, tuple[int, ...]], count: int) -> bool:
        """Whether there are fewer rows than numbers in every block, and so many that it matters."""
        return all(prod(shape) > max(count, self.few_numbers) for shape in shapes.values())

    def of_rows(self, blocks: Blocks) -> Curvature:
        """The same curvature, of all rows at once; see `RowSpectrum`."""
        wide = {
            name: G.flatten(1).to(torch.promote_types(G.dtype, torch.float32)) for name, G in blocks.items()
        }
        spectra = {
            name: decomposed(name, RowSpectrum, wide[name])
            for name in watched("decompositions", wide, "blocks", timed=False)
        }
        return Curvature("second_moment", spectra, len(next(iter(wide.values()))))


def second_moment() -> SecondMoment:
    """Fit the second moment of every (projected) block, `H = 1/N sum_b vec(P_b) vec(P_b)ᵀ`.

    For a block `[p, q]` it is a dense matrix `[p q, p q]`, so project first. Where all blocks have more than
    1,024 numbers and more than there are rows, the rows are held instead of that matrix, and the matrix of
    their inner products is decomposed.

    >>> fold = second_moment()
    >>> fold.finalize(fold.update(fold.init(), {"mlp": torch.tensor([[[1.0]], [[3.0]]])}))["mlp"].values
    tensor([[5.]], dtype=torch.float64)

    Source: the empirical Fisher matrix, Martens, arXiv:1412.1193, section 11.
    """
    return SecondMoment()
