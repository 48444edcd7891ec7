"""Attribution methods, each a few lines: what is done to the training side and to the query side."""

from gradfn.methods.grad_cosine import grad_cosine
from gradfn.methods.grad_dot import grad_dot

__all__ = ["grad_cosine", "grad_dot"]
