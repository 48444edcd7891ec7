"""Influence functions over a fitted curvature, and what differs from them in the norm."""

from gradfn.linalg.spectrum import Damping
from gradfn.methods.inner_product import InnerProduct, Norm
from gradfn.statistics import Curvature
from gradfn.transforms import Transform, chain

Dampings = Damping | float | tuple[Damping | None, ...] | None


def influence(
    curvature: Curvature, *stages: Transform, damping: Dampings = 0.1, norm: Norm = "none"
) -> InnerProduct:
    """`score(z, q) = <T grad z, H^-1 T grad q>`, the effect of z's weight on q's loss.

    Args:
        curvature: what `fit(kfac(), ...)`, `fit(ekfac(), ...)` or another curvature gave, fitted behind the
            same stages.
        stages: `T`, applied to both sides before the curvature.
        damping: a number c adds `c mean(lambda)` of each block; see `Damping`. Several: scores for each.
        norm: see `InnerProduct`.

    >>> H = Curvature("ekfac", {}, 0)
    >>> influence(H, damping=0.01).damping
    (Damping(value=0.01, kind='relative'),)

    Source: Koh and Liang, arXiv:1703.04730, section 2; Grosse et al., arXiv:2308.03296, section 2.
    """
    both = chain(*stages)
    return InnerProduct(both, both, curvature, dampings_of(damping), norm)


def trackstar(curvature: Curvature, *stages: Transform, damping: Dampings = 0.1) -> InnerProduct:
    """`score(z, q) = cos(H^-1/2 T grad z, H^-1/2 T grad q)`, TrackStar's.

    Args:
        curvature: the second moment of training and query gradients, mixed (`mix`, `mixing_coefficient`).
        stages: `T`, optimizer normalisation and projection.
        damping: see `influence`.

    >>> trackstar(Curvature("second_moment", {}, 0)).norm
    'cosine'

    Source: Chang et al., arXiv:2410.17413, section 3.
    """
    return influence(curvature, *stages, damping=damping, norm="cosine")


def relatif(curvature: Curvature, *stages: Transform, damping: Dampings = 0.1) -> InnerProduct:
    """`score(z, q) = <T grad z, H^-1 T grad q> / |H^-1 T grad z|`, relative influence.

    >>> relatif(Curvature("ekfac", {}, 0)).norm
    'relative'

    Source: Barshan et al., arXiv:2003.11630, section 4 (theta-relative influence).
    """
    return influence(curvature, *stages, damping=damping, norm="relative")


def dampings_of(damping: Dampings) -> tuple[Damping | None, ...]:
    """One or several dampings as a tuple."""
    if isinstance(damping, tuple):
        return damping
    return (Damping(float(damping)) if isinstance(damping, int | float) else damping,)
