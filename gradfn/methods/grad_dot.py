"""Inner product of gradients: the effect of one plain gradient step, to first order."""

from gradfn.methods.inner_product import InnerProduct
from gradfn.transforms import Transform, chain


def grad_dot(*stages: Transform) -> InnerProduct:
    """`score(z, q) = <T grad z, T grad q>`, with `T` the chain of stages on both sides.

    A step of size `eta` on `z` lowers the loss of `q` by `eta * score`, to first order.

    >>> from gradfn.transforms import project
    >>> grad_dot(project(16)).row_transform == grad_dot(project(16)).query_transform
    True

    Source: TracIn, arXiv:2002.08484, section 3.2 (one checkpoint, unit learning rate).
    """
    both = chain(*stages)
    return InnerProduct(both, both)
