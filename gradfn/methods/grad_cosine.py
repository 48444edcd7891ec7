"""Cosine of gradients: the inner product without the advantage of long gradients."""

from gradfn.methods.inner_product import InnerProduct
from gradfn.transforms import Transform, chain, unit_normalize


def grad_cosine(*stages: Transform) -> InnerProduct:
    """`score(z, q) = cos(T grad z, T grad q)`, in [-1, 1]; 0 where either gradient is zero.

    >>> from gradfn.transforms import project
    >>> grad_cosine(project(16)).query_transform.stages[-1]
    UnitNormalize()

    Source: Barshan et al., RelatIF, arXiv:2003.11630; Hanawa et al., arXiv:2006.04528, section 3.
    """
    both = chain(*stages, unit_normalize())
    return InnerProduct(both, both)
